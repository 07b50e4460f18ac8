"""Locks that a forked process finds free, unless the thread that forked holds them.

A fork copies one thread only. What other threads held stays locked in the copy, for
nobody is there to release it, and what they were about to undo stays done.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from importlib import import_module
from threading import RLock
from types import MethodType
from typing import Any
from weakref import WeakMethod, ref

#: All locks of the package by their ``id``, each with what to do in a child if a thread
#: that is not there has held it: a function, or a weak reference to a method.
_ALL: dict[int, tuple[ref[RLock], Any]] = {}
#: What is done in every child, after that.
_IN_CHILD: list[Callable[[], None]] = []


def new_lock(renew: Callable[[], None] | None = None) -> RLock:
    """Return a lock that may be acquired repeatedly by one thread.

    Parameters
    ----------
    renew : callable, optional
        Called in a forked process if another thread has held the lock, hence may have
        changed half of what it protects. Of a method, the object is held weakly.
    """
    lock = RLock()
    # No Python code when a lock goes: an interrupt in there would be lost.
    gone = partial(_ALL.pop, id(lock))
    is_method = isinstance(renew, MethodType)
    _ALL[id(lock)] = ref(lock, gone), WeakMethod(renew) if is_method else renew
    return lock


def in_child(function: Callable[[], None]) -> Callable[[], None]:
    """Have a function called in every forked process; may serve as a decorator."""
    _IN_CHILD.append(function)
    return function


def _renew() -> None:
    """Free what threads that are not there any more have held."""
    left = []
    for weak, renew in list(_ALL.values()):
        if (lock := weak()) is None:
            continue
        if lock.acquire(blocking=False):
            lock.release()
        else:
            lock._at_fork_reinit()  # type: ignore[attr-defined]
            left.append(renew)
    for renew in left:
        function = renew() if isinstance(renew, WeakMethod) else renew
        if function is not None:
            function()
    for function in _IN_CHILD:
        function()


#: Held while something is imported, and while this process is forked.
_LOADING = RLock()


def load(name: str) -> None:
    """Import a module that torch imports later, and let no other thread fork meanwhile.

    A forked process waits for ever for an import that another thread had begun.
    """
    with _LOADING:
        import_module(name)


if hasattr(os, "register_at_fork"):  # not on Windows, where nothing forks
    os.register_at_fork(
        before=_LOADING.acquire,
        after_in_parent=_LOADING.release,
        after_in_child=_LOADING.release,
    )
    os.register_at_fork(after_in_child=_renew)
