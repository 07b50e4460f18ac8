"""The random states of torch, NumPy and Python, which evaluations leave as they were.

These states belong to the whole process: who puts one back takes back what every thread
has drawn since. So they are put back only where an evaluation of this package has drawn
itself, as far as that can be seen, or where no other thread is there.
"""

from __future__ import annotations

import random
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from weakref import ref

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from curvlinops._locks import in_child, new_lock


class _User:
    """A local variable, which is gone when its frame is."""


class _States:
    """States that are noted by the first of several users and put back by the last.

    Users are known by weak references, and one that is gone counts no more, so that an
    interrupt may strike anywhere.
    """

    def __init__(self) -> None:
        self._lock = new_lock()
        self._users: dict[int, tuple[Callable[[], Any], int]] = {}
        self._noted: dict[Any, Callable[[], Any]] = {}
        self._drawn = False

    def add(self, user: _User, device: torch.device, wide: bool) -> None:
        """Note the states of torch, and the others if ``wide``."""
        key = id(user)
        with self._lock:
            if not self._in_use():
                self._drawn = False
                self._noted.clear()
            self._users[key] = ref(user, partial(self._gone, key)), _me()
            self._note("torch", torch.get_rng_state, torch.set_rng_state)
            if device.type == "cuda":
                read = partial(torch.cuda.get_rng_state, device)
                self._note(
                    device, read, partial(torch.cuda.set_rng_state, device=device)
                )
            if wide:
                # the user's global state may be NumPy's old one
                self._note("numpy", np.random.get_state, np.random.set_state)
                self._note("python", random.getstate, random.setstate)

    def _note(
        self, name: Any, read: Callable[[], Any], write: Callable[[Any], Any]
    ) -> None:
        if name not in self._noted:
            self._noted[name] = partial(write, read())

    def drawn(self, **noted: Callable[[], Any]) -> None:
        """Say that a user has drawn, maybe from a state that only now is noted."""
        with self._lock:
            for name, put_back in noted.items():
                self._noted.setdefault(name, put_back)
            self._drawn = True

    def remove(self, key: int) -> None:
        """Put the states back if this is the last user. May be repeated."""
        with self._lock:
            if key not in self._users:
                return
            last = not self._in_use(without=key)
            interrupted = isinstance(sys.exception(), KeyboardInterrupt)
            alone = threading.active_count() == 1
            if last and (self._drawn or alone or interrupted):
                for put_back in self._noted.values():
                    put_back()
            self._users.pop(key)
            if last:
                self._noted.clear()

    def _gone(self, key: int, _: Any) -> None:
        self.remove(key)

    def _in_use(self, without: int | None = None) -> bool:
        users = self._users.items()
        return any(user() is not None for key, (user, _) in users if key != without)

    def forked(self) -> None:
        """Finish on behalf of threads that a forked process does not have."""
        for key, (_, thread) in list(self._users.items()):
            if thread != _me():
                self.remove(key)


_me = threading.get_ident
_STATES = _States()
in_child(_STATES.forked)


@contextmanager
def preserved_rng(device: torch.device, wide: bool = True) -> Iterator[None]:
    """Put random states back at the end, if the evaluations within have drawn.

    Parameters
    ----------
    device : torch.device
        Where the evaluations run.
    wide : bool, optional
        Whether the states of NumPy and Python count from the beginning.

    Notes
    -----
    Of several threads, the first one notes and the last one puts back. What threads of
    the user's draw in between is then drawn again: nobody can tell it apart. Where
    this process has one thread only, all draws are the evaluations'.
    """
    user = _User()
    try:
        _STATES.add(user, device, wide or threading.active_count() == 1)
        yield
    finally:
        try:
            _STATES.remove(id(user))
        finally:  # an interrupt may have come in between
            _STATES.remove(id(user))


def may_draw(data: Any) -> bool:
    """Whether reading data may draw, as loaders do, also without shuffling."""
    return type(data) not in (list, tuple)


#: To be called where an evaluation draws, or may draw unseen.
drawn = _STATES.drawn


