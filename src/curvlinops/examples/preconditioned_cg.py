r"""Conjugate gradients with preconditioners, counted in products.

Run it as ``python -m curvlinops.examples.preconditioned_cg``.

*Question.* Natural gradients, Laplace's approximation and influence functions all solve
:math:`(G + \delta I) x = b`. Which preconditioner pays, and when?

*Formula.* With eigenvalues of :math:`A = G + \delta I` between :math:`\delta` and
:math:`\lambda_1 + \delta`, and :math:`\kappa` their ratio, iterate :math:`k` obeys

.. math::

    \frac{\|x - x_k\|_A}{\|x - x_0\|_A} \le
    2 \left(\frac{\sqrt{\kappa} - 1}{\sqrt{\kappa} + 1}\right)^k .

A preconditioner :math:`M \approx A^{-1}` replaces :math:`\kappa` by that of
:math:`M A`. Nyström's takes :math:`r` products to find the leading subspace, and leaves
:math:`(\lambda_{r+1} + \delta) / \delta` or so; Kronecker factors take none.

*Call.* ``scipy.sparse.linalg.cg(A, b, M=M)``, or
``CGInverseLinearOperator(A, preconditioner=M) @ b``, with
``M = NystromPreconditionerLinearOperator(G, rank, delta)`` or
``M = KFACLinearOperator(risk).damped(delta).inverse()``.

*What is seen.* The plain iteration stays below its bound, and ends earlier by far: few
eigenvalues are large. All methods are right in the end. At either damping, the sketch
of rank 20 saves more than a third of the iterations, that of rank 80 two thirds. A
larger rank costs more products, so the best one depends on how many systems are solved
with one matrix. The diagonal and Kronecker factors, no help here, cost iterations.

References: M. Hestenes, E. Stiefel, "Methods of conjugate gradients for solving linear
systems" (1952), doi:10.6028/jres.049.044. Z. Frangella, J. Tropp, M. Udell, "Randomized
Nyström preconditioning", arXiv:2110.02820. J. Martens, R. Grosse, "Optimizing neural
networks with Kronecker-factored approximate curvature", arXiv:1503.05671.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
from scipy.sparse.linalg import cg
from torch import nn

from curvlinops import (
    EmpiricalRisk,
    GGNDiagonalLinearOperator,
    GGNLinearOperator,
    KFACLinearOperator,
    NystromPreconditionerLinearOperator,
)
from curvlinops.examples._digits import no_bar, trained_digits
from curvlinops.examples._page import Array, Counted, Page, command
from curvlinops.examples.natural_gradient import dense_ggn
from curvlinops.plots import plot_convergence

RTOL = 1e-9


def preconditioners(
    risk: EmpiricalRisk, damping: float, ranks: list[int], seed: int
) -> dict[str, tuple[Any, int]]:
    """Return preconditioners, each with the products with the GGN that it took."""
    G = Counted(GGNLinearOperator(risk))
    kfac = KFACLinearOperator(risk, fisher_type="type-2")
    diagonal = GGNDiagonalLinearOperator(risk)
    found: dict[str, tuple[Any, int]] = {
        "none": (None, 0),
        "diagonal": (diagonal.damped(damping).inverse(), 0),
        "KFAC": (kfac.damped(damping).inverse(), 0),
    }
    for rank in ranks:
        before = G.products
        M = NystromPreconditionerLinearOperator(G, rank, damping, rng=seed)
        found[f"Nyström, rank {rank}"] = (M, G.products - before)
    return found


class System:
    """One equation, its dense solution, and the errors of iterates in the norm of A."""

    def __init__(self, G: GGNLinearOperator, dense: Array, b: Array, damping: float):
        self.A, self.b = G.damped(damping), b
        self.dense = dense + damping * np.eye(len(dense))
        self.solution = np.linalg.solve(self.dense, b)
        spectrum = np.linalg.eigvalsh(self.dense)
        self.condition = float(spectrum[-1] / spectrum[0])

    def error(self, x: Array) -> float:
        """Return the distance from the solution, relative to the solution's norm."""
        d = x - self.solution
        return float(np.sqrt((d @ self.dense @ d) / (self.b @ self.solution)))

    def solve(self, M: Any) -> tuple[list[float], int]:
        """Return the errors of all iterates, and the products of the solve."""
        A, errors = Counted(self.A), [1.0]
        cg(A, self.b, rtol=RTOL, M=M, callback=lambda x: errors.append(self.error(x)))
        return errors, A.products

    def bound(self, number: int) -> Array:
        """Return the bound by the condition number for some iterates."""
        root = np.sqrt(self.condition)
        return 2 * ((root - 1) / (root + 1)) ** np.arange(number)


def body(page: Page) -> None:
    """Solve with all preconditioners and dampings, compare with dense, draw."""
    digits = trained_digits(4 if page.quick else 12, 60, page.seed)
    data = digits.data[:1] if page.quick else digits.data
    problem = digits.model, nn.CrossEntropyLoss(), digits.params, data
    risk = EmpiricalRisk(*problem)
    G, dense = GGNLinearOperator(risk), dense_ggn(digits.model, data, no_bar)
    b = risk.gradient_vector(numpy=True)
    dampings = [1e-2, 1e-4]
    ranks = [10, 40] if page.quick else [20, 80]
    shown: dict[float, dict[str, tuple[Array, list[float]]]] = {}
    systems = {damping: System(G, dense, b, damping) for damping in dampings}
    for damping, system in systems.items():
        print(f"damping {damping:g}, condition number {system.condition:.0f}")
        print(f"  {'preconditioner':<20}{'sketch':>8}{'solve':>7}{'error':>10}")
        shown[damping] = {}
        used: dict[str, int] = {}
        choice = preconditioners(risk, damping, ranks, page.seed)
        for name, (M, sketch) in choice.items():
            errors, products = system.solve(M)
            used[name] = products
            print(f"  {name:<20}{sketch:>8}{products:>7}{errors[-1]:>10.1e}")
            page.check(f"damping {damping:g}, {name}, error vs dense", errors[-1], 1e-6)
            steps = np.linspace(sketch, sketch + len(errors) - 1, len(errors))
            shown[damping][name] = (steps, errors)
            if name == "none":
                ratio = float(np.max(np.array(errors) / system.bound(len(errors))))
                page.check(f"damping {damping:g}, error over its bound", ratio, 1)
        largest = f"Nyström, rank {ranks[-1]}"
        ratio = used[largest] / used["none"]
        page.check(f"damping {damping:g}, solve with {largest} over plain", ratio, 0.7)
    draw(page, systems, shown)


def draw(
    page: Page,
    systems: dict[float, System],
    shown: dict[float, dict[str, tuple[Array, list[float]]]],
) -> None:
    """Draw errors by products, those of the sketch first."""
    with page.figure("convergence", 11, 4, ncols=2, sharey=True) as axes:
        for ax, (damping, curves) in zip(axes, shown.items(), strict=True):
            plot_convergence(curves, ax, ylabel="error in the norm of A, vs dense")
            length = len(curves["none"][0])
            bound = systems[damping].bound(length)
            ax.plot(bound, color="0.6", linewidth=0.8, label="bound, no preconditioner")
            ax.set_title(f"damping {damping:g}")
            ax.set_xlabel("products with the GGN, those of the sketch first")
            ax.set_ylim(1e-10, 5)
            ax.grid(alpha=0.3)
        axes[1].legend(fontsize=8)


main = command(body)

if __name__ == "__main__":
    sys.exit(main())
