"""Spectral quantities through training: one row per step of one tidy table."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from io import StringIO
from typing import Any, TypeAlias

import numpy as np
import torch
from tqdm import tqdm

from curvlinops._files import ArrayFile, replacing
from curvlinops._operand import to_numpy
from curvlinops._random import Rng, as_seed
from curvlinops.estimators._base import Estimate
from curvlinops.estimators.eigenpairs import Eigenpairs, top_eigenpairs
from curvlinops.estimators.norm import hutchinson_squared_fro
from curvlinops.estimators.trace import hutchinson_trace, hutchpp_trace

#: Quantities that have a name: functions of a matrix, a number of products, a seed.
QUANTITIES: dict[str, Callable[..., Any]] = {
    "trace": hutchpp_trace,
    "hutchinson_trace": hutchinson_trace,
    "squared_fro": hutchinson_squared_fro,
}
EIGENVALUES = "eigenvalues"
FILE = ArrayFile("track", "curvlinops-track", 2)
Quantities: TypeAlias = "str | Iterable[str] | Mapping[str, Callable[[Any], Any]]"


@dataclass(frozen=True, eq=False)
class Track:
    r"""A table with one row per step; ``track["trace"]`` is a column.

    Attributes
    ----------
    columns : dict
        NumPy arrays of one length by name. ``"trace_error"`` is the error of
        ``"trace"``, ``"eigenvalue_0"`` the leading eigenvalue, ``"residual_0"`` the
        norm of its residual, ``"overlap"`` that of the leading subspace with the step
        before: :math:`\|U_t^{\mathrm{H}} U_{t-1}\|_F^2 / k`, from 0 to 1. Numbers are
        real but where an imaginary part exceeds rounding, as in traces of complex
        matrices that are not Hermitian.
    eigenpairs : Eigenpairs or None
        Those of the last step, to go on with.
    """

    columns: dict[str, np.ndarray]
    eigenpairs: Eigenpairs | None = None

    def __getitem__(self, name: str) -> np.ndarray:
        """Return a column."""
        return self.columns[name]

    def __len__(self) -> int:
        """Return the number of steps."""
        return len(self.columns["step"])

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Write the table as comma-separated values with a header.

        Parameters
        ----------
        path : str or path-like
            File to write. It replaces an earlier one once it is complete.

        Raises
        ------
        ValueError
            If something that is no regular file is there.
        OSError
            If it cannot be written. What was there before is as it was.
        """
        text = StringIO(newline="")
        writer = csv.writer(text)
        writer.writerow(self.columns)
        columns = (column.tolist() for column in self.columns.values())
        writer.writerows(zip(*columns, strict=True))
        with replacing(path) as file:
            file.write(text.getvalue().encode())

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the columns to an npz file.

        Parameters
        ----------
        path : str or path-like
            File to write. It replaces an earlier one once it is complete.

        Raises
        ------
        TypeError
            If a column has something else in it than numbers or text.
        ValueError
            If something that is no regular file is there.
        OSError
            If it cannot be written. What was there before is as it was.
        """
        FILE.write(path, {}, self.columns)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Track:
        """Read what :meth:`save` wrote.

        Parameters
        ----------
        path : str or path-like
            The file.

        Raises
        ------
        ValueError
            If it is another file, of another version, cut off, or damaged; the message
            says which.
        OSError
            If there is no such file, or it cannot be read.
        """
        return cls(FILE.read(path)[1])


def track(
    operators_or_checkpoints: Iterable[Any],
    quantities: Quantities = EIGENVALUES,
    *,
    build: Callable[[Any], Any] | None = None,
    k: int = 5,
    which: str = "LA",
    num_matvecs: int = 60,
    steps: Iterable[Any] | None = None,
    start: Eigenpairs | None = None,
    rng: Rng = None,
    progressbar: bool = False,
) -> Track:
    r"""Follow spectral quantities over a sequence of matrices, as in training.

    Parameters
    ----------
    operators_or_checkpoints : iterable
        Matrices; or with ``build`` anything else, e.g. state dictionaries, or paths of
        files that :func:`torch.load` reads. One is looked at at a time.
    quantities : str, iterable of str, or mapping, optional
        Names: ``"eigenvalues"``, ``"trace"`` (Hutch++), ``"hutchinson_trace"``,
        ``"squared_fro"``. Or a mapping from names to functions of the matrix that
        return a number or an Estimate; the key ``"eigenvalues"`` may have the value
        ``None``.
    build : callable, optional
        From a checkpoint to the matrix.
    k, which : int, str, optional
        Number (all, of smaller matrices) and end of the eigenvalues, see
        :func:`top_eigenpairs`.
    num_matvecs : int, optional
        Products for each quantity given by name, see its function; matrices with no
        more columns are evaluated exactly.
    steps : iterable, optional
        Numbers that name the rows; default 0, 1, 2, ...
    start : Eigenpairs, optional
        Where the eigensolver starts in the first step.
    rng : int, numpy.random.Generator, torch.Generator, or None, optional
        Source of randomness; all steps share their random vectors, so that differences
        between steps are not those of the sample.
    progressbar : bool, optional
        Show steps and time left on stderr.

    Returns
    -------
    Track
        The table.

    Raises
    ------
    ValueError
        If a quantity is unknown, an item is no matrix and ``build`` is not given, there
        are no items, or more than ``steps``.

    Notes
    -----
    Eigenvectors of one step are the warm start of the next.

    Examples
    --------
    >>> import numpy as np
    >>> D = np.diag(np.arange(100.0))
    >>> table = track([D, 2 * D], ["eigenvalues", "trace"], k=2, rng=0)
    >>> bool(np.allclose(table["eigenvalue_0"], [99, 198]))
    True
    >>> bool(np.allclose(table["overlap"][1:], 1.0))  # the eigenvectors stayed
    True
    """
    follower = Follower(quantities, k, which, num_matvecs, rng, start)
    names = iter(steps) if steps is not None else None
    items = tqdm(operators_or_checkpoints, "track", disable=not progressbar)
    for index, item in enumerate(items):
        A = _matrix(item, build)
        step = index if names is None else next(names, None)
        if step is None:
            raise ValueError(f"steps names {index} rows, and there are more matrices.")
        follower.measure(A, step)
    if not follower.rows:
        raise ValueError("operators_or_checkpoints is empty: nothing to track.")
    return follower.track


class Follower:
    """A table that grows by one row per matrix; arguments are those of :func:`track`.

    Attributes
    ----------
    rows : list of dict
        What was found, by column.
    """

    def __init__(
        self,
        quantities: Quantities,
        k: int,
        which: str,
        num_matvecs: int,
        rng: Rng,
        start: Eigenpairs | None = None,
    ) -> None:
        self._seed, self._k, self._which = as_seed(rng), k, which
        self._functions = _functions(quantities, num_matvecs, self._seed)
        self._pairs = start
        self.rows: list[dict[str, Any]] = []

    def measure(self, A: Any, step: Any, **known: float) -> None:
        """Append a row: its name, what is known of it, and what the matrix says."""
        row = {"step": step, **known}
        for name, function in self._functions.items():
            if name == EIGENVALUES:
                before, count = self._pairs, min(self._k, A.shape[0])
                pairs = top_eigenpairs(
                    A, count, self._which, start=before, rng=self._seed
                )
                row |= _eigenvalue_columns(pairs, before, count)
                self._pairs = pairs
            elif function is not None:
                row |= _columns(name, function(A))
        self.rows.append(row)

    @property
    def track(self) -> Track:
        """The table up to now; what a row does not know is NaN."""
        names = dict.fromkeys(name for row in self.rows for name in row)
        columns = {
            name: np.array([row.get(name, np.nan) for row in self.rows])
            for name in names
        }
        return Track(columns, self._pairs)


def _functions(
    quantities: Quantities, num_matvecs: int, seed: int
) -> dict[str, Callable[[Any], Any] | None]:
    """Return the functions behind the quantities; ``None`` for the eigenvalues."""
    if isinstance(quantities, Mapping):
        return dict(quantities)
    options = {"num_matvecs": num_matvecs, "rng": seed, "return_estimate": True}
    functions: dict[str, Callable[[Any], Any] | None] = {EIGENVALUES: None}
    functions |= {name: partial(f, **options) for name, f in QUANTITIES.items()}
    names = [quantities] if isinstance(quantities, str) else list(quantities)
    if unknown := [name for name in names if name not in functions]:
        raise ValueError(
            f"A quantity is one of {', '.join(functions)}, or a mapping from a name to "
            f"a function; got {unknown[0]!r}."
        )
    return {name: functions[name] for name in names}


def _matrix(item: Any, build: Callable[[Any], Any] | None) -> Any:
    if build is not None:
        is_path = isinstance(item, (str, os.PathLike))
        return build(torch.load(item, map_location="cpu") if is_path else item)
    if not hasattr(item, "shape"):
        raise ValueError(
            f"{type(item).__name__} is no matrix. Say with `build` how to make one of "
            "it, e.g. `build=lambda state: HessianLinearOperator(...)`."
        )
    return item


def _columns(name: str, result: Any) -> dict[str, complex]:
    if isinstance(result, Estimate):
        return _columns(name, result.value) | {f"{name}_error": float(result.error)}
    value = to_numpy(result)
    number = complex(value.item())
    rounding = 1e3 * np.finfo(np.result_type(value, np.float32)).eps * abs(number)
    return {name: number.real if abs(number.imag) <= rounding else number}


def _eigenvalue_columns(
    pairs: Eigenpairs, before: Eigenpairs | None, k: int
) -> dict[str, float]:
    columns: dict[str, float] = {}
    named = {"eigenvalue": pairs.values, "residual": pairs.residual_norms}
    for name, found in named.items():
        columns |= {f"{name}_{i}": np.nan for i in range(k)}  # if not converged
        columns |= {f"{name}_{i}": float(x) for i, x in enumerate(to_numpy(found))}
    columns["overlap"] = np.nan
    if before is not None:
        cosines = to_numpy(pairs.vectors).conj().T @ to_numpy(before.vectors)
        columns["overlap"] = min(float(np.linalg.norm(cosines) ** 2 / k), 1.0)
    return columns
