"""Sees that a model, its parameters, the loss or listed data have changed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from functools import partial
from operator import attrgetter, is_
from typing import Any
from warnings import catch_warnings, simplefilter

import numpy as np
import torch
from torch import Tensor, nn

from curvlinops._checksum import Checksum
from curvlinops._data import leaves_in, strided
from curvlinops._hooks import hooks_of
from curvlinops._memory import raise_if_out_of_memory
from curvlinops._objects import ATOMS, content_of, described, is_handle, is_value


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
        objects, values = self._list()
        for part in (self._model_func, self._loss_func):
            function = part.func if isinstance(part, partial) else part
            objects.append(getattr(function, "__self__", function))
        for x in {id(x): x for x in objects if isinstance(x, nn.Module)}.values():
            self._modules += x.modules()
        objects, values = self._list()
        different = {id(x): x for x in objects}.values()
        arrays = [x for x in different if isinstance(x, np.ndarray)]
        aliases = [_tensor_of(x) for x in arrays]
        self._tensors = [x for x in different if isinstance(x, Tensor)]
        self._tensors += [t for t in aliases if t is not None]
        known = {id(x) for x, t in zip(arrays, aliases, strict=True) if t is not None}
        # Whatever else has a content that can be read.
        self._read = [x for x in different if id(x) not in known and _is_read(x)]
        self._dense = all(t.layout is torch.strided for t in self._tensors)
        self._complex: list[Tensor] = []
        self._marks: list[Any] | None = None
        # Last, so that an interrupt before this lets all be listed once more.
        self._objects, self._values = objects, values
        self._ids = [*map(id, objects)]

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

    def _list(self) -> tuple[list[Any], list[Any]]:  # noqa: C901
        """Return all objects that are looked at, and all values, in a fixed order."""
        objects: list[Any] = list(self._params.values())
        values: list[Any] = []
        for module in self._modules:
            # No loop, since this is done before every product. (Those of scripted
            # modules can be iterated over by their keys only.)
            if module._modules:
                objects += module._modules.values()
                values += module._modules.keys()
            if module._parameters:
                objects += module._parameters.values()
                values += module._parameters.keys()
            if module._buffers:
                objects += module._buffers.values()
                values += module._buffers.keys()
            # Libraries that wrap modules set `forward` of the single module.
            forward = module.__dict__.get("forward")
            objects += module.__class__, module.training, forward
        for hooks in hooks_of(self._modules):
            objects += hooks.values()
            values += hooks
        for part in (self._model_func, self._loss_func):
            if isinstance(part, partial):
                _add([part.args, part.keywords], objects, values, inside=False)
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
                    _add(item, objects, values)
        return objects, values

    def state(self) -> tuple[Any, ...]:
        """Return what differs whenever a recording would be stale."""
        before = self._objects  # held, so that their ids stay theirs
        objects, values = self._list()
        if (
            len(objects) != len(before)
            or not all(map(is_, objects, before))
            or values != self._values
        ):
            self._look()
        tensors = self._tensors if self._dense else strided(self._tensors)
        if self._marks_of(tensors) != self._marks:
            self._checksum = Checksum(tensors)
            self._complex = [t for t in tensors if t.is_complex()]
            self._marks = self._marks_of(tensors)
        del before
        rest = [hash(content_of(x)) for x in self._read]
        return self._ids, self._values, self._marks, rest, self._checksum()

    def _marks_of(self, tensors: list[Tensor]) -> list[Any]:
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
        marks += map(Tensor.is_conj, self._complex)
        if not self._dense:
            marks += map(_FORM, self._tensors)
        return marks


def _add(nest: Any, objects: list[Any], values: list[Any], inside: bool = True) -> None:
    """Add a nest's leaves to objects or values, and its form to values."""
    values.append(len(objects))
    for x in leaves_in(nest, values, inside):
        kind = type(x)
        if kind in ATOMS:
            values += kind, x
        elif isinstance(x, Tensor):
            objects.append(x)
            values.append(None)  # one of the objects lies here
        elif is_value(x):
            values.append(described(x))
        else:
            objects.append(x)
            values.append(_memory_of(x) if isinstance(x, np.ndarray) else None)


def _memory_of(array: np.ndarray) -> tuple[Any, ...]:
    """Return how an array is read and, if that is not done from itself, where it lies.

    The latter takes as long as reading a small one.
    """
    place = array.ctypes.data if array.size >= _LARGE else 0
    return array.dtype, array.shape, array.strides, place


#: Arrays with as many entries are read as tensors, by the checksum.
_LARGE = 1 << 12
_FORM = attrgetter("dtype", "shape", "layout")
_MARKS = attrgetter("_version", "dtype", "shape")


def _is_read(x: Any) -> bool:
    """Whether something that is no tensor has a content that can be read."""
    return not isinstance(x, Tensor) and content_of(x) is not None


def _tensor_of(array: np.ndarray) -> Tensor | None:
    """Return a tensor in a large array's memory, if torch knows such, and it is all."""
    if array.size < _LARGE or isinstance(array, np.ma.MaskedArray):
        return None
    with suppress(TypeError, ValueError), catch_warnings():
        simplefilter("ignore")  # nothing is written into a read-only array
        return torch.from_numpy(array)
    return None
