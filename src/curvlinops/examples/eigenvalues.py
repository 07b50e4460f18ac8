r"""Leading eigenvalues by SciPy's solvers, counted in products.

Run it as ``python -m curvlinops.examples.eigenvalues``.

*Question.* Which directions of parameter space are curved most, and what does it cost
to find them? Curvature is only available as products :math:`H v`, each as expensive as
a few gradients, so methods are compared by products.

*Formula.* All methods look for the best Rayleigh quotients :math:`v^\top H v` in a
space spanned by products. Power iteration keeps one vector and forgets the others;
Lanczos' method keeps the whole space
:math:`\operatorname{span}(v, H v, \dots, H^m v)`.

*Call.* The method of Lanczos fits into ten lines, which many scripts contain. In
floating-point arithmetic these ten lines are wrong: as soon as a pair has converged,
new vectors lean towards it, and *ghost* copies of its eigenvalue appear among the
results. Replace them by two::

    H = HessianLinearOperator(model, loss, params, data)
    eigenvalues, eigenvectors = scipy.sparse.linalg.eigsh(H, k=10, which="LA")

*What is seen.* The table has products and errors of power iteration, ``lobpcg`` with
and without a preconditioner, ``eigsh`` at several tolerances, and ``top_eigenpairs``,
which spends some more products to make sure that none was missed. The diagonal of the
GGN is no help as preconditioner here. The figure shows errors by products; beside it
the ghosts: Ritz values of the ten lines, step by step, over the dense eigenvalues. The
last check counts the copies.

References: C. C. Paige, "Error analysis of the Lanczos algorithm for tridiagonalizing a
symmetric matrix", IMA Journal of Applied Mathematics 18 (1976),
doi:10.1093/imamat/18.3.341. A. Knyazev, "Toward the optimal preconditioned
eigensolver", SIAM Journal on Scientific Computing 23 (2001),
doi:10.1137/S1064827500366124.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
from scipy.linalg import eigh_tridiagonal
from scipy.sparse.linalg import LinearOperator, eigsh, lobpcg
from torch import nn

from curvlinops import (
    EmpiricalRisk,
    GGNDiagonalLinearOperator,
    HessianLinearOperator,
    top_eigenpairs,
)
from curvlinops.examples._digits import trained_digits
from curvlinops.examples._page import Array, Counted, Page, command
from curvlinops.examples.functorch import functorch_hessian

K = 10
TOLERANCES = (1e-1, 1e-3, 1e-6, 1e-10)
#: Relative distance at which two Ritz values are copies of one eigenvalue.
COPY = 1e-6


def lanczos_by_hand(A: LinearOperator, v: Array, steps: int) -> tuple[Array, Array]:
    """Return the tridiagonal matrix of the ten lines that scripts contain."""
    alphas, betas = [], []
    v, before, beta = v / np.linalg.norm(v), np.zeros_like(v), 0.0
    for _ in range(steps):
        w = A @ v - beta * before
        alphas.append(w @ v)
        w -= alphas[-1] * v
        beta = float(np.linalg.norm(w))
        betas.append(beta)
        before, v = v, w / beta
    return np.array(alphas), np.array(betas[:-1])


def ritz_values(alphas: Array, betas: Array, step: int) -> Array:
    """Return the eigenvalues of the leading part, the largest first."""
    return eigh_tridiagonal(alphas[:step], betas[: step - 1], eigvals_only=True)[::-1]


def power_iteration(A: LinearOperator, v: Array, steps: int) -> list[float]:
    """Return the Rayleigh quotient of every step."""
    quotients = []
    for _ in range(steps):
        v = v / np.linalg.norm(v)
        w = A @ v
        quotients.append(float(v @ w))
        v = w
    return quotients


class Comparison:
    """Methods on one matrix, each with its products and its worst eigenvalue."""

    def __init__(self, H: LinearOperator, truth: Array) -> None:
        self.H, self.truth = H, truth
        self.points: dict[str, list[tuple[int, float]]] = {}
        print(f"{'method':<34}products  eigenvalues  worst relative error")

    def error(self, found: Array) -> float:
        """Return the largest relative error of the leading eigenvalues."""
        found = np.sort(found)[::-1]
        return float(np.max(np.abs(found / self.truth[: len(found)] - 1)))

    def add(self, name: str, label: str, method: Any) -> float:
        """Run a method on a counted matrix, and note how well it did."""
        counted = Counted(self.H)
        found = np.asarray(method(counted))
        error = self.error(found)
        self.points.setdefault(name, []).append((counted.products, error))
        print(f"{label:<34}{counted.products:>8}{len(found):>13}{error:>22.1e}")
        return error


def body(page: Page) -> None:
    """Find eigenvalues in several ways, compare with the dense ones, draw."""
    digits = trained_digits(4 if page.quick else 12, epochs=40, seed=page.seed)
    problem = digits.model, nn.CrossEntropyLoss(), digits.params, digits.data
    risk = EmpiricalRisk(*problem)
    H = HessianLinearOperator(risk)
    truth = np.linalg.eigvalsh(functorch_hessian(*problem).numpy())[::-1]
    start = np.random.default_rng(page.seed).standard_normal((H.shape[0], K))
    v = start[:, 0]
    compare = Comparison(H, truth)

    powers = 60 if page.quick else 200
    quotients = power_iteration(H, v, powers)
    compare.add("power iteration", "power iteration", lambda A: quotients_of(A, v, 50))
    diagonal = GGNDiagonalLinearOperator(risk).damped(0.1 * truth[0]).inverse()
    for label, M in (("lobpcg", None), ("lobpcg, M = 1 / diag(GGN)", diagonal)):
        name = label
        for tolerance in TOLERANCES[1:3]:
            compare.add(
                name,
                f"{label}, tol={tolerance:.0e}",
                lambda A, M=M, tol=tolerance: lobpcg(
                    A, start, M=M, tol=tol * truth[0], maxiter=500
                )[0],
            )
    for tolerance in TOLERANCES:
        error = compare.add(
            "eigsh",
            f"eigsh, tol={tolerance:.0e}",
            lambda A, tol=tolerance: eigsh(
                A, K, which="LA", v0=v, tol=tol, return_eigenvectors=False
            ),
        )
    page.check("eigsh, worst eigenvalue vs dense", error, 1e-10)
    certain = compare.add(
        "top_eigenpairs",
        "top_eigenpairs",
        lambda A: top_eigenpairs(A, K, rng=page.seed).numpy(),
    )
    page.check("top_eigenpairs, worst eigenvalue vs dense", certain, 1e-10)

    # The ten lines: right at first, then with copies
    steps = 60 if page.quick else 120
    alphas, betas = lanczos_by_hand(H, v, steps)
    ritz = [ritz_values(alphas, betas, m) for m in range(1, steps + 1)]
    copies = int(np.sum(np.abs(ritz[-1] / truth[0] - 1) < COPY))
    multiple = int(np.sum(np.abs(truth / truth[0] - 1) < COPY))
    print(f"\nAfter {steps} steps, the ten lines have {copies} copies of the largest")
    print(f"eigenvalue, {truth[0]:.6f}, which the matrix has {multiple} time.")
    lead = abs(float(ritz[-1][0]) / truth[0] - 1)
    page.check("ten lines, largest eigenvalue vs dense", lead, 1e-10)
    page.check("copies in the matrix, over those in ten lines", multiple / copies, 0.5)

    draw(page, compare, quotients, ritz)


def quotients_of(A: LinearOperator, v: Array, steps: int) -> list[float]:
    """Return the last Rayleigh quotient of a power iteration, as a list."""
    return power_iteration(A, v, steps)[-1:]


def draw(
    page: Page, compare: Comparison, quotients: list[float], ritz: list[Array]
) -> None:
    """Draw errors by products, and Ritz values by steps."""
    truth = compare.truth
    with page.figure("eigenvalues", 10, 4, ncols=2) as (left, right):
        errors = [abs(q / truth[0] - 1) for q in quotients]
        steps = range(1, len(errors) + 1)
        left.plot(steps, errors, label="power iteration, largest only")
        markers = {"lobpcg": "s-", "lobpcg, M = 1 / diag(GGN)": "^-", "eigsh": "o-"}
        markers["top_eigenpairs"] = "*"
        for name, marker in markers.items():
            left.plot(*zip(*compare.points[name], strict=True), marker, label=name)
        left.set(yscale="log", xscale="log", ylim=(1e-16, 2))
        left.set_xlabel("products with the Hessian")
        left.set_ylabel(f"worst relative error, {K} eigenvalues")
        left.grid(alpha=0.3)
        left.legend(fontsize=8)

        floor = truth[K]
        for value in truth[:K]:
            right.axhline(value, color="black", linewidth=0.5)
        for step, values in enumerate(ritz, 1):
            shown = values[values > floor]
            right.plot(np.full(len(shown), step), shown, "C1.", markersize=3)
            count = int(np.sum(np.abs(values / truth[0] - 1) < COPY))
            if count > 1 and step % 10 == 0:
                where = {"ha": "center", "va": "bottom", "fontsize": 8}
                right.text(step, 1.015 * truth[0], f"{count}x", **where)
        right.set(xlabel="steps of Lanczos' method by hand", ylabel="Ritz values")
        right.set_ylim(0.95 * floor, 1.1 * truth[0])
        title = "lines: dense eigenvalues; 2x: two copies of the largest"
        right.set_title(title, fontsize=9)


main = command(body)

if __name__ == "__main__":
    sys.exit(main())
