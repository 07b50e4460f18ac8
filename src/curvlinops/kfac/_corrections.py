"""Methods that look at every datum's gradient: EKFAC's and KFOC's."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from curvlinops.kfac._covariance import mirror
from curvlinops.kfac._estimation import (
    Block,
    Estimation,
    Sums,
    Visitor,
    product,
)
from curvlinops.kfac._factors import blocks_of, sums_of
from curvlinops.kfac._layers import Batch, Gradients, Layer
from curvlinops.kfac._rows import CHUNK_BYTES, Part, gradients, parts_of
from curvlinops.kronecker import EighDecomposedLinearOperator, eigh

#: How much larger than rounding an eigenvalue is whose eigenvector is known well.
FAR = 32


def _add_squares(total: Tensor, M: Tensor) -> None:
    """Add the squares of ``[G, N, m, n]``, summed over ``N``; may overwrite them."""
    if total[0].numel() < 1 << 14:
        total += M.square_().sum(1)
        return
    for one in M.unbind(1):  # one pass over the memory
        total.addcmul_(one, one)


def times(rows: Tensor, Q: Tensor) -> Tensor:
    """Multiply rows ``[G, ..., d]`` from the right by matrices ``[G, d, e]``."""
    return (rows.to(Q.dtype).flatten(1, -2) @ Q).unflatten(1, rows.shape[1:-1])


@dataclass
class Basis:
    """Eigenvectors of a layer's factors.

    Attributes
    ----------
    layer : Layer
        The layer.
    vectors : tuple of Tensor
        Eigenvectors of the output and of the input factor, ``[G, d, d]``; ``[G, d]``,
        ones, for a diagonal factor.
    spectra : tuple of Tensor
        Their eigenvalues, ``[G, d]``.
    starts : tuple of int
        How many of the vectors, the first ones, are orthogonal to all rows.
    """

    layer: Layer
    vectors: tuple[Tensor, Tensor]
    spectra: tuple[Tensor, Tensor]
    starts: tuple[int, int]

    def rotates_matrices(self, rows: int, vectors: int) -> bool:
        """Whether rotating a datum's gradients takes less work than rotating its rows.

        The gradients are those for several vectors, each a product of so many rows.
        """
        _, m, n = self.layer.layout.size
        # Sizes after rotation, and whether there is one.
        p, q = m - self.starts[0], n - self.starts[1]
        B, A = (Q.ndim == 3 for Q in self.vectors)
        by_rows = rows * (vectors * (m * p * B + p * q) + n * q * A)
        return vectors * (rows * m * n + m * n * q * A + m * p * q * B) < by_rows

    def rotated_matrices(self, M: Tensor, sides: Sequence[int] = (0, 1)) -> Tensor:
        """Return gradients ``[G, N, m, n]`` as :meth:`part` has their squares."""
        for side in reversed(sides):
            Q = self.vectors[side]
            if Q.ndim == 3:
                Q = Q[..., self.starts[side] :]
                M = times(M, Q) if side == 1 else Q.mT.unsqueeze(1) @ M.to(Q.dtype)
        return M

    def rotated(self, groups: slice, rows: Tensor, side: int) -> Tensor:
        """Return the components of rows that may not vanish, in fresh memory."""
        Q = self.vectors[side][groups]
        if Q.ndim == 2:
            return rows.to(Q.dtype).clone()
        return times(rows, Q[..., self.starts[side] :])

    def part(self, evals: Tensor) -> Tensor:
        """Return the part of ``[G, m, n]``, or ``[G, m]``, that may not vanish."""
        B, A = self.starts
        return evals[:, B:] if evals.ndim == 2 else evals[:, B:, A:]


def basis_of(sums: Sums, name: str, reduce: bool) -> Basis:
    """Decompose a layer's factors, which are dropped."""
    vectors, spectra, starts = [], [], []
    rows = sums.rows, int(sums.count.max())
    # Otherwise, it is not the same rows that are rotated.
    same = not reduce and sums.swapped is None
    for side, number, divisor in zip("BA", rows, sums.divisors, strict=True):
        factor = getattr(sums, side)
        setattr(sums, side, None)
        evals, Q = eigh(factor, name, upper=True)
        starts.append(_nullity(evals, number) if same and Q.ndim == 3 else 0)
        vectors.append(Q)
        spectra.append(mirror(evals, divisor))
    (QB, QA), (lB, lA), (start_B, start_A) = vectors, spectra, starts
    return Basis(sums.layer, (QB, QA), (lB, lA), (start_B, start_A))


