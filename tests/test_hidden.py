"""Parameters that a graph does not lead to, since a function uses them unseen."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import curvlinops as c
from cases import IN_PLACE, Uncopied
from curvlinops import risk as risk_module
from curvlinops.examples import gradient_and_loss
from tolerances import assert_close

REENTRANT, PLAIN = {"use_reentrant": True}, {"use_reentrant": False}

pytestmark = [
    IN_PLACE,
    pytest.mark.filterwarnings(
        "ignore:None of the inputs have requires_grad=True"  # torch's, of a checkpoint
    ),
]


@pytest.fixture(autouse=True)
def _double() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


class Saving(Function):
    """Keeps a part's input, and evaluates the part again in the backward pass."""

    @staticmethod
    def forward(ctx, x, part):
        ctx.save_for_backward(x)
        ctx.part = part
        with torch.no_grad():
            return part(x)

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            y = ctx.part(x)
        torch.autograd.backward(y, g)
        return x.grad, None


class WithGraph(Saving):
    """The same, but the part's graph is built in the forward pass, and dropped."""

    @staticmethod
    def forward(ctx, x, part):
        ctx.save_for_backward(x)
        ctx.part = part
        with torch.enable_grad():
            return part(x.detach()).detach()


class WithSetup(Function):
    """The same in the style in which a context is set up later."""

    @staticmethod
    def forward(x, part):
        return part(x)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, ctx.part = inputs
        ctx.save_for_backward(x)

    backward = Saving.backward


class CheckpointFunction(Saving):
    """A copy of torch's function, as libraries have them."""


class Linear(Function):
    """It is given all that it uses."""

    @staticmethod
    def forward(ctx, x, W, b):
        ctx.save_for_backward(x, W)
        return x @ W.T + b

    @staticmethod
    def backward(ctx, g):
        x, W = ctx.saved_tensors
        return g @ W, g.T @ x, g.sum(0)


class Net(nn.Module):
    """Three layers; a function says how they are evaluated."""

    def __init__(self, evaluate: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.evaluate = evaluate

    def forward(self, X: Tensor) -> Tensor:
        return self.evaluate(self, X)


def sequential(net: Net, X: Tensor, **options: Any) -> Tensor:
    parts = nn.Sequential(net.a, nn.Tanh(), net.b)
    return net.c(checkpoint_sequential(parts, 3, X, **options))


def of_a_function_of_the_weight(net: Net, X: Tensor) -> Tensor:
    W = 2 * net.b.weight
    return net.c(Saving.apply(X, lambda x: x @ W))


def grad(X: Tensor) -> Tensor:
    return X.clone().requires_grad_()


#: Models whose graph lacks a way to some parameters. There is no checkpoint in it, or
#: none of torch's, wherever the input of the part does not require a gradient.
HIDDEN: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "of inputs": lambda s, X: s.c(checkpoint(s.a, X, **REENTRANT)),
    "of inputs with gradient": lambda s, X: s.c(checkpoint(s.a, grad(X), **REENTRANT)),
    "of a hidden layer": lambda s, X: s.c(checkpoint(s.b, s.a(X), **REENTRANT)),
    "last": lambda s, X: checkpoint(s.c, s.b(s.a(X)).tanh(), **REENTRANT),
    "of a layer that is used twice": lambda s, X: s.c(
        s.a(checkpoint(s.a, X, **REENTRANT))
    ),
    "beside the way": lambda s, X: (
        s.c(s.a(X)) + 0 * checkpoint(s.c, grad(X), **REENTRANT)
    ),
    "in another": lambda s, X: s.c(
        checkpoint(partial(checkpoint, s.b, **REENTRANT), s.a(X), **PLAIN)
    ),
    "around another": lambda s, X: s.c(
        checkpoint(partial(checkpoint, s.b, **PLAIN), X, **REENTRANT)
    ),
    "twice": lambda s, X: s.c(
        checkpoint(partial(checkpoint, s.b, **REENTRANT), X, **REENTRANT)
    ),
    "sequential": partial(sequential, **REENTRANT),
    "sequential with gradient": lambda s, X: sequential(s, grad(X), **REENTRANT),
    "of a method": lambda s, X: s.c(checkpoint(s.b.__call__, X, **REENTRANT)),
    "a list": lambda s, X: s.c(
        checkpoint(lambda h: h[0].tanh(), [s.a(X)], **REENTRANT)
    ),
    "saving": lambda s, X: s.c(Saving.apply(s.a(X), s.b)),
    "saving, of inputs": lambda s, X: s.c(Saving.apply(X, s.b)),
    "with graph": lambda s, X: s.c(WithGraph.apply(s.a(X), s.b)),
    "with graph, of inputs": lambda s, X: s.c(WithGraph.apply(X, s.b)),
    "with setup": lambda s, X: s.c(WithSetup.apply(s.a(X), s.b)),
    "a copy": lambda s, X: s.c(CheckpointFunction.apply(s.a(X), torch.tanh)),
    "a function of the weight": of_a_function_of_the_weight,
}


