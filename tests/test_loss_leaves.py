"""Losses that depend on the parameters by themselves are refused; others are not."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from cases import IN_PLACE
from curvlinops import (
    EmpiricalRisk,
    GGNLinearOperator,
    HessianLinearOperator,
    IdentityLinearOperator,
    ScalarFunction,
)
from curvlinops._loss_leaves import check_loss_leaves
from curvlinops._model import Model

pytestmark = IN_PLACE

WD = 0.3
REFUSED = r"depends on the parameters \[.*IdentityLinearOperator.*ScalarFunction"


class Uncopied(nn.Sequential):
    """A model that is evaluated in place."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        raise RuntimeError("There is one of me.")


def build(kind: type[nn.Sequential] = nn.Sequential, frozen: bool = False) -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)
    return kind(*layers).double().requires_grad_(not frozen)


def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    X = torch.randn(5, 3, dtype=torch.float64, generator=generator)
    y = torch.tensor([0, 1, 1, 0, 1])
    return [(X[:2], y[:2]), (X[2:], y[2:])]


def joined() -> tuple[Tensor, Tensor]:
    X, y = zip(*batches(), strict=True)
    return torch.cat(X), torch.cat(y)


def decay(model: nn.Module) -> Tensor:
    return WD / 2 * sum(p.square().sum() for p in model.parameters())


def with_term(term: Callable[[nn.Module], Any]) -> Callable[..., Any]:
    """Return what makes a loss with another term for a model."""
    return lambda model: lambda f, y: F.cross_entropy(f, y) + term(model)


def prepared(make: Callable[[nn.Module], list[Tensor]]) -> Callable[..., Any]:
    """Return what makes a loss with a decay of tensors that are made beforehand."""

    def loss_of(model: nn.Module) -> Callable[..., Tensor]:
        tensors = make(model)
        return lambda f, y: F.cross_entropy(f, y) + sum(t.norm() for t in tensors)

    return loss_of


class Penalised(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, f: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(f, y) + decay(self.model)

    def method(self, f: Tensor, y: Tensor) -> Tensor:
        return self(f, y)


class SquaredNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, p: Tensor) -> Tensor:
        ctx.save_for_backward(p)
        return p.square().sum()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:  # type: ignore[override]
        (p,) = ctx.saved_tensors
        return 2 * g * p


def squared_norm(p: Tensor) -> Tensor:
    return p.square().sum()


X = joined()[0]
DEPENDENT = {
    "decay": with_term(decay),
    "norm": with_term(lambda m: m[0].weight.norm()),
    "transposed": with_term(lambda m: m[0].weight.mT.square().sum()),
    "foreach": with_term(lambda m: sum(torch._foreach_norm([*m.parameters()]))),
    "one vector": with_term(
        lambda m: nn.utils.parameters_to_vector(m.parameters()).norm()
    ),
    "rows": with_term(lambda m: sum(row.norm() for row in m[2].weight)),
    "keyword": with_term(lambda m: torch.linalg.vector_norm(x=m[0].bias)),
    "second call": with_term(lambda m: (m(X + 1) - m(X)).square().mean()),
    "functional call": with_term(
        lambda m: functional_call(m, dict(m.named_parameters()), (X,)).norm()
    ),
    "listed": prepared(lambda m: [*m.parameters()]),
    "views": prepared(lambda m: [m[0].weight.view(-1)[3:], m[2].weight.T]),
    "shared memory": prepared(lambda m: [nn.Parameter(m[0].weight.detach()[1:])]),
    "function of one's own": with_term(lambda m: SquaredNorm.apply(m[0].weight)),
    "gradient": with_term(lambda m: torch.func.grad(squared_norm)(m[2].bias).sum()),
    "slope": with_term(lambda m: torch.func.jacrev(m)(X[0]).square().sum()),
    "tangent": with_term(
        lambda m: torch.func.jvp(squared_norm, (m[2].bias,), (m[2].bias,))[1]
    ),
    "each row": with_term(lambda m: torch.vmap(squared_norm)(m[0].weight).sum()),
    "temperature": lambda m: lambda f, y: F.cross_entropy(f * m[2].bias, y),
    "module": Penalised,
    "method": lambda m: Penalised(m).method,
    "partial": lambda m: partial(
        lambda p, f, y: (f - p[:2]).square().mean(), m[0].bias
    ),
}
CONSTANT = {
    "plain": with_term(lambda m: 0.0),
    "detached": with_term(lambda m: m[0].weight.detach().norm()),
    "data": with_term(lambda m: m[0].weight.data.norm()),
    "function of what is detached": with_term(
        lambda m: SquaredNorm.apply(m[0].weight.detach())
    ),
    "function without gradients": with_term(
        lambda m: torch.no_grad()(SquaredNorm.apply)(m[0].weight)
    ),
    "detached slope": with_term(lambda m: torch.func.jacrev(m)(X[0]).detach().sum()),
    "inference": with_term(
        lambda m: torch.inference_mode()(lambda: float(m[0].weight.norm()))()
    ),
    "numbers": with_term(lambda m: m[0].weight.norm().item()),
    "numpy": with_term(lambda m: np.abs(m[0].weight.detach().numpy()).sum()),
    "own policy": with_term(
        lambda m: torch.no_grad()(m)(X).log_softmax(1).exp().sum() + m(X).detach().sum()
    ),
    "state": with_term(lambda m: m.state_dict()["0.weight"].norm()),
    "detached before": prepared(lambda m: [p.detach() for p in m.parameters()]),
    "teacher": prepared(lambda m: [*build().parameters()]),
    "copy": prepared(lambda m: copy.deepcopy([*m.parameters()])),
    "own weights": lambda m: partial(
        lambda p, f, y: F.cross_entropy(f * p, y),
        nn.Parameter(torch.ones(2, dtype=torch.float64)),
    ),
}