def _nullity(evals: Tensor, rows: int) -> int:
    """Return how many eigenvectors of a covariance are orthogonal to all its rows.

    With fewer rows than columns, these are at least as many as there are columns more.
    Where their eigenvalues, which show how large rounding is, are not far below the
    next one, they are mixed with its eigenvector, and the number is zero.
    """
    number = evals.shape[1] - rows
    if not 0 < number < evals.shape[1]:
        return 0
    rounding = evals[:, :number].abs().amax(1)
    rounding = rounding.maximum(torch.finfo(evals.dtype).eps * evals[:, -1])
    return number if bool((evals[:, number] > FAR * rounding).all()) else 0


class Moments(Visitor):
    r"""Sums up the squares of every datum's gradient, in a given basis.

    Without weight sharing, the gradients are outer products :math:`b_{nk} a_n^\top`, so
    the sums are one product of squares, :math:`\sum_n (\sum_k b_{nki}^2) a_{nj}^2`.
    """

    def __init__(self, bases: dict[str, Basis]) -> None:
        self.bases = bases
        self.evals: dict[str, Tensor] = {}
        self.columns: dict[str, Tensor] = {}
        for name, basis in bases.items():
            like = basis.spectra[0]
            size = basis.layer.layout.size
            self.evals[name] = like.new_zeros(size)
            if basis.layer.bias is not None:
                self.columns[name] = like.new_zeros(size[:2])

    def start(self, batch: Batch) -> None:
        """Forget the previous batch."""
        self._inputs: dict[int, Tensor] = {}
        self._squares: dict[str, Tensor] = {}

    def add(self, batch: Batch, layer: Layer, grads: Gradients) -> None:
        """Add a layer's gradients."""
        if layer.name not in self.bases:
            return
        basis, N, parts = self.bases[layer.name], batch.size, parts_of(layer)
        gs = [part.outputs(layer, grads, N) for part in parts]
        by_matrix = basis.rotates_matrices(sum(g.shape[3] for g in gs), gs[0].shape[1])
        rows = []
        for part, g in zip(parts, gs, strict=True):
            a = self._inputs_of(layer, part, N, rotate=not by_matrix)
            if by_matrix:  # under `autocast`, they may differ
                common = torch.promote_types(g.dtype, a.dtype)
                g, a = g.to(common), a.to(common)
            else:
                g = basis.rotated(part.groups, g, int(part.swapped))
            b, a = (a, g) if part.swapped else (g, a)
            rows.append((part.groups, b, a))
        if by_matrix:
            self._add_matrices(basis, rows)
            return
        whole = [b for groups, b, _ in rows if groups == slice(None)]
        if len(rows) == len(whole) == 1 and b.shape[3] == 1 and not part.swapped:
            squares = b.squeeze(3).square_()
            squares = squares.squeeze(1) if len(squares[0]) == 1 else squares.sum(1)
            known = self._squares.get(layer.name)
            self._squares[layer.name] = squares if known is None else known + squares
            return
        total = basis.part(self.evals[layer.name])
        for M in gradients(rows, total.shape):
            _add_squares(total, M)
        if layer.bias is not None:
            column = basis.part(self.columns[layer.name]).unsqueeze(-1)
            for M in gradients(_with_ones(rows), column.shape):
                _add_squares(column, M)

    def _add_matrices(
        self, basis: Basis, rows: list[tuple[slice, Tensor, Tensor]]
    ) -> None:
        """Add gradients that are rotated as matrices, given by their rows."""
        name, size = basis.layer.name, basis.layer.layout.size
        total = basis.part(self.evals[name])
        for M in gradients(rows, size):
            _add_squares(total, basis.rotated_matrices(M))
        if basis.layer.bias is not None:
            column = basis.part(self.columns[name]).unsqueeze(-1)
            for M in gradients(_with_ones(rows), (*size[:2], 1)):
                _add_squares(column, basis.rotated_matrices(M, sides=(0,)))

    def done(self, batch: Batch, layer: Layer) -> None:
        """Multiply the squares."""
        if (squares := self._squares.pop(layer.name, None)) is not None:
            (part,), basis = parts_of(layer), self.bases[layer.name]
            a = self._inputs_of(layer, part, batch.size)[:, 0, :, 0]
            basis.part(self.evals[layer.name]).baddbmm_(squares.mT, a.square_())
            if layer.bias is not None:
                basis.part(self.columns[layer.name]).add_(squares.sum(1))
        for use, _ in layer.uses:
            self._inputs.pop(id(use), None)

    def _inputs_of(
        self, layer: Layer, part: Part, N: int, rotate: bool = True
    ) -> Tensor:
        """Return a use's inputs ``[G, 1, N, R, n]``, kept if they are small."""
        basis, key = self.bases[layer.name], id(part.uses[0])
        if key not in self._inputs:
            rows = part.inputs(layer, N).unsqueeze(1)
            if rotate:
                rows = basis.rotated(part.groups, rows, int(not part.swapped))
            known = sum(a.nbytes for a in self._inputs.values())
            if known + rows.nbytes > CHUNK_BYTES:
                self._inputs.clear()
            self._inputs[key] = rows
        return self._inputs[key]


