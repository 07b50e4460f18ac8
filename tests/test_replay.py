"""Recorded products: which calls are kept, when a recording is trusted, when not."""

import copy
import unittest.mock
import warnings
from functools import reduce

import pytest
import torch
from torch import nn

import references
from cases import IN_PLACE, find, problems
from curvlinops import (
    EFLinearOperator,
    GGNLinearOperator,
    HessianLinearOperator,
    _linearization,
    risk,
)
from curvlinops._model import Model
from curvlinops._policy import Policy
from curvlinops._replay import Route, Unrecordable, record
from tolerances import assert_close

directional = Model.directional

OPERATORS = [GGNLinearOperator, HessianLinearOperator]


#: Never materialise, and record soon instead.
SOON = Policy(record_soon=1, record_late=1, dense_dim=0)


def routes(A):
    return [route for b in A.risk._recordings.values() for route in b._routes.values()]


def leaf(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


# -- recording ----------------------------------------------------------------------


def test_only_calls_that_depend_on_the_vector_are_kept():
    W = torch.randn(4, 3, dtype=torch.float64)

    def product(vectors):
        constant = torch.tanh(W) + 1
        return [constant @ vectors[0]]

    v, w = torch.randn(2, 3, dtype=torch.float64)
    (result,), program = record(product, [v])
    assert program.num_calls <= 2  # matrix times vector is a view and a `mv`
    assert torch.equal(result, product([v])[0])
    assert torch.equal(program([w])[0], product([w])[0])


def test_calls_without_use_are_dropped():
    def product(vectors):
        _unused = vectors[0].exp().sum()
        return [2 * vectors[0]]

    _, program = record(product, [torch.ones(3)])
    assert program.num_calls == 1


def test_calls_that_write_are_kept_though_their_result_is_unused():
    def product(vectors):
        out = vectors[0] * 2
        out.add_(vectors[0])
        return [out]

    _, program = record(product, [torch.ones(3)])
    assert program([torch.ones(3)])[0].tolist() == [3, 3, 3]


def test_writing_into_part_of_a_constant_is_refused():
    def product(vectors):
        out = torch.zeros(2, 5)
        out[:, :3] = vectors[0]
        return [out]

    with pytest.raises(Unrecordable, match="outside"):
        record(product, [torch.ones(2, 3)])


def test_a_buffer_that_is_written_to_is_made_anew_in_every_replay():
    index = torch.tensor([0, 2, 0])

    def product(vectors):
        out = torch.zeros(4, dtype=torch.float64)
        return [out.index_add_(0, index, vectors[0])]

    _, program = record(product, [torch.ones(3, dtype=torch.float64)])
    for _ in range(3):
        w = torch.randn(3, dtype=torch.float64)
        assert torch.equal(program([w])[0], product([w])[0])


def test_replays_do_not_share_results():
    _, program = record(lambda vs: [vs[0] * 2], [torch.ones(3)])
    first = program([torch.ones(3)])[0]
    program([torch.zeros(3)])
    assert first.tolist() == [2, 2, 2]


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (lambda v, kept: [v * v.sum().item()], "reads numbers"),
        (lambda v, kept: [kept.add_(v).clone()], "did not create|outside"),
    ],
)
def test_what_cannot_be_replayed_is_refused(body, reason):
    kept = torch.zeros(3)
    with pytest.raises(Unrecordable, match=reason):
        record(lambda vs: body(vs[0], kept), [torch.ones(3)])


def test_an_earlier_view_of_a_written_tensor_is_refused():
    def product(vectors):
        out = torch.zeros(3)
        view = out[:2]
        out.add_(vectors[0])
        return [view + vectors[0][:2]]

    with pytest.raises(Unrecordable, match="view"):
        record(product, [torch.ones(3)])


def test_constants_computed_from_an_earlier_view_are_refused():
    def product(vectors):
        out = torch.zeros(3)
        view = out[:2]
        out.add_(vectors[0])
        return [(2 * view) + vectors[0][:2]]

    with pytest.raises(Unrecordable, match="view"):
        record(product, [torch.ones(3)])