def as_given(model: nn.Module) -> tuple[Any, Mapping[str, Tensor]]:
    return model, dict(model.named_parameters())


def elsewhere(model: nn.Module) -> tuple[Any, Mapping[str, Tensor]]:
    """Give values that are not the module's own."""
    named = model.named_parameters()
    return model, {name: p.detach() + 0.1 for name, p in named}


def as_function(model: nn.Module) -> tuple[Any, Mapping[str, Tensor]]:
    def call(params: dict[str, Tensor], X: Tensor) -> Tensor:
        return functional_call(model, params, (X,))

    return call, dict(model.named_parameters())


@pytest.mark.parametrize("frozen", [False, True], ids=["", "frozen"])
@pytest.mark.parametrize("name", DEPENDENT)
def test_dependent_losses_are_refused(name: str, frozen: bool):
    for kind in (nn.Sequential, Uncopied):
        model = build(kind, frozen)
        loss = DEPENDENT[name](model)
        with pytest.raises(ValueError, match=REFUSED):
            GGNLinearOperator(*[model, loss, "*", batches()])
    for give in (elsewhere, as_function):
        model = build(frozen=frozen)
        loss = DEPENDENT[name](model)
        if name == "shared memory" and give is elsewhere:
            continue  # it is the memory of a tensor that is not evaluated
        func, params = give(model)
        with pytest.raises(ValueError, match=REFUSED):
            HessianLinearOperator(func, loss, params, batches())


@pytest.mark.parametrize("frozen", [False, True], ids=["", "frozen"])
@pytest.mark.parametrize("name", CONSTANT)
def test_constants_are_none(name: str, frozen: bool):
    for kind in (nn.Sequential, Uncopied):
        model = build(kind, frozen)
        GGNLinearOperator(model, CONSTANT[name](model), "*", batches())
    for give in (elsewhere, as_function):
        model = build(frozen=frozen)
        func, params = give(model)
        GGNLinearOperator(func, CONSTANT[name](model), params, batches())


@pytest.mark.parametrize("frozen", [False, True], ids=["", "frozen"])
def test_parameters_that_are_not_given_are_constants(frozen: bool):
    model = build(frozen=frozen)
    loss = with_term(lambda m: m[0].weight.norm())(model)
    H = HessianLinearOperator(model, loss, "2.*", batches())
    X, y = joined()
    own = dict(model.named_parameters())

    def total(weight: Tensor, bias: Tensor) -> Tensor:
        changed = {**own, "2.weight": weight, "2.bias": bias}
        return loss(functional_call(model, changed, (X,)), y)

    last = own["2.weight"].detach(), own["2.bias"].detach()
    blocks = torch.autograd.functional.hessian(total, last)
    rows = [
        [b.reshape(p.numel(), -1) for b in r] for p, r in zip(last, blocks, strict=True)
    ]
    expected = torch.cat([torch.cat(row, 1) for row in rows])
    assert torch.allclose(H.to_dense(), expected, rtol=1e-10)


def test_a_loss_in_the_memory_of_the_parameters_but_not_in_them_is_none_of_theirs():
    memory = torch.randn(20, dtype=torch.float64)
    model = build()
    model[0].weight.data = memory[:12].view(4, 3)
    own = nn.Parameter(memory[12:14])
    loss = partial(lambda p, f, y: F.cross_entropy(f * p, y), own)
    GGNLinearOperator(model, loss, "*", batches())


