import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cases import find
from curvlinops import (
    EFLinearOperator,
    EmpiricalRisk,
    FisherMCLinearOperator,
    GGNDiagonalLinearOperator,
    GGNLinearOperator,
    GramLinearOperator,
    HessianLinearOperator,
    JacobianLinearOperator,
    TransposedJacobianLinearOperator,
)
from curvlinops._linearization import Linearization


def build(cls, problem, **options):
    model, loss, params, data = problem
    if cls in (JacobianLinearOperator, TransposedJacobianLinearOperator):
        return cls(model, params, data, **options)
    return cls(model, loss, params, data, **options)


def outcome(report) -> dict[str, bool]:
    return {check.name: check.passed for check in report.checks}


def skipped(report) -> set[str]:
    return {c.name for c in report.checks if math.isnan(c.error) and c.passed}


OPERATORS = [
    HessianLinearOperator,
    GGNLinearOperator,
    FisherMCLinearOperator,
    EFLinearOperator,
    GGNDiagonalLinearOperator,
    JacobianLinearOperator,
    TransposedJacobianLinearOperator,
    GramLinearOperator,
]


@pytest.mark.parametrize("cls", OPERATORS)
@pytest.mark.parametrize(
    "name",
    [
        *["mlp-tanh-mse", "ce-tokens-options", "callable", "causal-lm"],
        *["bce-sum-weights", "poisson", "probabilities", "labels"],
    ],
)
def test_right_operators_pass(cls, name: str):
    report = build(cls, find(name).build()).verify()
    assert report.ok, report
    sampled = {"batch split"} if cls is FisherMCLinearOperator else set()
    assert skipped(report) == sampled, report


@pytest.mark.parametrize("cls", OPERATORS)
@pytest.mark.parametrize(
    "name",
    [
        "mlp-float32",
        "mlp-bfloat16",
        "mlp-relu-ce",
        "mse-ragged",
        "loader",
        "embedding-padding",
        "ce-tokens-ignored-batch",
    ],
)
def test_right_operators_pass_where_it_is_hard(cls, name: str):
    report = build(cls, find(name).build()).verify(rng=1)
    assert report.ok, report


@pytest.mark.filterwarnings("ignore:The loss is piecewise linear")
@pytest.mark.parametrize("cls", [c for c in OPERATORS if "MC" not in c.__name__])
def test_losses_without_second_derivative(cls):
    """Also where a batch has a loss of zero, so that no ratio tells its terms."""
    net = nn.Sequential(nn.Linear(3, 4), nn.LogSoftmax(1)).double()
    X, y = torch.rand(2, 3, 3).double(), torch.rand(2, 3, 4).double()
    data = [(X[0], y[0]), (X[1], 0 * y[1])]
    loss = nn.KLDivLoss(reduction="batchmean")
    report = build(cls, (net, loss, dict(net.named_parameters()), data)).verify()
    assert report.ok and not skipped(report), report


@pytest.mark.parametrize("cls", [HessianLinearOperator, GGNLinearOperator])
def test_losses_without_a_formula(cls):
    for name in ("generic-mean", "generic-sum"):
        report = build(cls, find(name).build()).verify()
        assert report.ok and not skipped(report), report


def test_unused_parameters_are_not_warned_about_again():
    with pytest.warns(UserWarning, match="does not depend on"):
        G = build(GGNLinearOperator, find("mlp-unused-param").build())
    report = G.verify()
    assert report.ok and not skipped(report), report


def test_unweighted_gram_matrix_and_exact_diagonal_with_samples():
    problem = find("mlp-tanh-ce").build()
    for A in (
        build(GramLinearOperator, problem, weighted=False),
        build(GGNDiagonalLinearOperator, problem, mc_samples=2),
    ):
        report = A.verify()
        assert report.ok, report


# Planted mistakes


