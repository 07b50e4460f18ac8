"""Interrupts: what torch's contexts leave open when one strikes at their ends.

Python looks for signals after every call, hence also where one of torch's contexts has
just been entered, or is about to be left: then nobody leaves it. Gradients stay off, or
a level of vmap or a mode stays open, for the whole thread. So every operation notes on
entry how things are, and puts them back if it ends by an exception.
"""

from __future__ import annotations

import contextlib
import sys
import traceback
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial, wraps
from itertools import tee
from operator import call
from types import FrameType
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
from torch._C import _functorch
from torch.autograd import forward_ad
from torch.utils import _python_dispatch

from curvlinops._locks import new_lock

P = ParamSpec("P")
T = TypeVar("T")
_C: Any = torch._C


def hidden_interrupt(error: BaseException) -> KeyboardInterrupt | None:
    """Return the interrupt that an error is, or that it was raised on top of.

    Torch's contexts clean up what they have not set up yet, and fail. Only an interrupt
    that has struck the operation going on is returned: none that somebody was handling
    before it began.
    """
    for cause in _chain(error):
        if isinstance(cause, KeyboardInterrupt):
            return cause if _strikes_here(cause) else None
    return None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error, what was being handled when it was raised, and so on."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__context__


def _strikes_here(interrupt: KeyboardInterrupt) -> bool:
    """Whether an interrupt has come since this thread's outermost operation began."""
    frame: FrameType | None = sys._getframe()
    found, handled = False, None
    while frame is not None:
        if frame.f_code is _CODE:
            found, handled = True, frame.f_locals["handled"]
        frame = frame.f_back
    return found and all(cause is not interrupt for cause in _chain(handled))


class _Stacks(NamedTuple):
    """What a thread has entered before an operation, outermost first."""

    functions: list[Any]
    dispatch: list[Any]
    top: list[Any]
    flags: list[tuple[str, Any]]
    keys: tuple[Any, ...]


def _look(
    grad: Callable[[], bool] = torch.is_grad_enabled,
    inference: Callable[[], bool] = torch.is_inference_mode_enabled,
    hooks: Callable[[], bool] = _C._autograd._saved_tensors_hooks_is_enabled,
    functions: Callable[[], int] = _C._len_torch_function_stack,
    dispatch: Callable[[], int] = _C._len_torch_dispatch_stack,
    layers: Callable[[], int] = _functorch.get_dynamic_layer_stack_depth,
) -> tuple[Any, ...]:
    """Return a thread's state, as far as it is read at once, and before every product.

    What reads it is looked up only once, which takes half as long.
    """
    return grad(), inference(), hooks(), functions(), dispatch(), layers()


#: Where the depths of stacks begin in what :func:`_look` returns.
_DEPTHS = 3
#: What reads the state that only a model's own code, or a backward pass, changes. Of
#: some depths it is known only how to add to them and to subtract.
_MORE_LOOKS: tuple[Callable[[], Any], ...] = (
    _C._is_fwd_grad_enabled,
    partial(_C._autograd._top_saved_tensors_default_hooks, True),
    _C._vmapmode_increment_nesting,
    _C._vmapmode_decrement_nesting,
    torch.autocast_increment_nesting,
    torch.autocast_decrement_nesting,
    torch.is_autocast_cache_enabled,
    *(partial(torch.is_autocast_enabled, kind) for kind in ("cpu", "cuda")),
    *(partial(torch.get_autocast_dtype, kind) for kind in ("cpu", "cuda")),
    torch.is_anomaly_enabled,
    torch.is_anomaly_check_nan_enabled,
)


class Noted(NamedTuple):
    """How a thread's torch was, to be put back; see :func:`_note`."""

    seen: tuple[Any, ...]
    level: int
    filters: Any
    stacks: _Stacks | None
    more: tuple[Any, ...] | None

    def differs(self) -> bool:
        """Whether something has been left open, as far as that is seen at once."""
        return _look() != self.seen

    def put_back(self, interrupted: bool) -> None:
        """Put all back that is not as it was. May be repeated."""
        grad, inference, hooks, *depths = self.seen
        stacks = self.stacks or _Stacks([], [], [], [], ())
        if _functorch.get_dynamic_layer_stack_depth() != depths[-1]:
            _put_back_layers(depths[-1], stacks.top)
        now = _stacks()
        if not _are(now.functions, stacks.functions):
            _put_back_functions(stacks.functions)
        if not _are(now.dispatch, stacks.dispatch):
            _put_back_dispatch(stacks.dispatch)
        if now.flags != (flags := stacks.flags or [(n, False) for n, _ in now.flags]):
            _set_flags(flags)
        if self.more is not None:
            _put_back_more(self.more)
        if interrupted:  # these belong to the process
            leave_forward_mode(self.level)
            _put_back_filters(self.filters)
        if hooks and not _C._autograd._saved_tensors_hooks_is_enabled():
            _C._autograd._saved_tensors_hooks_enable()
        if torch.is_inference_mode_enabled() != inference:
            _enter(_C._InferenceMode(inference))
        if torch.is_grad_enabled() != grad:
            _C._set_grad_enabled(grad)
        _put_back_keys(stacks.keys)


