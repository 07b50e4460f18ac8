"""Covariances with as few operations as their symmetry and structure allow."""

from __future__ import annotations

from itertools import product
from math import prod
from typing import Any

import torch
from torch import Tensor

from curvlinops.kfac._recording import Use
from curvlinops.kfac._uses import batched, each, padded, padding_of

#: A covariance is computed in bands of at least so many rows, ...
LEAST_BAND = 64
#: ... of which there are at most so many.
MOST_BANDS = 16
#: What the covariance of unfolded patches costs, relative to a full product.
PLAIN_COST = 0.6


def gram(total: Tensor, rows: Tensor, fresh: bool = False) -> None:
    r"""Add :math:`X^\top X` of every group's rows, half of it; see :func:`mirror`.

    Parameters
    ----------
    total : Tensor
        Of shape ``(G, d, d)``; of what is below the diagonal, most is left as it is.
        If it is ``(G, d)``, the diagonal is added.
    rows : Tensor
        The rows :math:`X`.
    fresh : bool, optional
        Whether ``total`` holds nothing yet, and is to be overwritten.
    """
    rows = rows.to(total.dtype)
    beta = 0 if fresh else 1
    if total.ndim == 2:
        square = rows.square().sum(1)
        total.copy_(square) if fresh else total.add_(square)
        return
    for band in _bands(rows.shape[-1]):
        behind = slice(band.start, None)
        part = rows[..., band].mT
        total[:, band, behind].baddbmm_(part, rows[..., behind], beta=beta)


def mirror(total: Tensor, divisor: Any = 1) -> Tensor:
    """Fill, in place, the part of a symmetric matrix that :func:`gram` leaves out.

    Divide by a number, or by one for every group.
    """
    if torch.is_tensor(divisor) and divisor.ndim:
        divisor = divisor.reshape(-1, *[1] * (total.ndim - 1))
    if total.ndim == 2:
        return total.div_(divisor)
    for band in _bands(total.shape[-1]):
        total[:, band, band.start :].div_(divisor)
        total[:, band.stop :, band] = total[:, band, band.stop :].mT
    return total


