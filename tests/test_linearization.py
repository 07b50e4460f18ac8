"""One batch's products against autograd, and what they keep in memory."""

import pytest
import torch

from cases import find
from curvlinops import (
    GGNLinearOperator,
    HessianLinearOperator,
    _linearization,
    risk,
)
from curvlinops._linearization import (
    Linearization,
    budget_bytes,
    free_memory,
    graph_bytes,
)
from curvlinops._model import Model
from curvlinops.losses import as_loss_function
from tolerances import assert_close


@pytest.fixture
def batch():
    module, loss_func, params, data = find("mlp-tanh-ce").build()
    model = Model(module, params)
    X, y = data[0]
    loss = as_loss_function(loss_func)
    return model.run(lambda: Linearization(model, X, y, loss))


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


def test_budget():
    cpu = torch.device("cpu")
    assert budget_bytes("off", cpu) == 0
    assert budget_bytes(123, cpu) == 123
    free = free_memory(cpu)
    assert 0 < budget_bytes("auto", cpu) < free * 1.01
    for wrong in ("all", -1, 1.5, None, True):
        with pytest.raises(ValueError, match="cache"):
            budget_bytes(wrong, cpu)


def test_free_memory_without_proc(monkeypatch):
    def nothing(*_):
        raise OSError

    monkeypatch.setattr("builtins.open", nothing)
    assert _linearization.free_memory(torch.device("cpu")) > 0


@pytest.mark.parametrize("operator", [GGNLinearOperator, HessianLinearOperator])
def test_recordings_stay_within_the_budget(operator, monkeypatch):
    monkeypatch.setattr(risk, "MAX_DENSE_DIM", 0)
    problem = find("mlp-tanh-ce").build()
    A = operator(*problem)
    v = torch.ones(A.shape[1], dtype=torch.float64)
    expected = [A @ v for _ in range(5)][-1]
    sizes = [nbytes for _, nbytes in A.risk._bytes.values()]
    assert len(sizes) == len(problem[3]) > 1
    for budget in (0, sizes[0] - 1, 4 * sizes[0], 10 * sum(sizes)):
        B = operator(*problem, cache=budget)
        for _ in range(5):
            assert_close(B @ v, expected, size=200)
            assert sum(n for _, n in B.risk._bytes.values()) <= budget
        assert len(B.risk._recordings) <= len(sizes)
    assert len(B.risk._recordings) == len(sizes)