@pytest.mark.parametrize(
    "cls", [c for c in OPERATORS if c is not HessianLinearOperator]
)
def test_finds_a_wrong_adjoint(cls, monkeypatch):
    original = Linearization.vjp

    def wrong(self, U):
        first, *rest = original(self, U)
        return [1.01 * first, *rest]

    A = build(cls, find("mlp-tanh-ce").build())
    monkeypatch.setattr(Linearization, "vjp", wrong)
    report = outcome(A.verify())
    if cls not in (GGNDiagonalLinearOperator, GramLinearOperator):  # still symmetric
        assert not report["adjoint"]
    if cls is not JacobianLinearOperator:  # right as such
        assert not report["finite differences"]


def test_finds_a_missing_transpose(monkeypatch):
    H = build(HessianLinearOperator, find("mlp-tanh-ce").build())
    original = HessianLinearOperator._apply

    def wrong(self, V):
        return original(self, V) + 0.01 * torch.roll(V, 1, 0)

    monkeypatch.setattr(HessianLinearOperator, "_apply", wrong)
    report = outcome(H.verify())
    assert not report["adjoint"] and not report["finite differences"]


@pytest.mark.parametrize(
    "cls",
    [
        HessianLinearOperator,
        GGNLinearOperator,
        FisherMCLinearOperator,
        EFLinearOperator,
        GGNDiagonalLinearOperator,
        GramLinearOperator,
    ],
)
@pytest.mark.parametrize("kind", ["batches", "rows", "sum", "one too many"])
def test_finds_a_wrong_mean(cls, kind: str, monkeypatch):
    problem = find("ce-ignore-weights-smoothing").build()
    right = EmpiricalRisk._denominator
    if kind == "batches":  # every batch counts as much as the others
        monkeypatch.setattr(Linearization, "count", 1.0)
    elif kind == "rows":  # ignored targets and weights count in full
        monkeypatch.setattr(Linearization, "count", property(_num_rows))
    elif kind == "sum":
        monkeypatch.setattr(EmpiricalRisk, "_denominator", lambda self, count: 1)
    else:
        monkeypatch.setattr(
            EmpiricalRisk, "_denominator", lambda self, count: right(self, count) + 1
        )
    report = outcome(build(cls, problem).verify())
    assert not report["finite differences"]
    assert report["batch split"] == (kind != "batches" or cls is FisherMCLinearOperator)


def _num_rows(batch: Linearization) -> int:
    return batch.loss.num_rows


def test_finds_a_stale_recording(monkeypatch):
    for cls in OPERATORS:
        model, loss, params, data = find("mlp-tanh-ce").build()
        A = build(cls, (model, loss, params, data))
        A @ torch.ones(A.shape[1]).double()
        with monkeypatch.context() as patch:
            patch.setattr(A.risk._watch, "state", lambda seen=A.risk._seen: seen)
            with torch.no_grad():
                params["0.weight"].mul_(1.5)
            assert A.risk._recordings or cls is GGNDiagonalLinearOperator
            report = outcome(A.verify())
            assert not report["freshness"], cls
            A.refresh()
            assert A.verify().ok


class Closure:
    """A model with an attribute that cannot be seen to change."""

    scale = 1.0

    def __call__(self, params, X):
        return self.scale * X @ params["w"]


def test_finds_a_change_that_cannot_be_seen():
    model = Closure()
    data = [(torch.randn(4, 3).double(), torch.randn(4, 2).double())]
    G = GGNLinearOperator(model, nn.MSELoss(), {"w": torch.randn(3, 2).double()}, data)
    assert G.verify().ok
    model.scale = 2.0
    report = G.verify()
    assert not report.ok and "FAIL  freshness" in str(report)
    G.refresh()
    assert G.verify().ok


def test_finds_a_nonlinear_product(monkeypatch):
    G = build(GGNLinearOperator, find("mlp-tanh-mse").build())
    original = GGNLinearOperator._apply
    monkeypatch.setattr(
        GGNLinearOperator, "_apply", lambda self, V: original(self, V) + 0.1
    )
    assert not outcome(G.verify())["linearity"]


def test_finds_data_that_are_treated_jointly():
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).double()
    X, y = torch.randn(6, 3).double(), torch.randn(6, 2).double()
    data = [(X, y)]
    H = HessianLinearOperator(model, nn.MSELoss(), "*", data, check_deterministic=False)
    report = outcome(H.verify())
    assert not report["batch split"] and report["finite differences"]


