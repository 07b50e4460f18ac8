"""Passes over the data that estimate blocks, and the blocks that need no method."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from curvlinops.kfac._layers import Batch, Fisher, Layer, batches
from curvlinops.kfac._uses import Layout
from curvlinops.kronecker import (
    KroneckerProductLinearOperator,
)
from curvlinops.risk import EmpiricalRisk

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
