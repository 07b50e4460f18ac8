"""The user's data: batches of nested tensors, read repeatedly and left as found."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import suppress
from functools import cache
from itertools import count, pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from curvlinops._objects import ATOMS, is_object, parts_of, with_parts


def checked_data(data: Any, pair: Callable[[Any, int], Any]) -> Iterable[Any]:
    """Return the data after checking that it can be read repeatedly.

    Batches that are there already are checked by ``pair``, which gets their number.
    """
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
            pair(item, index)
    return data


def length_of(data: Any) -> int | None:
    try:
        return len(data)
    except TypeError:
        return None


def mapped(
    function: Callable[[Tensor], Tensor],
    value: Any,
    whole: Callable[[Any], Any] | None = None,
    anew: bool = False,
) -> Any:
    """Apply a function to every tensor in a nest of containers and objects.

    Those in which nothing changes are returned as they are, of others copies. What is
    met several times stays one object; within a circle, it is the old one.

    Parameters
    ----------
    function : callable
        Maps a tensor to a tensor.
    value : Any
        The nest.
    whole : callable, optional
        Maps an object, or a container that is not one of Python's own, to what takes
        its place, or to ``None`` if its parts are to be mapped.
    anew : bool, optional
        Whether all is copied that may be written into, arrays included.
    """
    return _mapped(function, value, whole, anew, {})


def _mapped(
    function: Callable[[Tensor], Tensor],
    value: Any,
    whole: Callable[[Any], Any] | None,
    anew: bool,
    known: dict[int, tuple[Any, Any]],
) -> Any:
    """Map a nest, of which some containers and objects are known with their copies."""
    if torch.is_tensor(value):
        return function(value)
    if id(value) in known:
        return known[id(value)][1]
    found = parts_of(value)
    if found is None:
        return value.copy() if anew and isinstance(value, np.ndarray) else value
    known[id(value)] = value, value  # held, so that its `id` stays its own
    new = None
    if whole is not None and type(value) not in (dict, list, tuple):
        new = whole(value)
    if new is None:
        parts = [_mapped(function, part, whole, anew, known) for part in found[1]]
        same = all(a is b for a, b in zip(parts, found[1], strict=True))
        if not same:
            new = with_parts(value, parts)
        elif anew and (found[0] or found[1]):
            with suppress(TypeError):  # it has no tensors, and is used as it is
                new = with_parts(value, parts)
    new = value if new is None else new
    known[id(value)] = value, new
    return new


def arguments_in(values: Iterable[Any]) -> Iterator[Tensor]:
    """Yield the tensors among a function's arguments, and in lists and tuples there."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from arguments_in(value)


def tensors_in(value: Any, inside: bool = True) -> list[Tensor]:
    """Return all tensors in a nest of containers and objects, in order.

    Those inside of objects are left out if ``inside`` is false.
    """
    return [leaf for leaf in leaves_in(value, inside=inside) if torch.is_tensor(leaf)]


def leaves_in(
    value: Any, form: list[Any] | None = None, inside: bool = True
) -> list[Any]:
    """Return everything in a nest of containers and objects, in order.

    Parameters
    ----------
    value : Any
        The nest.
    form : list, optional
        To this is added what the nest is beside its leaves: types, keys, lengths, names
        of attributes, where among the leaves each container and object begins, and
        which of them are met again.
    inside : bool, optional
        Whether objects are looked into, see :func:`~curvlinops._objects.is_object`.
    """
    leaves: list[Any] = []
    _collect(value, leaves, [] if form is None else form, inside, {})
    return leaves


def _collect(
    value: Any,
    leaves: list[Any],
    form: list[Any],
    inside: bool,
    known: dict[int, tuple[Any, int]],
) -> None:
    """Add the leaves of a nest and its form to lists, but for what is known."""
    if id(value) in known:
        form += len(leaves), known[id(value)][1]
        return
    found = parts_of(value) if inside or not is_object(value) else None
    if found is None:
        leaves.append(value)
        return
    form += type(value), found[0], len(leaves)
    known[id(value)] = value, len(known)  # held, so that its `id` stays its own
    for part in found[1]:
        if isinstance(part, Tensor) or type(part) in ATOMS:
            leaves.append(part)
        else:
            _collect(part, leaves, form, inside, known)


def holds_objects(value: Any) -> bool:
    """Whether a nest has tensors inside of objects.

    These are not cut: which of their tensors have an axis for data is not known.
    """
    return len(tensors_in(value)) > len(tensors_in(value, inside=False))


