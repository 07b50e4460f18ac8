"""Passes over the data that estimate blocks, and the blocks that need no method."""

from __future__ import annotations

from collections import defaultdict
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from curvlinops._backward import grad
from curvlinops._data import strided, tensors_in
from curvlinops._memory import raise_if_out_of_memory
from curvlinops.kfac._covariance import mirror
from curvlinops.kfac._layers import (
    Batch,
    Fisher,
    Gradients,
    Layer,
    Receiver,
    of_rows,
)
from curvlinops.kfac._rows import CHUNK_BYTES
from curvlinops.kfac._sampling import Squares
from curvlinops.kfac._trial import Findings, batches
from curvlinops.kfac._uses import Layout
from curvlinops.kronecker import (
    KroneckerProductLinearOperator,
)
from curvlinops.risk import EmpiricalRisk

Block = tuple[Layout, Any]

#: Bytes of inputs and gradients that may be kept between passes, even if the factors
#: take less.
KEPT_BYTES = 1 << 23
#: Vectors are sent back together if the layers' results take no more bytes than this:
#: it saves overhead, while a large model computes several vectors no faster than one.
TOGETHER_BYTES = 1 << 18
#: How many vectors are sent back together, at most.
MAX_TOGETHER = 64


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

    Of a symmetric matrix the part above the diagonal is there. ``swapped`` belongs to
    the uses in which inputs and outputs exchange their roles; ``divisors``, one number
    for every group or for all, turn the sums ``B`` and ``A`` into means.
    ``counts_tokens`` says that all inputs were unit vectors, so that ``A`` is diagonal.
    ``rows`` is the number of rows whose covariance ``B`` is, in all groups together.
    """

    layer: Layer
    A: Any = None
    B: Any = None
    count: Any = 0
    swapped: Any = None
    divisors: tuple[Any, Any] = (1, 1)
    counts_tokens: bool = False
    rows: int = 0

    def to_means(self) -> None:
        """Turn the sums into means, in place, with all their entries."""
        self.B, self.A = (
            None if total is None else mirror(total, divisor)
            for total, divisor in zip((self.B, self.A), self.divisors, strict=True)
        )
        self.divisors = 1, 1


class Visitor:
    """What is done with a batch's inputs, and with the gradients sent back to them.

    Between the first and the last call for a batch, gradients arrive vector by vector
    and in there layer by layer, or in the other order.
    """

    def start(self, batch: Batch) -> None:
        """Look at a batch's inputs."""

    def add(self, batch: Batch, layer: Layer, grads: Gradients) -> None:
        """Look at gradients by a layer's results, ``[K, *shape]`` for each of its uses.

        ``K`` vectors were sent back, out of those for the batch.
        """

    def done(self, batch: Batch, layer: Layer) -> None:
        """Do what is left, after the last of these gradients."""


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
    reuse : bool, optional
        Whether there are several passes. Layers' inputs and output gradients are then
        kept, instead of being computed again, if those of the whole data take no more
        memory than the factors (or :data:`KEPT_BYTES`), nor than ``cache`` allows.
    """

    def __init__(
        self, risk: EmpiricalRisk, settings: Settings, title: str, reuse: bool = False
    ) -> None:
        self.risk, self.settings, self.title = risk, settings, title
        self.layers: dict[str, Layer] = {}
        self.diagonals: dict[str, Tensor] = {}
        self.denominator: Any = 1
        self._kept: list[tuple[Batch, list[tuple[Layer, Gradients]]]] | None = None
        self._reuse = reuse
        self._may_send_together = True
        self._is_checked = False
        #: Of the samples in the first pass; later ones draw them again.
        self._squares = Squares() if settings.fisher.fisher_type == "mc" else None
        self._findings: dict[Any, Findings] = {}
        self._without_layer: set[str] = set()

    def sweep(self, visitor: Visitor, diagonals: bool = False) -> None:
        """Go through the data once, with as few backward passes as possible."""
        if self._kept is not None:
            for batch, seen in self._kept:
                _show(visitor, batch, seen)
            return

        def run() -> None:
            self.diagonals = {} if diagonals else self.diagonals
            count: Any = 0
            kept: Any = []
            budget: int | None = None
            bias, unsupported = self.settings.bias, self.settings.unsupported
            source = batches(self.risk, bias, unsupported, self.title, self._findings)
            # Closed also while an exception holds on to it: recording goes on then.
            with closing(source):
                for batch in source:
                    self._register(batch)
                    count = count + batch.linearization.count
                    seen: list[tuple[Layer, Gradients]] = []
                    budget = self._bytes_to_keep() if budget is None else budget
                    budget -= _input_bytes(batch)
                    visitor.start(batch)

                    def receive(
                        layer: Layer,
                        grads: Gradients,
                        batch: Batch = batch,
                        seen: Any = seen,
                    ) -> None:
                        nonlocal budget
                        assert budget is not None
                        budget -= sum(g.nbytes for g in grads.values())
                        if budget >= 0:
                            seen.append((layer, grads))
                        else:
                            seen.clear()
                        visitor.add(batch, layer, grads)

                    self._send_all(batch, receive, diagonals and bool(batch.diagonal))
                    keep = budget >= 0 and kept is not None
                    batch.release()
                    # From the last to the first: many have used memory to go on with.
                    for layer in reversed(batch.layers):
                        visitor.done(batch, layer)
                        for use, _ in () if keep else layer.uses:
                            use.input = None
                    kept = [*kept, (batch, seen)] if keep else None
            self.denominator = self.risk._denominator(count)
            self._kept = kept
            if self._squares is not None:
                self._squares.warn()
                self._squares = None

        self.risk.session(run)

    def _bytes_to_keep(self) -> int:
        """Return how many bytes of inputs and gradients may be kept."""
        if not self._reuse:
            return -1
        sizes = [layer.layout.size for layer in self.layers.values()]
        factors = sum(G * (m * m + n * n) for G, m, n in sizes)
        nbytes = max(KEPT_BYTES, factors * self.risk.space.dtype.itemsize)
        return int(min(nbytes, self.risk.room()))

    def _send_all(self, batch: Batch, receive: Receiver, diagonals: bool) -> None:
        """Send every vector of a batch back."""
        width = self._vectors_at_once(batch)
        if (squares := self._squares) is not None:
            squares.expect(batch.loss)
        for U, more in self.settings.fisher.vectors(batch, width):
            keep = more or diagonals
            if squares is not None:
                squares.add(U)
            together = self._sent_together(batch, U)
            if together is None:
                for i, u in enumerate(U, start=1):
                    batch.send(u, keep or i < len(U), receive)
            else:
                for layer in batch.layers:
                    its = {id(use): together[id(use)] for use, _ in layer.uses}
                    receive(layer, its)
            for u in U if diagonals else ():
                self._add_diagonals(batch, u)

    def _vectors_at_once(self, batch: Batch) -> int:
        """Return how many vectors to send back together: several for small layers."""
        size = sum(use.shape.numel() for _, use in batch.uses)
        size *= self.risk.space.dtype.itemsize
        if not self._may_send_together or size > TOGETHER_BYTES:
            return 1
        return max(1, min(MAX_TOGETHER, CHUNK_BYTES // max(size, 1)))

    def _sent_together(self, batch: Batch, U: Tensor) -> dict[int, Tensor] | None:
        """Send several vectors back at once; ``None`` if that is not possible.

        The first time, one of them is sent alone, too, and the results are compared.
        """
        if len(U) == 1 or not self._may_send_together:
            return None
        try:
            result = batch.send_together(U)
        except RuntimeError as error:  # some operation cannot
            raise_if_out_of_memory(error)
            self._may_send_together = False
            return None
        if not self._is_checked:
            self._is_checked = True
            tolerance = torch.finfo(U.dtype).eps ** 0.5
            agree: list[bool] = []

            def compare(_: Layer, grads: Gradients) -> None:
                for key, g in grads.items():
                    difference = torch.dist(result[key][0], g[0])
                    agree.append(bool(difference <= tolerance * g.norm()))

            batch.send(U[0], True, compare)
            self._may_send_together = all(agree)
        return result if self._may_send_together else None

    def _register(self, batch: Batch) -> None:
        """Check that every batch uses the parameters in the same way."""
        differ = []
        for layer in batch.layers:
            known = self.layers.setdefault(layer.name, replace(layer, uses=[]))
            if (known.layout, known.bias) != (layer.layout, layer.bias):
                differ.append(layer.name)
        self._without_layer.update(batch.diagonal)
        names = {name for layer in self.layers.values() for name in _names(layer)}
        differ += sorted(names & self._without_layer)
        if differ:
            raise ValueError(
                f"Different batches use {differ} in different ways, and not all of them"
                " have the same Kronecker-factored form. Use these parameters in one "
                "way only, or leave them out of `params`."
            )

    def _add_diagonals(self, batch: Batch, U: Tensor) -> None:
        """Add the squares of every datum's gradient, one backward pass per datum."""
        aliases = self.risk.model.aliases
        leaves = [aliases[name] for name in batch.diagonal]
        for n in range(batch.size):
            # where it is not known whose rows are whose, there is one at a time
            mine = 1 if batch.owners is None else of_rows(batch.loss, batch.owners == n)
            grads = grad(
                batch.linearization.output,
                leaves,
                U * mine,
                retain_graph=True,
                allow_unused=True,
            )
            for name, leaf, g in zip(batch.diagonal, leaves, grads, strict=True):
                if name not in self.diagonals:
                    dtype = _dtype_of_sums(leaf)
                    self.diagonals[name] = torch.zeros_like(leaf, dtype=dtype)
                if g is not None:
                    total = self.diagonals[name]
                    total.add_(g.to(total.dtype).square())

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
                if total is None:
                    total = torch.zeros_like(p, dtype=_dtype_of_sums(p))
                flat = total.reshape(1, -1)
                size = (1, p.numel(), 1)
                layout = Layout((name,), (tuple(p.shape),), size, (0, 1, 2), size)
                blocks.append((layout, product(name, flat.detach() / self.denominator)))
        return blocks


