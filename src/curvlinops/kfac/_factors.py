r"""The mathematics of Kronecker factors: covariances, corrections, nearest products.

With the rows :math:`a_r, b_r` of a layer (see :mod:`curvlinops.kfac._uses`) the block
of the matrix that belongs to a weight is

.. math::

    F = \frac{1}{D} \sum_{n, k}
        \operatorname{vec}(M_{nk}) \operatorname{vec}(M_{nk})^\top , \qquad
    M_{nk} = \sum_{r} b_{nkr} a_{nr}^\top ,

over data :math:`n`, vectors :math:`k` that are sent back (the columns of a factor of
the loss's Hessian, or samples), and positions :math:`r`; :math:`D` is what the loss
divides by. The estimators below approximate it by :math:`B \otimes A`, or in the
eigenbasis of such a product.
"""

from __future__ import annotations

import warnings
from dataclasses import replace
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from curvlinops.kfac._covariance import gram, patch_covariance
from curvlinops.kfac._estimation import (
    Block,
    Estimation,
    Settings,
    Sums,
    Visitor,
    product,
)
from curvlinops.kfac._layers import Batch, Gradients, Layer
from curvlinops.kfac._rows import parts_among, slots
from curvlinops.kfac._uses import token_ids


class Covariances(Visitor):
    """Sums up the covariances of inputs and of output gradients."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._forward_only = settings.fisher.fisher_type == "forward-only"
        self.sums: dict[str, Sums] = {}
        self._warned: set[str] = set()

    def of(self, layer: Layer) -> Sums:
        """Return a layer's sums; at first they are empty."""
        if layer.name not in self.sums:
            use = layer.uses[0][0]
            dtype = use.options.get("dtype", use.input.dtype)
            like = use.input.new_empty(0, dtype=dtype)
            count = self._zeros(layer, like, 1, diagonal=True)[:, 0]
            sums = Sums(replace(layer, uses=[]), count=count)
            self.sums[layer.name] = sums
        sums = self.sums[layer.name]
        if sums.swapped is None and any(swapped for _, swapped in layer.uses):
            like = sums.count
            _, m, n = layer.layout.size
            parts = self._zeros(layer, like, n), self._zeros(layer, like, m)
            sums.swapped = (*parts, torch.zeros_like(like))
        return sums

    def _zeros(
        self,
        layer: Layer,
        like: Tensor,
        d: int,
        diagonal: bool = False,
        filled: bool = True,
    ) -> Tensor:
        G = layer.layout.groups
        shape = (G, d) if diagonal or self._is_large(layer, d) else (G, d, d)
        dtype = torch.promote_types(like.dtype, torch.float32)
        new = torch.zeros if filled else torch.empty
        return new(shape, dtype=dtype, device=like.device)

    def _empty(
        self, layer: Layer, like: Tensor, d: int, diagonal: bool = False
    ) -> tuple[Tensor, bool]:
        """Return memory for a sum, and whether its first term must overwrite it.

        That saves clearing it; otherwise it is zero.
        """
        (use, swapped), *others = layer.uses
        if others or swapped or "slot" in use.options or diagonal:
            return self._zeros(layer, like, d, diagonal), False
        return self._zeros(layer, like, d, filled=False), True

    def _is_large(self, layer: Layer, size: int) -> bool:
        if size <= self.settings.max_factor:
            return False
        if layer.name not in self._warned and not layer.elementwise:
            self._warned.add(layer.name)
            warnings.warn(
                f"A factor of {layer.name!r} would have the shape ({size}, {size}): "
                "only its diagonal is kept. To keep all of it, raise "
                f"`max_factor={self.settings.max_factor}`.",
                stacklevel=2,
            )
        return True

    def start(self, batch: Batch) -> None:
        """Check that all parameters can be treated so."""
        if self._forward_only and batch.diagonal:
            raise ValueError(
                f"`fisher_type='forward-only'` sends nothing back, so {batch.diagonal} "
                "cannot be given a diagonal block: leave them out of `params`."
            )
        if self.settings.reduce and not batch.sure:
            raise ValueError(
                "It is not known which rows of the layers and of the model's output "
                "belong to which datum, so there is no mean over them: use "
                "`kfac_approx='expand'`, or return the outputs datum by datum."
            )

    def done(self, batch: Batch, layer: Layer) -> None:
        """Add a layer's inputs: now, that gradients and most of the graph are gone."""
        s = self.of(layer)
        if layer.elementwise:
            if self._forward_only:
                self._add_identity(s, batch, layer)
            return
        fresh = s.A is None
        if fresh:
            units = _counts_tokens(layer, self.settings)
            d = layer.layout.size[2]
            s.A, fresh = self._empty(layer, s.count, d, units)
            s.counts_tokens = units
        N = batch.size
        for groups, uses in slots(layer, swapped=False):
            s.count[groups] += self._add_input(s.A[groups], layer, uses, N, fresh)
        for _, uses in slots(layer, swapped=True):
            s.swapped[2].add_(self._add_input(s.swapped[1], layer, uses, N))

    def _add_input(
        self, A: Tensor, layer: Layer, uses: list[Any], N: int, fresh: bool = False
    ) -> int:
        """Add to ``A``; return the number of inputs."""
        if not self.settings.reduce:
            return sum(_add_expanded(A, layer, use, fresh) for use in uses)
        parts = parts_among(slice(None), uses)
        rows = [part.inputs(layer, N) for part in parts]
        R = _total(
            [part.numbers(layer, N, a) for part, a in zip(parts, rows, strict=True)]
        )
        gram(A, _total([a.sum(2) for a in rows]) / R.clamp(min=1), fresh)
        return int(R.count_nonzero())

    def add(self, batch: Batch, layer: Layer, grads: Gradients) -> None:
        """Add a layer's output gradients."""
        s = self.of(layer)
        fresh = s.B is None
        if fresh:
            s.B, fresh = self._empty(layer, s.count, layer.layout.size[1])
        for groups, uses in slots(layer, swapped=False):
            N = batch.size
            s.rows += self._add_output(s.B[groups], layer, uses, grads, N, fresh)
        for _, uses in slots(layer, swapped=True):
            self._add_output(s.swapped[0], layer, uses, grads, batch.size)

    def _add_output(
        self,
        B: Tensor,
        layer: Layer,
        uses: list[Any],
        grads: Gradients,
        N: int,
        fresh: bool = False,
    ) -> int:
        """Add to ``B``; return the number of rows."""
        if self.settings.reduce or layer.elementwise:
            parts = parts_among(slice(None), uses)
            rows = [part.outputs(layer, grads, N) for part in parts]
            b = _total([b.sum(3) for b in rows]).flatten(1, 2)
            gram(B, b, fresh)
            return b.shape[1]
        number = 0
        for use in uses:
            b = layer.outputs(use, grads[id(use)], 1).flatten(1, 3)
            gram(B, b, fresh)
            number += b.shape[1]
        return number

    def _add_identity(self, s: Sums, batch: Batch, layer: Layer) -> None:
        """Add what white noise in place of gradients gives."""
        if s.B is None:
            m = layer.layout.size[1]
            s.B = self._zeros(layer, s.count, m, diagonal=True)
        for use, _ in layer.uses:
            c = use.checked_input().expand(1, *use.shape)
            s.B += layer.outputs(use, c, batch.size).sum((1, 2, 3))
            s.count += c.numel() / s.B.shape[1]

    def finish(self, denominator: Any) -> None:
        """Note what makes means of the sums; pool uses with exchanged roles."""
        for s in self.sums.values():
            number = s.count.clamp(min=1)
            if self._forward_only and not s.layer.elementwise:
                s.B = s.count[:, None].repeat(1, s.layer.layout.size[1])
            if s.swapped is not None:
                _pool(s, self._forward_only)
                number = s.count.clamp(min=1)
            s.divisors = (number if self._forward_only else denominator), number


