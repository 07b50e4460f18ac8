import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from numpy.linalg import LinAlgError
from torch import Tensor, nn

import references
from cases import find, mlp, resplit
from curvlinops import (
    FisherMCLinearOperator,
    GGNDiagonalLinearOperator,
    GGNLinearOperator,
    ggn_diagonal,
)
from curvlinops._linearization import Linearization
from curvlinops._policy import Policy
from curvlinops.structured import DiagonalLinearOperator
from loss_cases import Hidden
from tolerances import assert_close

CHOICE = (
    "mlp-tanh-mse",
    "mlp-tanh-ce",
    "mlp-1d-output",
    "tied-weights",
    "conv1d",
    "lstm",
    "causal-lm",
    "layer-norm",
    "checkpoint",
    "ce-ignore-weights-smoothing",
    "ce-tokens-options",
    "ce-tokens-ignored-batch",
    "bce-sum-weights",
    "mse-tokens",
    "generic-huber",
    "generic-sum",
    "nll",
    "callable",
    "loader",
    "embedding-padding",
)


@pytest.mark.filterwarnings("ignore:The loss is piecewise linear")
@pytest.mark.parametrize("name", CHOICE)
def test_against_dense(name: str):
    built = find(name).build()
    D = GGNDiagonalLinearOperator(*built)
    assert_close(D.diagonal(), references.ggn(*built).diag(), size=500)


@pytest.mark.parametrize("name", ["mlp-tanh-ce", "ce-tokens-options", "mse-tokens"])
@pytest.mark.parametrize("mc_samples", [1, 3, 100])
def test_samples_are_those_of_the_ggn(name: str, mc_samples: int):
    built = find(name).build()
    D = GGNDiagonalLinearOperator(*built, mc_samples=mc_samples, seed=3)
    F = FisherMCLinearOperator(*built, mc_samples=mc_samples, seed=3)
    assert_close(D.diagonal(), F.to_dense().diag(), size=500)


@pytest.mark.parametrize("sizes", [(6,), (1, 5), (1, 1, 1, 1, 1, 1)])
def test_split_of_the_data_does_not_matter(sizes: tuple[int, ...]):
    model, loss, params, data = find("ce-tokens-options").build()
    D = GGNDiagonalLinearOperator(model, loss, params, resplit(data, sizes))
    dense = references.ggn(model, loss, params, data)
    assert_close(D.to_dense(), dense.diag().diag(), size=500)


def one_batch(model: nn.Module, loss: object, X: Tensor, y: Tensor, **options):
    problem = model, loss, dict(model.named_parameters()), [(X, y)]
    D = GGNDiagonalLinearOperator(*problem, **options)
    return D, GGNLinearOperator(*problem, **options).to_dense().diag()


def sizes_seen(monkeypatch) -> list[int]:
    """Note in how many parts every batch was cut."""
    seen: list[int] = []
    original = ggn_diagonal.one_by_one

    def noting(self, batch):
        parts = original(self, batch)
        seen.append(len(parts))
        return parts

    monkeypatch.setattr(ggn_diagonal, "one_by_one", noting)
    return seen


def test_data_are_differentiated_apart(monkeypatch):
    seen = sizes_seen(monkeypatch)
    X, y = torch.randn(5, 3).double(), torch.tensor([0, 1, 1, 0, 1])
    D, expected = one_batch(mlp(3, 4, 2).double(), nn.CrossEntropyLoss(), X, y)
    assert_close(D.diagonal(), expected)
    assert seen == [5]