def _with_ones(rows: list[tuple[slice, Tensor, Tensor]]) -> list[Any]:
    """Return the rows of a bias, whose inputs are ones."""
    return [(groups, b, b.new_ones(*b.shape[:-1], 1)) for groups, b, _ in rows]


def ekfac(estimation: Estimation) -> list[Block]:
    r"""Correct the eigenvalues of KFAC's product.

    .. math::

        \Lambda_{ij} = \frac{1}{D} \sum_{n, k} \left( Q_B^\top M_{nk} Q_A \right)_{ij}^2

    with the eigenvectors of :math:`A` and :math:`B`: the diagonal of
    :math:`(Q_B \otimes Q_A)^\top F (Q_B \otimes Q_A)`. All of it is computed: an
    eigenvalue of a factor that is lost in the rounding of the largest says nothing
    about the corrected ones, which sums of squares give to full relative accuracy. Left
    out are only directions that, by number, no row has a component in.
    """
    sums, settings = sums_of(estimation), estimation.settings
    chosen = [name for name, s in sums.items() if not s.layer.elementwise]
    if settings.fisher.fisher_type == "forward-only":
        return [
            (layout, op.eigh() if layout.names[0] in chosen else op)
            for layout, op in blocks_of(estimation, sums)
        ]
    others = blocks_of(estimation, {n: s for n, s in sums.items() if n not in chosen})
    bases = {
        n: basis_of(sums[n], f"the block of {n!r}", settings.reduce) for n in chosen
    }
    moments = Moments(bases)
    estimation.sweep(moments)
    D = estimation.denominator
    for name, basis in bases.items():
        Q = product(name, *basis.vectors)
        op = EighDecomposedLinearOperator(
            moments.evals[name].div_(D), Q, name=Q.name, spectra=basis.spectra
        )
        others.append((basis.layer.layout, op))
        if basis.layer.bias is not None:
            Q = product(basis.layer.bias.names[0], basis.vectors[0])
            op = EighDecomposedLinearOperator(
                moments.columns[name].div_(D), Q, name=Q.name
            )
            others.append((basis.layer.bias, op))
    return others


