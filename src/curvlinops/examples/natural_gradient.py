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
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
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
    TensorLinearOperator,
)
from curvlinops._memory import raise_if_out_of_memory
from curvlinops.examples.functorch import functorch_hessian

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

Array = NDArray[np.float64]
Params = Mapping[str, Tensor]
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
        numbers = f"{self.residual:19.1e}{self.error:16.1e}{self.seconds:9.3f}"
        return f"{self.method:<22}{steps:>16}{numbers}"


HEADER = f"{'method':<22}iterations/terms  relative residual  error vs dense  seconds"


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
    expected = torch.linalg.eigvalsh(torch.from_numpy(dense)).numpy()
    expected = expected[::-1][: len(found)]
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


def dense_inverse(system: System, bar: Bar) -> tuple[Row, Check]:
    """Invert ``A @ I``; return its row, and how far it is from the dense matrix."""
    start = perf_counter()
    matrix = multiply_identity(system.A, bar)
    x = np.linalg.inv(matrix) @ system.g
    seconds = perf_counter() - start
    row = Row("A @ I, inverted", None, system.residual(x), system.error(x), seconds)
    difference = norm(matrix - system.dense) / norm(system.dense)
    return row, Check("A @ I, difference from dense", difference, ROUNDING)


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


def draw_matrix(ax: Axes, matrix: Array, title: str, top: float) -> AxesImage:
    """Draw the entries' magnitude over seven decades up to ``top``; zeros are blank."""
    magnitude = np.ma.log10(np.ma.masked_equal(np.abs(matrix), 0.0))
    ax.set_title(title, fontsize=10)
    return ax.imshow(magnitude, vmin=np.log10(top) - 7, vmax=np.log10(top))


def label_parameters(axes: Sequence[Axes], params: Params) -> None:
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


