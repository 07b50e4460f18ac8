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


class Watch:
    """Looks at everything that recordings depend on and that can be seen.

    Parameters
    ----------
    model_func, loss_func, params, data
        As a risk has them.

    Notes
    -----
    Three looks, cheapest first: which objects there are (modules, their tensors and
    modes, the data's tensors), where their tensors lie and which version they have,
    and what they contain (which sees writes through ``.data`` and NumPy). Objects are
    held, so that no other can take over their ``id``.
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
        self._objects = self._list()
        self._ids = [*map(id, self._objects)]
        objects = {id(x): x for x in self._objects}.values()
        tensors = [_tensor_of(x) for x in objects]
        self._tensors = [t for t in tensors if t is not None]
        self._dense = all(t.layout is torch.strided for t in self._tensors)
        self._marks: list[Any] | None = None

    def _list(self) -> list[Any]:
        """Return all objects that are looked at, in a fixed order."""
        objects: list[Any] = list(self._params.values())
        for module in self._modules:
            objects += module._modules.values()
            objects += module._parameters.values()
            objects += module._buffers.values()
            objects.append(module.training)
        for part in (self._model_func, self._loss_func):
            if isinstance(part, partial):
                objects += leaves_in([part.args, part.keywords])
        if isinstance(self._data, (list, tuple)):
            for item in self._data:
                if isinstance(item, (list, tuple)) and all(map(torch.is_tensor, item)):
                    objects += item
                else:
                    objects += leaves_in(item)
        return objects

    def state(self) -> tuple[Any, ...]:
        """Return what differs whenever a recording would be stale."""
        before = self._objects  # holds its objects, so that their ids stay theirs
        if [*map(id, self._list())] != self._ids:
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
        return self._ids, marks, self._checksum()


def _tensor_of(value: Any) -> Tensor | None:
    """Return a tensor in the memory of a tensor or an array of numbers."""
    if isinstance(value, Tensor):
        return value
    if isinstance(value, np.ndarray):
        with suppress(TypeError, ValueError), catch_warnings():
            simplefilter("ignore")  # nothing is written into a read-only array
            return torch.from_numpy(value)
    return None
