"""One batch's products against autograd, and what they keep in memory."""

import collections
import gc
import pickle
import weakref
from functools import partial

import numpy as np
import pytest
import torch

from cases import find
from curvlinops import (
    GGNLinearOperator,
    HessianLinearOperator,
)
from curvlinops._linearization import Linearization, graph_bytes
from curvlinops._model import Model
from curvlinops._policy import Policy
from curvlinops.losses import as_loss_function
from tolerances import assert_close


@pytest.fixture
def batch():
    module, loss_func, params, data = find("mlp-tanh-ce").build()
    model = Model(module, params)
    X, y = data[0]
    loss = as_loss_function(loss_func)
    return model.run(lambda: Linearization(model, X, y, loss))


#: Never materialise, and record soon instead.
SOON = Policy(record_soon=1, record_late=1, dense_dim=0)


def random_vectors(batch, *leading):
    return [torch.randn(*leading, *p.shape, dtype=torch.float64) for p in batch._leaves]


def test_jvp_is_the_directional_derivative(batch):
    model, V, eps = batch._model, random_vectors(batch), 1e-6
    values = []
    for sign in (1, -1):
        pairs = zip(model.params, batch._leaves, V, strict=True)
        moved = {name: p.detach() + sign * eps * v for name, p, v in pairs}
        other = Model(model._module, moved)
        values.append(other.run(lambda other=other: other(batch.X)))
    difference = (values[0] - values[1]) / (2 * eps)
    assert torch.allclose(batch.jvp(V), difference, atol=1e-7)


def test_vjp_is_the_adjoint_of_jvp(batch):
    V, U = random_vectors(batch), torch.randn_like(batch.output)
    left = (batch.jvp(V) * U).sum()
    right = sum((a * b).sum() for a, b in zip(batch.vjp(U), V, strict=True))
    assert_close(left, right, size=1000)


@pytest.mark.parametrize("product", ["jvp", "hvp"])
def test_leading_dimension_multiplies_several_vectors(batch, product):
    V = random_vectors(batch, 3)
    together = getattr(batch, product)(V)
    for k in range(3):
        alone = getattr(batch, product)([v[k] for v in V])
        if product == "jvp":
            assert_close(together[k], alone, size=100)
        else:
            for a, b in zip(together, alone, strict=True):
                assert_close(a[k], b, size=100)


def test_gradient_is_that_of_the_summed_loss(batch):
    value = batch.loss.value()
    expected = torch.autograd.grad(value, batch._leaves, retain_graph=True)
    for a, b in zip(batch.gradient(), expected, strict=True):
        assert_close(a, b, size=100)


def test_graph_bytes_counts_saved_tensors_once():
    x = torch.randn(100, 50, requires_grad=True)
    y = x.exp()
    z = y * y  # saves y, which is also the result that `exp` saved
    assert graph_bytes([z], exclude=[x]) == 2 * 100 * 50 * 4
    assert graph_bytes([z], exclude=[x, y]) == 100 * 50 * 4


def test_graph_bytes_leaves_checkpoints_alone():
    calls = []

    def part(x):
        calls.append(1)
        return x.exp().exp()

    x = torch.randn(10, requires_grad=True)
    y = torch.utils.checkpoint.checkpoint(part, x, use_reentrant=False)
    if not hasattr(y.grad_fn._raw_saved_result, "unpack_hook"):
        pytest.skip("this torch does not tell what is behind a hook")
    graph_bytes([y])
    assert len(calls) == 1


@pytest.mark.parametrize("operator", [GGNLinearOperator, HessianLinearOperator])
def test_recordings_stay_within_the_budget(operator):
    problem = find("mlp-tanh-ce").build()
    A = operator(*problem, policy=SOON)
    v = torch.ones(A.shape[1], dtype=torch.float64)
    expected = [A @ v for _ in range(5)][-1]
    sizes = [b.nbytes for b in A.risk._recordings.values()]
    assert len(sizes) == len(problem[3]) > 1
    assert A.status().held == sum(sizes)
    for budget in (0, sizes[0] - 1, 4 * sizes[0], 10 * sum(sizes)):
        B = operator(*problem, cache=budget, policy=SOON)
        for _ in range(5):
            assert_close(B @ v, expected, size=200)
            assert B.status().held <= budget
    assert B.status().batches == ("recording",) * len(sizes)


# -- recordings ---------------------------------------------------------------------


def warmed_up(model, data, loss=None, **options):
    """Return a GGN after some products, and those of its recordings trusted or not."""
    loss = loss or torch.nn.CrossEntropyLoss()
    params = dict(model.named_parameters())
    A = GGNLinearOperator(model, loss, params, data, **options)
    for _ in range(4):
        A @ torch.ones(A.shape[1], dtype=A.torch_dtype)
    return A


