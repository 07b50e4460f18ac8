"""Methods that look at every datum's gradient: EKFAC's and KFOC's."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from curvlinops.kfac._estimation import (
    Block,
    Estimation,
    Sums,
    product,
    slots,
)
from curvlinops.kfac._factors import _total, kfac
from curvlinops.kfac._layers import Batch, Layer
from curvlinops.kronecker import (
    EighDecomposedLinearOperator,
)

#: Bytes of intermediate matrices per chunk of data.
CHUNK_BYTES = 1 << 26


def gradients(
    layer: Layer, batch: Batch, grads: dict[int, Tensor], transform: Any
) -> Iterator[tuple[Tensor | None, Tensor, Tensor]]:
    """Yield ``(M, b, a)`` in chunks of data, after transforming the rows ``b, a``.

    ``M`` of shape ``[G, chunk, m, n]`` are the gradients; ``None`` if each is the outer
    product of the one row of ``b`` and that of ``a``, ``[G, chunk, m]`` and ``n``.
    """
    G, m, n = layer.layout.size
    N = batch.size
    parts = []
    for swapped in (False, True):
        for groups, uses in slots(layer, swapped):
            for use in uses:
                a = layer.inputs(use, N)
                b = layer.outputs(use, grads[id(use)], N).to(a.dtype)
                b, a = (a, b) if swapped else (b, a)
                parts.append((groups, *transform(groups, b, a)))
    if len(parts) == 1 and parts[0][1].shape[2] == 1:
        _, b, a = parts[0]
        yield None, b[:, :, 0], a[:, :, 0]
        return
    size = max(1, CHUNK_BYTES // (G * m * n * parts[0][1].element_size()))
    for start in range(0, N, size):
        part = slice(start, start + size)
        like = parts[0][1]
        M = like.new_zeros(G, len(range(N)[part]), m, n)
        for groups, b, a in parts:
            M[groups] += b[:, part].mT @ a[:, part]
        yield M, like, like


def _side(factor: Tensor, groups: slice, rows: Tensor) -> Tensor:
    """Multiply rows ``[G, N, R, d]`` by a factor from the right."""
    factor = factor[groups]
    rows = rows.to(factor.dtype)
    if factor.ndim == 2:
        return rows * factor[:, None, None]
    return (rows.flatten(1, 2) @ factor).unflatten(1, rows.shape[1:3])


def ekfac(estimation: Estimation) -> tuple[list[Block], dict[str, Sums]]:
    r"""Correct the eigenvalues of KFAC's product.

    .. math::

        \Lambda_{ij} = \frac{1}{D} \sum_{n, k} \left( Q_B^\top M_{nk} Q_A \right)_{ij}^2

    with the eigenvectors of :math:`A` and :math:`B`: the diagonal of
    :math:`(Q_B \otimes Q_A)^\top F (Q_B \otimes Q_A)`.
    """
    blocks, sums = kfac(estimation)
    bases: dict[str, tuple[Any, Any]] = {}
    for name, s in sums.items():
        if not s.layer.elementwise:
            decomposed = product(name, s.B, s.A).eigh()
            bases[name] = (decomposed.Q, decomposed)
    if estimation.settings.fisher.fisher_type == "forward-only":
        return [
            (layout, op if layout.names[0] not in bases else op.eigh())
            for layout, op in blocks
        ], sums
    evals = {
        name: torch.zeros(s.layer.layout.size, dtype=s.A.dtype, device=s.A.device)
        for name, s in sums.items()
        if name in bases
    }
    column = {
        name: torch.zeros_like(total[..., 0])
        for name, total in evals.items()
        if sums[name].layer.bias is not None
    }

    def add(batch: Batch, grads: dict[int, Tensor]) -> None:
        for layer in batch.layers:
            if layer.elementwise:
                continue
            QB, QA = bases[layer.name][0].factors

            sums_of_rows: dict[Any, list[Tensor]] = defaultdict(list)

            def rotate(
                groups: slice,
                b: Tensor,
                a: Tensor,
                Q: Any = (QB, QA),
                to: Any = sums_of_rows,
            ) -> Any:
                b = _side(Q[0], groups, b)
                to[groups.start].append(b.sum(2))
                return b, _side(Q[1], groups, a)

            total = evals[layer.name]
            for M, b, a in gradients(layer, batch, grads, rotate):
                if M is None:
                    total += b.square().mT @ a.square()
                else:
                    total += M.square().sum(1)
            if layer.bias is not None:
                for start, rows in sums_of_rows.items():
                    groups = slice(start, None if start is None else start + 1)
                    column[layer.name][groups] += _total(rows).square().sum(1)

    estimation.sweep(None, add)
    D = estimation.denominator
    result = [block for block in blocks if block[0].names[0] not in bases]
    biases = {s.layer.bias.names[0] for s in sums.values() if s.layer.bias is not None}
    result = [block for block in result if block[0].names[0] not in biases]
    for name, (Q, _) in bases.items():
        layer = sums[name].layer
        label = Q.name
        op = EighDecomposedLinearOperator(evals[name] / D, Q, name=label)
        result.append((layer.layout, op))
        if layer.bias is not None:
            bias = product(layer.bias.names[0], Q.factors[0])
            op = EighDecomposedLinearOperator(column[name] / D, bias, name=bias.name)
            result.append((layer.bias, op))
    return result, sums


def kfoc(
    estimation: Estimation, max_iter: int, tolerance: float
) -> tuple[list[Block], dict[str, Sums]]:
    r"""Find the Kronecker product nearest to :math:`F` in Frobenius norm.

    Alternates between the best :math:`B` for given :math:`A` and the reverse,

    .. math::

        B = \frac{1}{D \|A\|^2} \sum_{n, k} M_{nk} A M_{nk}^\top , \qquad
        A = \frac{1}{D \|B\|^2} \sum_{n, k} M_{nk}^\top B M_{nk} ,

    starting from KFAC: the power method for the leading singular vectors of the
    rearranged :math:`F`. Every step is a pass over the data, decreases the distance,
    and gives a symmetric positive semi-definite factor.
    """
    blocks, sums = kfac(estimation)
    if estimation.settings.fisher.fisher_type == "forward-only":
        return blocks, sums
    chosen = {n: s for n, s in sums.items() if not s.layer.elementwise}
    for s in chosen.values():
        s.A, s.B = (f if f.ndim == 3 else f.diag_embed() for f in (s.A, s.B))
    previous = dict.fromkeys(chosen, 0.0)
    for step in range(2 * max_iter):
        left = step % 2 == 0
        totals = {n: torch.zeros_like(s.B if left else s.A) for n, s in chosen.items()}

        def add(
            batch: Batch,
            grads: dict[int, Tensor],
            left: bool = left,
            totals: Any = totals,
        ) -> None:
            for layer in batch.layers:
                if not layer.elementwise:
                    s = sums[layer.name]
                    other = s.A if left else s.B
                    _add_half(totals[layer.name], layer, batch, grads, other, left)

        estimation.sweep(None, add)
        settled = True
        for name, s in chosen.items():
            other = s.A if left else s.B
            square = other.square().sum((1, 2), keepdim=True)
            best = totals[name] / (estimation.denominator * square)
            best = torch.where(square > 0, best, torch.zeros_like(best))
            best = (best + best.mT) / 2
            s.A, s.B = (s.A, best) if left else (best, s.B)
            size = float((s.A.square().sum((1, 2)) * s.B.square().sum((1, 2))).sum())
            settled &= size <= previous[name] * (1 + tolerance)
            previous[name] = size
        if settled:
            break
    keep = [block for block in blocks if block[0].names[0] not in chosen]
    keep += [(s.layer.layout, product(n, s.B, s.A)) for n, s in chosen.items()]
    return keep, sums


def _add_half(
    total: Tensor, layer: Layer, batch: Batch, grads: Any, other: Tensor, left: bool
) -> None:
    """Add ``M A M^T`` (left) or ``M^T B M``."""
    for M, b, a in gradients(layer, batch, grads, lambda _, b, a: (b, a)):
        if M is None:
            first, second = (b, a) if left else (a, b)
            weight = ((second @ other) * second).sum(-1, keepdim=True)
            total += (first * weight).mT @ first
        else:
            M = M if left else M.mT
            columns = M.transpose(1, 2).flatten(2)
            total += columns @ (M @ other.unsqueeze(1)).transpose(1, 2).flatten(2).mT
