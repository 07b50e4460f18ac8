"""Matrices are told apart by what multiplies by them, never by a name."""

import copy
import gc
import pickle
import random
import sys
import weakref
from collections import namedtuple
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache, partial, partialmethod, wraps
from operator import itemgetter
from types import ModuleType
from typing import ClassVar

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
    GGNDiagonalLinearOperator,
    GGNLinearOperator,
    GramLinearOperator,
    HessianLinearOperator,
    JacobianLinearOperator,
)
from curvlinops._forms import Form, Middle, Side, congruence
from curvlinops._identity import identity_of
from curvlinops._plan import loops_of
from curvlinops._policy import Policy
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
        self.forms, self.settings = (Form(body),), settings


class Scaled(RiskOperator, LinearOperator):
    """A user's operator with an attribute that its body reads."""

    def __init__(self, risk, scale):
        super().__init__(risk)
        self.scale = scale

    @property
    def forms(self):
        return (Form(lambda b, v: self._body(b, v)),)

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
        self.forms = (congruence(middle),)


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


class ByClass(RiskOperator, LinearOperator):
    """A user's operator whose body gets a number from its class, somehow."""

    scale = 1.0
    settings: ClassVar = {"scale": 1.0}

    @property
    def forms(self):
        return (Form(lambda b, v: self._body(b, v)),)

    def _body(self, b, v):
        return scaled(self.scale, gram(b, v))


class FromDictionary(ByClass):
    def _body(self, b, v):
        return scaled(self.settings["scale"], gram(b, v))


class FromProperty(ByClass):
    @property
    def scale(self):
        return SCALE / 2


class FromMissing(ByClass):
    def _body(self, b, v):
        return scaled(self.missing, gram(b, v))

    def __getattr__(self, name):
        if name == "missing":
            return SCALE / 2
        raise AttributeError(name)


class FromClassMethod(ByClass):
    @classmethod
    def _body(cls, b, v):
        return scaled(cls._scale(), gram(b, v))

    @staticmethod
    def _scale():
        return SCALE / 2


class Descriptor:
    def __get__(self, instance, owner):
        return SCALE / 2


class FromDescriptor(ByClass):
    scale = Descriptor()


class FromMeta(type):
    scale = 1.0


class Named(metaclass=FromMeta):
    pass


class Inherited(Body):
    def __call__(self, b, v):
        return scaled(2.0, super().__call__(b, v))


def scaled(scale, V):
    return [scale * g for g in V]


def half_scaled(b, v, factor=(0.5,)):
    return scaled(factor[0] * SCALE, gram(b, v))


Pair = namedtuple("Pair", "scale other")


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
    [product], _ = loops_of(A, 1)
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
    keys = [loops_of(A, 1)[0][0].key for A in operators]
    assert keys[0] == keys[2] != keys[1]
    assert None not in keys


def test_global_variables_count(risk, monkeypatch):
    JTJ, _, _ = references_of(risk)
    A = Operator(risk, lambda b, v: [SCALE * g for g in b.vjp(b.jvp(v))])
    assert_all_right([A], [2 * JTJ])
    monkeypatch.setitem(globals(), "SCALE", 7.0)
    assert_all_right([A], [7 * JTJ])


@pytest.mark.parametrize(
    "make",
    [
        lambda risk: Operator(risk, half_scaled),
        lambda risk: Operator(risk, lambda b, v: half_scaled(b, v)),
        lambda risk: Operator(risk, wraps(gram)(lambda b, v: half_scaled(b, v))),
        lambda risk: Operator(risk, lambda b, v: (lambda: half_scaled(b, v))()),
        *(FromProperty, FromMissing, FromClassMethod, FromDescriptor),
    ],
)
def test_global_variables_count_wherever_they_are_read(risk, monkeypatch, make):
    JTJ, _, _ = references_of(risk)
    A = make(risk)
    assert_all_right([A], [JTJ])
    assert is_recorded(A)
    monkeypatch.setitem(globals(), "SCALE", 6.0)
    assert_all_right([A], [3 * JTJ])


@pytest.mark.parametrize(
    ("make", "owner", "name", "value"),
    [
        (ByClass, ByClass, "scale", 3.0),
        (FromDictionary, ByClass, "settings", {"scale": 3.0}),
        (
            lambda risk: Operator(risk, lambda b, v: scaled(Named.scale, gram(b, v))),
            *(FromMeta, "scale", 3.0),
        ),
        (
            lambda risk: Operator(risk, lambda b, v: scaled(Named.scale, gram(b, v))),
            *(FromMeta, "scale", 3.0),
        ),
        (ByClass, ByClass, "_body", lambda self, b, v: scaled(3.0, gram(b, v))),
        (
            lambda risk: Operator(risk, Body()),
            *(Body, "__call__", lambda self, b, v: scaled(3.0, gram(b, v))),
        ),
        (
            lambda risk: Operator(risk, Inherited()),
            *(Body, "__call__", lambda self, b, v: scaled(1.5, gram(b, v))),
        ),
    ],
)
def test_classes_may_change(risk, monkeypatch, make, owner, name, value):
    JTJ, _, _ = references_of(risk)
    A = make(risk)
    first = 2.0 if isinstance(A.forms[0].body, Inherited) else 1.0
    assert_all_right([A], [first * JTJ])
    assert is_recorded(A)
    monkeypatch.setattr(owner, name, value)
    assert_all_right([A], [3 * JTJ])


