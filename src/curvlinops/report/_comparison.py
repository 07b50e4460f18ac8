"""What has changed from one report to another, and what of it is beyond chance."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import hypot, isfinite, nan

import numpy as np
import torch

from curvlinops.report._blocks import EPSILON, js_distance, masses, shared
from curvlinops.report._contents import (
    Block,
    Layer,
    Matrix,
    Number,
    Overlap,
    Report,
)
from curvlinops.report._mistakes import MistakeError

#: Two samples of the runs are drawn so often to see how far apart chance puts them.
RESAMPLES = 200
LEVEL = 0.95
#: What sums change if they are taken in another order, relatively: so many times the
#: unit of the precision, and this at least.
ROUNDINGS, LEAST_ROUNDING = 32, 1e-9


@dataclass(frozen=True)
class Change:
    """A number in both reports.

    Attributes
    ----------
    name : str
        Of the quantity.
    first, second : Number
        In the first and in the second report.
    rounding : float
        Part of a number that other batches or threads may change.
    """

    name: str
    first: Number
    second: Number
    rounding: float = LEAST_ROUNDING

    @property
    def difference(self) -> float:
        """Second minus first."""
        return self.second.value - self.first.value

    @property
    def margin(self) -> float:
        """How large a difference is by chance: both 95 % intervals, in quadrature."""
        return hypot(self.first.half_width(LEVEL), self.second.half_width(LEVEL))

    @property
    def significant(self) -> bool:
        """Whether the difference is beyond that, and beyond rounding."""
        scale = max(abs(self.first.value), abs(self.second.value))
        return bool(abs(self.difference) > self.margin + self.rounding * scale)

    @property
    def relative(self) -> float:
        """Difference over the first number's magnitude."""
        return self.difference / abs(self.first.value) if self.first.value else nan


@dataclass(frozen=True)
class Distance:
    """Jensen-Shannon distance of two densities.

    Attributes
    ----------
    value : float
        Between 0 and 1.
    chance : float
        What 95 % of the distances are below if both are estimated from the same matrix:
        from runs drawn again and again from one report.
    """

    value: float
    chance: float

    @property
    def significant(self) -> bool:
        """Whether chance does not explain it."""
        return bool(self.value > self.chance)


@dataclass(frozen=True)
class Moved:
    """How one layer's block has changed.

    Attributes
    ----------
    name : str
        Of the parameter.
    changes : tuple of Change
        Trace, top eigenvalue, norm, effective dimension.
    distance : Distance or None
        Of the block's densities, where both reports have one.
    """

    name: str
    changes: tuple[Change, ...]
    distance: Distance | None

    @property
    def significant(self) -> bool:
        """Whether anything has moved beyond what chance explains."""
        found = any(change.significant for change in self.changes)
        return found or (self.distance is not None and self.distance.significant)

    @property
    def amount(self) -> float:
        """By how much: largest ratio of trace or top eigenvalue, as a logarithm."""
        amounts = [_ratio(change) for change in self.changes[:2]]
        return max(amounts)


def _ratio(change: Change) -> float:
    """Return how far apart two numbers are: the logarithm of their ratio."""
    a, b = change.first.value, change.second.value
    if a == b:
        return 0.0
    return abs(float(np.log(b / a))) if a * b > 0 else np.inf


@dataclass(frozen=True, eq=False)
class Pair:
    """One matrix in both reports.

    Attributes
    ----------
    name : str
        Of the matrix.
    first, second : Matrix
        In the reports.
    eigenvalues : tuple of Change
        The largest ones; residuals are their errors.
    numbers : tuple of Change
        Trace, norm, effective dimension, negative mass.
    overlap : Overlap or None
        Of the leading eigenvectors.
    distance : Distance or None
        Of the densities, on the logarithmic scale.
    layers : tuple of Moved
        Those that moved most come first.
    """

    name: str
    first: Matrix
    second: Matrix
    eigenvalues: tuple[Change, ...]
    numbers: tuple[Change, ...]
    overlap: Overlap | None
    distance: Distance | None
    layers: tuple[Moved, ...]

    def changes(self) -> Iterator[Change]:
        """Yield all changes of the whole matrix."""
        yield from self.eigenvalues
        yield from self.numbers