def test_convolution_backward_computes_what_is_used():
    x, w = leaf(2, 3, 6, 6), leaf(4, 3, 3, 3)
    y = nn.functional.conv2d(x, w)

    def product(vectors):
        return [torch.autograd.grad(y, [x, w], vectors, retain_graph=True)[1]]

    v = torch.randn_like(y)
    (result,), program = record(product, [v.detach()])
    (mask,) = [
        value
        for value in program._run.__globals__.values()
        if isinstance(value, list) and value and isinstance(value[0], bool)
    ]
    assert mask == [False, True, False]
    assert torch.equal(program([v])[0], result)


# -- trust --------------------------------------------------------------------------


def multiply(route, product, count=5):
    for _ in range(count):
        v = [torch.randn(3, dtype=torch.float64)]
        assert_close(route.multiply(product, v, False)[0], product(v)[0])


def test_a_faithful_recording_is_trusted():
    W, route = torch.randn(3, 3, dtype=torch.float64), Route()
    multiply(route, lambda vs: [W @ vs[0]])
    assert route.trusted


def test_work_outside_of_torch_is_seen_through_and_refused():
    """NumPy's work is invisible, hence looks constant: wrong for the next vector."""
    route = Route()
    multiply(route, lambda vs: [torch.from_numpy(3 * vs[0].numpy()) + 0 * vs[0]])
    assert not route.trusted


def test_work_outside_of_torch_is_refused_though_the_vector_repeats():
    route, v = Route(), [torch.ones(3, dtype=torch.float64)]
    for _ in range(5):
        route.multiply(lambda vs: [torch.from_numpy(3 * vs[0].numpy())], v, False)
    assert not route.trusted


def test_what_fails_under_watch_stays_plain():
    def product(vectors):
        if torch.utils._python_dispatch._get_current_dispatch_mode() is not None:
            raise TypeError("watched")
        return [2 * vectors[0]]

    route = Route()
    multiply(route, product)
    assert not route.trusted


def test_zero_products_prove_nothing():
    """The user's vector is zero; what is taken for constant fits it."""
    route, zero = Route(), [torch.zeros(3, dtype=torch.float64)]

    def product(vectors):
        return [torch.from_numpy(3 * vectors[0].numpy()) + 0 * vectors[0]]

    for _ in range(4):
        route.multiply(product, zero, False)
    assert not route.trusted


def test_blocks_take_the_vectorised_recording_and_fall_back():
    W, route = torch.randn(4, 3, dtype=torch.float64), Route()

    def product(vectors):
        return [vectors[0] @ W.T]

    for _ in range(3):
        V = torch.randn(5, 3, dtype=torch.float64)
        assert_close(route.multiply(product, [V], True)[0], V @ W.T)
    assert route.trusted
    assert route._vectorises


# -- in operators -------------------------------------------------------------------


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("problem", problems(without=("heavy",)))
@pytest.mark.filterwarnings("ignore:The model's output does not depend")
def test_replayed_products_equal_plain_ones(operator, problem):
    args = problem.build()
    A, plain = operator(*args, policy=SOON), operator(*args, cache="off")
    N, dtype = A.shape[1], A.torch_dtype
    generator = torch.Generator().manual_seed(1)
    for _ in range(5):
        v = torch.randn(N, generator=generator).to(dtype)
        assert_close(A @ v, plain @ v, dtype, 16 * N)
    assert all(route.trusted for route in routes(A))
    assert all("output" not in vars(b) for b in A.risk._recordings.values())
    V = torch.randn(N, 5, generator=generator).to(dtype)
    assert_close(A @ V, plain @ V, dtype, 16 * N)


def test_one_risk_serves_two_replayed_operators():
    model, loss, params, data = find("mlp-tanh-ce").build()
    shared = risk.EmpiricalRisk(model, loss, params, data, policy=SOON)
    H, G = HessianLinearOperator(shared), GGNLinearOperator(shared)
    dense_H = HessianLinearOperator(model, loss, params, data, cache="off").to_dense()
    dense_G = GGNLinearOperator(model, loss, params, data, cache="off").to_dense()
    for _ in range(6):
        v = torch.randn(H.shape[1], dtype=torch.float64)
        assert_close(H @ v, dense_H @ v)
        assert_close(G @ v, dense_G @ v)