class Gated(nn.Module):
    """A mean over the batch behind a gate that is closed: no output shows it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.gate = nn.Parameter(torch.zeros(()))

    def forward(self, X: Tensor) -> Tensor:
        h = self.linear(X)
        return h + self.gate * h.mean(0)


def coupled(prediction: Tensor, y: Tensor) -> Tensor:
    return ((prediction - y) ** 2).mean() * (1 + prediction.sum() ** 2)


@pytest.mark.parametrize("kind", ["statistics", "gate", "loss", "axes"])
def test_data_that_do_not_come_apart(kind: str, monkeypatch):
    seen = sizes_seen(monkeypatch)
    model: nn.Module = nn.Linear(3, 2)
    loss: object = nn.MSELoss()
    X, y, options = torch.randn(4, 3), torch.randn(4, 2), {"check_deterministic": False}
    if kind == "statistics":
        model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    elif kind == "gate":
        model = Gated()
    elif kind == "loss":
        loss = coupled
    else:  # time comes first, and there is as much of it as there are data
        model = nn.GRU(3, 2)
        X, y = torch.randn(4, 4, 3), torch.randn(4, 4, 2)
        options["batch_size_fn"] = lambda X: X.shape[1]

        class First(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.gru = model

            def forward(self, X: Tensor) -> Tensor:
                return self.gru(X)[0]

        model = First()
    D, expected = one_batch(model.double(), loss, X.double(), y.double(), **options)
    assert_close(D.diagonal(), expected, size=500)
    assert seen == [1]


def test_loss_without_a_real_factor():
    model = mlp(3, 4, 2).double()
    X, y = torch.randn(4, 3).double(), torch.rand(4, 2).double()
    loss = nn.BCEWithLogitsLoss(weight=torch.tensor([1.0, -0.5]).double())
    D, expected = one_batch(model, loss, X, y)
    assert (expected < 0).any()
    assert_close(D.diagonal(), expected)


def test_is_a_diagonal_operator():
    built = find("mlp-tanh-ce").build()
    D, dense = GGNDiagonalLinearOperator(*built), references.ggn(*built)
    V = torch.randn(D.shape[1], 3).double()
    assert_close(D @ V, dense.diag().unsqueeze(1) * V)
    assert D.H is D
    parts = D @ [p.detach() for p in built[2].values()]
    assert [t.shape for t in parts] == [p.shape for p in built[2].values()]
    inverse = D.inverse(damping=0.1)
    assert isinstance(inverse, DiagonalLinearOperator)
    assert inverse.in_shapes == D.in_shapes
    assert_close(inverse.diagonal(), 1 / (dense.diag() + 0.1))


def test_zeros_have_no_inverse():
    with pytest.warns(UserWarning, match="does not depend on"):
        D = GGNDiagonalLinearOperator(*find("mlp-unused-param").build())
    with pytest.raises(LinAlgError, match="damping"):
        D.inverse()
    assert torch.isfinite(D.inverse(1e-3).diagonal()).all()


def test_computed_once_and_again_after_changes():
    calls: list = []
    model, loss, params, data = find("mlp-tanh-ce").build()
    D = GGNDiagonalLinearOperator(model, loss, params, data)
    model.register_forward_hook(lambda *_: calls.append(None))
    before = D.diagonal()
    count = len(calls)
    v = torch.randn(D.shape[1]).double()
    D @ v, D.inverse(1.0), D @ v
    assert len(calls) == count
    before.zero_()  # belongs to the caller
    assert D.diagonal().any()
    for change in (lambda: params["0.weight"].data.mul_(2), D.refresh):
        change()
        calls.clear()
        assert_close(D.diagonal(), references.ggn(model, loss, params, data).diag())
    assert len(calls) > 0


def test_pickles_and_copies():
    built = find("mlp-tanh-ce").build()
    D = GGNDiagonalLinearOperator(*built)
    expected = D.diagonal()
    for twin in (pickle.loads(pickle.dumps(D)), copy.copy(D), copy.deepcopy(D)):
        assert_close(twin.diagonal(), expected)


def test_memory_is_bounded(monkeypatch):
    """Vectors are pulled back in chunks, also where a batch does not come apart."""
    X, y = torch.randn(4, 3).double(), torch.randn(4, 2).double()
    narrow = Policy(columns=4)
    problem = mlp(3, 4, 2).double(), Hidden(F.huber_loss), X, y
    D, expected = one_batch(*problem, policy=narrow)
    widths: list[int] = []
    original = Linearization.vjp

    def noting(self, U):
        widths.append(len(U) if U.ndim > self.output.ndim else 1)
        return original(self, U)

    monkeypatch.setattr(Linearization, "vjp", noting)
    assert_close(D.diagonal(), expected)
    assert max(widths) == 2  # outputs per datum
    monkeypatch.setattr(ggn_diagonal, "one_by_one", lambda risk, batch: [batch])
    D.refresh()
    assert_close(D.diagonal(), expected)
    assert max(widths) == 4  # of eight


def test_negative_number_of_samples():
    with pytest.raises(ValueError, match="mc_samples"):
        GGNDiagonalLinearOperator(*find("mlp-tanh-ce").build(), mc_samples=-1)