def _diagonal(factor: Tensor) -> Tensor:
    return factor if factor.ndim == 2 else factor.diagonal(dim1=1, dim2=2)


def _total(tensors: list[Tensor]) -> Tensor:
    return reduce(torch.add, tensors)


def _counts_tokens(layer: Layer, settings: Settings) -> bool:
    """Whether the input covariance is diagonal: unit vectors, one at a time."""
    return not settings.reduce and all(
        use.kind == "embedding" or swapped for use, swapped in layer.uses
    )


def _add_expanded(A: Tensor, layer: Layer, use: Any, fresh: bool) -> int:
    """Add every position's input; return their number."""
    if use.kind == "embedding":
        ids = token_ids(use, 1).flatten()
        if (padding := use.options["padding"]) is not None:
            ids = ids[ids != padding]
        counts = torch.bincount(ids, minlength=A.shape[1]).to(A.dtype)
        target = A if A.ndim == 2 else A.diagonal(dim1=1, dim2=2)
        target += counts
        return len(ids)
    if (rows := patch_covariance(A, use, layer.joint, fresh)) is not None:
        return rows
    a = layer.inputs(use, 1).flatten(1, 2)
    gram(A, a, fresh)
    return a.shape[1]


def _pool(s: Sums, forward_only: bool) -> None:
    r"""Pool uses in which inputs and outputs exchange their roles with the others.

    Rows :math:`(b, a)` of an exchanged use may be scaled to :math:`(c b, a / c)`. The
    :math:`c` is chosen that gives both factors the proportions that they have in the
    other uses.
    """
    n_part, m_part, count = s.swapped
    if forward_only:
        n_part = torch.ones_like(_diagonal(n_part)) * count[:, None]
    traces = [_diagonal(f).sum() for f in (n_part, m_part, s.A, s.B)]
    square = (traces[0] * traces[3] / (traces[1] * traces[2])).sqrt()
    square = square if bool(square.isfinite() & (square > 0)) else torch.ones(())
    s.A, s.B = _plus(s.A, n_part / square), _plus(s.B, m_part * square)
    s.count = s.count + count


def _plus(F: Tensor, other: Tensor) -> Tensor:
    if F.ndim == other.ndim:
        return F + other
    dense, flat = (F, other) if F.ndim == 3 else (other, F)
    return dense + torch.diag_embed(flat)


def sums_of(estimation: Estimation) -> dict[str, Sums]:
    r"""Estimate the covariances of inputs and gradients.

    .. math::

        A = \frac{1}{|r|} \sum_{n, r} a_{nr} a_{nr}^\top , \qquad
        B = \frac{1}{D} \sum_{n, k, r} b_{nkr} b_{nkr}^\top

    (expand), or the same with the mean of a datum's inputs and the sum of its gradients
    in place of the positions' (reduce).
    """
    covariances = Covariances(estimation.settings)
    estimation.sweep(covariances, diagonals=True)
    covariances.finish(estimation.denominator)
    return covariances.sums


def blocks_of(estimation: Estimation, sums: dict[str, Sums]) -> list[Block]:
    r"""Return :math:`B \otimes A` for every layer, and the blocks without factors."""
    for s in sums.values():
        s.to_means()
    blocks = estimation.other_blocks(sums)
    for name, s in sums.items():
        if not s.layer.elementwise:
            blocks.append((s.layer.layout, product(name, s.B, s.A, symmetric=True)))
            if s.layer.bias is not None:
                blocks.append((s.layer.bias, product(s.layer.bias.names[0], s.B)))
    return blocks