def test_replays_follow_changed_parameters():
    model, loss, params, data = find("conv2d").build()
    A = GGNLinearOperator(model, loss, params, data, policy=SOON)
    v = torch.randn(A.shape[1], dtype=torch.float64)
    for _ in range(5):
        A @ v
    with torch.no_grad():
        next(iter(params.values())).mul_(2)
    fresh = GGNLinearOperator(model, loss, params, data, cache="off")
    assert_close(A @ v, fresh @ v)


def test_autocast_around_a_replay_changes_nothing():
    model, loss, params, data = find("mlp-float32").build()
    A = GGNLinearOperator(model, loss, params, data, policy=SOON)
    v = torch.randn(A.shape[1])
    expected = [A @ v for _ in range(5)][-1]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_close(A @ v, expected, torch.float32, A.shape[1])


@pytest.mark.parametrize("operator", OPERATORS)
def test_small_matrices_are_materialised_once_that_pays(operator):
    model, loss, params, data = find("mlp-tanh-ce").build()
    A = operator(model, loss, params, data)
    dense = operator(model, loss, params, data, cache="off").to_dense()
    for _ in range(2 * A.shape[1]):
        v = torch.randn(A.shape[1], dtype=torch.float64)
        assert_close(A @ v, dense @ v)
    (factors,) = A.risk._dense.matrices.values()
    assert_close(reduce(lambda M, factor: factor @ M, factors), dense)
    V = torch.randn(A.shape[1], 3, dtype=torch.float64)
    assert_close(A @ V, dense @ V)
    with torch.no_grad():
        next(iter(params.values())).mul_(2)
    fresh = operator(model, loss, params, data, cache="off")
    assert_close(A @ v, fresh @ v)
    assert not A.status().matrix


@pytest.mark.parametrize("operator", [GGNLinearOperator, EFLinearOperator])
@pytest.mark.parametrize("problem", problems(without=("heavy",)))
@pytest.mark.filterwarnings("ignore:The model's output does not depend")
def test_products_with_kept_jacobians_equal_plain_ones(operator, problem):
    args = problem.build()
    A, plain = operator(*args), operator(*args, cache="off")
    N, dtype = A.shape[1], A.torch_dtype
    generator = torch.Generator().manual_seed(1)
    for K in (1, 1, 1, 3):
        V = torch.randn(N, K, generator=generator).to(dtype)
        assert_close(A @ V, plain @ V, dtype, 16 * N)
    assert bool(A.risk._dense.jacobians) == (A.risk._repeats and dtype.itemsize >= 4)
    assert A.status().matrix == bool(A.risk._dense.jacobians)


class Single(nn.Linear):
    """Its output has another type than its parameters."""

    def forward(self, X):
        return super().forward(X).float()


def test_jacobians_of_another_dtype_than_the_outputs():
    model, data = Single(3, 2).double(), [(torch.rand(4, 3).double(), torch.rand(4, 2))]
    args = model, nn.MSELoss(), list(model.parameters()), data
    A, plain = GGNLinearOperator(*args), GGNLinearOperator(*args, cache="off")
    for K in (1, 1, 1, 3):
        V = torch.randn(8, K, dtype=torch.float64)
        assert_close(A @ V, plain @ V, torch.float32, 100)
    assert A.risk._dense.jacobians


def test_a_jacobian_that_cannot_be_vectorised_is_not_kept(monkeypatch):
    def refuse(*args, **options):
        if options.get("is_grads_batched"):
            raise RuntimeError("no batching rule")
        return grad(*args, **options)

    grad = _linearization.grad
    monkeypatch.setattr(_linearization, "grad", refuse)
    args = find("mlp-tanh-ce").build()
    A, plain = GGNLinearOperator(*args), GGNLinearOperator(*args, cache="off")
    A.risk.model.by_datum = False
    for _ in range(4):
        v = torch.randn(A.shape[1], dtype=torch.float64)
        assert_close(A @ v, plain @ v)
    assert not A.risk._dense.jacobians


# -- CUDA graphs --------------------------------------------------------------------

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def test_programs_on_the_cpu_are_not_captured():
    route, v = Route(), [torch.ones(3)]
    for _ in range(4):
        route.multiply(lambda vs: [2 * vs[0]], v, False)
    assert route.trusted
    assert not route.captured


