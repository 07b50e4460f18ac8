r"""The geometry of layers: a use of a weight as rows of inputs and of output gradients.

A parameter is viewed as :math:`G` matrices of shape :math:`(m, n)` such that its
gradient by anything is a sum over *positions* :math:`r` of outer products,

.. math::

    \nabla_W = \sum_r b_r a_r^\top , \qquad b_r \in \mathbb{R}^m , \quad
    a_r \in \mathbb{R}^n ,

with inputs :math:`a_r` and gradients :math:`b_r` by the outputs. A linear layer has one
position per datum (or several, if its input has more axes), a convolution one per
output pixel whose :math:`a_r` is the input's patch, an embedding one per token whose
:math:`a_r` is a unit vector. A parameter that scales or shifts is a column
(:math:`n = 1`) with one position, and :math:`b` its gradient on one datum.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from math import prod
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from curvlinops._order import Order
from curvlinops.kfac._recording import Use, rows_without

Shape: TypeAlias = tuple[int, ...]
#: Most bytes of an embedding's inputs as unit vectors.
MOST_UNIT_BYTES = 1 << 31


@dataclass(frozen=True)
class Layout:
    r"""How a weight, and maybe a bias, are ``G`` matrices ``(m, n)``.

    The weight is reshaped to ``view``, its axes are put in ``order``, and the result is
    reshaped to ``(G, m, n)``. The bias is one more column.

    Attributes
    ----------
    names : tuple of str
        The weight's name, or weight and bias.
    shapes : tuple of shapes
        Their shapes.
    view, order : tuple of int
        See above.
    size : tuple of int
        ``(G, m, n)``, with the bias.
    """

    names: tuple[str, ...]
    shapes: tuple[Shape, ...]
    view: Shape
    order: Shape
    size: Shape

    @property
    def groups(self) -> int:
        """The number of matrices."""
        return self.size[0]

    def gather(self, tensors: list[Tensor]) -> Tensor:
        """Turn ``[K, *shape]`` for each name into ``[K, G, m, n]``."""
        K, (G, m, n) = len(tensors[0]), self.size
        order = (0, *(i + 1 for i in self.order))
        W = tensors[0].reshape(K, *self.view).permute(order)
        if len(tensors) == 1:
            return W.reshape(K, G, m, n)
        parts = [W.reshape(K, G, m, n - 1), tensors[1].reshape(K, G, m, 1)]
        return torch.cat(parts, dim=-1)

    def as_view(self, tensor: Tensor) -> Tensor | None:
        """Return a view ``[K, G, m, n]`` of ``[K, *shape]``, if there is one."""
        if len(self.names) == 2 or list(self.order) != sorted(self.order):
            return None
        return tensor.view(len(tensor), *self.size)

    def scatter(self, M: Tensor) -> list[Tensor]:
        """Turn ``[K, G, m, n]`` into ``[K, *shape]`` for each name."""
        K = len(M)
        inner = [self.view[i] for i in self.order]
        inverse = (0, *(self.order.index(i) + 1 for i in range(len(self.order))))
        W = M if len(self.names) == 1 else M[..., :-1]
        tensors = [W.reshape(K, *inner).permute(inverse).reshape(K, *self.shapes[0])]
        if len(self.names) == 2:
            tensors.append(M[..., -1].reshape(K, *self.shapes[1]))
        return tensors


@dataclass(frozen=True)
class Kind:
    """What is known about one kind of use.

    Attributes
    ----------
    layout : callable
        Maps weight shape and use to ``view, order, (G, m, n)``.
    inputs, outputs : callable
        Map use and number of data (the latter also the gradient by the result) to rows
        ``[G, N, R, n]`` and ``[G, N, R, m]``, for one datum all there are.
    rows : callable
        Maps use and a tensor of the result's shape to rows ``[*axes, entries]``, each
        of which is some datum's.
    seen : callable
        Maps use to what these rows are computed from, ``[*axes, ...]``.
    """

    layout: Callable[[Shape, Use], tuple[Shape, Shape, Shape]]
    inputs: Callable[[Use, int], Tensor]
    outputs: Callable[[Use, Tensor, int], Tensor]
    rows: Callable[[Use, Tensor], Tensor]
    seen: Callable[[Use], Tensor]


def axes_of(use: Use) -> Shape:
    """Return the lengths of the axes whose rows are some datum's."""
    like = torch.empty(use.shape, device="meta")
    return tuple(KINDS[use.kind].rows(use, like).shape[:-1])


