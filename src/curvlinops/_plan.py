r"""How much memory products take, predicted from products with two and three data.

The tensors that a product with a batch of :math:`n` data creates have sizes that are
affine in :math:`n`, and come in the same order whatever :math:`n` is. So are the bytes
alive after each tensor operation,

.. math:: m_t(n) = a_t + b_t n , \qquad \text{peak}(n) = \max_t m_t(n) ,

whose coefficients follow from two small slices of a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from gc import collect
from math import ceil, inf
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from curvlinops._agreement import rows_agree
from curvlinops._apart import Batch, evaluated, without_zeros
from curvlinops._columns import Columns
from curvlinops._data import (
    Share,
    Tables,
    cloned,
    moved,
    part_of,
    rows_in,
    shares,
    strided,
    tables_of,
    tensors_in,
)
from curvlinops._determinism import close
from curvlinops._draws import preserved_rng
from curvlinops._forms import Form, Side
from curvlinops._identity import Identity
from curvlinops._interrupts import isolated
from curvlinops._memory import budget_bytes, raise_if_out_of_memory
from curvlinops._parts import one_by_one
from curvlinops._spaces import rounding
from curvlinops._status import form_of
from curvlinops._tracker import LimitExceededError, Tracker

if TYPE_CHECKING:
    from curvlinops.risk import EmpiricalRisk
    from curvlinops.risk_operator import RiskOperator

#: Numbers of data in the slices that are multiplied to measure memory, and those for
#: bounds that are reached with the ones before. With a single datum, broadcasting
#: leaves out operations.
SLICES = [2, 3], [1, 2], [1]
#: Operations, and the bytes alive after each.
Line = list[tuple[Any, int]]


# -- what is multiplied --------------------------------------------------------------


class Loop(NamedTuple):
    """One of a risk's loops over data.

    Parameters
    ----------
    form : Form
        What is multiplied.
    title : str
        Who multiplies.
    key : Identity, optional
        The form's name, under which it is recorded.
    """

    form: Form
    title: str
    key: Identity | None = None

    def run(self, risk: EmpiricalRisk, V: Tensor) -> Tensor:
        """Multiply vectors, see :meth:`operand`."""
        if self is GRADIENT:
            risk.gradient_and_loss()
            return V
        return risk.run(self, V)

    def operand(self, risk: EmpiricalRisk, K: int) -> Tensor:
        """Return a random vector ``K`` times, in the memory of one or two."""
        rows = sum(shape.numel() for shape in risk.output_shapes)
        length, _ = self.lengths(rows, risk.space.dim)
        generator = torch.Generator().manual_seed(20260101)
        V = torch.randn(length, min(K, 2), generator=generator)
        return V.to(risk.space.device, risk.space.dtype)[:, :1].expand(-1, K)

    def lengths(self, rows: int, dim: int) -> tuple[int, int]:
        """Return the length of the vectors and of the results."""
        if self is GRADIENT:
            return dim, dim  # beside that of an earlier pass
        known = {Side.PARAMETERS: dim, Side.OUTPUTS: rows}
        return known[self.form.cols], known[self.form.rows]


#: Gradient and loss, whatever vector there is.
GRADIENT = Loop(Form(lambda b, _: b.gradient(), linear=False), "gradient and loss")


def loops_of(operator: RiskOperator, columns: int) -> tuple[list[Loop], int]:
    """Return the loops over data that a product makes, and their columns."""
    if not operator.forms:
        raise TypeError(
            "Plans are made for operators whose products run over the data; this one "
            "declares no `forms`, or computes a matrix of its own at first use."
        )
    loops = loops_over(operator.risk, operator.forms, operator._title())
    linear = all(form.linear for form in operator.forms)
    return loops, columns if linear else 1


def loops_over(risk: EmpiricalRisk, forms: Sequence[Form], title: str) -> list[Loop]:
    """Return the loops that multiply by forms, one after the other."""
    return [Loop(form, title, form.key(risk)) for form in forms]


def twin_of(risk: EmpiricalRisk, data: list[Any], cache: str | int) -> EmpiricalRisk:
    """Return a risk of other data, on which products are tried out."""
    twin = risk.twin(data=data, cache=cache, max_memory=None, progressbar=False)
    twin.model.behave_like(risk.model)
    twin.model.warns = False
    twin._known_input = risk._known_input
    twin._unwritten = set(risk._unwritten)
    twin._rehearses, twin._may_fold = True, risk._may_fold
    return twin


# -- what it takes -------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Data:
    """What is known of the batches before they are multiplied.

    Parameters
    ----------
    first : tuple
        The first batch with any data.
    size : int or None
        Its number of data.
    sizes : list of int or None
        Numbers of data.
    unit : float
        Entries of the inputs that count as one datum: those of a datum of the first
        batch, or all of its inputs if numbers of data are not known.
    loads : list of float
        Sizes in this unit: twice the tokens count twice.
    nbytes : float
        Bytes per load that the user holds anyway, hence nobody else need keep.
    tables : Tables
        Tensors that belong to no single data.
    """

    first: tuple[Any, Any]
    size: int | None
    sizes: list[int | None]
    unit: float
    loads: list[float]
    nbytes: float
    tables: Tables

    @classmethod
    def of(cls, risk: EmpiricalRisk) -> Data:
        """Read all data once, without evaluating the model."""
        first: Any = None
        sizes: list[int | None] = []
        entries: list[int] = []
        rows = []
        with preserved_rng(risk.space.device):
            for X, y in risk.pairs():
                sizes.append(size := risk._size_or_none(X))
                entries.append(numel(X))
                if size:
                    rows.append(rows_in(X, y, size))
                if first is None and sizes[-1] != 0:
                    first, place = (X, y), len(sizes) - 1
        if first is None:
            raise ValueError("The data is empty: there is no batch to work on.")
        unit = entries[place] / (sizes[place] or 1)
        loads = [n / unit for n in entries]
        listed, device = isinstance(risk.data, (list, tuple)), risk.space.device
        held = [t for t in strided(tensors_in(list(first))) if t.device == device]
        nbytes = listed * sum(t.numel() * t.element_size() for t in held)
        tables = tables_of(rows) if rows else Tables()
        held_each = nbytes / loads[place]
        return cls(first, sizes[place], sizes, unit, loads, held_each, tables)

    def slice(self, n: int) -> tuple[Any, Any]:
        """Return some data of the first batch, copied, as a model may write there."""
        share = Share(0, n, self.size or 1)
        X, y = part_of(self.first, share, self.tables)
        return cloned(X), cloned(y)


def numel(X: Any) -> int:
    """Return the number of entries of all tensors in the inputs of a batch."""
    return max(1, sum(t.numel() for t in tensors_in(X)))


@dataclass(frozen=True, eq=False)
class Footprint:
    """Bytes that repeated products with one batch take, as a function of its size.

    Parameters
    ----------
    sizes : list of int
        Numbers of data that were multiplied.
    series : list of numpy.ndarray
        For every product in turn, the bytes alive after each operation, one row per
        size. What earlier products have left is counted.
    held : list of numpy.ndarray
        Bytes kept after every product, in the same layout.
    fixed : int
        Bytes of vectors and results, which are not in the others.
    total : int
        Bytes of sums over batches or parts, which later ones find.
    spare : int
        Bytes of what is multiplied to measure this, beside the user's operand.
    exceeds : bool
        Whether products that keep something take more than the bound, and have not been
        measured.
    form : str
        What the last product was made from.
    matrix : Kept or None
        What is kept if it is small.
    """

    sizes: list[int]
    series: list[np.ndarray]
    held: list[np.ndarray]
    fixed: int
    total: int
    spare: int
    exceeds: bool
    form: str
    matrix: Kept | None

    def _at(self, values: np.ndarray, n: float) -> int:
        return _extrapolated(self.sizes, values, n)

    def peak(self, n: float, product: int = 0) -> int:
        """Return the most bytes alive in a product, what it finds included."""
        return self.fixed + self._at(self.series[product], n)

    def kept(self, n: float, product: int) -> int:
        """Return the bytes kept after a product, if they may be."""
        return self._at(self.held[product], n)

    def room(self, n: float) -> float:
        """Return the bytes that any product takes beyond what was kept before it."""
        if self.exceeds:
            return inf
        found = [0, *(self.kept(n, i) for i in range(len(self.held)))]
        peaks = [self.peak(n, i) for i in range(len(self.series))]
        most = max(p - kept for p, kept in zip(peaks, found, strict=False))
        return most + self.total


class Kept(NamedTuple):
    """A small matrix, or its factors.

    Parameters
    ----------
    after : int
        Number of products after which it is kept.
    nbytes : int
        Bytes that it takes.
    work : int
        Bytes that computing it takes beside these.
    """

    after: int
    nbytes: int
    work: int


class Joined(NamedTuple):
    """What it takes to multiply all data as one batch.

    Parameters
    ----------
    batches : list of int
        Bytes that the batches keep.
    nbytes : int
        Bytes that the one batch keeps.
    peak : int
        Most bytes alive.
    matrix : Kept or None
        As in :class:`Footprint`.
    """

    batches: list[int]
    nbytes: int
    peak: int
    matrix: Kept | None


#: Share of a bound that predictions fill; the rest is for what they miss: copies of a
#: few data, and tensors whose sizes do not grow with the batch as its first data say.
_FILLED = 0.99


@dataclass(frozen=True, eq=False)
class Probe:
    """Measures products on slices of a risk's first batch.

    Parameters
    ----------
    risk : EmpiricalRisk
        The risk, of which nothing is changed.
    data : Data
        Its data.
    products : sequence of Loop
        The loops over data that make up a product.
    K : int
        Number of columns.
    budget : int, optional
        Bytes that Jacobians may take up.
    limit : int, optional
        Bytes that are not to be exceeded, the user's operand included: products stop
        before. Only what a single datum takes is measured in any case.

    Attributes
    ----------
    usable : float
        What of these is filled.
    """

    risk: EmpiricalRisk
    data: Data
    products: Sequence[Loop]
    K: int
    budget: int = 0
    limit: float = inf
    _kept: dict[Any, dict[float, int]] = field(default_factory=dict)

    @property
    def usable(self) -> float:
        """Return the bytes of the bound that predictions fill."""
        return self.limit * _FILLED

    def footprints(
        self, loads: Iterable[float], width: int | None = None, part: bool = False
    ) -> Callable[[float], Footprint]:
        """Measure products with batches of all these sizes; return what maps to them.

        The largest and the smallest, if sizes decide how many columns are multiplied
        at once.
        """
        if self.K > 1:  # learn what slices keep, on which widths depend
            replace(self, K=1).footprint(max(loads), width, part)
        known = {max(loads): self.footprint(max(loads), width, part)}
        if self.K > 1 and min(loads) < max(loads):
            known[min(loads)] = self.footprint(min(loads), width, part)
        return lambda load: known[min(known, key=lambda n: abs(n - load))]

    def footprint(
        self, load: float, width: int | None = None, part: bool = False
    ) -> Footprint:
        """Measure products with batches of a size.

        Parameters
        ----------
        load : float
            The size; it decides how many columns are multiplied at once.
        width : int, optional
            Bound for that number.
        part : bool, optional
            Whether the batches are parts of larger ones.

        Raises
        ------
        LimitExceededError
            If several columns at once reach the limit.
        """
        size = self.data.size or 0
        for slices in (s for s in SLICES if max(s) <= size):
            try:
                return self._footprint(slices, load, width, part)
            except LimitExceededError:
                if slices == [1]:
                    raise
                collect()  # what is left of it may be in reference cycles
            except Exception as error:  # whatever the user's model raises on a slice
                raise_if_out_of_memory(error)
                break
        return self._footprint([], load, width, part)

    def _footprint(
        self, slices: list[int], load: float, width: int | None, part: bool
    ) -> Footprint:
        size, dim = self.data.size or 1, self.risk.space.dim
        # To say what would do, it must be known what the least takes.
        bounded = len(slices) > 1 or (width or 1) > 1
        items = [(self.data.slice(n), n) for n in slices]
        runs: list[Any] = []
        widths: list[int] = []
        probe: Any = None
        for item, n in reversed(items or [(self.data.first, size)]):
            probe = None  # with what it keeps
            share = Share(0, n, size) if part else None
            chosen = iter([*widths])  # all slices are multiplied like the largest
            make = partial(self._slice, item, share, (n, load), width, chosen, widths)
            series, held, probe, exceeds = self._run(make, load / n, bounded)
            runs.insert(0, (n, series, held, exceeds))
        outputs = round(probe.output_shapes[0].numel() * sum(self.data.loads) / n)
        lengths = [p.lengths(outputs, dim) for p in self.products]
        itemsize = self.risk.space.dtype.itemsize
        several = part or len(self.data.sizes) > 1
        return Footprint(
            [n for n, *_ in runs],
            [_aligned(p) for p in zip(*(s for _, s, *_ in runs), strict=False)],
            [_aligned(p) for p in zip(*(h for *_, h, _ in runs), strict=False)],
            # Every loop multiplies what the one before it has given.
            (lengths[0][0] + sum(out for _, out in lengths)) * self.K * itemsize,
            several * max(out for _, out in lengths) * self.K * itemsize,
            sum(length for length, _ in lengths) * min(self.K, 2) * itemsize,
            any(exceeds for *_, exceeds in runs),
            "Jacobian"
            if probe._dense.jacobians
            else form_of(probe._recordings.values(), [p.key for p in self.products]),
            self._matrix(probe, outputs, load / n),
        )

    def _slice(
        self,
        item: Any,
        share: Share | None,
        sizes: tuple[float, float],
        width: int | None,
        chosen: Iterator[int],
        widths: list[int],
    ) -> EmpiricalRisk:
        """Return a risk of a slice that multiplies as the given one a whole batch."""
        cache = "off" if self.risk.cache == "off" else 1 << 62
        probe = twin_of(self.risk, [item], cache)
        probe._unwritten &= {(0, None)}
        probe._share = share

        def choose(columns: Columns, key: Any, batch: Any) -> int:
            wide = columns.fitting(key, self._enlarged(batch, *sizes))
            widths.append(next(chosen, wide))
            return widths[-1]

        probe._columns.most = width or self.risk._columns.most
        probe._columns.planned = choose
        return probe

    def joined(self, nbytes: int) -> Joined | None:
        """Multiply all data if products put them into one batch.

        They do with few bytes only: those kept after one product are given.
        """
        risk, (product, *others) = self.risk, self.products
        small = nbytes <= risk.policy.column_bytes and len(self.data.sizes) > 1
        if others or not product.form.may_join or not small:
            return None
        if not risk._may_be_dense(product.key) or not risk._may_put_together():
            return None
        with preserved_rng(risk.space.device):
            twin = twin_of(risk, list(risk.pairs()), risk.cache)
        with Tracker() as tracker:
            V = product.operand(twin, self.K)
            for number in range(risk.policy.last_change):
                product.run(twin, V)
                one = twin._joined.get(product.key)
                if one is None and number > 0:
                    return None
                if one is not None and one.settled(product.key):
                    break
        held = [twin._recordings[i].nbytes for i in range(len(self.data.sizes))]
        outputs = sum(shape.numel() for shape in twin.output_shapes)
        matrix = self._matrix(twin, outputs, 1.0)
        return Joined(held, twin._ledger.used() - sum(held), tracker.peak, matrix)

    def _enlarged(self, batch: Any, n: float, load: float) -> int:
        """Return what a batch of size ``load`` would keep at the same stage."""
        known = self._kept.setdefault(batch.stage, {})
        known[n] = batch.nbytes
        if len(known) == 1:
            return int(batch.nbytes * load / n)
        (few, a), *_, (more, b) = sorted(known.items())
        return int(a + (b - a) * (load - few) / (more - few))

    def _run(
        self, make: Callable[[], EmpiricalRisk], factor: float, bounded: bool
    ) -> tuple[list[Line], list[Line], EmpiricalRisk, bool]:
        """Multiply until the route has settled, or the limit is reached.

        Return bytes alive, bytes kept, the risk, and whether it was, which must not be
        in the first product: that is ``bounded``, or measured in any case.
        """
        shapes, K, pays, largest = self._look(make(), factor, bounded)
        key, probe = self.products[0].key, make()
        probe._output_shapes = shapes
        keeps = self.risk._repeats and self.risk.cache != "off"
        operands = [p.operand(probe, K) for p in self.products]
        rows, dim = shapes[0].numel(), self.risk.space.dim
        results = [K * p.lengths(rows, dim)[1] for p in self.products]
        all_series: list[Line] = []
        held: list[Line] = []
        with Tracker() as tracker:
            tracker.limit = self._allowed(rows) if bounded else inf
            tracker.next = self._expected()
            probe._columns.planned = _announced(probe._columns, tracker, largest)
            while len(held) < (self.risk.policy.last_change if keeps else 1):
                all_series.append([])
                for product, V, result in zip(
                    self.products, operands, results, strict=True
                ):
                    tracker.series = []
                    with suppress(LimitExceededError):
                        product.run(probe, V)
                    fixed = result * self.risk.space.dtype.itemsize
                    all_series[-1] += [(f, n - fixed) for f, n in tracker.series]
                if tracker.exceeded:
                    if not held:
                        raise LimitExceededError
                    del all_series[-1]
                    break
                tracker.limit = self._allowed(rows)
                probe._dense.spent[key] = float(pays)
                held.append([(None, probe._ledger.used())])
                same = held[-1:] == held[-2:-1]
                if same and len(all_series[-1]) == len(all_series[-2]):
                    recorded = probe._recordings.values()
                    if all(b.settled(p.key) for b in recorded for p in self.products):
                        break
        return all_series, held, probe, tracker.exceeded

    def _allowed(self, rows: int = 0) -> float:
        """Return the limit for what a product has alive.

        Beside it are the user's operand, and those of the loops.
        """
        space = self.risk.space
        lengths = [p.lengths(rows, space.dim)[0] for p in self.products]
        given = self.K * lengths[0] + min(self.K, 2) * sum(lengths)
        return self.usable - given * space.dtype.itemsize

    def _expected(self) -> int:
        """Return what may be created before it is noticed: by a recording, vectors."""
        return 2 * self.risk.space.dim * self.risk.space.dtype.itemsize

    def _look(
        self, look: EmpiricalRisk, factor: float, bounded: bool
    ) -> tuple[tuple[torch.Size, ...], int, bool, int]:
        """Multiply single vectors, which makes what is made once in a process.

        Return shapes of outputs, how many columns to multiply, whether Jacobians are
        kept as matrices, and the bytes of the largest tensor.
        """
        with Tracker() as tracker:
            tracker.limit = self._allowed() if bounded else inf
            tracker.next = self._expected()
            policy = self.risk.policy
            shapes, K = look.output_shapes, min(self.K, policy.record_early + 3)
            if self.K > 1:
                key, batches = self.products[0].key, look._recordings.values()
                widths = [look._columns.at_once(key, b) for b in batches]
                K = min(self.K, max([K, *(widths or [policy.columns])]))
            pays = self._jacobians_pay(look, factor)
            operands = [p.operand(look, 1) for p in self.products]
            for number in range(2):
                with suppress(LimitExceededError):
                    for product, V in zip(self.products, operands, strict=True):
                        product.run(look, V)
                if tracker.exceeded and number == 0:
                    raise LimitExceededError
                tracker.limit = self._allowed(shapes[0].numel())
        return shapes, K, pays, tracker.largest

    def _jacobians_pay(self, probe: EmpiricalRisk, factor: float) -> bool:
        """Whether batches' Jacobians are kept as matrices, after a first product."""
        rows = ceil(probe.output_shapes[0].numel() * factor)
        nbytes = rows * sum(self.data.loads) / max(self.data.loads)
        nbytes *= self.risk.space.dim * self.risk.space.dtype.itemsize
        pays = probe._dense.jacobians_pay([rows], list(probe._recordings.values()))
        return pays and nbytes <= self.budget and self.products[0].key is not None

    def comparison(self, load: float) -> int:
        """Return the bytes that comparing a batch's outputs with its parts' takes."""
        sizes = next(s for s in SLICES if max(s) <= (self.data.size or 1))
        lines = []
        for n in sizes:
            X, y = self.data.slice(n)
            device = self.risk.space.device
            item = moved(X, device), moved(y, device)
            twin = twin_of(self.risk, [item], "off")
            with Tracker() as tracker:
                twin.session(partial(_compare, twin, item))
            lines.append(tracker.series)
        return _extrapolated(sizes, _aligned(lines), load)

    def _matrix(self, probe: EmpiricalRisk, outputs: int, larger: float) -> Kept | None:
        """Return when a small matrix is kept, or its factors if outputs are few enough.

        Batches are ``larger`` by a factor than those that have been tried out.
        """
        product, *others = self.products
        form = product.form
        if others or not form.is_square or not probe._may_be_dense(product.key):
            return None
        dense, key, batches = probe._dense, product.key, probe._multiplied(product.key)
        factored = form.middle is not None and dense.has_factors()
        factored &= self.risk.max_memory is None
        cost = dense.cost_of_matrix(key, batches, factored)
        number, row = len(self.data.loads), probe.space.dim * probe.space.dtype.itemsize
        if factored and dense.factors_suffice(outputs):
            nbytes = outputs * row
            cost, work = dense.cost_of_factors(nbytes, number), 3 * nbytes // number
        elif factored:
            nbytes, work = probe.space.dim * row, outputs * row
        else:  # columns of the identity, and what they are multiplied to
            nbytes = probe.space.dim * row
            graph = larger * max((batch.nbytes for batch in batches), default=0)
            policy = self.risk.policy
            work = nbytes + 3 * policy.columns * row
            work += int(min(policy.columns * graph, policy.column_bytes))
        products = ceil(cost / dense.cost(key, self.K, batches))
        # Jacobians are computed in the second product.
        return Kept(max(products, 2 if factored else 1), nbytes, work)


