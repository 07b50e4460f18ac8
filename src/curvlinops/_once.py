"""Warnings that come once for an object of the user's, whoever works with it."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any
from weakref import WeakKeyDictionary

_TOLD: WeakKeyDictionary[Any, set[Hashable]] = WeakKeyDictionary()


def told_before(about: Any, what: Hashable) -> bool:
    """Return whether something was said about an object, which is taken down.

    Of objects that cannot be looked up, because they have no hash or no weak
    references, it is never known.
    """
    try:
        told = _TOLD.setdefault(about, set())
    except TypeError:
        return False
    known = what in told
    told.add(what)
    return known
