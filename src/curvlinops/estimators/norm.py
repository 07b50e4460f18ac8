"""Norms and what follows from them: Frobenius, spectral, condition, stable rank."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from curvlinops._random import Probes
from curvlinops.estimators._base import Operand
from curvlinops.estimators._run import Options, Run, require_num_matvecs
from curvlinops.estimators._sketch import coldot, double
from curvlinops.estimators.eigenpairs import SciPyView, solve_eigenpairs

if TYPE_CHECKING:
    from typing_extensions import Unpack


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
        Products :math:`m`, below ``N``; with ``until`` the limit.
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
        m = require_num_matvecs(run, num_matvecs)

        def integrand(V: Tensor) -> Tensor:
            Y = double(run.multiply(V, record=False))
            return coldot(Y, Y).real

        return run.mean(integrand, m)


def is_hermitian(A: Any) -> bool:
    r"""Whether :math:`u^{\mathrm{H}} A v` and :math:`v^{\mathrm{H}} A u` are conjugate.

    Costs two products, with fixed pseudo-random vectors. A matrix that is not Hermitian
    passes only by a coincidence of probability zero, up to rounding.
    """
    operand = Operand(A)
    M, N = operand.shape
    if M != N:
        return False
    U = Probes(N, "normal", 0, operand.dtype, operand.device).block(0, 2)
    AU = operand.multiply(U)
    forms = double(U.mH @ AU)
    scale = torch.linalg.vector_norm(AU) * torch.linalg.vector_norm(U)
    tolerance = 10 * torch.finfo(AU.dtype).eps * float(scale)
    return bool((forms[0, 1] - forms[1, 0].conj()).abs() <= tolerance)


def _extremes(
    A: Any, task: str, which: str, gram: bool, tol: float, options: Options
) -> tuple[np.ndarray, Run]:
    """Return the extreme eigenvalues of a matrix, or of its Gram matrix."""
    settings: dict[str, Any] = {"which": which, "tol": tol, "gram": gram}
    with Run(A, task, options, "normal", **settings) as run:
        k = 2 if which == "BE" and run.dim > 1 else 1
        values, _ = solve_eigenpairs(run, k, which, view=SciPyView(run), tol=tol)
        if len(values) < k:
            raise RuntimeError(
                f"{task} did not converge to tol={tol:.1e} in "
                f"{run.operand.num_products} products. Allow a larger tol."
            )
        return values, run


def _exact(run: Run, value: float, tol: float) -> Any:
    """Return a number that is not random, with the solver's tolerance as its error."""
    run.until = None
    zero = torch.zeros((), dtype=torch.float64)
    return run.result(zero + value, zero, 1, truncation_error=tol * value)


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
        If the solver does not converge.

    Notes
    -----
    By :func:`scipy.sparse.linalg.eigsh`: on ``A`` if it is Hermitian (found out by two
    products), else on the smaller Gram matrix, at two products a step.

    Examples
    --------
    >>> import numpy as np
    >>> A = np.random.default_rng(0).standard_normal((80, 50))
    >>> bool(np.isclose(spectral_norm(A, rng=0), np.linalg.norm(A, 2)))
    True
    """
    gram = not is_hermitian(A)
    values, run = _extremes(A, "spectral_norm", "LM", gram, tol, options)
    value = float(np.abs(values).max())
    return _exact(run, value**0.5 if gram else value, tol)


def condition_number(A: Any, *, tol: float = 1e-4, **options: Unpack[Options]) -> Any:
    r"""Compute the ratio of extreme singular values, :math:`\sigma_1 / \sigma_N`.

    Parameters
    ----------
    A : LinearOperator, array, sparse matrix, or Tensor
        Matrix of shape ``(M, N)``.
    tol : float, optional
        Accuracy asked of the solver for either end, relative to that end.
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
        If the solver does not converge. The smallest eigenvalue of a badly conditioned
        matrix takes many products.

    Notes
    -----
    From both ends of the spectrum of a definite matrix, which resolves numbers up to
    the inverse of rounding error; for other matrices from the smaller Gram matrix,
    which resolves only the square root of that (1e8 in float64, 3e3 in float32).

    Examples
    --------
    >>> import numpy as np
    >>> A = np.diag(np.linspace(1.0, 5.0, 50))
    >>> bool(np.isclose(condition_number(A, rng=0), 5.0))
    True
    """
    task = "condition_number"
    gram = not is_hermitian(A)
    values, run = _extremes(A, task, "BE", gram, tol, options)
    if not gram and values[0] * values[-1] <= 0:
        gram = True
        options = {**options, "checkpoint": None}
        values, run = _extremes(A, task, "BE", gram, tol, options)
    low, high = np.sort(np.abs(values))[[0, -1]]
    rounding = torch.finfo(run.operand.dtype).eps * run.dim**0.5
    ratio = high / low if low > rounding * high else np.inf
    return _exact(run, float(ratio**0.5 if gram else ratio), tol)


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
        Products for the Frobenius norm, below ``N``; with ``until`` the limit. The
        spectral norm takes its own.
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
    seed = options.get("rng") if isinstance(options.get("rng"), int) else 0
    norm = spectral_norm(A, tol=tol, rng=seed, return_estimate=True)
    square = float(norm) ** 2
    full: Options = {**options, "return_estimate": True}
    estimate = hutchinson_squared_fro(A, num_matvecs, distribution, **full)
    result = replace(
        estimate,
        value=estimate.value / square,
        standard_error=estimate.standard_error / square,
        num_products=estimate.num_products + norm.num_products,
        truncation_error=2 * tol * float(estimate.value) / square,
    )
    return result if options.get("return_estimate") else result.value
