"""What is kept between products, in bytes, and how much may be."""

from __future__ import annotations

from collections.abc import Hashable
from threading import Lock

import torch

from curvlinops._memory import budget_bytes
from curvlinops._policy import POLICY


class Ledger:
    """Bytes that recordings, and what is made from them, take up.

    Parameters
    ----------
    bounded : bool
        Whether there is a bound for all memory, which limits the budget.
    fraction : float, optional
        Fraction of the free memory that ``cache="auto"`` may fill.

    Notes
    -----
    The sum is kept up to date, and never computed from its parts: it is asked for with
    every batch.
    """

    def __init__(self, bounded: bool, fraction: float = POLICY.cache_fraction) -> None:
        self._bounded, self._fraction = bounded, fraction
        #: Bytes that may be kept; `None` until something was to be.
        self.budget: int | None = None
        self._allowed: int | None = None  # by the setting, within a bound
        #: Whether some recording did not fit; later ones are not tried then.
        self.full = False
        # By place, each with the stage of its batch.
        self._recordings: dict[int, tuple[tuple[int, ...], int]] = {}
        self._others: dict[Hashable, int] = {}
        self._used, self._lock = 0, Lock()

    def open(self, cache: str | int, device: torch.device) -> None:
        """Allow what a setting of ``cache`` does, unless something is allowed."""
        if self.budget is None:
            self.budget = budget_bytes(cache, device, self._fraction)

    def limit(self, most: int, cache: str | int, device: torch.device) -> bool:
        """Allow no more than ``most`` of it; return whether that is a change."""
        if self._allowed is None:
            self._allowed = budget_bytes(cache, device, self._fraction)
        budget = min(self._allowed, most)
        if budget == self.budget:
            return False
        self.budget, self.full = budget, False
        return True

    def used(self) -> int:
        """Return how many bytes are kept."""
        return self._used

    def room(self) -> float:
        """Return how many more bytes may be kept."""
        return 0 if self.budget is None else self.budget - self.used()

    def room_for(self, nbytes: int) -> bool:
        """Whether so many more bytes may be kept."""
        # Within a bound for all memory, also what it is made from counts.
        return (3 * nbytes if self._bounded else nbytes) <= self.room()

    @property
    def exceeded(self) -> bool:
        """Whether more is kept than may be."""
        return self.room() < 0

    def stage(self, place: int) -> tuple[int, ...] | None:
        """Return the stage at which a recording was entered."""
        stage, _ = self._recordings.get(place, (None, 0))
        return stage

    def enter(self, place: int, stage: tuple[int, ...], nbytes: int) -> bool:
        """Enter a recording; return whether it fits. If not, it is left out."""
        with self._lock:
            _, before = self._recordings.get(place, (None, 0))
            self._recordings[place] = stage, nbytes
            self._used += nbytes - before
        if not self.exceeded:
            return True
        self.full = True
        self.strike(place)
        return False

    def strike(self, place: int) -> None:
        """Take out a recording."""
        with self._lock:
            _, nbytes = self._recordings.pop(place)
            self._used -= nbytes

    def strike_recordings(self) -> None:
        """Take out all recordings."""
        with self._lock:
            self._recordings.clear()
            self._used = sum(self._others.values())

    def enter_other(self, key: Hashable, nbytes: int) -> None:
        """Enter something else that is kept."""
        with self._lock:
            self._used += nbytes - self._others.get(key, 0)
            self._others[key] = nbytes

    def strike_other(self, key: Hashable) -> None:
        """Take it out, if it is there."""
        with self._lock:
            self._used -= self._others.pop(key, 0)
