"""Shortcuts for models so small that starting operations costs more than they do."""

import copy
import gc

import pytest
import torch
from torch import nn

from cases import find, problems
from curvlinops import EFLinearOperator, GGNLinearOperator, HessianLinearOperator
from curvlinops._copies import _deep_copy, _is_ordinary
from curvlinops._dense import is_jacobian
from curvlinops._parts import jacobian_by_datum
from curvlinops._plan import loops_of
from curvlinops._policy import Policy
from curvlinops._replay import _ByTensor, record
from tolerances import assert_close


def multilayer(*between):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), *between, nn.Linear(5, 2)).double()


def batches(*sizes):
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(n, 3, generator=generator, dtype=torch.float64),
            torch.randint(2, (n,), generator=generator),
        )
        for n in sizes
    ]


def key_of(A):
    return loops_of(A, 1)[0][0].key


def joined(A):
    """Return the batch that stands for all."""
    return A.risk._joined_batch(key_of(A))


def pair(operator, model, data, **options):
    """Return an operator, and one that keeps nothing."""
    args = model, nn.CrossEntropyLoss(), list(model.parameters()), data
    return operator(*args, **options), operator(*args, cache="off", **options)


def assert_products_agree(A, plain, columns=(1, 1, 1, 1, 1, 3)):
    generator = torch.Generator().manual_seed(2)
    for K in columns:
        V = torch.randn(A.shape[1], K, generator=generator, dtype=torch.float64)
        assert_close(A @ V, plain @ V, size=256)


# -- copies of modules --------------------------------------------------------------