def without_gradients(evaluate: Callable[[], Tensor]) -> Tensor:
    with torch.no_grad():
        return evaluate()


def plain(net: Any, X: Tensor) -> Tensor:
    return net.c(net.b(net.a(X)).tanh())


#: Models that are what their graphs say, and the same without anything special.
SEEN: dict[str, tuple[Callable[[Any, Tensor], Tensor], Any]] = {
    "not reentrant": (
        lambda s, X: s.c(checkpoint(s.b, s.a(X), **PLAIN).tanh()),
        plain,
    ),
    "of inputs": (
        lambda s, X: s.c(s.b(checkpoint(s.a, X, **PLAIN)).tanh()),
        plain,
    ),
    "all to the end": (
        lambda s, X: checkpoint(partial(plain, s), X, early_stop=False, **PLAIN),
        plain,
    ),
    "given all": (
        lambda s, X: s.c(Linear.apply(s.a(X), s.b.weight, s.b.bias).tanh()),
        plain,
    ),
    "constant on purpose": (
        lambda s, X: (
            plain(s, X) + without_gradients(lambda: checkpoint(s.c, X, **REENTRANT))
        ),
        lambda s, X: plain(s, X) + s.c(X).detach(),
    ),
}


def operators(net: nn.Module) -> dict[str, Callable[..., Any]]:
    X, y = torch.rand(5, 4), torch.rand(5, 3)
    params, data = dict(net.named_parameters()), [(X[:3], y[:3]), (X[3:], y[3:])]
    problem = net, nn.MSELoss(), params, data

    def dense(cls: Any, *given: Any, **options: Any) -> Tensor:
        return cls(*(given or problem), **options).to_dense()

    kinds = {
        f"{cls.__name__}, {kind}": partial(dense, cls, fisher_type=kind)
        for cls in (c.KFACLinearOperator, c.EKFACLinearOperator, c.KFOCLinearOperator)
        for kind in ("type-2", "mc", "empirical", "forward-only")
    }
    classes = (
        *(c.HessianLinearOperator, c.GGNLinearOperator, c.GGNDiagonalLinearOperator),
        *(c.EFLinearOperator, c.FisherMCLinearOperator, c.GramLinearOperator),
    )
    both = c.JacobianLinearOperator, c.TransposedJacobianLinearOperator
    return {
        **kinds,
        **{cls.__name__: partial(dense, cls) for cls in classes},
        **{cls.__name__: partial(dense, cls, net, params, data) for cls in both},
    }


@pytest.mark.parametrize("checks", [True, False])
@pytest.mark.parametrize("name", list(HIDDEN))
def test_hidden_parameters_are_refused(name: str, checks: bool) -> None:
    net = Net(HIDDEN[name])
    for operator in operators(net).values():
        with pytest.raises(ValueError, match=r"part of every.*use_reentrant=False"):
            operator(check_deterministic=checks)
    X, y = torch.rand(5, 4), torch.rand(5, 3)
    with pytest.raises(ValueError, match="use_reentrant=False"):
        gradient_and_loss(net, nn.MSELoss(), dict(net.named_parameters()), [(X, y)])