def _bands(d: int) -> list[slice]:
    """Return bands of rows, of multiples of 16 since these are multiplied faster."""
    width = max(LEAST_BAND, -(-d // MOST_BANDS + 15) // 16 * 16)
    return [slice(i, min(i + width, d)) for i in range(0, d, width)]


def patch_covariance(
    total: Tensor, use: Use, joint: bool, fresh: bool = False
) -> int | None:
    r"""Add the covariance of the patches that a convolution of stride one sees.

    With a kernel of size :math:`K`, offsets :math:`k, l` and pixels :math:`x_q`,

    .. math::

        \sum_{q \in W_k} x_q x_{q + l - k}^\top

    is the block for :math:`(k, l)`, with :math:`W_k` the pixels at which offset
    :math:`k` of the kernel comes to lie. The sum over *all* pixels depends on
    :math:`l - k` only: it is one product of two shifted images, for half of the
    :math:`(2 K - 1)^d` differences. The pixels outside of :math:`W_k` are few rows and
    columns at the border, whose part is subtracted by inclusion and exclusion.

    Parameters
    ----------
    total : Tensor
        Of shape ``(G, n, n)``.
    use : Use
        The convolution.
    joint : bool
        Whether the last row and column belong to a bias.
    fresh : bool, optional
        Whether ``total`` holds nothing yet, and is to be overwritten.

    Returns
    -------
    int or None
        The number of patches; ``None`` if this way is not open, or takes longer.
    """
    o = use.options
    kernel = o.get("kernel", ())
    dims = len(kernel)
    steps = {*each(o.get("stride", 1), dims), *each(o.get("dilation", 1), dims)}
    if (
        use.kind != "convolution"
        or steps != {1}
        or total.ndim != 3
        or prod(kernel) == 1
    ):
        return None
    image = Image(batched(use, use.checked_input()), o.get("groups", 1), kernel)
    padding = padding_of(use)
    patches = prod(
        s + sum(p) - k + 1 for s, p, k in zip(image.size, padding, kernel, strict=True)
    )
    differences = (prod(2 * k - 1 for k in kernel) + 1) // 2
    if differences * prod(image.padded) > PLAIN_COST * prod(kernel) ** 2 * patches:
        return None
    G, C, _ = image.flat(total.dtype).shape
    offsets = list(product(*map(range, kernel)))
    blocks = total.new_empty(G, len(offsets), C, len(offsets), C)
    for i, k in enumerate(offsets):
        outside = [
            [*range(max(0, a - lo)), *range(s - max(0, w - 1 - hi - a), s)]
            for a, (lo, hi), w, s in zip(k, padding, kernel, image.size, strict=True)
        ]
        for j, other in enumerate(offsets[i:], start=i):
            shift = tuple(b - a for a, b in zip(k, other, strict=True))
            block = image.correlation(shift, outside)
            blocks[:, i, :, j] = block
            blocks[:, j, :, i] = block.mT
    n = C * len(offsets)
    matrix = total[:, :n, :n].unflatten(2, (C, -1)).unflatten(1, (C, -1))
    blocks = blocks.permute(0, 2, 1, 4, 3)
    matrix.copy_(blocks) if fresh else matrix.add_(blocks)
    rows = patches * image.count
    if joint:
        if fresh:
            total[:, :, n:] = total[:, n:] = 0
        sums = _patch_sums(use, kernel, padding).to(total.dtype).reshape(G, n)
        total[:, :n, n] += sums
        total[:, n, :n] += sums
        total[:, n, n] += rows
    return rows


def _patch_sums(use: Use, kernel: Any, padding: Any) -> Tensor:
    """Return the sum of all patches, of shape ``[C, *kernel]``."""
    x = padded(batched(use, use.checked_input()), padding)
    sums = x.sum(0)
    for k in kernel:  # one axis after the other goes to the end
        sums = sums.unfold(1, sums.shape[1] - k + 1, 1).sum(-1).movedim(1, -1)
    return sums


class Image:
    """Images with zeros between them, so that shifts become shifts of one long row.

    Parameters
    ----------
    x : Tensor
        Of shape ``[N, C, *size]``.
    groups : int
        Number of groups of channels.
    kernel : sequence of int
        Largest shift plus one, along every axis.
    """

    def __init__(self, x: Tensor, groups: int, kernel: Any) -> None:
        self.count, _, *self.size = x.shape
        pixels = padded(x.transpose(0, 1), [(0, k - 1) for k in kernel])
        self.pixels = pixels.unflatten(0, (groups, -1)).contiguous()
        self.padded = pixels.shape[2:]
        self._known: dict[Any, Tensor | None] = {}

    def flat(self, dtype: Any) -> Tensor:
        """Return all pixels as ``(G, C / G, N * pixels)``, from now on in ``dtype``."""
        self.pixels = self.pixels.to(dtype)
        return self.pixels.flatten(2)

    def correlation(self, shift: tuple[int, ...], outside: list[list[int]]) -> Tensor:
        """Sum ``x_q x_{q + shift}^T`` over pixels outside of some rows, columns."""
        total = self._sum(shift, (None,) * len(shift))
        assert total is not None
        for fixed in product(*([None, *out] for out in outside)):
            if any(f is not None for f in fixed):
                sign = (-1) ** sum(f is not None for f in fixed)
                part = self._sum(shift, fixed)
                total = total if part is None else total + sign * part
        return total

    def _sum(
        self, shift: tuple[int, ...], fixed: tuple[int | None, ...]
    ) -> Tensor | None:
        """Sum over the pixels with some coordinates fixed; ``None`` if it is zero."""
        if (shift, fixed) not in self._known:
            self._known[shift, fixed] = self._product(shift, fixed)
        return self._known[shift, fixed]

    def _product(
        self, shift: tuple[int, ...], fixed: tuple[int | None, ...]
    ) -> Tensor | None:
        left = right = self.pixels
        step, width = 0, 1
        for axis in reversed(range(len(shift))):
            at, by = fixed[axis], shift[axis]
            if at is None:
                step, width = step + by * width, width * self.padded[axis]
                continue
            if not 0 <= at + by < self.size[axis]:
                return None
            left, right = left.select(3 + axis, at), right.select(3 + axis, at + by)
        left, right = left.flatten(2), right.flatten(2)
        if step < 0:
            return self._cut(right, left, -step).mT
        return self._cut(left, right, step)

    @staticmethod
    def _cut(left: Tensor, right: Tensor, step: int) -> Tensor:
        M = left.shape[-1]
        return left[..., : M - step] @ right[..., step:].mT
