"""What is particular to GPUs: the border, captured operations, what they hold.

That every law holds there is checked in ``test_laws.py``.
"""

import gc
import pickle
import threading

import numpy as np
import pytest
import torch
from torch import nn

from curvlinops import (
    EmpiricalRisk,
    GGNLinearOperator,
    HessianLinearOperator,
    JacobianLinearOperator,
    hutchinson_trace,
)
from curvlinops._checksum import Checksum
from curvlinops._cuda_graph import CapturedProgram, captured
from curvlinops._policy import Policy
from curvlinops._spaces import TensorSpace, rounding, to_numpy, to_torch
from tolerances import assert_close

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]

CUDA = torch.device("cuda")


def network(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Conv2d(1, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(108, 3)
    return nn.Sequential(*layers).to(CUDA, dtype)


#: Never materialise matrices.
NEVER = Policy(dense_dim=0)


def routes(A) -> list:
    kept = A.risk._recordings.values()
    return [route for batch in kept for route in batch._routes.values()]


def batches(dtype: torch.dtype = torch.float64, device: torch.device = CUDA) -> list:
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.rand(n, 1, 8, 8, generator=generator).to(device, dtype),
            torch.randint(3, (n,), generator=generator).to(device),
        )
        for n in (5, 4, 5)
    ]


def ggn(model: nn.Module | None = None, data: list | None = None, **options):
    model = network() if model is None else model
    params = dict(model.named_parameters())
    loss = nn.CrossEntropyLoss()
    options = {"policy": NEVER, **options}
    return GGNLinearOperator(model, loss, params, data or batches(), **options)


# -- the border ---------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(5,), (3_000_001,), (2_000_003, 2), (7, 0), (0, 3)])
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("dtype", ["float32", "float64", "int64"])
def test_arrays_cross_to_the_gpu_and_back(shape: tuple, order: str, dtype: str):
    array = np.random.default_rng(0).integers(-99, 99, shape).astype(dtype)
    array = np.asarray(array, order=order)
    for torch_dtype in (torch.float64, torch.float32):
        space = TensorSpace([shape], torch_dtype, CUDA)
        for given in (array, array[::-1]):
            tensor = to_torch(given, space)
            assert tensor.is_cuda and tensor.dtype == torch_dtype
            back = to_numpy(tensor)
            assert back.dtype == space.numpy_dtype
            assert np.array_equal(back, given)
            if tensor.ndim == 2:
                assert np.array_equal(to_numpy(tensor.T), given.T)


def test_results_stay_while_many_others_cross():
    A = ggn()
    x = np.random.default_rng(0).standard_normal((A.shape[1], 20))
    results = [A @ column for column in x.T]
    assert_close(np.stack(results, axis=1), A @ x, size=4 * len(x))


def test_operands_on_either_side():
    A = ggn()
    v = torch.randn(A.shape[1], dtype=torch.float64)
    assert (A @ v).device.type == "cpu"
    assert (A @ v.to(CUDA)).is_cuda
    assert_close(A @ v, A @ v.numpy())
    assert hutchinson_trace(A, 5).is_cuda
    assert A.to_dense().is_cuda


def test_data_on_the_cpu_arrive_in_order(monkeypatch):
    on_gpu, on_cpu = ggn(), ggn(data=batches(device=torch.device("cpu")), cache="off")
    v = torch.randn(on_gpu.shape[1], dtype=torch.float64)
    for _ in range(3):
        assert_close(on_cpu @ v, on_gpu @ v)
    J = JacobianLinearOperator(
        network(),
        None or dict(network().named_parameters()),
        batches(device=torch.device("cpu")),
    )
    assert J.shape[0] == 3 * 14


# -- captured operations ------------------------------------------------------------


def test_what_waits_for_the_gpu_is_replayed_without_a_graph():
    model = Masked().to(CUDA, torch.float64)
    A, plain = ggn(model), ggn(model, cache="off")
    v = torch.randn(A.shape[1], dtype=torch.float64, device=CUDA)
    for _ in range(12):
        assert_close(A @ v, plain @ v, size=4 * len(v))
    for route in routes(A):
        assert route.trusted and not route.captured
    torch.rand(3, device=CUDA)  # a failed capture would break this


