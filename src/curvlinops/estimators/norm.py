"""Norms and what follows from them: Frobenius, spectral, condition, stable rank."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Unpack

import numpy as np
import torch
from scipy.linalg import eigh_tridiagonal

from curvlinops._operand import Operand
from curvlinops.estimators._base import require_tolerance
from curvlinops.estimators._run import Options, Run
from curvlinops.estimators._sketch import coldot, double
from curvlinops.estimators.lanczos import (
    Multiply,
    below,
    block_size,
    hermitian_or_not,
    lanczos,
)

#: An eigenvalue counts as zero below so many times ``eps sqrt(N)``, relative to the
#: largest. Of singular matrices, up to 1.6 were observed.
ROUNDING = 8


def hutchinson_squared_fro(
    A: Any,
    num_matvecs: int,
    distribution: str = "rademacher",
    **options: Unpack[Options],
) -> Any:
    r"""Estimate the squared Frobenius norm by the norms of products.

    .. math::
        \|A\|_F^2 = \mathbb{E}[\|A v\|^2] \approx \frac{1}{m} \sum_{i=1}^{m} \|A v_i\|^2

    Parameters
    ----------
    A : LinearOperator, array, sparse matrix, or Tensor
        Matrix of shape ``(M, N)``.
    num_matvecs : int
        Products :math:`m`; with ``until`` the limit. As many as ``N`` give the exact
        value, with error 0.
    distribution : str, optional
        ``"rademacher"`` (entries ±1), ``"normal"``, or ``"sphere"``.
    **options : Options
        See :class:`~curvlinops.estimators.Options`.

    Returns
    -------
    Tensor, numpy scalar, or Estimate
        The unbiased estimate, in the squared unit of ``A``.

    Raises
    ------
    ValueError
        If an argument breaks its rule, or a product is not finite.

    Notes
    -----
    Hutchinson's estimate of the trace of :math:`A^{\mathrm{H}} A`, at one product per
    sample and without the adjoint.

    Examples
    --------
    >>> import numpy as np
    >>> A = np.diag(np.arange(1.0, 11.0))  # exact: columns are orthogonal
    >>> bool(np.isclose(hutchinson_squared_fro(A, 3, rng=0), np.linalg.norm(A) ** 2))
    True
    """
    task = "hutchinson_squared_fro"
    with Run(A, task, options, distribution, num_matvecs, square=False) as run:
        return run.mean(lambda V, Y: coldot(double(Y), double(Y)).real, num_matvecs)


def tall(A: Any) -> Any:
    """Return the matrix, or its adjoint if that has fewer columns."""
    operand = Operand(A)
    return A if operand.shape[0] >= operand.dim else operand.adjoint()


def _singular_ends(
    A: Any, tol: float, task: str, options: Options, ratio: bool
) -> tuple[Run, float, float]:
    """Return the run, the largest singular value, and with ``ratio`` the least.

    By one Lanczos run: until residuals, and changes since the last look, are small
    relative to the values, or to rounding errors. The least of an indefinite matrix is
    inside the spectrum, known with the last product.
    """
    require_tolerance("tol", tol)
    ends, converged = np.zeros(2), False

    def attempt(multiply: Multiply, zeros: int) -> bool:
        limit = 2 * run.dim if zeros else run.dim

        def stop(alpha: np.ndarray, beta: np.ndarray) -> bool:
            nonlocal ends, converged
            m, rest = alpha.shape[1], beta[0, -1]
            over = rest == 0 or m == limit
            # Odd steps of the augmented matrix have a node at zero of their own.
            if not over and (m % 2 or int((m // 2) ** 0.5) ** 2 != m // 2):
                return False
            values, S = eigh_tridiagonal(alpha[0], beta[0, :-1])
            sizes, residuals = np.abs(values), rest * np.abs(S[-1])
            wanted = [sizes.argmax(), sizes.argmin()]
            before, ends = ends, sizes[wanted]
            if not over and ratio and not zeros and values[0] < 0 < values[-1]:
                return False
            allowed = np.maximum(tol * ends, 10 * run.operand.eps * ends[0])
            # A small residual alone may be that of a neighbour with more weight.
            errors = np.maximum(residuals[wanted], np.abs(ends - before))
            converged = over or bool((errors <= allowed)[: 1 + ratio].all())
            return converged

        start, steps = below(zeros, run.probes.block(0, 1)), block_size(run, 1, zeros)
        steps, eps = min(limit, steps), run.operand.eps
        lanczos(multiply, start, steps, True, stop, eps=eps)
        return converged  # looking once more would find the ends standing still

    with Run(tall(A), task, options, "normal", square=False, tol=tol) as run:
        if not hermitian_or_not(run, attempt):
            raise RuntimeError(
                f"{task} did not converge to tol={tol:.1e} in "
                f"{run.operand.num_products} products, whose vectors fill 2 GiB. Add "
                "damping, or allow a larger tol."
            )
    return run, float(ends[0]), float(ends[1])


def _exact(run: Run, value: float, tol: float) -> Any:
    """Return a number that is not random, with the solver's tolerance as its error."""
    error = tol * value if np.isfinite(value) else 0.0
    return run.exact(torch.tensor(value, dtype=torch.float64), error)