# What it costs and leaves


def test_leaves_everything_as_it_was():
    calls: list = []
    model, loss, params, data = find("mlp-tanh-ce").build()
    model.register_forward_hook(lambda *_: calls.append(None))
    G = GGNLinearOperator(model, loss, params, data)
    v = torch.randn(G.shape[1]).double()
    expected = G @ v
    before = [t.clone() for t in (*params.values(), *(t for b in data for t in b))]
    recordings, state = dict(G.risk._recordings), torch.get_rng_state()
    calls.clear()
    G.verify()
    after = [*params.values(), *(t for b in data for t in b)]
    assert all(map(torch.equal, before, after))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in params.values())
    assert G.risk._recordings == recordings
    assert len(calls) <= 20 * len(data)
    calls.clear()
    assert torch.allclose(G @ v, expected) and not calls


def test_never_raises(monkeypatch):
    H = build(HessianLinearOperator, find("mlp-tanh-ce").build())

    def broken(self, V):
        raise OSError("out of order")

    monkeypatch.setattr(HessianLinearOperator, "_apply", broken)
    report = H.verify()
    assert not report.ok
    products = [c for c in report.checks if " loss" not in f" {c.name}"]
    assert all("OSError: out of order" in check.note for check in products)


def test_the_report_can_be_read():
    report = build(GGNLinearOperator, find("mlp-tanh-ce").build()).verify()
    lines = str(report).splitlines()
    assert lines[0] == "GGNLinearOperator of shape 64 x 64"
    assert len(lines) == 1 + len(report.checks)
    assert all(line.startswith("  ok") for line in lines[1:])
    assert all(c.error <= c.tolerance < 1e-4 for c in report.checks)


def test_same_seed_same_report():
    G = build(GGNLinearOperator, find("mlp-tanh-ce").build())
    generator = torch.Generator().manual_seed(0)
    first = G.verify(rng=generator)
    assert G.verify(rng=3).checks[-1].error != first.checks[-1].error
    assert G.verify(rng=3).checks[-1].error == G.verify(rng=3).checks[-1].error


def test_what_cannot_be_cut_is_skipped():
    model = nn.Linear(3, 2).double()
    X, y = torch.randn(4, 3).double(), torch.randn(4, 2).double()
    single = [(x, t) for x, t in zip(X.split(1), y.split(1), strict=True)]
    report = HessianLinearOperator(model, nn.MSELoss(), "*", single).verify()
    assert report.ok and "single datum" in str(report)
    report = HessianLinearOperator(
        model, nn.MSELoss(), "*", [(X, y)], batch_size_fn=lambda X: 7
    ).verify()
    assert report.ok and "first axis" in str(report)


def test_remainder_evaluates_the_model_once_per_batch():
    calls: list = []
    model, loss, params, data = find("mlp-tanh-ce").build()
    model.register_forward_hook(lambda *_: calls.append(None))
    risk = EmpiricalRisk(model, loss, params, data, check_deterministic=False)
    H, G = HessianLinearOperator(risk), GGNLinearOperator(risk)
    R, v = H - G, torch.randn(H.shape[1]).double()
    difference = R @ v
    assert len(calls) == len(data)
    assert torch.allclose(difference, H @ v - G @ v)
    assert len(calls) == len(data)


def test_kinks_that_finite_differences_step_over():
    """Of a model whose outputs jump as soon as parameters move."""
    model = lambda p, X: X @ p["w"] + (p["w"] * 1e8).sin().sum() * 1e-3  # noqa: E731
    params = {"w": torch.randn(3, 2).double()}
    data = [(torch.randn(4, 3).double(), torch.randn(4, 2).double())]
    J = JacobianLinearOperator(model, params, data)
    report = J.verify()
    assert report.ok and "do not converge" in str(report)


def test_functional_losses():
    for loss in (F.cross_entropy, nn.CrossEntropyLoss()):
        model, _, params, data = find("mlp-tanh-ce").build()
        report = EFLinearOperator(model, loss, params, data).verify()
        assert report.ok and not skipped(report), report