@dataclass(frozen=True, eq=False)
class Comparison:
    """Two reports, side by side.

    Attributes
    ----------
    first, second : str
        What they are called.
    loss : Change
        Of the whole data.
    pairs : tuple of Pair
        One for every matrix that both have.
    notes : tuple of str
        What makes the comparison less than it might be.
    """

    first: str
    second: str
    loss: Change
    pairs: tuple[Pair, ...]
    notes: tuple[str, ...] = ()


def compare(
    first: Report, second: Report, names: tuple[str, str] = ("first", "second")
) -> Comparison:
    """Compare two reports of models with the same parameters.

    Parameters
    ----------
    first, second : Report
        The reports.
    names : tuple of str, optional
        What to call them.

    Returns
    -------
    Comparison
        With every matrix that both have.

    Raises
    ------
    MistakeError
        If the parameters differ in names or sizes, or no matrix is in both.
    """
    require_alike(first, second, names)
    common = [m.name for m in first.matrices if second.matrix(m.name) is not None]
    if not common:
        ours, theirs = (
            ", ".join(m.name for m in report.matrices) for report in (first, second)
        )
        raise MistakeError(
            f"{names[0]} has {ours} and {names[1]} has {theirs}: no matrix is in both."
        )
    pairs = tuple(_pair(first, second, name) for name in common)
    a, b = first.problem.loss_value, second.problem.loss_value
    loss = Change("loss", Number(a), Number(b), _rounding(first, second))
    return Comparison(*names, loss, pairs, tuple(_notes(first, second)))


def _rounding(first: Report, second: Report) -> float:
    dtypes = (getattr(torch, r.provenance.dtype) for r in (first, second))
    units = (torch.finfo(dtype).eps for dtype in dtypes)
    return max(LEAST_ROUNDING, *(ROUNDINGS * unit for unit in units))


def require_alike(first: Report, second: Report, names: tuple[str, str]) -> None:
    """Raise unless two reports are of the same parameters."""
    ours, theirs = first.problem.parameters, second.problem.parameters
    if ours == theirs:
        return
    for key in {**ours, **theirs}:
        if ours.get(key) != theirs.get(key):
            break
    said = [
        f"{size} entries" if size is not None else "none"
        for size in (ours.get(key), theirs.get(key))
    ]
    raise MistakeError(
        f"{names[0]} and {names[1]} are of problems of different shapes: of the "
        f"parameter {key!r} one has {said[0]}, the other {said[1]}."
    )


def _notes(first: Report, second: Report) -> Iterator[str]:
    p, q = first.provenance, second.provenance
    if p.data_sha256 != q.data_sha256:
        yield "The data differ: changes are not due to the parameters alone."
    if p.dtype != q.dtype:
        yield f"Precisions differ: {p.dtype} and {q.dtype}."
    if p.parameters_sha256 == q.parameters_sha256:
        yield "The parameters are the same, bit by bit."
    for m in first.matrices:
        other = second.matrix(m.name)
        if other is not None and m.damping != other.damping:
            yield (
                f"Effective dimensions of {m.name} are not compared: they belong to "
                f"the dampings {m.damping:g} and {other.damping:g}."
            )


def _pair(first: Report, second: Report, name: str) -> Pair:
    a, b = first.matrix(name), second.matrix(name)
    assert a is not None and b is not None
    rounding = _rounding(first, second)
    return Pair(
        name,
        a,
        b,
        tuple(_eigenvalues(a, b, rounding)),
        tuple(_numbers(a, b, rounding)),
        _overlap(a, b),
        _density_distance(a, b),
        _layers(first, second, a, b, rounding),
    )


def _eigenvalues(a: Matrix, b: Matrix, rounding: float) -> Iterator[Change]:
    if a.top is None or b.top is None:
        return
    ours, theirs = (
        [Number(*pair) for pair in zip(top.values, top.residuals, strict=True)]
        for top in (a.top, b.top)
    )
    for i, pair in enumerate(zip(ours, theirs, strict=False), 1):
        yield Change(f"eigenvalue {i}", *pair, rounding)


def _numbers(a: Matrix, b: Matrix, rounding: float) -> Iterator[Change]:
    theirs = dict(b.numbers())
    for name, number in a.numbers():
        if name in theirs and not (
            name == "effective dimension" and a.damping != b.damping
        ):
            yield Change(name, number, theirs[name], rounding)


