"""Passes over the batches' layers, in which it is found whose rows are whose.

What a layer is given has rows, and so has the model's output. Which of them belong to
which datum is found for every batch whose functions, shapes or numbers are others than
in batches before, and for every batch where the content of tensors is compared, or
tells a function which rows to pick or how to sort them:

1. One datum is evaluated without the others, a forward pass of it alone, and its rows
   are looked for among the batch's. That is all there is to do for models that keep
   rows sorted: by data or by positions, along any axis. (Of a batch of two or three,
   two are, one by one; where the model raises, two together; where it turns tensors
   into Python's numbers, the others are as well, a third of them at a time.)
2. Where that does not settle it (the model goes over the data in a loop, packs rows of
   several lengths, picks or sorts rows by content, has a matrix with rows and columns
   for data, of which perhaps only some meet, or is given a tensor that is as long as
   the batch, but no data), a random vector is sent back to the layers' results, and
   once more, or twice for more than 16 data, with every datum's part multiplied by a
   number of its own. What arrives tells for every row whose it is. Where the output's
   rows are not sorted either, every datum is evaluated alone before.

Where even that finds no order, each row of the output is sent back on its own, which is
right for any model.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor

from curvlinops._apart import outputs_of
from curvlinops._data import cloned, cut, strided, tensors_in
from curvlinops._linearization import Linearization
from curvlinops._memory import raise_if_out_of_memory
from curvlinops._order import (
    BASES,
    Order,
    as_order,
    decode,
    factors,
    filled,
    find_order,
    orders,
    same,
)
from curvlinops._spaces import rounding
from curvlinops.kfac._handlers import HANDLERS
from curvlinops.kfac._layers import Batch, of_rows, resolve
from curvlinops.kfac._recording import Recorder, Use
from curvlinops.kfac._refusal import refusal
from curvlinops.kfac._uses import KINDS, axes_of
from curvlinops.risk import EmpiricalRisk

_SHARED = (
    "no axis of its result counts the data: expand its input, as in "
    "`positions.expand(len(X), -1)`"
)
_COUPLED = (
    "a row of its result has a part in the outputs of several data: does the model "
    "couple data, by a mean over the batch, batch normalisation in train mode, "
    "products of data with each other, or attention along the data's axis? Or is its "
    "input the same for all data? Then expand it, as in "
    "`positions.expand(len(X), -1)`. Or has a datum several rows in the batch? Then "
    "pass `batch_size_fn`"
)


@dataclass
class Findings:
    """Whose the rows of a batch are.

    Attributes
    ----------
    size : int
        The number of data that layers' rows are sorted by; 1 if all are taken for one.
    places : list of Order, Tensor, or None
        How every use's rows are sorted, or the datum of each; ``None`` with a reason.
    owners : Tensor or None
        The datum of each row of the output; ``None`` if they are sent back one by one.
    reasons : dict of str to str
        The parameters whose layers are not understood after all.
    sure : bool
        Whether the output's rows are known to be these data's.
    content : bool
        Whether data may meet in other batches, because of their content.
    """

    size: int
    places: list[Order | Tensor | None]
    owners: Tensor | None
    reasons: dict[str, str] = field(default_factory=dict)
    sure: bool = True

    content: bool = False

    @property
    def lasts(self) -> bool:
        """Whether it holds for all batches with the same functions and shapes."""
        return not (self.content or any(isinstance(p, Tensor) for p in self.places))

    def apply(self, uses: list[Use]) -> None:
        """Tell a batch's uses."""
        for use, place in zip(uses, self.places, strict=True):
            use.place = place


def batches(
    risk: EmpiricalRisk,
    bias: str,
    unsupported: str,
    title: str,
    known: dict[Any, Findings],
) -> Generator[Batch]:
    """Yield every batch with its layers (within ``risk.session``).

    What is found out about them is added to ``known``, if it holds for more batches.
    """
    source: Any = risk._fresh_batches(title)
    with closing(source):
        yield from _batches(risk, source, bias, unsupported, known)


