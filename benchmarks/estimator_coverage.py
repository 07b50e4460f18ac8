"""How often the stated 95 % interval of an estimator covers the exact value.

Rows are estimators times spectra. Columns are the matrix's eigenvectors (random, or
coordinates: then random signs make some estimators exact) times precision. A cell says
how many per cent of the intervals of converged estimates cover the exact value (of
vectors: how many per cent of the entries), and in brackets how many per cent of the
estimates say that they are converged. ``exact`` stands where the error is rounding with
every seed, and ``refused`` where the matrix is not of the kind that is needed.

Run: ``python benchmarks/estimator_coverage.py [--seeds 100] [--only NAME ...]``. Takes
half an hour on a core.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch

import curvlinops.estimators as est

#: Spectra as they are met: a network's Hessian, kernels, projections, layers' biases.
SPECTRA: dict[str, np.ndarray] = {
    "bulk and outliers": np.r_[
        1e-3 * np.random.default_rng(1).standard_normal(190), np.geomspace(1, 50, 10)
    ],
    "decay to 1e-12": np.geomspace(1e-12, 1, 200),
    "power law": np.arange(1.0, 201) ** -1.5,
    "low rank": np.r_[np.arange(1.0, 9), np.zeros(192)],
    "indefinite": np.linspace(-1, 1.5, 200),
    "flat": np.linspace(0.5, 1.5, 200),
    "tiny, N = 20": np.r_[np.linspace(0.1, 1, 19), 20.0],
    "tiny, N = 10": np.geomspace(1e-3, 1, 10),
}
#: Eigenvectors and precision: random or coordinates, and the dtype.
GUISES = [
    (rotated, dtype) for rotated in (True, False) for dtype in ("float64", "float32")
]


class Case(NamedTuple):
    """An estimator as called, and what it estimates of a dense float64 matrix."""

    call: Callable[..., Any]
    exact: Callable[[np.ndarray], Any]


def _case(
    function: Callable[..., Any],
    exact: Callable[[np.ndarray], Any],
    *arguments: Any,
    most: int = 30,
    **settings: Any,
) -> Case:
    """Return an estimator with so many products, fewer than would make it exact."""

    def call(A: Any, **options: Any) -> Any:
        products = min(most, 9 * A.shape[1] // 10)
        return function(A, products, *arguments, **settings, **options)

    return Case(call, exact)


def _krylov(
    function: Callable[..., Any],
    of_eigenvalues: Callable[[np.ndarray], Any],
    *arguments: Any,
    **settings: Any,
) -> Case:
    """Return a function of the eigenvalues relative to the norm, at default depth."""

    def call(A: Any, **options: Any) -> Any:
        norm = torch.linalg.matrix_norm(A.double(), 2).to(A)
        return function(A / norm, *arguments, **settings, **options)

    def exact(A: np.ndarray) -> float:
        values = np.linalg.eigvalsh(A / np.linalg.norm(A, 2))
        with np.errstate(invalid="ignore", divide="ignore"):
            return float(np.sum(of_eigenvalues(values)))

    return Case(call, exact)


def _squared_fro(A: np.ndarray) -> float:
    return float(np.linalg.norm(A) ** 2)


def _stable_rank(A: np.ndarray) -> float:
    return float((np.linalg.norm(A) / np.linalg.norm(A, 2)) ** 2)


CASES: dict[str, Case] = {
    "hutchinson_trace": _case(est.hutchinson_trace, np.trace),
    "hutchinson_trace, normal": _case(est.hutchinson_trace, np.trace, "normal"),
    "hutchpp_trace": _case(est.hutchpp_trace, np.trace),
    "xtrace": _case(est.xtrace, np.trace),
    "xtrace, normal": _case(est.xtrace, np.trace, "normal"),
    "xnystrace": _case(est.xnystrace, np.trace),
    "hutchinson_squared_fro": _case(est.hutchinson_squared_fro, _squared_fro),
    "stable_rank": _case(est.stable_rank, _stable_rank),
    "hutchinson_diag": _case(est.hutchinson_diag, np.diag),
    "xdiag": _case(est.xdiag, np.diag),
    "hutchinson_trace, until=0.1": _case(
        est.hutchinson_trace, np.trace, most=150, until=0.1
    ),
    "hutchpp_trace, until=0.1": _case(est.hutchpp_trace, np.trace, most=150, until=0.1),
    "xtrace, until=0.1": _case(est.xtrace, np.trace, most=150, until=0.1),
    "xnystrace, until=0.1": _case(est.xnystrace, np.trace, most=150, until=0.1),
    "xdiag, until=0.3": _case(est.xdiag, np.diag, most=40, until=0.3),
    "trace_of_function, exp": _krylov(est.trace_of_function, np.exp, np.exp),
    "logdet": _krylov(est.logdet, np.log),
    "logdet, damping=1e-6": _krylov(est.logdet, lambda x: np.log(x + 1e-6), 1e-6),
    "effective_dimension, 1e-2": _krylov(
        est.effective_dimension, lambda x: x / (x + 1e-2), 1e-2
    ),
    "effective_dimension, 1e-6": _krylov(
        est.effective_dimension, lambda x: x / (x + 1e-6), 1e-6
    ),
    "eigenvalue_count, upper=0.3": _krylov(
        est.eigenvalue_count, lambda x: x < 0.3, upper=0.3
    ),
    "eigenvalue_count, upper=-1e-6": _krylov(
        est.eigenvalue_count, lambda x: x < -1e-6, upper=-1e-6
    ),
    "schatten_norm, p=1": _krylov(est.schatten_norm, np.abs, 1.0),
    "logdet, damping=1e-6, until=0.05": _krylov(
        est.logdet, lambda x: np.log(x + 1e-6), 1e-6, until=0.05, num_repeats=200
    ),
    "effective_dimension, 1e-2, until=0.05": _krylov(
        est.effective_dimension,
        lambda x: x / (x + 1e-2),
        1e-2,
        until=0.05,
        num_repeats=200,
    ),
}


def matrix(eigenvalues: np.ndarray, rotated: bool, dtype: str) -> np.ndarray:
    """Return a symmetric matrix of a spectrum, with random or unit eigenvectors."""
    rng = np.random.default_rng(0)
    if not rotated:
        return np.diag(rng.permutation(eigenvalues)).astype(dtype)
    basis = np.linalg.qr(rng.standard_normal((len(eigenvalues),) * 2))[0]
    A = basis * eigenvalues @ basis.T
    return ((A + A.T) / 2).astype(dtype)


class Coverage(NamedTuple):
    """Shares over seeds, in per cent."""

    converged: float
    covered: float
    exact: bool

    def __str__(self) -> str:
        """Return the cell of the table."""
        if self.exact:
            return "exact"
        covered = f"{self.covered:.0f}" if self.converged else "-"
        return f"{covered} ({self.converged:.0f})"


def coverage(case: Case, A: np.ndarray, seeds: int) -> Coverage:
    """Return how often a case's intervals cover what is exact of a matrix.

    Rounding is no sampling error: within it a value counts as covered.
    """
    exact = np.asarray(case.exact(A.astype(np.float64)))
    rounding = np.finfo(A.dtype).eps ** 0.5 * np.abs(exact).max()
    estimates = [
        case.call(torch.from_numpy(A), rng=seed, return_estimate=True)
        for seed in range(seeds)
    ]
    values = np.array([e.numpy() for e in estimates], np.float64)
    halves = np.array([e.confidence_interval()[1] - e.value for e in estimates])
    errors = np.abs(values - exact)
    converged = np.array([e.converged for e in estimates])
    covered = (errors <= halves + rounding)[converged].mean() if converged.any() else 0
    return Coverage(
        100 * float(converged.mean()),
        100 * float(covered),
        bool((errors <= rounding).all()),
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=100)
    parser.add_argument("--only", nargs="*", default=list(CASES), metavar="NAME")
    arguments = parser.parse_args()
    titles = [f"{'rotated' if r else 'diagonal'} {dtype}" for r, dtype in GUISES]
    print(f"{'':50s}" + "".join(f"{title:>18s}" for title in titles))
    for name in arguments.only:
        for spectrum, eigenvalues in SPECTRA.items():
            cells = []
            for guise in GUISES:
                A = matrix(eigenvalues, *guise)
                try:
                    cells.append(str(coverage(CASES[name], A, arguments.seeds)))
                except ValueError:
                    cells.append("refused")
            row = f"{name}; {spectrum}"
            print(f"{row:50s}" + "".join(f"{c:>18s}" for c in cells), flush=True)


if __name__ == "__main__":
    import warnings

    warnings.simplefilter("ignore")  # that until= is not reached is in the table
    main()