def test_values_in_a_class_may_change(risk, monkeypatch):
    JTJ, _, _ = references_of(risk)
    A = FromDictionary(risk)
    assert_all_right([A], [JTJ])
    monkeypatch.setitem(ByClass.settings, "scale", 3.0)
    assert_all_right([A], [3 * JTJ])


def test_modules_may_change(risk, monkeypatch):
    settings = ModuleType("settings_of_a_user")
    monkeypatch.setitem(sys.modules, settings.__name__, settings)
    source = """
scale = 1.0
def multiply(b, v):
    return [scale * g for g in b.vjp(b.jvp(v))]
"""
    exec(source, vars(settings))

    def imports(b, v):
        import settings_of_a_user

        return scaled(settings_of_a_user.scale, gram(b, v))

    def imports_the_name(b, v):
        from settings_of_a_user import scale

        return scaled(scale, gram(b, v))

    JTJ, _, _ = references_of(risk)
    operators = [
        Operator(risk, settings.multiply),
        Operator(risk, lambda b, v: settings.multiply(b, v)),
        Operator(risk, lambda b, v: scaled(settings.scale, gram(b, v))),
        Operator(risk, imports),
        Operator(risk, imports_the_name),
    ]
    assert_all_right(operators, [JTJ] * 5)
    assert all(map(is_recorded, operators))
    settings.scale = 3.0
    assert_all_right(operators, [3 * JTJ] * 5)


def test_functions_may_change(risk, monkeypatch):
    JTJ, _, H = references_of(risk)

    def body(b, v):
        return scaled(body.scale, gram(b, v))

    body.scale = 1.0
    operators = [Operator(risk, body), Operator(risk, lambda b, v: half_scaled(b, v))]
    assert_all_right(operators, [JTJ, JTJ])
    assert all(map(is_recorded, operators))
    body.scale = 2.0
    monkeypatch.setattr(half_scaled, "__defaults__", ((1.5,),))
    assert_all_right(operators, [2 * JTJ, 3 * JTJ])
    monkeypatch.setattr(half_scaled, "__code__", (lambda b, v, _: b.hvp(v)).__code__)
    assert_all_right(operators, [2 * JTJ, H])


def test_attributes_of_the_risk_count(risk):
    JTJ, _, _ = references_of(risk)
    risk.temperature = 1.0
    A = Operator(risk, lambda b, v: scaled(risk.temperature, gram(b, v)))
    assert_all_right([A], [JTJ])
    assert is_recorded(A)
    risk.temperature = 3.0
    assert_all_right([A], [3 * JTJ])


def test_functions_made_of_others(risk):
    def times(scale):
        def decorate(function):
            @wraps(function)
            def wrapper(*args):
                return scaled(scale, function(*args))

            return wrapper

        return decorate

    class Partial(ByClass):
        def __init__(self, risk, name):
            super().__init__(risk)
            self.name = name

        def _times(self, b, v, scale):
            return scaled(scale, gram(b, v))

        one, two = partialmethod(_times, scale=1.0), partialmethod(_times, scale=2.0)

        @property
        def forms(self):
            return (Form(getattr(self, self.name)),)

    JTJ, _, H = references_of(risk)
    operators = [
        Operator(risk, times(1.0)(gram)),
        Operator(risk, times(2.0)(gram)),
        Operator(risk, times(2.0)(lambda b, v: b.hvp(v))),
        Partial(risk, "one"),
        Partial(risk, "two"),
    ]
    assert_all_right(operators, [JTJ, 2 * JTJ, 2 * H, JTJ, 2 * JTJ])
    assert all(map(is_recorded, operators))


def test_two_objects_written_in_c(risk):
    """They keep what they are made of out of sight."""

    def cached(scale):
        return lru_cache(lambda: scale)

    def body(get, *args):
        return lambda b, v: scaled(get(*args), gram(b, v))

    JTJ, _, _ = references_of(risk)
    numbers = {"s": 1.0}
    operators = [
        Operator(risk, body(itemgetter(0), [1.0, 2.0])),
        Operator(risk, body(itemgetter(1), [1.0, 2.0])),
        Operator(risk, body(cached(1.0))),
        Operator(risk, body(cached(2.0))),
        Operator(risk, body(numbers.get, "s")),
        Operator(risk, body({"s": 2.0}.get, "s")),
    ]
    assert_all_right(operators, [JTJ, 2 * JTJ] * 3)
    numbers["s"] = 3.0
    assert_all_right(operators[4:], [3 * JTJ, 2 * JTJ])