def _batches(
    risk: EmpiricalRisk,
    source: Iterator[Any],
    bias: str,
    unsupported: str,
    known: dict[Any, Findings],
) -> Iterator[Batch]:
    recorder = Recorder(risk.model.aliases, HANDLERS)
    shapes = {name: tuple(p.shape) for name, p in risk.model.aliases.items()}
    while True:
        recorder.clear()
        with risk.model.evaluated_in(recorder):
            batch = next(source, None)
        if batch is None:
            return
        size = risk._size_or_none(batch.X)
        size = len(torch.atleast_1d(batch.output)) if size is None else size
        if size == 0:
            continue
        recorder.check_complete(batch.output)
        data = strided(tensors_in(batch.X))
        for use in recorder.uses:
            use.take_from(data)
        key = size, recorder.form, tuple(_names(recorder.uses))
        findings = known.get(key) or found(risk, batch, recorder, size)
        if findings.lasts and not (recorder.selects or recorder.compares):
            known[key] = findings
        findings.apply(recorder.uses)
        reasons = findings.reasons
        seen = {**recorder.unknown, **dict.fromkeys(reasons, "")}
        layers, unknown = resolve(recorder.uses, seen, shapes, bias)
        if unknown and unsupported != "diagonal":
            raise refusal(unknown, reasons, recorder.functions)
        yield Batch(
            *(risk, batch, layers, list(unknown)),
            *(findings.size, findings.owners, findings.sure),
        )


def found(
    risk: EmpiricalRisk, batch: Linearization, recorder: Recorder, size: int
) -> Findings:
    """Find out whose a batch's rows are, see this module."""
    loss, uses = batch.loss, recorder.uses
    device = loss.output.device
    if size == 1:
        owners = torch.zeros(loss.num_rows, dtype=torch.long, device=device)
        return Findings(1, [None] * len(uses), owners)
    trial = Trial(risk, batch, recorder, size)
    if not recorder.selects:  # some data say nothing of the others then
        trial.look()
    if trial.owners is not None and all(trial.places) and not trial.meet:
        return Findings(size, trial.places, trial.owners.to(device))
    best: tuple[list[Order | Tensor | None], Tensor, bool] | None = None
    for owners, sure in trial.guesses():
        places = places_in(batch, uses, owners.to(device), size, trial.places)
        if best is None or places.count(None) < best[0].count(None):
            best = places, owners.to(device), sure
        if None not in places:
            break
    if best is None or (None in best[0] and not best[2]):
        warnings.warn(
            "It was not found which rows of the model's output belong to which datum, "
            "or data have parts in each other's outputs: each row is sent back on its "
            f"own, which is right, but takes {loss.num_rows} backward passes in place "
            "of one. If data are apart, return their outputs datum by datum, and pass "
            "`batch_size_fn` if the first axis of the inputs does not count them.",
            stacklevel=2,
        )
        return Findings(1, [None] * len(uses), None, sure=False)
    places, owners, sure = best
    reasons: dict[str, str] = {}
    for use, place in zip(uses, places, strict=True):
        if place is None:
            names = filter(None, (use.weight, use.bias))
            coupled = trial.owners is None or trial.meet
            reason = _COUPLED if coupled else _SHARED
            reasons |= dict.fromkeys(names, reason)
    return Findings(size, places, owners, reasons, sure, trial.meet)