def strided(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Return tensors with sparse and jagged ones replaced by what these consist of."""
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
        elif t.layout is torch.jagged:
            names = t.__tensor_flatten__()[0]  # type: ignore[attr-defined]
            found += strided(getattr(t, name) for name in names)
        else:
            found.append(t.to_dense())
    return found


def marks_of(tensors: Iterable[Tensor]) -> list[tuple[Any, ...]]:
    """Return what models leave on tensors beside what these contain."""
    return [
        (t.requires_grad, t.is_leaf and t.grad is None, [*vars(t)]) for t in tensors
    ]


def moved(value: Any, device: torch.device) -> Any:
    """Move the tensors in a nest to a device.

    An object that has a method for that is moved by it, as a copy.
    """

    def usable(tensor: Tensor) -> Tensor:
        # Inference tensors cannot be saved in graphs, their clones can.
        return tensor.clone() if tensor.is_inference() else tensor

    def move(tensor: Tensor) -> Tensor:
        return usable(tensor).to(device, non_blocking=True)

    def whole(value: Any) -> Any:
        tensors = tensors_in(value)
        if not moves_itself(value) or all(t.device == device for t in tensors):
            return None
        copy = mapped(lambda t: t, value, anew=True)
        new = copy.to(device)
        return mapped(usable, copy if new is None else new)

    return mapped(move, value, whole)


def moves_itself(value: Any) -> bool:
    """Whether an object or a container has a method that moves it to a device."""
    return callable(getattr(type(value), "to", None))


def ahead(
    parts: Iterable[tuple[int, Any, Share | None]],
    device: torch.device,
    known: Iterable[int],
) -> Iterator[tuple[int, Any, Share | None]]:
    """Yield batches for a GPU, each copied while the one before is worked on.

    They leave through page-locked memory and arrive beside the current stream. Those
    at places that are known are left where they are, and so are objects that move
    themselves.
    """
    if device.type != "cuda":
        yield from parts
        return
    stream, aside = torch.cuda.current_stream(device), _copying_stream(device)

    def send(tensor: Tensor) -> Tensor:
        if tensor.device.type != "cpu" or tensor.layout is not torch.strided:
            return tensor
        sent = tensor.pin_memory().to(device, non_blocking=True)
        sent.record_stream(stream)
        return sent

    def itself(value: Any) -> Any:
        return value if moves_itself(value) else None

    before: tuple[Any, ...] = ()
    skipped = set(known)
    for place, (index, item, share) in enumerate(parts):
        with torch.cuda.stream(aside):
            item = item if place in skipped else mapped(send, item, itself)
            arrived = aside.record_event()
        if before:
            stream.wait_event(before[1])
            yield before[0]
        before = (index, item, share), arrived
    if before:
        stream.wait_event(before[1])
        yield before[0]


@cache
def _copying_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def cloned(value: Any) -> Any:
    """Copy whatever in a nest may be written into."""
    return mapped(torch.clone, value, anew=True)


def cut(
    value: Any,
    size: int,
    start: int,
    stop: int,
    several: bool = False,
    tables: Collection[int] = (),
    step: int = 1,
) -> Any:
    """Take some data out of a batch: cut every tensor whose first axis is the data's.

    A nest with tensors inside of objects is returned as it is.

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
    tables : collection of int, optional
        Which of the tensors stay whole, whatever their length.
    step : int, optional
        Take every so-many-th datum only; no datum may have several rows then.
    """
    number = count()

    def part(tensor: Tensor) -> Tensor:
        rows = rows_per_datum(tensor, size, several)
        if next(number) in tables or not rows:
            return tensor
        return tensor[start * rows : stop * rows : step]

    return value if holds_objects(value) else mapped(part, value)


def rows_per_datum(tensor: Tensor, size: int, several: bool) -> int:
    """Return how many rows of a tensor a datum has, by its length; 0 if it has none."""
    rows, rest = divmod(len(tensor) if tensor.ndim else 0, size)
    return rows if not rest and (several or rows == 1) else 0


def joined(values: Sequence[Any], sizes: Sequence[int], several: bool = False) -> Any:
    """Put the data of several batches into one, as :func:`cut` takes them out.

    Raises
    ------
    ValueError
        If the batches differ in more than their data, or have tensors inside of
        objects.
    """
    if any(map(holds_objects, values)):
        raise ValueError("Which tensors of objects have data is not known.")

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


class Tables(NamedTuple):
    """Which tensors in inputs and targets belong to no single data, by position."""

    X: frozenset[int] = frozenset()
    y: frozenset[int] = frozenset()


def rows_in(X: Any, y: Any, size: int) -> tuple[list[int], list[int]]:
    """Return how many rows a datum has in each tensor of inputs and targets."""
    return (
        [rows_per_datum(t, size, False) for t in tensors_in(X)],
        [rows_per_datum(t, size, True) for t in tensors_in(y)],
    )


def tables_of(rows: Iterable[tuple[list[int], list[int]]]) -> Tables:
    """Return the tensors that in some batch are not as long as its data.

    Batches that hold different numbers of tensors cannot be compared: there, length
    alone decides.
    """

    def tables(batches: Sequence[list[int]]) -> frozenset[int]:
        if len({*map(len, batches)}) > 1:
            return frozenset()
        columns = enumerate(zip(*batches, strict=True))
        return frozenset(i for i, column in columns if not all(column))

    X, y = zip(*rows, strict=True)
    return Tables(tables(X), tables(y))


def part_of(
    item: tuple[Any, Any], share: Share, tables: Tables | None = None
) -> tuple[Any, Any]:
    """Cut inputs and targets; the parts are views."""
    (X, y), (start, stop, size) = item, share
    tables = tables or Tables()
    return (
        cut(X, size, start, stop, tables=tables.X),
        cut(y, size, start, stop, several=True, tables=tables.y),
    )