def _note(evaluates: bool) -> tuple[Any, ...]:
    """Return what a :class:`Noted` is made of, which few operations need.

    A tuple, which is made in half the time of a named one, before every product.

    Parameters
    ----------
    evaluates : bool
        Whether the user's model is evaluated, or differentiated, meanwhile.
    """
    seen = _look()
    stacks = _stacks() if evaluates or any(seen[_DEPTHS:]) else None
    more = tuple(map(call, _MORE_LOOKS)) if evaluates else None
    return seen, forward_ad._current_level, warnings.filters, stacks, more


#: Those that stay entered.
_GUARDS: list[Any] = []
#: Variables of torch that say what kinds of modes have been entered.
_FLAGS = [name for name in vars(_python_dispatch) if name.startswith("_is_in_")]


def _stacks() -> _Stacks:
    functions = range(_C._len_torch_function_stack())
    dispatch = range(_C._len_torch_dispatch_stack())
    return _Stacks(
        [_C._get_function_stack_at(i) for i in functions],
        [_C._get_dispatch_stack_at(i) for i in dispatch],
        _top_layer(),
        [(name, getattr(_python_dispatch, name)) for name in _FLAGS],
        _keys(),
    )


def _keys() -> tuple[Any, ...]:
    """Return the kinds of kernels that are tried, and left out, in this thread.

    Guards that lie in frames of a mode's own code put back those of their time.
    """
    return _C._dispatch_tls_local_include_set(), _C._dispatch_tls_local_exclude_set()


def _put_back_keys(keys: tuple[Any, ...]) -> None:
    if keys and _keys() != keys:
        _enter(_C._ForceDispatchKeyGuard(*keys))


def _enter(guard: Any) -> None:
    """Enter a context for good: torch's guards put things back when they are gone."""
    _GUARDS.append(guard)
    guard.__enter__()


def _are(now: Sequence[Any], before: Sequence[Any]) -> bool:
    return [*map(id, now)] == [*map(id, before)]


def _top_layer() -> list[Any]:
    """Return the innermost level of `torch.func`, if one is entered.

    It is known only to who takes it away; here it is put back before anything else.
    """
    if not _functorch.get_dynamic_layer_stack_depth():
        return []
    taken, known = tee(map(call, (_functorch.pop_dynamic_layer_stack,)))
    deque(map(_functorch.push_dynamic_layer_stack, taken), maxlen=0)
    return [*known]


def _put_back_layers(depth: int, top: Sequence[Any]) -> None:
    """Leave levels of `torch.func` that are too many, and enter the one that lacks."""
    if (now := _functorch.get_dynamic_layer_stack_depth()) > depth:
        _functorch.pop_dynamic_layer_stack_and_undo_to_depth(depth)
    elif now == depth - 1:  # torch has left one that it had not entered
        _functorch.push_dynamic_layer_stack(*top)
    transforms: Any = sys.modules.get("torch._functorch.eager_transforms")
    if hasattr(transforms, "JVP_NESTING"):
        layers = _functorch.get_interpreter_stack() or []
        kinds = [layer.key() for layer in layers]
        transforms.JVP_NESTING = kinds.count(_functorch.TransformType.Jvp)
    if not depth:
        _functorch.set_inplace_requires_grad_allowed(False)
        _functorch.set_single_level_autograd_function_allowed(False)


def _put_back_functions(modes: Sequence[Any]) -> None:
    while _C._len_torch_function_stack():
        _C._pop_torch_function_stack()
    for mode in modes:
        _C._push_on_torch_function_stack(mode)


def _put_back_dispatch(modes: Sequence[Any]) -> None:
    while depth := _C._len_torch_dispatch_stack():
        top = _C._get_dispatch_stack_at(depth - 1)
        _C._pop_torch_dispatch_stack(getattr(top, "_mode_key", None))
    for mode in modes:
        _C._push_on_torch_dispatch_stack(mode)


def _set_flags(flags: Sequence[tuple[str, Any]]) -> None:
    for name, value in flags:
        setattr(_python_dispatch, name, value)
        # Beside some, the same stands in torch's C++.
        if "_any_mode_" in name:
            setter = name.replace("_is_in_any_mode", "set_is_in_mode")
            getattr(_python_dispatch, setter, bool)(value)


