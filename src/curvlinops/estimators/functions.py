r"""Functions of a Hermitian matrix: :math:`\mathrm{tr}\, f(A)` and :math:`f(A) v`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from scipy.linalg import eigh_tridiagonal
from torch import Tensor

from curvlinops.estimators._base import require_positive_int, require_tolerance
from curvlinops.estimators._run import Options, Run
from curvlinops.estimators.lanczos import GaussRules, lanczos, require_ncv
from curvlinops.estimators.norm import find_hermitian
from curvlinops.estimators.spectrum import run_lanczos

if TYPE_CHECKING:
    from typing_extensions import Unpack

Function = Callable[[np.ndarray], np.ndarray]


def _check_values(task: str, nodes: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Return a function's values, or raise where the function is not defined."""
    if not np.isfinite(values).all():
        node = nodes[~np.isfinite(values)].flat[0]
        raise ValueError(
            f"{task}: the function is not finite at {node:.3e}, an approximate "
            "eigenvalue. Add damping, or use a function that is defined there."
        )
    return values


def trace_of_function(
    A: Any,
    function: Function,
    ncv: int = 50,
    num_repeats: int = 10,
    distribution: str = "rademacher",
    **options: Unpack[Options],
) -> Any:
    r"""Estimate the trace of a function of a Hermitian matrix.

    .. math::
        \mathrm{tr}\, f(A) \approx \frac{1}{R} \sum_{r=1}^{R} \|v_r\|^2
        \sum_{j=1}^{m} w_{rj} f(\theta_{rj})

    with the Gauss rules of Lanczos runs of :math:`m` steps from random vectors.

    Parameters
    ----------
    A : LinearOperator, array, sparse matrix, or Tensor
        Hermitian matrix of shape ``(N, N)``.
    function : callable
        From a NumPy array of eigenvalues to one of the same shape.
    ncv : int, optional
        Lanczos steps per run, at most ``N``.
    num_repeats : int, optional
        Lanczos runs; with ``until`` the limit.
    distribution : str, optional
        ``"rademacher"`` (entries ±1), ``"normal"``, or ``"sphere"``.
    **options : Options
        See :class:`~curvlinops.estimators.Options`. A checkpoint holds the Lanczos
        runs, whatever the function.

    Returns
    -------
    Tensor, numpy scalar, or Estimate
        The estimate. Its truncation error, the change if a tenth of the steps is left
        out, is not part of the standard error.

    Raises
    ------
    ValueError
        If an argument breaks its rule, a product is not finite, or the function is not
        at an approximate eigenvalue.

    Notes
    -----
    Costs ``ncv * num_repeats`` products and the memory of ``ncv`` vectors (no more than
    2 GiB, else the recurrence runs without them). Exact for polynomials of degree
    ``2 ncv - 1`` but for the sampling.

    References
    ----------
    Ubaru, Chen, Saad, "Fast estimation of tr(f(A)) via stochastic Lanczos quadrature",
    SIAM J. Matrix Analysis and Applications 38 (2017), doi:10.1137/16M1104974.

    Examples
    --------
    >>> import numpy as np
    >>> A = np.diag(np.linspace(0.0, 1.0, 200))
    >>> trace = trace_of_function(A, np.exp, ncv=10, rng=0)
    >>> bool(np.isclose(trace, np.exp(np.diag(A)).sum(), rtol=0.02))
    True
    """
    return _trace(
        A, function, ncv, num_repeats, "trace_of_function", options, distribution
    )