def _announced(
    columns: Columns, tracker: Tracker, largest: int
) -> Callable[[Columns, Any, Any], int]:
    """Say to a tracker what follows once it is planned how many columns go at once.

    Tensors are as many times larger then than the largest for one.
    """
    planned = columns.planned
    assert planned is not None

    def choose(columns: Columns, key: Any, batch: Any) -> int:
        wide = planned(columns, key, batch)
        tracker.next = max(tracker.next, wide * largest)
        return wide

    return choose


def _compare(risk: EmpiricalRisk, item: tuple[Any, Any]) -> None:
    """Evaluate model and loss, and compare outputs with themselves."""
    leaves = without_zeros([leaf.detach() for leaf in risk.model.leaves])
    rows, _ = evaluated(risk, item, leaves)
    for row in rows:
        rows_agree(row, row, 0.0)


def _extrapolated(sizes: list[int], values: np.ndarray, n: float) -> int:
    """Return the most of what was measured for some numbers of data, for another."""
    if len(sizes) == 1:
        return ceil(values.max() * max(1.0, n / sizes[0]))
    (few, more), (a, b) = sizes, values
    return ceil((a + (b - a) * (n - few) / (more - few)).max())


def _aligned(lines: Sequence[Line]) -> np.ndarray:
    """Return series as rows, with their maxima where operations are not the same."""
    first, last = lines[0], lines[-1]
    if abs(len(last) - len(first)) > 0.05 * len(first):  # a loop over data, say
        return np.array([[max(n for _, n in line)] for line in lines], dtype=float)
    head = _common(first, last)
    shortest = min(len(first), len(last)) - head
    tail = min(_common(first[::-1], last[::-1]), shortest)
    rows, differ = [], max(map(len, lines)) > head + tail
    for line in lines:
        numbers, end = [n for _, n in line], len(line) - tail
        middle = [max(numbers)] if differ else []
        rows.append(numbers[:head] + middle + numbers[end:])
    return np.array(rows, dtype=float)