class Halves(Visitor):
    """Sums up ``M A M^T`` (left) or ``M^T B M`` over all gradients ``M``.

    Parameters
    ----------
    others : dict of str to Tensor
        ``A`` or ``B`` for every layer, ``[G, d, d]`` or, if diagonal, ``[G, d]``.
    left : bool
        Which of both.
    diagonal : set of str, optional
        The layers of whose sums only the diagonal is wanted.
    """

    def __init__(
        self, others: dict[str, Tensor], left: bool, diagonal: Iterable[str] = ()
    ) -> None:
        self.others, self.left, self.diagonal = others, left, set(diagonal)
        self.totals: dict[str, Any] = dict.fromkeys(others, 0)

    def add(self, batch: Batch, layer: Layer, grads: Gradients) -> None:
        """Add a layer's gradients."""
        if layer.name not in self.others:
            return
        other, total = self.others[layer.name], self.totals[layer.name]
        parts = parts_of(layer)
        rows = [part.rows(layer, grads, batch.size, other.dtype) for part in parts]
        if len(rows) == 1 and rows[0][1].shape[3] == 1:
            _, b, a = rows[0]
            first, second = (b, a) if self.left else (a, b)
            first, second = first[..., 0, :], second[..., 0, :]
            weights = (_weighted(second, other) * second).sum(-1, keepdim=True)
            if first.shape[1] == 1:
                weights = weights.sum(1, keepdim=True)
            weighted, first = (first * weights).flatten(1, 2), first.flatten(1, 2)
            if layer.name in self.diagonal:
                total = total + (weighted * first).sum(1)
            else:
                total = total + weighted.mT @ first
        else:
            for M in gradients(rows, layer.layout.size):
                M = M if self.left else M.mT
                weighted = _weighted(M, other)
                if layer.name in self.diagonal:
                    total = total + (M * weighted).sum((1, 3))
                    continue
                columns = M.transpose(1, 2).flatten(2)
                total = total + columns @ weighted.transpose(1, 2).flatten(2).mT
        self.totals[layer.name] = total


def _weighted(rows: Tensor, factor: Tensor) -> Tensor:
    """Multiply rows ``[G, ..., d]`` from the right by a factor, maybe a diagonal."""
    if factor.ndim == 2:
        G, d = factor.shape
        return rows * factor.view(G, *[1] * (rows.ndim - 2), d)
    return times(rows, factor)


def _squared_norms(factor: Tensor) -> Tensor:
    return factor.square().flatten(1).sum(1)


def kfoc(estimation: Estimation, max_iter: int, tolerance: float) -> list[Block]:
    r"""Find the Kronecker product nearest to :math:`F` in Frobenius norm.

    Alternates between the best :math:`B` for given :math:`A` and the reverse,

    .. math::

        B = \frac{1}{D \|A\|^2} \sum_{n, k} M_{nk} A M_{nk}^\top , \qquad
        A = \frac{1}{D \|B\|^2} \sum_{n, k} M_{nk}^\top B M_{nk} ,

    starting from KFAC: the power method for the leading singular vectors of the
    rearranged :math:`F`. Every step is a pass over the data, decreases the distance,
    and gives a symmetric positive semi-definite factor. Of one that is wider than
    ``max_factor`` only the diagonal is kept, the best one for the other factor.
    """
    sums = sums_of(estimation)
    widest = estimation.settings.max_factor
    if estimation.settings.fisher.fisher_type == "forward-only":
        return blocks_of(estimation, sums)
    for s in sums.values():
        s.to_means()
    chosen = {n: s for n, s in sums.items() if not s.layer.elementwise}
    for s in chosen.values():
        s.A, s.B = (
            f.diag_embed() if f.ndim == 2 and f.shape[1] <= widest else f
            for f in (s.A, s.B)
        )
        if s.counts_tokens and s.A.ndim == 2:
            warnings.warn(
                f"The input factor of {s.layer.name!r}, with one row per token, would "
                f"have the shape {(s.A.shape[1],) * 2}: only its diagonal is kept. To "
                f"keep all of it, raise `max_factor={widest}`.",
                stacklevel=2,
            )
    #: Of every group, which has a product of its own, the squared norm.
    previous = {n: _squared_norms(s.A) * 0 for n, s in chosen.items()}
    for step in range(2 * max_iter):
        left = step % 2 == 0
        halves = Halves(
            {n: s.A if left else s.B for n, s in chosen.items()},
            left,
            {n for n, s in chosen.items() if (s.B if left else s.A).ndim == 2},
        )
        estimation.sweep(halves)
        settled = True
        for name, s in chosen.items():
            best = halves.totals[name]
            square = _squared_norms(halves.others[name])
            square = square.view(-1, *[1] * (best.ndim - 1))
            best = best / (estimation.denominator * square)
            best = torch.where(square > 0, best, torch.zeros_like(best))
            best = best if best.ndim == 2 else (best + best.mT) / 2
            s.A, s.B = (s.A, best) if left else (best, s.B)
            size = _squared_norms(s.A) * _squared_norms(s.B)
            settled &= bool((size <= previous[name] * (1 + tolerance)).all())
            previous[name] = size
        if settled:
            break
    return blocks_of(estimation, sums)