def test_parameters_that_are_themselves_computed():
    theta = torch.randn(8, dtype=torch.float64, requires_grad=True)
    params = {"w": 2 * theta[:6].view(3, 2), "b": 2 * theta[6:]}

    def model(params: dict[str, Tensor], X: Tensor) -> Tensor:
        return X @ params["w"] + params["b"]

    GGNLinearOperator(model, nn.CrossEntropyLoss(), params, batches())
    loss = prepared(lambda _: [params["w"]])(None)
    with pytest.raises(ValueError, match=REFUSED):
        GGNLinearOperator(model, loss, params, batches())


def test_a_penalty_that_is_asked_of_trainable_parameters_only():
    loss_of = with_term(
        lambda m: sum(p.norm() for p in m.parameters() if p.requires_grad)
    )
    model = build(frozen=True)
    GGNLinearOperator(model, loss_of(model), "*", batches())
    model[0].bias.requires_grad_()
    with pytest.raises(ValueError, match=r"\['0.bias'\]"):
        GGNLinearOperator(model, loss_of(model), "*", batches())


def test_targets_with_a_graph():
    model = build()
    data = [(x, model(x + 1)) for x, _ in batches()]
    with pytest.raises(ValueError, match="targets with a graph"):
        GGNLinearOperator(model, nn.MSELoss(), "*", data)
    data = [(x, model(x + 1).detach()) for x, _ in batches()]
    GGNLinearOperator(model, nn.MSELoss(), "*", data)


@pytest.mark.parametrize("penalised", [False, True])
def test_losses_that_differentiate_the_output(penalised: bool):
    model = build()
    ((x, _), *_) = batches()
    x.requires_grad_()

    def loss(f: Tensor, _: Any) -> Tensor:
        (slope,) = torch.autograd.grad(f.sum(), x, create_graph=True)
        return slope.square().mean() + (decay(model) if penalised else 0.0)

    arguments = model, loss, "*", [(x, None)]
    if penalised:
        with pytest.raises(ValueError, match=REFUSED):
            EmpiricalRisk(*arguments)
    else:
        EmpiricalRisk(*arguments)


def test_a_term_of_the_second_batch_only():
    model = build()

    def loss(f: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(f, y) + (decay(model) if len(f) == 3 else 0.0)

    with pytest.raises(ValueError, match=REFUSED):
        GGNLinearOperator(model, loss, "*", batches())


@pytest.mark.parametrize("frozen", [False, True], ids=["", "frozen"])
@pytest.mark.parametrize("kind", [nn.Sequential, Uncopied])
def test_found_by_verify_where_nothing_was_checked(kind: Any, frozen: bool):
    for loss_of, passes in ((DEPENDENT["decay"], False), (CONSTANT["plain"], True)):
        model = build(kind, frozen)
        loss = loss_of(model)
        arguments = model, loss, "*", batches()
        A = HessianLinearOperator(*arguments, check_deterministic=False)
        (check,) = [c for c in A.verify().checks if c.name == "loss of outputs"]
        assert check.passed == passes
        assert passes or "IdentityLinearOperator" in check.note


class Inside(nn.Module):
    """Returns the decay as another column."""

    def __init__(self) -> None:
        super().__init__()
        self.net = build()

    def forward(self, X: Tensor) -> Tensor:
        f = self.net(X)
        return torch.cat([f, decay(self.net).expand(len(f), 1)], 1)


def test_the_cures_give_the_whole_hessian():
    model = build()
    named = dict(model.named_parameters())
    X, y = joined()
    theta = nn.utils.parameters_to_vector(named.values()).detach()

    def params_of(theta: Tensor) -> dict[str, Tensor]:
        parts = theta.split([p.numel() for p in named.values()])
        pairs = zip(named.items(), parts, strict=True)
        return {n: part.view(p.shape) for (n, p), part in pairs}

    def total(params: dict[str, Tensor]) -> Tensor:
        f = functional_call(model, params, (X,))
        return F.cross_entropy(f, y) + WD / 2 * sum(
            p.square().sum() for p in params.values()
        )

    expected = torch.autograd.functional.hessian(
        lambda theta: total(params_of(theta)), theta
    )

    def first_columns(f: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(f[:, :2], y) + f[:, 2].mean()

    A = HessianLinearOperator(model, nn.CrossEntropyLoss(), "*", batches())
    identity = IdentityLinearOperator(A.in_shapes, A.device, A.torch_dtype)
    inside = Inside()
    for H in (
        A + WD * identity,
        HessianLinearOperator(inside, first_columns, "*", batches()),
        HessianLinearOperator(ScalarFunction(total, named)),
    ):
        assert torch.allclose(H.to_dense(), expected, rtol=1e-9, atol=1e-12)


def test_lack_of_memory_is_raised():
    """Not taken for a loss that needs the model's graph."""

    def loss(f: Tensor, y: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    model = build()
    ((X, y), _) = batches()
    with pytest.raises(torch.OutOfMemoryError):
        check_loss_leaves(Model(model, {"0.bias": model[0].bias}), loss, model(X), y)