@pytest.mark.parametrize("name", list(SEEN))
def test_what_graphs_show_is_left_alone(name: str) -> None:
    evaluate, same = SEEN[name]
    torch.manual_seed(0)
    net = Net(evaluate)
    other = Net(same)
    other.load_state_dict(net.state_dict())
    torch.manual_seed(1)
    built = operators(net)
    torch.manual_seed(1)
    expected = operators(other)
    for kind, operator in built.items():
        if "CLinear" in kind and "given all" in name:  # a use that is not known
            continue
        assert_close(operator(), expected[kind](), size=1000)


def test_of_a_callable() -> None:
    def model(params: dict[str, Tensor], X: Tensor) -> Tensor:
        hidden = checkpoint(lambda x: x @ params["W"], X, **REENTRANT)
        return hidden.tanh() @ params["V"]

    params = {"W": torch.rand(4, 3), "V": torch.rand(3, 2)}
    data = [(torch.rand(5, 4), torch.rand(5, 2))]
    with pytest.raises(ValueError, match=r"\['W'\] inside.*'CheckpointFunction'"):
        c.GGNLinearOperator(model, nn.MSELoss(), params, data)
    # What is hidden does not matter if it is no parameter.
    W = params.pop("W")

    def rest(params: dict[str, Tensor], X: Tensor) -> Tensor:
        return model({**params, "W": W}, X)

    def visible(params: dict[str, Tensor], X: Tensor) -> Tensor:
        return (X @ W).tanh() @ params["V"]

    A, B = (
        c.GGNLinearOperator(f, nn.MSELoss(), params, data).to_dense()
        for f in (rest, visible)
    )
    assert_close(A, B)


def in_place(net: nn.Module) -> tuple[Any, Any]:
    """It cannot be copied."""
    net.lock = Uncopied()
    return net, dict(net.named_parameters())


def at_copies(net: nn.Module) -> tuple[Any, Any]:
    return net, {n: p.detach().clone() for n, p in net.named_parameters()}


def called(net: nn.Module) -> tuple[Any, Any]:
    def model(params: dict[str, Tensor], X: Tensor) -> Tensor:
        return functional_call(net, params, (X,))

    return model, dict(net.named_parameters())


def from_outside(net: nn.Module) -> tuple[Any, Any]:
    """A copy of the outer module still calls the inner one itself."""
    outer = Net(lambda _, X: net(X))
    outer.inner = net
    return outer, "inner.*"


@pytest.mark.parametrize("make", [in_place, at_copies, called, from_outside])
@pytest.mark.parametrize("name", ["of inputs", "of a hidden layer", "with graph"])
def test_however_parameters_are_put_in(
    name: str, make: Callable[[nn.Module], tuple[Any, Any]]
) -> None:
    model, params = make(Net(HIDDEN[name]))
    data = [(torch.rand(5, 4), torch.rand(5, 3))]
    for cls in (c.HessianLinearOperator, c.GGNLinearOperator, c.KFACLinearOperator):
        with pytest.raises(ValueError, match="use_reentrant=False"):
            cls(model, nn.MSELoss(), params, data)


def test_of_a_scalar_function() -> None:
    def f(params: dict[str, Tensor]) -> Tensor:
        return checkpoint(lambda x: (x * params["a"]).sum(), params["b"], **REENTRANT)

    params = {"a": torch.rand(3), "b": torch.rand(3)}
    with pytest.raises(ValueError, match="use_reentrant=False"):
        c.HessianLinearOperator(c.ScalarFunction(f, params))


def test_a_function_of_ones_own_is_named() -> None:
    net = Net(HIDDEN["saving, of inputs"])
    data = [(torch.rand(5, 4), torch.rand(5, 3))]
    params = dict(net.named_parameters())
    with pytest.raises(ValueError, match=r"'b.weight', 'b.bias'.*'Saving'.*`apply`"):
        c.GGNLinearOperator(net, nn.MSELoss(), params, data)


def test_parts_that_are_switched_on_later() -> None:
    class Model(Net):
        saves = False

        def forward(self, X: Tensor) -> Tensor:
            if self.saves or self.training:
                return self.c(checkpoint(self.a, X, **REENTRANT))
            return self.c(self.a(X))

    net = Model(plain).eval()
    data = [(torch.rand(5, 4), torch.rand(5, 3))]
    params = {n: p for n, p in net.named_parameters() if n[0] != "b"}
    A = c.GGNLinearOperator(net, nn.MSELoss(), params, data)
    before = A.to_dense()
    net.train()
    with pytest.raises(ValueError, match="use_reentrant"):
        A.to_dense()
    net.eval()
    assert_close(A.to_dense(), before)
    net.saves = True
    A.refresh()
    with pytest.raises(ValueError, match="use_reentrant"):
        A.to_dense()