def test_a_capture_that_fails_leaves_everything_working():
    def waits(vectors):
        return [vectors[0] * float(vectors[0].sum())]

    v = torch.rand(100, device=CUDA)
    assert captured(waits, [v]) is None
    torch.cuda.synchronize()
    w = torch.rand(100, device=CUDA)
    torch.cuda.empty_cache()
    twice = captured(lambda vectors: [2 * vectors[0]], [v])
    assert twice is not None
    torch.testing.assert_close(twice([w])[0], 2 * w)


@pytest.mark.parametrize("tokens", [500, 5000])
def test_embeddings_are_captured(tokens: int):
    torch.manual_seed(0)
    layers = nn.Embedding(50, 4), nn.Flatten(), nn.Linear(40, 3)
    net = nn.Sequential(*layers).to(CUDA, torch.float64)
    ids = torch.randint(50, (tokens // 10, 10), device=CUDA)
    y = torch.randint(3, (tokens // 10,), device=CUDA)
    A, plain = ggn(net, [(ids, y)]), ggn(net, [(ids, y)], cache="off")
    v = torch.randn(A.shape[1], dtype=torch.float64, device=CUDA)
    for _ in range(12):
        assert_close(A @ v, plain @ v, size=16 * len(v))
    assert all(route.captured for route in routes(A))


class Masked(nn.Module):
    """Selects entries by a mask: their number depends on values."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(64, 3)

    def forward(self, X):
        h = self.layer(X.flatten(1))
        mask = torch.zeros_like(h, dtype=torch.bool)
        mask[:, 1:] = True
        out = h.clone()
        out[mask] = h[mask].sin()
        return out


def test_graphs_share_their_memory():
    v = torch.rand(4 << 20, device=CUDA)  # 16 MiB

    def program(vectors):
        h = vectors[0]
        for _ in range(3):
            h = h.sin()
        return [h]

    graphs = [CapturedProgram(program, [v]) for _ in range(4)]
    own = [graph.nbytes - v.nbytes for graph in graphs]
    assert own[0] >= v.nbytes
    for scale, graph in zip((1, 2, 3, 4), graphs, strict=True):
        expected = (scale * v).sin().sin().sin()
        torch.testing.assert_close(graph([scale * v])[0], expected)
    # each needs its result, but not what it computes on the way
    assert sum(own[1:]) <= 3 * 2 * v.nbytes


def test_threads_share_captured_products():
    A, plain = ggn(), ggn(cache="off")
    V = torch.randn(A.shape[1], 8, dtype=torch.float64, device=CUDA)
    expected = torch.stack([plain @ v for v in V.T], dim=1)
    for _ in range(12):
        A @ V[:, 0]
    assert all(route.captured for route in routes(A))
    errors: list[BaseException] = []

    def work(k: int) -> None:
        try:
            for _ in range(20):
                assert_close(A @ V[:, k], expected[:, k], size=4 * len(V))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not errors


def test_kept_bytes_count_what_graphs_hold():
    A = ggn()
    v = torch.randn(A.shape[1], dtype=torch.float64, device=CUDA)
    for _ in range(12):
        A @ v
    for batch in A.risk._recordings.values():
        [route] = batch._routes.values()
        assert batch.nbytes >= route.captured[1].nbytes > 0


def test_blocks_of_columns_are_captured_by_their_width():
    A, plain = ggn(), ggn(cache="off")
    for width in (8, 5, 8, 8, 5, 5):
        V = torch.randn(A.shape[1], width, dtype=torch.float64, device=CUDA)
        result = A @ V
        assert_close(result, plain @ V, size=16 * len(V))
        again = A @ (2 * V)  # results are memory that nobody else holds
        assert_close(again, 2 * result, size=16 * len(V))
    assert all({1, 5, 8} == route.captured.keys() for route in routes(A))


# -- changes ------------------------------------------------------------------------


def test_changes_are_seen_after_the_look_is_captured():
    tensors = [
        torch.rand(3, device=CUDA),
        torch.randint(9, (50,), device=CUDA),
        torch.rand(300, 300, device=CUDA).T,
        torch.rand(70_001, device=CUDA, dtype=torch.float64),
        torch.tensor([True, False], device=CUDA),
        torch.tensor([0.0, -torch.inf], device=CUDA),
        torch.rand(40, device=CUDA).bfloat16(),
        torch.rand(4, device=CUDA, dtype=torch.complex64),
        torch.rand(20),
        torch.rand(5000),
    ]
    look = Checksum(tensors)
    first = look()
    for _ in range(5):
        assert look() == first
    assert any(others._graph for others in look._others)
    for t in tensors:
        before = look()
        entry = t.view(-1)[-1] if t.is_contiguous() else t[-1, -1]
        kept = entry.clone()
        entry.copy_(torch.zeros_like(entry) if kept else torch.ones_like(entry))
        assert look() != before
        entry.copy_(kept)
        assert look() == before


def test_products_are_never_stale():
    net = network()
    A = ggn(net)
    v = torch.randn(A.shape[1], dtype=torch.float64, device=CUDA)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for step in range(3):
        for _ in range(12):
            result = A @ v
        assert_close(result, ggn(net, cache="off") @ v, size=4 * len(v))
        if step == 0:
            net[0].weight.data.mul_(1.5)
        else:
            X, y = batches()[0]
            nn.functional.cross_entropy(net(X), y).backward()
            optimizer.step()


# -- precision ----------------------------------------------------------------------


def test_single_precision_with_and_without_tf32(tf32):
    A = ggn().to_dense().cpu()
    for allowed in (False, True):
        for backend in tf32:
            backend.allow_tf32 = allowed
        eps = rounding(torch.float32, CUDA, True)
        assert eps == (2**-10 if allowed else 2**-23)
        B = ggn(network(torch.float32), batches(torch.float32))
        v = torch.randn(B.shape[1], device=CUDA)
        for _ in range(12):
            result = B @ v
        assert all(route.captured for route in routes(B))
        expected = A @ v.double().cpu()
        error = (result.double().cpu() - expected).abs().max() / expected.abs().max()
        assert error < 100 * eps


# -- the user's things --------------------------------------------------------------


def test_random_state_is_left_alone():
    args = network(), nn.CrossEntropyLoss(), dict(network().named_parameters())
    torch.cuda.manual_seed(3)
    before = torch.cuda.get_rng_state()
    A = HessianLinearOperator(*args, batches())
    for _ in range(12):
        A @ np.ones(A.shape[1])
    assert torch.equal(torch.cuda.get_rng_state(), before)


def test_pickles_after_capture():
    A = ggn()
    v = torch.randn(A.shape[1], dtype=torch.float64, device=CUDA)
    for _ in range(12):
        expected = A @ v
    B = pickle.loads(pickle.dumps(A))
    assert B.device == A.device
    assert_close(B @ v, expected, size=4 * len(v))


def test_memory_is_given_back():
    def use() -> None:
        A = ggn()
        for _ in range(12):
            A @ np.ones(A.shape[1])

    use()
    gc.collect()
    before = torch.cuda.memory_allocated()
    for _ in range(3):
        use()
    gc.collect()
    assert torch.cuda.memory_allocated() <= before + 1024


def test_planned_peak_holds(monkeypatch):
    net = nn.Sequential(nn.Linear(400, 600), nn.Tanh(), nn.Linear(600, 10)).to(CUDA)
    generator = torch.Generator().manual_seed(1)
    data = [
        (
            torch.rand(n, 400, generator=generator).to(CUDA),
            torch.randint(10, (n,), generator=generator).to(CUDA),
        )
        for n in (4000, 3000)
    ]
    args = net, nn.CrossEntropyLoss(), dict(net.named_parameters()), data
    plan = GGNLinearOperator(*args, check_deterministic=False).plan()
    limit = plan.peak // 2
    A = GGNLinearOperator(*args, check_deterministic=False, max_memory=limit)
    v = torch.randn(A.shape[1], device=CUDA)
    expected = GGNLinearOperator(EmpiricalRisk(*args, cache="off")) @ v
    A @ v  # plans
    gc.collect()
    for _ in range(12):
        held = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        result = A @ v
        peak = torch.cuda.max_memory_allocated() - held
        # the allocator rounds, and cuBLAS takes a workspace
        assert peak <= limit + (40 << 20)
    assert_close(result, expected, size=4 * len(v))
