"""Counting the bytes that are alive."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from gc import collect
from math import inf
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from curvlinops._data import strided
from curvlinops._program import leaves
from curvlinops._replay import Watcher, with_memory

T = TypeVar("T")


class Tracker(Watcher):
    """Counts the bytes of the tensors that are created in a context and still alive.

    Memory that a single operation uses inside is not seen, and what is passed to
    operations but was not created in the context is not counted.
    """

    def __init__(self) -> None:
        super().__init__()
        # By address, which is not used again while there is a weak reference.
        self._given: dict[int, StorageWeakRef] = {}
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}
        #: Bytes alive now, and after every operation since the list was emptied.
        self.nbytes = 0
        #: Bytes of the largest tensor so far.
        self.largest = 0
        self.series: list[tuple[Any, int]] = []
        #: If the next operation might lead to more bytes, one raises; and whether one
        #: has. Expected is the size of the largest tensor so far, or more; or nothing.
        self.limit = inf
        self.next = 0
        self.looks_ahead = True
        self.exceeded = False

    @property
    def peak(self) -> int:
        """Most bytes alive at a time."""
        return max((n for _, n in self.series), default=0)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        args = with_memory(args)
        for storage in _storages([args, *(kwargs or {}).values()]):
            if storage._cdata not in self._alive and storage._cdata not in self._given:
                self._given[storage._cdata] = StorageWeakRef(storage)
        result = func(*args, **(kwargs or {}))
        expired = torch.UntypedStorage._expired
        for key in [*filter(expired, self._alive)]:
            self.nbytes -= self._alive.pop(key)[1]
        for storage in _storages(result):
            if storage._cdata not in self._alive and storage._cdata not in self._given:
                nbytes = storage.nbytes()
                self._alive[storage._cdata] = StorageWeakRef(storage), nbytes
                self.nbytes += nbytes
                self.largest = max(self.largest, nbytes)
        self.next = max(self.next, self.largest)
        self.series.append((func, self.nbytes))
        if self.nbytes + self.looks_ahead * self.next > self.limit:
            self.exceeded = True
            raise LimitExceededError
        return result


class LimitExceededError(MemoryError):
    """Raised by an operation after which more bytes might be alive than may be."""


def _storages(value: Any) -> list[torch.UntypedStorage]:
    tensors = [t for t in leaves(value) if isinstance(t, Tensor)]
    return [t.untyped_storage() for t in strided(tensors)]


def within(limit: float, run: Callable[[], T]) -> T | None:
    """Return ``run()``, or ``None`` where that takes more bytes than a limit.

    It is stopped by the first tensor beyond the limit, to be used where what it takes
    has been predicted.
    """
    with Tracker() as tracker, suppress(LimitExceededError):
        tracker.limit, tracker.looks_ahead = limit, False
        return run()
    collect()  # what is left of it may be in reference cycles
    return None