def data_first(x: Tensor, N: int, use: Use) -> Tensor:
    """Reshape ``[*axes, d]`` to ``[N, R, d]``, with the data's axis in front."""
    if N > 1:
        assert isinstance(use.place, Order)
        x = use.place.data_first(x, N)
    return x.reshape(N, -1, x.shape[-1])


# -- products with a matrix ---------------------------------------------------------


def _matrix_layout(shape: Shape, use: Use) -> tuple[Shape, Shape, Shape]:
    _, G = use.options.get("slot", (0, 1))
    m, n = shape
    return (G, m // G, n), (0, 1, 2), (G, m // G, n)


def _flipped_layout(shape: Shape, use: Use) -> tuple[Shape, Shape, Shape]:
    return shape, (1, 0), (1, *shape[::-1])


def _columns(use: Use, x: Tensor) -> Tensor:
    return x.mT if use.options.get("columns") else x


def _matrix_inputs(use: Use, N: int) -> Tensor:
    x = _columns(use, use.checked_input())
    return data_first(x, N, use).unsqueeze(0)


def _matrix_outputs(use: Use, g: Tensor, N: int) -> Tensor:
    return data_first(_columns(use, g), N, use).unsqueeze(0)


# -- embeddings ---------------------------------------------------------------------


def token_ids(use: Use, N: int) -> Tensor:
    """Return an embedding's tokens, of shape ``[N, R]``."""
    ids = use.checked_input().unsqueeze(-1).long()
    return data_first(ids, N, use)[..., 0]


def _embedding_inputs(use: Use, N: int) -> Tensor:
    ids, V = token_ids(use, N), use.options["size"]
    nbytes = ids.numel() * V * use.options["dtype"].itemsize
    if nbytes > MOST_UNIT_BYTES:
        raise MemoryError(
            f"A batch's inputs of the embedding {use.weight!r}, {ids.numel()} unit "
            f"vectors of length {V}, would take {nbytes} bytes. Use smaller batches, "
            "KFAC with `kfac_approx='expand'`, which only counts tokens, or leave this "
            "parameter out of `params`."
        )
    units = torch.zeros(*ids.shape, V, dtype=use.options["dtype"], device=ids.device)
    units.scatter_(-1, ids.unsqueeze(-1), 1)
    if (padding := use.options["padding"]) is not None:
        units[..., padding] = 0
    return units.unsqueeze(0)


def _embedding_outputs(use: Use, g: Tensor, N: int) -> Tensor:
    """Return the gradients, zero where a token is padding and the weight not used."""
    if (padding := use.options["padding"]) is not None:
        g = g * (use.checked_input() != padding).unsqueeze(-1)
    return _matrix_outputs(use, g, N)


# -- convolutions -------------------------------------------------------------------


def each(value: Any, dims: int) -> list[int]:
    return list(value) if isinstance(value, (tuple, list)) else [value] * dims


def padding_of(use: Use) -> list[tuple[int, int]]:
    """Return the zeros in front of and behind every spatial axis."""
    kernel, padding = use.options["kernel"], use.options.get("padding", 0)
    dims = len(kernel)
    if padding == "valid":
        return [(0, 0)] * dims
    if padding == "same":
        dilation = each(use.options.get("dilation", 1), dims)
        total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        return [(t // 2, t - t // 2) for t in total]
    return [(p, p) for p in each(padding, dims)]


def padded(x: Tensor, padding: list[tuple[int, int]]) -> Tensor:
    """Pad (or crop, if negative) the last axes by zeros."""
    flat = list(chain.from_iterable(reversed(padding)))
    return F.pad(x, flat) if any(flat) else x


def pixels(use: Use) -> int:
    """Return how many rows of a result are one image's; a plain row is one."""
    dims = len(use.options.get("kernel", ()))
    return use.shape[-dims:].numel() if dims else 1


def batched(use: Use, x: Tensor) -> Tensor:
    """Add the batch axis that an unbatched image lacks."""
    return x.unsqueeze(0) if x.ndim == len(use.options["kernel"]) + 1 else x


def _patches(
    x: Tensor, kernel: Shape, stride: list[int], dilation: list[int]
) -> Tensor:
    """View a padded image ``[N, C, *size]`` as patches ``[N, C, *out, *kernel]``."""
    N, C, *size = x.shape
    out = [
        (s - d * (k - 1) - 1) // t + 1
        for s, k, t, d in zip(size, kernel, stride, dilation, strict=True)
    ]
    steps = x.stride()[2:]
    strides = [
        *x.stride()[:2],
        *(t * s for t, s in zip(stride, steps, strict=True)),
        *(d * s for d, s in zip(dilation, steps, strict=True)),
    ]
    return x.as_strided((N, C, *out, *kernel), strides)


def _patch_rows(patches: Tensor, dims: int, G: int) -> Tensor:
    """Sort patches into rows ``[G, N, R, C / G * K]``, a view of their transpose.

    Copied in this order, runs along the last image axis stay together.
    """
    N, C, *rest = patches.shape
    R = prod(rest[:dims])
    order = (1, *range(2 + dims, 2 + 2 * dims), 0, *range(2, 2 + dims))
    columns = patches.permute(order).reshape(G, C // G * prod(rest[dims:]), N, R)
    return columns.permute(0, 2, 3, 1)


def _convolution_layout(shape: Shape, use: Use) -> tuple[Shape, Shape, Shape]:
    G = use.options.get("groups", 1)
    out, *inner = shape
    size = (G, out // G, prod(inner))
    return size, (0, 1, 2), size


def _convolution_inputs(use: Use, N: int) -> Tensor:
    o, kernel = use.options, use.options["kernel"]
    dims, G = len(kernel), use.options.get("groups", 1)
    x = padded(batched(use, use.checked_input()), padding_of(use))
    stride, dilation = (each(o.get(k, 1), dims) for k in ("stride", "dilation"))
    return _split(_patch_rows(_patches(x, kernel, stride, dilation), dims, G), N, use)


def _transposed_layout(shape: Shape, use: Use) -> tuple[Shape, Shape, Shape]:
    G = use.options.get("groups", 1)
    inner, out, *kernel = shape
    view = (G, inner // G, out, prod(kernel))
    return view, (0, 2, 1, 3), (G, out, inner // G * prod(kernel))


def _transposed_inputs(use: Use, N: int) -> Tensor:
    """Return the patches of the plain convolution that gives the same result.

    It runs over the input with zeros put between its pixels, with the kernel reversed.
    """
    o, kernel = use.options, use.options["kernel"]
    dims, G = len(kernel), use.options.get("groups", 1)
    stride, padding, extra, dilation = (
        each(o.get(k, default), dims)
        for k, default in (
            ("stride", 1),
            ("padding", 0),
            ("output_padding", 0),
            ("dilation", 1),
        )
    )
    x = batched(use, use.checked_input())
    size = [(s - 1) * t + 1 for s, t in zip(x.shape[2:], stride, strict=True)]
    spread = x.new_zeros(*x.shape[:2], *size)
    every: list[Any] = [..., *(slice(None, None, t) for t in stride)]
    spread[tuple(every)] = x
    border = [
        (d * (k - 1) - p, d * (k - 1) - p + e)
        for k, p, e, d in zip(kernel, padding, extra, dilation, strict=True)
    ]
    patches = _patches(
        padded(spread, border).contiguous(), kernel, [1] * dims, dilation
    )
    patches = patches.flip(list(range(-dims, 0)))
    return _split(_patch_rows(patches, dims, G), N, use)


def _convolution_outputs(use: Use, g: Tensor, N: int) -> Tensor:
    G = use.options.get("groups", 1)
    g = batched(use, g).flatten(2)
    columns = g.transpose(0, 1).reshape(G, -1, len(g), g.shape[-1])
    return _split(columns.permute(0, 2, 3, 1), N, use)


def _images(use: Use, t: Tensor) -> Tensor:
    return batched(use, t).flatten(1)


def _split(rows: Tensor, N: int, use: Use) -> Tensor:
    """Reshape ``[G, M, R, d]`` to ``[G, N, M / N * R, d]``."""
    G, M, _, d = rows.shape
    if N not in (1, M):
        assert isinstance(use.place, Order)
        rows = use.place.data_first(rows.transpose(0, 1), N).permute(2, 0, 1, 3, 4)
    return rows if M == N else rows.reshape(G, N, -1, d)


# -- scales and shifts --------------------------------------------------------------


def _elementwise_layout(shape: Shape, use: Use) -> tuple[Shape, Shape, Shape]:
    size = (1, prod(shape), 1)
    return size, (0, 1, 2), size


def _elementwise_inputs(use: Use, N: int) -> Tensor:
    return use.input.new_ones(1, N, 1, 1)


def _elementwise_outputs(use: Use, g: Tensor, N: int) -> Tensor:
    """Return every datum's gradient by the parameter, ``[1, N, 1, m]``."""
    if use.input.ndim or use.input != 1:
        g = g * use.checked_input()
    rows = rows_without(g, use.options["size"])
    if N > 1 and isinstance(use.place, Tensor):
        rows = rows.reshape(-1, rows.shape[-1])
        owners = use.place.where(use.place >= 0, N)
        sums = rows.new_zeros(N + 1, rows.shape[-1])
        rows = sums.index_add(0, owners, rows)[:N]
    else:
        rows = data_first(rows, N, use).sum(1)
    rows = rows.reshape(1, N, 1, -1)
    if (part := use.options.get("part")) is None:
        return rows
    i, parts = part
    return F.pad(rows, (i * rows.shape[-1], (parts - 1 - i) * rows.shape[-1]))


def _elementwise_rows(use: Use, t: Tensor) -> Tensor:
    return rows_without(t, use.options["size"])


def _elementwise_seen(use: Use) -> Tensor:
    assert use.sums is not None
    return use.sums.unsqueeze(-1)


def _matrix_seen(use: Use) -> Tensor:
    return _columns(use, use.input)


def _embedding_seen(use: Use) -> Tensor:
    seen: Tensor = use.input.unsqueeze(-1)
    return seen


def _images_seen(use: Use) -> Tensor:
    return batched(use, use.input)


_MATRIX = (_matrix_inputs, _matrix_outputs, _columns, _matrix_seen)
KINDS: dict[str, Kind] = {
    "linear": Kind(_matrix_layout, *_MATRIX),
    "linear-transposed": Kind(_flipped_layout, *_MATRIX),
    "embedding": Kind(
        *(_flipped_layout, _embedding_inputs, _embedding_outputs, _columns),
        _embedding_seen,
    ),
    "convolution": Kind(
        *(_convolution_layout, _convolution_inputs, _convolution_outputs, _images),
        _images_seen,
    ),
    "transposed-convolution": Kind(
        *(_transposed_layout, _transposed_inputs, _convolution_outputs, _images),
        _images_seen,
    ),
    "elementwise": Kind(
        *(_elementwise_layout, _elementwise_inputs, _elementwise_outputs),
        *(_elementwise_rows, _elementwise_seen),
    ),
}
