"""Leading eigenpairs, with residuals, a certificate, resumption and warm starts."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import DTypeLike
from torch import Tensor

from curvlinops._operand import DTYPES, to_numpy
from curvlinops._random import Rng
from curvlinops.estimators._base import (
    ArrayResult,
    require_choice,
    require_positive_int,
    require_tolerance,
)
from curvlinops.estimators._run import Options, Run
from curvlinops.estimators.ritz import WHICH, eigenpairs


@dataclass(frozen=True, eq=False, repr=False)
class Eigenpairs(ArrayResult):
    """Eigenvalues and eigenvectors, the wanted ones first; unpacks into the two.

    Attributes
    ----------
    values : Tensor or numpy.ndarray
        Of shape ``(k,)``.
    vectors : Tensor or numpy.ndarray
        Orthonormal columns, of shape ``(N, k)``.
    residual_norms : Tensor or numpy.ndarray
        ``|A v - lambda v|`` of every pair: an eigenvalue of a Hermitian matrix is at
        most this far from ``lambda``.
    num_products : int
        Products with the matrix that were spent.
    converged : bool
        Whether all residuals are small enough, and no wanted eigenvalue was missed.
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

    def __repr__(self) -> str:
        """Return values and residuals, one pair a line, and whether they are sure."""
        residuals = to_numpy(self.residual_norms)
        lines = [
            f"{value:.10g} (residual {residual:.1e})"
            for value, residual in zip(self.numpy(), residuals, strict=True)
        ]
        state = "converged" if self.converged else "not converged"
        return "\n".join([*lines, f"{state}, {self.num_products} products"])


def top_eigenpairs(
    A: Any,
    k: int = 6,
    which: str = "LA",
    *,
    start: Any = None,
    tol: float | None = None,
    ncv: int | None = None,
    max_products: int | None = None,
    dtype: DTypeLike | None = None,
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
        ``"SM"`` (smallest in magnitude; slow), or ``"BE"`` (half from either end, one
        more from the upper if ``k`` is odd).
    start : Eigenpairs, array, or Tensor, optional
        Vectors near the wanted ones, as columns, e.g. of the step before in training.
        The search itself begins with a random one: see Notes.
    tol : float, optional
        Of the residual norms, relative to the norm of the matrix; default: two thirds
        of the digits of the matrix's dtype.
    ncv : int, optional
        Basis vectors at most, before the method restarts; default: as many as fit into
        2 GiB.
    max_products : int, optional
        Products at most; never more than ``N``.
    dtype : numpy dtype, optional
        Of the Krylov vectors, e.g. ``numpy.float64`` over a float32 model (at twice the
        memory). Default: the matrix's own.
    rng : int, numpy.random.Generator, torch.Generator, or None, optional
        Source of the random vectors.
    checkpoint : str, path-like, or Checkpoint, optional
        File that keeps the products, one vector for each; see
        :class:`~curvlinops.estimators.Options`.
    progressbar : bool, optional
        Count products on stderr.

    Returns
    -------
    Eigenpairs
        Values, vectors, and the residual norm of every pair.

    Raises
    ------
    ValueError
        If an argument breaks its rule, a product is not finite, or the matrix turns out
        not to be Hermitian.

    Warns
    -----
    UserWarning
        If not all pairs converged, with their number; all are returned.

    Notes
    -----
    One Lanczos run with full orthogonalisation, and residuals that need no products.
    Then about 20 products, after long runs 40, with a fresh random vector, orthogonal
    to all that is known, certify that no eigenvalue was missed, such as a second copy
    of a multiple one; if one was, the search goes on. A warm start that has a large
    part of the vectors found is a certificate at ``k`` products. With ``N`` products
    everything is exact, so that there are never more. Memory: a vector per product, 2
    GiB or ``ncv`` at most.

    References
    ----------
    Parlett, "The symmetric eigenvalue problem", SIAM (1998), chapter 13. Wu, Simon,
    "Thick-restart Lanczos method for large symmetric eigenvalue problems", SIAM J.
    Matrix Analysis and Applications 22 (2000), doi:10.1137/S0895479898334605.

    Examples
    --------
    >>> import numpy as np
    >>> A = np.diag(np.r_[np.arange(1.0, 99.0), 200.0, 200.0])
    >>> pairs = top_eigenpairs(A, 3, rng=0)
    >>> bool(np.allclose(pairs.values, [200, 200, 98]))
    True
    >>> bool(pairs.residual_norms.max() < 1e-6)
    True
    """
    require_choice("which", which, WHICH)
    if tol is not None:
        require_tolerance("tol", tol)
    for name, count in (("ncv", ncv), ("max_products", max_products)):
        if count is not None:
            require_positive_int(name, count)
    options: Options = {
        "rng": rng,
        "checkpoint": checkpoint,
        "progressbar": progressbar,
    }
    settings: dict[str, Any] = {"k": k, "which": which, "tol": tol, "ncv": ncv}
    settings |= {"max_products": max_products}
    settings |= {"krylov": None if dtype is None else str(dtype)}
    with Run(A, "top_eigenpairs", options, "normal", None, **settings) as run:
        operand = run.operand
        if require_positive_int("k", k) > run.dim:
            raise ValueError(f"k ({k}) must not be above the dimension ({run.dim}).")
        tol = operand.eps ** (2 / 3) if tol is None else tol
        krylov = _krylov_dtype(operand.dtype, dtype)
        found = eigenpairs(
            run,
            k,
            which,
            tol,
            start=_start_vectors(start, run.dim, krylov),
            ncv=ncv,
            max_products=max_products,
            dtype=krylov,
        )
        if not found.converged:
            good = int((found.residuals <= tol * found.norm).sum())
            warnings.warn(
                f"{good} of {k} eigenpairs have a residual of at most {tol:.1e} of the "
                f"matrix's norm after {operand.num_products} products"
                f"{', but one may have been missed' if good == k else ''}. Allow more "
                "with `max_products` or `ncv`, or accept less with `tol`.",
                stacklevel=2,
            )
        result = operand.result
        return Eigenpairs(
            result(torch.as_tensor(found.values)),
            result(found.vectors),
            result(torch.as_tensor(found.residuals)),
            operand.num_products,
            found.converged,
        )


def _krylov_dtype(own: torch.dtype, dtype: DTypeLike | None) -> torch.dtype:
    """Return the dtype of Krylov vectors, which must hold the matrix's."""
    if dtype is None:
        return own
    name = np.dtype(dtype).name
    wide = getattr(torch, name) if name in DTYPES else torch.bool
    if torch.promote_types(own, wide) != wide:
        raise ValueError(
            f"dtype is a floating-point type that holds vectors of {own}, got {dtype}."
        )
    return wide


def _start_vectors(start: Any, dim: int, dtype: torch.dtype) -> Tensor | None:
    """Return the user's start vectors as matrix, in the Krylov vectors' dtype."""
    if start is None:
        return None
    vectors = torch.as_tensor(start.vectors if isinstance(start, Eigenpairs) else start)
    if vectors.is_complex() and not dtype.is_complex:
        raise ValueError("start is complex and the matrix real: give its real part.")
    vectors = vectors.detach().reshape(len(vectors), -1).to(dtype)
    norms = torch.linalg.vector_norm(vectors, dim=0)
    if len(vectors) != dim or not (norms > 0).all() or not torch.isfinite(norms).all():
        raise ValueError(
            f"start has {dim} rows and columns that are finite and not zero, got shape "
            f"{tuple(vectors.shape)}."
        )
    return vectors