def _dtype_of_sums(p: Tensor) -> torch.dtype:
    return torch.promote_types(p.dtype, torch.float32)


def _show(visitor: Visitor, batch: Batch, seen: list[tuple[Layer, Gradients]]) -> None:
    """Show what was kept of a batch to a visitor, layer by layer."""
    by_name: dict[str, list[Gradients]] = defaultdict(list)
    for layer, grads in seen:
        by_name[layer.name].append(grads)
    visitor.start(batch)
    for layer in batch.layers:
        for grads in by_name[layer.name]:
            visitor.add(batch, layer, grads)
        visitor.done(batch, layer)


def _input_bytes(batch: Batch) -> int:
    """Return the bytes of inputs; data may be a view of far more, which is there."""
    storages = [use.input.untyped_storage() for _, use in batch.uses]
    sizes = {s.data_ptr(): s.nbytes() for s in storages}
    for t in strided(tensors_in(batch.linearization.X)):
        place = t.untyped_storage().data_ptr()
        sizes[place] = min(sizes.get(place, 0), t.nbytes)
    return sum(sizes.values())


def _names(layer: Layer) -> tuple[str, ...]:
    return layer.layout.names + (() if layer.bias is None else layer.bias.names)


def product(
    name: str, *factors: Tensor, symmetric: bool = False
) -> KroneckerProductLinearOperator:
    """Return grouped factors as operator that errors call by the parameter's name."""
    called = f"the block of {name!r}"
    return KroneckerProductLinearOperator(
        *factors, grouped=True, name=called, symmetric=symmetric
    )
