"""All that a function or an object is made of, as a list of marks."""

from __future__ import annotations

import builtins
import dis
import sys
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from functools import cached_property, lru_cache, partial, reduce
from types import (
    BuiltinFunctionType,
    ClassMethodDescriptorType,
    CodeType,
    FunctionType,
    GetSetDescriptorType,
    MemberDescriptorType,
    MethodDescriptorType,
    MethodType,
    ModuleType,
    WrapperDescriptorType,
)
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from curvlinops._spaces import TensorSpace

#: Values that are told apart by equality, once their types are known.
_PLAIN = {
    *(type(None), bool, int, str, bytes, range, type(...), type(NotImplemented)),
    *(torch.dtype, torch.device, torch.layout, torch.Size),
}
#: Values that are told apart by what they print, since equality does not see all.
_PRINTED = {float, complex}
#: Objects that are told apart by which they are, since they do not change.
_FIXED = (
    *(GetSetDescriptorType, MemberDescriptorType),
    *(MethodDescriptorType, ClassMethodDescriptorType, WrapperDescriptorType),
    *(Enum, TensorSpace),
)
#: Packages whose functions and classes do not change: they are not looked into.
_LIBRARIES = {*("torch", "numpy", "scipy", "curvlinops"), *sys.stdlib_module_names}
#: How code loads variables from around all functions.
_LOADS = "LOAD_GLOBAL", "LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS"
#: What reaches variables whose names are not in the code.
_DYNAMIC = {"__import__", "eval", "exec", "globals"}
#: Methods with two underscores that are called by name, if at all.
_CALLED_BY_NAME = {
    *("__init__", "__new__", "__init_subclass__", "__class_getitem__", "__del__"),
    *("__setattr__", "__delattr__", "__repr__", "__str__", "__format__", "__dir__"),
    *("__reduce__", "__reduce_ex__", "__getstate__", "__setstate__", "__sizeof__"),
    *("__copy__", "__deepcopy__"),
}
#: Most marks of a function that is told apart: it is looked at before every product.
_MOST = 1000


def walked(body: Any, risk: Any) -> Walk | None:
    """Look into all that a function is made of, if that can be told."""
    walk = Walk(risk)
    try:
        walk.value(body)
        if walk.names and walk.owners:
            walk.attributes()
    except (_UnknownError, RecursionError):
        return None
    return walk


class _UnknownError(Exception):
    """Something cannot be told apart from others of its kind."""