def _trace(
    A: Any,
    function: Function,
    ncv: int,
    num_repeats: int,
    task: str,
    options: Options,
    distribution: str = "rademacher",
    *,
    gram: bool = False,
    spent: int = 0,
    transform: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
) -> Any:
    """Return what :func:`trace_of_function` does, for one of its users.

    Parameters
    ----------
    A, function, ncv, num_repeats, distribution, options
        As there.
    task : str
        Name for messages and the checkpoint.
    gram : bool, optional
        Use the smaller of ``A^H A`` and ``A A^H`` in place of ``A``.
    spent : int, optional
        Products made before.
    transform : callable, optional
        Of the trace and its standard error, for the result.
    """

    def statistic(
        nodes: np.ndarray, weights: np.ndarray, norms: np.ndarray
    ) -> np.ndarray:
        with np.errstate(all="ignore"):
            values = _check_values(task, nodes, np.asarray(function(nodes)))
        return norms * (weights * values).sum(1)

    total = require_positive_int("ncv", ncv)
    total *= require_positive_int("num_repeats", num_repeats) * (1 + gram)
    with Run(A, task, options, distribution, total, gram=gram, ncv=ncv) as run:
        rules = GaussRules(statistic)
        run_lanczos(run, rules, ncv, num_repeats)
        rules.keep(num_repeats)
        run.operand.num_products += spent
        mean, sem = rules.mean_and_sem()
        error = rules.truncation_error() if run.full_output else 0.0
        return run.result(mean, sem, rules.count, error, transform)


def logdet(
    A: Any,
    damping: float = 0.0,
    ncv: int = 50,
    num_repeats: int = 10,
    **options: Unpack[Options],
) -> Any:
    r"""Estimate :math:`\log\det(A + \delta I) = \mathrm{tr} \log(A + \delta I)`.

    Parameters
    ----------
    A : LinearOperator, array, sparse matrix, or Tensor
        Hermitian matrix of shape ``(N, N)``.
    damping : float, optional
        :math:`\delta`, which must make the matrix positive definite.
    ncv, num_repeats : int, optional
        Lanczos steps per run, and runs; see :func:`trace_of_function`.
    **options : Options
        See :class:`~curvlinops.estimators.Options`.

    Returns
    -------
    Tensor, numpy scalar, or Estimate
        The estimate, the natural logarithm.

    Raises
    ------
    ValueError
        If an approximate eigenvalue of the damped matrix is not positive.

    Examples
    --------
    >>> import numpy as np
    >>> A = np.diag(np.linspace(1.0, 3.0, 200))
    >>> bool(np.isclose(logdet(A, rng=0), np.linalg.slogdet(A)[1], rtol=0.02))
    True
    """

    def log(nodes: np.ndarray) -> np.ndarray:
        return np.log(nodes + damping)

    return _trace(A, log, ncv, num_repeats, "logdet", options)


def effective_dimension(
    A: Any,
    damping: float,
    ncv: int = 50,
    num_repeats: int = 10,
    **options: Unpack[Options],
) -> Any:
    r"""Estimate :math:`\mathrm{tr}\, A (A + \delta I)^{-1}`, directions above damping.

    Parameters
    ----------
    A : LinearOperator, array, sparse matrix, or Tensor
        Positive semi-definite matrix of shape ``(N, N)``.
    damping : float
        :math:`\delta`, above 0, in the unit of ``A``.
    ncv, num_repeats : int, optional
        Lanczos steps per run, and runs; see :func:`trace_of_function`.
    **options : Options
        See :class:`~curvlinops.estimators.Options`.

    Returns
    -------
    Tensor, numpy scalar, or Estimate
        The estimate, without unit.

    Raises
    ------
    ValueError
        If damping is not positive, or an approximate eigenvalue is at or below its
        negative.

    Examples
    --------
    >>> import numpy as np
    >>> A = np.diag(np.r_[np.full(20, 1e3), np.zeros(180)])
    >>> round(float(effective_dimension(A, 1e-3, rng=0, num_repeats=100)))
    20
    """
    if not damping > 0:
        raise ValueError(f"damping is above 0, got {damping!r}.")

    def share(nodes: np.ndarray) -> np.ndarray:
        return np.where(nodes > -damping, nodes / (nodes + damping), np.nan)

    return _trace(A, share, ncv, num_repeats, "effective_dimension", options)