class Trial:
    """A batch's rows are looked for in parts of its data.

    Parameters
    ----------
    risk : EmpiricalRisk
        The risk.
    batch : Linearization
        The batch.
    recorder : Recorder
        What was seen when it was evaluated.
    size : int
        The number of its data.

    Attributes
    ----------
    places : list of Order or None
        How rows are sorted, for every use; ``None`` where that was not found.
    owners : Tensor or None
        The datum of every row of the output, if that was found.
    meet : bool
        Whether a tensor has two axes for the data, as similarities of them have: what
        some data show says nothing of the others then.
    """

    def __init__(
        self, risk: EmpiricalRisk, batch: Linearization, recorder: Recorder, size: int
    ) -> None:
        self._risk, self._batch, self._seen, self._size = risk, batch, recorder, size
        f = batch.output.detach()
        seen = [f, *(use.input for use in recorder.uses)]
        real = {t.dtype for t in seen if t.is_floating_point()}
        convolves = batch.convolves
        self._tolerance = max(rounding(d, f.device, convolves) for d in real) ** 0.5
        self._f = f
        self.places: list[Any] = [None] * len(recorder.uses)
        self.owners: Tensor | None = None
        self.meet = False

    def look(self) -> None:
        """Evaluate some data without the others."""
        N = self._size
        alone = [range(i, i + 1) for i in (range(2) if N < 4 else (N - 2,))]
        for tables in (several := self._tables()):
            self._compare(alone, tables)
            if self.owners is not None:
                break
        if several:  # what agrees in the end may have been hidden on the way
            self.places = [None] * len(self.places)
            return
        # Thirds, since they cut what halves leave together: neighbours, mirror images.
        all_data = [range(i, N, 3) for i in range(3)]
        rest = all_data if self._seen.reads and N > 3 else []
        if not self._compare(alone + rest) and N > 2:  # a model may need several
            self._compare([range(0, N - 1, N - 2), *rest])

    def guesses(self) -> Iterator[tuple[Tensor, bool]]:
        """Yield owners that the output's rows may have, and whether they are data."""
        N, shape = self._size, self._batch.loss.row_shape
        if self.owners is not None:
            yield self.owners, True
        elif prod(shape) == N:
            yield torch.arange(N), True
        if N not in shape and (owners := self._of_each()) is not None:
            yield owners, True
        for order in orders(shape, N):
            yield order.owners(shape, N).reshape(-1), N in shape

    def _tables(self) -> list[list[int]]:
        """Return which tensors that are as long as the batch may be no data.

        Any of them, if it is also the length of another axis.
        """
        N, tensors = self._size, tensors_in(self._batch.X, inside=False)
        long = [i for i, t in enumerate(tensors) if t.ndim and len(t) == N]
        if len(long) < 2 or not any(N in t.shape[1:] for t in tensors):
            return []
        return [[], *([i] for i in long[1:]), long[1:]]

    def _compare(self, parts: list[range], tables: Collection[int] = ()) -> bool:
        """Look for rows of parts; whether the model can be evaluated on them.

        Some of the tensors of the data are not cut.
        """
        N, loss = self._size, self._batch.loss
        found: list[list[Order | None]] = []
        for picked in parts:
            evaluated = self._evaluated(picked, tables)
            if evaluated is None or evaluated[0].ndim != self._f.ndim:
                return False
            f, seen = evaluated
            uses = seen.uses
            self.meet |= any(
                _shrinks_twice(*both, N, len(picked))
                for both in zip(self._seen.shapes, seen.shapes, strict=False)
            )
            pairs = [(self._f, f)]
            if _names(uses) == _names(self._seen.uses):
                pairs += zip(map(_seen, self._seen.uses), map(_seen, uses), strict=True)
            else:
                pairs += [(f, f)] * len(self._seen.uses)
            found.append([find_order(*p, picked, N, self._tolerance) for p in pairs])
        output, *places = (
            c[0] if len({*c}) == 1 else None for c in zip(*found, strict=True)
        )
        self.places = places
        axis = loss.class_axis
        if output is not None and (axis is None or output.axis != axis % self._f.ndim):
            owners = output.owners(self._f.shape, N)
            owners = owners if axis is None else owners.select(axis, 0)
            self.owners = owners.reshape(-1)
        return True

    def _evaluated(
        self, picked: range, tables: Collection[int]
    ) -> tuple[Tensor, Recorder] | None:
        """Evaluate some of the data; ``None`` if the model raises."""
        model, recorder = self._risk.model, Recorder(self._risk.model.aliases, HANDLERS)
        try:
            with model.left_as_it_is(), model.evaluated_in(recorder):
                f = model(cloned(self._cut(picked, tables)))
            recorder.check_complete(f)
        except Exception as error:  # whatever a model raises on some of the data
            raise_if_out_of_memory(error)
            return None
        return f.detach(), recorder

    def _cut(self, picked: range, tables: Collection[int] = ()) -> Any:
        start, stop, step = picked.start, picked.stop, picked.step
        return cut(self._batch.X, self._size, start, stop, tables=tables, step=step)

    def _of_each(self) -> Tensor | None:
        """Return the owners of outputs that are those of the data one after another."""
        shape, place, lengths = self._batch.loss.row_shape, 0, []
        try:
            for n in range(self._size):
                one = outputs_of(self._risk, self._cut(range(n, n + 1)))
                mine = self._f[place : place + len(one)]
                if not same(mine, one, self._tolerance):
                    return None
                lengths.append(len(one))
                place += len(one)
        except Exception as error:  # whatever a model raises on some of the data
            raise_if_out_of_memory(error)
            return None
        if place != len(self._f):
            return None
        owners = torch.arange(self._size).repeat_interleave(torch.tensor(lengths))
        return owners.reshape(-1, *[1] * (len(shape) - 1)).expand(shape).reshape(-1)


