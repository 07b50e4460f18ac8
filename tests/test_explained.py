"""Problems without the derivatives, or the numbers, that a matrix needs."""

import warnings
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import hessian, jacfwd, jvp, vmap

import references
from curvlinops import (
    EFLinearOperator,
    EmpiricalRisk,
    GGNDiagonalLinearOperator,
    GGNLinearOperator,
    HessianLinearOperator,
    JacobianLinearOperator,
    KFACLinearOperator,
    ScalarFunction,
)
from tolerances import assert_close

PAIR = {HessianLinearOperator: references.hessian, GGNLinearOperator: references.ggn}

# Derivatives that are not finite


class Distance(nn.Module):
    """The distance from centres, without a derivative on them."""

    def __init__(self) -> None:
        super().__init__()
        self.centres = nn.Parameter(torch.zeros(2, 3))
        self.last = nn.Linear(2, 2)

    def forward(self, X: Tensor) -> Tensor:
        square = (X[:, None] - self.centres).square().sum(-1)
        return self.last(square.sqrt())


class Cosine(nn.Module):
    """Finite with its gradient where `a` is zero, unlike its curvature."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.zeros(3))
        self.b = nn.Parameter(torch.ones(2))

    def forward(self, X: Tensor) -> Tensor:
        return (X @ self.a).abs().pow(1.5)[:, None] + X[:, :2] * self.b


def problem(model: nn.Module, zero: int | None = None) -> tuple[Any, ...]:
    torch.manual_seed(0)
    model = model.double()
    data = [(torch.rand(n, 3).double(), torch.rand(n, 2).double()) for n in (3, 4)]
    if zero is not None:
        data[zero][0][1] = 0.0
    return model, nn.MSELoss(), dict(model.named_parameters()), data


@pytest.mark.parametrize("cls", [*PAIR, EFLinearOperator, KFACLinearOperator])
def test_a_gradient_that_is_not_finite_is_named(cls: type):
    model, loss, params, data = problem(Distance(), zero=1)
    grads = torch.autograd.grad(
        loss(model(data[1][0]), data[1][1]), list(params.values())
    )
    broken = [n for n, g in zip(params, grads, strict=True) if not g.isfinite().all()]
    assert broken == ["centres"]
    with pytest.raises(
        ValueError, match=r"gradient is not finite.*'centres' \(6 of 6 entr.*on batch 1"
    ) as caught:
        cls(model, loss, params, data)
    assert "random" not in str(caught.value)
    assert "last" not in str(caught.value)


def test_a_jacobian_that_is_not_finite_is_named():
    model, _, params, data = problem(Distance(), zero=0)
    with pytest.raises(ValueError, match=r"Jacobian is not finite.*'centres'.*batch 0"):
        JacobianLinearOperator(model, params, data)


def test_a_curvature_that_is_not_finite_is_named():
    model, loss, params, data = problem(Cosine())
    H = HessianLinearOperator(model, loss, params, data)
    with pytest.warns(RuntimeWarning, match="not finite") as caught:
        for _ in range(4):
            found = H @ np.ones(5)
    messages = [str(w.message) for w in caught]
    assert len(messages) == len(data)  # once per batch
    for index, message in enumerate(messages):
        assert f"on batch {index}, outputs, loss and gradient are finite" in message
        assert "'a' (3 of 3 entries)" in message
        assert "'b'" not in message
    assert np.isfinite(found).tolist() == [False] * 3 + [True] * 2
    # The GGN needs first derivatives only.
    G = GGNLinearOperator(model, loss, params, data)
    assert_close(G.to_dense(), references.ggn(model, loss, params, data))
    only = {"b": params["b"]}
    B = HessianLinearOperator(model, loss, only, data)
    assert_close(B.to_dense(), references.hessian(model, loss, only, data))


def test_a_loss_whose_curvature_is_not_finite_is_named():
    model = nn.Linear(3, 2, bias=False)
    model, _, params, data = problem(model)
    data = [(X, model(X).detach()) for X, _ in data]

    def loss(f: Tensor, y: Tensor) -> Tensor:
        return (f - y).abs().pow(1.5).sum()

    G = GGNLinearOperator(EmpiricalRisk(model, loss, params, data, reduction="sum"))
    with pytest.warns(RuntimeWarning, match="second derivative of the loss by the mod"):
        found = G @ np.ones(6)
    assert not np.isfinite(found).any()


def test_without_a_check_the_first_product_says_it():
    args = problem(Distance(), zero=1)
    H = HessianLinearOperator(*args, check_deterministic=False)
    with pytest.warns(RuntimeWarning, match="batch 1, first derivatives") as caught:
        found = H @ np.ones(12)
    assert len(caught) == 1
    assert not np.isfinite(found).all()


def test_scalar_functions_name_their_tensors():
    params = {"x": torch.ones(2).double(), "y": torch.ones(2).double()}

    def f(p: dict[str, Tensor]) -> Tensor:
        d = (p["x"] - p["y"]).norm()
        return d * d + p["x"].square().sum()

    H = HessianLinearOperator(ScalarFunction(f, params))
    with pytest.warns(RuntimeWarning, match=r"'x' \(2 of 2.*'y' \(2 of 2"):
        H.to_dense()


def test_large_and_infinite_operands_are_nobody_s_fault():
    model, loss, params, data = problem(nn.Linear(3, 2))
    H = HessianLinearOperator(model, loss, params, data)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.isfinite(H @ np.full(8, 1e200)).all()
        assert not np.isfinite(H @ np.full(8, np.inf)).all()


# Losses without a second derivative


def transcription(f: Tensor, y: Tensor) -> Tensor:
    """The connectionist temporal classification loss, of outputs [N, T, C]."""
    N, T, _ = f.shape
    lengths = (torch.full((N,), n) for n in (T, y.shape[1]))
    log = f.log_softmax(-1).transpose(0, 1)
    return F.ctc_loss(log, y, *lengths, reduction="sum")


MISSING: dict[str, tuple[Callable[..., Tensor], Callable[[], Tensor]]] = {
    "ctc_loss": (transcription, lambda: torch.randint(1, 4, (3, 2))),
    "multi_margin_loss": (
        lambda f, y: F.multi_margin_loss(f.flatten(1), y, reduction="sum"),
        lambda: torch.randint(20, (3,)),
    ),
}


def spoken() -> tuple[nn.Module, list[Tensor]]:
    torch.manual_seed(0)
    return nn.Linear(2, 4).double(), [torch.rand(3, 5, 2).double() for _ in range(2)]


@pytest.mark.parametrize("name", MISSING)
@pytest.mark.parametrize(
    "cls", [HessianLinearOperator, GGNLinearOperator, GGNDiagonalLinearOperator]
)
@pytest.mark.parametrize("columns", [1, 4])
def test_losses_without_a_second_derivative(cls: type, name: str, columns: int):
    (net, inputs), (loss, targets) = spoken(), MISSING[name]
    data = [(X, targets()) for X in inputs]
    risk = EmpiricalRisk(net, loss, list(net.parameters()), data)
    A = cls(risk)
    match = rf"The loss has no second derivative.*{name}.*EFLinearOperator"
    with pytest.raises(RuntimeError, match=match):
        A @ np.ones((12, columns))


@pytest.mark.parametrize("name", MISSING)
def test_what_they_are_told_to_use_works(name: str):
    (net, inputs), (loss, targets) = spoken(), MISSING[name]
    data = [(X, targets()) for X in inputs]
    params = list(net.parameters())
    expected = torch.zeros(12, 12).double()
    for X, y in data:
        for x, t in zip(X, y, strict=True):
            g = torch.autograd.grad(loss(net(x[None]), t[None]), params)
            flat = torch.cat([part.flatten() for part in g])
            expected += flat.outer(flat)
    A = EFLinearOperator(net, loss, params, data)
    assert_close(A.to_dense(), expected)


def test_models_without_a_second_derivative_are_not_called_losses():
    class Apart(nn.Linear):
        def forward(self, X: Tensor) -> Tensor:
            Z, first = super().forward(X), X.new_zeros(len(X), dtype=torch.long)
            margins = nn.functional.multi_margin_loss(Z, first, reduction="none")
            return margins[:, None].expand(-1, 2)

    net = Apart(3, 2).double()
    data = [(torch.rand(4, 3).double(), torch.rand(4, 2).double())]
    for loss in (nn.MSELoss(), lambda f, y: (f - y).square().mean()):
        A = HessianLinearOperator(net, loss, list(net.parameters()), data)
        with pytest.raises(RuntimeError, match="operation of the model has no second"):
            A @ np.ones(8)


# What is left on data


class Forces(nn.Module):
    """An energy and its derivative by the input, which is marked for that."""

    def __init__(self, mark: Callable[[Tensor], None]) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
        self.mark = mark

    def forward(self, X: dict[str, Tensor]) -> Tensor:
        x = X["x"]
        self.mark(x)
        x.requires_grad_()
        energy = self.net(x)
        (force,) = torch.autograd.grad(energy.sum(), x, create_graph=True)
        return torch.cat([energy, force], 1)


def _accumulate(x: Tensor) -> None:
    x.requires_grad_()
    x.square().sum().backward()


@pytest.mark.parametrize(
    "mark",
    [lambda x: None, _accumulate, lambda x: setattr(x, "seen", True)],
    ids=["requires_grad", "grad", "attribute"],
)
@pytest.mark.parametrize("check", [True, False])
@pytest.mark.parametrize("cls", [*PAIR, KFACLinearOperator])
def test_nothing_is_left_on_data(cls: type, mark: Callable, check: bool):
    torch.manual_seed(0)
    model = Forces(mark).double()
    data = [
        ({"x": torch.rand(n, 3).double()}, torch.rand(n, 4).double()) for n in (2, 3)
    ]
    params = dict(model.named_parameters())
    options: dict[str, Any] = {"check_deterministic": check}
    if cls is KFACLinearOperator:
        options["unsupported"] = "diagonal"
    A = cls(model, nn.MSELoss(), params, data, **options)
    for _ in range(3):
        found = A.to_dense()
    for X, _ in data:
        assert not X["x"].requires_grad
        assert X["x"].grad is None
        assert not vars(X["x"])
    if cls in PAIR:
        copies = [({"x": X["x"].clone()}, y) for X, y in data]
        assert_close(found, PAIR[cls](model, nn.MSELoss(), params, copies))


# Derivatives that a model takes itself, in forward mode


def _first(u: Callable, z: Tensor) -> Tensor:
    tangent = torch.zeros_like(z)
    tangent[:, 0] = 1.0
    value, derivative = jvp(u, (z,), (tangent,))
    return value + derivative


WAYS: dict[str, Callable[[Callable, Tensor], Tensor]] = {
    "jvp": _first,
    "jvp twice": lambda u, z: _first(partial(_first, u), z),
    "jacfwd": lambda u, z: vmap(jacfwd(u))(z)[:, 0],
    "hessian": lambda u, z: vmap(hessian(lambda q: u(q)[0]))(z).flatten(1),
    "jacfwd twice": lambda u, z: vmap(jacfwd(jacfwd(u)))(z).flatten(1),
}


class Residual(nn.Module):
    def __init__(self, way: Callable) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1))
        self.way = way

    def forward(self, z: Tensor) -> Tensor:
        return self.way(self.net, z) + self.net(z)


def differences(model: nn.Module, X: Tensor) -> Tensor:
    """Return the Jacobian by central differences, of outputs alone."""
    step, columns = torch.finfo(torch.float64).eps ** (1 / 3), []
    model = deepcopy(model)
    for p in model.parameters():
        entries = p.data.view(-1)
        for i in range(len(entries)):
            at = entries[i].item()
            sides = []
            for entries[i] in (at + step, at - step):
                sides.append(model(X).detach().flatten())
            entries[i] = at
            columns.append((sides[0] - sides[1]) / (2 * step))
    return torch.stack(columns, 1)


@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.torch.jit.script:FutureWarning")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("cache", ["auto", "off"])
def test_forward_mode_inside_of_the_model(way: str, cache: str):
    torch.manual_seed(0)
    model = Residual(WAYS[way]).double()
    inputs = [torch.rand(n, 2).double() for n in (2, 3)]
    data = [(X, torch.rand_like(model(X))) for X in inputs]
    params, loss = dict(model.named_parameters()), nn.MSELoss()
    J = differences(model, torch.cat(inputs))
    matrices = {
        GGNLinearOperator: 2 / len(J) * J.T @ J,
        HessianLinearOperator: references.central_differences_hessian(
            model, loss, params, data
        ),
    }
    for cls, expected in matrices.items():
        A = cls(model, loss, params, data, cache=cache)
        for _ in range(10):  # whatever route they take
            assert_close(A @ np.eye(17), expected, exponent=2 / 3)
    A = JacobianLinearOperator(model, params, data, cache=cache)
    assert_close(A.to_dense(), J, exponent=2 / 3)
    assert_close(A.adjoint().to_dense(), J.T, exponent=2 / 3)
    D = GGNDiagonalLinearOperator(model, loss, params, data)
    diagonal = matrices[GGNLinearOperator].diag()
    assert_close(D.to_dense().diag(), diagonal, exponent=2 / 3)
