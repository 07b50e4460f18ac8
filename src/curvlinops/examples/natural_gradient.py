r"""The natural gradient of a trained network, by SciPy's solvers.

Run it as ``python -m curvlinops.examples.natural_gradient``. A network learns to read
scikit-learn's 1797 scanned digits. Its damped generalised Gauss-Newton matrix (GGN)
:math:`A = G + \delta I` is never built, only multiplied with vectors, yet SciPy finds
the natural gradient :math:`A^{-1} g` and the leading eigenvalues. The network is small
on purpose: the dense matrices fit into memory, so every result is compared with them.

Printed are the eigenvalues, a table of methods for :math:`A^{-1} g`, and the checks.
The exit status is 0 if all of these hold, 1 if one does not, 2 if the arguments are
wrong. Figures are saved as PNG.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import pairwise
from time import perf_counter
from typing import Any

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator, cg, eigsh
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap
from tqdm import tqdm

from curvlinops import (
    CGInverseLinearOperator,
    EmpiricalRisk,
    GGNLinearOperator,
    HessianLinearOperator,
    NeumannInverseLinearOperator,
    TensorLinearOperator,
)
from curvlinops._memory import raise_if_out_of_memory
from curvlinops.examples._digits import (
    Bar,
    Batches,
    accuracy,
    load_digits_batches,
    make_network,
    train,
)
from curvlinops.examples._page import Array, Page, Stop, command, norm, number
from curvlinops.examples.functorch import functorch_hessian

Params = Mapping[str, Tensor]

#: Share of the test digits that the trained network must read correctly.
TARGET_ACCURACY = 0.93
#: Relative residual at which CG has converged, and eigenvalues' relative accuracy.
TOLERANCE = 1e-10
#: What is allowed for rounding where two roads lead to the same float64 matrix.
ROUNDING = 1e-12

CONVERGED = "CG, to convergence"
FEW, MORE = 5, 15
BATCH_SIZE = 500
NUM_EIGENVALUES = 5
NUM_TERMS = (10, 100, 1000)
PICTURED_TERMS = (10, 100)


# -- dense matrices, to compare with ----------------------------------------------


def dense_ggn(model: nn.Module, data: Batches, bar: Bar) -> Array:
    r"""Return the GGN of the mean cross-entropy, without using operators.

    Sums :math:`J_n^\top (\mathrm{diag}(p_n) - p_n p_n^\top) J_n` over the data, with
    the Jacobian :math:`J_n` of the logits for datum :math:`n` from :mod:`torch.func`,
    and :math:`p_n` the predicted probabilities.
    """
    params = {name: p.detach() for name, p in model.named_parameters()}

    def logits(params: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(model, params, (x,))

    jacobians = vmap(jacrev(logits), in_dims=(None, 0))
    total: Any = 0
    for X, _ in bar(data, desc="Dense GGN"):
        J = torch.cat([j.flatten(2) for j in jacobians(params, X).values()], dim=2)
        p = model(X).detach().softmax(1).unsqueeze(2)
        factor = p.sqrt() * (J - (p * J).sum(1, keepdim=True))
        total = total + torch.einsum("ncp,ncq->pq", factor, factor)
    return (total / sum(len(X) for X, _ in data)).cpu().numpy()


def multiply_identity(A: LinearOperator, bar: Bar, width: int = 70) -> Array:
    """Return ``A @ I``, in blocks of ``width`` columns."""
    identity = np.eye(A.shape[1])
    blocks = range(0, A.shape[1], width)
    columns = [A @ identity[:, i : i + width] for i in bar(blocks, desc="A @ I")]
    return np.concatenate(columns, axis=1)


# -- results ----------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One method for the natural gradient and how well it did."""

    method: str
    steps: int | None
    residual: float
    error: float
    seconds: float

    def __str__(self) -> str:
        """Return the row of the table."""
        steps = "-" if self.steps is None else self.steps
        numbers = f"{self.residual:19.1e}{self.error:16.1e}{self.seconds:9.3f}"
        return f"{self.method:<22}{steps:>16}{numbers}"


HEADER = f"{'method':<22}iterations/terms  relative residual  error vs dense  seconds"


