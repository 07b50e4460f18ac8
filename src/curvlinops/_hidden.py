"""Parameters that a model uses where the graph of its output does not show them.

An autograd function's node leads to the tensors that the function is given. What else
its forward pass uses is out of sight: `torch.autograd.grad` finds no way there.
Functions that save memory are like that. They evaluate a part of the model without a
graph, and once more, with one, in their backward pass, from where they add to
``.grad``; reentrant activation checkpointing is the best known.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from types import CodeType, FrameType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import BackwardCFunction
from torch.utils.checkpoint import CheckpointFunction

from curvlinops._data import arguments_in
from curvlinops._model import Model, graph_leaves, graph_nodes

_PLAIN = (
    "Pass `use_reentrant=False` to `torch.utils.checkpoint.checkpoint` or "
    "`checkpoint_sequential` (with Hugging Face's models, call "
    "`model.gradient_checkpointing_enable(gradient_checkpointing_kwargs="
    '{"use_reentrant": False})`)'
)
#: What makes a constant of a parameter, on purpose.
_DETACHING = {torch.detach, Tensor.detach, Tensor.data.__get__}  # type: ignore[attr-defined]
#: By the code of a forward pass, the autograd function; ``None`` for other code that
#: has such a name.
_FORWARDS: dict[CodeType, type | None] = {}


def is_reentrant(function: Any) -> bool:
    """Whether an autograd function is activation checkpointing of the reentrant kind.

    Libraries have copies of torch's function, under its name.
    """
    return isinstance(function, type) and (
        issubclass(function, CheckpointFunction)
        or function.__name__ == CheckpointFunction.__name__
    )


def refuse_reentrant(value: Tensor, what: str, behind: Tensor | None = None) -> None:
    """Raise if a graph holds a reentrant checkpoint.

    Parameters
    ----------
    value : Tensor
        Where the graph begins.
    what : str
        What that is.
    behind : Tensor, optional
        A tensor of whose graph no more is looked at.

    Raises
    ------
    ValueError
        If so.
    """
    for node in graph_nodes(value, until=behind):
        function = getattr(node, "_forward_cls", None)
        if isinstance(node, BackwardCFunction) and is_reentrant(function):
            raise ValueError(
                f"The graph of {what} holds an activation checkpoint of the reentrant "
                "kind. It shows no way to the parameters inside, whose part of every "
                f"matrix would be missing. {_PLAIN}."
            )


class HiddenUses:
    """Notes which parameters are used in functions that were not given them.

    It watches an evaluation of a model, which begins where this is created. What is
    used where the model has turned gradients off, or detached, is meant to be constant.

    Parameters
    ----------
    model : Model
        The model.

    Attributes
    ----------
    found : dict of str to type
        The functions by the names of the parameters.

    Notes
    -----
    Functions that are called where nothing requires a gradient, such as a checkpoint
    of a model's first layers, leave no node in a graph: so it is looked for the call on
    the stack. In scripts, uses are not seen.
    """

    def __init__(self, model: Model) -> None:
        aliases = ((p, name) for name, p in model.aliases.items())
        self._names = {id(p): name for p, name in (*model.users, *aliases)}
        self.found: dict[str, type] = {}
        #: Whether the model leaves gradients on.
        self._on = True
        #: Functions in whose forward pass all of this happens.
        self._outside = len(_calls())

    def see(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        """See a function of torch that was called."""
        if func is torch._C._set_grad_enabled:
            if self._call() is None:
                self._on = bool([*args, *kwargs.values()][0])
        elif self._on and func not in _DETACHING:
            # Gradients that nobody has turned off are off in a forward pass only.
            inside = not torch.is_grad_enabled()
            for tensor in arguments_in((*args, *kwargs.values())):
                if id(tensor) in self._names or (inside and tensor.grad_fn is not None):
                    self._note(tensor, result)

    def _note(self, tensor: Tensor, result: Any) -> None:
        """Note a use of a parameter, or of what is made of some, if it is hidden."""
        call = self._call()
        if (
            call is not None
            and not any(given is tensor for given in _arguments(call[1]))
            and any(t.is_floating_point() for t in arguments_in((result,)))
            and not torch.is_inference_mode_enabled()
        ):
            for leaf in [tensor] if tensor.is_leaf else graph_leaves(tensor):
                if id(leaf) in self._names:
                    self.found[self._names[id(leaf)]] = call[0]

    def _call(self) -> tuple[type, FrameType] | None:
        """Return the autograd function that is evaluated now, and its forward pass.

        If it calls others, they build no graph.
        """
        calls = _calls()[: -self._outside or None]
        return calls[-1] if calls else None

    def refuse(self, what: str) -> None:
        """Raise if anything was noted.

        Parameters
        ----------
        what : str
            What was evaluated.

        Raises
        ------
        ValueError
            If so.
        """
        if not self.found:
            return
        names, functions = list(self.found), {*self.found.values()}
        more = f" and {len(names) - 4} more" if len(names) > 4 else ""
        listing = " and ".join(sorted(repr(f.__qualname__) for f in functions))
        cure = _PLAIN
        if not all(map(is_reentrant, functions)):
            cure = (
                "Pass them to its `apply`, and return their derivatives from its "
                "`backward`; what is meant to be constant must be detached. For "
                "activation checkpointing, use torch's with `use_reentrant=False`"
            )
        raise ValueError(
            f"Evaluating {what} uses the parameters {names[:4]}{more} inside of the "
            f"autograd function {listing}, which is not given them: autograd shows no "
            "way to them (an activation checkpoint of the reentrant kind?), and their "
            f"part of every matrix would be missing. {cure}; or leave these parameters "
            "out of `params`."
        )


def _calls() -> list[tuple[type, FrameType]]:
    """Return the autograd functions on the stack and their calls, innermost first.

    It is looked for their forward passes: what calls them may be no Python code.
    """
    calls = []
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_name == "forward":
            if code not in _FORWARDS:
                _FORWARDS[code] = _function_of(code)
            if (function := _FORWARDS[code]) is not None:
                calls.append((function, frame))
        frame = frame.f_back
    return calls


def _function_of(code: CodeType) -> type | None:
    """Return the autograd function of a forward pass's code, if it is of one."""
    classes: list[type] = [Function]
    while classes:
        function = classes.pop()
        forward: Any = vars(function).get("forward")
        forward = inspect.unwrap(getattr(forward, "__func__", forward))
        if getattr(forward, "__code__", None) is code:
            return function
        classes += function.__subclasses__()
    return None


def _arguments(frame: FrameType) -> Iterator[Any]:
    """Yield what a call was given."""
    code = frame.f_code
    count = code.co_argcount + code.co_kwonlyargcount
    for name in code.co_varnames[:count]:
        yield frame.f_locals.get(name)
    if code.co_flags & inspect.CO_VARARGS:
        yield from frame.f_locals.get(code.co_varnames[count], ())