def _common(a: Line, b: Line) -> int:
    """Return how many operations two series have in common at their start."""
    pairs = zip(a, b, strict=False)
    differ = (i for i, ((f, _), (g, _)) in enumerate(pairs) if f is not g)
    return next(differ, min(len(a), len(b)))


# -- fitting it into a bound ---------------------------------------------------------


@dataclass(frozen=True)
class Fit:
    """What keeps products within a bound.

    Parameters
    ----------
    entries : float or None
        Most entries of the inputs of a part of a batch; None if batches are not cut.
    width : int
        Most columns multiplied at once.
    budget : int
        Bytes that recordings may take up.
    tables : Tables
        Tensors that are not cut.
    whole : int
        Bytes that products take if batches are not cut.
    """

    entries: float | None
    width: int
    budget: int
    tables: Tables
    whole: int


def number_of_parts(size: int | None, load: float, most: float | None) -> int:
    """Return in how many parts a batch is multiplied if loads are bounded."""
    if most is None or not size:
        return 1
    return ceil(size / max(1, int(most * size / load)))


def fitted(probe: Probe) -> tuple[Fit, Callable[[float], Footprint]]:
    """Fit products into the limit.

    Raises
    ------
    MemoryError
        If they do not fit; the message says how many bytes would do.
    """
    data, risk, limit = probe.data, probe.risk, probe.usable
    with Tracker() as tracker:
        risk._watch.state()  # compared before every product
    load, most = max(data.loads), None
    print_ = probe.footprint(load, 1)
    loads = data.loads

    def peak(n: float) -> int:
        return max(least, print_.peak(n) + print_.total + print_.spare)

    least = tracker.peak
    if (needed := (whole := peak(load))) > limit:
        cause, taken = _why_whole(probe)
        what = "as batches stay whole"
        if not cause:
            operand = _operand(risk, probe.products, probe.K)
            least = max(least, operand + taken)
            sizes = [size or 1 for size in data.sizes]
            one = max(n / size for n, size in zip(data.loads, sizes, strict=True))
            print_ = probe.footprint(one, 1, part=True)
            needed, what = peak(one), "even with one datum at a time"
            compared = min(whole, operand + probe.comparison(load))
            if compared > max(needed, limit):
                needed, what = compared, "as parts are compared with whole batches"
        if needed > limit:
            raise MemoryError(_refusal(probe, needed, what, cause))
        most = one * _largest(lambda k: peak(k * one) <= limit, ceil(load / one))
        parts = [number_of_parts(*p, most) for p in zip(sizes, data.loads, strict=True)]
        loads = [
            n * ceil(size / number) / size
            for n, size, number in zip(data.loads, sizes, parts, strict=True)
        ]
    width, at = _widest(probe, loads, most is not None, print_)
    room = max(least, *(at(n).room(n) for n in loads))
    entries = None if most is None else most * data.unit
    budget = int(max(0, limit - room))
    return Fit(entries, width, budget, data.tables, whole), at


