"""What all pages of the gallery share: options, checks, figures, the exit status.

A page is a module with its story in the docstring and a function ``main`` under
:func:`command`. It is run as ``python -m curvlinops.examples.NAME``; the exit status is
0 if all checks hold, 1 if one does not, 2 if the arguments are wrong.
"""

from __future__ import annotations

import argparse
import inspect
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy.sparse.linalg import LinearOperator

from curvlinops.plots import OKABE_ITO

Array = NDArray[np.float64]

#: Import names of what the extra ``examples`` installs, with their distributions.
PACKAGES = {"matplotlib": "matplotlib", "sklearn": "scikit-learn"}


def norm(x: ArrayLike) -> float:
    """Return the Euclidean (of a matrix: Frobenius) norm."""
    return float(np.linalg.norm(x))


def relative_error(x: ArrayLike, truth: ArrayLike) -> float:
    """Return the distance of two arrays, relative to the norm of the second."""
    x, truth = np.asarray(x), np.asarray(truth)
    if x.shape != truth.shape:
        raise ValueError(f"Shapes {x.shape} and {truth.shape} differ: compare alike.")
    return norm(x - truth) / norm(truth)


class Counted(LinearOperator):
    """A symmetric operator that counts the columns that it has multiplied.

    Attributes
    ----------
    products : int
        The number of columns so far.

    Examples
    --------
    >>> import numpy as np
    >>> from curvlinops.examples._page import Counted
    >>> A = Counted(np.diag([1.0, 2.0]))
    >>> A @ np.ones(2), (A @ np.ones((2, 3))).shape, A.products
    (array([1., 2.]), (2, 3), 4)
    """

    def __init__(self, A: Any) -> None:
        super().__init__(A.dtype, A.shape)
        self.A, self.products = A, 0

    def _matvec(self, x: Array) -> Any:
        self.products += 1
        return self.A @ x.reshape(-1)

    def _matmat(self, X: Array) -> Any:
        self.products += X.shape[1]
        return self.A @ X

    def _adjoint(self) -> Counted:
        return self


class Stop(Exception):
    """A page can't go on: its message says why, and what to do."""


@dataclass(frozen=True)
class Check:
    """A figure with the bound that it must not exceed."""

    what: str
    value: float
    bound: float

    @property
    def passed(self) -> bool:
        """Whether the bound holds; it does not for NaN."""
        return bool(self.value <= self.bound)

    def __str__(self) -> str:
        """Return the line to print."""
        status, sign = ("ok    ", "<=") if self.passed else ("FAILED", "> ")
        bound = f"{self.bound:.3g}" if self.bound >= 0.01 else f"{self.bound:.0e}"
        return f"{status} {self.what}: {self.value:.1e} {sign} {bound}"


class Page:
    """One run of a page: its options, and what has been checked and drawn so far.

    Attributes
    ----------
    args : argparse.Namespace
        All options, those of :func:`make_parser` and the page's own.
    quick : bool
        Whether to run at the small size.
    seed : int
        Seed of all randomness.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.quick: bool = args.quick
        self.seed: int = args.seed
        self._checks: list[Check] = []
        self._figures: list[str] = []

    def check(self, what: str, value: float, bound: float) -> None:
        """Note that ``value`` must be at most ``bound``."""
        self._checks.append(Check(what, float(value), float(bound)))

    @contextmanager
    def figure(
        self, name: str, width: float, height: float, **subplots: Any
    ) -> Iterator[Any]:
        """Give the axes of a new figure, and save it as PNG at the end.

        Parameters
        ----------
        name
            Of the file, without its ending.
        width, height
            In inches.
        **subplots
            Of ``Figure.subplots``: ``nrows``, ``ncols``, ``sharey``, ...
        """
        from matplotlib import rc_context, rcsetup
        from matplotlib.figure import Figure

        cycle = rcsetup.cycler(color=list(OKABE_ITO.values()))
        with rc_context({"axes.prop_cycle": cycle, "image.cmap": "cividis"}):
            figure = Figure(figsize=(width, height), layout="constrained")
            yield figure.subplots(**subplots)
            figure.savefig(self.args.output / f"{name}.png", dpi=150)
        self._figures.append(f"{name}.png")

    def finish(self) -> int:
        """Print the checks and where the figures are; return the exit status."""
        if not (self._checks and self._figures):
            raise RuntimeError("A page has at least one check and one figure.")
        print("\nChecks", *self._checks, sep="\n")
        failed = sum(not check.passed for check in self._checks)
        total = len(self._checks)
        verdict = f"{failed} of {total} checks FAILED" if failed else "all passed"
        names = ", ".join(self._figures)
        print(f"\nFigures: {names} in {self.args.output}. Checks: {verdict}.")
        return int(failed > 0)


def number(kind: type, low: float, high: float) -> Callable[[str], Any]:
    """Return a converter of arguments that are numbers within bounds."""

    def convert(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not low <= value <= high:
            raise argparse.ArgumentTypeError(
                f"{text!r} is not {'an integer' if kind is int else 'a number'} "
                f"from {low} to {high}"
            )
        return value

    return convert


def make_parser(name: str, story: str) -> argparse.ArgumentParser:
    """Return a parser of the options that all pages have."""
    parser = argparse.ArgumentParser(
        prog=f"python -m curvlinops.examples.{name}",
        description=story,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    output = Path(f"{name}_output")
    parser.add_argument(
        "--output",
        type=Path,
        default=output,
        metavar="DIR",
        help=f"folder for the figures, created if need be (default: {output})",
    )
    parser.add_argument(
        "--seed",
        type=number(int, 0, 2**32 - 1),
        default=0,
        help="of all randomness (default: 0)",
    )
    parser.add_argument("--quick", action="store_true", help="a small size, in seconds")
    return parser


def parse(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None
) -> argparse.Namespace:
    """Return the arguments, checked; exits with status 2 if one is wrong."""
    args = parser.parse_args(argv)
    if missing := [name for key, name in PACKAGES.items() if find_spec(key) is None]:
        parser.error(
            f"this example needs {' and '.join(missing)}. Run `pip install "
            f"{' '.join(missing)}` (the extra `examples` of curvlinops-scipy)."
        )
    try:
        args.output.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=args.output):
            pass
    except OSError as error:
        parser.error(f"--output {args.output} cannot be written to: {error.strerror}")
    return args


def command(
    body: Callable[[Page], None],
    options: Callable[[argparse.ArgumentParser], None] = lambda parser: None,
) -> Callable[..., int]:
    """Turn a function of a :class:`Page` into one of command line arguments.

    Parameters
    ----------
    body
        What the page does. Its module's docstring is the text of ``--help``.
    options
        Adds options of the page's own to the parser.

    Returns
    -------
    Callable
        Of a list of arguments (default: those of the process), to the exit status.
        Torch works in one thread meanwhile: more are slower at the size of the pages,
        and round differently.
    """

    @wraps(body)
    def main(argv: Sequence[str] | None = None) -> int:
        path = Path(inspect.getfile(body))
        story = inspect.getdoc(sys.modules[body.__module__]) or ""
        parser = make_parser(path.stem, story)
        options(parser)
        page = Page(parse(parser, argv))
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(page.seed)
                body(page)
        except Stop as reason:
            print(reason, file=sys.stderr)
            return 1
        finally:
            torch.set_num_threads(threads)
        return page.finish()

    return main
