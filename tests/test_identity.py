"""Matrices are told apart by what multiplies by them, never by a name."""

import copy
import gc
import pickle
import weakref
from dataclasses import dataclass
from enum import Enum
from functools import partial

import numpy as np
import pytest
import torch
from scipy.sparse.linalg import LinearOperator
from torch import nn

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
)
from curvlinops._identity import UNRECORDED, identity_of
from curvlinops._linearization import Middle
from curvlinops._plan import products_of
from curvlinops.ggn import LossHessian
from curvlinops.risk_operator import RiskOperator
from tolerances import assert_close

SCALE = 2.0
#: Products after which recordings and small matrices are in use.
MANY = 40


def gram(b, v):
    return b.vjp(b.jvp(v))


class Operator(RiskOperator, LinearOperator):
    """A user's operator, whose body is whatever it is given."""

    def __init__(self, risk, body, *settings):
        super().__init__(risk)
        self.body, self.settings = body, settings

    def _apply(self, V):
        return self.risk.mean(self.body, V, self._title())


class Scaled(RiskOperator, LinearOperator):
    """A user's operator with an attribute that its body reads."""

    def __init__(self, risk, scale):
        super().__init__(risk)
        self.scale = scale

    def _apply(self, V):
        return self.risk.mean(lambda b, v: self._body(b, v), V, self._title())

    def _body(self, b, v):
        return [self.scale * g for g in b.vjp(b.jvp(v))]


class OnlyTheBody(Scaled):
    def _body(self, b, v):
        return b.hvp(v)


class Weighted(Middle):
    """A user's matrix between the Jacobians."""

    def __init__(self, weight):
        self.weight = weight

    def __call__(self, batch, U):
        return self.weight * U


class WeightedTwice(Weighted):
    def __call__(self, batch, U):
        return 2 * self.weight * U


class Halved(LossHessian):
    def __call__(self, batch, U):
        return super().__call__(batch, U) / 2


class Sandwich(RiskOperator, LinearOperator):
    def __init__(self, risk, middle):
        super().__init__(risk)
        self.middle = middle

    def _apply(self, V):
        return self.risk.congruence(self.middle, V, self._title())


@dataclass(frozen=True)
class Body:
    scale: float = 1.0

    def __call__(self, b, v):
        return [self.scale * g for g in b.vjp(b.jvp(v))]


class OtherBody(Body):
    def __call__(self, b, v):
        return [-self.scale * g for g in b.vjp(b.jvp(v))]


class Choice(Enum):
    A = 1
    B = 2


@pytest.fixture
def risk():
    return EmpiricalRisk(*find("mlp-tanh-ce").build())


def references_of(risk):
    """Return J^T J / D, the GGN and the Hessian, from other roads."""
    problem = risk.model_func, risk.loss_func, risk.params, risk.data
    J = references.jacobian(risk.model_func, risk.params, risk.data)
    D = sum(len(y) for _, y in risk.data)
    return J.T @ J / D, references.ggn(*problem), references.hessian(*problem)


def assert_all_right(operators, expected):
    """Multiply by several operators of one risk in turn, often."""
    torch.manual_seed(0)
    for _ in range(MANY):
        for A, dense in zip(operators, expected, strict=True):
            v = torch.randn(A.shape[1], dtype=A.torch_dtype)
            assert_close(A @ v, dense @ v, size=4 * len(v))
    for A, dense in zip(operators, expected, strict=True):
        assert_close(A.to_dense(), dense, size=4 * len(dense))


def is_recorded(A):
    [product], _ = products_of(A, 1)
    return product.key is not None


def test_two_operators_with_other_bodies(risk):
    JTJ, G, H = references_of(risk)
    operators = [
        Operator(risk, lambda b, v: b.vjp(b.jvp(v))),
        Operator(risk, lambda b, v: b.hvp(v)),
        Operator(risk, lambda b, v: b.vjp(b.loss.hessian_mul(b.jvp(v)))),
        GGNLinearOperator(risk),
        HessianLinearOperator(risk),
    ]
    assert_all_right(operators, [JTJ, H, G, G, H])
    assert all(map(is_recorded, operators))


def test_attributes_of_instances_count(risk):
    JTJ, _, H = references_of(risk)
    operators = [Scaled(risk, 1.0), Scaled(risk, 3.0), OnlyTheBody(risk, 1.0)]
    assert_all_right(operators, [JTJ, 3 * JTJ, H])
    assert all(map(is_recorded, operators))
    operators[0].scale = 5.0  # also when they are changed later
    assert_all_right(operators, [5 * JTJ, 3 * JTJ, H])


