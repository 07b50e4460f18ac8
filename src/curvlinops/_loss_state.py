"""State of the user's loss, which evaluations must leave as it is."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

#: Containers of which a shallow copy is kept.
_CONTAINERS = (list, dict, set, deque)

#: Attributes of modules that hold others, or are looked at by themselves.
_MODULES_OWN = {"_buffers", "_modules", "_parameters"}


@contextmanager
def unchanged(loss_func: Any) -> Iterator[Callable[[], list[str]]]:
    """Take back what evaluations write into a loss's buffers and attributes.

    Yields a function that names what has been changed by now: registered buffers by
    their names, attributes with a dot before it.
    """
    noted = [
        (
            place,
            dot,
            [(k, v, _copied(v)) for k, v in place.items() if k not in _MODULES_OWN],
        )
        for place, dot in _places(loss_func)
    ]

    def changed() -> list[str]:
        return [
            f"{dot}{key}"
            for place, dot, entries in noted
            for key, value, before in entries
            if place.get(key) is not value or not _same(value, before)
        ]

    try:
        yield changed
    finally:
        for place, _, entries in noted:
            for key in place.keys() - {key for key, _, _ in entries} - _MODULES_OWN:
                del place[key]
            for key, value, before in entries:
                if place.get(key) is not value:
                    place[key] = value
                if not _same(value, before):
                    _restore(value, before)


def _places(loss_func: Any) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield the dictionaries in which a loss may keep state."""
    if isinstance(loss_func, partial):
        yield from _places(loss_func.func)
    elif isinstance(loss_func, MethodType):
        yield from _places(loss_func.__self__)
    elif isinstance(loss_func, nn.Module):
        for part in loss_func.modules():
            yield part._buffers, ""
            yield part.__dict__, "."
    elif hasattr(loss_func, "__dict__") and not isinstance(loss_func, type):
        yield loss_func.__dict__, "."


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    return copy.copy(value) if type(value) in _CONTAINERS else value


def _same(value: Any, before: Any) -> bool:
    if isinstance(value, Tensor):
        same: bool = value.shape == before.shape and bool(
            torch.equal(value.detach(), before)
        )
        return same
    if type(value) not in _CONTAINERS:
        return True  # another object would be in its place
    if len(value) != len(before):
        return False
    pairs = zip(_listed(value), _listed(before), strict=True)
    return all(a is b for a, b in pairs)


def _listed(value: Any) -> list[Any]:
    return [*value, *value.values()] if isinstance(value, dict) else [*value]


def _restore(value: Any, before: Any) -> None:
    if isinstance(value, Tensor):
        with torch.no_grad():
            value.copy_(before)
        return
    value.clear()
    (value.extend if isinstance(value, (list, deque)) else value.update)(before)