def trusted(A):
    batches = A.risk._recordings.values()
    return [route.trusted for b in batches for route in b._routes.values()]


def test_dropping_an_operator_frees_its_graphs_at_once():
    A = warmed_up(
        torch.nn.Linear(3, 2), [(torch.rand(4, 3), torch.tensor([0, 1, 1, 0]))]
    )
    batches = [weakref.ref(b) for b in A.risk._recordings.values()]
    gc.disable()
    try:
        del A
        assert [b() for b in batches] == [None]
    finally:
        gc.enable()


def test_pickles_carry_nothing_that_is_recomputed():
    problem = find("mlp-tanh-ce").build()
    A = GGNLinearOperator(*problem)
    size = len(pickle.dumps(A))
    for _ in range(A.shape[1]):
        A @ torch.ones(A.shape[1], dtype=torch.float64)
    assert A.risk._dense.matrices or A.risk._dense.jacobians
    assert len(pickle.dumps(A)) <= 1.01 * size


class Masked(torch.nn.Module):
    """Attention with a mask of minus infinity as a buffer."""

    def __init__(self):
        super().__init__()
        self.q, self.out = torch.nn.Linear(3, 3), torch.nn.Linear(3, 2)
        self.register_buffer("mask", torch.full((4, 4), -torch.inf).triu(1))

    def forward(self, X):
        q = self.q(X)
        weights = (q @ q.transpose(1, 2) + self.mask).softmax(-1)
        return self.out(weights @ q).mean(1)


def test_infinite_buffers_keep_recordings():
    model = Masked()
    data = [(torch.rand(5, 4, 3), torch.randint(2, (5,)))]
    A = warmed_up(model, data, policy=SOON)
    assert trusted(A) == [True]
    model.mask[2, 1] = -torch.inf
    fresh = warmed_up(model, A.risk.data)
    v = torch.rand(A.shape[1])
    assert_close(A @ v, fresh @ v, torch.float32, 1000)


def test_huge_buffers_hide_no_change():
    model = Masked().double()
    model.mask = torch.full((4, 4), -1e300, dtype=torch.float64).triu(1)
    A = warmed_up(model, [(torch.rand(5, 4, 3).double(), torch.randint(2, (5,)))])
    model.out.weight.data.mul_(3)
    fresh = warmed_up(model, A.risk.data)
    v = torch.rand(A.shape[1]).double()
    assert_close(A @ v, fresh @ v, size=1000)


@pytest.mark.filterwarnings("ignore:Sparse")
def test_replaced_values_of_sparse_data_are_seen():
    S = (torch.eye(6) * torch.rand(6)).to_sparse()
    X, y = {"x": torch.rand(6, 3), "A": S}, torch.randint(2, (6,))
    A = warmed_up(Graph(), [(X, y)])
    S.data = (5 * S).coalesce()
    fresh = warmed_up(A.risk.model_func, [(X, y)])
    v = torch.rand(A.shape[1])
    assert_close(A @ v, fresh @ v, torch.float32, 1000)


def test_infinite_inputs_are_the_same_in_every_pass():
    X = torch.zeros(5, 3).masked_fill(torch.eye(5, 3) > 0, -torch.inf)
    model = torch.nn.Sequential(torch.nn.Softmax(1), torch.nn.Linear(3, 2))
    A = warmed_up(model, [(X, torch.randint(2, (5,)))])
    assert not A.risk._shuffled


class Graph(torch.nn.Module):
    def __init__(self, **buffers):
        super().__init__()
        self.linear = torch.nn.Linear(3, 2)
        for name, tensor in buffers.items():
            self.register_buffer(name, tensor)

    def forward(self, X):
        return getattr(self, "A", X["A"]) @ self.linear(X["x"])


@pytest.mark.parametrize("layout", ["to_sparse", "to_sparse_csr"])
@pytest.mark.parametrize("as_buffer", [False, True])
@pytest.mark.filterwarnings("ignore:Sparse")
def test_sparse_inputs_and_buffers(layout, as_buffer):
    dense = (torch.rand(6, 6) < 0.5).float()
    sparse = getattr(dense, layout)()
    X, y = torch.rand(6, 3), torch.randint(2, (6,))
    model = Graph(**({"A": sparse} if as_buffer else {}))
    A = warmed_up(model, [({"x": X, "A": sparse}, y)])
    values = sparse.values() if layout == "to_sparse_csr" else sparse._values()
    for factor in (1, 2):
        values.mul_(factor)
        other = Graph()
        other.linear = model.linear
        fresh = warmed_up(other, [({"x": X, "A": factor * dense}, y)])
        assert_close(A.to_dense(), fresh.to_dense(), torch.float32, 1000)


