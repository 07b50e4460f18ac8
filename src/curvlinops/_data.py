"""The user's data: batches of nested tensors, read repeatedly and left as found."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache, partial
from itertools import pairwise
from math import isfinite
from threading import RLock
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor


def checked_data(data: Any) -> Iterable[Any]:
    """Return the data after checking that it can be read repeatedly."""
    if isinstance(data, Iterator):
        raise ValueError(
            f"`data` is a one-shot iterator ({type(data).__name__}): it would be empty "
            "in the second pass. Pass a list, or a `DataLoader`."
        )
    if not isinstance(data, Iterable) or torch.is_tensor(data):
        raise TypeError(
            "`data` must be an iterable of batches `(X, y)`, got "
            f"{type(data).__name__}."
        )
    if isinstance(data, (list, tuple)):
        if not data:
            raise ValueError("`data` is empty: pass at least one batch `(X, y)`.")
        for index, item in enumerate(data):
            checked_pair(item, index)
    return data


def checked_pair(item: Any, index: int) -> tuple[Any, Any]:
    """Return a batch as a pair."""
    if isinstance(item, (list, tuple)) and len(item) == 2:
        return item[0], item[1]
    raise ValueError(
        f"Every batch must be a pair `(X, y)`, but batch {index} is "
        f"{_described(item)}. Is `data` a single pair? Then pass `[(X, y)]`."
    )


def _described(item: Any) -> str:
    if torch.is_tensor(item):
        return f"a tensor of shape {tuple(item.shape)}"
    if isinstance(item, (list, tuple)):
        return f"a {type(item).__name__} of length {len(item)}"
    return f"of type {type(item).__name__}"


def length_of(data: Any) -> int | None:
    try:
        return len(data)
    except TypeError:
        return None


def mapped(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """Apply a function to every tensor in a nest of mappings and sequences.

    Containers in which nothing changes are returned as they are.
    """
    if torch.is_tensor(value):
        return function(value)
    if isinstance(value, Mapping):
        new = {k: mapped(function, v) for k, v in value.items()}
        if all(new[k] is v for k, v in value.items()):
            return value
        try:
            return type(value)(new)  # type: ignore[call-arg]
        except TypeError:  # a `defaultdict`, say
            return new
    if isinstance(value, (list, tuple)):
        items = [mapped(function, v) for v in value]
        if all(a is b for a, b in zip(items, value, strict=True)):
            return value
        is_named = hasattr(value, "_fields")
        return type(value)(*items) if is_named else type(value)(items)
    return value


def tensors_in(value: Any) -> list[Tensor]:
    """Return all tensors in a nest of mappings and sequences, in order."""
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    mapped(note, value)
    return found


def strided(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Return tensors with the sparse ones replaced by their indices and values."""
    found: list[Tensor] = []
    for t in tensors:
        if t.layout is torch.strided:
            found.append(t)
        elif t.layout is torch.sparse_coo:
            found += [t._indices(), t._values()]
        elif t.layout in (torch.sparse_csr, torch.sparse_bsr):
            found += [t.crow_indices(), t.col_indices(), t.values()]
        elif t.layout in (torch.sparse_csc, torch.sparse_bsc):
            found += [t.ccol_indices(), t.row_indices(), t.values()]
        else:
            found.append(t.to_dense())
    return found


def moved(value: Any, device: torch.device) -> Any:
    """Move the tensors in a nest to a device."""

    def move(tensor: Tensor) -> Tensor:
        # Inference tensors cannot be saved in graphs, their clones can.
        tensor = tensor.clone() if tensor.is_inference() else tensor
        return tensor.to(device, non_blocking=True)

    return mapped(move, value)


def cloned(value: Any) -> Any:
    return mapped(torch.clone, value)


def cut(value: Any, size: int, start: int, stop: int, several: bool = False) -> Any:
    """Take some data out of a batch: cut every tensor whose first axis is the data's.

    Parameters
    ----------
    value : Any
        Nest of tensors.
    size : int
        Number of data in the batch.
    start, stop : int
        Which to take.
    several : bool, optional
        Whether one datum may have several rows in a tensor.
    """

    def part(tensor: Tensor) -> Tensor:
        rows, rest = divmod(len(tensor) if tensor.ndim else 0, size)
        if rest or not (rows == 1 or (several and rows)):
            return tensor
        return tensor[start * rows : stop * rows]

    return mapped(part, value)