def _widest(
    probe: Probe, loads: list[float], part: bool, narrow: Footprint
) -> tuple[int, Callable[[float], Footprint]]:
    """Return how many columns may be multiplied at once, and what that takes.

    What more columns take is estimated before it is tried, since trying takes it.
    """
    space, limit = probe.risk.space, probe.usable
    most = probe.risk.policy.bytes_of_columns(space.device)
    most //= space.dim * space.dtype.itemsize
    if probe.K == 1 or most < 4:
        return 1, lambda _: narrow

    def needed(at: Callable[[float], Footprint]) -> int:
        return max(at(n).peak(n) + at(n).total + at(n).spare for n in loads)

    def tried(width: int, estimate: float) -> Callable[[float], Footprint] | None:
        if estimate > limit:
            return None
        try:
            at = probe.footprints(loads, width, part)
        except LimitExceededError:
            return None
        return at if needed(at) <= limit else None

    one = needed(lambda _: narrow)
    more = min(64, most, probe.K) - 1
    # A column takes no more than all of a product with one at a time ...
    at = tried(64, one + more * (one - narrow.fixed))
    if at is not None:
        return 64, at
    # ... and itself and its product at least.
    each: float = 2 * space.dim * space.dtype.itemsize
    more = min(4, probe.K) - 1
    if (few := tried(4, one + more * each)) is None:
        return 1, lambda _: narrow
    each = max(each, (needed(few) - one) / more)
    for width in (64, 16):
        more = min(width, most, probe.K) - 4
        at = tried(width, needed(few) + more * each) if more > 0 else None
        if at is not None:
            return width, at
    return 4, few


