"""Sees that a model, its parameters, the loss or listed data have changed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from functools import partial
from operator import attrgetter
from typing import Any
from warnings import catch_warnings, simplefilter

import numpy as np
import torch
from torch import Tensor, nn

from curvlinops._checksum import Checksum
from curvlinops._data import leaves_in, strided
from curvlinops._hooks import hooks_of
from curvlinops._memory import raise_if_out_of_memory
from curvlinops._objects import content_of, described, is_handle, is_value


class Watch:
    """Looks at everything that recordings depend on and that can be seen.

    Parameters
    ----------
    model_func, loss_func, params, data
        As a risk has them.

    Raises
    ------
    TypeError
        If listed data hold an object whose content cannot be looked at.

    Notes
    -----
    Three looks, cheapest first: which objects there are (modules, their tensors, hooks
    and modes, the data's tensors, arrays and numbers, by the names and in the places
    that they have), where their tensors lie, how these are read and which version they
    have, and what they contain (which sees writes through ``.data`` and NumPy). Objects
    are held, so that no other can take over their ``id``.
    """

    def __init__(
        self,
        model_func: Callable[..., Any] | None,
        loss_func: Callable[..., Any] | None,
        params: Mapping[str, Tensor],
        data: Iterable[Any],
    ) -> None:
        self._model_func, self._loss_func = model_func, loss_func
        self._params, self._data = params, data
        self._look()

    def _look(self) -> None:
        """List modules and tensors anew."""
        self._require_known()
        self._modules: list[nn.Module] = []
        self._objects, _ = self._list()
        for part in (self._model_func, self._loss_func):
            function = part.func if isinstance(part, partial) else part
            self._objects.append(getattr(function, "__self__", function))
        for x in {id(x): x for x in self._objects if isinstance(x, nn.Module)}.values():
            self._modules += x.modules()
        self._objects, self._values = self._list()
        self._ids = [*map(id, self._objects)]
        objects = {id(x): x for x in self._objects}.values()
        arrays = [
            x for x in objects if isinstance(x, np.ndarray) and not x.dtype.hasobject
        ]
        aliases = [_tensor_of(x) for x in arrays]
        self._tensors = [x for x in objects if isinstance(x, Tensor)]
        self._tensors += [t for t in aliases if t is not None]
        known = {id(x) for x, t in zip(arrays, aliases, strict=True) if t is not None}
        # Whatever else has a content that can be read.
        self._read = [x for x in objects if id(x) not in known and _is_read(x)]
        self._dense = all(t.layout is torch.strided for t in self._tensors)
        self._marks: list[Any] | None = None

    def _require_known(self) -> None:
        """Raise if data hold what cannot be looked at."""
        listed = isinstance(self._data, (list, tuple))
        for x in leaves_in(self._data) if listed else []:
            if is_value(x) or is_handle(x) or isinstance(x, Tensor) or _is_read(x):
                continue
            kind = f"{type(x).__module__}.{type(x).__qualname__}"
            raise TypeError(
                f"The data hold an object of type `{kind}`, whose content cannot be "
                "looked at: changes of it would go unseen. Pass what the model needs "
                "of it as tensors, arrays, numbers, or objects with such attributes. "
                "If it never changes, pass the batches through an iterable that is no "
                "list, e.g. `DataLoader(batches, batch_size=None)`."
            )

    def _list(self) -> tuple[list[Any], list[Any]]:
        """Return all objects that are looked at, and all values, in a fixed order."""
        objects: list[Any] = list(self._params.values())
        values: list[Any] = []
        others: list[Any] = []
        for module in self._modules:
            for named in (module._modules, module._parameters, module._buffers):
                if named:
                    objects += named.values()
                    values += named.keys()
            objects += type(module), module.training
        objects += hooks_of(self._modules)
        for part in (self._model_func, self._loss_func):
            if isinstance(part, partial):
                others += leaves_in([part.args, part.keywords], values, inside=False)
        if isinstance(self._data, (list, tuple)):
            for item in self._data:
                kind = type(item)
                if (
                    (kind is tuple or kind is list)
                    and len(item) == 2
                    and isinstance(item[0], Tensor)
                    and isinstance(item[1], Tensor)
                ):  # found fast, since there may be many
                    objects += item
                else:
                    others += leaves_in(item, values)
        for x in others:
            if is_value(x):
                values.append(described(x))
                continue
            objects.append(x)
            if isinstance(x, np.ndarray):
                values.append((x.dtype, x.shape, x.strides, x.ctypes.data))
        return objects, values

    def state(self) -> tuple[Any, ...]:
        """Return what differs whenever a recording would be stale."""
        before = self._objects  # holds its objects, so that their ids stay theirs
        objects, values = self._list()
        if [*map(id, objects)] != self._ids or values != self._values:
            self._look()
        tensors = self._tensors if self._dense else strided(self._tensors)
        marks = _marks_of(tensors)
        if not self._dense:
            marks += map(_FORM, self._tensors)
        if marks != self._marks:
            self._checksum = Checksum(tensors)
            self._marks = marks
        del before
        rest = [hash(content_of(x)) for x in self._read]
        return self._ids, self._values, marks, rest, self._checksum()


_FORM = attrgetter("dtype", "shape", "layout")
_MARKS = attrgetter("_version", "dtype", "shape")


def _marks_of(tensors: list[Tensor]) -> list[Any]:
    """Return where tensors lie, how they are read, and which version they have."""
    try:
        marks: list[Any] = [*map(_MARKS, tensors)]
    except RuntimeError as error:  # those made in inference mode have no version
        raise_if_out_of_memory(error)
        marks = [_FORM(t) if t.is_inference() else _MARKS(t) for t in tensors]
    # Faster than a loop, and this is done before every product.
    marks += map(Tensor.data_ptr, tensors)
    marks += map(Tensor.stride, tensors)
    marks += map(Tensor.is_neg, tensors)
    marks += [t.is_conj() for t in tensors if t.dtype.is_complex]
    return marks


def _is_read(x: Any) -> bool:
    """Whether something that is no tensor has a content that can be read."""
    return not isinstance(x, Tensor) and content_of(x) is not None


def _tensor_of(array: np.ndarray) -> Tensor | None:
    """Return a tensor in an array's memory, if torch knows such, and if that is all."""
    if isinstance(array, np.ma.MaskedArray):
        return None
    with suppress(TypeError, ValueError), catch_warnings():
        simplefilter("ignore")  # nothing is written into a read-only array
        return torch.from_numpy(array)
    return None