def _shrinks_twice(whole: torch.Size, part: torch.Size, size: int, few: int) -> bool:
    """Whether two axes of a tensor have as many entries per datum, for few data too."""
    if whole == part or len(whole) != len(part) or few == size:
        return False
    pairs = zip(whole, part, strict=True)
    return sum(a != b and a * few == b * size for a, b in pairs) > 1


def _names(uses: list[Use]) -> list[tuple[str, str]]:
    return [(use.kind, use.weight) for use in uses]


def _seen(use: Use) -> Tensor:
    return KINDS[use.kind].seen(use)


def places_in(
    batch: Linearization,
    uses: list[Use],
    owners: Tensor,
    size: int,
    likely: list[Order | None],
) -> list[Order | Tensor | None]:
    """Send back what tells data apart, given those of the output's rows.

    Orders that are likely say whose the rows are that nothing arrives at.

    One backward pass to the layers' results for each of :func:`factors`; more, for the
    smaller base, only where these leave doubt.

    Returns
    -------
    list of Order, Tensor or None
        How every use's rows are sorted, or the datum of each. ``None`` where a row
        depends on several data.
    """
    places: list[Order | Tensor | None] = []
    for base in BASES:
        places = []
        found = _told_apart(batch, uses, owners, size, base)
        for use, its, known in zip(uses, found, likely, strict=True):
            if its is None:
                places.append(None)
                continue
            axes = axes_of(use)
            order = as_order(its, axes, size, known)
            places.append(order or filled(its, axes, size))
        if None not in places:
            break
    return places


def _told_apart(
    batch: Linearization, uses: list[Use], owners: Tensor, size: int, base: int
) -> list[Tensor | None]:
    """Return for every use the datum of each row, ``None`` if some row has several."""
    f, loss = batch.output, batch.loss
    generator = torch.Generator().manual_seed(batch.index)
    u = torch.randn(f.shape, generator=generator, dtype=torch.float64).to(f)
    rows: list[list[Tensor]] = [[] for _ in uses]
    for factor in factors(owners, size, base) if uses else ():
        # a scalar: with a vector, torch imports its symbolic shapes
        total = (f * (u * of_rows(loss, factor))).sum()
        edges = [use.edge for use in uses]
        grads: tuple[Tensor | None, ...] = torch.autograd.grad(
            total, edges, retain_graph=True, allow_unused=True
        )
        for use, g, mine in zip(uses, grads, rows, strict=True):
            g = f.new_zeros(use.shape) if g is None else g
            its = KINDS[use.kind].rows(use, g)
            mine.append(its.reshape(-1, its.shape[-1]))
    eps = rounding(f.dtype, f.device, batch.convolves)
    return [
        decode(its, size, base, max(eps, torch.finfo(its[0].dtype).eps)) for its in rows
    ]