def _largest(holds: Callable[[int], bool], stop: int) -> int:
    """Return the largest number below ``stop`` with a property that 1 has."""
    low = 1
    while stop - low > 1:
        middle = (low + stop) // 2
        low, stop = (middle, stop) if holds(middle) else (low, middle)
    return low


def check_parts(probe: Probe, fit: Fit) -> None:
    """Raise if parts of batches give something else than they give in their batches.

    All batches that are cut are read and evaluated, see :class:`Batch`.

    Raises
    ------
    MemoryError
        If some part differs, or that cannot be found out within the bound; the message
        says what products with whole batches take.
    """
    risk = probe.risk
    device, twin = risk.space.device, None
    room = int(probe.usable) - _operand(risk, probe.products, probe.K)
    with preserved_rng(device):
        for index, (X, y) in enumerate(risk.pairs()):
            size = risk._size_or_none(X)
            number = number_of_parts(size, numel(X), fit.entries)
            if size is None or number == 1:
                continue
            item = moved(X, device), moved(y, device)
            twin = twin or twin_of(risk, [item], "off")
            batch = Batch(twin, item, shares(size, number), fit.tables, room)
            if (same := twin.session(batch.comes_apart)) is None:
                cause = (
                    f"evaluating batch {index} as a whole, which its parts are "
                    "compared with, takes more than that."
                )
            elif not same:
                cause = (
                    f"parts of batch {index} do not give what they give together: does "
                    "the model couple data (means over the batch, positions counted in "
                    "it, a branch on all of it), or is a tensor as long as the batch, "
                    "but no data?"
                )
            if not same:
                cause = f"They cannot be cut, since {cause}"
                raise MemoryError(
                    _refusal(probe, fit.whole, "as batches stay whole", cause)
                )


