"""Hooks of modules: functions of the user's that run along with a module."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

#: Those that run along with every module there is.
_OF_ALL: list[dict[int, Any]] = [
    nn.modules.module._global_forward_hooks,
    nn.modules.module._global_forward_pre_hooks,
    nn.modules.module._global_backward_hooks,
    nn.modules.module._global_backward_pre_hooks,
]


def hooks_of(modules: Iterable[nn.Module]) -> list[dict[int, Any]]:
    """Return all hooks that run along with some modules, by torch's numbers of them.

    Whoever registers one anew, elsewhere or for something else, gets another number.
    """
    found = [hooks for hooks in _OF_ALL if hooks]
    for m in modules:
        if m._forward_hooks or m._forward_pre_hooks:
            found += m._forward_hooks, m._forward_pre_hooks
        if m._backward_hooks or m._backward_pre_hooks:
            found += m._backward_hooks, m._backward_pre_hooks
    return found