@pytest.mark.parametrize(
    "make",
    [
        lambda s: lambda b, v: [s * g for g in b.vjp(b.jvp(v))],
        lambda s: lambda b, v, s=s: [s * g for g in b.vjp(b.jvp(v))],
        lambda s: lambda b, v, *, s=s: [s * g for g in b.vjp(b.jvp(v))],
        lambda s: partial(lambda s, b, v: [s * g for g in b.vjp(b.jvp(v))], s),
        lambda s: (lambda inner: lambda b, v: inner(gram(b, v)))(
            lambda V: [s * g for g in V]
        ),
        lambda s: Body(s),
        lambda s: (
            lambda b, v, settings={"s": [s]}: [
                settings["s"][0] * g for g in b.vjp(b.jvp(v))
            ]
        ),
    ],
    ids=["closure", "default", "keyword", "partial", "nested", "dataclass", "dict"],
)
def test_captured_values_count(risk, make):
    JTJ, _, _ = references_of(risk)
    operators = [Operator(risk, make(s)) for s in (1.0, 2.0, 1.0)]
    assert_all_right(operators, [JTJ, 2 * JTJ, JTJ])
    keys = [products_of(A, 1)[0][0].key for A in operators]
    assert keys[0] == keys[2] != keys[1]
    assert None not in keys


def test_global_variables_count(risk, monkeypatch):
    JTJ, _, _ = references_of(risk)
    A = Operator(risk, lambda b, v: [SCALE * g for g in b.vjp(b.jvp(v))])
    assert_all_right([A], [2 * JTJ])
    monkeypatch.setitem(globals(), "SCALE", 7.0)
    assert_all_right([A], [7 * JTJ])


def test_functions_that_are_defined_anew_count(risk, monkeypatch):
    JTJ, _, H = references_of(risk)
    A = Operator(risk, lambda b, v: gram(b, v))
    assert_all_right([A], [JTJ])
    monkeypatch.setitem(globals(), "gram", lambda b, v: b.hvp(v))
    assert_all_right([A], [H])


def test_middles_with_other_settings_or_bodies(risk):
    JTJ, G, _ = references_of(risk)
    operators = [
        Sandwich(risk, Weighted(1.0)),
        Sandwich(risk, Weighted(2.5)),
        Sandwich(risk, WeightedTwice(1.0)),
        Sandwich(risk, Halved(risk, 0, 0)),
        GGNLinearOperator(risk),
    ]
    assert_all_right(operators, [JTJ, 2.5 * JTJ, 2 * JTJ, G / 2, G])


def test_a_dataclass_and_its_subclass(risk):
    JTJ, _, _ = references_of(risk)
    operators = [Operator(risk, Body(2.0)), Operator(risk, OtherBody(2.0))]
    assert_all_right(operators, [2 * JTJ, -2 * JTJ])


@pytest.mark.parametrize(
    "captured",
    [
        torch.tensor(2.0),
        np.array(2.0),
        nn.Linear(1, 1),
        iter([1]),
        [torch.tensor(2.0)],
        list(range(2000)),
    ],
    ids=["tensor", "array", "module", "iterator", "list", "much"],
)
def test_what_may_change_unseen_is_not_recorded(risk, captured):
    JTJ, _, _ = references_of(risk)
    A = Operator(risk, lambda b, v: (captured, b.vjp(b.jvp(v)))[1])
    assert not is_recorded(A)
    assert_all_right([A], [JTJ])
    assert all(not b._routes for b in risk._recordings.values())


def test_a_captured_tensor_may_change(risk):
    JTJ, _, _ = references_of(risk)
    scale = torch.tensor(1.0, dtype=torch.float64)
    A = Operator(risk, lambda b, v: [scale * g for g in b.vjp(b.jvp(v))])
    assert_all_right([A], [JTJ])
    scale.mul_(3)
    assert_all_right([A], [3 * JTJ])


@pytest.mark.parametrize("name", ["JTJ", ("my", "JTJ"), 1, gram])
@pytest.mark.parametrize("loop", ["mean", "congruence", "push_forward", "pull_back"])
def test_names_are_refused(risk, name, loop):
    V = torch.zeros(risk.space.dim, 1, dtype=torch.float64)
    rows = (1,) if loop == "push_forward" else ()
    with pytest.raises(TypeError, match=rf"self\.risk\.{loop}\(body, V, self._title"):
        getattr(risk, loop)(gram, V, *rows, "title", name)


