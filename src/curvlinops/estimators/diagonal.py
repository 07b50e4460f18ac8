r"""Estimators of the diagonal of a matrix from products with random vectors."""

from __future__ import annotations

from functools import cache
from typing import Any, Unpack

from torch import Tensor

from curvlinops.estimators._run import Moments, Options, Run
from curvlinops.estimators._sketch import (
    RangeSketch,
    coldot,
    complement,
    directions,
    exchangeable_error,
    refine,
)


def _entries(V: Tensor, Y: Tensor) -> Tensor:
    return V.conj() * Y


def hutchinson_diag(
    A: Any,
    num_matvecs: int,
    distribution: str = "rademacher",
    **options: Unpack[Options],
) -> Any:
    r"""Estimate the diagonal by averaging random vectors times their products.

    .. math::
        \mathrm{diag}(A) = \mathbb{E}[\bar v \odot A v]
        \approx \frac{1}{m} \sum_{i=1}^{m} \bar v_i \odot A v_i

    Parameters
    ----------
    A : LinearOperator, array, sparse matrix, or Tensor
        Square matrix of shape ``(N, N)``.
    num_matvecs : int
        Products :math:`m`; with ``until`` the limit. As many as ``N`` give the exact
        value, with error 0.
    distribution : str, optional
        ``"rademacher"`` (entries ±1), ``"normal"``, or ``"sphere"``.
    **options : Options
        See :class:`~curvlinops.estimators.Options`.

    Returns
    -------
    Tensor, numpy.ndarray, or Estimate
        The unbiased estimate, of shape ``(N,)``, in the unit of ``A``.

    Raises
    ------
    ValueError
        If an argument breaks its rule, or a product is not finite.

    Notes
    -----
    With Rademacher vectors entry ``i`` has variance
    :math:`\sum_{j \neq i} A_{ij}^2 / m`. Costs ``m`` products and the memory of two
    blocks of vectors.

    References
    ----------
    Bekas, Kokiopoulou, Saad, "An estimator for the diagonal of a matrix", Applied
    Numerical Mathematics 57 (2007), doi:10.1016/j.apnum.2007.01.003.

    Examples
    --------
    >>> import numpy as np
    >>> A = np.diag(np.arange(1.0, 101.0))  # exact: no entries off the diagonal
    >>> bool((hutchinson_diag(A, 3, rng=0) == np.diag(A)).all())
    True
    """
    with Run(A, "hutchinson_diag", options, distribution, num_matvecs) as run:
        return run.mean(_entries, num_matvecs)


def xdiag(A: Any, num_matvecs: int, **options: Unpack[Options]) -> Any:
    r"""Estimate the diagonal exactly on a leading subspace, by sampling on the rest.

    .. math::
        \mathrm{diag}(A) \approx \frac{1}{k} \sum_{i=1}^{k} \left[
        \mathrm{diag}(Q_{(i)} Q_{(i)}^{\mathrm{H}} A)
        + v_i \odot (I - Q_{(i)} Q_{(i)}^{\mathrm{H}}) A v_i \right]

    with :math:`Q_{(i)}` an orthonormal basis of :math:`A\Omega` without its column
    :math:`A v_i`, :math:`\Omega = (v_1, \dots, v_k)` of entries ±1, :math:`k = m / 2`.

    Parameters
    ----------
    A : LinearOperator, array, sparse matrix, or Tensor
        Square matrix of shape ``(N, N)``; ``k`` products are with its adjoint.
    num_matvecs : int
        Products :math:`m`, rounded down to a multiple of 2 (``num_products`` says how
        many were made); with ``until`` the limit. As many as ``N`` give the exact
        value, with error 0.
    **options : Options
        See :class:`~curvlinops.estimators.Options`.

    Returns
    -------
    Tensor, numpy.ndarray, or Estimate
        The unbiased estimate, of shape ``(N,)``, in the unit of ``A``. The standard
        error accounts for the dependence of the samples, which share vectors.

    Raises
    ------
    ValueError
        If an argument breaks its rule, or a product is not finite.

    Notes
    -----
    Costs ``m`` products and the memory of ``m`` vectors: :math:`Q` and
    :math:`A^{\mathrm{H}} Q`. Exact for matrices of rank below ``k``.

    References
    ----------
    Epperly, Tropp, Webber, "XTrace: making the most of every sample in stochastic trace
    estimation", SIAM J. Matrix Analysis and Applications 45 (2024), arXiv:2301.07825.

    Examples
    --------
    >>> import numpy as np
    >>> G = np.random.default_rng(0).standard_normal((100, 5))
    >>> A = G @ G.T  # of rank 5
    >>> bool(np.allclose(xdiag(A, 12, rng=0), np.diag(A)))
    True
    """
    with Run(A, "xdiag", options, total=num_matvecs) as run:
        sketch = RangeSketch(run)

        def estimate(k: int) -> tuple[Tensor, Tensor]:
            sketch.grow(k)
            return _xdiag_mean_and_sem(run, sketch, sketch.images(adjoint=True))

        return refine(run, num_matvecs, estimate, _entries, grow=2)


def _xdiag_mean_and_sem(
    run: Run, sketch: RangeSketch, Z: Tensor
) -> tuple[Tensor, Tensor]:
    """Return mean and standard error from ``A V = Q R`` and ``Z = A^H Q``.

    Without ``v_i`` the subspace lacks ``Q s_i``: ``diag(Q s_i (Z s_i)^H)`` is lost, and
    the part of ``A v_i`` along ``Q s_i`` is left to be sampled. The standard error is
    that of :func:`exchangeable_error`, its covariance averaged over 8 vectors.
    """
    Q, R, k = sketch.Q, sketch.R, sketch.size
    S = directions(R)

    def lost(s: Tensor) -> Tensor:
        s = s.to(Q.dtype)
        return (Q @ s) * (Z @ s).conj()

    def term(s: Tensor, V: Tensor, r: Tensor) -> Tensor:
        return V * (Q @ (s * coldot(s, r)).to(Q.dtype)) - lost(s)

    moments = Moments((Q * Z.conj()).sum(1))
    for a, b in run.blocks(0, k):
        moments.add(term(S[:, a:b], run.probes.block(a, b), R[:, a:b]))
    mean, sem = moments.mean_and_sem()

    @cache
    def without(j: int) -> Tensor:
        N = complement(R, j)
        return N @ directions(N.mH @ R[:, [i for i in range(k) if i != j]])

    def change(i: int, j: int) -> Tensor:
        """Return what sample ``i`` owes to vector ``j``."""
        V, r, s = run.probes.block(i, i + 1), R[:, [i]], S[:, [i]]
        difference = term(s, V, r) - term(without(j)[:, [i - (i > j)]], V, r)
        return (difference + lost(S[:, [j]]))[:, 0]

    return mean, exchangeable_error(run, sem, change, min(k, 8))
