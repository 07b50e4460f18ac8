"""What an evaluation changes outside of itself, and how that is undone.

The process has one set of switches, one cache of parametrized weights, and one module
that the user has given: what a product changes in these is noted before it is done, so
that it can be undone wherever an interrupt strikes.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from threading import RLock
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn

from curvlinops import _compiled
from curvlinops._caching import EVALUATIONS, INSIDE


def without_autocast(device: str) -> AbstractContextManager[Any]:
    """Return a context without autocast, which costs something only if it is on."""
    if torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()


_LOCKS: WeakKeyDictionary[Any, RLock] = WeakKeyDictionary()
_LOCKS_LOCK = RLock()


def lock_of(module: Any) -> RLock:
    with _LOCKS_LOCK:
        return _LOCKS.setdefault(module, RLock())


class _Switches:
    """Process-wide switches of torch, while anything uses them.

    Those of attention choose its math form, since flash and memory-efficient attention
    have no double backward; compiled functions, which have none either, run as they
    were written. The switches are global, hence turned by the first user and turned
    back by the last. Users are known by weak references: one that is gone counts no
    more.
    """

    def __init__(self) -> None:
        self._lock = RLock()
        self._users: dict[int, Callable[[], Any]] = {}
        self._before: list[tuple[Callable[[Any], Any], Any]] | None = None

    def add(self, key: int, user: Callable[[], Any]) -> None:
        """Turn the switches on behalf of a user, given by a weak reference."""
        with self._lock:
            self._users[key] = user
            self._update()

    def remove(self, key: int) -> None:
        """Turn them back unless there are other users. May be repeated."""
        with self._lock:
            self._users.pop(key, None)
            self._update()

    def _update(self) -> None:
        if any(user() is not None for user in list(self._users.values())):
            switches = [*_attention(), *_compiled.switches()]
            if self._before is None:
                self._before = [(turn, read()) for read, turn, _ in switches]
            for _, turn, value in switches:
                turn(value)
        elif self._before is not None:
            for turn, value in self._before:
                turn(value)
            self._before = None


def _attention() -> list[_compiled.Switch]:
    """Return what makes attention take its math form."""
    return [(_get_switch(n), _set_switch(n), n == "math") for n in _ATTENTION]


def _get_switch(name: str) -> Callable[[], bool]:
    return getattr(torch._C, f"_get_{name}_sdp_enabled")


def _set_switch(name: str) -> Callable[[bool], None]:
    return getattr(torch._C, f"_set_sdp_use_{name}")


#: The forms of attention that this version of torch can switch, as
#: `torch.nn.attention.sdpa_kernel` does.
_ATTENTION = [
    name
    for name in ("math", "flash", "mem_efficient", "cudnn", "overrideable")
    if hasattr(torch._C, f"_set_sdp_use_{name}")
]
_SWITCHES = _Switches()
NO_CUDNN = partial(torch.backends.cudnn.flags, enabled=False)


class Owner:
    """A local variable, which is gone when its frame is."""


class Changes:
    """What a run changes outside of itself: switches, torch's caches, a module.

    What is to be undone is noted before it is done, and undoing twice does no harm. So
    wherever an interrupt strikes, the rest can be undone later: at the latest when the
    owner is gone. (Not in a finaliser, which would be called every time and swallow the
    interrupts that strike it.)
    """

    def __init__(self, owner: Owner) -> None:
        #: Where tensors were replaced, and which ones.
        self._places: list[tuple[dict[str, Any], str, Any]] = []
        self._owner: Callable[[], Any] | None = ref(owner, self._forsaken)
        #: Of the evaluation in which this one takes place.
        self._inside = INSIDE.number

    def _forsaken(self, _: Any) -> None:
        self.undo()

    def make(self, module: nn.Module | None, aliases: dict[str, nn.Parameter]) -> None:
        """Turn switches and caches, and put aliases and buffers into a module."""
        assert self._owner is not None
        _SWITCHES.add(id(self), self._owner)
        EVALUATIONS[id(self)] = self._owner
        INSIDE.number = 0
        if module is None:
            return
        others: dict[int, Tensor] = {id(b): b.clone() for b in module.buffers()}
        for name, parameter in module.named_parameters(remove_duplicate=False):
            if name in aliases:
                others[id(parameter)] = aliases[name]
        for part in module.modules():
            # What hooks compute (weight normalisation, say) is the user's, too.
            own = vars(part)
            self._places += [(own, n, t) for n, t in own.items() if torch.is_tensor(t)]
            places: tuple[dict[str, Any], ...] = (part._parameters, part._buffers)
            for place in places:
                for name, tensor in list(place.items()):
                    if id(tensor) in others:
                        self._places.append((place, name, tensor))
                        place[name] = others[id(tensor)]

    def undo(self) -> None:
        """Undo what has been done and is not undone yet."""
        while self._places:
            place, name, tensor = self._places[-1]
            place[name] = tensor
            self._places.pop()
        _SWITCHES.remove(id(self))
        EVALUATIONS.pop(id(self), None)
        INSIDE.number = self._inside  # matters within an evaluation only
        self._owner = None  # it need not call any more
