"""What a function is made of, as a value: the name of the matrix that it multiplies by.

Two operators of one risk share recordings exactly if their bodies cannot be told apart.
So a body is named by what it does, not by its author: by its code, and by everything
that this code gets from elsewhere.
"""

from __future__ import annotations

import builtins
import dis
import sys
from collections.abc import Hashable
from functools import cache, partial
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from curvlinops._spaces import TensorSpace

#: Values that are told apart by what they print.
_PLAIN = (
    *(type(None), bool, int, float, complex, str, bytes, range, type(...)),
    *(torch.dtype, torch.device, torch.layout, torch.Size),
)
#: Objects that are told apart by which they are, since they do not change.
_FIXED = (
    *(type, ModuleType, BuiltinFunctionType, type(str.join)),
    *(np.ufunc, TensorSpace),
)
#: Most marks of a function that is told apart: it is looked at before every product.
_MOST = 1000


class Identity:
    """A function's name, equal to that of every function that does the same.

    Parameters
    ----------
    marks : tuple
        What the function is made of.
    held : list
        Objects that marks stand for, so that no others take over their ``id``.
    """

    __slots__ = ("_hash", "_held", "_marks")

    def __init__(self, marks: tuple[Any, ...], held: list[Any]) -> None:
        self._marks, self._held, self._hash = marks, held, hash(marks)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Identity) and self._marks == other._marks

    def __hash__(self) -> int:
        return self._hash


#: In place of an identity: the product is not recorded, since its body is no linear
#: function of the vectors.
UNRECORDED = Identity((), [])


def key_of(method: str, body: Any, risk: Any, given: Any = None) -> Identity | None:
    """Return the name under which a product with ``body`` is recorded.

    Parameters
    ----------
    method : str
        The loop over data that runs it.
    body : callable
        A function, or an object that can be called.
    risk : EmpiricalRisk
        The risk, to which the body may refer.
    given : Identity, optional
        The name, where it is known already, or :data:`UNRECORDED`.

    Returns
    -------
    Identity or None
        ``None`` if the body cannot be told from others, hence is not recorded.

    Raises
    ------
    TypeError
        If a name is given that others might use, too.
    """
    if given is None:
        return identity_of(body, risk, method)
    if isinstance(given, Identity):
        return None if given is UNRECORDED else given
    raise TypeError(
        f"A matrix is not named by {given!r}: two operators of one name would multiply "
        "by each other's matrix. The body tells it apart from others, so leave the "
        f"name out: `self.risk.{method}(body, V, self._title())`."
    )


def checked_owner(key: Any) -> Any:
    """Return a key under which something is kept, if nobody else can have it.

    Raises
    ------
    TypeError
        If it does not begin with a class or function.
    """
    if isinstance(key, tuple) and key and isinstance(key[0], (type, FunctionType)):
        return key
    raise TypeError(
        f"Results are not kept under {key!r}, which others might use, too: pass a "
        "tuple that begins with your own class or function, "
        "`once((type(self), ...), compute)`."
    )


def identity_of(body: Any, risk: Any = None, *marks: Hashable) -> Identity | None:
    """Return what a function or an object is made of.

    Parameters
    ----------
    body : Any
        The function or object.
    risk : Any, optional
        An object that stands for itself.
    *marks : hashable
        What else the name is made of.

    Returns
    -------
    Identity or None
        ``None`` if that cannot be told: where tensors, arrays or objects written in C
        are captured, which may change unseen.

    Notes
    -----
    A function is its code, its defaults, and the values of the variables that it takes
    from around it, global ones included. What can be imported under its own name is
    taken for what it is now. An object is its class and its attributes. Numbers and
    strings count by value, modules, classes and functions of C by which they are.

    Cost: a microsecond or two for functions that capture little.
    """
    walk = _Walk(risk)
    try:
        walk.body(body)
    except (_UnknownError, RecursionError):
        return None
    return Identity((*marks, *walk.marks), walk.held)


class _UnknownError(Exception):
    """Something cannot be told apart from others of its kind."""


