"""What a forward pass does with parameters: all of it is seen, or it is refused."""

import pytest
import torch
from test_geometry import block_of
from torch import nn
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import references
from curvlinops import EKFACLinearOperator, KFACLinearOperator, KFOCLinearOperator
from tolerances import assert_close

#: Torch's own, when its forward mode is used for the first time.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")

FAMILY = KFACLinearOperator, EKFACLinearOperator, KFOCLinearOperator
SHAPES = {
    "W": (3, 2),
    "b": (3,),
    "V": (1, 3),
    "c": (1,),
    "H": (2, 3),
    "s": (2,),
    "K": (3, 1, 2),
    "E": (4, 2),
}


def derivative(u, x):
    return torch.autograd.grad(u.sum(), x, create_graph=True)[0]


def by_input(function):
    """Return a model whose output is a function of the input and its derivative."""

    def model(p, X):
        with torch.enable_grad():
            x = X.detach().requires_grad_()
            u = function(p, x)
            return torch.cat([u.flatten(1), derivative(u, x).flatten(1)], 1)

    return model


def dual(function):
    """Return a model whose output is a function and its derivative, forward mode."""

    def model(p, X):
        with forward_ad.dual_level():
            u = function(p, forward_ad.make_dual(X, torch.ones_like(X)))
            return torch.cat([t.flatten(1) for t in forward_ad.unpack_dual(u)], 1)

    return model


def linear(p, x):
    return F.linear(x, p["W"])


def perceptron(p, x):
    return F.linear(F.linear(x, p["W"], p["b"]).tanh(), p["V"], p["c"])


def two_axes(p, x):
    return perceptron(p, x.unsqueeze(1))


def in_parts(p, x):
    return F.linear(checkpoint(linear, p, x, use_reentrant=False).tanh(), p["V"])


def tied(p, x):
    return (F.linear(x, p["W"]).tanh() @ p["W"]).tanh()


def convolution(p, x):
    return F.conv1d(x.unsqueeze(1), p["K"]).tanh()


def laplacian(p, X):
    with torch.enable_grad():
        x = X.detach().requires_grad_()
        u = perceptron(p, x)
        du = derivative(u, x)
        ddu = sum(derivative(du[:, i], x)[:, i : i + 1] for i in range(2))
        return torch.cat([u, ddu], 1)


def forces(p, X):
    with torch.enable_grad():
        x = X.detach().requires_grad_()
        return -derivative(perceptron(p, x), x)


def penalty(p, X):
    with torch.enable_grad():
        x = X.detach().requires_grad_()
        u = linear(p, x).tanh()
        return torch.cat([u, derivative(u, x).square().sum(1, keepdim=True)], 1)


def transforms(name):
    """Return a model with the Jacobian of a function, by a transform of torch."""

    def model(p, X):
        J = getattr(torch.func, name)(lambda x: linear(p, x).tanh())(X[0])
        return torch.cat([linear(p, X), J.reshape(1, -1)], 1)

    return model


def functional(p, X):
    def function(x):
        return linear(p, x).tanh()

    J = torch.autograd.functional.jacobian(function, X, create_graph=True)
    return torch.cat([function(X), J.reshape(1, -1)], 1)


def by_weight(p, X):
    with torch.enable_grad():
        u = linear(p, X).tanh()
        (g,) = torch.autograd.grad(u.sum(), p["W"], create_graph=True)
        return torch.cat([u, g.reshape(1, -1)], 1)


class Product(torch.autograd.Function):
    """A function whose use of a weight is in the graph only."""

    @staticmethod
    def forward(ctx, x, W):
        ctx.save_for_backward(x, W)
        return x @ W.T

    @staticmethod
    def backward(ctx, g):
        x, W = ctx.saved_tensors
        return g @ W, g.T @ x


