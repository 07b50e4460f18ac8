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
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from curvlinops.kfac._covariance import gram, mirror, patch_covariance
from curvlinops.kfac._estimation import (
    Block,
    Estimation,
    Settings,
    Sums,
    product,
    slots,
)
from curvlinops.kfac._layers import Batch, Layer
from curvlinops.kfac._uses import token_ids


class Covariances:
    """Sums up the covariances of inputs and of output gradients."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.sums: dict[str, Sums] = {}
        self._warned: set[str] = set()

    def of(self, layer: Layer) -> Sums:
        """Return a layer's sums, with zeros to begin with."""
        if layer.name not in self.sums:
            G, m, n = layer.layout.size
            use = layer.uses[0][0]
            dtype = use.options.get("dtype", use.input.dtype)
            dtype = torch.promote_types(dtype, torch.float32)

            def zeros(d: int, diagonal: bool = False) -> Tensor:
                shape = (G, d) if diagonal or self._is_large(layer, d) else (G, d, d)
                return torch.zeros(shape, dtype=dtype, device=use.input.device)

            units = _counts_tokens(layer, self.settings)
            sums = Sums(layer, zeros(n, units), zeros(m), zeros(1, True)[:, 0])
            if any(swapped for _, swapped in layer.uses):
                sums.swapped = (zeros(n), zeros(m), zeros(1, True)[:, 0])
            self.sums[layer.name] = sums
        return self.sums[layer.name]

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

    def add_inputs(self, batch: Batch) -> None:
        """Add a batch's inputs."""
        for layer in batch.layers:
            if layer.elementwise:
                continue
            s = self.of(layer)
            for groups, uses in slots(layer, swapped=False):
                s.count[groups] += self._add_input(s.A[groups], layer, uses, batch.size)
            for _, uses in slots(layer, swapped=True):
                s.swapped[2].add_(
                    self._add_input(s.swapped[1], layer, uses, batch.size)
                )

    def _add_input(self, A: Tensor, layer: Layer, uses: list[Any], N: int) -> int:
        """Add to ``A``; return the number of inputs."""
        if not self.settings.reduce:
            return sum(_add_expanded(A, layer, use) for use in uses)
        rows = [layer.inputs(use, N) for use in uses]
        R = sum(a.shape[2] for a in rows)
        gram(A, _total([a.sum(2) for a in rows]) / R)
        return N

    def add_outputs(self, batch: Batch, grads: dict[int, Tensor]) -> None:
        """Add the gradients of one backward pass."""
        for layer in batch.layers:
            s = self.of(layer)
            for groups, uses in slots(layer, swapped=False):
                self._add_output(s.B[groups], layer, uses, grads, batch.size)
            for _, uses in slots(layer, swapped=True):
                self._add_output(s.swapped[0], layer, uses, grads, batch.size)

    def _add_output(
        self, B: Tensor, layer: Layer, uses: list[Any], grads: Any, N: int
    ) -> None:
        if self.settings.reduce or layer.elementwise:
            rows = [layer.outputs(use, grads[id(use)], N) for use in uses]
            gram(B, _total([b.sum(2) for b in rows]))
            return
        for use in uses:
            gram(B, layer.outputs(use, grads[id(use)], 1).flatten(1, 2))

    def add_identity(self, batch: Batch) -> None:
        """Add what white noise in place of gradients gives elementwise parameters."""
        for layer in batch.layers:
            if layer.elementwise:
                s = self.of(layer)
                s.B = s.B if s.B.ndim == 2 else s.B.diagonal(dim1=1, dim2=2).clone()
                for use, _ in layer.uses:
                    c = use.checked_input().expand(use.shape)
                    s.B += layer.outputs(use, c, batch.size).sum((1, 2))
                    s.count += c.numel() / s.B.shape[1]

    def finish(self, denominator: Any) -> None:
        """Turn sums into means; pool uses in which the roles are exchanged."""
        for s in self.sums.values():
            forward_only = self.settings.fisher.fisher_type == "forward-only"
            if s.layer.elementwise:
                s.B = mirror(
                    s.B / (s.count.clamp(min=1) if forward_only else denominator)
                )
                continue
            if forward_only:
                s.B = torch.ones_like(_diagonal(s.B)) * s.count[:, None]
            if s.swapped is not None:
                _pool(s, forward_only)
            count = s.count.clamp(min=1).reshape(-1, *[1] * (s.A.ndim - 1))
            s.A = mirror(s.A.div_(count))
            s.B = mirror(s.B.div_(s.count[:, None] if forward_only else denominator))


def _diagonal(factor: Tensor) -> Tensor:
    return factor if factor.ndim == 2 else factor.diagonal(dim1=1, dim2=2)


def _total(tensors: list[Tensor]) -> Tensor:
    return reduce(torch.add, tensors)


def _counts_tokens(layer: Layer, settings: Settings) -> bool:
    """Whether the input covariance is diagonal: unit vectors, one at a time."""
    return not settings.reduce and all(
        use.kind == "embedding" or swapped for use, swapped in layer.uses
    )


def _add_expanded(A: Tensor, layer: Layer, use: Any) -> int:
    """Add every position's input; return their number."""
    if use.kind == "embedding":
        ids = token_ids(use, 1).flatten()
        if (padding := use.options["padding"]) is not None:
            ids = ids[ids != padding]
        counts = torch.bincount(ids, minlength=A.shape[1]).to(A.dtype)
        target = A if A.ndim == 2 else A.diagonal(dim1=1, dim2=2)
        target += counts
        return len(ids)
    if (rows := patch_covariance(A, use, layer.joint)) is not None:
        return rows
    a = layer.inputs(use, 1).flatten(1, 2)
    gram(A, a)
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


def kfac(estimation: Estimation) -> tuple[list[Block], dict[str, Sums]]:
    r"""Estimate :math:`B \otimes A` with the covariances of inputs and gradients.

    .. math::

        A = \frac{1}{|r|} \sum_{n, r} a_{nr} a_{nr}^\top , \qquad
        B = \frac{1}{D} \sum_{n, k, r} b_{nkr} b_{nkr}^\top

    (expand), or the same with the mean of a datum's inputs and the sum of its gradients
    in place of the positions' (reduce).
    """
    settings = estimation.settings
    covariances = Covariances(settings)
    forward_only = settings.fisher.fisher_type == "forward-only"

    def each_batch(batch: Batch) -> None:
        if forward_only and batch.diagonal:
            raise ValueError(
                f"`fisher_type='forward-only'` sends nothing back, so {batch.diagonal} "
                "cannot be given a diagonal block: leave them out of `params`."
            )
        for layer in batch.layers:
            covariances.of(layer)
        covariances.add_inputs(batch)
        if forward_only:
            covariances.add_identity(batch)

    back = None if forward_only else covariances.add_outputs
    estimation.sweep(each_batch, back, diagonals=True)
    covariances.finish(estimation.denominator)
    blocks = estimation.other_blocks(covariances.sums)
    for name, s in covariances.sums.items():
        if not s.layer.elementwise:
            blocks.append((s.layer.layout, product(name, s.B, s.A)))
            if s.layer.bias is not None:
                blocks.append((s.layer.bias, product(s.layer.bias.names[0], s.B)))
    return blocks, covariances.sums