def _put_back_more(noted: Sequence[Any]) -> None:
    """Put back what :data:`_MORE_LOOKS` have seen."""
    forward, hooks, _, nesting, _, autocasts, caches, *rest, anomaly, nans = noted
    _C._set_fwd_grad_enabled(forward)
    torch.set_anomaly_enabled(anomaly, nans)
    autograd = _C._autograd
    while (top := autograd._top_saved_tensors_default_hooks(True)) and (
        hooks is None or not _are(top, hooks)
    ):
        autograd._pop_saved_tensors_default_hooks()
    if hooks is not None and top is None:
        autograd._push_saved_tensors_default_hooks(*hooks)
    for place, before in (2, nesting), (4, autocasts):
        more, fewer = _MORE_LOOKS[place : place + 2]
        _, depth = map(call, (more, fewer))  # at once
        while depth > before:
            depth = fewer()
    if not autocasts:
        torch.clear_autocast_cache()
    torch.set_autocast_cache_enabled(caches)
    for kind, enabled, dtype in zip(("cpu", "cuda"), rest[:2], rest[2:], strict=True):
        torch.set_autocast_enabled(kind, enabled)
        torch.set_autocast_dtype(kind, dtype)


def leave_forward_mode(before: int = -1) -> None:
    """Leave the level of forward mode, which may be known to torch's C++ alone.

    There is one for the process: it stays if it was entered ``before``, or if another
    thread computes a product with it.
    """
    if not FORWARD_MODE.acquire(blocking=False):
        return
    try:
        if before < 0:
            try:  # nothing else tells whether it is entered
                _C._enter_dual_level()
            except RuntimeError:
                pass
            finally:
                _C._exit_dual_level(level=0)
        forward_ad._current_level = before
    finally:
        FORWARD_MODE.release()


#: Held while this package uses forward mode, which there is only once.
FORWARD_MODE = new_lock(leave_forward_mode)


def _put_back_filters(filters: Any) -> None:
    """Put back what warnings do, which a context of Python's has replaced."""
    if warnings.filters is not filters:
        warnings.filters = filters
        with warnings.catch_warnings():  # which tells Python that it has changed
            pass


def _forget_frames(error: BaseException) -> None:
    """Drop what frames of torch's contexts hold, which would be left whenever it goes.

    Guards of torch's C++, and generators that have come as far as to their ``yield``.
    """
    frame: FrameType | None = sys._getframe()
    running = set()
    while frame is not None:
        running.add(frame)
        frame = frame.f_back
    for cause in _chain(error):
        frames = [frame for frame, _ in traceback.walk_tb(cause.__traceback__)]
        for frame in frames[-3:]:  # of a handler, which is given what it interrupts
            if not _of_a_context(frame):  # looking at its variables would keep them
                held = frame.f_locals.values()
                frames += [value for value in held if isinstance(value, FrameType)]
        for frame in reversed(frames):  # guards put back what was before them
            if _of_a_context(frame) and frame not in running:
                frame.clear()


def _of_a_context(frame: FrameType) -> bool:
    return frame.f_code.co_filename.startswith(_CONTEXTS)


#: Files in which contexts are entered and left, and what they lie in.
_CONTEXTS = (torch.__file__.removesuffix("__init__.py"), contextlib.__file__)


def isolated(evaluates: bool = False) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Return a decorator for operations after which a thread's torch is as before.

    Whatever torch's contexts have left open is closed if the operation ends by an
    exception: gradients and inference mode, levels of `torch.func`, modes for functions
    and for dispatch. An interrupt on top of which torch raised something else is raised
    in its place. After one, forward mode and warnings' filters are put back, too.

    Parameters
    ----------
    evaluates : bool, optional
        Whether the user's model is evaluated or differentiated in the operation. Then
        autocast, hooks on saved tensors and more count, too.
    """

    def decorate(operation: Callable[P, T]) -> Callable[P, T]:
        @wraps(operation)
        def run(*args: P.args, **kwargs: P.kwargs) -> T:
            handled = sys.exception()  # see `_strikes_here`
            before = _note(evaluates)
            try:
                return operation(*args, **kwargs)
            except BaseException as error:
                _end(Noted(*before), error)
                raise
            finally:
                del handled  # or its traceback may keep it

        return run

    return decorate


def _end(noted: Noted, error: BaseException) -> None:
    """Put all back after an exception, and raise the interrupt that it hides."""
    interrupt = None
    try:
        interrupt = hidden_interrupt(error)
        if interrupt is not None or noted.differs():
            _forget_frames(error)
        noted.put_back(interrupt is not None)
    finally:  # another interrupt may have come in between
        noted.put_back(interrupt is not None)
    if interrupt is not None and interrupt is not error:
        try:
            raise interrupt
        finally:  # or its traceback keeps it, and all that its frames hold
            del interrupt, error


#: Of every decorated operation.
_CODE = isolated()(lambda: None).__code__