def test_results_are_kept_for_their_owner_only(risk):
    assert risk.once((Scaled, 1), lambda: "mine") == "mine"
    assert risk.once((gram, 1), lambda: "yours") == "yours"
    for key in ("gradients", ("gradients",), 1, (), None):
        with pytest.raises(TypeError, match=r"once\(\(type\(self\)"):
            risk.once(key, lambda: None)
    HessianLinearOperator(risk) @ np.ones(risk.space.dim)
    batch = risk._recordings[0]
    with pytest.raises(TypeError, match=r"once\(\(type\(self\)"):
        batch.once("gradients", lambda: None)


def test_ours_share_their_recordings(risk):
    for make in (GGNLinearOperator, HessianLinearOperator, EFLinearOperator):
        keys = {products_of(make(risk), 1)[0][0].key for _ in range(2)}
        assert len(keys) == 1
        assert None not in keys
    samples = [
        FisherMCLinearOperator(risk, seed=seed, mc_samples=M)
        for seed, M in ((0, 1), (1, 1), (0, 2), (0, 1))
    ]
    keys = [products_of(A, 1)[0][0].key for A in samples]
    assert len(set(keys)) == 3
    assert keys[0] == keys[3]
    exact = GGNLinearOperator(risk, seed=5)
    assert (
        products_of(exact, 1)[0][0].key
        == products_of(GGNLinearOperator(risk), 1)[0][0].key
    )
    J = JacobianLinearOperator(risk)
    loops, _ = products_of(GramLinearOperator(risk, weighted=False), 1)
    [forward], _ = products_of(J, 1)
    [backward], _ = products_of(J.adjoint(), 1)
    assert [loop.key for loop in loops] == [backward.key, forward.key]


def test_copies_have_the_same_name(risk):
    A = Operator(risk, Body(2.0))
    [product], _ = products_of(A, 1)
    for other in (copy.copy(A), pickle.loads(pickle.dumps(A))):
        [same], _ = products_of(other, 1)
        assert same.key == product.key
    JTJ, _, _ = references_of(risk)
    assert_close(A.to_dense(), 2 * JTJ, size=4 * len(JTJ))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (1, True),
        (0.0, -0.0),
        (1, 1.0),
        ("1", b"1"),
        ((1, (2,)), (1, 2)),
        ([1], (1,)),
        (Choice.A, Choice.B),
        (torch.float32, torch.float64),
        (torch.sin, torch.cos),
        (nn.Linear, nn.Conv1d),
        (np.dtype("f4"), np.dtype("f8")),
        (Body(1.0), OtherBody(1.0)),
        ({"a": 1}, {"b": 1}),
    ],
)
def test_values_are_told_apart(one, other):
    def identity(value):
        return identity_of(lambda: value)

    assert identity(one) == identity(copy.copy(one)) is not None
    assert identity(one) != identity(other) is not None


def test_what_refers_to_itself():
    loop = [1]
    loop.append(loop)
    other = [2]
    other.append(loop)

    def identity(value):
        return identity_of(lambda: value)

    assert identity(loop) == identity(copy.deepcopy(loop)) is not None
    assert identity(loop) != identity(other)


def test_variables_that_are_missing():
    def body():
        return later

    assert identity_of(body) is None
    assert identity_of(lambda: nowhere) is None  # noqa: F821
    later = 1
    assert identity_of(body) is not None


def test_identities_hold_what_they_stand_for():
    def made():
        class Local:
            pass

        return identity_of(lambda: Local), weakref.ref(Local)

    identity, alive = made()
    gc.collect()
    assert alive() is not None  # or another class might get its place in memory
    del identity


def test_what_is_no_linear_function_is_not_recorded(risk):
    V = torch.ones(risk.space.dim, 1, dtype=torch.float64)
    shapes = risk.space.shapes

    def ones(b, _):
        return [torch.ones(shape, dtype=torch.float64) for shape in shapes]

    batches = len(list(risk.data))
    D = sum(len(y) for _, y in risk.data)
    for _ in range(MANY):
        found = risk.mean(ones, V, "ones", UNRECORDED)
        assert_close(found, V * batches / D)
    assert all(not b._routes for b in risk._recordings.values())
