"""What is compared: blocks of a matrix, leading subspaces, random parameters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from curvlinops.estimators import SpectralDensity, lanczos_approximate_spectrum
from curvlinops.report._checkpoint import Stages
from curvlinops.report._contents import (
    Baseline,
    Block,
    Blocks,
    Density,
    Matrix,
    Overlap,
    Pairs,
)
from curvlinops.report._measure import POINTS, Task, curve, density, pairs

#: Which eigenvalue of a block is its unit.
RANK = 10
#: Magnitude below which an eigenvalue is no unit, relative to the largest.
LEAST_UNIT = 1e-6
#: Shift of the logarithm, in blocks' units.
EPSILON = 1e-3
#: Relative residual to which a block's unit is known, and products for it at most.
TOL, PRODUCTS = 1e-4, 60


def js_distance(p: np.ndarray, q: np.ndarray) -> float:
    r"""Return the Jensen-Shannon distance of two distributions.

    .. math::
        \sqrt{\tfrac12 \sum_i p_i \log_2 \frac{p_i}{m_i} +
        \tfrac12 \sum_i q_i \log_2 \frac{q_i}{m_i}},
        \quad m = \tfrac12 (p + q)

    Parameters
    ----------
    p, q : numpy.ndarray
        Masses of the same cells, of shape ``(n,)``; scaled to sum to one.

    Returns
    -------
    float
        Between 0 and 1.

    References
    ----------
    Lin, "Divergence measures based on the Shannon entropy", IEEE Transactions on
    Information Theory 37 (1991), doi:10.1109/18.61115.

    Examples
    --------
    >>> import numpy as np
    >>> one, other = np.array([1.0, 0.0]), np.array([0.0, 1.0])
    >>> js_distance(one, one), js_distance(one, other)
    (0.0, 1.0)
    """
    p, q = p / p.sum(), q / q.sum()
    middle = (p + q) / 2
    total = 0.0
    for x in (p, q):
        seen = x > 0
        total += float(x[seen] @ np.log2(x[seen] / middle[seen])) / 2
    return max(total, 0.0) ** 0.5


def masses(found: SpectralDensity) -> np.ndarray:
    """Return the masses that a density gives to the cells of its grid, per run."""
    grid = np.asarray(found.grid)
    ends = np.r_[grid[:1], (grid[1:] + grid[:-1]) / 2, grid[-1:]]
    return np.asarray(found.samples) * np.diff(ends)


def shared(
    rules: Sequence[tuple[np.ndarray, np.ndarray]], sizes: Sequence[int], epsilon: float
) -> list[SpectralDensity]:
    """Return logarithmic densities of Gauss rules on one grid.

    Parameters
    ----------
    rules : sequence of tuple
        Nodes and weights, of shape ``(R, m)``.
    sizes : sequence of int
        Numbers of eigenvalues.
    epsilon : float
        Shift of the logarithm, in the nodes' unit.
    """
    high = max(float(np.abs(nodes).max()) for nodes, _ in rules)
    ends = 0.0, max(high, epsilon)
    return [
        SpectralDensity(
            nodes,
            weights,
            ends,
            size,
            scale="log",
            num_points=POINTS // 2,
            kappa=1.04,
            epsilon=epsilon,
        )
        for (nodes, weights), size in zip(rules, sizes, strict=True)
    ]


def blocks(A: Any, name: str, task: Task, stages: Stages) -> Blocks | None:
    """Return densities of the largest diagonal blocks, each in units of its own.

    Parameters
    ----------
    A : RiskOperator
        The matrix.
    name : str
        Of the matrix, and of the stages.
    task : Task
        How many blocks, and how thoroughly.
    stages : Stages
        Runs the stages.

    Returns
    -------
    Blocks or None
        ``None`` if no block has eigenvalues other than zero.

    References
    ----------
    Zhang, Chen, Ding, Li, Sun, Luo, "Why transformers need Adam: a Hessian
    perspective", NeurIPS 2024, arXiv:2402.16788, who compare blocks so.
    """
    sizes = dict(zip(A.risk.space.names, _sizes(A), strict=True))
    largest = sorted(sizes, key=lambda key: -sizes[key])[: task.counts.max_blocks]
    found = [
        block
        for key in sizes
        if key in largest
        if (block := _block(A, name, key, task, stages)) is not None
    ]
    found = [block for block in found if block.unit > 0]
    if not found:
        return None
    rules = [(block.nodes, block.weights) for block in found]
    spectra = shared(rules, [block.size for block in found], EPSILON)
    curves = map(curve, spectra)
    drawn = tuple(replace(b, curve=c) for b, c in zip(found, curves, strict=True))
    means = [masses(spectrum).mean(0) for spectrum in spectra]
    distances = np.array([[js_distance(p, q) for q in means] for p in means])
    pairs_ = [distances[i, j] for i, j in combinations(range(len(means)), 2)]
    mean = float(np.mean(pairs_)) if pairs_ else float("nan")
    return Blocks(name, EPSILON, drawn, distances, mean)


def _sizes(A: Any) -> list[int]:
    return [part.stop - part.start for part in A.risk.space.slices()]


def _block(A: Any, name: str, key: str, task: Task, stages: Stages) -> Block | None:
    stage = f"{name} block {key}"
    seed, counts = task.seed_of(stage), task.counts

    def compute(journal: Path | None) -> tuple[Block, int]:
        part = A.block([key])
        size = part.shape[0]
        top, spent = pairs(
            part,
            min(RANK, size),
            "LM",
            PRODUCTS,
            seed,
            TOL,
            journal and journal.with_name(f"{journal.stem}@unit.journal"),
        )
        magnitudes = np.sort(np.abs(top.values))[::-1]
        rank = int((magnitudes > LEAST_UNIT * magnitudes[0]).sum())
        unit = float(magnitudes[max(rank, 1) - 1])
        largest = float(magnitudes[0]) or 1.0
        rules = lanczos_approximate_spectrum(
            part,
            min(counts.block_ncv, size),
            POINTS // 2,
            counts.block_repeats,
            boundaries=(-largest, largest),
            rng=seed,
            checkpoint=journal,
        )
        scale = unit or 1.0
        nodes = np.asarray(rules.nodes, dtype=np.float64) / scale
        weights = np.asarray(rules.weights, dtype=np.float64)
        (spectrum,) = shared([(nodes, weights)], [size], EPSILON)
        block = Block(key, size, unit, rank, nodes, weights, curve(spectrum))
        return block, spent + rules.provenance["num_products"]

    return stages.run(stage, Block, compute)


def overlaps(matrices: Sequence[Matrix]) -> tuple[Overlap, ...]:
    """Return how the leading eigenvectors of every two matrices overlap."""
    known = [m for m in matrices if m.top is not None and m.top.vectors.size]
    return tuple(overlap(a, b) for a, b in combinations(known, 2))


def overlap(a: Matrix, b: Matrix) -> Overlap:
    """Return the overlap of two matrices' leading eigenvectors."""
    assert a.top is not None and b.top is not None
    U, V = (m.top.vectors.astype(np.float64) for m in (a, b) if m.top is not None)
    k = min(U.shape[1], V.shape[1])
    squares = (U[:, :k].T @ V[:, :k]) ** 2
    return Overlap(a.name, b.name, squares, float(squares.sum() / k))


def baseline(
    A: Any, name: str, loss: float, task: Task, stages: Stages
) -> Baseline | None:
    """Return spectrum and eigenvalues of a matrix with random parameters.

    Parameters
    ----------
    A : LinearOperator
        The matrix.
    name : str
        Of its like at the parameters as they are.
    loss : float
        The loss there.
    task : Task
        How thoroughly.
    stages : Stages
        Runs the stages.
    """
    counts, size = task.counts, A.shape[0]
    k = min(counts.top, size)

    def leading(journal: Path | None) -> tuple[Pairs, int]:
        stage = task.seed_of(f"{name} baseline eigenvalues")
        found, spent = pairs(A, k, "LA", counts.max_products, stage, None, journal)
        return replace(found, vectors=found.vectors[:, :0]), spent

    def spectrum(journal: Path | None) -> Any:
        stage, spikes = task.seed_of(f"{name} baseline density"), min(k, size - 1)
        return density(A, counts.ncv, counts.repeats, spikes, stage, journal)

    top = stages.run(f"{name} baseline eigenvalues", Pairs, leading)
    found = stages.run(f"{name} baseline density", Density, spectrum)
    if top is None or found is None:
        return None
    return Baseline(name, top, found, loss)
