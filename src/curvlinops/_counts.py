"""Whole numbers as users give them: everything that Python can take as an index."""

from __future__ import annotations

import operator
from typing import Any

#: Types of truth values, which Python would take as an index, too.
_BOOLS = {str(bool), "bool", "torch.bool"}


def as_count(value: Any) -> int | None:
    """Return a whole number as ``int``; ``None`` if it is none.

    That is, what has ``__index__``: Python's and NumPy's integers, and 0-d integer
    tensors. Truth values and arrays with an axis are no numbers here.
    """
    if getattr(value, "ndim", 0) or str(getattr(value, "dtype", type(value))) in _BOOLS:
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def count(name: str, value: Any, least: int | None = 0, hint: str = "") -> int:
    """Return an argument that counts something, or raise naming it.

    Parameters
    ----------
    name : str
        What the argument is called.
    value : Any
        What was given.
    least : int or None, optional
        The smallest that makes sense, 0 or 1; ``None`` for all.
    hint : str, optional
        A sentence that ends the message.

    Raises
    ------
    ValueError
        If it is no whole number, or below ``least``.

    Examples
    --------
    >>> import numpy as np, torch
    >>> count("rank", np.int64(3)), count("rank", torch.tensor(3))
    (3, 3)
    """
    number = as_count(value)
    if number is None or (least is not None and number < least):
        kind = "positive whole number" if least else "whole number"
        kind += " from 0 on" * (least == 0)
        raise ValueError(
            f"`{name}` must be a {kind}, got {value!r}." + f" {hint}" * bool(hint)
        )
    return number


def optional_count(name: str, value: Any, least: int = 0) -> int | None:
    """Return the same of an argument that may be absent, ``None``."""
    return None if value is None else count(name, value, least)