@pytest.mark.cuda
@needs_gpu
def test_captured_products_equal_plain_ones():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 3, 3), nn.Flatten(), nn.Tanh(), nn.Linear(108, 2))
    net = net.double().cuda()
    data = [
        (torch.rand(n, 1, 8, 8).double().cuda(), torch.randint(2, (n,)).cuda())
        for n in (4, 3)
    ]
    args = net, nn.CrossEntropyLoss(), list(net.parameters()), data
    for operator in OPERATORS:
        A, plain = operator(*args, policy=SOON), operator(*args, cache="off")
        for _ in range(12):
            v = torch.randn(A.shape[1], dtype=torch.float64).cuda()
            first = A @ v
            assert_close(first, plain @ v, size=16 * len(v))
            again = A @ (2 * v)  # results are memory that nobody else holds
            assert_close(again, 2 * first, size=16 * len(v))
        assert all(route.captured for route in routes(A))
        with torch.cuda.stream(torch.cuda.Stream()):
            other = A @ v
        torch.cuda.synchronize()
        assert_close(other, first, size=16 * len(v))


# -- forward mode -------------------------------------------------------------------


class Stop(nn.Module):
    """Hides part of its work from reverse mode, but not from forward mode."""

    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, X):
        with torch.no_grad():
            scale = self.inner.weight.pow(2).sum()
        return self.outer(self.inner(X).tanh()) * scale


@pytest.mark.parametrize("cache", ["auto", "off"])
def test_forward_mode_is_dropped_where_it_differs(cache):
    model = Stop().double()
    data = [(torch.rand(4, 3).double(), torch.tensor([0, 1, 1, 0]))]
    params = dict(model.named_parameters())
    A = GGNLinearOperator(model, nn.CrossEntropyLoss(), params, data, cache=cache)
    dense = references.ggn(model, nn.CrossEntropyLoss(), params, data)
    v = torch.randn(A.shape[1], dtype=torch.float64)
    assert_close(A @ v, dense @ v)
    assert A.risk.model.forward_mode == (cache == "auto")  # needed without a graph
    assert_close(A @ v, dense @ v)


class Scripted(nn.Module):
    """Uses parameters where no mode of Python sees them."""

    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, X):
        return self.outer(self.inner(X).tanh())


@pytest.mark.parametrize("whole", [True, False])
def test_forward_mode_is_blind_in_scripts(whole):
    plain = Scripted().double()
    model = copy.deepcopy(plain)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"`torch\.jit\.script")
        if whole:
            model = torch.jit.script(model)
        else:
            model.inner = torch.jit.script(model.inner)
    data = [(torch.rand(4, 3).double(), torch.tensor([0, 1, 1, 0]))]
    params = dict(plain.named_parameters())
    dense = references.ggn(plain, nn.CrossEntropyLoss(), params, data)
    params = dict(model.named_parameters())
    A = GGNLinearOperator(model, nn.CrossEntropyLoss(), params, data)
    for unit in torch.eye(A.shape[1], dtype=torch.float64)[:2]:
        assert_close(A @ unit, dense @ unit)


class Fussy(nn.Linear):
    """Insists on a graph."""

    def forward(self, X):
        Y = super().forward(X)
        assert Y.grad_fn is not None
        return Y


class Memo(nn.Linear):
    """Keeps what it has computed from its parameters, with its graph."""

    scale = None

    def forward(self, X):
        if self.scale is None:
            self.scale = self.weight.tanh().sum()
        return self.scale * super().forward(X)


@pytest.mark.parametrize("kind", [Fussy, Memo])
@pytest.mark.parametrize("operator", OPERATORS)
def test_models_that_need_their_graphs(kind, operator):
    model = kind(3, 2).double()
    args = [torch.rand(4, 3).double(), torch.tensor([0, 1, 1, 0])]
    problem = nn.CrossEntropyLoss(), dict(model.named_parameters()), [tuple(args)]
    A = operator(model, *problem, cache="off")
    dense = operator(model, *problem).to_dense()
    for _ in range(3):
        v = torch.randn(8, dtype=torch.float64)
        assert_close(A @ v, dense @ v)


class Uncopied(nn.Sequential):
    def __deepcopy__(self, memo):
        raise TypeError


