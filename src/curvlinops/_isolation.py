"""What an evaluation changes outside of itself, and how that is undone.

The process has one set of switches, one cache of parametrized weights, and one module
that the user has given: what a product changes in these is noted before it is done, so
that it can be undone wherever an interrupt strikes.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from threading import RLock, get_ident
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn

from curvlinops import _compiled
from curvlinops._caching import EVALUATIONS, INSIDE
from curvlinops._locks import in_child, new_lock


def without_autocast(device: str) -> AbstractContextManager[Any]:
    """Return a context without autocast, which costs something only if it is on."""
    if torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()


def with_gradients() -> AbstractContextManager[Any]:
    """Return a context with gradients on, outside of inference mode.

    It costs only what it changes. Leaving inference mode turns gradients on, too.
    """
    if torch.is_grad_enabled() and not torch.is_inference_mode_enabled():
        return nullcontext()
    return torch.inference_mode(False)


_LOCKS: WeakKeyDictionary[Any, RLock] = WeakKeyDictionary()
_LOCKS_LOCK = new_lock()


def lock_of(module: Any) -> RLock:
    with _LOCKS_LOCK:
        return _LOCKS.get(module) or _LOCKS.setdefault(module, new_lock())


#: Switches by what sets them, and how they are.
_Positions: TypeAlias = list[tuple[Callable[[Any], Any], Any]]


class _Switches:
    """Process-wide switches of torch, while anything uses them.

    The switches are global, hence turned by the first user and turned back by the last.
    Users are known by weak references: one that is gone counts no more.

    Parameters
    ----------
    switches : callable
        Returns them.
    """

    def __init__(self, switches: Callable[[], list[_compiled.Switch]]) -> None:
        self._switches = switches
        self._lock = new_lock()
        self._users: dict[int, Callable[[], Any]] = {}
        self._before: _Positions | None = None

    def positions(self) -> _Positions:
        """Return how the switches are, but for users of them."""
        with self._lock:
            if self._before is not None:
                return self._before
            return [(turn, read()) for read, turn, _ in self._switches()]

    def add(
        self, key: int, user: Callable[[], Any], before: _Positions | None = None
    ) -> None:
        """Turn the switches on behalf of a user, given by a weak reference.

        They may have been in other positions ``before``, in which they are left.
        """
        with self._lock:
            self._users[key] = user
            if self._before is None:
                self._before = self.positions() if before is None else before
            self._update()

    def remove(self, key: int) -> None:
        """Turn them back unless there are other users. May be repeated."""
        with self._lock:
            self._users.pop(key, None)
            self._update()

    def put_back(self, before: _Positions) -> None:
        """Turn them to what they were before, unless there are users of them."""
        with self._lock:
            for turn, value in before if self._before is None else ():
                turn(value)

    def _update(self) -> None:
        if any(user() is not None for user in list(self._users.values())):
            for _, turn, value in self._switches():
                turn(value)
        elif self._before is not None:
            for turn, value in self._before:
                turn(value)
            self._before = None


def _attention() -> list[_compiled.Switch]:
    """Return what makes attention take its math form.

    Its flash and memory-efficient forms have no double backward.
    """
    c: Any = torch._C
    reads = [getattr(c, f"_get_{name}_sdp_enabled") for name in _FORMS]
    turns = [getattr(c, f"_set_sdp_use_{name}") for name in _FORMS]
    return [*zip(reads, turns, [name == "math" for name in _FORMS], strict=True)]


#: The forms of attention that this version of torch can switch, as
#: `torch.nn.attention.sdpa_kernel` does.
_FORMS = [
    name
    for name in ("math", "flash", "mem_efficient", "cudnn", "overrideable")
    if hasattr(torch._C, f"_set_sdp_use_{name}")
]


def _cudnn() -> list[_compiled.Switch]:
    """Return what makes recurrent layers leave cuDNN's, without double backward."""
    return [(torch._C._get_cudnn_enabled, torch._C._set_cudnn_enabled, False)]


#: Compiled functions have no double backward either, and run as they were written.
_COMPILED, _ATTENTION, _CUDNN = map(_Switches, (_compiled.switches, _attention, _cudnn))


class _Running(threading.local):
    """What the evaluation that is going on in a thread changes."""

    changes: Changes | None = None


_RUNNING = _Running()


def attend() -> None:
    """Let attention take its math form, in an evaluation that turns out to have some.

    Until its end, as activation checkpoints evaluate their parts of the model again.
    """
    if (changes := _RUNNING.changes) is not None:
        changes.attend()


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
        self._owner: Callable[[], Any] | None = ref(owner, lambda _: self.undo())
        #: Whether attention has been met, ...
        self.attends = False
        #: ... and which forms it may take otherwise.
        self._forms = _ATTENTION.positions()
        #: Of the evaluation in which this one takes place, and in which thread.
        self._inside, self._outside = INSIDE.number, _RUNNING.changes
        self._thread = get_ident()

    def make(
        self,
        module: nn.Module | None,
        aliases: dict[str, nn.Parameter],
        attends: bool = True,
        recurs: bool = False,
    ) -> None:
        """Turn switches and caches, and put aliases and buffers into a module.

        Parameters
        ----------
        module : nn.Module or None
            A module that is evaluated in place.
        aliases : dict of str to nn.Parameter
            What takes the place of its parameters.
        attends, recurs : bool, optional
            Whether there is attention, and recurrent layers on a GPU.
        """
        assert self._owner is not None
        _GOING[id(self)] = self
        _COMPILED.add(id(self), self._owner)
        if attends:
            self.attend()
        if recurs:
            _CUDNN.add(id(self), self._owner)
        EVALUATIONS[id(self)] = self._owner
        _RUNNING.changes = self
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

    def are_of_this_thread(self) -> bool:
        """Whether the evaluation is one of the current thread's."""
        return self._thread == get_ident()

    def attend(self) -> None:
        """Let attention take its math form."""
        self.attends = True
        if self._owner is not None:
            _ATTENTION.add(id(self), self._owner, self._forms)

    def undo(self) -> None:
        """Undo what has been done and is not undone yet."""
        while self._places:
            place, name, tensor = self._places[-1]
            place[name] = tensor
            self._places.pop()
        for switches in (_COMPILED, _ATTENTION, _CUDNN):
            switches.remove(id(self))
        if isinstance(sys.exception(), KeyboardInterrupt):
            _ATTENTION.put_back(self._forms)  # which the model's own code may turn
        EVALUATIONS.pop(id(self), None)
        if self.are_of_this_thread():  # matters within an evaluation only
            INSIDE.number, _RUNNING.changes = self._inside, self._outside
        self._owner = None  # it need not call any more
        _GOING.pop(id(self), None)


#: Changes of all threads that are made, and not undone yet.
_GOING: dict[int, Changes] = {}


@in_child
def _undo_those_of_others() -> None:
    """Undo what threads have changed that a forked process does not have."""
    for changes in list(_GOING.values()):
        if not changes.are_of_this_thread():
            changes.undo()