def figure_matrices(system: System, params: Params, damping: float) -> Figure:
    """Draw the damped GGN beside its inverse."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5.2), layout="constrained")
    figure.suptitle("Magnitude of the entries, blank where they are zero")
    axes = figure.subplots(ncols=2)
    name = rf"$G + {damping:g}\, I$"
    titles = f"damped GGN, {name}", f"its inverse, $(${name}$)^{{-1}}$"
    matrices = system.dense, system.inverse
    for ax, matrix, title in zip(axes, matrices, titles, strict=True):
        image = draw_matrix(ax, matrix, title, np.abs(matrix).max())
        figure.colorbar(image, ax=ax, shrink=0.9, **COLORBAR)
    label_parameters(axes, params)
    return figure


def figure_neumann(system: System, params: Params, scale: float) -> Figure:
    """Draw truncated Neumann series of the matrix beside its exact inverse."""
    from matplotlib.figure import Figure

    A, inverse = TensorLinearOperator(torch.from_numpy(system.dense)), system.inverse
    figure = Figure(figsize=(13, 4.8), layout="constrained")
    figure.suptitle("Inverse of the damped GGN, magnitude of the entries")
    axes = figure.subplots(ncols=len(PICTURED_TERMS) + 1)
    for ax, terms in zip(axes, PICTURED_TERMS, strict=False):
        series = NeumannInverseLinearOperator(A, num_terms=terms, scale=scale)
        matrix = series @ np.eye(len(system.g))
        error = norm(matrix - inverse) / norm(inverse)
        title = f"Neumann series, {terms} terms\nrelative error {error:.2f}"
        draw_matrix(ax, matrix, title, np.abs(inverse).max())
    image = draw_matrix(axes[-1], inverse, "exact", np.abs(inverse).max())
    figure.colorbar(image, ax=axes, shrink=0.9, **COLORBAR)
    label_parameters(axes, params)
    return figure


def figure_convergence(system: System, scale: float, rows: Iterable[Row]) -> Figure:
    """Draw residual and error over iterations of CG and terms of the Neumann series."""
    from matplotlib.figure import Figure

    curves: dict[str, Sequence[Any]] = {
        "CG": cg_curves(system),
        "Neumann": neumann_curves(system, scale, max(NUM_TERMS)),
    }
    figure = Figure(figsize=(7.5, 4.8), layout="constrained")
    ax = figure.subplots()
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
    for name, convert, default, text in (
        ("seed", _number(int, 0, 2**32 - 1), 0, "of all randomness"),
        ("epochs", _number(int, 1, 10_000), 60, "of the training"),
        ("hidden", _number(int, 1, 64), 12, "number of hidden units"),
        ("damping", _number(float, 1e-4, 1e2), 1e-2, "multiple of I that is added"),
    ):
        parser.add_argument(f"--{name}", type=convert, default=default, help=text)
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    args = parser.parse_args(argv)

    packages = {"matplotlib": "matplotlib", "sklearn": "scikit-learn"}
    if missing := [name for key, name in packages.items() if find_spec(key) is None]:
        parser.error(
            f"this example needs {' and '.join(missing)}. Run `pip install "
            f"{' '.join(missing)}` (the extra `examples` of curvlinops-scipy)."
        )
    try:
        args.device = torch.device(args.device)
        torch.zeros(1, dtype=torch.float64, device=args.device).tolist()
    except (RuntimeError, AssertionError, TypeError) as error:
        raise_if_out_of_memory(error)
        reason = str(error).splitlines()[0]
        parser.error(f"--device {args.device} cannot be used here: {reason}")
    try:
        args.output.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=args.output):
            pass
    except OSError as error:
        parser.error(f"--output {args.output} cannot be written to: {error.strerror}")
    return args


def _number(kind: type, low: float, high: float) -> Callable[[str], Any]:
    """Return a converter of arguments that are numbers within bounds."""

    def convert(text: str) -> Any:
        try:
            number = kind(text)
        except ValueError:
            number = None
        if number is None or not low <= number <= high:
            raise argparse.ArgumentTypeError(
                f"{text!r} is not {'an integer' if kind is int else 'a number'} "
                f"from {low} to {high}"
            )
        return number

    return convert


def main(argv: Sequence[str] | None = None) -> int:
    """Run the example and return its exit status."""
    args = parse_arguments(argv)
    threads = torch.get_num_threads()
    torch.set_num_threads(
        1
    )  # more are no faster at this size, slower on a busy machine
    try:
        return run(args)
    finally:
        torch.set_num_threads(threads)


def run(args: argparse.Namespace) -> int:
    """Train, multiply, solve, compare, draw; print what came out."""
    device, delta = args.device, args.damping
    bar: Bar = partial(tqdm, disable=args.quiet, leave=False)

    # A network that has learned to read
    data, test_data = load_digits_batches(BATCH_SIZE, args.seed, device)
    model = make_network(args.hidden, args.seed, device)
    train(model, data, args.epochs, bar)
    score, sizes = accuracy(model, test_data), [len(X) for X, _ in data + test_data]
    print(f"Data      training digits in mini-batches of {sizes[:-1]}, ", end="")
    print(f"{sizes[-1]} test digits")
    print(f"Training  {args.epochs} epochs, test accuracy {score:.1%} ", end="")
    print(f"(required: {TARGET_ACCURACY:.0%})")
    if score < TARGET_ACCURACY:
        message = "The accuracy is too low. Increase --epochs or --hidden."
        print(message, file=sys.stderr)
        return 1

    # Its curvature matrices, as SciPy operators that share one risk
    params = dict(model.named_parameters())
    risk = EmpiricalRisk(model, nn.CrossEntropyLoss(), params, data)
    G, H = GGNLinearOperator(risk), HessianLinearOperator(risk)
    A = G.damped(delta)
    gradient, loss = risk.gradient_and_loss()
    g = nn.utils.parameters_to_vector(gradient).cpu().numpy()
    print(f"Network   64-{args.hidden}-10 with P = {len(g)} parameters, ", end="")
    print(f"{G.dtype} on {device}")
    print(f"Loss      {loss:.4f}, its gradient g has norm {norm(g):.4f}")

    # The same matrices in dense form, by another road
    dense_G = dense_ggn(model, data, bar)
    dense_H = functorch_hessian(model, nn.CrossEntropyLoss(), params, data)
    dense_A = dense_G + delta * np.eye(len(g))
    system = System(A, g, dense_A, np.linalg.inv(dense_A))

    top_G, top_H = eigenvalues(G, args.seed), eigenvalues(H, args.seed)
    top = float(top_G[0]) + delta
    print(f"Damping   A = G + {delta:g} I, its condition number is {top / delta:.1f}")
    print("\nLeading eigenvalues by scipy.sparse.linalg.eigsh")
    for name, values in (("GGN", top_G), ("Hessian", top_H)):
        print(f"{name:<9} {'  '.join(f'{value:.6f}' for value in values)}")

    print("\nNatural gradient, the solution x of A x = g\n" + HEADER)
    dense_row, dense_check = dense_inverse(system, bar)
    A @ g  # prepares what later products reuse, so that no row pays for it
    rows = [dense_row, *natural_gradients(system, 1 / top, bar)]
    print(*rows, sep="\n")
    print("Seconds leave out what earlier products have prepared for later ones.")

    converged = next(row for row in rows if row.method == CONVERGED)
    checks = [
        dense_check,
        compare_eigenvalues("GGN", top_G, dense_G),
        compare_eigenvalues("Hessian", top_H, dense_H.cpu().numpy()),
        Check("converged CG, relative residual", converged.residual, 2 * TOLERANCE),
        # times the condition number, a relative residual bounds the relative error
        Check(
            "converged CG, error vs dense",
            converged.error,
            2 * TOLERANCE * top / delta,
        ),
    ]
    print("\nChecks", *checks, sep="\n")

    # Figures
    figures = {
        "matrices": figure_matrices(system, params, delta),
        "neumann": figure_neumann(system, params, 1 / top),
        "convergence": figure_convergence(system, 1 / top, rows),
    }
    save(figures, args.output)
    failed = sum(not check.passed for check in checks)
    verdict = f"{failed} of {len(checks)} checks FAILED" if failed else "all passed"
    names = ", ".join(f"{name}.png" for name in figures)
    print(f"\nFigures: {names} in {args.output}. Checks: {verdict}.")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