REFUSED = {
    "one layer": (by_input(linear), "W"),
    "two layers": (by_input(perceptron), "W V"),
    "more axes": (by_input(two_axes), "W V"),
    "checkpoint": (by_input(in_parts), "W V"),
    "tied": (by_input(tied), "W"),
    "convolution": (by_input(convolution), "K"),
    "scale": (by_input(lambda p, x: (x * p["s"]).tanh()), "s"),
    "norm": (by_input(lambda p, x: F.layer_norm(x, (2,), p["s"]).tanh()), "s"),
    "dual numbers": (dual(linear), "W"),
    "dual numbers, convolution": (dual(convolution), "K"),
    "laplacian": (laplacian, "W V"),
    "forces": (forces, "W V"),
    "penalty": (penalty, "W"),
    "jacrev": (transforms("jacrev"), "W"),
    "jacfwd": (transforms("jacfwd"), "W"),
    "functional": (functional, "W"),
    "by the weight": (by_weight, "W"),
    "custom function": (
        lambda p, X: torch.cat([linear(p, X), Product.apply(X, p["W"])], 1),
        "W",
    ),
    "the weight itself": (lambda p, X: p["H"].T[:1] * 1 + 0 * X.sum(), "H"),
}


def hooked(p, X):
    h = linear(p, X)
    if h.requires_grad:
        h.register_hook(lambda g: 3 * g)
    return h.tanh()


def result_not_used(p, X):
    linear(p, 2 * X)
    return linear(p, X).tanh()


def detached(p, X):
    with torch.enable_grad():
        x = X.detach().requires_grad_()
        (du,) = torch.autograd.grad(linear(p, x).tanh().sum(), x)
    return linear(p, X * du).tanh()


def embedded(p, X):
    with torch.enable_grad():
        e = F.embedding((X > 0).long(), p["E"])
        u = e.square().prod(-1)
        return torch.cat([u, derivative(u, e).flatten(1)], 1)


#: Models, and the parameters that have a known form in them.
KNOWN = {
    "layer behind": (
        lambda p, X: F.linear(by_input(linear)({"W": p["H"].detach().T}, X), p["X"]),
        "X",
    ),
    "biases": (by_input(perceptron), "b c"),
    "shift": (by_input(lambda p, x: (x + p["s"]).tanh()), "s"),
    "hook": (hooked, "W"),
    "result not used": (result_not_used, "W"),
    "detached derivative": (detached, "W"),
    "embedding": (embedded, "E"),
}


def build(model, names):
    """Return a problem with one datum and some of the parameters."""
    generator = torch.Generator().manual_seed(0)
    shapes = {**SHAPES, "X": (2, 5)}
    values = {
        name: torch.rand(shape, generator=generator, dtype=torch.float64) + 0.1
        for name, shape in shapes.items()
    }
    X = torch.rand(1, 2, generator=generator, dtype=torch.float64)
    params = {name: values[name] for name in names.split()}

    def function(p, X):
        return model({**values, **p}, X)

    leaves = {name: value.clone().requires_grad_() for name, value in values.items()}
    y = torch.zeros_like(model(leaves, X)).detach()
    return function, nn.MSELoss(reduction="sum"), params, [(X, y)]


@pytest.mark.parametrize("cls", FAMILY)
@pytest.mark.parametrize("name", REFUSED)
def test_uses_that_are_not_seen_are_refused(cls, name):
    model, names = REFUSED[name]
    A = cls(*build(model, names), fisher_type="type-2")
    with pytest.raises(ValueError, match="No Kronecker-factored form") as raised:
        A.trace()
    for weight in names.split():
        assert f"'{weight}' in `" in str(raised.value)


@pytest.mark.parametrize("name", REFUSED)
def test_their_diagonal_is_exact(name):
    model, names = REFUSED[name]
    built = build(model, names)
    A = KFACLinearOperator(*built, fisher_type="type-2", unsupported="diagonal")
    assert_close(A.diagonal(), references.ggn(*built).diagonal(), size=1000)


def test_the_cause_is_named():
    K = KFACLinearOperator(*build(*REFUSED["one layer"]))
    with pytest.raises(ValueError, match=r"'W' in `MmBackward0`.*derivative by the in"):
        K.trace()


@pytest.mark.parametrize("cls", FAMILY)
@pytest.mark.parametrize("name", KNOWN)
def test_what_is_seen_is_exact_for_one_datum(cls, name):
    """One row of inputs, so every block is a Kronecker product."""
    model, names = KNOWN[name]
    built = build(model, names)
    options = {"max_iter": 200, "tolerance": 1e-14} if cls is KFOCLinearOperator else {}
    A = cls(*built, fisher_type="type-2", **options)
    dense, expected = A.to_dense(), references.ggn(*built)
    assert expected.norm() > 0
    for weight in names.split():
        mine, its = (block_of(M, A._in_space, [weight]) for M in (dense, expected))
        assert_close(mine, its, exponent=0.9 if cls is KFACLinearOperator else 0.5)
