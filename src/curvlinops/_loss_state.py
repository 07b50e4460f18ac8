"""State of the user's loss, which evaluations must leave as it is."""

from __future__ import annotations

import copy
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from threading import get_ident
from types import FunctionType, MethodType
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from curvlinops._locks import in_child, new_lock

#: Containers, with those made from them, of which a shallow copy is kept.
_CONTAINERS = (list, dict, set, deque)

#: Most entries of a tensor that a function closes over to be copied before every
#: evaluation. Larger ones are data (features, logits of a teacher), not state.
_LARGE = 1 << 16
#: Attributes of modules that hold others, or are looked at by themselves.
_MODULES_OWN = {"_buffers", "_modules", "_parameters"}

#: Dictionaries, their mark in names, and keys, values and copies of what they held.
Noted: TypeAlias = list[tuple[dict[str, Any], str, list[tuple[str, Any, Any]]]]

#: Which threads evaluate a loss now, how often, and what they have noted.
_USED: dict[int, tuple[Counter[int], list[Noted]]] = {}
_LOCK = new_lock()


@contextmanager
def unchanged(loss_func: Any) -> Iterator[Callable[[], list[str]]]:
    """Take back what evaluations write into a loss's buffers and attributes.

    Also into what a function closes over, but large tensors. Yields a function that
    names what has been changed by now: registered buffers by their names, all else with
    a dot before it. Counters, integers that is, are not among the buffers: where they
    matter, the values of a second evaluation say so. Of several threads that evaluate
    the same loss at a time, the last one takes everything back.
    """
    me = get_ident()
    with _LOCK:
        users, known = _USED.setdefault(id(loss_func), (Counter(), []))
        noted = known[0] if users.keys() - {me} else _noted(loss_func)
        known.append(noted)
        users[me] += 1

    def changed() -> list[str]:
        return [
            f"{'.' if _counts(value) else dot}{key}"
            for place, dot, entries in noted
            for key, value, before in entries
            if place.get(key) is not value or not _same(value, before)
        ]

    try:
        yield changed
    finally:
        with _LOCK:
            users -= Counter([me])
            if not users:
                _USED.pop(id(loss_func), None)
            if not users.keys() - {me}:  # what others have written may be in use
                _put_back(noted)


@in_child
def _take_back_those_of_others() -> None:
    """Take back what threads were evaluating that a forked process does not have."""
    for key, (users, known) in list(_USED.items()):
        if not users.keys() - {get_ident()}:
            continue
        for thread in users.keys() - {get_ident()}:
            del users[thread]
        if not users:
            del _USED[key]
            _put_back(known[0])


def _noted(loss_func: Any) -> Noted:
    return [
        (
            place,
            dot,
            [(k, v, _copied(v)) for k, v in [*place.items()] if k not in _MODULES_OWN],
        )
        for place, dot in _places(loss_func)
    ]


def _put_back(noted: Noted) -> None:
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
    waiting, seen = [loss_func], set()
    while waiting:
        part = waiting.pop()
        if id(part) in seen:
            continue
        seen.add(id(part))
        if isinstance(part, partial):
            waiting.append(part.func)
        elif isinstance(part, MethodType):
            waiting.append(part.__self__)
        elif isinstance(part, nn.Module):
            waiting += part.children()
            yield part._buffers, ""
            yield part.__dict__, "."
        elif hasattr(part, "__dict__") and not isinstance(part, type):
            yield part.__dict__, "."
            if isinstance(part, FunctionType):
                closed = _closed_over(part)
                yield closed, "."
                waiting += filter(callable, closed.values())


def _closed_over(function: FunctionType) -> dict[str, Any]:
    """Return the variables of enclosing functions by name, but large tensors."""
    found = {}
    names, cells = function.__code__.co_freevars, function.__closure__ or ()
    for name, cell in zip(names, cells, strict=True):
        with suppress(ValueError):  # it is not defined yet
            value = cell.cell_contents
            if not isinstance(value, Tensor) or value.numel() <= _LARGE:
                found[name] = value
    return found


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    return copy.copy(value) if isinstance(value, _CONTAINERS) else value


def _counts(value: Any) -> bool:
    return isinstance(value, Tensor) and not value.is_floating_point()


def _same(value: Any, before: Any) -> bool:
    if isinstance(value, Tensor):
        now = value.detach()
        if now.shape != before.shape or now.dtype != before.dtype:
            return False
        return torch.equal(now, before) or bool(
            torch.isclose(now, before, 0, 0, equal_nan=True).all()
        )
    if not isinstance(value, _CONTAINERS):
        return True  # another object would be in its place
    if len(value) != len(before):
        return False
    pairs = zip(_listed(value), _listed(before), strict=True)
    return all(a is b for a, b in pairs)


def _listed(value: Any) -> list[Any]:
    return [*value, *value.values()] if isinstance(value, dict) else [*value]


def _restore(value: Any, before: Any) -> None:
    if isinstance(value, Tensor):
        if value.shape != before.shape or value.dtype != before.dtype:
            value.data = before
        else:
            with torch.no_grad():
                value.copy_(before)
        return
    value.clear()
    (value.extend if isinstance(value, (list, deque)) else value.update)(before)
