"""The content of tensors as a few numbers, which differ if the content does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from itertools import groupby
from math import isfinite

import numpy as np
import torch
from torch import Tensor

from curvlinops._cuda_graph import CudaGraph
from curvlinops._data import strided

_BLOCK = 1 << 16
#: Tensors with fewer entries are projected together.
_SMALL = 1 << 12


class Checksum:
    """Projects the content of tensors, whenever called, on a fixed random vector.

    Small tensors in the CPU's memory are projected together, each to its own number: a
    change of one must not be lost beside the values of another.

    Parameters
    ----------
    tensors : sequence of Tensor
        The tensors, whose shape, dtype and place in memory stay as they are.

    Notes
    -----
    Not to be called by several threads at once.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        with torch.no_grad():
            alias = [t.detach() for t in strided(tensors)]
        small = [t for t in alias if 0 < t.numel() < _SMALL and _suits_numpy(t)]
        # Views where flattening gives one; copied at every call where it does not.
        self._small = [
            t.numpy().reshape(-1) if t.is_contiguous() else t.numpy() for t in small
        ]
        *starts, total = np.cumsum([0, *(t.numel() for t in small)]).tolist()
        self._starts, self._buffer = starts, np.empty(total)
        self._weights = _random_weights(total)
        known = set(map(id, small))
        large = sorted((t for t in alias if id(t) not in known), key=_device_of)
        self._others = [_Others([*ts]) for _, ts in groupby(large, key=_device_of)]

    def __call__(self) -> tuple[float, ...]:
        """Return a number per tensor, the small ones first."""
        values: list[float] = []
        if self._small:
            parts = [x if x.ndim == 1 else x.reshape(-1) for x in self._small]
            buffer = self._buffer
            np.concatenate(parts, out=buffer, casting="unsafe")
            values = self._projections(buffer)
            if not all(map(isfinite, values)):  # an attention mask of -inf, say
                finite = np.nan_to_num(buffer, nan=3.0, posinf=5.0, neginf=7.0)
                values = self._projections(finite)
        if self._others:
            with torch.no_grad():
                for others in self._others:
                    values += others()
        return tuple(values)

    def _projections(self, buffer: np.ndarray) -> list[float]:
        with np.errstate(invalid="ignore", over="ignore"):
            return np.add.reduceat(buffer * self._weights, self._starts).tolist()


def _suits_numpy(tensor: Tensor) -> bool:
    supported = tensor.dtype not in (torch.bfloat16, torch.float16)
    return tensor.device.type == "cpu" and supported and not tensor.is_complex()


def _device_of(tensor: Tensor) -> tuple[str, int]:
    return tensor.device.type, tensor.device.index or 0


class _Others:
    """The tensors on one device that are not projected by NumPy.

    On a GPU, small ones go together, too, and all is launched at once from the third
    call on.
    """

    def __init__(self, tensors: list[Tensor]) -> None:
        self._device = tensors[0].device
        together = [t for t in tensors if t.is_cuda and 0 < t.numel() < _SMALL]
        together.sort(key=lambda t: str(t.dtype))
        known = set(map(id, together))
        alone = [t for t in tensors if id(t) not in known]
        self._tensors = [*together, *alone]
        groups = [[*ts] for _, ts in groupby(together, key=lambda t: t.dtype)]
        self._projections: list[Callable[[], Tensor]] = [*map(_together, groups)]
        self._projections += [partial(_projection, t) for t in alone]
        self._calls = 0
        self._graph: CudaGraph | None = None

    def __call__(self) -> list[float]:
        """Return a number per tensor."""
        values = self._values()
        for i, t in enumerate(self._tensors):
            if not isfinite(values[i]):
                replaced = torch.nan_to_num(t.double(), 3.0, 5.0, 7.0)
                values[i] = float(_projection(replaced))
        return values

    def _values(self) -> list[float]:
        self._calls += 1
        if self._calls == 3 and self._device.type == "cuda":
            self._graph = CudaGraph(lambda: [self._stacked()], self._device)
        if self._graph is None or not self._graph.usable:
            return self._stacked().tolist()
        with self._graph.lock:
            self._graph.launch()
            return self._graph.results[0].tolist()

    def _stacked(self) -> Tensor:
        numbers = [project().double() for project in self._projections]
        return torch.cat([n.reshape(-1) for n in numbers])


def _together(tensors: Sequence[Tensor]) -> Callable[[], Tensor]:
    """Return what projects small tensors of one dtype, each to its own number."""
    sizes = torch.tensor([_real(t).numel() for t in tensors])
    device = tensors[0].device
    generator = torch.Generator().manual_seed(20260101)
    total = int(sizes.sum())
    weights = torch.randn(total, dtype=torch.float64, generator=generator).to(device)
    lengths = sizes.to(device)

    def project() -> Tensor:
        flat = torch.cat([_real(t).reshape(-1) for t in tensors]).double()
        return torch.segment_reduce(flat * weights, "sum", lengths=lengths, unsafe=True)

    return project


def _real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def _projection(tensor: Tensor) -> Tensor:
    if tensor.dtype not in (torch.float32, torch.float64):
        wide = torch.float64 if not tensor.is_floating_point() else torch.float32
        tensor = _real(tensor).to(wide)
    flat = tensor.reshape(-1)
    vector = _random_vector(flat.dtype, flat.device)
    if (size := flat.numel()) <= _BLOCK:
        return torch.dot(flat, vector[:size])
    whole = size // _BLOCK * _BLOCK
    rest = torch.dot(flat[whole:], vector[: size - whole])
    rows = flat[:whole].view(-1, _BLOCK) @ vector
    return rest + torch.dot(rows, vector[: len(rows)])


@lru_cache(maxsize=8)
def _random_weights(size: int) -> np.ndarray:
    return np.random.default_rng(20260101).standard_normal(size)


_RANDOM: dict[tuple[torch.dtype, torch.device], Tensor] = {}


def _random_vector(dtype: torch.dtype, device: torch.device) -> Tensor:
    if (dtype, device) not in _RANDOM:
        generator = torch.Generator().manual_seed(20260101)
        vector = torch.randn(_BLOCK, dtype=torch.float64, generator=generator)
        _RANDOM[dtype, device] = vector.to(device, dtype)
    return _RANDOM[dtype, device]