@dataclass(frozen=True)
class System:
    """The equation ``A x = g``, with the dense matrix and its inverse."""

    A: LinearOperator
    g: Array
    dense: Array
    inverse: Array

    @cached_property
    def solution(self) -> Array:
        """The natural gradient from the dense inverse."""
        return self.inverse @ self.g

    def residual(self, x: Array) -> float:
        """Return ``|A x - g| / |g|``."""
        return norm(self.dense @ x - self.g) / norm(self.g)

    def error(self, x: Array) -> float:
        """Return the distance from the dense solution, relative to its length."""
        return norm(x - self.solution) / norm(self.solution)

    def solve(self, method: str, solver: Any) -> Row:
        """Multiply the gradient by an inverse operator and compare."""
        start = perf_counter()
        x = solver @ self.g
        seconds = perf_counter() - start
        steps = int(solver.statistics.iterations[0])
        return Row(method, steps, self.residual(x), self.error(x), seconds)


def eigenvalues(A: LinearOperator, seed: int) -> Array:
    """Return the largest eigenvalues in descending order, by SciPy's ``eigsh``."""
    start = np.random.default_rng(seed).standard_normal(A.shape[0])
    top = eigsh(A, k=NUM_EIGENVALUES, which="LA", v0=start, return_eigenvectors=False)
    return np.sort(top)[::-1]


def worst_eigenvalue(found: Array, dense: Array) -> float:
    """Return the largest relative error, by all eigenvalues of the dense matrix."""
    expected = torch.linalg.eigvalsh(torch.from_numpy(dense)).numpy()
    expected = expected[::-1][: len(found)]
    return float(np.max(np.abs(found / expected - 1)))


def natural_gradients(system: System, scale: float, bar: Bar) -> list[Row]:
    """Return rows for CG with growing effort and for growing Neumann series."""
    A, rows = system.A, []
    for limit in (FEW, MORE):
        inverse = CGInverseLinearOperator(A, max_iter=limit)
        rows.append(system.solve("CG, stopped early", inverse))

    with bar(desc="CG", unit=" iterations") as progress:
        inverse = CGInverseLinearOperator(
            A, tolerance=TOLERANCE, callback=lambda x: progress.update()
        )
        rows.append(system.solve(CONVERGED, inverse))

    for terms in bar(NUM_TERMS, desc="Neumann series"):
        series = NeumannInverseLinearOperator(A, num_terms=terms, scale=scale)
        rows.append(system.solve("Neumann series", series))
    return rows


def dense_inverse(system: System, bar: Bar) -> tuple[Row, float]:
    """Invert ``A @ I``; return its row, and how far it is from the dense matrix."""
    start = perf_counter()
    matrix = multiply_identity(system.A, bar)
    x = np.linalg.inv(matrix) @ system.g
    seconds = perf_counter() - start
    row = Row("A @ I, inverted", None, system.residual(x), system.error(x), seconds)
    difference = norm(matrix - system.dense) / norm(system.dense)
    return row, difference


def cg_curves(system: System) -> tuple[list[float], list[float]]:
    """Return errors and residuals of the iterates of SciPy's ``cg`` on the operator."""
    iterates = [np.zeros_like(system.g)]

    def keep(x: Array) -> None:
        iterates.append(x.copy())

    cg(system.A, system.g, rtol=TOLERANCE, callback=keep)
    return list(map(system.error, iterates)), list(map(system.residual, iterates))


def neumann_curves(system: System, scale: float, num_terms: int) -> list[Array]:
    r"""Return errors and residuals of the partial sums of the Neumann series.

    Both start from the vectors that belong to :math:`x = 0`, and each term multiplies
    them by :math:`I - \alpha A`, which is diagonal in the basis of eigenvectors.
    """
    evals, Q = (t.numpy() for t in torch.linalg.eigh(torch.from_numpy(system.dense)))
    factors = (1 - scale * evals) ** np.arange(1, num_terms + 2)[:, None]
    starts = Q.T @ system.solution, Q.T @ system.g
    return [np.linalg.norm(factors * v, axis=1) / norm(v) for v in starts]


# -- figures ----------------------------------------------------------------------

COLORBAR: dict[str, Any] = {"label": r"$\log_{10}$ |entry|", "extend": "min"}


def draw_matrix(ax: Any, matrix: Array, title: str, top: float) -> Any:
    """Draw the entries' magnitude over seven decades up to ``top``; zeros are blank."""
    magnitude = np.ma.log10(np.ma.masked_equal(np.abs(matrix), 0.0))
    ax.set_title(title, fontsize=10)
    return ax.imshow(magnitude, vmin=np.log10(top) - 7, vmax=np.log10(top))


