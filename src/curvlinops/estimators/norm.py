"""Norms and what follows from them: Frobenius, spectral, condition, stable rank."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from scipy.linalg import eigh_tridiagonal
from torch import Tensor

from curvlinops._random import Probes
from curvlinops.estimators._base import Operand, require_tolerance
from curvlinops.estimators._run import Options, Run, require_num_matvecs
from curvlinops.estimators._sketch import coldot, double
from curvlinops.estimators.eigenpairs import SciPyView, solve_eigenpairs
from curvlinops.estimators.lanczos import BASIS_BYTES, lanczos

if TYPE_CHECKING:
    from typing_extensions import Unpack

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


def find_hermitian(A: Any) -> tuple[bool, int]:
    r"""Whether :math:`u^{\mathrm{H}} A v` and :math:`v^{\mathrm{H}} A u` are conjugate.

    A matrix that is not Hermitian passes only by a coincidence of probability zero, up
    to rounding.

    Returns
    -------
    tuple of bool and int
        The answer, and the products spent: two, with fixed pseudo-random vectors, or
        none if the matrix is not square.
    """
    operand = Operand(A)
    M, N = operand.shape
    if M != N:
        return False, 0
    U = Probes(N, "normal", 0, operand.dtype, operand.device).block(0, 2)
    AU = operand.multiply(U)
    forms = double(U.mH @ AU)
    scale = torch.linalg.vector_norm(AU) * torch.linalg.vector_norm(U)
    tolerance = 10 * torch.finfo(AU.dtype).eps * float(scale)
    return bool((forms[0, 1] - forms[1, 0].conj()).abs() <= tolerance), 2


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
    require_tolerance("tol", tol)
    hermitian, spent = find_hermitian(A)
    settings: dict[str, Any] = {"tol": tol, "gram": not hermitian}
    with Run(A, "spectral_norm", options, "normal", **settings) as run:
        values, _ = solve_eigenpairs(run, 1, "LM", view=SciPyView(run), tol=tol)
        run.operand.num_products += spent
        if not len(values):
            raise RuntimeError(
                f"spectral_norm did not converge to tol={tol:.1e} in "
                f"{run.operand.num_products} products. Allow a larger tol."
            )
        value = float(np.abs(values[0]))
        return _exact(run, value if hermitian else value**0.5, tol)


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
        ``until`` has no effect. The Gram matrix has a checkpoint of its own, with
        ``.gram`` appended to the name.

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
    From both ends of the spectrum of a definite matrix, which resolves numbers up to
    the inverse of rounding error; for other matrices from the smaller Gram matrix,
    which resolves only the square root of that (about 1e7 in float64, a few hundred in
    float32). Costs one Lanczos run, at most ``N`` products (twice that for a Gram
    matrix), which a badly conditioned matrix takes, and as many vectors.

    Examples
    --------
    >>> import numpy as np
    >>> A = np.diag(np.linspace(1.0, 5.0, 50))
    >>> bool(np.isclose(condition_number(A, rng=0), 5.0))
    True
    """
    require_tolerance("tol", tol)
    hermitian, spent = find_hermitian(A)
    if hermitian:
        low, high, run = _ends(A, tol, False, options)
        spent += run.operand.num_products
    if not hermitian or low * high <= 0:
        hermitian = False
        path = options.get("checkpoint")
        path = None if path is None else f"{os.fspath(path)}.gram"
        low, high, run = _ends(A, tol, True, {**options, "checkpoint": path})
        spent += run.operand.num_products
    near, far = sorted([abs(low), abs(high)])
    rounding = ROUNDING * torch.finfo(run.operand.dtype).eps * run.dim**0.5
    ratio = far / near if near > rounding * far else np.inf
    run.operand.num_products = spent
    return _exact(run, ratio if hermitian else ratio**0.5, tol)


def _ends(A: Any, tol: float, gram: bool, options: Options) -> tuple[float, float, Run]:
    """Return the smallest and largest eigenvalue, or any two of different sign.

    One Lanczos run, without the restarts of ARPACK: those hardly get anywhere with an
    end that is small relative to the other.
    """

    def ends(alpha: np.ndarray, beta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        nodes, vectors = eigh_tridiagonal(alpha[0], beta[0, :-1])
        return nodes[[0, -1]], beta[0, -1] * np.abs(vectors[-1, [0, -1]])

    def stop(alpha: np.ndarray, beta: np.ndarray) -> bool:
        steps = alpha.shape[1]
        if beta[0, -1] == 0 or steps == N:
            return True
        if int(steps**0.5) ** 2 != steps or steps == 1:
            return False
        nodes, errors = ends(alpha, beta)
        rounding = torch.finfo(run.operand.dtype).eps * np.abs(nodes).max()
        enough = errors <= np.maximum(tol * np.abs(nodes), rounding)
        return bool(enough.all() or nodes[0] < 0 < nodes[1])

    with Run(A, "condition_number", options, "normal", gram=gram) as run:
        N = run.dim
        steps = min(N, BASIS_BYTES // (N * run.operand.dtype.itemsize))
        start = run.probes.block(0, 1)
        found = lanczos(run.multiply, start, max(steps, 2), "full", stop)
        if not stop(found.alpha, found.beta):
            raise RuntimeError(
                f"The condition number did not converge in {steps} steps, whose basis "
                "takes up 2 GiB. Add damping, or allow a larger tol."
            )
        nodes, _ = ends(found.alpha, found.beta)
        return float(nodes[0]), float(nodes[1]), run


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
    require_tolerance("tol", tol)
    full: Options = {**options, "return_estimate": True}
    estimate = hutchinson_squared_fro(A, num_matvecs, distribution, **full)
    bar = options.get("progressbar", False)
    norm = spectral_norm(
        A, tol=tol, rng=estimate.seed, progressbar=bar, return_estimate=True
    )
    square = float(norm) ** 2
    result = replace(
        estimate,
        value=estimate.value / square,
        standard_error=estimate.standard_error / square,
        num_products=estimate.num_products + norm.num_products,
        truncation_error=2 * tol * float(estimate.value) / square,
    )
    return result if options.get("return_estimate") else result.value
