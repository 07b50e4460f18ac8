"""Models that `torch.compile` has wrapped: what is behind them, and how they are run.

Compiled code has no second derivative. So the module behind it is evaluated, and
functions that are compiled inside of a model, or a loss, run as they were written.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

#: Something of the process: what reads it, what sets it, and what it should be.
Switch = tuple[Callable[[], Any], Callable[[Any], Any], Any]

#: What stands in the names of a compiled module's parameters.
_PREFIX = "_orig_mod."


def module_behind(model: Any) -> Any:
    """Return the module that a compiled one wraps, and anything else as it is.

    A wrapper with hooks of its own stays, so that these run.
    """
    while is_wrapper(model) and not _has_hooks(model):
        model = model._orig_mod
    return model


def is_wrapper(model: Any) -> bool:
    """Whether a model is what `torch.compile` makes of a module."""
    frames: Any = sys.modules.get("torch._dynamo.eval_frame")
    return frames is not None and isinstance(model, frames.OptimizedModule)


def plain_name(name: str) -> str:
    """Return a parameter's name without what `torch.compile` has put into it."""
    return name.replace(_PREFIX, "")


def switches() -> list[Switch]:
    """Return what makes compiled functions run as they were written.

    Nothing is imported for that: who has compiled something has loaded it.
    """
    frames: Any = sys.modules.get("torch._dynamo.eval_frame")
    if not hasattr(frames, "_stance"):
        return []
    read, turn = (partial(f, frames, "_stance") for f in (getattr, setattr))
    return [(read, turn, frames.DynamoStance("force_eager"))]


def _has_hooks(module: nn.Module) -> bool:
    names = ("_forward_hooks", "_forward_pre_hooks")
    return any(vars(module).get(name) for name in names)
