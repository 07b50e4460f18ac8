"""Private copies of modules, whose parameters are others and whose buffers copies."""

from __future__ import annotations

import copy
import copyreg
import io
import threading
import types
import warnings
from collections import OrderedDict
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from curvlinops._compiled import is_wrapper, module_behind
from curvlinops._memory import raise_if_out_of_memory
from curvlinops._once import told_before


def private_copy(module: nn.Module, aliases: dict[str, nn.Parameter]) -> nn.Module:
    """Deep-copy a module with its parameters aliased and its buffers copied.

    Raises
    ------
    UncopiedError
        If it cannot be, but for locks, files and the like, which the copy shares.
    """
    memo: dict[int, Any] = {}
    for part in module.modules():
        # What hooks left behind (weight normalisation, say) is recomputed anyway, but
        # only leaves can be deep-copied, and those not sparse.
        for value in [*vars(part).values(), *part._buffers.values()]:
            dense = torch.is_tensor(value) and value.layout is torch.strided
            if torch.is_tensor(value) and not (dense and value.is_leaf):
                memo[id(value)] = value.detach().clone()
    for name, parameter in module.named_parameters(remove_duplicate=False):
        memo.setdefault(id(parameter), nn.Parameter(parameter.detach(), False))
        if name in aliases:
            memo[id(parameter)] = aliases[name]
    try:
        return _deep_copy(module, dict(memo))
    except Exception as error:  # whatever a user's `__deepcopy__` or attribute raises
        raise_if_out_of_memory(error)
        memo |= {id(handle): handle for handle in _handles(module)}
        try:
            return _deep_copy(module, dict(memo))
        except Exception as error:
            raise_if_out_of_memory(error)
            raise UncopiedError(_culprit(module, memo), error) from error


class UncopiedError(Exception):
    """A module cannot be copied. Holds what cannot, in words, and the error."""


#: Types of what has no copy, and belongs to no module: a copy of one may share it.
_HANDLES = (
    *(type(threading.Lock()), type(threading.RLock()), threading.Condition),
    *(threading.Event, threading.Semaphore, threading.Barrier, threading.Thread),
    *(threading.local, types.ModuleType, io.IOBase),
)


def _handles(module: nn.Module) -> Iterator[Any]:
    """Yield the locks, files and the like that a module has, or some of its objects."""
    waiting = [vars(part) for part in module.modules()]
    seen = {*map(id, waiting)}
    while waiting:
        for value in waiting.pop().values():
            if isinstance(value, _HANDLES):
                yield value
            elif isinstance(inside := getattr(value, "__dict__", None), dict):
                ours = isinstance(value, nn.Module | torch.Tensor | type)
                if not ours and id(inside) not in seen:
                    seen.add(id(inside))
                    waiting.append(inside)


def _culprit(module: nn.Module, memo: dict[int, Any]) -> str:
    """Say which attribute of a module cannot be copied, from trying one by one."""
    for name, part in module.named_modules():
        for attribute, value in vars(part).items():
            if attribute in ("_modules", "_parameters", "_buffers"):
                continue
            try:
                _deep_copy(value, dict(memo))
            except Exception as error:
                raise_if_out_of_memory(error)
                label = f"{name}.{attribute}" if name else attribute
                return f"its attribute `{label}`, a `{type(value).__name__}`,"
    for name, part in reversed([*module.named_modules()]):  # from the innermost
        try:
            _deep_copy(part, dict(memo))
        except Exception as error:
            raise_if_out_of_memory(error)
            where = f"its submodule `{name}`" if name else "it"
            return f"{where}, a `{type(part).__name__}`,"
    return "it"


#: Types whose values are their own copies.
_ATOMS = frozenset({type(None), bool, int, float, str, torch.dtype})


def _deep_copy(value: Any, memo: dict[int, Any]) -> Any:
    """Do what `copy.deepcopy` does, but ordinary modules in a fifth of the time.

    These are copied attribute by attribute, everything else is left to the original.
    In place of a compiled module stands a copy of the one behind it.
    """
    kind: Any = type(value)
    if kind in _ATOMS:
        return value
    if id(value) in memo:
        return memo[id(value)]
    if is_wrapper(value):
        if (behind := module_behind(value)) is value:
            raise TypeError("A compiled module's own hooks are lost in copies of it.")
        memo[id(value)] = new = _deep_copy(behind, memo)
        return new
    if isinstance(value, nn.Module) and _is_ordinary(kind):
        memo[id(value)] = new = kind.__new__(kind)
        state = value.__getstate__()
        new.__setstate__({k: _deep_copy(v, memo) for k, v in state.items()})
        return new
    if kind is dict:
        memo[id(value)] = new = {}
        new.update({_deep_copy(k, memo): _deep_copy(v, memo) for k, v in value.items()})
        return new
    if kind in (OrderedDict, set) and not value:
        memo[id(value)] = new = kind()
        return new
    return copy.deepcopy(value, memo)


@lru_cache(maxsize=256)
def _is_ordinary(kind: type[nn.Module]) -> bool:
    """Whether a class of modules says nothing about how it is copied."""
    own = [base for base in kind.__mro__ if base not in (nn.Module, object)]
    return (
        all(_COPYING.isdisjoint(vars(base)) for base in own)
        and _COPYING & vars(nn.Module).keys() <= {"__getstate__", "__setstate__"}
        and kind not in copyreg.dispatch_table
    )


#: Attributes of a class that `copy.deepcopy` heeds.
_COPYING = {
    *("__deepcopy__", "__reduce__", "__reduce_ex__", "__getnewargs__"),
    *("__getnewargs_ex__", "__getstate__", "__setstate__", "__new__", "__slots__"),
}


def warn_about_threads(module: nn.Module, what: str, error: Exception) -> None:
    """Warn, once for a module, that it cannot be used elsewhere during products."""
    if told_before(module, warn_about_threads):
        return
    warnings.warn(
        f"The model of type `{type(module).__name__}` is evaluated in place, since "
        f"{what} cannot be copied ({type(error).__name__}: {error}). During a product, "
        "its parameters are replaced: another thread that trains it meanwhile gets "
        "wrong gradients, or none (`p.grad is None`). Give what cannot be copied a "
        "method `__deepcopy__`, or keep other threads from the model meanwhile.",
        stacklevel=2,
    )
