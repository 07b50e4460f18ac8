r"""Products with a Hessian that is never stored, against the stored one.

Run it as ``python -m curvlinops.examples.matrix_vector_products``.

*Question.* A network with :math:`P` parameters has a Hessian with :math:`P^2` entries.
What does it take to multiply it with a vector?

*Formula.* Two passes of automatic differentiation, one gradient inside the other:

.. math::

    H v = \nabla_\theta \left( \nabla_\theta L(\theta)^\top v \right) .

It is exact. The central difference
:math:`(\nabla L(\theta + \epsilon v) - \nabla L(\theta - \epsilon v)) / 2 \epsilon`
is not: large steps cut the Taylor series off, small ones lose digits.

*Call.* ``HessianLinearOperator(model, loss, params, data)`` is a SciPy operator.
``H @ v`` takes NumPy arrays, tensors, and lists of tensors in the parameters' shapes,
and gives back what it was given; ``H @ V`` multiplies several columns in one pass.
The same holds for the generalised Gauss-Newton matrix (GGN), the empirical Fisher
matrix, and the Jacobian of the outputs.

*What is seen.* Every operator agrees with the matrix that :mod:`torch.func` builds row
by row; the table says what building and multiplying cost in seconds and bytes. The
first figure shows the three matrices: the GGN is near the Hessian of a trained network,
the empirical Fisher matrix has its pattern but not its size. The second one shows that
no step of the difference quotient reaches the accuracy of the exact product.

References: B. Pearlmutter, "Fast exact multiplication by the Hessian", Neural
Computation 6 (1994), doi:10.1162/neco.1994.6.1.147. F. Kunstner, L. Balles, P. Hennig,
"Limitations of the empirical Fisher approximation", arXiv:1905.12558.
"""

from __future__ import annotations

import sys
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import nn

from curvlinops import (
    EFLinearOperator,
    EmpiricalRisk,
    GGNLinearOperator,
    HessianLinearOperator,
    JacobianLinearOperator,
)
from curvlinops.examples._digits import trained_digits
from curvlinops.examples._page import Array, Page, command, relative_error
from curvlinops.examples.functorch import (
    functorch_empirical_fisher,
    functorch_ggn,
    functorch_hessian,
    functorch_jacobian,
)

#: What is allowed for rounding where two roads lead to the same float64 numbers.
ROUNDING = 1e-12


def seconds(function: Any) -> tuple[Any, float]:
    """Return what a function returns, and the seconds that it took."""
    start = perf_counter()
    result = function()
    return result, perf_counter() - start


def in_containers(H: HessianLinearOperator, v: Array) -> list[Array]:
    """Return ``H @ v`` by way of NumPy, one tensor, and tensors like the parameters."""
    flat = torch.from_numpy(v)
    parts = flat.split([shape.numel() for shape in H.in_shapes])
    shaped = [part.view(s) for part, s in zip(parts, H.in_shapes, strict=True)]
    listed = H @ shaped
    return [H @ v, (H @ flat).numpy(), torch.cat([t.flatten() for t in listed]).numpy()]


def central_differences(risk: EmpiricalRisk, v: Array, steps: Array) -> list[Array]:
    """Return the difference quotients of the gradient along ``v``."""
    theta = risk.parameters_vector(numpy=True)
    quotients = []
    for step in steps:
        ends = []
        for sign in (1, -1):
            risk.set_parameters(theta + sign * step * v)
            ends.append(risk.gradient_vector(numpy=True))
        quotients.append((ends[0] - ends[1]) / (2 * step))
    risk.set_parameters(theta)
    return quotients


def body(page: Page) -> None:
    """Multiply, compare with dense matrices, draw."""
    digits = trained_digits(3 if page.quick else 12, 40, page.seed, batch_size=100)
    loss, data = nn.CrossEntropyLoss(), digits.data[: 2 if page.quick else 6]
    risk = EmpiricalRisk(digits.model, loss, digits.params, data)
    problem = digits.model, loss, digits.params, data
    rng = np.random.default_rng(page.seed)

    roads: dict[str, tuple[Any, Any]] = {
        "Hessian": (HessianLinearOperator, lambda: functorch_hessian(*problem)),
        "GGN": (GGNLinearOperator, lambda: functorch_ggn(*problem)),
        "Fisher, empirical": (
            EFLinearOperator,
            lambda: functorch_empirical_fisher(*problem),
        ),
        "Jacobian": (
            JacobianLinearOperator,
            lambda: functorch_jacobian(digits.model, digits.params, data),
        ),
    }
    dense: dict[str, Array] = {}
    print(f"{'matrix':<20}{'shape':>14}{'dense':>9}  built in  one product in")
    for name, (kind, build) in roads.items():
        A = kind(risk)
        matrix, building = seconds(build)
        dense[name] = matrix.numpy()
        V = rng.standard_normal((A.shape[1], 8))
        A @ V  # prepares what later products reuse
        products, multiplying = seconds(lambda A=A, v=V[:, 0]: A @ v)
        size = f"{dense[name].nbytes / 2**20:.1f} MB"
        shape = f"{A.shape[0]}x{A.shape[1]}"
        print(f"{name:<20}{shape:>14}{size:>9}{building:>8.3f} s{multiplying:>13.4f} s")

        single = dense[name] @ V[:, 0]
        page.check(f"{name} @ v, vs dense", relative_error(products, single), ROUNDING)
        error = relative_error(A @ V, dense[name] @ V)
        page.check(f"{name} @ V, 8 columns, vs dense", error, ROUNDING)

    H = HessianLinearOperator(risk)
    v = rng.standard_normal(H.shape[1])
    by_array, *others = in_containers(H, v)
    worst = max(relative_error(other, by_array) for other in others)
    page.check("H @ v as tensor and as list of tensors, vs NumPy", worst, ROUNDING)

    v /= np.linalg.norm(v)
    steps = np.logspace(0, -10, 11 if page.quick else 31)
    quotients = central_differences(risk, v, steps)
    truth = dense["Hessian"] @ v
    errors = [relative_error(q, truth) for q in quotients]
    exact = relative_error(H @ v, truth)
    best = min(errors)
    print(f"\nBest central difference: error {best:.1e}, the product {exact:.1e}")
    page.check("best central difference, vs dense", best, 1e-6)
    page.check("H @ v, error over that of the best difference", exact / best, 1)

    draw(page, dense, steps, errors, exact)


def draw(
    page: Page, dense: dict[str, Array], steps: Array, errors: list[float], exact: float
) -> None:
    """Draw the matrices, and the difference quotient by its step."""
    square = [name for name in dense if name != "Jacobian"]
    with page.figure("matrices", 10.5, 3.9, ncols=3) as axes:
        top = np.log10(max(np.abs(dense[name]).max() for name in square))
        for ax, name in zip(axes, square, strict=True):
            magnitude = np.ma.log10(np.ma.masked_equal(np.abs(dense[name]), 0.0))
            image = ax.imshow(magnitude, vmin=top - 6, vmax=top)
            ax.set_title(name)
        label = r"$\log_{10}$ |entry|"
        axes[0].figure.colorbar(image, ax=axes, label=label, extend="min", shrink=0.85)
    with page.figure("differences", 5.5, 3.6) as ax:
        ax.loglog(steps, errors, "o-", label="central difference of gradients")
        ax.axhline(exact, color="black", linestyle="--", label="H @ v")
        ax.set(xlabel=r"step $\epsilon$", ylabel="relative error, against dense")
        ax.grid(alpha=0.3)
        ax.legend()


main = command(body)

if __name__ == "__main__":
    sys.exit(main())
