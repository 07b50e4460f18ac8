"""Forms with differences in place of derivatives: matrices nobody has written down."""

import math
from dataclasses import dataclass

import pytest
import torch
from scipy.sparse.linalg import LinearOperator

import references
from cases import find
from curvlinops import (
    EFLinearOperator,
    EmpiricalRisk,
    FisherMCLinearOperator,
    GGNLinearOperator,
    GramLinearOperator,
    HessianLinearOperator,
    JacobianLinearOperator,
    TransposedJacobianLinearOperator,
)
from curvlinops._by_forms import product_by_forms
from curvlinops._linearization import Linearization
from curvlinops._plain import Plain
from curvlinops.risk_operator import Form, Middle, RiskOperator, Side, congruence

PROBLEMS = ["mlp-tanh-mse", "ce-ignore-weights-smoothing", "bce-sum-weights"]


def outcome(A) -> dict[str, bool]:
    return {check.name: check.passed for check in A.verify().checks}


def differences(A):
    """Return the row of a report that compares with differences."""
    [check] = [c for c in A.verify().checks if c.name == "finite differences"]
    return check


class JTJ(RiskOperator, LinearOperator):
    forms = (Form(lambda b, v: b.vjp(b.jvp(v))),)


class Remainder(RiskOperator, LinearOperator):
    """The Hessian minus the GGN, as a sum."""

    @staticmethod
    def body(b, v):
        rest = b.vjp(b.loss.hessian_mul(b.jvp(v)))
        return [h - g for h, g in zip(b.hvp(v), rest, strict=True)]

    forms = (Form(body, mean=False),)


@dataclass(frozen=True)
class Tripled(Middle):
    def __call__(self, batch, U):
        return 3 * batch.loss.hessian_mul(U)


class ThreeTimes(RiskOperator, LinearOperator):
    forms = (congruence(Tripled()),)


OWN = [JTJ, Remainder, ThreeTimes]


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize(
    "cls",
    [
        *(HessianLinearOperator, GGNLinearOperator, EFLinearOperator),
        *(FisherMCLinearOperator, GramLinearOperator, JacobianLinearOperator),
        TransposedJacobianLinearOperator,
    ],
)
def test_forms_of_known_matrices_give_them(cls, name):
    risk = EmpiricalRisk(*find(name).build())
    A = cls(risk)
    u = torch.randn(A.shape[1], generator=torch.Generator().manual_seed(0)).double()
    found, expected = product_by_forms(A.forms, Plain(risk), 1.0, u), A @ u
    assert (found - expected).norm() <= 1e-7 * expected.norm()


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("cls", OWN)
def test_own_operators_are_verified(cls, name):
    A = cls(EmpiricalRisk(*find(name).build()))
    assert A.verify().ok
    assert not math.isnan(differences(A).error)


def test_own_operators_have_their_matrices():
    """What is verified is what they are meant to be."""
    problem = find("mlp-tanh-mse").build()
    model, _, params, data = problem
    risk, D = EmpiricalRisk(*problem), sum(y.numel() for _, y in data)
    G, H = references.ggn(*problem), references.hessian(*problem)
    J = references.jacobian(model, params, data)
    for cls, dense in (
        (JTJ, J.T @ J / D),
        (Remainder, D * (H - G)),
        (ThreeTimes, 3 * G),
    ):
        A = cls(risk)
        torch.testing.assert_close(A.to_dense(), dense)
        u = torch.ones(A.shape[1], dtype=torch.float64)
        found = product_by_forms(A.forms, Plain(risk), 1.0, u)
        assert (found - dense @ u).norm() <= 1e-6 * (dense @ u).norm()


@pytest.mark.parametrize(("method", "cls"), [("vjp", JTJ), ("hvp", Remainder)])
def test_finds_a_wrong_derivative(method, cls, monkeypatch):
    A = cls(EmpiricalRisk(*find("mlp-tanh-mse").build()))
    right = getattr(Linearization, method)

    def wrong(self, vector):
        first, *rest = right(self, vector)
        return [1.01 * first, *rest]

    monkeypatch.setattr(Linearization, method, wrong)
    assert not outcome(A)["finite differences"]


def test_finds_a_product_that_is_not_that_of_the_forms():
    class Wrong(JTJ):
        def _apply(self, V):
            return 1.01 * super()._apply(V)

    check = differences(Wrong(EmpiricalRisk(*find("mlp-tanh-mse").build())))
    assert not check.passed and 0.005 < check.error < 0.02


def test_bodies_that_are_not_linear_are_skipped():
    class Constant(RiskOperator, LinearOperator):
        forms = (Form(lambda b, _: b.gradient(), linear=False),)

    check = differences(Constant(EmpiricalRisk(*find("mlp-tanh-mse").build())))
    assert math.isnan(check.error) and "no reference for Constant" in check.note


def test_forms_in_turn_go_through_the_outputs():
    risk = EmpiricalRisk(*find("mlp-tanh-mse").build())
    J = JacobianLinearOperator(risk).to_dense()
    forms = (
        Form(lambda b, v: [b.jvp(v)], rows=Side.OUTPUTS, mean=False),
        Form(lambda b, u: b.vjp(u[0]), cols=Side.OUTPUTS, mean=False),
    )
    u = torch.ones(J.shape[1], dtype=torch.float64)
    expected = J.T @ (J @ u)
    assert torch.allclose(risk.apply(forms, u.unsqueeze(1))[:, 0], expected)
    found = product_by_forms(forms, Plain(risk), 1.0, u)
    assert (found - expected).norm() <= 1e-7 * expected.norm()
