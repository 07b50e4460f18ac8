"""Passes over a loader whose workers persist, which serve one pass at a time.

Torch keeps the workers of such a loader, with what they have been asked for, from pass
to pass: whoever begins a pass ends the one that is going on, in silence, or waits for
batches that another thread has taken. So these loaders are read through copies with
workers of their own, and a pass of the user's goes on undisturbed.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any
from weakref import WeakKeyDictionary

from torch.utils.data import DataLoader

from curvlinops._locks import in_child, new_lock

#: The copy through which a loader is read, while nobody reads it.
_FREE: WeakKeyDictionary[Any, DataLoader[Any]] = WeakKeyDictionary()
_LOCK = new_lock()
#: Copies of the process that this one was forked from.
_PARENTS: list[DataLoader[Any]] = []


def one_pass(data: Any) -> Iterator[Any]:
    """Return an iterator over data that no other pass disturbs, nor is disturbed by.

    Parameters
    ----------
    data : iterable
        The user's.

    Notes
    -----
    Of a `DataLoader` with ``persistent_workers=True``, the first copy is kept as long
    as the loader is, with its workers. Passes that begin while another one goes on, in
    another thread or within it, have copies whose workers end with them: to wait for
    each other, they might have to wait for themselves.
    """
    workers = isinstance(data, DataLoader) and data.persistent_workers
    return _through_copy(data) if workers else iter(data)


def _through_copy(loader: DataLoader[Any]) -> Iterator[Any]:
    with _LOCK:
        own = _FREE.pop(loader, None)
    if own is None:
        own = copy.copy(loader)
        own._iterator = None
    try:
        yield from own
    finally:
        with _LOCK:
            _FREE.setdefault(loader, own)


@in_child
def _forget() -> None:
    """Leave workers to the process whose children they are.

    The copies are held: whoever drops them tells their workers to end.
    """
    _PARENTS.extend(_FREE.values())
    _FREE.clear()
