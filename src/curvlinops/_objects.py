"""What the user's data are made of: containers and objects, taken apart and copied."""

from __future__ import annotations

import copy
import datetime
import decimal
import enum
import fractions
import functools
import io
import logging
import pathlib
import re
import types
import uuid
import weakref
from collections import UserDict, deque
from collections.abc import Iterable, Mapping, MutableMapping
from contextlib import suppress
from threading import Lock, RLock
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from curvlinops._memory import raise_if_out_of_memory

#: Types whose values never change, hence are compared by what they are.
_VALUES = (
    *(bool, int, float, complex, str, bytes, type(None), type(...), range, slice),
    *(np.generic, np.dtype, torch.dtype, torch.device, torch.layout, torch.Size),
    *(
        torch.finfo,
        torch.iinfo,
        torch.qscheme,
        torch.memory_format,
        enum.Enum,
        uuid.UUID,
        re.Pattern,
        pathlib.PurePath,
    ),
    *(decimal.Decimal, fractions.Fraction, datetime.date, datetime.time),
    *(datetime.timedelta, datetime.tzinfo),
)
#: Types that hold no data: of these it is compared which object there is.
_HANDLES = (
    *(type, types.FunctionType, types.BuiltinFunctionType, types.MethodType),
    *(types.ModuleType, weakref.ref, type(Lock()), type(RLock()), nn.Module),
    *(torch.Generator, torch.Stream, torch.Event, io.IOBase, logging.Logger),
    *(np.random.Generator, np.random.RandomState, np.random.BitGenerator, np.ufunc),
)
#: The commonest of these types, and no subclasses, which are looked for first.
ATOMS = frozenset({bool, int, str, bytes, type(None)})
#: Containers whose attributes, if a class adds such, are not their items.
_BUILTIN = (dict, list, tuple, set, frozenset, deque)


def is_value(value: Any) -> bool:
    """Whether something never changes, hence is compared by what it is."""
    kind: Any = type(value)
    return _are_values(kind)


@functools.lru_cache(maxsize=512)
def _are_values(kind: type) -> bool:
    return issubclass(kind, _VALUES)


@functools.lru_cache(maxsize=512)
def _have_no_parts(kind: type) -> bool:
    return issubclass(kind, (Tensor, *_VALUES, *_HANDLES))


def parts_of(value: Any) -> tuple[list[Any], list[Any]] | None:  # noqa: C901
    """Return what a container or an object is made of.

    Returns
    -------
    labels, parts : list
        Keys, or names of attributes, and what lies there; the only label of a sequence
        is its length. ``None`` for what is not taken apart.
    """
    kind: Any = type(value)
    if kind is tuple or kind is list:
        return [len(value)], [*value]
    if kind is dict:
        return _labels(value), [*value.values()]
    if _have_no_parts(kind):
        return None
    if isinstance(value, Mapping):
        labels, parts = _labels(value), [*value.values()]
    elif isinstance(value, _BUILTIN):
        labels, parts = [len(value)], [*value]
    elif isinstance(value, np.ndarray):
        if not value.dtype.hasobject:
            return None
        return [value.shape], value.ravel().tolist()
    elif isinstance(value, functools.partial):
        return [], [value.func, value.args, value.keywords]
    else:
        names = None if is_array(value) else attributes_of(value)
        if names is None:
            return None
        return [*names], [_attribute(value, name) for name in names]
    if isinstance(value, (UserDict, *_BUILTIN)):
        beside = _beside(value)
        labels, parts = [*labels, *beside], [*parts, *beside.values()]
    return labels, parts


def _beside(value: Any) -> dict[str, Any]:
    """Return the attributes of a container, but not those in which its items are.

    Nor those that a tokenizer's result keeps for itself, whatever they are.
    """
    own = _own(value) or {}
    if own is value:  # a dictionary whose items are attributes
        return {}
    if isinstance(value, UserDict):
        return {n: x for n, x in own.items() if n != "data" and not n.startswith("_")}
    return own if isinstance(value, _BUILTIN) else {}


def with_parts(value: Any, parts: Iterable[Any]) -> Any:
    """Return a copy of a container or an object that is made of other parts.

    Raises
    ------
    TypeError
        If it is an object that cannot be copied.
    """
    parts, kind = list(parts), type(value)
    new: Any
    if isinstance(value, np.ndarray):
        new = np.empty(value.size, dtype=object)
        for place, part in enumerate(parts):
            new[place] = part
        return new.reshape(value.shape)
    if isinstance(value, functools.partial):
        return kind(parts[0], *parts[1], **parts[2])
    if isinstance(value, Mapping):
        new = _mapping_with(value, parts[: len(value)])
    elif isinstance(value, tuple):
        items = parts[: len(value)]
        new = kind._make(items) if hasattr(kind, "_make") else kind(items)
    elif isinstance(value, (list, deque)):
        new = copy.copy(value)
        new.clear()
        new.extend(parts[: len(value)])
    elif isinstance(value, (set, frozenset)):
        new = kind(parts[: len(value)])
    else:
        new = _shell(value)
        _set_attributes(new, zip(attributes_of(value) or [], parts, strict=True))
        return new
    if _own(value) is value:
        new.__dict__ = new
    elif rest := parts[len(value) :]:
        _set_attributes(new, zip(_beside(value), rest, strict=True))
    return new