def test_a_diagonal_and_its_subclass(risk):
    class Scaled(GGNDiagonalLinearOperator):
        def __init__(self, risk, scale):
            super().__init__(risk)
            self.scale = scale

        def _products(self, b):
            return scaled(self.scale, super()._products(b))

    _, G, _ = references_of(risk)
    D = G.diag().diag()
    operators = [GGNDiagonalLinearOperator(risk), Scaled(risk, 2.0), Scaled(risk, 3.0)]
    assert_all_right(operators, [D, 2 * D, 3 * D])


def test_bodies_that_never_stay_the_same_do_not_pile_up(risk):
    class Counted(Scaled):
        def _apply(self, V):
            self.products = getattr(self, "products", 0) + 1
            return super()._apply(V)

    risk = risk.twin(policy=Policy(matrices=5))
    JTJ, _, H = references_of(risk)
    A, other = Counted(risk, 2.0), HessianLinearOperator(risk)
    assert_all_right([other, A], [H, 2 * JTJ])
    assert is_recorded(other)
    assert not is_recorded(A)
    assert all(len(b._routes) <= 5 for b in risk._recordings.values())
    assert len(risk._joined) <= 5


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
        Sandwich(risk, Halved(0)),
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
        random.Random(),
        torch.ops.aten.sin.default._schema,
    ],
    ids=[
        *("tensor", "array", "module", "iterator", "list", "much"),
        *("generator", "schema"),
    ],
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


@pytest.mark.parametrize(
    "body",
    [
        lambda b, v: scaled(globals()["SCALE"], gram(b, v)),
        lambda b, v: scaled(eval("SCALE"), gram(b, v)),
        lambda b, v: (__import__("nowhere_yet") and None) or gram(b, v),
    ],
)
def test_what_reads_variables_unseen_is_not_recorded(risk, body):
    assert not is_recorded(Operator(risk, body))


def test_forms_from_outputs_to_outputs_are_refused():
    with pytest.raises(TypeError, match="compose two forms"):
        Form(gram, cols=Side.OUTPUTS, rows=Side.OUTPUTS)


@pytest.mark.parametrize("columns", [1, 3])
def test_sums_and_means_have_matrices_of_their_own(risk, columns):
    JTJ, _, _ = references_of(risk)
    D, V = sum(len(y) for _, y in risk.data), torch.randn(len(JTJ), columns).double()
    J = JacobianLinearOperator(risk).to_dense()
    weighted = Form(lambda b, v: [b.jvp(v)], rows=Side.OUTPUTS)
    for _ in range(MANY):
        assert_close(risk.apply(Form(gram), V), JTJ @ V, size=1e4)
        assert_close(risk.apply(Form(gram, mean=False), V), D * JTJ @ V, size=1e4)
        assert_close(risk.apply(weighted, V), J @ V / D, size=1e4)


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
        keys = {loops_of(make(risk), 1)[0][0].key for _ in range(2)}
        assert len(keys) == 1
        assert None not in keys
    samples = [
        FisherMCLinearOperator(risk, seed=seed, mc_samples=M)
        for seed, M in ((0, 1), (1, 1), (0, 2), (0, 1))
    ]
    keys = [loops_of(A, 1)[0][0].key for A in samples]
    assert len(set(keys)) == 3
    assert keys[0] == keys[3]
    exact = GGNLinearOperator(risk, seed=5)
    assert (
        loops_of(exact, 1)[0][0].key == loops_of(GGNLinearOperator(risk), 1)[0][0].key
    )
    J = JacobianLinearOperator(risk)
    loops, _ = loops_of(GramLinearOperator(risk, weighted=False), 1)
    [forward], _ = loops_of(J, 1)
    [backward], _ = loops_of(J.adjoint(), 1)
    assert [loop.key for loop in loops] == [backward.key, forward.key]


def test_copies_have_the_same_name(risk):
    A = Operator(risk, Body(2.0))
    [product], _ = loops_of(A, 1)
    for other in (copy.copy(A), pickle.loads(pickle.dumps(A))):
        [same], _ = loops_of(other, 1)
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
        (Pair(1, 2), Pair(1, 3)),
        (Pair(1, 2), (1, 2)),
        (np.float32(1), np.float32(2)),
        (np.float32(1), np.float64(1)),
        ([10**5000], [10**5000 + 1]),
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
        found = risk.apply(Form(ones, linear=False), V)
        assert_close(found, V * batches / D)
    assert all(not b._routes for b in risk._recordings.values())