def joined(values: Sequence[Any], sizes: Sequence[int], several: bool = False) -> Any:
    """Put the data of several batches into one, as :func:`cut` takes them out.

    Raises
    ------
    ValueError
        If the batches differ in more than their data.
    """

    def join(tensors: Sequence[Tensor]) -> Tensor:
        lengths = [len(t) if t.ndim else 0 for t in tensors]
        rows = {divmod(n, size) for n, size in zip(lengths, sizes, strict=True)}
        per_datum, rest = rows.pop()
        if not rows and not rest and (per_datum == 1 or (several and per_datum)):
            return torch.cat(list(tensors))
        if not all(torch.equal(tensors[0], t) for t in tensors):
            raise ValueError("The batches differ in more than their data.")
        return tensors[0]

    columns = zip(*map(tensors_in, values), strict=True)
    together = iter([join(column) for column in columns])
    return mapped(lambda _: next(together), values[0])


class Share(NamedTuple):
    """Which data of a batch a part of it has."""

    start: int
    stop: int
    size: int


def shares(size: int, number: int) -> list[Share]:
    """Cut a batch into a number of parts of nearly equal sizes."""
    ends = [size * i // number for i in range(number + 1)]
    return [Share(a, b, size) for a, b in pairwise(ends)]


def part_of(item: tuple[Any, Any], share: Share) -> tuple[Any, Any]:
    """Cut inputs and targets; the parts are views."""
    (X, y), (start, stop, size) = item, share
    return cut(X, size, start, stop), cut(y, size, start, stop, several=True)


_RNG_LOCK = RLock()
_RNG_STATES: list[Callable[[], Any]] = []
_RNG_USERS: list[torch.device] = []


@contextmanager
def preserved_rng(device: torch.device) -> Iterator[None]:
    """Restore the random states of torch, NumPy and Python at the end.

    Data loaders draw from torch's global generator even without shuffling. The states
    are those of the process: the first of several threads saves, the last restores.
    """
    with _RNG_LOCK:
        if not _RNG_USERS:
            # the user's global state may be NumPy's old one
            numpy_state = np.random.get_state()  # noqa: NPY002
            _RNG_STATES[:] = [
                partial(torch.set_rng_state, torch.get_rng_state()),
                partial(np.random.set_state, numpy_state),
                partial(random.setstate, random.getstate()),
            ]
        if device.type == "cuda" and device not in _RNG_USERS:
            state = torch.cuda.get_rng_state(device)
            _RNG_STATES.append(partial(torch.cuda.set_rng_state, state, device))
        _RNG_USERS.append(device)
    try:
        yield
    finally:
        with _RNG_LOCK:
            _RNG_USERS.remove(device)
            if not _RNG_USERS:
                for restore in _RNG_STATES:
                    restore()


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
        self._large = [t for t in alias if id(t) not in known]

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
        with torch.no_grad():
            numbers = _numbers([_projection(t) for t in self._large])
            for i, t in enumerate(self._large):
                if not isfinite(numbers[i]):
                    replaced = torch.nan_to_num(t.double(), 3.0, 5.0, 7.0)
                    numbers[i] = float(_projection(replaced))
        return (*values, *numbers)

    def _projections(self, buffer: np.ndarray) -> list[float]:
        with np.errstate(invalid="ignore", over="ignore"):
            return np.add.reduceat(buffer * self._weights, self._starts).tolist()


def _suits_numpy(tensor: Tensor) -> bool:
    supported = tensor.dtype not in (torch.bfloat16, torch.float16)
    return tensor.device.type == "cpu" and supported and not tensor.is_complex()


def _numbers(scalars: Sequence[Tensor]) -> list[float]:
    """Return tensors as numbers, with one synchronisation per device."""
    values = [0.0] * len(scalars)
    for device in {s.device for s in scalars}:
        places = [i for i, s in enumerate(scalars) if s.device == device]
        together = torch.stack([scalars[i].double() for i in places]).tolist()
        for i, value in zip(places, together, strict=True):
            values[i] = value
    return values


def _projection(tensor: Tensor) -> Tensor:
    if tensor.dtype not in (torch.float32, torch.float64):
        wide = torch.float64 if not tensor.is_floating_point() else torch.float32
        tensor = (torch.view_as_real(tensor) if tensor.is_complex() else tensor).to(
            wide
        )
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