@IN_PLACE
def test_kept_jacobians_of_a_module_in_place_need_its_parameters():
    model = Uncopied(nn.Linear(6, 15), nn.Tanh(), nn.Linear(15, 3)).double()
    params = {n: 3 * p.detach() for n, p in model.named_parameters()}
    data = [(torch.rand(4, 6).double(), torch.tensor([0, 1, 2, 0]))]
    shared = risk.EmpiricalRisk(model, nn.CrossEntropyLoss(), params, data)
    G, H = GGNLinearOperator(shared), HessianLinearOperator(shared)
    copied = nn.Sequential(nn.Linear(6, 15), nn.Tanh(), nn.Linear(15, 3)).double()
    dense = references.ggn(copied, nn.CrossEntropyLoss(), params, data)
    V = torch.randn(G.shape[1], 8, dtype=torch.float64)
    for A in (G, G, H, H, G, H, G):
        result = A @ V
        if A is G:
            assert_close(result, dense @ V)


def test_forward_mode_serves_where_no_graph_is_kept():
    args = find("mlp-tanh-ce").build()
    A = GGNLinearOperator(*args, cache="off")
    with unittest.mock.patch.object(
        type(A.risk.model), "directional", autospec=True, side_effect=directional
    ) as spy:
        A @ torch.ones(A.shape[1], dtype=torch.float64)
        first = spy.call_count  # compared with reverse mode
        assert first >= 2 * len(args[3])
        A @ torch.ones(A.shape[1], dtype=torch.float64)
        assert spy.call_count == first + len(args[3])
    assert A.risk.model.forward_mode


def test_forward_mode_in_use_elsewhere_is_left_alone():
    args = find("mlp-tanh-ce").build()
    A, plain = GGNLinearOperator(*args), HessianLinearOperator(*args)
    v = torch.ones(A.shape[1], dtype=torch.float64)
    expected = A.to_dense() @ v
    A = GGNLinearOperator(*args, cache="off")
    with torch.autograd.forward_ad.dual_level():
        assert_close(A @ v, expected)
    assert A.risk.model.forward_mode
    assert plain.risk.model.forward_mode


# -- caches off ---------------------------------------------------------------------


def test_nothing_is_materialised_without_cache():
    model, loss, params, data = find("mlp-tanh-ce").build()
    A = GGNLinearOperator(model, loss, params, data, cache="off")
    for _ in range(2 * A.shape[1]):
        A @ torch.ones(A.shape[1], dtype=torch.float64)
    assert not A.status().matrix
    assert set(A.status().batches) == {"recomputed"}


def test_scalar_outputs_are_multiplied_repeatedly():
    class Total(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 1)

        def forward(self, X):
            return self.layer(X).sum()

    data = [(torch.rand(4, 3).double(), torch.zeros(()).double())]
    net = Total().double()
    args = net, nn.MSELoss(reduction="sum"), list(net.parameters()), data
    A = GGNLinearOperator(*args, check_deterministic=False)
    plain = GGNLinearOperator(*args, check_deterministic=False, cache="off")
    v = torch.randn(A.shape[1], dtype=torch.float64)
    for _ in range(12):
        assert_close(A @ v, plain @ v)


class Tangent(nn.Module):
    """A model that differentiates in forward mode, whose zeros have no memory."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 1)).double()

    def forward(self, X):
        def slope(x):
            gradient = torch.func.grad(lambda z: self.net(z).squeeze(-1))
            return torch.func.jacfwd(gradient)(x).diagonal().sum()

        return torch.func.vmap(slope)(X).unsqueeze(1) + self.net(X)


@pytest.mark.filterwarnings("ignore:`torch.jit.script")  # torch's, on first use
def test_zeros_without_memory_are_recorded():
    torch.manual_seed(0)
    model, loss = Tangent(), nn.MSELoss()
    data = [(torch.rand(n, 2).double(), torch.rand(n, 1).double()) for n in (3, 4)]
    params = dict(model.named_parameters())
    A = HessianLinearOperator(model, loss, params, data)
    dense = references.central_differences_hessian(model, loss, params, data)
    assert A.plan().peak > 0
    for _ in range(12):
        assert torch.allclose(A @ torch.eye(len(dense)).double(), dense, atol=1e-6)
