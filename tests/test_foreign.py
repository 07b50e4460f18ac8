"""Derivatives that are not torch's own: found where they lack a part, else used.

References are the same models with an operation of torch in the function's place.
"""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import references
from cases import IN_PLACE
from curvlinops import (
    EFLinearOperator,
    GGNDiagonalLinearOperator,
    GGNLinearOperator,
    GramLinearOperator,
    HessianLinearOperator,
    JacobianLinearOperator,
    ScalarFunction,
    TransposedJacobianLinearOperator,
)
from curvlinops._adjoint import lost
from tolerances import assert_close


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


class Function:
    """Makes an autograd function from forward, backward, and forward mode."""

    def __init__(self, forward, backward, tangent=None):
        def kept(x):
            return forward(x)

        def setup_context(ctx, inputs, output):
            ctx.save_for_backward(inputs[0])
            ctx.save_for_forward(inputs[0])

        parts = {
            "forward": kept,
            "setup_context": setup_context,
            "backward": lambda ctx, g: backward(ctx.saved_tensors[0], g),
        }
        if tangent is not None:
            parts["jvp"] = lambda ctx, t: tangent(ctx.saved_tensors[0], t)
        parts = {name: staticmethod(part) for name, part in parts.items()}
        self.made = type("Custom", (torch.autograd.Function,), parts)

    def __call__(self, x):
        return self.made.apply(x)

    def __deepcopy__(self, memo):
        return self


def with_numpy(x: Tensor, g: Tensor) -> Tensor:
    return torch.from_numpy(g.detach().numpy() * x.cos().detach().numpy())


def partly(x: Tensor, g: Tensor) -> Tensor:
    return 0.9 * g * x.cos() + 0.1 * (g * x.cos()).detach()


def for_some(x: Tensor, g: Tensor) -> Tensor:
    return (g * x.cos()).detach() if len(x) == 4 else g * x.cos()


def hooked(x: Tensor) -> Tensor:
    y = x.sin()
    y.register_hook(lambda g: g.detach())
    return y


def right(x: Tensor, g: Tensor) -> Tensor:
    return g * x.cos()


def tangent(x: Tensor, t: Tensor) -> Tensor:
    return t * x.cos()


WITHOUT_GRAPH = {
    "detached": Function(torch.sin, lambda x, g: right(x, g).detach()),
    "numpy": Function(torch.sin, with_numpy),
    "partly": Function(torch.sin, partly),
    "for some data": Function(torch.sin, for_some),
    "wrong in forward mode": Function(
        torch.sin, lambda x, g: right(x, g).detach(), lambda x, t: 0 * t
    ),
    "hook": hooked,
}
#: The derivative by the gradient that comes in is right, that by the input is not.
INPUT_LOST = Function(torch.sin, lambda x, g: g * x.detach().cos())
WITH_FORWARD_MODE = Function(torch.sin, lambda x, g: right(x, g).detach(), tangent)


class Net(nn.Module):
    """Applies a function in one place."""

    def __init__(self, function, place):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(3, 2)
        self.d, self.e = nn.Linear(3, 2), nn.Linear(3, 2)
        self.function, self.place = function, place

    def forward(self, x):
        def at(place, t):
            return self.function(t) if place == self.place else t

        x = at("start", x * self.c.weight.sum(0))
        f = at("end", self.b(at("middle", self.a(x)).tanh()))
        f = f + at("branch", self.d(x))
        return torch.cat(
            [f, 1e5 * at("large", self.c(x)), 1e-5 * at("small", self.e(x))], 1
        )


PLACES = ["start", "middle", "end", "branch", "large", "small"]


def build(function, place, dtype=torch.float64, loss=None):
    model = Net(function, place).to(dtype)
    sizes = (2, 4)
    data = [
        (torch.randn(n, 3, dtype=dtype), torch.randn(n, 6, dtype=dtype)) for n in sizes
    ]
    return model, loss or nn.MSELoss(), dict(model.named_parameters()), data


def plain(model, loss, params, data):
    """Return the problem with torch's own sine."""
    model = copy.deepcopy(model)
    model.function = torch.sin
    return model, loss, dict(model.named_parameters()), data


def jacobian(model, loss, params, data, **options):
    return JacobianLinearOperator(model, params, data, **options)


#: Operators, their dense references, and whether second derivatives of the model enter.
FIRST = {
    "jacobian": (jacobian, lambda m, _, p, d: references.jacobian(m, p, d)),
    "ggn": (GGNLinearOperator, references.ggn),
    "empirical fisher": (EFLinearOperator, references.empirical_fisher),
}