def eigenvalue_count(
    A: Any,
    lower: float = -np.inf,
    upper: float = np.inf,
    ncv: int = 50,
    num_repeats: int = 10,
    **options: Unpack[Options],
) -> Any:
    r"""Estimate the number of eigenvalues with :math:`a \leq \lambda < b`.

    Parameters
    ----------
    A : LinearOperator, array, sparse matrix, or Tensor
        Hermitian matrix of shape ``(N, N)``.
    lower, upper : float, optional
        The interval's ends, ``lower < upper``. ``upper=-1e-6`` alone counts the
        eigenvalues that are negative, beyond rounding.
    ncv, num_repeats : int, optional
        Lanczos steps per run, and runs; see :func:`trace_of_function`.
    **options : Options
        See :class:`~curvlinops.estimators.Options`.

    Returns
    -------
    Tensor, numpy scalar, or Estimate
        The estimate, a real number.

    Raises
    ------
    ValueError
        If ``lower`` is not below ``upper``.

    Notes
    -----
    A step has no fast quadrature: the error falls as ``1 / ncv`` times the density of
    eigenvalues at the ends. Put these where there are few.

    References
    ----------
    Di Napoli, Polizzi, Saad, "Efficient estimation of eigenvalue counts in an
    interval", Numerical Linear Algebra with Applications 23 (2016), arXiv:1308.4275.

    Examples
    --------
    >>> import numpy as np
    >>> A = np.diag(np.r_[np.linspace(-2.0, -1.0, 30), np.linspace(1.0, 2.0, 170)])
    >>> round(float(eigenvalue_count(A, upper=0.0, rng=0, num_repeats=150)))
    30
    """
    if not lower < upper:
        raise ValueError(f"An interval has lower < upper, got {lower!r} and {upper!r}.")

    def indicator(nodes: np.ndarray) -> np.ndarray:
        return ((nodes >= lower) & (nodes < upper)).astype(float)

    return _trace(A, indicator, ncv, num_repeats, "eigenvalue_count", options)


def schatten_norm(
    A: Any,
    p: float,
    ncv: int = 50,
    num_repeats: int = 10,
    **options: Unpack[Options],
) -> Any:
    r"""Estimate the Schatten norm :math:`(\sum_i \sigma_i^p)^{1/p}` of singular values.

    Parameters
    ----------
    A : LinearOperator, array, sparse matrix, or Tensor
        Matrix of shape ``(M, N)``.
    p : float
        Exponent, above 0: 1 for the nuclear, 2 for the Frobenius norm.
    ncv, num_repeats : int, optional
        Lanczos steps per run, and runs; see :func:`trace_of_function`.
    **options : Options
        See :class:`~curvlinops.estimators.Options`. ``until`` bounds the error of the
        ``p``-th power.

    Returns
    -------
    Tensor, numpy scalar, or Estimate
        The estimate, in the unit of ``A``.

    Raises
    ------
    ValueError
        If ``p`` is not positive.

    Notes
    -----
    Two products find out whether ``A`` is Hermitian; if not, the smaller Gram matrix is
    used, at two products a step. The standard error is carried through the root.

    Examples
    --------
    >>> import numpy as np
    >>> A = np.random.default_rng(0).standard_normal((150, 100))
    >>> exact = np.linalg.norm(A, "nuc")
    >>> bool(np.isclose(schatten_norm(A, 1, rng=0), exact, rtol=0.02))
    True
    """
    if not 0 < p < np.inf:
        raise ValueError(
            f"p is above 0 and finite, got {p!r}. For infinity use spectral_norm."
        )
    hermitian, spent = find_hermitian(A)

    def power(nodes: np.ndarray) -> np.ndarray:
        return np.abs(nodes) ** p if hermitian else np.maximum(nodes, 0) ** (p / 2)

    def root(mean: Tensor, sem: Tensor) -> tuple[Tensor, Tensor]:
        norm = mean ** (1 / p)
        return norm, norm * sem / (p * mean)

    return _trace(
        A,
        power,
        ncv,
        num_repeats,
        "schatten_norm",
        options,
        gram=not hermitian,
        spent=spent,
        transform=root,
    )


