"""Sees that a model, its parameters, the loss or listed data have changed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from functools import partial
from typing import Any
from warnings import catch_warnings, simplefilter

import numpy as np
import torch
from torch import Tensor, nn

from curvlinops._checksum import Checksum
from curvlinops._data import leaves_in, strided

#: Types whose values are compared, not where they lie.
_VALUES = bool, int, float, complex, str, type(None), np.generic


class Watch:
    """Looks at everything that recordings depend on and that can be seen.

    Parameters
    ----------
    model_func, loss_func, params, data
        As a risk has them.

    Notes
    -----
    Three looks, cheapest first: which objects there are (modules, their tensors and
    modes, the data's tensors, arrays and numbers), where their tensors lie and which
    version they have, and what they contain (which sees writes through ``.data`` and
    NumPy). Objects are held, so that no other can take over their ``id``.
    """

    def __init__(
        self,
        model_func: Callable[..., Any],
        loss_func: Callable[..., Any] | None,
        params: Mapping[str, Tensor],
        data: Iterable[Any],
    ) -> None:
        self._model_func, self._loss_func = model_func, loss_func
        self._params, self._data = params, data
        self._look()

    def _look(self) -> None:
        """List modules and tensors anew."""
        self._modules: list[nn.Module] = []
        for part in (self._model_func, self._loss_func):
            function = part.func if isinstance(part, partial) else part
            owner = getattr(function, "__self__", function)
            if isinstance(owner, nn.Module):
                self._modules += owner.modules()
        self._objects, self._values = self._list()
        self._ids = [*map(id, self._objects)]
        objects = {id(x): x for x in self._objects}.values()
        arrays = [
            x for x in objects if isinstance(x, np.ndarray) and not x.dtype.hasobject
        ]
        aliases = [_tensor_of(x) for x in arrays]
        self._tensors = [x for x in objects if isinstance(x, Tensor)]
        self._tensors += [t for t in aliases if t is not None]
        pairs = zip(arrays, aliases, strict=True)
        self._arrays = [x for x, alias in pairs if alias is None]
        self._dense = all(t.layout is torch.strided for t in self._tensors)
        self._marks: list[Any] | None = None

    def _list(self) -> tuple[list[Any], list[Any]]:
        """Return all objects that are looked at, and all values, in a fixed order."""
        objects: list[Any] = list(self._params.values())
        others: list[Any] = []
        for module in self._modules:
            objects += module._modules.values()
            objects += module._parameters.values()
            objects += module._buffers.values()
            objects.append(module.training)
        for part in (self._model_func, self._loss_func):
            if isinstance(part, partial):
                others += leaves_in([part.args, part.keywords])
        if isinstance(self._data, (list, tuple)):
            for item in self._data:
                if isinstance(item, (list, tuple)) and all(map(torch.is_tensor, item)):
                    objects += item
                else:
                    others += leaves_in(item)
        objects += [x for x in others if isinstance(x, (Tensor, np.ndarray))]
        return objects, [x for x in others if isinstance(x, _VALUES)]

    def state(self) -> tuple[Any, ...]:
        """Return what differs whenever a recording would be stale."""
        before = self._objects  # holds its objects, so that their ids stay theirs
        objects, values = self._list()
        if [*map(id, objects)] != self._ids or values != self._values:
            self._look()
        tensors = self._tensors if self._dense else strided(self._tensors)
        marks = [
            (t.data_ptr(), 0 if t.is_inference() else t._version, t.dtype, t.shape)
            for t in tensors
        ]
        if marks != self._marks:
            self._checksum = Checksum(tensors)
            self._marks = marks
        del before
        rest = [hash(x.tobytes()) for x in self._arrays]
        return self._ids, self._values, marks, rest, self._checksum()


def _tensor_of(array: np.ndarray) -> Tensor | None:
    """Return a tensor in an array's memory, if torch knows such."""
    with suppress(TypeError, ValueError), catch_warnings():
        simplefilter("ignore")  # nothing is written into a read-only array
        return torch.from_numpy(array)
    return None
