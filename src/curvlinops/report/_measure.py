"""All that a report says about one matrix, stage by stage."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from curvlinops._operand import Operand, to_numpy
from curvlinops._random import Probes
from curvlinops.estimators import (
    Estimate,
    LanczosApproximateSpectrumCached,
    SpectralDensity,
    effective_dimension,
    eigenvalue_count,
    hutchinson_squared_fro,
    layer_summary,
    top_eigenpairs,
    trace_of_function,
    xtrace,
)
from curvlinops.report._budget import COLUMNS
from curvlinops.report._checkpoint import Stages
from curvlinops.report._contents import (
    Check,
    Counts,
    Curve,
    Dead,
    Density,
    Layer,
    Matrix,
    Number,
    Pairs,
    Symmetry,
)

#: Eigenvalues below this part of the largest magnitude, negated, count as negative.
NEGATIVE = 1e-3
#: Krylov error of the negative mass that is no matter.
SHARP_MASS = 0.01
#: Relative to the matrix's norm: residuals of the smallest eigenvalues, which may be
#: one of many at zero and are no claim to the last digit.
BOTTOM_TOL = 1e-5
#: Shift of the logarithm, relative to the largest magnitude of an eigenvalue.
EPSILON = 1e-6
POINTS = 1024

#: Groups of stages; commands choose among them.
PARTS = ("symmetry", "pairs", "numbers", "density", "layers", "dense", "verify")


@dataclass(frozen=True)
class Task:
    """What to find out about a matrix, and how thoroughly.

    Attributes
    ----------
    counts : Counts
        How much.
    seed : int
        From which every stage has a seed of its own.
    damping : float
        Of effective dimension and condition number.
    parts : collection of str
        Which of :data:`PARTS`.
    """

    counts: Counts
    seed: int
    damping: float
    parts: Collection[str] = PARTS

    def seed_of(self, stage: str) -> int:
        """Return the seed of a stage."""
        return zlib.crc32(f"{self.seed} {stage}".encode())


def number(estimate: Estimate) -> Number:
    """Return an estimate as plain numbers."""
    return Number(
        float(estimate.value),
        float(estimate.error),
        estimate.num_samples,
        bool(estimate.converged),
    )


def measure(
    A: Any, name: str, semidefinite: bool, task: Task, stages: Stages
) -> Matrix:
    """Find out what a task asks for.

    Parameters
    ----------
    A : LinearOperator
        Square; symmetry is what is looked at first.
    name : str
        Of the matrix, and of its stages.
    semidefinite : bool
        Whether it is said to have no negative eigenvalue.
    task : Task
        What to find out.
    stages : Stages
        Runs the stages.

    Returns
    -------
    Matrix
        ``None`` where something was not asked for, or raised an error.
    """
    return _Measurement(A, name, semidefinite, task, stages).matrix()


class _Measurement:
    """One run of :func:`measure`."""

    def __init__(
        self, A: Any, name: str, semidefinite: bool, task: Task, stages: Stages
    ) -> None:
        self.A, self.task, self._stages = A, task, stages
        self._before = len(stages.done)
        size = Operand(A).dim
        class_name = type(A).__name__
        self.found = Matrix(name, class_name, size, semidefinite, task.damping)

    def _stage(
        self, what: str, kind: Any, compute: Callable[[Path | None, int], Any]
    ) -> Any:
        name = f"{self.found.name} {what}"
        seed = self.task.seed_of(name)
        return self._stages.run(name, kind, lambda journal: compute(journal, seed))

    def matrix(self) -> Matrix:
        """Run all stages and return what was found."""
        steps = {
            "symmetry": self._symmetry,
            "pairs": self._pairs,
            "numbers": self._numbers,
            "density": self._density,
            "layers": self._layers,
            "dense": self._dense,
            "verify": self._verify,
        }
        for part, step in steps.items():
            if part in self.task.parts:
                self.found = replace(self.found, **step())
        done = self._stages.done[self._before :]
        return replace(
            self.found,
            products=sum(stage.products for stage in done),
            seconds=sum(stage.seconds for stage in done),
            failures=tuple(stage.failure for stage in done if stage.failure),
        )

    def _symmetry(self) -> dict[str, Any]:
        def compute(_: Path | None, seed: int) -> tuple[_Looks, int]:
            return looks(self.A, seed), 2 * COLUMNS

        seen = self._stage("symmetry", _Looks, compute)
        return {} if seen is None else {"symmetry": seen.symmetry, "dead": seen.dead}

    def _pairs(self) -> dict[str, Any]:
        found, counts = self.found, self.task.counts
        k = min(counts.top, found.size)
        small = 1 if found.semidefinite else (k + 1) // 2

        def compute(which: str, k: int, tol: float | None) -> Any:
            def stage(journal: Path | None, seed: int) -> tuple[Pairs, int]:
                return pairs(self.A, k, which, counts.max_products, seed, tol, journal)

            return stage

        top = self._stage("largest eigenvalues", Pairs, compute("LA", k, None))
        bottom = self._stage(
            "smallest eigenvalues", Pairs, compute("SA", small, BOTTOM_TOL)
        )
        results: dict[str, Any] = {"top": top, "bottom": bottom}
        if top is not None and bottom is not None:
            largest = max(abs(top.values[0]), abs(bottom.values[0]))
            if found.symmetry is not None:
                noise = found.symmetry.noise * largest
                top, bottom = top.with_noise(noise), bottom.with_noise(noise)
                results |= {"top": top, "bottom": bottom}
            results["negative_threshold"] = NEGATIVE * largest
            results["condition_number"] = condition(top, bottom, self.task.damping)
        return results

    def _numbers(self) -> dict[str, Any]:
        A, counts, found = self.A, self.task.counts, self.found
        ncv, repeats = min(counts.ncv, found.size), counts.repeats

        def trace(journal: Path | None, seed: int) -> Any:
            probes = max(min(counts.probes, found.size), 2)
            return _full(xtrace, A, probes, rng=seed, checkpoint=journal)

        def norm(journal: Path | None, seed: int) -> Any:
            estimate = hutchinson_squared_fro(
                A, counts.probes, rng=seed, checkpoint=journal, return_estimate=True
            )
            square = number(estimate)
            root = max(square.value, 0.0) ** 0.5
            error = square.error / (2 * root) if root else 0.0
            return replace(square, value=root, error=error), estimate.num_products

        def dimension(journal: Path | None, seed: int) -> Any:
            damping = self.task.damping
            options: dict[str, Any] = {"rng": seed, "checkpoint": journal}
            options |= {"ncv": ncv, "num_repeats": repeats}
            low = found.bottom.values[0] if found.bottom else 0.0
            if found.semidefinite and low > -damping / 2:
                return _full(effective_dimension, A, damping, **options)
            return _full(
                trace_of_function, A, lambda x: abs(x) / (abs(x) + damping), **options
            )

        def negative(journal: Path | None, seed: int) -> Any:
            count, products = _full(
                eigenvalue_count,
                A,
                upper=-found.negative_threshold,
                ncv=ncv,
                num_repeats=repeats,
                rng=seed,
                checkpoint=journal,
            )
            mass, error = count.value / found.size, count.error / found.size
            good = error <= SHARP_MASS
            error = error and max(error, Operand(A).eps)  # of shares of one
            return replace(count, value=mass, error=error, converged=good), products

        results = {
            "trace": self._stage("trace", Number, trace),
            "frobenius_norm": self._stage("norm", Number, norm),
            "effective_dimension": self._stage("dimension", Number, dimension),
        }
        if found.negative_threshold > 0:
            results["negative_mass"] = self._stage("negative mass", Number, negative)
        return results

    def _density(self) -> dict[str, Any]:
        counts, size = self.task.counts, self.found.size
        spikes = min(counts.top, size - 1)

        def compute(journal: Path | None, seed: int) -> tuple[Density, int]:
            return density(self.A, counts.ncv, counts.repeats, spikes, seed, journal)

        return {"density": self._stage("density", Density, compute)}

    def _layers(self) -> dict[str, Any]:
        if not self.task.counts.layer_repeats:
            return {}

        def compute(journal: Path | None, seed: int) -> tuple[tuple[Layer, ...], int]:
            return layers(self.A, self.task, seed, journal)

        return {"layers": self._stage("layers", tuple[Layer, ...], compute) or ()}

    def _dense(self) -> dict[str, Any]:
        size = self.found.size
        if size > self.task.counts.dense:
            return {}

        def compute(_: Path | None, seed: int) -> tuple[np.ndarray, int]:
            return to_numpy(self.A.to_dense()).astype(np.float32), size

        return {"dense": self._stage("dense", np.ndarray, compute)}

    def _verify(self) -> dict[str, Any]:
        if not hasattr(self.A, "verify"):
            return {}

        def compute(_: Path | None, seed: int) -> tuple[tuple[Check, ...], int]:
            checks = self.A.verify(seed).checks
            rows = [
                Check(c.name, float(c.error), c.tolerance, bool(c.passed), c.note)
                for c in checks
            ]
            return tuple(rows), 8

        return {"checks": self._stage("verify", tuple[Check, ...], compute) or ()}


# -- one stage each -------------------------------------------------------------------


def _full(estimator: Any, *args: Any, **options: Any) -> tuple[Number, int]:
    estimate = estimator(*args, return_estimate=True, **options)
    return number(estimate), estimate.num_products


@dataclass(frozen=True)
class _Looks:
    symmetry: Symmetry
    dead: Dead


def looks(A: Any, seed: int) -> _Looks:
    r"""Look at a few products: their symmetry, their noise, and rows of zeros.

    With test vectors :math:`V` of signs, :math:`Y = A V` and :math:`Z = A (3 V) / 3`,
    the error is the largest entry of :math:`V^\top Y - Y^\top V`, and the noise that of
    :math:`V^\top (Z - Y)`, or rounding of the sums if that is more; both relative to
    the mean norm of :math:`Y`'s columns, the size of the entries of :math:`V^\top Y`.

    Parameters
    ----------
    A : LinearOperator
        The matrix.
    seed : int
        Of the test vectors.
    """
    operand = Operand(A)
    V = Probes(operand.dim, "rademacher", seed, operand.dtype, operand.device).block(
        0, COLUMNS
    )
    Y, Z = operand.multiply(V), operand.multiply(3 * V) / 3
    unseen = ((Y == 0) & (Z == 0)).all(1).cpu()
    V, Y, Z = V.double(), Y.double(), Z.double()
    scale = float(torch.linalg.vector_norm(Y, dim=0).mean()) or 1.0
    inner = V.T @ Y
    error = float((inner - inner.T).abs().max()) / scale
    noise = float((V.T @ (Z - Y)).abs().max()) / scale
    names = []
    for name, where in _places(A, len(unseen)).items():
        if unseen[where].all():
            names.append(name)
    dead = Dead(int(unseen.sum()), tuple(names))
    return _Looks(Symmetry(error, max(noise, operand.eps)), dead)


def _places(A: Any, size: int) -> dict[str, slice]:
    space = A.risk.space if hasattr(A, "risk") else None
    if space is None or space.dim != size:
        return {"matrix": slice(0, size)}
    return dict(zip(space.names, space.slices(), strict=True))


def pairs(
    A: Any,
    k: int,
    which: str,
    max_products: int,
    seed: int,
    tol: float | None = None,
    checkpoint: Path | None = None,
) -> tuple[Pairs, int]:
    """Return eigenpairs at one end, as plain data, and the products they took."""
    found = top_eigenpairs(
        A,
        k,
        which,
        max_products=max_products,
        tol=tol,
        rng=seed,
        checkpoint=checkpoint,
    )
    values, residuals = to_numpy(found.values), to_numpy(found.residual_norms)
    plain = Pairs(
        tuple(map(float, values)),
        tuple(map(float, residuals)),
        to_numpy(found.vectors),
        bool(found.converged),
    )
    if plain.values:
        plain = plain.with_noise(Operand(A).eps * max(map(abs, plain.values)))
    return plain, found.num_products


def condition(top: Pairs, bottom: Pairs, damping: float) -> Number | None:
    """Return the condition number of the damped matrix, if that is definite."""
    high, low = top.values[0] + damping, bottom.values[0] + damping
    if not low > 0:
        return None
    value = high / low
    error = value * (top.residuals[0] / high + bottom.residuals[0] / low)
    return Number(value, error, converged=top.converged and bottom.converged)


def curve(found: SpectralDensity) -> Curve:
    """Return a density and its band as plain arrays."""
    low, high = found.band(0.95)
    arrays = found.grid, found.density, low, high
    grid, middle, low, high = (to_numpy(x).astype(np.float64) for x in arrays)
    return Curve(grid, middle, low, high)


def density(
    A: Any, ncv: int, repeats: int, spikes: int, seed: int, checkpoint: Path | None
) -> tuple[Density, int]:
    """Return a spectral density on both scales, and the products it took."""
    runs = LanczosApproximateSpectrumCached(
        A, ncv, deflate=spikes, rng=seed, checkpoint=checkpoint
    )
    found = runs.approximate_spectrum(repeats, POINTS)
    nodes, weights = (
        to_numpy(x).astype(np.float64) for x in (found.nodes, found.weights)
    )
    known = to_numpy(found.spikes).astype(np.float64)
    largest = max(np.abs(x).max() for x in (nodes, known) if x.size)
    epsilon = EPSILON * float(largest) or 1e-12
    inner = float(np.abs(found.boundaries).max())
    least = min(float(np.abs(nodes).min()), inner / 2)
    log = found.smooth(
        scale="log", boundaries=(least, inner), kappa=1.04, epsilon=epsilon
    )
    plain = Density(found.dim, known, nodes, weights, curve(found), curve(log), epsilon)
    return plain, runs.num_products


def layers(
    A: Any, task: Task, seed: int, checkpoint: Path | None
) -> tuple[tuple[Layer, ...], int]:
    """Return the table of the layers, and the products it took."""
    table = layer_summary(
        A,
        task.damping,
        task.counts.layer_ncv,
        task.counts.layer_repeats,
        rng=seed,
        checkpoint=checkpoint,
    )
    names = ("trace", "top_eigenvalue", "frobenius_norm", "effective_dimension")
    rows = []
    for i, name in enumerate(table["name"]):
        numbers = {
            quantity: Number(
                float(table[quantity][i]),
                float(table[f"{quantity}_error"][i]),
                table.num_samples,
            )
            for quantity in names
        }
        rows.append(Layer(str(name), int(table["size"][i]), **numbers))
    return tuple(rows), table.num_products
