r"""Functions of a Hermitian matrix: :math:`\mathrm{tr}\, f(A)` and :math:`f(A) v`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from operator import index
from typing import Any, Unpack

import numpy as np
import torch
from scipy.linalg import eigh_tridiagonal
from torch import Tensor

from curvlinops.estimators._base import (
    FEWEST_SAMPLES,
    require_positive_int,
    require_tolerance,
)
from curvlinops.estimators._run import Options, Run
from curvlinops.estimators.lanczos import (
    Indefinite,
    Multiply,
    Rule,
    Runs,
    below,
    block_size,
    hermitian_or_not,
    lanczos,
)
from curvlinops.estimators.norm import ROUNDING, tall
from curvlinops.estimators.ritz import eigenvalues, singular_values

Function = Callable[[np.ndarray], np.ndarray]
#: From a Gauss rule to an integral and its Krylov error.
Integrand = Callable[[Rule], "tuple[Any, float]"]


def _checked(task: str, function: Function) -> Function:
    """Return a function that raises where it is not defined, or not elementwise."""

    def values(nodes: np.ndarray) -> np.ndarray:
        with np.errstate(all="ignore"):
            result = np.asarray(function(nodes))
        if result.shape != nodes.shape:
            raise ValueError(
                f"{task}: the function maps {nodes.shape} eigenvalues to an array of "
                f"shape {result.shape}. It is elementwise, e.g. numpy.exp."
            )
        if not np.isfinite(result).all():
            node = nodes[~np.isfinite(result)].flat[0]
            raise ValueError(
                f"{task}: the function is not finite at {node:.3e}, an approximate "
                "eigenvalue. Add damping, or use a function that is defined there."
            )
        return result

    return values


def _middle(one: float, other: float) -> tuple[float, float]:
    """Return the middle of two bounds and half their distance."""
    return (one + other) / 2, abs(one - other) / 2


def _compared(function: Function) -> Integrand:
    """Return the integral, and its change from fewer steps as its error.

    For functions of which nothing is known: from half the steps, for a few less would
    change little even where the rule is far from exact; or from one step less, if that
    is more, as where nodes hop over a discontinuity.
    """

    def integrand(rule: Rule) -> tuple[Any, float]:
        value = rule(function)
        changes = [float(abs(value - other(function))) for other in rule.shorter()]
        return value, max(changes, default=np.nan)

    return integrand


def bracketed(function: Function, eps: float, bounded: bool = True) -> Integrand:
    r"""Return the middle between Gauss's and Radau's rule with a node at zero.

    They enclose :math:`v^{\mathrm{H}} f(A) v` if no eigenvalue is negative, and
    derivatives of even order have one sign and those of odd order the other, from some
    order on: as of the logarithm, of powers, and of resolvents. If zero is not a bound,
    as a node shows that is negative beyond rounding, half the steps are compared. What
    rounding errors of the nodes may do is added.
    """

    def integrand(rule: Rule) -> tuple[Any, float]:
        doubt = 4 * eps * float(np.abs(rule.nodes).max())
        doubt = rule(lambda x: np.abs(function(x + doubt) - function(x)))
        if rule.indefinite(eps) or not bounded:
            value, error = _compared(function)(rule)
        else:
            other = rule.radau(min(0.0, float(rule.nodes[0]) - 2 * rule.rounding))
            value, error = _middle(rule(function), other(function))
        return value, error + doubt

    return integrand


def _counted(lower: float, upper: float, eps: float) -> Integrand:
    """Return the middle of the bounds of the weight in an interval."""

    def integrand(rule: Rule) -> tuple[float, float]:
        total = float(rule.weights.sum())
        a, b = rule.below(lower, eps) if lower > -np.inf else (0.0, 0.0)
        c, d = rule.below(upper, eps) if upper < np.inf else (total, total)
        return _middle(max(c - b, 0.0), d - a)

    return integrand


class _Quadrature(Runs):
    """Runs, and the number that an integrand makes of each."""

    def __init__(self, integrand: Integrand) -> None:
        super().__init__()
        self._integrand, self._found = integrand, list[tuple[Any, float]]()

    def samples(self) -> tuple[np.ndarray, np.ndarray]:
        """Return numbers and Krylov errors of the runs, each computed once."""
        for i in range(len(self._found), self.count):
            rule = Rule.gauss(self.alpha[i], self.beta[i])
            self._found.append(self._integrand(rule))
        values, errors = np.array(self._found[: self.count]).T
        return values * self.squared_norms, errors.real * self.squared_norms


class _Trace:
    """The trace of a function: estimated by runs, or exact by all eigenvalues.

    Parameters
    ----------
    run : Run
        The estimation.
    integrand : Integrand
        Of one Lanczos run, or of all eigenvalues.
    multiply : callable, optional
        Products of the Hermitian matrix, or those for singular values.
    zeros : int, optional
        Put above vectors, see :func:`hermitian_or_not`.
    """

    def __init__(
        self,
        run: Run,
        integrand: Integrand,
        multiply: Multiply | None = None,
        zeros: int = 0,
    ) -> None:
        self._run, self._integrand = run, integrand
        self._multiply, self._zeros = multiply or run.multiply, zeros

    def estimate(self, ncv: int, num_repeats: int, transform: Any = None) -> Any:
        """Return the result; deepen the Krylov spaces if ``until`` asks for it."""
        ncv, num_repeats = index(ncv), index(num_repeats)
        run, depth, deepest = self._run, min(ncv, self._run.dim), ncv * num_repeats
        while depth < run.dim and not run.dense_is_due(FEWEST_SAMPLES * depth):
            runs = self._runs(depth, num_repeats)
            moments = runs.moments()
            mean, sem = moments.mean_and_sem()
            krylov = moments.krylov_error
            allowed = (run.until or 0.01) * float(mean.abs()) or float(sem)
            if krylov > 0:
                needed = min(depth * krylov / allowed, run.dim) if allowed else run.dim
                run.advice = f"Have ncv={needed:.0f} steps or so ({run.dim} is exact)"
            if run.limited(mean, krylov) and depth < deepest:
                depth *= 2
            elif run.enough(runs) or not run.dense_is_due():
                return run.result(mean, sem, runs.count, krylov, transform)
        values = (singular_values if self._zeros else eigenvalues)(run)
        value, error = self._integrand(Rule(values, np.ones(len(values))))
        error = 0.0 if error <= 100 * run.operand.eps * abs(value) else error
        if transform is not None:
            value, error = transform(torch.as_tensor(value), error)
        return run.exact(value, float(error))

    def _runs(self, depth: int, num_repeats: int) -> Runs:
        """Return runs up to the error or the limit, unless the matrix is cheaper."""
        run, eps = self._run, self._run.operand.eps
        steps = 2 * depth if self._zeros else depth
        size = block_size(run, steps, self._zeros)

        def krylov(V: Tensor) -> Any:
            V = below(self._zeros, V)
            return lanczos(self._multiply, V, steps, size > 0, eps=eps)

        run.block_size = max(1, min(run.block_size, size or run.block_size))
        runs = _Quadrature(self._integrand)
        section = f"runs of {depth} below {self._zeros}"
        step, reached = (FEWEST_SAMPLES if run.until else num_repeats), False
        for count in [*range(step, num_repeats, step), num_repeats]:
            run.accumulate(runs, krylov, count, section=section)
            before, reached = reached, run.enough(runs)
            limited = run.limited(runs.moments().mean, runs.moments().krylov_error)
            if limited or run.dense_is_due() or (before and reached):
                break
        runs.keep(num_repeats)
        return runs


def _start(
    A: Any, task: str, ncv: int, num_repeats: int, options: Options, **settings: Any
) -> Run:
    """Return the run of a trace, its arguments checked."""
    total = require_positive_int("ncv", ncv)
    total *= require_positive_int("num_repeats", num_repeats)
    return Run(A, task, options, total=total, ncv=ncv, **settings)


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
        The estimate. Its Krylov error is the change from half the steps, or from one
        step less if that is larger.

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
    task, given = "trace_of_function", {"distribution": distribution}
    with _start(A, task, ncv, num_repeats, options, **given) as run:
        integrand = _compared(_checked(task, function))
        return _Trace(run, integrand).estimate(ncv, num_repeats)


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
    log = _checked("logdet", lambda nodes: np.log(nodes + damping))
    with _start(A, "logdet", ncv, num_repeats, options) as run:
        integrand = bracketed(log, run.operand.eps, bounded=damping > 0)
        return _Trace(run, integrand).estimate(ncv, num_repeats)


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

    task = "effective_dimension"
    share = _checked(task, lambda x: np.where(x > -damping, x / (x + damping), np.nan))
    with _start(A, task, ncv, num_repeats, options) as run:
        integrand = bracketed(share, run.operand.eps)
        return _Trace(run, integrand).estimate(ncv, num_repeats)


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
    with _start(A, "eigenvalue_count", ncv, num_repeats, options) as run:
        integrand = _counted(lower, upper, run.operand.eps)
        return _Trace(run, integrand).estimate(ncv, num_repeats)


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
    If ``A`` turns out not to be Hermitian, or to be indefinite, it is bidiagonalised
    (Golub, Kahan), at two products a step. Errors are carried through the root.
    Singular values that rounding errors hide count as zero; what they might add is part
    of the Krylov error.

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
    p = float(p)

    def integrand(rule: Rule, zeros: int) -> tuple[float, float]:
        scale = ROUNDING * run.operand.eps * run.dim**0.5
        least = scale * float(np.abs(rule.nodes).max())

        def power(nodes: np.ndarray) -> np.ndarray:
            return np.where(np.abs(nodes) > least, np.abs(nodes) ** p, 0.0)

        if zeros:
            singular = np.abs(rule.nodes).min() <= least
            other = rule if singular else rule.radau(0.0)
            value, error = _middle(rule(power), other(power))
        elif rule.indefinite(run.operand.eps):
            raise Indefinite
        else:
            value, error = bracketed(power, run.operand.eps)(rule)
        return value, error + rule(lambda x: (np.abs(x) <= least) * least**p)

    def root(mean: Tensor, error: Any) -> tuple[Tensor, Any]:
        norm = mean ** (1 / p)
        return norm, norm * error / (p * mean) if mean else error

    def attempt(multiply: Multiply, zeros: int) -> Any:
        if ncv >= run.dim:  # exact, of whatever kind the matrix is
            zeros = run.operand.shape[0]
        elif not zeros:  # find out at little cost
            start, steps = run.probes.block(0, 1), min(index(ncv), 30)
            # Made again after an interruption: what is recorded are the runs.
            probe = partial(run.multiply, record=False)
            found = lanczos(probe, start, steps, eps=run.operand.eps)
            integrand(Rule.gauss(found.alpha[0], found.beta[0]), zeros)
        trace = _Trace(run, lambda rule: integrand(rule, zeros), multiply, zeros)
        return trace.estimate(ncv, num_repeats, root)

    task = "schatten_norm"
    with _start(tall(A), task, ncv, num_repeats, options, square=False) as run:
        return hermitian_or_not(run, attempt)


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
        Lanczos steps at most; more than ``N`` are never made.
    tol : float, optional
        Stop when the estimated error is at most ``tol`` times the norm of the result,
        twice in a row; it is looked at every quarter of the steps.
    **options : Options
        See :class:`~curvlinops.estimators.Options`. Nothing is random here.

    Returns
    -------
    Tensor, numpy.ndarray, or Estimate
        Of shape ``(N,)``, complex if the function or ``v`` is. The estimate's Krylov
        error is the norm of the change from half the steps, 0 in an invariant subspace.

    Raises
    ------
    ValueError
        If an argument breaks its rule, or the function is not finite at an approximate
        eigenvalue.

    Notes
    -----
    Costs ``ncv`` products and the memory of ``ncv`` vectors; twice the products for
    complex ``v`` and a real matrix.

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
    ncv = require_positive_int("ncv", ncv)
    f = _checked("apply_function", function)
    with Run(A, "apply_function", options, total=ncv, ncv=ncv, tol=tol) as run:
        run.until = None
        vector = torch.as_tensor(v).detach().to(run.operand.device)
        if vector.shape != (run.dim,):
            raise ValueError(f"v has shape ({run.dim},), got {tuple(vector.shape)}.")
        both = vector.is_complex() and not run.operand.dtype.is_complex
        parts = torch.view_as_real(vector).unbind(1) if both else (vector,)
        steps, found = min(ncv, run.dim), []
        for start in (part.to(run.operand.dtype) for part in parts):
            found.append(_applied(run, f, start, steps, tol))
        results, errors, reached = zip(*found, strict=True)
        result = results[0] + 1j * results[1] if both else results[0]
        run.converged = all(reached)
        return run.exact(result, float(np.linalg.norm(errors)))


def _applied(
    run: Run, function: Function, start: Tensor, ncv: int, tol: float
) -> tuple[Tensor, float, bool]:
    """Return the function times a vector, the error, and if it is as small as asked."""
    if not start.any():
        return start, 0.0, True

    def coefficients(alpha: np.ndarray, beta: np.ndarray) -> np.ndarray:
        nodes, S = eigh_tridiagonal(alpha[0], beta[0, :-1])
        # Nodes without weight come from the steps after an invariant subspace.
        seen = np.abs(S[0]) > 0
        return S[:, seen] @ (function(nodes[seen]) * S[0, seen])

    def change(alpha: np.ndarray, beta: np.ndarray) -> tuple[np.ndarray, float]:
        new, m = coefficients(alpha, beta), alpha.shape[1]
        if beta[0, -1] == 0 or m == run.dim:
            return new, 0.0
        if m == 1:
            return new, np.nan
        half = coefficients(alpha[:, : m // 2], beta[:, : m // 2])
        return new, float(np.linalg.norm(new - np.pad(half, (0, m - m // 2))))

    last, look = np.inf, 8

    def stop(alpha: np.ndarray, beta: np.ndarray) -> bool:
        nonlocal last, look
        if beta[0, -1] == 0:
            return True
        if not tol or alpha.shape[1] < look:
            return False
        look += look // 4
        new, error = change(alpha, beta)
        before, last = last, error / float(np.linalg.norm(new))
        return max(before, last) <= tol

    found = lanczos(run.multiply, start[:, None], ncv, True, stop, eps=run.operand.eps)
    assert found.basis is not None
    (new, error), norm = change(found.alpha, found.beta), float(found.norms[0])
    basis = found.basis[0, : len(new)]
    weights = torch.as_tensor(norm * new).to(basis.device)
    wide = (
        torch.promote_types(basis.dtype, weights.dtype)
        if weights.is_complex()
        else basis.dtype
    )
    result = weights.to(wide) @ basis.to(wide)
    return result, norm * error, not tol or error <= tol * float(np.linalg.norm(new))