class Walk:
    """Notes all that a function is made of."""

    def __init__(self, risk: Any) -> None:
        self._risk = risk
        #: Where marks of what is being looked into, or not looked into twice, begin.
        self._places: dict[int, int] = {}
        #: Names in the code, and what has attributes that they may refer to.
        self.names: dict[str, None] = {}
        self.owners: list[_Owner] = []
        self._classes: set[type] = set()
        self.marks: list[Any] = []
        self.held: list[Any] = []

    def value(self, value: Any) -> None:
        """Look into anything."""
        kind: Any = type(value)
        marks = self.marks
        if kind in _PLAIN:
            marks += (kind, value)
            if kind is str:
                self.names[value] = None  # for `getattr`
        elif kind in _PRINTED:
            marks += (kind, repr(value))
        elif (place := self._places.get(id(value))) is not None:
            marks.append(place)
        elif len(marks) > _MOST:
            raise _UnknownError
        else:
            self._places[id(value)] = len(marks)
            marks.append(kind)
            _way_into(kind)(self, value)
            if kind in _MAY_BE_EQUAL:
                del self._places[id(value)]

    def attributes(self) -> None:
        """Look into attributes whose names are in the code, or are called unnamed."""
        asked: list[int] = []
        while asked != [len(self.names)] * len(self.owners):
            asked += [0] * (len(self.owners) - len(asked))
            for number, owner in enumerate([*self.owners]):
                names = [*self.names][asked[number] :]
                asked[number] += len(names)
                for namespace in owner.namespaces:
                    for name in filter(namespace.__contains__, names):
                        value = namespace[name]
                        if owner.looked_into or type(value) in _PLAIN | _PRINTED:
                            self.marks += (number, name)
                            self.value(value)

    def _same(self, value: Any) -> None:
        """Mark an object by which it is."""
        self.held.append(value)
        self.marks.append(id(value))

    def _class(self, kind: type) -> None:
        """Note a class whose methods and attributes may count."""
        if _is_library_class(kind) or kind in self._classes:
            return
        own = [vars(base) for base in kind.__mro__ if not _is_library_class(base)]
        self._classes.add(kind)
        self.owners.append(_Owner(True, own))
        for namespace in own:
            for name, method in [*namespace.items()]:
                if (
                    type(method) is FunctionType
                    and name[:2] == "__" == name[-2:]
                    and name not in _CALLED_BY_NAME
                ):
                    self.marks.append(name)
                    self.value(method)

    def _object(self, value: Any) -> None:
        if value is self._risk:
            self.owners.append(_Owner(False, [vars(value)]))
        else:
            self._attributes_of(value)
        self._class(type(value))

    def _type(self, value: type) -> None:
        self._same(value)
        self._class(value)
        self._class(type(value))

    def _module(self, value: ModuleType) -> None:
        self._same(value)
        own = not _is_library(value.__name__)
        self.owners.append(_Owner(own, [vars(value)]))

    def _fixed(self, value: Any) -> None:
        self._same(value)
        self._class(type(value))

    def _library(self, value: Any) -> None:
        if not _is_of_library(value):
            raise _UnknownError
        self._same(value)

    def _number(self, value: np.number[Any]) -> None:
        self.marks.append(value.tobytes())

    def _data_type(self, value: np.dtype[Any]) -> None:
        self.marks.append(repr(value))

    def _property(self, value: property) -> None:
        self.value(value.fget)

    def _cached_property(self, value: cached_property[Any]) -> None:
        self.value(value.func)

    def _named_tuple(self, value: tuple[Any, ...]) -> None:
        self._sequence(value)
        self._class(type(value))

    def _sequence(self, value: tuple[Any, ...] | list[Any]) -> None:
        if len(value) > _MOST:
            raise _UnknownError
        self.marks.append(len(value))
        for part in value:
            self.value(part)

    def _mapping(self, value: dict[Any, Any]) -> None:
        self.marks.append(len(value))
        for key, part in [*value.items()]:  # others may write meanwhile
            self.value(key)
            self.value(part)

    def _attributes_of(self, value: Any) -> None:
        attributes = vars(value)
        self.marks.append(len(attributes))
        for name, part in [*attributes.items()]:  # others may write meanwhile
            self.marks.append(name)
            self.value(part)

    def _partial(self, value: partial[Any]) -> None:
        self.value(value.func)
        self._sequence(value.args)
        self._mapping(value.keywords)

    def _wrapped(
        self, value: staticmethod[Any, Any] | classmethod[Any, Any, Any]
    ) -> None:
        self.value(value.__func__)

    def _method(self, value: MethodType | BuiltinFunctionType) -> None:
        """Look into a method, and the object it belongs to."""
        if isinstance(value, MethodType):
            self.value(value.__func__)
        elif value.__self__ is None or isinstance(value.__self__, (type, ModuleType)):
            self._same(value)  # a function
            return
        else:
            self.marks.append(value.__name__)
        self.value(value.__self__)

    def _function(self, function: FunctionType) -> None:  # noqa: C901
        code, surroundings = function.__code__, function.__globals__
        self._same(code)
        if function.__defaults__ or function.__kwdefaults__:
            self.value(function.__defaults__)
            self.value(function.__kwdefaults__)
        for cell in function.__closure__ or ():
            try:
                self.value(cell.cell_contents)
            except ValueError:  # not assigned yet
                raise _UnknownError from None
        if _is_library(surroundings.get("__name__")):
            return
        names = _names_in(code)
        self.names.update(names.attributes)
        for name in names.variables:
            if name in surroundings:
                self.value(surroundings[name])
            elif hasattr(builtins, name) and name not in _DYNAMIC:
                self.value(getattr(builtins, name))
            else:
                raise _UnknownError  # or it may come later
        for name in names.modules:
            if name not in sys.modules:
                raise _UnknownError
            self.value(sys.modules[name])
        if function.__dict__:
            self._attributes_of(function)


class _Owner(NamedTuple):
    """Something with attributes: a class or a module.

    Of what is not looked into, only numbers and strings count.
    """

    looked_into: bool
    namespaces: Sequence[Mapping[str, Any]]