def products(A, columns):
    """Multiply by the first unit vectors in one way or the other."""
    unit = torch.eye(A.shape[1], dtype=A.torch_dtype)
    if columns == "dense":
        return A.to_dense()
    if columns == "block":
        return A @ unit
    return torch.stack([A @ unit[:, k] for k in range(A.shape[1])], 1)


@pytest.mark.parametrize("columns", ["single", "block", "dense"])
@pytest.mark.parametrize("name", FIRST)
def test_a_jacobian_without_a_part_is_an_error(name, columns):
    make, _ = FIRST[name]
    for function in WITHOUT_GRAPH.values():
        A = make(*build(function, "middle"), check_deterministic=False)
        with pytest.raises(RuntimeError, match=r"Custom|hook 'hooked"):
            products(A, columns)


@pytest.mark.parametrize("cache", ["auto", "off"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("place", PLACES)
def test_a_lost_part_is_found_wherever_it_is(place, dtype, cache):
    functions = [WITHOUT_GRAPH[name] for name in ("detached", "for some data", "hook")]
    if place == "small":
        del functions[2]  # the Hessian lacks only a hundred-thousandth
    for function in functions:
        problem = build(function, place, dtype)
        for operator in (GGNLinearOperator, HessianLinearOperator):
            A = operator(*problem, cache=cache)
            v = torch.zeros(A.shape[1], dtype=dtype)
            v[0] = 1  # the function is not even on the way in some places
            with pytest.raises(RuntimeError, match=r"Custom|hook 'hooked"):
                A @ v


@pytest.mark.parametrize("columns", ["single", "block", "dense"])
@pytest.mark.parametrize("name", FIRST)
def test_forward_mode_serves_where_a_graph_is_lost(name, columns):
    make, dense = FIRST[name]
    problem = build(WITH_FORWARD_MODE, "branch")
    A, expected = make(*problem), dense(*plain(*problem))
    for _ in range(2):
        assert_close(products(A, columns), expected, size=200)


def test_recordings_of_forward_mode():
    problem = build(WITH_FORWARD_MODE, "middle")
    A, expected = (
        jacobian(*problem),
        references.jacobian(plain(*problem)[0], *problem[2:]),
    )
    v = torch.randn(A.shape[1], dtype=torch.float64)
    for _ in range(12):
        assert_close(A @ v, expected @ v, size=200)


def test_what_needs_no_derivative_of_the_backward_pass_is_right():
    problem = build(WITHOUT_GRAPH["numpy"], "middle")
    J = references.jacobian(plain(*problem)[0], *problem[2:])
    T = TransposedJacobianLinearOperator(problem[0], *problem[2:])
    assert_close(T.to_dense(), J.T)
    D = GGNDiagonalLinearOperator(*problem)
    assert_close(D.diagonal(), references.ggn(*plain(*problem)).diag(), size=50)
    G = GramLinearOperator(problem[0], None, *problem[2:])
    with pytest.raises(RuntimeError, match="Custom"):
        G @ torch.ones(G.shape[1], dtype=torch.float64)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("place", PLACES)
def test_a_lost_second_derivative_is_found(place, dtype):
    problem = build(INPUT_LOST, place, dtype)
    with pytest.raises(RuntimeError, match=r"rows of \[.*Custom"):
        H = HessianLinearOperator(*problem)
        H @ torch.ones(H.shape[1], dtype=dtype)
    G, v = GGNLinearOperator(*problem), torch.randn(50, dtype=dtype)
    expected = references.ggn(*plain(*problem)) @ v.double()
    assert_close(G @ v, expected, dtype, size=200)


@IN_PLACE
def test_a_module_in_place_is_compared_too():
    class Uncopied(Net):
        def __deepcopy__(self, memo):
            raise TypeError

    model = Uncopied(INPUT_LOST, "middle").double()
    _, loss, _, data = build(torch.sin, "middle")
    before = copy.copy(model.state_dict())
    H = HessianLinearOperator(model, loss, dict(model.named_parameters()), data)
    with pytest.raises(RuntimeError, match="Custom"):
        H @ torch.ones(H.shape[1], dtype=torch.float64)
    assert all(
        v is before[k] or v.equal(before[k]) for k, v in model.state_dict().items()
    )


def test_a_scalar_function_is_compared_too():
    w = torch.randn(5, dtype=torch.float64)
    for function, found in ((INPUT_LOST, True), (Function(torch.sin, right), False)):
        risk = ScalarFunction(lambda p, f=function: f(p["w"]).square().sum(), {"w": w})
        H = HessianLinearOperator(risk)
        if found:
            with pytest.raises(RuntimeError, match="Custom"):
                H @ torch.ones(5, dtype=torch.float64)
        else:
            assert_close(H.to_dense(), (2 * (2 * w).cos()).diag())


def straight_through(x: Tensor) -> Tensor:
    return torch.round(8 * x) / 8


#: Functions with right double backward passes. The gradients of the first two are not
#: those of the loss, on purpose.
RIGHT = {
    "straight-through": Function(straight_through, lambda x, g: g.clone()),
    "reversed": Function(torch.clone, lambda x, g: -g),
    "kinks": Function(lambda x: x.clamp(min=0), lambda x, g: g * (x > 0)),
    "smooth": Function(torch.sin, right),
    "in lower precision": Function(
        torch.sin, lambda x, g: (g.float() * x.float().cos()).to(g.dtype)
    ),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", RIGHT)
def test_right_functions_are_used_as_they_are(name, place, dtype):
    model, loss, params, data = build(RIGHT[name], place, dtype)
    leaves = list(params.values())
    X, y = (torch.cat(side) for side in zip(*data, strict=True))
    value = loss(model(X), y)
    g = torch.autograd.grad(value, leaves, create_graph=True, materialize_grads=True)
    v = [torch.randn_like(leaf) for leaf in leaves]
    exact = torch.autograd.grad(g, leaves, v, materialize_grads=True)
    H = HessianLinearOperator(model, loss, params, data)
    low = name == "in lower precision"
    for a, b in zip(H @ v, exact, strict=True):
        assert_close(a, b, torch.float32 if low else dtype, size=2000)


class Kinks(nn.Module):
    def forward(self, x):
        return RIGHT["kinks"](x)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_kink_at_the_parameters_is_no_lost_part(dtype):
    model = nn.Sequential(nn.Linear(3, 4), Kinks(), nn.Linear(4, 4), Kinks())
    model = model.append(nn.Linear(4, 2)).to(dtype)
    params = dict(model.named_parameters())
    for parameter in params.values():
        nn.init.zeros_(parameter)
    data = [(torch.randn(5, 3).to(dtype), torch.randn(5, 2).to(dtype))]
    H = HessianLinearOperator(model, nn.MSELoss(), params, data)
    expected = torch.zeros(H.shape[0], dtype=dtype)
    expected[-2:] = 1.0
    assert_close(H @ torch.ones_like(expected), expected, dtype)


def test_a_loss_without_graph_is_found():
    class LogCosh(torch.autograd.Function):
        @staticmethod
        def forward(ctx, f, y):
            ctx.save_for_backward(f - y)
            return F.softplus(2 * (f - y)).sub(f - y).mean()

        @staticmethod
        def backward(ctx, g):
            (r,) = ctx.saved_tensors
            derivative = r.tanh() / r.numel()
            return g * (derivative.detach() if LogCosh.lost else derivative), None

    model, LogCosh.lost = nn.Linear(3, 2).double(), True
    data = [(torch.randn(4, 3).double(), torch.randn(4, 2).double())]
    params = dict(model.named_parameters())
    for operator in (
        GGNLinearOperator,
        GGNDiagonalLinearOperator,
        HessianLinearOperator,
    ):
        A = operator(model, LogCosh.apply, params, data)
        with pytest.raises(RuntimeError, match="LogCosh"):
            A @ torch.ones(A.shape[1], dtype=torch.float64)


# -- the test itself ----------------------------------------------------------------


def shared(J, w, push):
    """Ask for what is lost, with a matrix whose columns are three parameters."""
    cut = [2, 1, 3]

    def pull(u):
        return (u @ J).split(cut)

    return lost(lambda V: push(torch.cat(V)), pull, w, pull(w), 2.2e-16)


def test_parameters_of_all_sizes_are_compared():
    J, w = torch.randn(4, 6, dtype=torch.float64), torch.rand(4).double()
    for scale in (1.0, 1e-6, 1e-12, 1e-200):
        J = torch.randn(4, 6, dtype=torch.float64)
        J[:, 2] *= scale
        assert shared(J, w, lambda v, J=J: J @ v) == 0
        wrong = J.clone()
        wrong[:, 2] *= 0.9
        assert shared(J, w, lambda v, J=wrong: J @ v) > 1e-3


def test_rounding_errors_are_no_lost_part():
    J, w = torch.randn(4, 6, dtype=torch.float64), torch.rand(4).double()
    J[:, 2] = 0
    noise = 1e-17 * torch.randn(2, 4, dtype=torch.float64)

    def pull(u):
        return (u @ J + (1e3 * u.sum()).sin() * 1e-17 * torch.eye(6).double()[2]).split(
            [2, 1, 3]
        )

    assert lost(lambda V: J @ torch.cat(V) + noise[0], pull, w, pull(w), 2.2e-16) == 0