def _overlap(a: Matrix, b: Matrix) -> Overlap | None:
    if a.top is None or b.top is None:
        return None
    U, V = a.top.vectors.astype(np.float64), b.top.vectors.astype(np.float64)
    k = min(U.shape[1], V.shape[1])
    if k == 0:
        return None
    squares = (U[:, :k].T @ V[:, :k]) ** 2
    return Overlap(a.name, b.name, squares, float(squares.sum() / k))


# -- densities ------------------------------------------------------------------------


def _density_distance(a: Matrix, b: Matrix) -> Distance | None:
    if a.density is None or b.density is None:
        return None
    densities = (a.density, b.density)
    rules = [(d.nodes, d.weights) for d in densities]
    epsilon = max(d.epsilon for d in densities)
    known = [
        _with_spikes(nodes, w, d.spikes, d.dim)
        for (nodes, w), d in zip(rules, densities, strict=True)
    ]
    return distance(known, [d.dim for d in densities], epsilon)


def _with_spikes(
    nodes: np.ndarray, weights: np.ndarray, spikes: np.ndarray, dim: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return Gauss rules with the eigenvalues that were taken out put back in."""
    rows = (len(nodes), len(spikes))
    return (
        np.hstack([nodes, np.broadcast_to(spikes, rows)]),
        np.hstack([weights, np.full(rows, 1 / dim)]),
    )


def distance(
    rules: Sequence[tuple[np.ndarray, np.ndarray]], sizes: Sequence[int], epsilon: float
) -> Distance:
    """Return how far apart two densities are, and how far chance alone puts them.

    Parameters
    ----------
    rules : sequence of tuple
        Nodes and weights of both, of shape ``(R, m)``.
    sizes : sequence of int
        Numbers of eigenvalues.
    epsilon : float
        Shift of the logarithm, in the unit of the nodes.

    Returns
    -------
    Distance
        Runs are drawn with replacement, two samples from one report, of as many runs as
        either report has; the larger of both reports' quantiles counts, scaled up since
        drawn samples vary less than new ones.
    """
    runs = [masses(spectrum) for spectrum in shared(rules, sizes, epsilon)]
    value = js_distance(runs[0].mean(0), runs[1].mean(0))
    rng, chances = np.random.default_rng(0), []
    for own in runs:
        count = len(own)
        if count < 3:
            return Distance(value, 1.0)
        drawn = []
        for _ in range(RESAMPLES):
            p, q = (own[rng.integers(count, size=len(r))].mean(0) for r in runs)
            drawn.append(js_distance(p, q))
        spread = (count / (count - 1)) ** 0.5
        chances.append(spread * float(np.quantile(drawn, LEVEL)))
    return Distance(value, max(chances))


def _layers(
    first: Report, second: Report, a: Matrix, b: Matrix, rounding: float
) -> tuple[Moved, ...]:
    theirs = {layer.name: layer for layer in b.layers}
    ours, others = _blocks(first, a.name), _blocks(second, b.name)
    found = []
    for layer in a.layers:
        if layer.name not in theirs:
            continue
        apart = None
        if layer.name in ours and layer.name in others:
            apart = _block_distance(ours[layer.name], others[layer.name])
        same = a.damping == b.damping
        changes = _layer_changes(layer, theirs[layer.name], same, rounding)
        found.append(Moved(layer.name, changes, apart))
    return tuple(sorted(found, key=lambda m: (not m.significant, -_finite(m.amount))))


def _finite(amount: float) -> float:
    return amount if isfinite(amount) else 1e30


def _blocks(report: Report, matrix: str) -> dict[str, Block]:
    if report.blocks is None or report.blocks.matrix != matrix:
        return {}
    return {block.name: block for block in report.blocks.blocks}


def _block_distance(a: Block, b: Block) -> Distance:
    """Compare two blocks in one unit, the first one's: a change of scale counts."""
    rules = [(x.nodes * (x.unit / a.unit), x.weights) for x in (a, b)]
    return distance(rules, [a.size, b.size], EPSILON)


def _layer_changes(
    a: Layer, b: Layer, same_damping: bool, rounding: float
) -> tuple[Change, ...]:
    pairs = [
        ("trace", a.trace, b.trace),
        ("top eigenvalue", a.top_eigenvalue, b.top_eigenvalue),
        ("norm", a.frobenius_norm, b.frobenius_norm),
    ]
    if same_damping:
        dimensions = a.effective_dimension, b.effective_dimension
        pairs.append(("effective dimension", *dimensions))
    return tuple(Change(*pair, rounding) for pair in pairs)
