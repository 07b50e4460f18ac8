r"""Estimators of the diagonal of a matrix from products with random vectors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from curvlinops.estimators._run import Moments, Options, Run, require_num_matvecs
from curvlinops.estimators._sketch import RangeSketch, coldot

if TYPE_CHECKING:
    from typing_extensions import Unpack


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
        Products :math:`m`, below ``N``; with ``until`` the limit.
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
        m = require_num_matvecs(run, num_matvecs)
        return run.mean(lambda V: V.conj() * run.multiply(V, record=False), m)


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
        Products :math:`m`: a multiple of 2, below ``N``; with ``until`` the limit.
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
        limit = require_num_matvecs(run, num_matvecs, multiple_of=2)
        sketch, Z = RangeSketch(run), None
        for k in run.stages(limit):
            start = sketch.size
            sketch.grow(k)
            new = sketch.multiply_basis(start, adjoint=True)
            Z = new if Z is None else torch.cat([Z, new], dim=1)
            Q, S = sketch.Q, sketch.directions()
            leading = sum(
                (Q[:, a:b] * Z[:, a:b].conj()).sum(1) for a, b in run.blocks(0, k)
            )
            moments = Moments(offset=leading)
            # Leaving out v_i takes Q s_i away from the subspace: diag(Q s_i (Z s_i)^H)
            # is lost, and the part of A v_i along Q s_i is left to be sampled.
            along = coldot(S, sketch.R).to(Q.dtype)
            for a, b in run.blocks(0, k):
                directions = S[:, a:b].to(Q.dtype)
                V, lost = run.probes.block(a, b), Q @ directions
                moments.add(lost * (V * along[a:b] - (Z @ directions).conj()))
            if run.enough(moments):
                break
        return run.result(*moments.mean_and_sem(), moments.count)