@contextmanager
def draws_outside_torch(known: dict[Any, bool]) -> Iterator[None]:
    """Find out whether an evaluation draws from NumPy's or Python's random state.

    Looked at once, at a model's first evaluation.

    Parameters
    ----------
    known : dict
        What is known of the model. It gets an entry.
    """
    key = draws_outside_torch
    if known.get(key) is False:
        yield
        return
    states = np.random.get_state(), random.getstate()  # noqa: NPY002
    yield
    now = np.random.get_state(), random.getstate()  # noqa: NPY002
    known[key] = known.get(key, False) or _differ(states, now)
    if known[key]:
        drawn(
            numpy=partial(np.random.set_state, states[0]),
            python=partial(random.setstate, states[1]),
        )


def _differ(before: Any, now: Any) -> bool:
    same = all(np.array_equal(x, y) for x, y in zip(before[0], now[0], strict=True))
    return not same or before[1] != now[1]


def _if_training(place: int, name: str, args: Any, kwargs: Any) -> bool:
    """Whether an argument says that units are dropped now, as they are by default."""
    return bool(args[place] if len(args) > place else kwargs.get(name, True))


def _if_asked(place: int, name: str, args: Any, kwargs: Any) -> bool:
    return bool(args[place] if len(args) > place else kwargs.get(name, False))


def _recurrent(args: Any, kwargs: Any) -> bool:
    """Whether layers between which units may be dropped are given a probability."""
    numbers = [*args, *kwargs.values()]
    places = [i for i, a in enumerate(numbers) if isinstance(a, float)]
    return any(numbers[i] > 0 and numbers[i + 1] is True for i in places)


def _attending(args: Any, kwargs: Any) -> bool:
    probability = args[10] if len(args) > 10 else kwargs.get("dropout_p", 0.0)
    return probability > 0 and _if_training(13, "training", args, kwargs)


def _from_the_process(args: Any, kwargs: Any) -> bool:
    return kwargs.get("generator") is None


def _found(owner: Any, names: str) -> list[Any]:
    """Return those functions of some that this version of torch has."""
    return [getattr(owner, name) for name in names.split() if hasattr(owner, name)]


#: Functions of torch that draw from its random state, and when they do.
_DRAWING: dict[Any, Callable[[Any, Any], bool]] = {
    **dict.fromkeys(
        [
            *_found(
                torch,
                "rand randn randint randperm rand_like randn_like randint_like normal "
                "bernoulli poisson multinomial binomial _standard_gamma "
                "_sample_dirichlet",
            ),
            *_found(
                Tensor,
                "bernoulli bernoulli_ multinomial uniform_ normal_ random_ "
                "exponential_ geometric_ log_normal_ cauchy_",
            ),
            *_found(
                F,
                "gumbel_softmax _fractional_max_pool2d _fractional_max_pool3d "
                "fractional_max_pool2d_with_indices "
                "fractional_max_pool3d_with_indices",
            ),
        ],
        _from_the_process,
    ),
    **dict.fromkeys(
        _found(
            F,
            "dropout dropout1d dropout2d dropout3d alpha_dropout feature_alpha_dropout",
        ),
        partial(_if_training, 2, "training"),
    ),
    **dict.fromkeys(
        _found(
            torch,
            "dropout dropout_ alpha_dropout alpha_dropout_ feature_dropout "
            "feature_dropout_ feature_alpha_dropout feature_alpha_dropout_ "
            "native_dropout",
        ),
        partial(_if_training, 2, "train"),
    ),
    **dict.fromkeys(
        [*_found(F, "rrelu"), *_found(torch, "rrelu rrelu_")],
        partial(_if_asked, 3, "training"),
    ),
    **dict.fromkeys(_found(torch, "lstm gru rnn_tanh rnn_relu"), _recurrent),
    F.multi_head_attention_forward: _attending,
    F.scaled_dot_product_attention: partial(_if_asked, 4, "dropout_p"),
}


def note_draws(func: Any, args: Any, kwargs: Any) -> None:
    """Say so if a function of torch draws from its random state."""
    draws = _DRAWING.get(func)
    if draws is not None and draws(args, kwargs):
        drawn()
