"""Free memory, and what happens when it runs out in the midst of optional work."""

import copy
import os
import pickle

import numpy as np
import pytest
import torch
from torch import nn

from curvlinops import (
    EKFACLinearOperator,
    GGNDiagonalLinearOperator,
    GGNLinearOperator,
    HessianLinearOperator,
    KFACLinearOperator,
    _joining,
    _linearization,
    _memory,
    _model,
    _parts,
    _replay,
    kronecker,
    losses,
)
from curvlinops._memory import (
    budget_bytes,
    checked_cache,
    free_memory,
    raise_if_out_of_memory,
)
from curvlinops.kfac import _estimation, _layers, _trial
from tolerances import assert_close


def test_budget():
    cpu = torch.device("cpu")
    assert budget_bytes("off", cpu) == 0
    assert budget_bytes(123, cpu) == 123
    free = free_memory(cpu)
    assert 0 < budget_bytes("auto", cpu) < free * 1.01
    for wrong in ("all", -1, 1.5, None, True):
        with pytest.raises(ValueError, match="cache"):
            checked_cache(wrong)


def test_free_memory_without_proc(monkeypatch):
    def nothing(*_):
        raise OSError

    monkeypatch.setattr("builtins.open", nothing)
    assert _memory.free_memory(torch.device("cpu")) > 0
    monkeypatch.delattr(os, "sysconf")  # as on Windows
    assert _memory.free_memory(torch.device("cpu")) > 0


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        MemoryError(),
        np._core._exceptions._ArrayMemoryError((1,), np.dtype(float)),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to ..."),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("unable to mmap 4096 bytes: Cannot allocate memory (12)"),
        RuntimeError("MPS backend out of memory (MPS allocated: 9.04 GB)"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublas...`"),
    ],
)
def test_out_of_memory_is_recognised(error):
    with pytest.raises(type(error)) as caught:
        raise_if_out_of_memory(error)
    assert caught.value is error
    assert "max_memory" in error.__notes__[0]
    wrapped = ValueError("The model failed.")
    wrapped.__cause__ = error
    with pytest.raises(ValueError, match="failed"):
        raise_if_out_of_memory(wrapped)


def test_an_error_of_the_models_own_does_not_hide_it():
    def model(hides):
        try:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        except RuntimeError:
            if hides:
                raise ValueError("the model failed") from None
            raise ValueError("the model failed")  # noqa: B904

    with pytest.raises(ValueError, match="failed") as caught:
        model(hides=False)
    with pytest.raises(ValueError, match="failed"):
        raise_if_out_of_memory(caught.value)
    with pytest.raises(ValueError, match="failed") as caught:
        model(hides=True)
    raise_if_out_of_memory(caught.value)


def test_a_real_allocation_that_fails():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60)
    with pytest.raises(RuntimeError, match="allocate"):
        raise_if_out_of_memory(caught.value)


@pytest.mark.parametrize(
    "error", [RuntimeError("an operation cannot be vectorised"), ValueError("memory")]
)
def test_other_errors_are_not(error):
    raise_if_out_of_memory(error)


# ------------------------------------------------------------------ optional roads


def problem(sizes=(6, 5), width=7):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 3)).double()
    data = [(torch.randn(n, 4).double(), torch.randint(3, (n,))) for n in sizes]
    return model, nn.CrossEntropyLoss(), dict(model.named_parameters()), data


class RunsOut:
    """A function that runs out of memory in its first call with a true condition."""

    def __init__(self, function, condition=lambda *args, **options: True):
        self.function, self.condition = function, condition
        self.failed, self.calls = 0, 0

    def __call__(self, *args, **options):
        if self.condition(*args, **options):
            self.calls += 1
            if self.calls == 1:
                self.failed += 1
                raise torch.OutOfMemoryError("CUDA out of memory.")
        return self.function(*args, **options)

    def __get__(self, instance, owner):
        if instance is None:
            return self
        return lambda *args, **options: self(instance, *args, **options)


def several(batch, U):
    return U.ndim > len(batch.output_space.shapes[0])


def wide_problem():
    """Return a problem that is too large to become a matrix."""
    return problem(width=700)


def hessian(**options):
    return HessianLinearOperator(*problem(), **options)


def ggn(**options):
    return GGNLinearOperator(*problem(), **options)


def uncached_ggn(**_):
    return ggn(cache="off")


def hooked_ggn(**options):
    model, *others = problem()
    model[0].register_forward_hook(lambda *_: None)
    return GGNLinearOperator(model, *others, **options)


def wide_ggn(**options):
    return GGNLinearOperator(*wide_problem(), **options)


def wide_sampled(**options):
    return GGNLinearOperator(*wide_problem(), mc_samples=1, **options)


def opaque(**options):
    model, _, params, data = problem()
    loss = LogCosh()
    return GGNLinearOperator(model, loss, params, data, **options)


class LogCosh(nn.Module):
    reduction = "sum"

    def forward(self, f, y):
        return (f - y.unsqueeze(1)).cosh().log().sum()


def diagonal(**options):
    return GGNDiagonalLinearOperator(*problem(), **options)


def kfac(**options):
    return KFACLinearOperator(*problem(), fisher_type="type-2", **options)


def ekfac(**options):
    return EKFACLinearOperator(*problem(), fisher_type="type-2", **options)


ROADS = {
    "forward mode": (uncached_ggn, _model.Model, "directional", None),
    "recording": (wide_ggn, _replay, "record", None),
    "several replayed at once": (wide_ggn, _replay.Program, "vectorised", None),
    "columns at once": (
        wide_ggn,
        _linearization.Linearization,
        "vjp",
        several,
    ),
    "sensitivities": (wide_sampled, _linearization, "fold", None),
    "joined batches": (hessian, _joining, "Linearization", None),
    "Jacobians by datum": (ggn, _parts, "vmap", None),
    "Jacobians": (hooked_ggn, _linearization.Linearization, "vjp", several),
    "loss of several vectors": (
        opaque,
        losses.Generic,
        "_hessian_mul",
        lambda loss, U: U.ndim > loss.output.ndim,
    ),
    "one datum at a time": (diagonal, _parts, "_part", None),
    "several vectors to layers": (kfac, _estimation.Batch, "send_together", None),
    "a layer's first datum": (kfac, _trial, "cut", None),
    "eigendecomposition": (ekfac, kronecker.torch.linalg, "eigh", None),
}


@pytest.mark.parametrize("road", ROADS)
def test_lack_of_memory_surfaces_and_gives_no_road_up(monkeypatch, road):
    make, owner, name, condition = ROADS[road]
    A, reference = make(), make(cache="off")
    columns = road in (
        "several replayed at once",
        "columns at once",
        "loss of several vectors",
    )
    x = torch.randn(A.shape[1], 8 if columns else 1).double()
    expected = reference @ x
    runs_out = RunsOut(getattr(owner, name), *filter(None, [condition]))
    monkeypatch.setattr(owner, name, runs_out)
    monkeypatch.setattr(_layers, "LEAST_TOGETHER", 2)
    raised = 0
    for _ in range(24):
        try:
            product = A @ x
        except torch.OutOfMemoryError as error:
            assert all("max_memory" in note for note in getattr(error, "__notes__", ()))
            raised += 1
        else:
            assert_close(product, expected)
    assert raised == runs_out.failed == 1
    assert runs_out.calls > 1, "the road is not tried again"


def test_lack_of_memory_in_the_model_is_no_mistake_in_the_data():
    model, loss, params, data = problem()
    model[1].forward = RunsOut(model[1].forward)
    with pytest.raises(torch.OutOfMemoryError):
        GGNLinearOperator(lambda p, X: model(X), loss, params, data)


def test_lack_of_memory_while_copying_the_model_is_raised(monkeypatch):
    monkeypatch.setattr(_model, "private_copy", RunsOut(_model.private_copy))
    with pytest.raises(torch.OutOfMemoryError):
        ggn()
    assert ggn().risk.model._held is None


def test_lack_of_memory_in_verify_is_no_failed_check(monkeypatch):
    A = ggn()
    runs_out = RunsOut(GGNLinearOperator._apply)
    monkeypatch.setattr(GGNLinearOperator, "_apply", runs_out)
    with pytest.raises(torch.OutOfMemoryError):
        A.verify()
    assert A.verify().ok


def test_lack_of_memory_while_pickling_names_no_culprit():
    class Loss(nn.CrossEntropyLoss):
        def __getstate__(self):
            raise MemoryError

    model, _, params, data = problem()
    A = GGNLinearOperator(model, Loss(), params, data, check_deterministic=False)
    with pytest.raises(MemoryError):
        pickle.dumps(A)


def test_kfac_keeps_inputs_within_what_recordings_have_left():
    _, _, _, data = parts = problem()
    A = GGNLinearOperator(*parts, cache=10_000)
    A @ np.ones(A.shape[1])
    A @ np.ones(A.shape[1])
    risk = A.risk
    assert 0 <= risk.room() < 10_000
    K = KFACLinearOperator(risk)
    assert_close(K.to_dense(), KFACLinearOperator(*parts, cache="off").to_dense())
    assert risk.room() < 10_000
    assert len(data) == 2
    assert copy.copy(risk).room() == 10_000