def apply_function(
    A: Any,
    function: Function,
    v: Any,
    ncv: int = 50,
    *,
    tol: float = 0.0,
    **options: Unpack[Options],
) -> Any:
    r"""Compute the product of a function of a Hermitian matrix with a vector.

    .. math::
        f(A) v \approx \|v\| \, V f(T) e_1, \quad V^{\mathrm{H}} A V = T

    with the basis :math:`V` and the tridiagonal :math:`T` of ``ncv`` Lanczos steps.

    Parameters
    ----------
    A : LinearOperator, array, sparse matrix, or Tensor
        Hermitian matrix of shape ``(N, N)``.
    function : callable
        From a NumPy array of eigenvalues to one of the same shape, e.g. ``numpy.sqrt``,
        ``numpy.exp``, ``lambda x: x**-0.5``.
    v : array or Tensor
        Vector of shape ``(N,)``.
    ncv : int, optional
        Lanczos steps at most, at most ``N``.
    tol : float, optional
        Stop when the estimated error is at most ``tol`` times the norm of the result;
        looked at after 10, 20, 40, ... steps.
    **options : Options
        See :class:`~curvlinops.estimators.Options`. Nothing is random here.

    Returns
    -------
    Tensor, numpy.ndarray, or Estimate
        Of shape ``(N,)``. The estimate's truncation error is the norm of the change if
        a tenth of the steps is left out.

    Raises
    ------
    ValueError
        If an argument breaks its rule, or the function is not finite at an approximate
        eigenvalue.

    Notes
    -----
    Costs ``ncv`` products and the memory of ``ncv`` vectors.

    References
    ----------
    Saad, "Analysis of some Krylov subspace approximations to the matrix exponential
    operator", SIAM J. Numerical Analysis 29 (1992), doi:10.1137/0729014.

    Examples
    --------
    >>> import numpy as np
    >>> A, v = np.diag(np.linspace(1.0, 2.0, 100)), np.ones(100)
    >>> root = apply_function(A, np.sqrt, v, ncv=20)
    >>> bool(np.allclose(root, np.sqrt(np.diag(A))))
    True
    """
    require_tolerance("tol", tol)
    with Run(A, "apply_function", options, total=ncv, ncv=ncv, tol=tol) as run:
        run.until = None
        require_ncv(ncv, run.dim)
        start = torch.as_tensor(v).detach().to(run.operand.device, run.operand.dtype)
        if start.shape != (run.dim,):
            raise ValueError(f"v has shape ({run.dim},), got {tuple(start.shape)}.")
        if not start.any():
            return run.result(start, torch.zeros(()), 1)

        def coefficients(alpha: np.ndarray, beta: np.ndarray) -> np.ndarray:
            nodes, vectors = eigh_tridiagonal(alpha[0], beta[0, :-1])
            with np.errstate(all="ignore"):
                values = np.asarray(function(nodes))
            # Nodes without weight come from the steps after an invariant subspace.
            seen = np.abs(vectors[0]) > 0
            _check_values("apply_function", nodes[seen], values[seen])
            return vectors[:, seen] @ (values[seen] * vectors[0, seen])

        def change(alpha: np.ndarray, beta: np.ndarray) -> tuple[np.ndarray, float]:
            new, steps = coefficients(alpha, beta), alpha.shape[1]
            if steps == 1:
                return new, np.nan
            fewer = steps - -(-steps // 10)
            old = coefficients(alpha[:, :fewer], beta[:, :fewer])
            difference = new - np.pad(old, (0, steps - fewer))
            return new, float(np.linalg.norm(difference))

        def stop(alpha: np.ndarray, beta: np.ndarray) -> bool:
            if not tol or alpha.shape[1] not in (10 * 2**i for i in range(20)):
                return False
            new, error = change(alpha, beta)
            return bool(error <= tol * np.linalg.norm(new))

        found = lanczos(run.multiply, start[:, None], ncv, "full", stop)
        new, error = change(found.alpha, found.beta)
        assert found.basis is not None
        basis, norm = found.basis[0, : len(new)], float(found.norms[0])
        result = torch.as_tensor(norm * new).to(basis.device, basis.dtype) @ basis
        run.converged = not tol or error <= tol * float(np.linalg.norm(new))
        return run.result(result, torch.zeros(()), 1, norm * error)
