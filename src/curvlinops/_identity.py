"""What a function is made of, as a value: the name of the matrix that it multiplies by.

Two operators of one risk share recordings exactly if their bodies cannot be told apart.
So a body is named by what it does, not by its author: by its code, and by everything
that this code gets from elsewhere.
"""

from __future__ import annotations

from collections.abc import Hashable
from types import FunctionType
from typing import Any

from curvlinops._walk import walked


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


def key_of(body: Any, risk: Any, *marks: Hashable) -> Identity | None:
    """Return the name under which products with ``body`` are recorded.

    Parameters
    ----------
    body : callable
        A function, or an object that can be called.
    risk : EmpiricalRisk
        The risk, to which the body may refer.
    *marks : hashable
        What else tells the products apart.

    Returns
    -------
    Identity or None
        ``None`` if the body cannot be told from others, hence is not recorded; or if
        the risk has met too many.
    """
    walk = walked(body, risk)
    if walk is None:
        return None
    known: Identity | None = risk.admitted((*marks, *walk.marks), walk.held)
    return known


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
    from around it, global ones included, and so on for the functions among these. An
    object is its class and its attributes. Of classes and modules those attributes
    count whose names are in the code, and methods that are called without a name.
    Numbers and strings count by value. What comes with Python, torch, NumPy or SciPy
    does not change.

    Cost: a few microseconds for functions that capture little.
    """
    walk = walked(body, risk)
    return None if walk is None else Identity((*marks, *walk.marks), walk.held)
