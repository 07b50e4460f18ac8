"""How much is computed: one timed product turns minutes into counts."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any

from curvlinops._operand import Operand
from curvlinops._random import Probes
from curvlinops.report._contents import Counts
from curvlinops.report._mistakes import MistakeError

#: Columns of the product that is timed.
COLUMNS = 8
#: Seconds after which the first product, which records, has said enough.
SLOW = 10.0
#: Least counts: below them, standard errors are guesses.
LEAST = Counts(
    top=1,
    max_products=60,
    ncv=20,
    repeats=8,
    probes=16,
    layer_ncv=0,
    layer_repeats=0,
    block_ncv=0,
    block_repeats=0,
    max_blocks=0,
    dense=0,
    baseline=False,
)


@dataclass(frozen=True)
class Level:
    """A budget by name: what is wanted, and the minutes that it may take at most."""

    minutes: float
    counts: Counts


LEVELS = {
    "quick": Level(0.25, Counts(5, 200, 40, 8, 32, 15, 8, 15, 4, 4, 0, False)),
    "standard": Level(1.25, Counts(10, 400, 80, 16, 128, 20, 16, 30, 8, 8, 1000, True)),
    "full": Level(15.0, Counts(20, 1500, 200, 32, 512, 40, 32, 60, 16, 24, 2000, True)),
}


def level_of(text: str) -> Level:
    """Return a budget from its name, or from a number of minutes.

    Parameters
    ----------
    text : str
        ``"quick"``, ``"standard"``, ``"full"``, or a number of minutes: then what
        ``full`` wants is cut down to these.

    Examples
    --------
    >>> level_of("3.5").minutes, level_of("full").minutes
    (3.5, 15.0)
    """
    if text in LEVELS:
        return LEVELS[text]
    try:
        minutes = float(text)
    except ValueError:
        minutes = 0.0
    if not 0 < minutes < float("inf"):
        raise MistakeError(
            f"--budget is {', '.join(LEVELS)}, or a number of minutes, got {text!r}."
        )
    return Level(minutes, LEVELS["full"].counts)


def seconds_per_product(A: Any) -> float:
    """Return the time of a product with one vector, among others.

    Parameters
    ----------
    A : LinearOperator
        The matrix.

    Returns
    -------
    float
        Seconds per column of a product with :data:`COLUMNS` columns: the third one,
        since the first two record; of slow ones the first.
    """
    operand = Operand(A)
    probes = Probes(operand.dim, "rademacher", 0, operand.dtype, operand.device)
    vectors = probes.block(0, COLUMNS)
    for _ in range(3):
        start = perf_counter()
        product = operand.multiply(vectors)
        float(product.abs().sum())  # waits for a GPU
        seconds = perf_counter() - start
        if seconds > SLOW:
            break
    return seconds / COLUMNS


def products(counts: Counts, sizes: dict[str, int], first: bool) -> int:
    """Return how many products a matrix takes, at most.

    Parameters
    ----------
    counts : Counts
        What is computed.
    sizes : dict of str to int
        Entries of its parameters.
    first : bool
        Whether blocks and baseline are of this matrix.

    Returns
    -------
    int
        Products with one vector.
    """
    dim = sum(sizes.values())
    runs = min(counts.ncv, dim) * counts.repeats
    pairs = min(counts.max_products, dim)
    total = 2 * COLUMNS + 2 * pairs  # symmetry, both ends
    total += 2 * min(counts.probes, dim)  # trace, norm
    total += 3 * runs + pairs + 60  # dimension, negative mass, density with its ends
    total += dim if dim <= counts.dense else 0
    if counts.layer_repeats:
        steps = (min(counts.layer_ncv, size) for size in sizes.values())
        total += sum(steps) * (counts.layer_repeats + 1) + len(sizes)
    if first and counts.max_blocks:
        largest = sorted(sizes.values(), reverse=True)[: counts.max_blocks]
        steps = (min(counts.block_ncv, size) for size in largest)
        total += sum(steps) * counts.block_repeats + 60 * len(largest)
    if first and counts.baseline:
        total += runs + 2 * pairs + 60
    return total


def predicted(
    counts: Counts, sizes: dict[str, int], seconds: Iterable[float]
) -> tuple[int, float]:
    """Return products with all matrices, and the seconds that they take.

    Parameters
    ----------
    counts : Counts
        What is computed.
    sizes : dict of str to int
        Entries of the parameters.
    seconds : iterable of float
        Of a product with each matrix.
    """
    numbers = [(products(counts, sizes, i == 0), s) for i, s in enumerate(seconds)]
    return sum(n for n, _ in numbers), sum(n * s for n, s in numbers)


def scaled(wanted: Counts, factor: float) -> Counts:
    """Return counts whose products are cut down by a factor, where they can be.

    Parameters
    ----------
    wanted : Counts
        What would be computed with time enough.
    factor : float
        From 0 to 1. Numbers of runs and probes shrink by it; Krylov spaces by its root,
        since their depth counts more. Below a quarter the layers, below a half blocks,
        baseline and dense matrices are left out.
    """

    def cut(name: str, by: float) -> int:
        value, least = getattr(wanted, name), getattr(LEAST, name)
        return max(round(value * by), min(value, least))

    root = factor**0.5
    counts = replace(
        wanted,
        max_products=cut("max_products", root),
        ncv=cut("ncv", root),
        repeats=cut("repeats", root),
        probes=cut("probes", factor),
    )
    if factor < 0.5:
        none = {"block_ncv": 0, "block_repeats": 0, "max_blocks": 0, "dense": 0}
        counts = replace(counts, **none, baseline=False)
    else:
        counts = replace(counts, max_blocks=round(wanted.max_blocks * factor))
    if factor < 0.25:
        return replace(counts, layer_ncv=0, layer_repeats=0)
    return replace(counts, layer_repeats=max(4, round(wanted.layer_repeats * factor)))


def fit(level: Level, sizes: dict[str, int], seconds: Iterable[float]) -> Counts:
    """Return the largest counts that fit into a budget, or the least there are.

    Parameters
    ----------
    level : Level
        The budget.
    sizes : dict of str to int
        Entries of the parameters.
    seconds : iterable of float
        Of a product with each matrix.
    """
    times = list(seconds)
    for step in range(20, -1, -1):
        counts = scaled(level.counts, step / 20)
        if predicted(counts, sizes, times)[1] <= 60 * level.minutes:
            break
    return counts
