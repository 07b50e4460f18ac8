r"""Traces, diagonals and determinants from products, with their error bars.

Run it as ``python -m curvlinops.examples.traces``.

*Question.* The trace of a Hessian is its eigenvalues' sum, the log-determinant goes
into model evidences, the diagonal into pruning and scaling. None of these needs the
matrix: how many products do they need?

*Formula.* For random signs :math:`z`, :math:`\mathbb{E}[z^\top A z] =
\operatorname{tr} A`. Hutchinson's estimator averages this; its variance is twice the
squared norm of the off-diagonal part,

.. math::

    \operatorname{Var}[z^\top A z] = 2 \sum_{i \ne j} A_{ij}^2 .

Hutch++, XTrace and XNysTrace first take out the leading subspace, exactly, and estimate
the rest. Functions of a matrix, :math:`\log \det(A + \delta I) = \operatorname{tr}
\log(A + \delta I)`, use Lanczos' quadrature for :math:`z^\top f(A) z`.

*Call.* ``xtrace(A, 40, rng=0, return_estimate=True)`` has ``.value``, ``.error`` and
``.num_products``; ``until=0.01`` in place of a number of products that must be known
goes on until the error is one per cent.

*What is seen.* For the GGN of a trained network, whose eigenvalues fall by orders of
magnitude, the estimators that use the subspace win by far, XNysTrace, which needs
positive semi-definiteness, most of all. Hutchinson's error lies on the line that the
formula predicts. The right panel counts how often a result is within its error bar.

References: M. Hutchinson, "A stochastic estimator of the trace of the influence matrix
for Laplacian smoothing splines" (1989), doi:10.1080/03610918908812806. R. Meyer et al.,
"Hutch++: optimal stochastic trace estimation", arXiv:2010.09649. E. Epperly, J. Tropp,
R. Webber, "XTrace: making the most of every sample in stochastic trace estimation",
arXiv:2301.07825.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np
from torch import nn

from curvlinops import (
    EmpiricalRisk,
    GGNLinearOperator,
    TensorLinearOperator,
    hutchinson_diag,
    hutchinson_trace,
    hutchpp_trace,
    logdet,
    xdiag,
    xnystrace,
    xtrace,
)
from curvlinops.examples._digits import trained_digits
from curvlinops.examples._page import Array, Page, command, norm, relative_error
from curvlinops.examples.functorch import functorch_ggn

TRACES: dict[str, Callable[..., Any]] = {
    "Hutchinson": hutchinson_trace,
    "Hutch++": hutchpp_trace,
    "XTrace": xtrace,
    "XNysTrace": xnystrace,
}
DIAGONALS: dict[str, Callable[..., Any]] = {
    "Hutchinson": hutchinson_diag,
    "XDiag": xdiag,
}
DAMPING = 1e-2
#: Standard errors within which a result is expected, but for few of the seeds.
WIDTH = 2


class Errors:
    """Relative errors of estimators by products and seeds, and how sure they were."""

    def __init__(self, A: Any, budgets: list[int], seeds: range) -> None:
        self.A, self.budgets, self.seeds = A, budgets, seeds
        self.found: dict[str, Array] = {}
        self.covered: dict[str, float] = {}

    def add(self, name: str, estimator: Callable[..., Any], truth: float) -> None:
        """Run an estimator of a number with all budgets and seeds."""
        errors = np.zeros((len(self.budgets), len(self.seeds)))
        inside = np.zeros(errors.shape, dtype=bool)
        for i, budget in enumerate(self.budgets):
            for j, seed in enumerate(self.seeds):
                options = {"rng": seed, "return_estimate": True}
                estimate = estimator(self.A, budget, **options)
                distance = abs(float(estimate.value) - truth)
                errors[i, j] = distance / abs(truth)
                rounding = 1e-12 * abs(truth)
                inside[i, j] = distance <= WIDTH * float(estimate.error) + rounding
        self.found[name] = np.sqrt(np.mean(errors**2, 1))
        self.covered[name] = float(inside.mean())

    def table(self, title: str) -> None:
        """Print errors by products."""
        budgets = "".join(f"{budget:>10}" for budget in self.budgets)
        print(f"{title:<14}{budgets}{'within ' + str(WIDTH) + ' errors':>18}")
        for name, errors in self.found.items():
            cells = "".join(f"{error:>10.1e}" for error in errors)
            print(f"{name:<14}{cells}{self.covered[name]:>18.0%}")


def body(page: Page) -> None:
    """Estimate, compare with the dense matrix and with the formula, draw."""
    digits = trained_digits(4 if page.quick else 12, 60, page.seed, batch_size=200)
    data = digits.data[: 1 if page.quick else 3]
    problem = digits.model, nn.CrossEntropyLoss(), digits.params, data
    G = GGNLinearOperator(EmpiricalRisk(*problem))
    dense = functorch_ggn(*problem)
    matrix = dense.numpy()
    trace, diagonal = float(np.trace(matrix)), np.diag(matrix)
    budgets = [12, 24, 48] if page.quick else [12, 24, 48, 96, 192]

    # The many runs of the study multiply with the stored matrix; the operator itself:
    one = xtrace(G, budgets[-1], rng=page.seed, return_estimate=True)
    same = xtrace(TensorLinearOperator(dense), budgets[-1], rng=page.seed)
    error = relative_error(one.value, same)
    page.check("XTrace of the operator vs of the matrix", error, 1e-8)
    print(f"trace {trace:.6f}; XTrace of the operator {float(one.value):.6f} ", end="")
    print(f"+- {float(one.error):.6f} by {one.num_products} products\n")

    A = TensorLinearOperator(dense)
    seeds = range(page.seed, page.seed + (15 if page.quick else 25))
    errors = Errors(A, budgets, seeds)
    for name, estimator in TRACES.items():
        errors.add(name, estimator, trace)
    errors.table("trace")
    variance = 2 * (np.sum(matrix**2) - np.sum(diagonal**2))
    line = np.sqrt(variance / np.array(budgets)) / trace
    ratio = np.sqrt(np.mean((errors.found["Hutchinson"] / line) ** 2))
    factor = max(ratio, 1 / ratio)
    page.check("Hutchinson's errors vs formula, factor between", factor, 2)
    for name, errors_of in errors.found.items():
        page.check(f"trace by {name}, error at the largest budget", errors_of[-1], 0.3)
    worst = 1 - min(errors.covered.values())
    page.check(f"traces not within {WIDTH} of their errors, share", worst, 0.3)

    def error_of_diagonal(f: Callable[..., Any], budget: int) -> float:
        found = (f(A, budget, rng=seed) for seed in seeds)
        return norm([relative_error(d, diagonal) for d in found]) / len(seeds) ** 0.5

    diagonals = {
        name: [error_of_diagonal(f, budget) for budget in budgets]
        for name, f in DIAGONALS.items()
    }
    print("\ndiagonal      " + "".join(f"{budget:>10}" for budget in budgets))
    for name, values in diagonals.items():
        print(f"{name:<14}" + "".join(f"{value:>10.1e}" for value in values))
    ratio = diagonals["XDiag"][-1] / diagonals["Hutchinson"][-1]
    page.check("diagonal, error of XDiag over Hutchinson's", ratio, 1)

    estimate = logdet(G, DAMPING, rng=page.seed, return_estimate=True)
    truth = np.linalg.slogdet(matrix + DAMPING * np.eye(len(matrix)))[1]
    print(f"\nlog det {truth:.4f}, estimated {float(estimate.value):.4f} ", end="")
    print(f"+- {float(estimate.error):.4f} by {estimate.num_products} products")
    distance = abs(float(estimate.value) - truth) / float(estimate.error)
    page.check("log det, distance from dense in its errors", distance, 4)
    draw(page, errors, line, diagonals, np.linalg.eigvalsh(matrix)[::-1])


def draw(
    page: Page,
    errors: Errors,
    line: Array,
    diagonals: dict[str, list[float]],
    eigenvalues: Array,
) -> None:
    """Draw errors of traces and diagonals by products, and how often bars cover."""
    with page.figure("errors", 12.5, 3.7, ncols=3) as (left, middle, right):
        styles = iter(("o-", "s--", "^-.", "D:"))
        for name, found in errors.found.items():
            left.loglog(errors.budgets, found, next(styles), markersize=4, label=name)
        left.loglog(errors.budgets, line, "k", linewidth=0.8, label="formula")
        for (name, values), style in zip(diagonals.items(), ("o-", "s--"), strict=True):
            middle.loglog(errors.budgets, values, style, markersize=4, label=name)
        for ax, what in ((left, "trace"), (middle, "diagonal")):
            ax.set(xlabel="products", ylabel=f"relative error of the {what}")
            ax.set_xticks(errors.budgets, errors.budgets)
            ax.minorticks_off()
            ax.grid(alpha=0.3)
            ax.legend()
        names = list(errors.covered)
        right.barh(names[::-1], [100 * errors.covered[name] for name in names[::-1]])
        right.set_xlabel(f"% of the traces within {WIDTH} standard errors")
        right.set_xlim(0, 100)


main = command(body)

if __name__ == "__main__":
    sys.exit(main())