def test_a_replaced_module_is_seen():
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Tanh())
    data = [(torch.rand(5, 3), torch.randint(2, (5,)))]
    A, v = warmed_up(model, data), torch.rand(8)
    model[1] = torch.nn.Sigmoid()
    assert_close(A @ v, warmed_up(model, data) @ v, torch.float32, 1000)


class Closure(torch.nn.Module):
    """Uses its layer both as an attribute and through a function that holds it."""

    def __init__(self):
        super().__init__()
        self.linear = linear = torch.nn.Linear(3, 2)
        self.function = lambda X: linear(X)

    def forward(self, X):
        return torch.tanh(self.linear(X)) + self.function(X)


def test_frozen_parameters_that_a_copy_would_miss_are_found():
    model = Closure()
    data = [(torch.rand(5, 3), torch.randint(2, (5,)))]
    expected = warmed_up(model, data).to_dense()
    A = warmed_up(model.requires_grad_(False), data)
    assert_close(A.to_dense(), expected, torch.float32, 1000)


def test_a_mapping_with_a_constructor_of_its_own_is_protected():
    X = collections.defaultdict(list, x=torch.rand(6, 3), A=torch.eye(6).to_sparse())
    data = [(X, torch.randint(2, (6,)))]
    assert trusted(warmed_up(Graph(), data, policy=SOON))


class Weighted(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(3, 2).double()

    def forward(self, X):
        array = torch.as_tensor(np.ascontiguousarray(X["array"]))
        return self.linear(X["x"] * array * X["number"])


def quartic(f, y):
    return ((f - torch.as_tensor(y)) ** 4).mean()


@pytest.mark.parametrize(
    "changed", ["array", "view", "reversed", "number", "item", "targets"]
)
@pytest.mark.parametrize("products", [1, 12])
def test_changes_of_listed_data_that_are_no_tensors_are_seen(changed, products):
    array = np.ones(6)[::2]
    given = {"view": np.broadcast_to(array, (5, 3)), "reversed": array[::-1]}
    X = {
        "x": torch.rand(5, 3).double(),
        "array": given.get(changed, array),
        "number": 2.0,
    }
    y = np.random.default_rng(0).random((5, 2))
    model = Weighted()
    arguments = model, quartic, dict(model.named_parameters()), [(X, y)]
    A, v = HessianLinearOperator(*arguments), torch.rand(8).double()
    for _ in range(products):
        before = A @ v
    if changed in ("array", *given):
        array[1] *= 2
    elif changed == "targets":
        y[0, 1] += 1
    elif changed == "number":
        X["number"] = 3.0
    else:
        X["x"], X["array"] = 2 * X["x"], np.ones(3)
    assert not torch.allclose(A @ v, before)
    assert_close(A @ v, HessianLinearOperator(*arguments) @ v, size=1000)


@pytest.mark.parametrize("kind", ["partial", "method"])
def test_what_a_model_is_bound_to_is_watched(kind):
    class Scaled(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("scale", torch.full((3,), 2.0).double())

        def apply_to(self, params, X):
            return (self.scale * X) @ params["weight"]

    def scaled(params, X, *, scale):
        return (scale * X) @ params["weight"]

    scale, owner = torch.full((3,), 2.0).double(), Scaled()
    model = partial(scaled, scale=scale) if kind == "partial" else owner.apply_to
    params = {"weight": torch.rand(3, 2).double().requires_grad_()}
    data = [(torch.rand(5, 3).double(), torch.rand(5, 2).double())]
    A = GGNLinearOperator(model, torch.nn.MSELoss(), params, data)
    v = torch.rand(6).double()
    before = [A @ v for _ in range(9)][-1]
    (scale if kind == "partial" else owner.scale).mul_(2)
    assert_close(A @ v, 4 * before, size=1000)


def test_values_that_are_made_anew_change_nothing():
    class Anew(collections.abc.Mapping):
        def __init__(self, **items):
            self.items_ = items

        def __getitem__(self, key):
            item = self.items_[key]
            return float(str(item)) if isinstance(item, float) else item

        def __iter__(self):
            return iter(self.items_)

        def __len__(self):
            return len(self.items_)

    X = Anew(x=torch.rand(5, 3).double(), array=np.ones(3), number=1.5)
    model = Weighted()
    params = dict(model.named_parameters())
    A = HessianLinearOperator(model, quartic, params, [(X, np.ones((5, 2)))])
    v = torch.rand(8).double()
    A @ v
    [recorded] = A.risk._recordings.values()
    A @ v
    assert [*A.risk._recordings.values()] == [recorded]