def test_only_some_batches() -> None:
    def long(net: Any, X: Tensor) -> Tensor:
        h = checkpoint(net.a, X, **REENTRANT) if len(X) > 3 else net.a(X)
        return net.c(net.b(h).tanh())

    net = Net(long)
    data = [(torch.rand(n, 4), torch.rand(n, 3)) for n in (2, 3, 5)]
    params = dict(net.named_parameters())
    for checks in (True, False):
        with pytest.raises(ValueError, match="batch 2"):
            A = c.GGNLinearOperator(
                net, nn.MSELoss(), params, data, check_deterministic=checks
            )
            A @ torch.ones(A.shape[1])


def test_a_loss_with_a_checkpoint() -> None:
    net = Net(plain)
    params, X, y = dict(net.named_parameters()), torch.rand(5, 4), torch.rand(5, 3)

    def loss(f: Tensor, y: Tensor) -> Tensor:
        return checkpoint(lambda f: (f - y).square().mean(), f, **REENTRANT)

    for cls in (
        *(c.HessianLinearOperator, c.GGNLinearOperator, c.EFLinearOperator),
        c.KFACLinearOperator,
    ):
        kind = {"fisher_type": "type-2"} if cls is c.KFACLinearOperator else {}
        options = {"reduction": "mean", "check_deterministic": False, **kind}
        with pytest.raises(ValueError, match=r"loss.*holds.*use_reentrant=False"):
            cls(net, loss, params, [(X, y)], **options).to_dense()

    def penalised(f: Tensor, y: Tensor) -> Tensor:
        size = checkpoint(lambda y: net.c.weight.square().sum(), y, **REENTRANT)
        return (f - y).square().mean() + size

    with pytest.raises(ValueError, match=r"loss depends on.*'c.weight'.*by itself"):
        c.HessianLinearOperator(net, penalised, params, [(X, y)])


def test_settled_products_do_not_look(monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[str] = []
    look = risk_module.refuse_reentrant

    def counted(value: Tensor, what: str, *rest: Any) -> None:
        looked.append(what)
        look(value, what, *rest)

    monkeypatch.setattr(risk_module, "refuse_reentrant", counted)
    net = Net(plain)
    data = [(torch.rand(n, 4), torch.rand(n, 3)) for n in (2, 3)]
    params = dict(net.named_parameters())
    A = c.GGNLinearOperator(net, nn.MSELoss(), params, data, cache="off")
    assert len(looked) == len(data)
    for _ in range(3):
        A @ torch.ones(A.shape[1])
    assert len(looked) == len(data)
    with torch.no_grad():
        net.a.bias.add_(1)
    A @ torch.ones(A.shape[1])
    assert len(looked) == 2 * len(data)


def test_products_within_a_function() -> None:
    """Functions of the user's, around all of it, do not count."""
    net = Net(plain)
    data = [(torch.rand(5, 4), torch.rand(5, 3))]

    class Solve(Function):
        @staticmethod
        def forward(ctx, v):
            A = c.GGNLinearOperator(
                net, nn.MSELoss(), dict(net.named_parameters()), data
            )
            return A @ v

        @staticmethod
        def backward(ctx, g):
            return g

    A = c.GGNLinearOperator(net, nn.MSELoss(), dict(net.named_parameters()), data)
    v = torch.rand(A.shape[1], requires_grad=True)
    assert_close(Solve.apply(v).detach(), A @ v.detach())


def test_compiled_models() -> None:
    net = nn.Sequential(nn.Linear(4, 3))
    data = [(torch.rand(5, 4), torch.rand(5, 3))]
    compiled: Any = torch.compile(net, backend="eager")
    params = dict(compiled.named_parameters())
    A = c.GGNLinearOperator(compiled, nn.MSELoss(), params, data)
    B = c.GGNLinearOperator(net, nn.MSELoss(), dict(net.named_parameters()), data)
    assert_close(A.to_dense(), B.to_dense())