class _Walk:
    """Notes all that a function is made of."""

    def __init__(self, risk: Any) -> None:
        self._risk = risk
        self._open: dict[int, int] = {}
        self.marks: list[Any] = []
        self.held: list[Any] = []

    def body(self, value: Any) -> None:
        """Look into a function, or an object that can be called."""
        if isinstance(value, FunctionType):
            self._function(value)
            return
        self._value(value)
        if isinstance(call := vars(type(value)).get("__call__"), FunctionType):
            self._function(call)

    def _same(self, value: Any) -> None:
        """Mark an object by which it is."""
        self.held.append(value)
        self.marks.append(id(value))

    def _value(self, value: Any) -> None:
        kind = type(value)
        if len(self.marks) > _MOST:
            raise _UnknownError
        if kind in _PLAIN or isinstance(value, np.dtype):
            self.marks += (kind, repr(value))
        elif value is self._risk:
            self.marks.append("the risk")
        elif isinstance(value, _FIXED) or _is_importable(value):
            self._same(value)
        elif id(value) in self._open:
            self.marks.append(self._open[id(value)])
        else:
            self._open[id(value)] = len(self._open)
            self.marks.append(kind)
            self._compound(value, kind)
            del self._open[id(value)]

    def _compound(self, value: Any, kind: type) -> None:
        """Look into what consists of other values."""
        if kind is FunctionType:
            self._function(value)
        elif kind in (tuple, list):
            self.marks.append(len(value))
            for part in value:
                self._value(part)
        elif kind is dict:
            self.marks.append(len(value))
            for key, part in value.items():
                self._value(key)
                self._value(part)
        elif kind is MethodType:
            self._value(value.__func__)
            self._value(value.__self__)
        elif kind is partial:
            self._value(value.func)
            self._value(value.args)
            self._value(value.keywords)
        elif _keeps_all_in_attributes(kind):
            self._value(vars(value))
        else:
            raise _UnknownError

    def _function(self, function: FunctionType) -> None:
        code, surroundings = function.__code__, function.__globals__
        self._same(code)
        self._same(surroundings)
        for captured in (function.__defaults__, function.__kwdefaults__):
            if captured is not None:
                self._value(captured)
        for cell in function.__closure__ or ():
            try:
                self._value(cell.cell_contents)
            except ValueError:  # not assigned yet
                raise _UnknownError from None
        for name in _global_names(code):
            if name in surroundings:
                self._value(surroundings[name])
            elif not hasattr(builtins, name):
                raise _UnknownError  # it may come later


#: Names of global variables by the ``id`` of the code that asks for them, and the code.
_NAMES: dict[int, tuple[tuple[str, ...], CodeType]] = {}


def _global_names(code: CodeType) -> tuple[str, ...]:
    """Return the names of the global variables that code asks for."""
    if (known := _NAMES.get(id(code))) is not None:
        return known[0]
    loads = ("LOAD_GLOBAL", "LOAD_NAME")
    found = (i.argval for i in dis.get_instructions(code) if i.opname in loads)
    names = dict.fromkeys(found)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            names.update(dict.fromkeys(_global_names(constant)))
    _NAMES[id(code)] = tuple(names), code
    return tuple(names)


def _is_importable(value: Any) -> bool:
    """Whether something is a function, and what its module has under its name."""
    if not isinstance(value, FunctionType):
        return False
    module = sys.modules.get(value.__module__)
    return getattr(module, value.__qualname__, None) is value


@cache
def _keeps_all_in_attributes(kind: type) -> bool:
    """Whether an object of a class consists of nothing but its attributes."""
    if issubclass(kind, (Tensor, np.ndarray, torch.nn.Module)):
        return False
    # Classes of C keep something out of sight, and so do slots.
    return all(
        _is_python_class(base) and not vars(base).get("__slots__")
        for base in kind.__mro__[:-1]
    )


def _is_python_class(kind: type) -> bool:
    """Whether a class was made by a class statement: on the heap, and open."""
    return kind.__flags__ & (1 << 8 | 1 << 9) == 1 << 9
