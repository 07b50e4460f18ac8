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
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
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
)
from curvlinops.examples import IdentityLinearOperator, TensorLinearOperator
from curvlinops.examples.functorch import functorch_hessian

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

Array = NDArray[np.float64]
Batches = list[tuple[Tensor, Tensor]]
Bar = Callable[..., Any]

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


# -- a trained network ------------------------------------------------------------


def load_digits_batches(
    batch_size: int, seed: int, device: torch.device
) -> tuple[Batches, Batches]:
    """Return mini-batches of training digits and one batch of test digits.

    A fifth is kept for testing. Pixels are between 0 and 1, in float64.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    pixels, labels = load_digits(return_X_y=True)
    parts = train_test_split(
        pixels / 16, labels, test_size=0.2, stratify=labels, random_state=seed
    )
    X_train, X_test, y_train, y_test = (torch.from_numpy(p).to(device) for p in parts)
    batches = zip(X_train.split(batch_size), y_train.split(batch_size), strict=True)
    return list(batches), [(X_test, y_test)]


def make_network(hidden: int, seed: int, device: torch.device) -> nn.Sequential:
    """Return an untrained network 64-hidden-10 in float64."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = nn.Sequential(nn.Linear(64, hidden), nn.Tanh(), nn.Linear(hidden, 10))
    return network.to(device, torch.float64)


def train(model: nn.Module, data: Batches, epochs: int, bar: Bar) -> None:
    """Minimise the cross-entropy with torch's own Adam."""
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in bar(range(epochs), desc="Training"):
        for X, y in data:
            optimiser.zero_grad()
            nn.functional.cross_entropy(model(X), y).backward()
            optimiser.step()


def accuracy(model: nn.Module, data: Batches) -> float:
    """Return the share of digits that are read correctly."""
    with torch.no_grad():
        hits = torch.cat([model(X).argmax(1) == y for X, y in data])
    return hits.double().mean().item()


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
        numbers = f"{self.residual:13.1e} {self.error:14.1e} {self.seconds:8.3f}"
        return f"{self.method:<38} {steps:>5} {numbers}"


HEADER = f"{'method':<38} steps rel. residual error vs dense  seconds"


@dataclass(frozen=True)
class Check:
    """A figure with the bound that it must not exceed."""

    what: str
    value: float
    bound: float

    @property
    def passed(self) -> bool:
        """Whether the bound holds; it does not for NaN."""
        return self.value <= self.bound

    def __str__(self) -> str:
        """Return the line to print."""
        status, sign = ("ok    ", "<=") if self.passed else ("FAILED", "> ")
        return f"{status} {self.what}: {self.value:.1e} {sign} {self.bound:.0e}"


@dataclass(frozen=True)
class System:
    """The equation ``A x = g``, with the dense matrix and its inverse."""

    A: LinearOperator
    g: Array
    dense: Array
    inverse: Array

    @property
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


def norm(x: Array) -> float:
    """Return the Euclidean (of a matrix: Frobenius) norm."""
    return float(np.linalg.norm(x))


def eigenvalues(A: LinearOperator, seed: int) -> Array:
    """Return the largest eigenvalues in descending order, by SciPy's ``eigsh``."""
    start = np.random.default_rng(seed).standard_normal(A.shape[0])
    top = eigsh(A, k=NUM_EIGENVALUES, which="LA", v0=start, return_eigenvectors=False)
    return np.sort(top)[::-1]


def compare_eigenvalues(name: str, found: Array, dense: Array) -> Check:
    """Compare the largest eigenvalues with all those of the dense matrix."""
    expected = np.linalg.eigvalsh(dense)[::-1][: len(found)]
    worst = float(np.max(np.abs(found / expected - 1)))
    return Check(f"{name}'s eigenvalues, error vs dense", worst, TOLERANCE)


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


def dense_solve(system: System, delta: float, G: LinearOperator, bar: Bar) -> Row:
    """Return the row of the dense inverse of ``G @ I + delta I``."""
    start = perf_counter()
    dense = multiply_identity(G, bar) + delta * np.eye(len(system.g))
    x = np.linalg.inv(dense) @ system.g
    seconds = perf_counter() - start
    return Row("dense: invert A @ I", None, system.residual(x), system.error(x), seconds)


def cg_iterates(A: LinearOperator, g: Array) -> Array:
    """Return CG's iterates as columns, from SciPy's ``cg`` called on the operator."""
    iterates = [np.zeros_like(g)]
    cg(A, g, rtol=TOLERANCE, callback=lambda x: iterates.append(x.copy()))
    return np.stack(iterates, axis=1)


def neumann_iterates(system: System, scale: float, num_terms: int) -> Array:
    """Return the partial sums of the Neumann series as columns, by dense products."""
    iterates = [scale * system.g]
    for _ in range(num_terms):
        x = iterates[-1]
        iterates.append(x + scale * (system.g - system.dense @ x))
    return np.stack(iterates, axis=1)


# -- figures ----------------------------------------------------------------------