def label_parameters(axes: Any, params: Params) -> None:
    """Mark where each parameter's rows and columns are."""
    ends = np.cumsum([0, *(p.numel() for p in params.values())])
    centres = [(a + b - 1) / 2 for a, b in pairwise(ends)]
    for ax in axes:
        ax.set_xticks(centres, list(params), rotation=90, fontsize=7)
        ax.set_yticks(centres, list(params) if ax is axes[0] else [""] * len(params))
        ax.tick_params(length=0, labelsize=7)
        for end in ends[1:-1]:
            ax.axvline(end - 0.5, color="black", linewidth=0.4)
            ax.axhline(end - 0.5, color="black", linewidth=0.4)


def draw_matrices(axes: Any, system: System, params: Params, damping: float) -> None:
    """Draw the damped GGN beside its inverse."""
    figure = axes[0].figure
    figure.suptitle("Magnitude of the entries, blank where they are zero")
    name = rf"$G + {damping:g}\, I$"
    titles = f"damped GGN, {name}", f"its inverse, $(${name}$)^{{-1}}$"
    matrices = system.dense, system.inverse
    for ax, matrix, title in zip(axes, matrices, titles, strict=True):
        image = draw_matrix(ax, matrix, title, np.abs(matrix).max())
        figure.colorbar(image, ax=ax, shrink=0.9, **COLORBAR)
    label_parameters(axes, params)


def draw_neumann(axes: Any, system: System, params: Params, scale: float) -> None:
    """Draw truncated Neumann series of the matrix beside its exact inverse."""
    A, inverse = TensorLinearOperator(torch.from_numpy(system.dense)), system.inverse
    figure = axes[0].figure
    figure.suptitle("Inverse of the damped GGN, magnitude of the entries")
    for ax, terms in zip(axes, PICTURED_TERMS, strict=False):
        series = NeumannInverseLinearOperator(A, num_terms=terms, scale=scale)
        matrix = series @ np.eye(len(system.g))
        error = norm(matrix - inverse) / norm(inverse)
        title = f"Neumann series, {terms} terms\nrelative error {error:.2f}"
        draw_matrix(ax, matrix, title, np.abs(inverse).max())
    image = draw_matrix(axes[-1], inverse, "exact", np.abs(inverse).max())
    figure.colorbar(image, ax=axes, shrink=0.9, **COLORBAR)
    label_parameters(axes, params)


def draw_convergence(
    ax: Any, system: System, scale: float, rows: Iterable[Row]
) -> None:
    """Draw residual and error over iterations of CG and terms of the Neumann series."""
    curves: dict[str, Sequence[Any]] = {
        "CG": cg_curves(system),
        "Neumann": neumann_curves(system, scale, max(NUM_TERMS)),
    }
    for color, (name, (errors, residuals)) in zip(
        ("C0", "C1"), curves.items(), strict=True
    ):
        ax.plot(errors, color=color, label=f"{name}, error against dense")
        ax.plot(residuals, ":", color=color, label=f"{name}, residual")
    ends = [(row.steps, row.error) for row in rows if row.steps]
    ax.plot(*zip(*ends, strict=True), "k.", label="in the table")
    ax.set(xscale="log", yscale="log", ylim=(TOLERANCE / 10, 5))
    ax.set_xlabel("products with the damped GGN (iterations or terms)")
    ax.set_ylabel("relative error, relative residual")
    ax.set_title("Natural gradient: convergence of CG and of the Neumann series")
    ax.grid(alpha=0.3)
    ax.legend()