#: How to look into values of a type, and of its subclasses.
_WAYS: dict[type, Callable[[Walk, Any], None]] = {
    type: Walk._type,
    ModuleType: Walk._module,
    **dict.fromkeys(_FIXED, Walk._fixed),
    type(vars(_Owner)["namespaces"]): Walk._fixed,  # of any field of a named tuple
    np.number: Walk._number,
    np.dtype: Walk._data_type,
    property: Walk._property,
    cached_property: Walk._cached_property,
}
#: The same, of a type alone.
_WAYS_OF_ONE: dict[type, Callable[[Walk, Any], None]] = {
    FunctionType: Walk._function,
    BuiltinFunctionType: Walk._method,
    MethodType: Walk._method,
    tuple: Walk._sequence,
    list: Walk._sequence,
    dict: Walk._mapping,
    partial: Walk._partial,
    staticmethod: Walk._wrapped,
    classmethod: Walk._wrapped,
}
#: Of which one and the same object counts as much as one that is equal.
_MAY_BE_EQUAL = {tuple, list, dict, partial}


class _Names(NamedTuple):
    """What code refers to by name: as in `Walk`, each as an ordered set."""

    variables: dict[str, None]
    modules: dict[str, None]
    attributes: dict[str, None]


#: By the ``id`` of the code, and the code, which is kept for its ``id``.
_KNOWN: dict[int, tuple[_Names, CodeType]] = {}


def _names_in(code: CodeType) -> _Names:
    """Return the names in code, and in the functions that it defines."""
    if (known := _KNOWN.get(id(code))) is not None:
        return known[0]
    names = _Names({}, {}, dict.fromkeys(code.co_names))
    for instruction in dis.get_instructions(code):
        if instruction.opname in _LOADS:
            names.variables[instruction.argval] = None
        elif instruction.opname == "IMPORT_NAME":
            names.modules[instruction.argval] = None
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            for all_names, more in zip(names, _names_in(constant), strict=True):
                all_names.update(more)
        elif isinstance(constant, str):  # for `getattr`
            names.attributes[constant] = None
    _KNOWN[id(code)] = names, code
    return names


@lru_cache(4096)
def _is_library(module: Any) -> bool:
    """Whether a module of that name does not change."""
    return isinstance(module, str) and module.partition(".")[0] in _LIBRARIES


def _is_of_library(value: Any) -> bool:
    """Whether something is what a library has under its name."""
    module, name = getattr(value, "__module__", None), getattr(value, "__name__", None)
    if not isinstance(module, str) or not isinstance(name, str):
        return False
    path = getattr(value, "__qualname__", name).split(".")
    start: Any = sys.modules.get(module) if _is_library(module) else None
    return reduce(lambda part, name: getattr(part, name, None), path, start) is value


@lru_cache(4096)
def _is_library_class(kind: type) -> bool:
    """Whether a class is written in C, or what a library has under its name."""
    return not kind.__flags__ & _ON_THE_HEAP or _is_of_library(kind)


#: A flag of classes that are made by a class statement.
_ON_THE_HEAP = 1 << 9


@lru_cache(4096)
def _way_into(kind: type) -> Callable[[Walk, Any], None]:
    """Return how to look into objects of a type."""
    if kind in _WAYS_OF_ONE:
        return _WAYS_OF_ONE[kind]
    for base, way in _WAYS.items():
        if issubclass(kind, base):
            return way
    if issubclass(kind, tuple) and kind.__basicsize__ == tuple.__basicsize__:
        return Walk._named_tuple
    return Walk._object if _keeps_all_in_attributes(kind) else Walk._library


def _keeps_all_in_attributes(kind: type) -> bool:
    """Whether an object of a class consists of nothing but its attributes."""
    if issubclass(kind, (Tensor, np.ndarray, torch.nn.Module)):
        return False
    # Slots, and what classes of C keep out of sight, take room in the object.
    pointers = (kind.__dictoffset__ > 0) + (kind.__weakrefoffset__ > 0)
    size = object.__basicsize__ + pointers * tuple.__itemsize__
    return bool(kind.__dictoffset__) and kind.__basicsize__ == size