def _operand(risk: EmpiricalRisk, products: Sequence[Loop], K: int) -> int:
    """Return the bytes of the user's operand."""
    length, _ = products[0].lengths(0, risk.space.dim)
    return length * K * risk.space.dtype.itemsize


def _refusal(probe: Probe, needed: int, what: str, cause: str) -> str:
    """Say why products do not fit into a bound, and what would do."""
    (product, *_), K = probe.products, probe.K
    needed = ceil(needed / _FILLED)
    alone = what == "even with one datum at a time"
    return (
        f"{product.title} with {K} column{'s' * (K > 1)} needs {needed} bytes, {what}, "
        f"but `max_memory` is {probe.limit}."
        + (f" {cause}" if cause else "")
        + (" Products take more than that." if product is GRADIENT else "")
        + f" Pass `max_memory={ceil(1.02 * needed)}` or more, "
        + ("" if alone else "smaller batches, ")
        + ("fewer columns, " if K > 1 else "")
        + "or fewer parameters."
    )


def _why_whole(probe: Probe) -> tuple[str, int]:
    """Return why batches cannot be cut into parts, and what it took to find out.

    Nothing if they can.
    """
    risk, data = probe.risk, probe.data
    if not all(data.sizes):
        return (
            "They cannot be cut, since the number of data in a batch is not known: "
            "pass `batch_size_fn`.",
            0,
        )
    loss = risk.loss_function
    if loss is not None and loss.loss.opaque and loss.num_terms_fn is None:
        return (
            "They cannot be cut, since a loss that is not known in closed form may "
            "couple data: pass `num_terms_fn` if it does not.",
            0,
        )
    size = min(2, data.size or 1)
    if size == 1:
        return "", 0
    few = probe._slice(data.slice(size), None, (1, 1), None, iter([]), [])
    try:
        with Tracker() as tracker:
            apart = few.session(
                lambda: all(_is_apart(few, b) for b in few.batches("plan"))
            )
    except Exception as error:  # whatever the user's model raises on a slice
        raise_if_out_of_memory(error)
        return (
            "They cannot be cut, since model or loss fail with two data of the "
            f"first batch ({type(error).__name__}).",
            0,
        )
    if not apart:
        return (
            "They cannot be cut, since two data together do not give what they "
            "give apart: is there batch normalisation in train mode, or an output "
            "whose first axis is not that of the data?",
            0,
        )
    return "", tracker.peak


