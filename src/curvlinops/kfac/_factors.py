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
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from curvlinops.kfac._covariance import gram, mirror, patch_covariance
from curvlinops.kfac._layers import Batch, Fisher, Layer, batches
from curvlinops.kfac._uses import Layout, token_ids
from curvlinops.kronecker import (
    EighDecomposedLinearOperator,
    KroneckerProductLinearOperator,
)
from curvlinops.risk import EmpiricalRisk

#: Bytes of intermediate matrices per chunk of data.
CHUNK_BYTES = 1 << 26

Block = tuple[Layout, Any]


@dataclass(frozen=True)
class Settings:
    """What the user chose; see :class:`curvlinops.kfac.KFACLinearOperator`."""

    fisher: Fisher
    reduce: bool
    bias: str
    unsupported: str
    max_factor: int


@dataclass
class Sums:
    """Sums for one layer: covariances of its rows, and the number of inputs.

    ``swapped`` belongs to the uses in which inputs and outputs exchange their roles.
    """

    layer: Layer
    A: Any = None
    B: Any = None
    count: Any = 0
    swapped: Any = None


class Estimation:
    """One pass over the data after the other, for one kind of matrix.

    Parameters
    ----------
    risk : EmpiricalRisk
        Model, loss, parameters, and data.
    settings : Settings
        The user's choice.
    title : str
        What the progress bar is called.
    """

    def __init__(self, risk: EmpiricalRisk, settings: Settings, title: str) -> None:
        self.risk, self.settings, self.title = risk, settings, title
        self.layers: dict[str, Layer] = {}
        self.diagonals: dict[str, Tensor] = {}
        self.denominator: Any = 1

    def sweep(
        self,
        each_batch: Callable[[Batch], None] | None,
        each_vector: Callable[[Batch, dict[int, Tensor]], None] | None,
        diagonals: bool = False,
    ) -> None:
        """Go through the data once, with one backward pass per vector."""
        settings = self.settings

        def run() -> None:
            self.diagonals = {} if diagonals else self.diagonals
            count: Any = 0
            source = batches(self.risk, settings.bias, settings.unsupported, self.title)
            for batch in source:
                self._register(batch)
                count = count + batch.linearization.count
                if each_batch is not None:
                    each_batch(batch)
                send = diagonals and batch.diagonal
                if each_vector is None and not send:
                    continue
                for U, more in settings.fisher.vectors(batch):
                    if each_vector is not None:
                        each_vector(batch, batch.back(U, more or bool(send)))
                    if send:
                        self._add_diagonals(batch, U)
            self.denominator = self.risk._denominator(count)

        self.risk.session(run)

    def _register(self, batch: Batch) -> None:
        """Check that every batch uses the parameters in the same way."""
        for layer in batch.layers:
            known = self.layers.setdefault(layer.name, layer)
            if (known.layout, known.bias) != (layer.layout, layer.bias):
                raise ValueError(
                    f"The parameter {layer.name!r} is used in several ways by different"
                    " batches. Use `unsupported='diagonal'`, or one way only."
                )

    def _add_diagonals(self, batch: Batch, U: Tensor) -> None:
        """Add the squares of every datum's gradient, one backward pass per datum."""
        aliases = self.risk.model.aliases
        leaves = [aliases[name] for name in batch.diagonal]
        rows = batch.loss.num_rows
        index = torch.arange(rows, device=U.device).reshape(batch.loss.row_shape)
        axis = batch.loss.class_axis
        index = index if axis is None else index.unsqueeze(axis)
        for n in range(batch.size):
            mine = index * batch.size // rows == n
            grads = torch.autograd.grad(
                batch.linearization.output,
                leaves,
                U * mine,
                retain_graph=True,
                allow_unused=True,
            )
            for name, leaf, g in zip(batch.diagonal, leaves, grads, strict=True):
                total = self.diagonals.setdefault(name, torch.zeros_like(leaf))
                if g is not None:
                    total.data.add_(g.square())

    # -- blocks that do not depend on the method ---------------------------------------

    def other_blocks(self, sums: dict[str, Sums]) -> list[Block]:
        """Return the blocks of elementwise, unsupported and unused parameters."""
        blocks: list[Block] = []
        for name, s in sums.items():
            if s.layer.elementwise:
                blocks.append((s.layer.layout, product(name, s.B)))
        known = {n for s in self.layers.values() for n in _names(s)}
        for name, p in self.risk.model.aliases.items():
            if name not in known:
                total = self.diagonals.get(name)
                flat = (
                    p.new_zeros(1, p.numel()) if total is None else total.reshape(1, -1)
                )
                size = (1, p.numel(), 1)
                layout = Layout((name,), (tuple(p.shape),), size, (0, 1, 2), size)
                blocks.append((layout, product(name, flat.detach() / self.denominator)))
        return blocks


def _names(layer: Layer) -> tuple[str, ...]:
    return layer.layout.names + (() if layer.bias is None else layer.bias.names)


def product(name: str, *factors: Tensor) -> KroneckerProductLinearOperator:
    """Return grouped factors as operator that errors call by the parameter's name."""
    called = f"the block of {name!r}"
    return KroneckerProductLinearOperator(*factors, grouped=True, name=called)


def slots(layer: Layer, swapped: bool) -> Iterator[tuple[slice, list[Any]]]:
    """Yield the ranges of groups that uses fill, and these uses."""
    by_slot: dict[int | None, list[Any]] = defaultdict(list)
    for use, is_swapped in layer.uses:
        if is_swapped == swapped:
            slot = use.options.get("slot")
            by_slot[None if slot is None else slot[0]].append(use)
    for slot, uses in by_slot.items():
        yield slice(None) if slot is None else slice(slot, slot + 1), uses


# -- KFAC ---------------------------------------------------------------------------


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


# -- methods that look at every datum's gradient --------------------------------------


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
