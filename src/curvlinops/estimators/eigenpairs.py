"""Leading eigenpairs: SciPy's solvers, with residuals, resumption and warm starts."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from inspect import signature
from typing import Any

import numpy as np
import torch
from numpy.typing import DTypeLike
from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh, lobpcg
from torch import Tensor

from curvlinops._random import Rng
from curvlinops.estimators._base import (
    ArrayResult,
    require_choice,
    require_positive_int,
    require_tolerance,
    to_numpy,
)
from curvlinops.estimators._run import Options, Run

#: How eigenvalues are ordered, the wanted ones first.
_ORDER: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "LA": lambda values: -values,
    "LM": lambda values: -np.abs(values),
    "SA": lambda values: values,
    "SM": np.abs,
    "BE": lambda values: values,
}


@dataclass(frozen=True, eq=False)
class Eigenpairs(ArrayResult):
    """Eigenvalues and eigenvectors, the wanted ones first; unpacks into the two.

    Attributes
    ----------
    values : Tensor or numpy.ndarray
        Of shape ``(k,)``; fewer if the solver did not converge.
    vectors : Tensor or numpy.ndarray
        Orthonormal columns, of shape ``(N, k)``.
    residual_norms : Tensor or numpy.ndarray
        ``|A v - lambda v|`` of every pair: an eigenvalue of a Hermitian matrix is at
        most this far from ``lambda``.
    num_products : int
        Products with the matrix that were spent.
    converged : bool
        Whether all ``k`` pairs were found.
    """

    values: Any
    vectors: Any
    residual_norms: Any
    num_products: int
    converged: bool = True

    def __iter__(self) -> Iterator[Any]:
        """Yield values and vectors, like :func:`scipy.sparse.linalg.eigsh`."""
        return iter((self.values, self.vectors))

    def numpy(self) -> np.ndarray:
        """Return :attr:`values` as NumPy array."""
        return to_numpy(self.values)


class SciPyView(LinearOperator):
    """The products of a :class:`Run` for SciPy's solvers, in a dtype of choice.

    Of the matrix minus ``shift`` times the identity, and without the part along the
    orthonormal columns of ``deflated``.
    """

    def __init__(
        self,
        run: Run,
        dtype: DTypeLike | None = None,
        deflated: Tensor | None = None,
        shift: float = 0.0,
    ) -> None:
        self._run, self._deflated, self._shift = run, deflated, shift
        own = to_numpy(torch.empty(0, dtype=run.operand.dtype)).dtype
        super().__init__(np.dtype(own if dtype is None else dtype), run.operand.shape)

    def _matvec(self, x: np.ndarray) -> np.ndarray:
        operand = self._run.operand
        block = torch.as_tensor(np.ascontiguousarray(x).reshape(len(x), -1))
        V = block.to(operand.device, operand.dtype)
        product = project_out(self._run.multiply(V), self._deflated)
        result = to_numpy(product - self._shift * V if self._shift else product)
        return result.astype(self.dtype, copy=False).reshape(x.shape)

    _matmat = _matvec


def project_out(V: Tensor, basis: Tensor | None) -> Tensor:
    """Return the part of the columns orthogonal to an orthonormal basis, if any."""
    return V if basis is None else V - basis @ (basis.mH @ V)


def extreme_eigenvalues(
    run: Run, tol: float, deflated: Tensor | None = None
) -> tuple[float, float]:
    """Return the smallest and the largest eigenvalue.

    The first is the one of largest magnitude, the second the one farthest from it.
    Asked for as "smallest", an eigenvalue near zero would have to be accurate relative
    to itself.

    Parameters
    ----------
    run : Run
        Whose products are used.
    tol : float
        Accuracy, relative to the first's magnitude and to the distance of both.
    deflated : Tensor, optional
        Orthonormal columns whose eigenvalues do not count.

    Raises
    ------
    RuntimeError
        If the solver does not converge.
    """
    ends = [0.0]
    for _ in range(2):
        view = SciPyView(run, deflated=deflated, shift=ends[-1])
        values, _ = solve_eigenpairs(run, 1, "LM", view=view, tol=tol)
        if not len(values):
            raise RuntimeError(
                f"An end of the spectrum was not found to {tol:.1e} in "
                f"{run.operand.num_products} products. Allow a larger tolerance."
            )
        ends.append(ends[-1] + float(values[0]))
    return min(ends[1:]), max(ends[1:])


def solve_eigenpairs(
    run: Run,
    k: int,
    which: str,
    *,
    view: SciPyView,
    tol: float,
    ncv: int | None = None,
    maxiter: int | None = None,
    start: np.ndarray | None = None,
    method: str = "arpack",
) -> tuple[np.ndarray, np.ndarray]:
    """Return as many of the ``k`` wanted eigenpairs as the solver finds, in order."""
    N = run.dim
    guess = to_numpy(run.probes.block(0, k)).astype(view.dtype)
    if max(2 * k, 20) >= N:  # no Krylov space is cheaper than the matrix itself
        run.expect(N)
        dense = view @ np.eye(N, dtype=view.dtype)
        values, vectors = np.linalg.eigh((dense + dense.conj().T) / 2)
    elif method == "lobpcg":
        if start is not None:
            guess[:, : start.shape[1]] = start[:, :k]
        # Its tolerance is absolute. A start vector tells the matrix's magnitude.
        first = guess[:, :1] / np.linalg.norm(guess[:, 0])
        tol *= float(np.linalg.norm(view @ first))
        with warnings.catch_warnings():  # it warns, and returns what it has
            warnings.simplefilter("ignore", UserWarning)
            values, vectors = lobpcg(
                view, guess, tol=tol, maxiter=maxiter, largest=which == "LA"
            )
    else:
        run.expect(ncv or max(2 * k + 1, 20))  # SciPy's default
        v0 = guess[:, 0] / np.linalg.norm(guess[:, 0])
        if start is not None:
            v0 = start.sum(1) / np.sqrt(start.shape[1]) + 0.01 * v0
        # SciPy 1.17 restarts from random vectors; earlier ones from fixed ones.
        takes_rng = "rng" in signature(eigsh).parameters
        restart: dict[str, Any] = {"rng": run.seed} if takes_rng else {}
        try:
            values, vectors = eigsh(
                view,
                k,
                which=which,
                v0=v0,
                ncv=ncv,
                maxiter=maxiter,
                tol=tol,
                **restart,
            )
        except ArpackNoConvergence as error:
            values, vectors = error.eigenvalues, error.eigenvectors
    order = np.argsort(_ORDER[which](values))[:k]
    if which == "BE" and len(values) > k:
        ends = [*range(k // 2), *range(len(values) - (k - k // 2), len(values))]
        order = np.argsort(values)[ends]
    return values[order], vectors[:, order]


def top_eigenpairs(
    A: Any,
    k: int = 6,
    which: str = "LA",
    *,
    start: Any = None,
    tol: float | None = None,
    ncv: int | None = None,
    maxiter: int | None = None,
    dtype: DTypeLike | None = None,
    method: str = "auto",
    rng: Rng = None,
    checkpoint: str | os.PathLike[str] | None = None,
    progressbar: bool = False,
) -> Eigenpairs:
    r"""Compute leading eigenpairs of a Hermitian matrix, :math:`A v = \lambda v`.

    Parameters
    ----------
    A : LinearOperator, array, sparse matrix, or Tensor
        Hermitian matrix of shape ``(N, N)``.
    k : int, optional
        Number of pairs, at most ``N``.
    which : str, optional
        ``"LA"`` (largest), ``"SA"`` (smallest), ``"LM"`` (largest in magnitude),
        ``"SM"`` (smallest in magnitude; slow), or ``"BE"`` (half from either end).
    start : Eigenpairs, array, or Tensor, optional
        Vectors near the wanted ones, as columns, e.g. of the step before in training.
    tol : float, optional
        Relative accuracy of the eigenvalues; default: two thirds of the digits of the
        matrix's dtype.
    ncv, maxiter : int, optional
        As in :func:`scipy.sparse.linalg.eigsh`.
    dtype : numpy dtype, optional
        Of the Krylov vectors, e.g. ``numpy.float64`` over a float32 model (at twice the
        memory). Default: the matrix's own.
    method : str, optional
        ``"arpack"``; ``"lobpcg"``, a block method for ``"LA"`` and ``"SA"``; or
        ``"auto"``: which of the two was measured to take fewer products, see Notes.
    rng : int, numpy.random.Generator, torch.Generator, or None, optional
        Source of the first vector.
    checkpoint : str or path-like, optional
        File that keeps the products; see :class:`~curvlinops.estimators.Options`.
    progressbar : bool, optional
        Count products on stderr.

    Returns
    -------
    Eigenpairs
        Values, vectors, and the residual norm of every pair.

    Raises
    ------
    ValueError
        If an argument breaks its rule, or a product is not finite.

    Warns
    -----
    UserWarning
        If fewer than ``k`` pairs converged, with their number; they are returned.

    Notes
    -----
    :func:`scipy.sparse.linalg.eigsh` does the work. Memory: ``ncv`` (default
    ``max(2 k + 1, 20)``) vectors. ``k`` more products give the residuals. ARPACK
    takes no fewer than its ``ncv``, whatever it starts from. LOBPCG uses a warm start
    fully: on three perturbed spectra (N = 1000, ``benchmarks/warm_starts.py``) 2 to 4
    pairs took 9 to 24 products against 23 to 39 at ``tol`` 1e-3, but 10 to 54 against
    23 to 52 at 1e-4; at 1e-6, or from random vectors, it does not always converge. So
    ``"auto"`` is LOBPCG for at most 4 pairs with as many start vectors and ``tol`` from
    1e-3, ARPACK otherwise.

    References
    ----------
    Lehoucq, Sorensen, Yang, "ARPACK users' guide", SIAM (1998). Knyazev, "Toward the
    optimal preconditioned eigensolver", SIAM J. Scientific Computing 23 (2001),
    doi:10.1137/S1064827500366124.

    Examples
    --------
    >>> import numpy as np
    >>> A = np.diag(np.arange(1.0, 101.0))
    >>> pairs = top_eigenpairs(A, 3, rng=0)
    >>> bool(np.allclose(pairs.values, [100, 99, 98]))
    True
    >>> bool(pairs.residual_norms.max() < 1e-6)
    True
    """
    require_choice("which", which, _ORDER)
    require_choice("method", method, ("auto", "arpack", "lobpcg"))
    if method == "lobpcg" and which not in ("LA", "SA"):
        raise ValueError(f"LOBPCG finds 'LA' or 'SA', got which={which!r}.")
    if tol is not None:
        require_tolerance("tol", tol)
    options: Options = {
        "rng": rng,
        "checkpoint": checkpoint,
        "progressbar": progressbar,
    }
    settings: dict[str, Any] = {
        "k": k,
        "which": which,
        "tol": tol,
        "ncv": ncv,
        "method": method,
    }
    settings |= {"maxiter": maxiter, "krylov": None if dtype is None else str(dtype)}
    with Run(A, "top_eigenpairs", options, "normal", None, **settings) as run:
        if require_positive_int("k", k) > run.dim:
            raise ValueError(f"k ({k}) must not be above the dimension ({run.dim}).")
        if tol is None:
            tol = torch.finfo(run.operand.dtype).eps ** (2 / 3)
        view = SciPyView(run, dtype)
        least = np.complex64 if run.operand.dtype.is_complex else np.float32
        if np.result_type(view.dtype, least) != view.dtype:
            raise ValueError(
                f"dtype is a floating-point type that holds vectors of "
                f"{run.operand.dtype}, got {view.dtype}."
            )
        guess = _start_vectors(start, run.dim)
        if method == "auto":
            warm = guess is not None and guess.shape[1] >= k
            block = warm and which in ("LA", "SA") and k <= 4 and tol >= 1e-3
            method = "lobpcg" if block else "arpack"
        values, vectors = solve_eigenpairs(
            run,
            k,
            which,
            view=view,
            tol=tol,
            ncv=ncv,
            maxiter=maxiter,
            start=guess,
            method=method,
        )
        residuals = view @ vectors - vectors * values
        if method == "lobpcg":
            scale = np.abs(values).max(initial=0.0)
            good = np.linalg.norm(residuals, axis=0) <= 10 * tol * scale
        else:
            good = np.ones(len(values), dtype=bool)
        if good.sum() < k:
            warnings.warn(
                f"{good.sum()} of {k} eigenpairs converged to tol={tol:.1e} in "
                f"{run.operand.num_products} products; returning {len(values)}. Allow "
                "more with `maxiter` or `ncv`, or accept less with `tol`.",
                stacklevel=2,
            )
        norms = np.linalg.norm(residuals, axis=0)
        result = run.operand.result
        return Eigenpairs(
            result(torch.as_tensor(values)),
            result(torch.as_tensor(vectors)),
            result(torch.as_tensor(norms)),
            run.operand.num_products,
            bool(good.sum() == k),
        )


def _start_vectors(start: Any, dim: int) -> np.ndarray | None:
    """Return the user's start vectors as matrix."""
    if start is None:
        return None
    vectors = to_numpy(start.vectors if isinstance(start, Eigenpairs) else start)
    vectors = vectors.reshape(len(vectors), -1)
    if len(vectors) != dim or not vectors.any():
        raise ValueError(
            f"start has {dim} rows and a nonzero entry, got shape {vectors.shape}."
        )
    return vectors