def _is_apart(risk: EmpiricalRisk, batch: Any) -> bool:
    """Whether two data contribute apart."""
    parts = one_by_one(risk, batch)
    if len(parts) == 1 or risk.loss_function is None:
        return len(parts) > 1
    pairs = [
        (sum(torch.as_tensor(p.count) for p in parts), torch.as_tensor(batch.count)),
        (sum(p.loss.value() for p in parts), batch.loss.value()),
    ]
    tolerance = (
        rounding(batch.output.dtype, batch.output.device, batch.convolves) ** 0.5
    )
    return all(close(torch.as_tensor(a), b, tolerance) for a, b in pairs)


# -- the plan ------------------------------------------------------------------------


@dataclass(frozen=True)
class BatchPlan:
    """What a product does with one batch.

    Parameters
    ----------
    size : int or None
        Number of data, if known.
    parts : int
        Number of parts that it is multiplied in, one after the other.
    kept : int
        Number of parts whose recordings are kept between products.
    form : str
        What is kept of these once the route has settled: ``"sensitivities"`` (which
        come late), ``"recording"``, ``"graph"``, or ``"Jacobian"``.
    held : int
        Bytes of the recordings that are kept.
    peak : int
        Most bytes alive while it is multiplied, other batches' recordings, vectors and
        results included.
    """

    size: int | None
    parts: int
    kept: int
    form: str
    held: int
    peak: int

    @property
    def route(self) -> str:
        """The route in words."""
        how = f"{self.form} kept"
        if self.kept < self.parts:
            how = f"{how} of {self.kept}, others recomputed"
            how = how if self.kept else "recomputed"
        return how + (f" in {self.parts} parts" if self.parts > 1 else "")


@dataclass(frozen=True)
class Plan:
    """What products with an operator take; ``str`` gives a table.

    Parameters
    ----------
    batches : tuple of BatchPlan
        One per batch of the data.
    columns : int
        Columns of the operand.
    held : int
        Bytes of recordings (and of the matrix, if it is materialised) between products,
        once their route has settled.
    peak : int
        Most bytes alive at a time: recordings, operand, result, and what a product
        creates and drops. Model, parameters and data are not counted. If a matrix is
        materialised, that is a bound for what it takes.
    budget : int
        Bytes that recordings may take up.
    max_memory : int or None
        Bound for ``peak``, if there is one.
    dense_after : int or None
        Number of such products after which a small matrix is materialised. If there are
        fewer than half as many outputs as rows, it is kept as a product of two factors.
    joined : int
        Bytes of the one batch that small ones are put into, zero if they are not.
    reason : str
        Why nothing is kept, or not everything; empty if everything is.
    """

    batches: tuple[BatchPlan, ...]
    columns: int
    held: int
    peak: int
    budget: int
    max_memory: int | None
    dense_after: int | None
    joined: int = 0
    reason: str = ""

    def __str__(self) -> str:
        """Return a table."""
        lines = [("batch", "data", "kept", "peak", "route")]
        for i, b in enumerate(self.batches):
            size = "?" if b.size is None else str(b.size)
            lines.append((str(i), size, _bytes(b.held), _bytes(b.peak), b.route))
        lines.append(("all", "", _bytes(self.held), _bytes(self.peak), ""))
        widths = [max(len(line[i]) for line in lines) for i in range(4)]
        table = [
            "  ".join([*map(str.rjust, line[:4], widths), line[4]]).rstrip()
            for line in lines
        ]
        if self.joined:
            kept = _bytes(self.joined)
            table.append(f"All batches are multiplied as one, which keeps {kept}.")
        if self.dense_after is not None:
            table.append(
                f"The matrix or its factors are kept after {self.dense_after} products."
            )
        if self.reason:
            table.append(self.reason)
        return "\n".join(table)