class Nest(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.BatchNorm1d(3)
        self.second.weight = self.first.bias  # tied
        self.parts = [self.first, {"again": self.second, "itself": self}]
        self.names, self.empty, self.also_empty = {"a": [1, 2]}, {}, set()
        self.shared = self.names


def test_copies_are_those_of_deepcopy():
    module = Nest()
    new = _deep_copy(module, {})
    assert vars(new).keys() == vars(copy.deepcopy(module)).keys()
    assert new.first is new.parts[0] is not module.first
    assert new.parts[1]["itself"] is new
    assert new.parts[1]["again"] is new.second
    assert new.second.weight is new.first.bias is not module.first.bias
    assert new.shared is new.names == module.names
    assert new.names["a"] is not module.names["a"]
    states = new.state_dict().values(), module.state_dict().values()
    for a, b in zip(*states, strict=True):
        assert torch.equal(a, b)
        assert a.data_ptr() != b.data_ptr()


class CopiesItself(nn.Linear):
    def __deepcopy__(self, memo):
        new = CopiesItself(self.in_features, self.out_features)
        new.weight = memo.get(id(self.weight), self.weight)
        return new


class LeavesOut(nn.Linear):
    def __getstate__(self):
        return {k: v for k, v in super().__getstate__().items() if k != "left_out"}


@pytest.mark.parametrize("kind", [CopiesItself, LeavesOut])
def test_what_a_class_says_about_its_copies_is_heeded(kind):
    module = nn.Sequential(kind(2, 2))
    module[0].left_out = 1
    assert _is_ordinary(nn.Linear)
    assert not _is_ordinary(kind)
    new = _deep_copy(module, {})
    assert type(new[0]) is kind
    assert not hasattr(new[0], "left_out")


# -- Jacobians datum by datum -------------------------------------------------------


@pytest.mark.parametrize("problem", problems(without=("heavy",)))
@pytest.mark.filterwarnings("ignore:The model's output does not depend")
def test_jacobians_by_datum_are_right_or_refused(problem):
    A = GGNLinearOperator(*problem.build())
    risk = A.risk

    def compare():
        for batch in risk.batches("test"):
            J = jacobian_by_datum(risk, batch, 2)
            if J is not None and is_jacobian(J, risk.space, batch, 0.75):
                rows = torch.eye(J.shape[0], dtype=batch.output_space.dtype)
                for u, row in zip(rows, J, strict=True):
                    u = u.reshape(batch.output_space.shapes[0])
                    assert_close(row, risk.space.join(batch.vjp(u)), J.dtype, 256)

    if risk.model.by_datum:
        risk.session(compare)


@pytest.mark.parametrize("operator", [GGNLinearOperator, EFLinearOperator])
def test_jacobians_are_computed_by_datum(operator):
    A, plain = pair(operator, multilayer(nn.Tanh()), batches(4, 4, 1))
    assert_products_agree(A, plain)
    assert A.risk._dense.jacobians
    assert A.risk.model.by_datum


def test_data_that_depend_on_each_other_are_not_taken_apart():
    model = multilayer(nn.BatchNorm1d(5, dtype=torch.float64))
    A, plain = pair(GGNLinearOperator, model, batches(4), check_deterministic=False)
    assert_products_agree(A, plain)
    assert not A.risk.model.by_datum


class Remembers(nn.Module):
    def forward(self, X):
        self.last, self.mark = X, X.sum()
        return X.tanh()


def test_what_a_model_remembers_of_a_datum_is_taken_back():
    A, plain = pair(GGNLinearOperator, multilayer(Remembers()), batches(4))
    assert_products_agree(A, plain)
    assert A.risk.model.by_datum
    assert A.risk.model._function[1].last.shape == (4, 5)


def test_hooks_see_no_single_data():
    model, seen = multilayer(nn.Tanh()), []
    model[0].register_forward_hook(lambda *args: seen.append(args[-1]))
    A, plain = pair(GGNLinearOperator, model, batches(4))
    assert_products_agree(A, plain)
    assert not A.risk.model.by_datum
    assert {tuple(t.shape) for t in seen} == {(4, 5)}


# -- factors of the matrix ----------------------------------------------------------


def number_of_factors(A):
    return [len(factors) for factors in A.risk._dense.matrices.values()]


@pytest.mark.parametrize("operator", [GGNLinearOperator, EFLinearOperator])
@pytest.mark.parametrize(
    ("sizes", "final"), [((4,), 2), ((3, 1), 2), ((4, 3, 1), 2), ((8, 9), 1)]
)
def test_factors_are_multiplied_unless_the_matrix_is_less_work(operator, sizes, final):
    A, plain = pair(operator, multilayer(nn.Tanh()), batches(*sizes))
    assert_products_agree(A, plain, (1, 1))
    assert number_of_factors(A) == []
    assert_products_agree(A, plain, (1,))
    assert number_of_factors(A) == [2]
    assert_products_agree(A, plain, (3, *(1,) * A.shape[1]))
    assert number_of_factors(A) == [final]
    assert_products_agree(A, plain)
    with torch.no_grad():
        next(iter(A.risk.params.values())).mul_(2)
    assert_products_agree(A, plain)


def test_large_jacobians_become_factors_later(monkeypatch):
    monkeypatch.setattr(
        "curvlinops._dense.Dense.cost_of_matrix", lambda *_, **__: float("inf")
    )
    later, model = Policy(factor_bytes=256), multilayer(nn.Tanh())
    A, plain = pair(GGNLinearOperator, model, batches(4), policy=later)
    assert_products_agree(A, plain, (1, 1, 1, 1, 1))
    assert A.risk._dense.jacobians
    assert number_of_factors(A) == []
    assert_products_agree(A, plain, (1,) * 8)
    assert number_of_factors(A) == [2]


def test_matrices_of_one_risk_share_the_rows_of_factors():
    A, plain = pair(GGNLinearOperator, multilayer(nn.Tanh()), batches(3, 2))
    assert_products_agree(A, plain)
    E = EFLinearOperator(A.risk)
    assert_products_agree(E, EFLinearOperator(plain.risk))
    stacked = A.risk._dense._stacked
    rows = stacked.split([len(J) for _, J in A.risk._dense.jacobians])
    for (_, J), its in zip(A.risk._dense.jacobians, rows, strict=True):
        assert J.data_ptr() == its.data_ptr()
    for _, JT in A.risk._dense.matrices.values():
        assert JT.data_ptr() == stacked.data_ptr()
    A.risk._dense.drop_jacobians()
    assert number_of_factors(A) == []
    assert not A.risk._ledger._others
    assert_products_agree(A, plain)


def test_factors_are_not_rounded_by_autocast():
    model = multilayer(nn.Tanh()).float()
    for sizes, final in (((4, 3), 2), ((4, 4, 9), 1)):
        data = [(X.float(), y) for X, y in batches(*sizes)]
        A, plain = pair(GGNLinearOperator, model, data)
        v = torch.randn(A.shape[1])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            for _ in range(A.shape[1]):
                assert_close(A @ v, plain @ v, torch.float32, A.shape[1])
        assert number_of_factors(A) == [final]


@pytest.mark.parametrize("sizes", [(4,), (4, 4, 9)])
@pytest.mark.parametrize("operator", [GGNLinearOperator, HessianLinearOperator])
def test_what_is_kept_outlives_inference_mode(operator, sizes):
    A, plain = pair(operator, multilayer(nn.Tanh()), batches(*sizes))
    with torch.inference_mode():
        assert_products_agree(A, plain, (1,) * A.shape[1])
    assert A.risk._dense.matrices
    for factors in A.risk._dense.matrices.values():
        assert not any(factor.is_inference() for factor in factors)
    with torch.inference_mode():
        assert not (A @ torch.ones(A.shape[1]).double()).is_inference()
    assert_products_agree(A, plain)


class Half(nn.Linear):
    def forward(self, X):
        return 1e-3 * super().forward(X).half()


def test_outputs_in_half_precision_make_no_factors():
    torch.manual_seed(0)
    model, data = Half(3, 4), [(torch.rand(8, 3), torch.rand(8, 4)) for _ in range(50)]
    args = model, nn.MSELoss(), list(model.parameters()), data
    options = {"check_deterministic": False}
    A = GGNLinearOperator(*args, **options)
    plain = GGNLinearOperator(*args, cache="off", **options)
    v = torch.rand(A.shape[1])
    expected = plain @ v
    for _ in range(6):
        assert ((A @ v) - expected).norm() <= 2e-3 * expected.norm()
    assert A.risk._dense.jacobians
    assert 2 not in number_of_factors(A)


def test_a_thread_that_comes_late_keeps_no_jacobians():
    A, plain = pair(GGNLinearOperator, multilayer(nn.Tanh()), batches(3, 2))
    assert_products_agree(A, plain, (1, 1, 1))
    dense, batches_ = A.risk._dense, list(A.risk._recordings.values())
    before = [id(J) for _, J in dense.jacobians]
    late = dense.keep_jacobians(A.risk, dense.jacobians, batches_, True)
    assert [id(J) for _, J in late] == before
    assert [id(J) for _, J in dense.jacobians] == before


# -- several batches as one ---------------------------------------------------------


@pytest.mark.parametrize("sizes", [(4, 4), (4, 1, 3)])
def test_small_batches_are_multiplied_as_one(sizes):
    A, plain = pair(HessianLinearOperator, multilayer(nn.Tanh()), batches(*sizes))
    zero = torch.zeros(A.shape[1], dtype=torch.float64)
    assert not (A @ zero).any()
    assert not (A @ zero).any()
    assert joined(A) is not None
    assert_products_agree(A, plain)
    assert joined(A).replays(key_of(A))
    with torch.no_grad():
        next(iter(A.risk.params.values())).mul_(2)
    assert_products_agree(A, plain)


def test_batches_with_a_part_in_each_other_are_not_joined():
    model = multilayer(nn.BatchNorm1d(5, dtype=torch.float64))
    options = {"check_deterministic": False}
    A, plain = pair(HessianLinearOperator, model, batches(4, 5), **options)
    assert_products_agree(A, plain)
    assert [*A.risk._joined.values()] == [None]


class Scaled(nn.Module):
    """Takes data, and a number that is the same for all of them."""

    def __init__(self):
        super().__init__()
        self.net = multilayer(nn.Tanh())

    def forward(self, X):
        return self.net(X["data"]) * X["scale"]


@pytest.mark.parametrize("scales", [(2.0, 2.0), (2.0, 3.0)])
def test_batches_are_joined_only_if_they_differ_in_their_data_alone(scales):
    data = [
        ({"data": X, "scale": torch.tensor(scale).double()}, y)
        for (X, y), scale in zip(batches(4, 3), scales, strict=True)
    ]
    A, plain = pair(HessianLinearOperator, Scaled(), data)
    assert_products_agree(A, plain)
    assert (joined(A) is not None) == (len(set(scales)) == 1)


def test_bounded_memory_is_not_spent_on_joined_batches():
    args = find("mlp-tanh-ce").build()
    A = HessianLinearOperator(*args, max_memory=1 << 24)
    for _ in range(3):
        A @ torch.ones(A.shape[1], dtype=torch.float64)
    assert not A.risk._joined


# -- programs -----------------------------------------------------------------------


def test_transposing_twice_is_left_out():
    W, v = torch.randn(4, 3), torch.randn(2, 3)
    (result,), program = record(lambda vs: [(vs[0].t().t() @ W.t()).t().t()], [v])
    assert program.num_calls == 1
    assert torch.equal(program([2 * v])[0], 2 * result)


def test_values_by_tensor_are_dropped_with_it():
    values, tensor, other = _ByTensor(), torch.zeros(2), torch.zeros(2)
    values[tensor], values[other] = 1, 2
    assert values.get(tensor) == 1
    assert tensor in values
    assert values.pop(other) == 2
    assert other not in values
    del tensor
    gc.collect()
    assert not values._entries
