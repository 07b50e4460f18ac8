"""The weights that `torch.nn.utils.parametrize.cached()` keeps are the user's alone.

Inside of that context, torch keeps every parametrized weight in a dictionary of the
process, by its module and name, copies of the module included. A weight that is made
from the user's parameters must not be met in an evaluation with parameters of our own,
nor the other way round.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from torch.nn.utils import parametrize

#: Evaluations of models that are going on, by weak references to their owners.
EVALUATIONS: dict[int, Callable[[], Any]] = {}


class _Inside(threading.local):
    """How often the model has entered torch's context in a thread's evaluation."""

    number = 0


#: Of this thread's current evaluation. Each begins with 0, also within another one.
INSIDE = _Inside()


class _Entered(int):
    """How often torch's context has been entered: true where its cache may be used.

    It may not during an evaluation, except in a context that the model itself enters
    there, if nobody else is in one. torch counts by adding and subtracting 1, so that
    nothing is to be turned on or off, and threads or interrupts cannot come between.
    """

    def __add__(self, number: int) -> _Entered:
        if _evaluating():
            INSIDE.number += number
        return _Entered(int(self) + number)

    def __sub__(self, number: int) -> _Entered:
        return self + -number

    def __bool__(self) -> bool:
        entered = int(self)
        return entered != 0 and (not _evaluating() or entered == INSIDE.number)


def _evaluating() -> bool:
    return any(owner() is not None for owner in list(EVALUATIONS.values()))


parametrize._cache_enabled = _Entered(parametrize._cache_enabled)
