"""The content of tensors as a few numbers, which differ if the content does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import groupby
from math import isfinite

import torch
from torch import Tensor

from curvlinops._cuda_graph import CudaGraph
from curvlinops._data import strided

#: Single precision must not lose one of so many entries in their projection.
_ROW = 1 << 10
#: Tensors with fewer entries are hashed, or projected together.
_SMALL = 1 << 12
#: The largest prime that double precision holds with all whole numbers below it.
_PRIME = (1 << 53) - 111
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Checksum:
    """Returns numbers, whenever called, which differ if the content of tensors does.

    Small tensors in the CPU's memory are hashed. Others are projected on a fixed random
    vector, and their bits are added up as whole numbers: however small a change of one
    entry is, it changes that sum, and changes of several that cancel in it do not
    cancel in the projection.

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
        small = [t for t in alias if t.numel() < _SMALL and _suits_numpy(t)]
        self._small = [_integers(_real(t)).numpy() for t in small]
        known = set(map(id, small))
        others = sorted((t for t in alias if id(t) not in known), key=_device_of)
        self._others = [_Others([*ts]) for _, ts in groupby(others, key=_device_of)]

    def __call__(self) -> tuple[float, ...]:
        """Return the numbers."""
        values: list[float] = [hash(b"".join([x.tobytes() for x in self._small]))]
        if self._others:
            with torch.no_grad():
                for others in self._others:
                    values += others()
        return tuple(values)


def _suits_numpy(tensor: Tensor) -> bool:
    lazy = tensor.is_conj() or tensor.is_neg()
    return tensor.device.type == "cpu" and not lazy


def _device_of(tensor: Tensor) -> tuple[str, int]:
    return tensor.device.type, tensor.device.index or 0


class _Others:
    """The tensors on one device that are not hashed.

    On a GPU, small ones are worked on together, and all is launched at once from the
    third call on.
    """

    def __init__(self, tensors: list[Tensor]) -> None:
        self._device = tensors[0].device
        together = [t for t in tensors if t.is_cuda and 0 < t.numel() < _SMALL]
        together.sort(key=lambda t: str(t.dtype))
        known = set(map(id, together))
        alone = [t for t in tensors if id(t) not in known]
        groups = [[*ts] for _, ts in groupby(together, key=lambda t: t.dtype)]
        self._numbers: list[Callable[[], Tensor]] = [*map(_together, groups)]
        self._numbers += [partial(_projection_and_bits, t) for t in alone]
        #: The tensors, with the places of their projections among the numbers.
        self._places, start = [], 0
        for group in groups:
            self._places += [(start + i, t) for i, t in enumerate(group)]
            start += 2 * len(group)
        self._places += [(start + 2 * i, t) for i, t in enumerate(alone)]
        self._calls = 0
        self._graph: CudaGraph | None = None

    def __call__(self) -> list[float]:
        """Return two numbers per tensor."""
        values = self._values()
        for i, t in self._places:
            if not isfinite(values[i]):
                replaced = torch.nan_to_num(_flat(t).double(), 3.0, 5.0, 7.0)
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
        return torch.cat([numbers() for numbers in self._numbers])


def _together(tensors: Sequence[Tensor]) -> Callable[[], Tensor]:
    """Return what gives the projections of small tensors of one dtype, and their bits.

    The bits of all tensors up to each are added up.
    """
    sizes = torch.tensor([_flat(t).numel() for t in tensors])
    device = tensors[0].device
    generator = torch.Generator().manual_seed(20260101)
    total = int(sizes.sum())
    weights = torch.randn(total, dtype=torch.float64, generator=generator).to(device)
    lengths, ends = sizes.to(device), (sizes.cumsum(0) - 1).to(device)

    def numbers() -> Tensor:
        flat = torch.cat([*map(_flat, tensors)])
        products = flat.double() * weights
        rows = torch.segment_reduce(products, "sum", lengths=lengths, unsafe=True)
        bits = _integers(flat).long().cumsum(0)[ends].remainder(_PRIME)
        return torch.cat([rows, bits.double()])

    return numbers


def _real(tensor: Tensor) -> Tensor:
    tensor = tensor.resolve_conj().resolve_neg()
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def _flat(tensor: Tensor) -> Tensor:
    return _real(tensor).reshape(-1).contiguous()


def _projection_and_bits(tensor: Tensor) -> Tensor:
    flat = _flat(tensor)
    return torch.stack([_projection(flat).double(), _bits(flat).double()])


def _projection(flat: Tensor) -> Tensor:
    if flat.dtype not in (torch.float32, torch.float64):
        flat = flat.to(torch.float32 if flat.is_floating_point() else torch.float64)
    vector = _random_vector(flat.dtype, flat.device)
    if (size := flat.numel()) <= _ROW:
        return torch.dot(flat, vector[:size])
    whole = size // _ROW * _ROW
    rest = torch.dot(flat[whole:], vector[: size - whole])
    rows = flat[:whole].view(-1, _ROW) @ vector
    return rest + _projection(rows.double())


def _integers(tensor: Tensor) -> Tensor:
    """Return the bits of a tensor that is not complex."""
    return tensor.view(_INTEGERS[tensor.element_size()])


def _bits(flat: Tensor) -> Tensor:
    """Return the sum of a tensor's memory, read as whole numbers of eight bytes."""
    integers = _integers(flat)
    number = 8 // flat.element_size()
    first = min(-flat.storage_offset() % number, flat.numel())
    last = flat.numel() - (flat.numel() - first) % number
    total = integers[first:last].view(torch.int64).sum()
    for end in (integers[:first], integers[last:]):
        if len(end):
            total = total + end.sum()
    return total.remainder(_PRIME)


_RANDOM: dict[tuple[torch.dtype, torch.device], Tensor] = {}


def _random_vector(dtype: torch.dtype, device: torch.device) -> Tensor:
    if (dtype, device) not in _RANDOM:
        generator = torch.Generator().manual_seed(20260101)
        vector = torch.randn(_ROW, dtype=torch.float64, generator=generator)
        _RANDOM[dtype, device] = vector.to(device, dtype)
    return _RANDOM[dtype, device]
