"""Models that `torch.compile` has wrapped are evaluated as they were written."""

import subprocess
import sys
import warnings
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

import references
from cases import IN_PLACE, Uncopied
from curvlinops import (
    EFLinearOperator,
    EKFACLinearOperator,
    EmpiricalRisk,
    GGNDiagonalLinearOperator,
    GGNLinearOperator,
    HessianLinearOperator,
    JacobianLinearOperator,
    KFACLinearOperator,
    KFOCLinearOperator,
)
from curvlinops._model import named_parameters
from curvlinops.examples import gradient_and_loss
from tolerances import assert_close


def compiled(function: Any) -> Any:
    return torch.compile(function, backend="aot_eager")


class Net(nn.Module):
    """Has a block that may be compiled, or be evaluated by a compiled function."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.block = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
        self.last = nn.Linear(4, 2)
        self.activation: Callable[..., Tensor] = torch.tanh

    def forward(self, X: Tensor) -> Tensor:
        return self.last(self.block(self.activation(self.first(X))))


def wrapped(net: Net) -> nn.Module:
    return compiled(net)


def nested(net: Net) -> nn.Module:
    net.block = compiled(net.block)
    return net


def both(net: Net) -> nn.Module:
    return compiled(nested(net))


def inside(net: Net) -> nn.Module:
    net.activation = compiled(torch.tanh)
    return net


def in_place(net: Net) -> nn.Module:
    net.block = compiled(net.block)
    net.lock = Uncopied()  # cannot be copied
    net.compile(backend="aot_eager")
    return net


def hooked(net: Net) -> nn.Module:
    model = compiled(net)
    model.register_forward_hook(lambda module, inputs, output: 2 * output)
    return model


WAYS = (wrapped, nested, both, inside, in_place, hooked)
LOSS = nn.CrossEntropyLoss()
pytestmark = IN_PLACE


def problem(way: Callable[[Net], nn.Module]) -> tuple[nn.Module, nn.Module, list]:
    """Return a model, the same one compiled, and data."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = Net().double()
        data = [(torch.randn(n, 3).double(), torch.randint(2, (n,))) for n in (3, 4)]
    plain = deepcopy(net)
    if way is hooked:
        plain = nn.Sequential(plain)
        plain.register_forward_hook(lambda module, inputs, output: 2 * output)
    model = way(net)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's compiler
        model(data[0][0])  # is compiled here, if anywhere
    return plain, model, data


