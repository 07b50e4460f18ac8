"""Every rule has a matrix that trips it, and one that does not."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import report_problems
import torch

from curvlinops import (
    DiagonalLinearOperator,
    GGNLinearOperator,
    HessianLinearOperator,
    TensorLinearOperator,
)
from curvlinops.report import _verdicts
from curvlinops.report._budget import LEVELS
from curvlinops.report._checkpoint import Stages
from curvlinops.report._contents import Dead, Number
from curvlinops.report._measure import Task, measure
from curvlinops.report._problem import Choice, build
from curvlinops.report._verdicts import RULES, judged, verdicts, worst
from report_samples import sample

FILE = Path(report_problems.__file__)
COUNTS = replace(LEVELS["quick"].counts, dense=100, layer_repeats=0)


def spectrum(values, seed=0):
    """A symmetric matrix with given eigenvalues."""
    rng = np.random.default_rng(seed)
    Q, _ = np.linalg.qr(rng.standard_normal((len(values), len(values))))
    return Q @ np.diag(values) @ Q.T


GOOD = spectrum(np.geomspace(1e-2, 1.0, 60))


def measured(A, semidefinite=False, name="hessian", **changes):
    if isinstance(A, np.ndarray):
        A = TensorLinearOperator(torch.from_numpy(A))
    task = Task(replace(COUNTS, **changes), 0, 0.01)
    return measure(A, name, semidefinite, task, Stages(None, {}))


def report_of(*matrices, rate=None):
    report = sample()
    problem = replace(report.problem, learning_rate=rate)
    return replace(report, problem=problem, matrices=matrices, verdicts=())


def statuses(rule, *matrices, rate=None):
    found = list(getattr(_verdicts, rule)(report_of(*matrices, rate=rate)))
    for verdict in found:
        assert (verdict.status == "PASS") is bool(verdict.number <= verdict.bound)
        assert verdict.text.endswith(".")
        assert "\n" not in verdict.text
    return [verdict.status for verdict in found]


@pytest.fixture(scope="module")
def good():
    return measured(GOOD)


@pytest.mark.parametrize("rule", [rule.__name__ for rule in RULES])
def test_nothing_is_wrong_with_a_good_matrix(good, rule):
    assert set(statuses(rule, good, rate=0.1)) <= {"PASS"}


def test_all_rules_but_one_see_a_matrix(good):
    """`verify` needs a model."""
    found = verdicts(report_of(good, rate=0.1))
    assert len({v.rule for v in found}) == len(RULES) - 1
    report = replace(report_of(good), verdicts=found)
    assert report.failed == 0
    assert worst(report) == "PASS"
    assert worst(sample()) == "FAIL"


def test_judgement():
    assert [judged(x, 1.0, 2.0) for x in (1.0, 1.5, 2.5, np.nan, np.inf)] == [
        *["PASS", "WARN", "FAIL", "FAIL", "FAIL"]
    ]


def test_products_that_are_not_symmetric():
    """The rule says by how much, and what cannot be computed is a failure, too."""
    skew = np.triu(np.random.default_rng(0).standard_normal((60, 60)))
    m = measured(GOOD + 0.1 * skew)
    assert statuses("symmetry", m) == ["FAIL"]
    assert statuses("computed", m) == ["FAIL"]
    assert any("Hermitian" in failure for failure in m.failures)
    assert m.trace is not None  # which needs no symmetry
    slight = measured(GOOD + 3e-15 * skew)
    assert statuses("symmetry", slight) == ["WARN"]


def test_products_in_single_precision_are_as_symmetric_as_they_are_exact():
    m = measured(TensorLinearOperator(torch.from_numpy(GOOD).float()))
    assert statuses("symmetry", m) == ["PASS"]
    assert m.symmetry.noise > 1e-8


def test_eigenpairs_that_did_not_converge():
    hard = spectrum(np.linspace(1.0, 1.1, 400))
    m = measured(hard, top=3, max_products=4)
    assert statuses("residuals", m) == ["WARN"]
    assert statuses("convergence", m) == ["WARN"]
    assert not m.top.converged
    worse = measured(spectrum(np.linspace(-1.0, 1.0, 400)), top=3, max_products=4)
    assert statuses("residuals", worse) == ["FAIL"]


def test_krylov_spaces_that_are_too_shallow():
    steep = spectrum(np.linspace(-1.0, 1.0, 400))
    shallow = measured(steep, ncv=3)
    assert statuses("convergence", shallow) == ["WARN"]
    assert not shallow.negative_mass.converged


def test_error_bars_that_are_too_wide():
    """A single direction is seen by few vectors: norms vary by as much as they are."""
    one = np.zeros((200, 200))
    one[:3, :3] = np.ones((3, 3)) + np.eye(3)
    m = measured(one, probes=8)
    assert statuses("widths", m) == ["WARN"]
    unknown = replace(m, frobenius_norm=Number(1.0, float("nan"), 2))
    assert statuses("widths", unknown) == ["FAIL"]


def test_a_trace_of_both_signs_may_be_zero():
    m = measured(GOOD)
    near_zero = replace(m, trace=Number(1e-6, 0.05, 32))
    assert statuses("widths", near_zero) == ["PASS"]
    assert statuses("widths", replace(near_zero, semidefinite=True)) == ["FAIL"]


def test_numbers_that_miss_the_dense_matrix(good):
    assert statuses("truth", good) == ["PASS"]
    off = 12 * good.trace.error
    wrong = replace(good, trace=replace(good.trace, value=good.trace.value + off))
    assert statuses("truth", wrong) == ["FAIL"]
    missed = replace(good.top, values=(good.top.values[0] * 1.001,))
    assert statuses("truth", replace(good, top=missed)) == ["FAIL"]


def test_negative_eigenvalues():
    saddle = spectrum(np.r_[np.linspace(-1.0, -0.5, 20), np.linspace(0.5, 1.0, 40)])
    assert statuses("negative_mass", measured(saddle)) == ["WARN"]
    assert statuses("negative_mass", measured(saddle, True)) == ["FAIL"]
    singular = spectrum(np.r_[np.zeros(30), np.linspace(0.1, 1.0, 30)])
    assert statuses("negative_mass", measured(singular, True)) == ["PASS"]


@pytest.mark.parametrize(
    ("rate", "status"), [(1.0, "PASS"), (1.95, "WARN"), (2.2, "WARN"), (3.0, "FAIL")]
)
def test_sharpness_against_the_learning_rate(good, rate, status):
    assert good.top.values[0] == pytest.approx(1.0)
    assert statuses("sharpness", good, rate=rate) == [status]
    assert statuses("sharpness", good) == []


def test_dead_parameters():
    values = np.r_[np.zeros(3), np.ones(57)]
    m = measured(DiagonalLinearOperator([torch.from_numpy(values)]))
    assert m.dead.count == 3
    assert statuses("dead_parameters", m) == ["WARN"]

    risk = build(Choice(f"{FILE}:dead_layer"))
    m = measured(HessianLinearOperator(risk))
    assert m.dead.names == ("0.weight",)
    assert statuses("dead_parameters", m) == ["FAIL"]
    assert statuses("dead_parameters", replace(m, dead=Dead(0))) == ["PASS"]


class Wrong(GGNLinearOperator):
    """Not the matrix that it says it is."""

    def _apply(self, V):
        return 1.01 * super()._apply(V)


def test_matrices_that_are_not_what_they_claim_to_be():
    risk = build(Choice(f"{FILE}:small"))
    right = measured(GGNLinearOperator(risk), True)
    assert statuses("verified", right) == ["PASS"]
    assert len(right.checks) >= 6
    wrong = measured(Wrong(risk), True)
    assert statuses("verified", wrong) == ["FAIL"]
    (verdict,) = _verdicts.verified(report_of(wrong))
    assert "finite differences 9.9e-03" in verdict.text or "1.0e-02" in verdict.text