def _shell(value: Any) -> Any:
    """Return another object of the same kind, whose attributes are to be set."""
    try:
        return copy.copy(value)
    except Exception as error:  # whatever a user's class raises
        raise_if_out_of_memory(error)
        with suppress(TypeError):
            return object.__new__(type(value))
        raise TypeError(
            f"An object of type {type(value).__qualname__} in the data has tensors "
            f"that are to be moved or copied, but cannot be copied itself: {error}"
        ) from error


def _set_attributes(value: Any, items: Iterable[tuple[str, Any]]) -> None:
    """Set attributes, whatever the class says about that."""
    own = _own(value) or {}
    for name, part in items:
        if name in own:
            own[name] = part
        else:
            object.__setattr__(value, name, part)


def _mapping_with(value: Mapping[Any, Any], parts: list[Any]) -> Any:
    items = dict(zip(value, parts, strict=True))
    if isinstance(value, MutableMapping):
        new = copy.copy(value)
        for key, part in items.items():
            new[key] = part
        return new
    try:
        return type(value)(items)  # type: ignore[call-arg]
    except TypeError:
        return items


def is_object(value: Any) -> bool:
    """Whether something has parts, but is neither a mapping nor a sequence."""
    return not isinstance(value, (Mapping, list, tuple)) and bool(parts_of(value))


def attributes_of(value: Any) -> list[str] | None:
    """Return the names of an object's attributes; ``None`` if it can have none."""
    kind: Any = type(value)
    names = [name for name in _slots(kind) if _has(value, name)]
    if (own := _own(value)) is not None:
        return [*names, *own]
    has_slots = any("__slots__" in vars(base) for base in kind.__mro__)
    return names if has_slots or kind is object else None


@functools.lru_cache(maxsize=512)
def _slots(kind: type) -> list[str]:
    """Return the names of the slots of a class, as attributes."""
    found: list[str] = []
    for base in kind.__mro__:
        slots = vars(base).get("__slots__", ())
        for name in [slots] if isinstance(slots, str) else [*slots]:
            if name.startswith("__") and not name.endswith("__"):
                name = f"_{base.__name__.lstrip('_')}{name}"
            if name not in ("__dict__", "__weakref__"):
                found.append(name)
    return found


def _has(value: Any, name: str) -> bool:
    try:
        object.__getattribute__(value, name)
    except AttributeError:
        return False
    return True


def _attribute(value: Any, name: str) -> Any:
    own = _own(value) or {}
    return own[name] if name in own else object.__getattribute__(value, name)


def _own(value: Any) -> dict[str, Any] | None:
    """Return the attributes of an object that are in no slots, if it can have such.

    Without asking its class, which may answer to every name.
    """
    try:
        return object.__getattribute__(value, "__dict__")
    except AttributeError:
        return None


def _labels(mapping: Mapping[Any, Any]) -> list[Any]:
    """Return what differs if keys do; those that are no values by which they are."""
    if {*map(type, mapping)} == {str}:
        return [*mapping]
    return [(type(key), key if is_value(key) else id(key)) for key in mapping]


def is_array(value: Any) -> bool:
    """Whether an object's content is an array that NumPy can read."""
    kind = type(value)
    if not (hasattr(kind, "__array__") or hasattr(kind, "__array_interface__")):
        return False
    own = _own(value) or {}
    return not any(isinstance(part, Tensor) for part in own.values())


def described(value: Any) -> Any:
    """Return what differs if, and only if, something that never changes does.

    NaN is equal to itself, and 1 is neither 1.0 nor True.
    """
    if isinstance(value, (float, complex, decimal.Decimal)):
        return type(value), repr(value)
    if isinstance(value, np.generic):
        return type(value), value.dtype, value.tobytes()
    return type(value), value


def content_of(value: Any) -> bytes | None:
    """Return the content of an array, or of what has one; ``None`` if it has none."""
    if type(value) is np.ndarray and not value.dtype.hasobject:
        return value.tobytes()
    if isinstance(value, np.ma.MaskedArray):
        return value.data.tobytes() + np.ma.getmaskarray(value).tobytes()
    if not isinstance(value, np.ndarray):
        with suppress(TypeError, ValueError):
            return memoryview(value).tobytes()
        if not is_array(value):
            return None
        value = np.asarray(value)
    return repr(value.tolist()).encode() if value.dtype.hasobject else value.tobytes()


def is_handle(value: Any) -> bool:
    """Whether something is no data itself, such as a function or a lock."""
    return isinstance(value, _HANDLES) or callable(value)