# -- the command ------------------------------------------------------------------


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this page alone."""
    parser.add_argument(
        "--device", type=usable_device, default="cpu", help="cpu, cuda, cuda:1, ..."
    )
    for name, convert, default, text in (
        ("epochs", number(int, 1, 10_000), None, "of the training (60, quick: 120)"),
        ("hidden", number(int, 1, 64), None, "number of hidden units (12, quick: 6)"),
        ("damping", number(float, 1e-4, 1e2), 1e-2, "multiple of I added (0.01)"),
    ):
        parser.add_argument(f"--{name}", type=convert, default=default, help=text)
    parser.add_argument("--quiet", action="store_true", help="no progress bars")


def usable_device(name: str) -> torch.device:
    """Return a device on which float64 can be computed."""
    try:
        device = torch.device(name)
        torch.zeros(1, dtype=torch.float64, device=device).tolist()
    except (RuntimeError, AssertionError, TypeError) as error:
        raise_if_out_of_memory(error)
        reason = str(error).splitlines()[0]
        message = f"{name} cannot be used here: {reason}"
        raise argparse.ArgumentTypeError(message) from None
    return device


def trained_network(page: Page, bar: Bar) -> tuple[nn.Module, Batches]:
    """Return a network that has learned to read, with its data."""
    args = page.args
    hidden = args.hidden or (6 if page.quick else 12)
    epochs = args.epochs or (120 if page.quick else 60)
    data, test_data = load_digits_batches(BATCH_SIZE, page.seed, args.device)
    model = make_network(hidden, page.seed, args.device)
    train(model, data, epochs, bar)
    score, sizes = accuracy(model, test_data), [len(X) for X, _ in data + test_data]
    print(f"Data      training digits in mini-batches of {sizes[:-1]}, ", end="")
    print(f"{sizes[-1]} test digits")
    print(f"Training  {epochs} epochs, test accuracy {score:.1%} ", end="")
    print(f"(required: {TARGET_ACCURACY:.0%})")
    if score < TARGET_ACCURACY:
        raise Stop("The accuracy is too low. Increase --epochs or --hidden.")
    number_of_parameters = sum(p.numel() for p in model.parameters())
    print(f"Network   64-{hidden}-10 with P = {number_of_parameters} ", end="")
    print(f"parameters, float64 on {args.device}")
    return model, data


def body(page: Page) -> None:
    """Train, multiply, solve, compare, draw; print what came out."""
    delta = page.args.damping
    bar: Bar = partial(tqdm, disable=page.args.quiet, leave=False)
    model, data = trained_network(page, bar)

    # Its curvature matrices, as SciPy operators that share one risk
    params = dict(model.named_parameters())
    risk = EmpiricalRisk(model, nn.CrossEntropyLoss(), params, data)
    G, H = GGNLinearOperator(risk), HessianLinearOperator(risk)
    A = G.damped(delta)
    gradient, loss = risk.gradient_and_loss()
    g = nn.utils.parameters_to_vector(gradient).cpu().numpy()
    print(f"Loss      {loss:.4f}, its gradient g has norm {norm(g):.4f}")

    # The same matrices in dense form, by another road
    dense_G = dense_ggn(model, data, bar)
    dense_H = functorch_hessian(model, nn.CrossEntropyLoss(), params, data)
    dense_A = dense_G + delta * np.eye(len(g))
    system = System(A, g, dense_A, np.linalg.inv(dense_A))

    top_G, top_H = eigenvalues(G, page.seed), eigenvalues(H, page.seed)
    top = float(top_G[0]) + delta
    print(f"Damping   A = G + {delta:g} I, its condition number is {top / delta:.1f}")
    print("\nLeading eigenvalues by scipy.sparse.linalg.eigsh")
    for name, values in (("GGN", top_G), ("Hessian", top_H)):
        print(f"{name:<9} {'  '.join(f'{value:.6f}' for value in values)}")

    print("\nNatural gradient, the solution x of A x = g\n" + HEADER)
    dense_row, difference = dense_inverse(system, bar)
    A @ g  # prepares what later products reuse, so that no row pays for it
    rows = [dense_row, *natural_gradients(system, 1 / top, bar)]
    print(*rows, sep="\n")
    print("Seconds leave out what earlier products have prepared for later ones.")

    converged = next(row for row in rows if row.method == CONVERGED)
    page.check("A @ I, difference from dense", difference, ROUNDING)
    dense = {"GGN": (top_G, dense_G), "Hessian": (top_H, dense_H.cpu().numpy())}
    for name, (found, matrix) in dense.items():
        worst = worst_eigenvalue(found, matrix)
        page.check(f"{name}'s eigenvalues, error vs dense", worst, TOLERANCE)
    page.check("converged CG, relative residual", converged.residual, 2 * TOLERANCE)
    # times the condition number, a relative residual bounds the relative error
    bound = 2 * TOLERANCE * top / delta
    page.check("converged CG, error vs dense", converged.error, bound)

    with page.figure("matrices", 11, 5.2, ncols=2) as axes:
        draw_matrices(axes, system, params, delta)
    with page.figure("neumann", 13, 4.8, ncols=len(PICTURED_TERMS) + 1) as axes:
        draw_neumann(axes, system, params, 1 / top)
    with page.figure("convergence", 7.5, 4.8) as ax:
        draw_convergence(ax, system, 1 / top, rows)


main = command(body, add_options)

if __name__ == "__main__":
    sys.exit(main())