def _bytes(number: float) -> str:
    for unit in ("B", "kB", "MB"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} GB"


def most_kept(risk: EmpiricalRisk) -> int:
    """Return the bytes that may be kept by the setting of ``cache``."""
    return budget_bytes(risk.cache, risk.space.device, risk.policy.cache_fraction)


@isolated()
def plan(operator: RiskOperator, columns: int) -> Plan:
    """Predict what products of an operator take; see `RiskOperator.plan`."""
    risk = operator.risk
    risk._refresh_if_changed()
    with risk._alone():
        (products, K), data = loops_of(operator, columns), Data.of(risk)
        budget, entries = most_kept(risk), None
        if risk.max_memory is None:
            probe = Probe(risk, data, products, K, budget)
            at = probe.footprints(data.loads)
        else:
            probe = Probe(risk, data, products, K, limit=risk.max_memory)
            fit, at = fitted(probe)
            if fit.entries is not None and fit.entries < (risk._entries or inf):
                check_parts(probe, fit)
            budget, entries = min(budget, fit.budget), fit.entries
    most = None if entries is None else entries / data.unit
    pairs = list(zip(data.sizes, data.loads, strict=True))
    numbers = [number_of_parts(size, load, most) for size, load in pairs]
    loads = [
        load * (share.stop - share.start) / share.size
        for (size, load), number in zip(pairs, numbers, strict=True)
        for share in shares(size or 1, number)
    ]
    prints = [at(load) for load in loads]
    keeps = risk._repeats and risk.cache != "off"
    held, peaks = _simulated(prints, loads, data, budget if keeps else -1)
    batches, start = [], 0
    for (size, _), number in zip(pairs, numbers, strict=True):
        own = range(start, start + number)
        kept = [held[j] for j in own if j in held]
        form, peak = prints[start].form, max(peaks[j] for j in own)
        batches.append(BatchPlan(size, number, len(kept), form, sum(kept), peak))
        start += number
    total, highest, matrix = sum(held.values()), max(peaks), prints[0].matrix
    joined = None
    if keeps and risk.max_memory is None:
        kept_first = sum(p.kept(n, 0) for p, n in zip(prints, loads, strict=True))
        joined = probe.joined(kept_first)
    if joined is not None:
        batches = [
            replace(b, form="graph", kept=1, held=n)
            for b, n in zip(batches, joined.batches, strict=True)
        ]
        total = sum(joined.batches) + joined.nbytes
        highest, matrix = joined.peak, joined.matrix
    dense_after, nbytes, work = matrix or (None, 0, 0)
    fits = total + nbytes * (1 if risk.max_memory is None else 2) <= budget
    if len(held) < len(loads) or not fits:
        dense_after = None
    if dense_after is not None:
        total += nbytes
        highest = max(highest, total + work)
    # Those of a product in which the loops over data have no part.
    vectors = sum(operator.shape) * columns * risk.space.dtype.itemsize
    highest = max(highest, total + vectors)
    return Plan(
        tuple(batches),
        columns,
        total,
        highest,
        budget,
        risk.max_memory,
        dense_after,
        0 if joined is None else joined.nbytes,
        risk.why_nothing_is_kept() or _why_not_all(batches, budget),
    )


def _why_not_all(batches: Sequence[BatchPlan], budget: int) -> str:
    """Say why some batches are recomputed, if they are."""
    if all(batch.kept == batch.parts for batch in batches):
        return ""
    return (
        f"Not all is kept, since recordings may take {_bytes(budget)}: what `cache` "
        "and `max_memory` allow."
    )


def _simulated(
    prints: list[Footprint], loads: list[float], data: Data, budget: int
) -> tuple[dict[int, int], list[int]]:
    """Walk through the batches as products do; return bytes kept, and peaks."""
    held: dict[int, int] = {}
    peaks = [0] * len(loads)
    full = False
    for product in range(max(len(p.series) for p in prints)):
        for j, (print_, load) in enumerate(zip(prints, loads, strict=True)):
            turn = min(product, len(print_.series) - 1) if j in held else 0
            others = sum(
                n - int(data.nbytes * loads[k]) for k, n in held.items() if k != j
            )
            before = print_.total if j else 0
            peaks[j] = max(peaks[j], before + others + print_.peak(load, turn))
            if full and j not in held:
                continue
            held[j] = print_.kept(load, turn)
            if sum(held.values()) > budget:
                full = True
                del held[j]
    return held, peaks