EXACT = {
    HessianLinearOperator: references.hessian,
    GGNLinearOperator: references.ggn,
    EFLinearOperator: references.empirical_fisher,
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("cls", EXACT)
@pytest.mark.parametrize("cache", ["auto", "off"])
def test_matrices_are_those_of_the_module_behind(cls: type, way: Callable, cache: str):
    plain, model, data = problem(way)
    expected = EXACT[cls](plain, LOSS, dict(plain.named_parameters()), data)
    A = cls(model, LOSS, dict(model.named_parameters()), data, cache=cache)
    for _ in range(4):  # whatever route products take
        assert_close(A @ np.eye(A.shape[0]), expected)


@pytest.mark.parametrize("way", WAYS)
def test_jacobian_and_diagonal(way: Callable):
    plain, model, data = problem(way)
    params, own = dict(plain.named_parameters()), dict(model.named_parameters())
    J = JacobianLinearOperator(model, own, data)
    assert_close(J.to_dense(), references.jacobian(plain, params, data))
    D = GGNDiagonalLinearOperator(model, LOSS, own, data)
    assert_close(D.to_dense().diag(), references.ggn(plain, LOSS, params, data).diag())


@pytest.mark.parametrize("way", [w for w in WAYS if w is not hooked])
@pytest.mark.parametrize(
    "cls", [KFACLinearOperator, EKFACLinearOperator, KFOCLinearOperator]
)
def test_kronecker_factors(cls: type, way: Callable):
    plain, model, data = problem(way)
    options = {"fisher_type": "type-2"}
    expected = cls(plain, LOSS, dict(plain.named_parameters()), data, **options)
    A = cls(model, LOSS, dict(model.named_parameters()), data, **options)
    assert_close(A.to_dense(), expected.to_dense())


@pytest.mark.parametrize("way", [wrapped, both, nested])
def test_parameters_are_known_by_both_spellings(way: Callable):
    plain, model, data = problem(way)
    net = dict(plain.named_parameters())
    expected = references.ggn(plain, LOSS, net, data)
    own = dict(model.named_parameters())
    spellings = {
        "names of the wrapper": own,
        "names of the module behind": dict(zip(net, own.values(), strict=True)),
        "copies": {n: p.detach().clone() for n, p in own.items()},
        "list": list(model.parameters()),
        "pattern": "*",
    }
    for params in spellings.values():
        A = GGNLinearOperator(model, LOSS, params, data)
        assert_close(A.to_dense(), expected)
    for name, size in (("first.weight", 12), ("_orig_mod.first.*", 16)):
        assert_close(A.block(name).to_dense(), expected[:size, :size])
    only = GGNLinearOperator(model, LOSS, "block.0.weight", data)
    assert_close(only.to_dense(), expected[16:32, 16:32])


def test_names_are_those_of_the_module_behind():
    _, model, data = problem(wrapped)
    risk = EmpiricalRisk(model, LOSS, dict(model.named_parameters()), data)
    assert list(risk.params) == [n for n, _ in model._orig_mod.named_parameters()]
    K = KFACLinearOperator(model, LOSS, list(model.parameters()), data)
    assert "first" in K.factors()


def test_unknown_names_are_still_refused():
    _, model, _ = problem(wrapped)
    with pytest.raises(ValueError, match=r"no parameter '_orig_mod\.fist\.weight'"):
        named_parameters(model._orig_mod, {"_orig_mod.fist.weight": torch.ones(4, 3)})


def test_functions_and_losses():
    """A compiled callable in place of a module, and a compiled loss."""
    plain, _, data = problem(wrapped)
    params = dict(plain.named_parameters())

    def evaluate(params: dict[str, Tensor], X: Tensor) -> Tensor:
        return functional_call(plain, params, (X,))

    def loss(f: Tensor, y: Tensor) -> Tensor:
        return nn.functional.cross_entropy(f, y)

    expected = references.hessian(plain, LOSS, params, data)
    for cls, matrix in (
        (HessianLinearOperator, expected),
        (GGNLinearOperator, references.ggn(plain, LOSS, params, data)),
    ):
        for function in (loss, compiled(loss), compiled(LOSS)):
            A = cls(compiled(evaluate), function, params, data)
            assert_close(A.to_dense(), matrix)
    wrapper = compiled(plain)
    own = dict(wrapper.named_parameters())
    A = HessianLinearOperator(
        lambda p, X: functional_call(wrapper, p, (X,)), LOSS, own, data
    )
    assert_close(A.to_dense(), expected)


def test_a_compiled_loss_is_known_in_closed_form():
    plain, _, data = problem(wrapped)
    risk = EmpiricalRisk(plain, compiled(LOSS), list(plain.parameters()), data)
    assert not risk.loss_function.loss.opaque


def test_the_users_model_stays_compiled():
    _, model, data = problem(wrapped)
    params = dict(model.named_parameters())
    gradients, _ = gradient_and_loss(model, LOSS, params, data)
    assert all(map(torch.is_tensor, gradients))
    frames = sys.modules["torch._dynamo.eval_frame"]
    assert frames._stance.stance == "default"
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    torch.compile(lambda x: x.sin() + 1, backend="aot_eager")(torch.ones(5))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before + 1


def test_changes_of_the_module_behind_are_seen():
    plain, model, data = problem(wrapped)
    A = GGNLinearOperator(model, LOSS, list(model.parameters()), data)
    A.to_dense()
    with torch.no_grad():
        for net in (plain, model):
            for p in net.parameters():
                p.mul_(0.7)
    expected = references.ggn(plain, LOSS, dict(plain.named_parameters()), data)
    assert_close(A.to_dense(), expected)


def test_nothing_of_the_compiler_is_loaded_without_need():
    code = """
import sys, torch
from curvlinops import GGNLinearOperator
net = torch.nn.Linear(3, 2)
data = [(torch.rand(4, 3), torch.rand(4, 2))]
G = GGNLinearOperator(net, torch.nn.MSELoss(), list(net.parameters()), data)
loaded = "torch._dynamo" in sys.modules
from curvlinops._compiled import module_behind, switches
assert module_behind(net) is net
assert loaded or not switches()
assert ("torch._dynamo" in sys.modules) == loaded
"""
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)