def draw_matrix(ax: Axes, matrix: Array, title: str, **options: Any) -> AxesImage:
    """Draw the logarithm of the entries' magnitude; zeros stay blank."""
    magnitude = np.ma.masked_equal(np.abs(matrix), 0.0)
    ax.set_title(title)
    ax.set_facecolor("white")
    return ax.imshow(np.ma.log10(magnitude), cmap="viridis", **options)


def label_parameters(ax: Axes, params: dict[str, Tensor]) -> None:
    """Mark where each parameter's rows and columns are."""
    ends = np.cumsum([0, *(p.numel() for p in params.values())])
    centres = [(a + b - 1) / 2 for a, b in pairwise(ends)]
    ax.set_xticks(centres, list(params), rotation=90, fontsize=7)
    ax.set_yticks(centres, list(params), fontsize=7)
    ax.tick_params(length=0)
    for end in ends[1:-1]:
        ax.axvline(end - 0.5, color="black", linewidth=0.4)
        ax.axhline(end - 0.5, color="black", linewidth=0.4)


def figure_matrices(system: System, params: dict[str, Tensor], damping: float) -> Figure:
    """Draw the damped GGN beside its inverse."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5.2), layout="constrained")
    figure.suptitle(f"Damped GGN of a trained network, {len(system.g)} parameters")
    axes = figure.subplots(ncols=2)
    names = rf"$G + {damping:g}\, I$", rf"$(G + {damping:g}\, I)^{{-1}}$"
    for ax, matrix, name in zip(axes, (system.dense, system.inverse), names, strict=True):
        # rounding leaves entries where the exact matrix has zeros
        image = draw_matrix(ax, matrix, name, vmin=np.log10(np.abs(matrix).max()) - 8)
        label_parameters(ax, params)
        figure.colorbar(image, ax=ax, label=r"$\log_{10}$ |entry|", extend="min")
    return figure


def figure_neumann(system: System, params: dict[str, Tensor], scale: float) -> Figure:
    """Draw truncated Neumann series of the matrix beside its exact inverse."""
    from matplotlib.figure import Figure

    A, inverse = TensorLinearOperator(torch.from_numpy(system.dense)), system.inverse
    pictures = {}
    for terms in PICTURED_TERMS:
        series = NeumannInverseLinearOperator(A, num_terms=terms, scale=scale)
        matrix = series @ np.eye(len(system.g))
        error = norm(matrix - inverse) / norm(inverse)
        pictures[f"Neumann series, {terms} terms\nrelative error {error:.2f}"] = matrix
    pictures["exact"] = inverse

    figure = Figure(figsize=(13, 4.8), layout="constrained")
    figure.suptitle("Inverse of the damped GGN")
    axes = figure.subplots(ncols=len(pictures))
    top = np.log10(np.abs(inverse).max())
    for ax, (title, matrix) in zip(axes, pictures.items(), strict=True):
        image = draw_matrix(ax, matrix, title, vmin=top - 8, vmax=top)
        label_parameters(ax, params)
    figure.colorbar(image, ax=axes, label=r"$\log_{10}$ |entry|", extend="min")
    return figure


def figure_convergence(system: System, scale: float, rows: Iterable[Row]) -> Figure:
    """Draw residual and error over iterations of CG and terms of the Neumann series."""
    from matplotlib.figure import Figure

    curves = {
        "CG": cg_iterates(system.A, system.g),
        "Neumann": neumann_iterates(system, scale, max(NUM_TERMS)),
    }
    figure = Figure(figsize=(7.5, 4.8), layout="constrained")
    ax = figure.subplots()
    for color, (name, iterates) in zip(("C0", "C1"), curves.items(), strict=True):
        products = np.arange(iterates.shape[1])
        columns = iterates.T
        errors = [system.error(x) for x in columns]
        residuals = [system.residual(x) for x in columns]
        ax.plot(products, errors, color=color, label=f"{name}, error against dense")
        ax.plot(products, residuals, ":", color=color, label=f"{name}, residual")
    ends = [(row.steps, row.error) for row in rows if row.steps]
    ax.plot(*zip(*ends, strict=True), "k.", label="in the table")
    ax.set(xscale="log", yscale="log", ylim=(TOLERANCE / 10, 5))
    ax.set_xlabel("products with the damped GGN (iterations or terms)")
    ax.set_ylabel("relative to the solution, or to the gradient")
    ax.set_title("Natural gradient: convergence of CG and of the Neumann series")
    ax.grid(alpha=0.3)
    ax.legend()
    return figure


def save(figures: dict[str, Figure], directory: Path) -> None:
    """Write every figure as PNG."""
    for name, figure in figures.items():
        figure.savefig(directory / f"{name}.png", dpi=150)


# -- the command ------------------------------------------------------------------


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the arguments, checked; exits with status 2 if one is wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m curvlinops.examples.natural_gradient",
        description="Natural gradient of a network trained on scikit-learn's digits.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ...")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("natural_gradient_output"),
        metavar="DIR",
        help="folder for the figures, created if need be",
    )
    parser.add_argument("--seed", type=_natural, default=0, help="of all randomness")
    parser.add_argument("--epochs", type=_positive, default=60, help="of the training")
    parser.add_argument("--hidden", type=_positive, default=12, help="hidden units")
    parser.add_argument(
        "--damping", type=_damping, default=1e-2, help="multiple of I that is added"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    args = parser.parse_args(argv)

    missing = [
        package
        for module, package in (("matplotlib",) * 2, ("sklearn", "scikit-learn"))
        if find_spec(module) is None
    ]
    if missing:
        parser.error(
            f"this example needs {' and '.join(missing)}. Install the extra with "
            "`pip install curvlinops-scipy[examples]`"
        )
    try:
        args.device = torch.device(args.device)
        torch.zeros(1, dtype=torch.float64, device=args.device)
    except (RuntimeError, AssertionError, TypeError) as error:
        reason = str(error).splitlines()[0]
        parser.error(f"--device {args.device} cannot be used here: {reason}")
    try:
        args.output.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=args.output):
            pass
    except OSError as error:
        parser.error(f"--output {args.output} cannot be written to: {error.strerror}")
    return args


def _natural(text: str) -> int:
    if (number := int(text)) < 0 or number >= 2**32:
        raise argparse.ArgumentTypeError("a number from 0 to 2**32 - 1 is needed")
    return number


def _positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError("a positive number is needed")
    return number


def _damping(text: str) -> float:
    if not 1e-4 <= (number := float(text)) <= 1e2:
        raise argparse.ArgumentTypeError("a number from 1e-4 to 100 is needed")
    return number


def main(argv: Sequence[str] | None = None) -> int:
    """Run the example and return its exit status."""
    args = parse_arguments(argv)
    device, delta = args.device, args.damping
    bar: Bar = partial(tqdm, disable=args.quiet, leave=False)

    # A network that has learned to read
    data, test_data = load_digits_batches(BATCH_SIZE, args.seed, device)
    model = make_network(args.hidden, args.seed, device)
    train(model, data, args.epochs, bar)
    score, size = accuracy(model, test_data), sum(len(X) for X, _ in data)
    print(f"Data      {size} training digits in {len(data)} mini-batches, ", end="")
    print(f"{len(test_data[0][0])} test digits")
    print(f"Training  {args.epochs} epochs, test accuracy {score:.1%}, ", end="")
    print(f"at least {TARGET_ACCURACY:.0%} is required")
    if score < TARGET_ACCURACY:
        print("The accuracy is too low. Increase --epochs or --hidden.", file=sys.stderr)
        return 1

    # Its curvature matrices, as SciPy operators that share one risk
    params = dict(model.named_parameters())
    risk = EmpiricalRisk(model, nn.CrossEntropyLoss(), params, data)
    G, H = GGNLinearOperator(risk), HessianLinearOperator(risk)
    identity = IdentityLinearOperator(G.in_shapes, G.device, G.torch_dtype)
    A = G + delta * identity
    gradient, loss = risk.gradient_and_loss()
    g = nn.utils.parameters_to_vector(gradient).cpu().numpy()
    print(f"Network   64-{args.hidden}-10, P = {len(g)} parameters, {G.dtype}, {device}")
    print(f"Loss      {loss:.4f}, with a gradient of norm {norm(g):.2e}")

    # The same matrices in dense form, by another road
    dense_G = dense_ggn(model, data, bar)
    dense_H = functorch_hessian(model, nn.CrossEntropyLoss(), params, data)
    dense_A = dense_G + delta * np.eye(len(g))
    system = System(A, g, dense_A, np.linalg.inv(dense_A))
    difference = norm(multiply_identity(G, bar) - dense_G) / norm(dense_G)

    # Eigenvalues and natural gradients
    top_G, top_H = eigenvalues(G, args.seed), eigenvalues(H, args.seed)
    scale = 1 / (top_G[0] + delta)
    print(f"Damping   {delta:g}, so that A has the condition number {1 / scale / delta:.1f}")
    print("\nLeading eigenvalues by scipy.sparse.linalg.eigsh")
    for name, values in (("GGN", top_G), ("Hessian", top_H)):
        print(f"{name:<9} {'  '.join(f'{value:.6f}' for value in values)}")
    print("\nNatural gradient, A^-1 g\n" + HEADER)
    rows = natural_gradients(system, scale, bar)
    print(*rows, sep="\n")

    converged = next(row for row in rows if "convergence" in row.method)
    checks = [
        Check("G @ I, difference from dense GGN", difference, ROUNDING),
        compare_eigenvalues("GGN", top_G, dense_G),
        compare_eigenvalues("Hessian", top_H, dense_H.cpu().numpy()),
        Check("converged CG, residual", converged.residual, 2 * TOLERANCE),
        Check("converged CG, error vs dense", converged.error, TOLERANCE / scale / delta),
    ]
    print("\nChecks", *checks, sep="\n")

    # Figures
    figures = {
        "matrices": figure_matrices(system, params, delta),
        "neumann": figure_neumann(system, params, scale),
        "convergence": figure_convergence(system, scale, rows),
    }
    save(figures, args.output)
    failed = sum(not check.passed for check in checks)
    verdict = f"{failed} of {len(checks)} checks FAILED" if failed else "all checks passed"
    print(f"\nFigures: {', '.join(figures)} (.png) in {args.output}; {verdict}.")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