def spectral_norm(A: Any, *, tol: float = 1e-4, **options: Unpack[Options]) -> Any:
    r"""Compute the largest singular value, :math:`\|A\|_2 = \max_v \|Av\| / \|v\|`.

    Parameters
    ----------
    A : LinearOperator, array, sparse matrix, or Tensor
        Matrix of shape ``(M, N)``.
    tol : float, optional
        Relative accuracy asked of the solver.
    **options : Options
        See :class:`~curvlinops.estimators.Options`; ``rng`` draws the start vector,
        ``until`` has no effect.

    Returns
    -------
    Tensor, numpy scalar, or Estimate
        The norm, in the unit of ``A``.

    Raises
    ------
    RuntimeError
        If it did not converge in as many steps as fit into 2 GiB.

    Notes
    -----
    By one Lanczos run if ``A`` turns out to be Hermitian, else by Golub-Kahan
    bidiagonalisation, at two products a step.

    Examples
    --------
    >>> import numpy as np
    >>> A = np.random.default_rng(0).standard_normal((80, 50))
    >>> bool(np.isclose(spectral_norm(A, rng=0), np.linalg.norm(A, 2)))
    True
    """
    run, largest, _ = _singular_ends(A, tol, "spectral_norm", options, ratio=False)
    return _exact(run, largest, tol)


def condition_number(A: Any, *, tol: float = 1e-4, **options: Unpack[Options]) -> Any:
    r"""Compute the ratio of extreme singular values, :math:`\sigma_1 / \sigma_N`.

    Parameters
    ----------
    A : LinearOperator, array, sparse matrix, or Tensor
        Matrix of shape ``(M, N)``.
    tol : float, optional
        Relative accuracy wanted.
    **options : Options
        See :class:`~curvlinops.estimators.Options`; ``rng`` draws the start vector,
        ``until`` has no effect.

    Returns
    -------
    Tensor, numpy scalar, or Estimate
        The condition number, without unit. Infinity if the smallest singular value
        cannot be told from zero.

    Raises
    ------
    RuntimeError
        If the ends did not converge in as many steps as fit into 2 GiB.

    Notes
    -----
    Resolves numbers up to the inverse of rounding error. A definite matrix takes one
    Lanczos run until both ends of its spectrum are found, an indefinite one, whose
    least eigenvalue in magnitude is inside, ``N`` products. Matrices that are not
    Hermitian are bidiagonalised (Golub, Kahan), at two products a step and at most
    ``min(M, N)`` steps. As many vectors are kept.

    Examples
    --------
    >>> import numpy as np
    >>> A = np.diag(np.linspace(1.0, 5.0, 50))
    >>> bool(np.isclose(condition_number(A, rng=0), 5.0))
    True
    """
    run, largest, least = _singular_ends(A, tol, "condition_number", options, True)
    rounding = ROUNDING * run.operand.eps * run.dim**0.5
    return _exact(run, largest / least if least > rounding * largest else np.inf, tol)


def stable_rank(
    A: Any,
    num_matvecs: int,
    distribution: str = "rademacher",
    *,
    tol: float = 1e-4,
    **options: Unpack[Options],
) -> Any:
    r"""Estimate the stable rank :math:`\|A\|_F^2 / \|A\|_2^2`, at most the rank.

    Parameters
    ----------
    A : LinearOperator, array, sparse matrix, or Tensor
        Matrix of shape ``(M, N)``.
    num_matvecs : int
        Products for the Frobenius norm; with ``until`` the limit. As many as ``N`` give
        its exact value. The spectral norm takes its own.
    distribution : str, optional
        ``"rademacher"`` (entries ±1), ``"normal"``, or ``"sphere"``.
    tol : float, optional
        Relative accuracy of the spectral norm.
    **options : Options
        See :class:`~curvlinops.estimators.Options`; a checkpoint is kept for the
        Frobenius norm.

    Returns
    -------
    Tensor, numpy scalar, or Estimate
        The estimate, without unit.

    Examples
    --------
    >>> import numpy as np
    >>> A = np.diag(np.r_[np.ones(10), np.zeros(90)])
    >>> bool(np.isclose(stable_rank(A, 50, rng=0), 10.0))
    True
    """
    require_tolerance("tol", tol)
    full: Options = {**options, "return_estimate": True}
    estimate = hutchinson_squared_fro(A, num_matvecs, distribution, **full)
    bar = options.get("progressbar", False)
    rng = options.get("rng") if estimate.seed is None else estimate.seed
    norm = spectral_norm(A, tol=tol, rng=rng, progressbar=bar, return_estimate=True)
    square = float(norm) ** 2
    if not square:
        raise ValueError("The zero matrix has no stable rank.")
    result = replace(
        estimate,
        value=estimate.value / square,
        standard_error=estimate.standard_error / square,
        num_products=estimate.num_products + norm.num_products,
        krylov_error=2 * tol * float(estimate.value) / square,
    )
    return result if options.get("return_estimate") else result.value
