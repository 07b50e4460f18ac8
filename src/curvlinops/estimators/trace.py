r"""Estimators of :math:`\mathrm{tr}(A)` from products with random vectors."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, Unpack

import torch
from torch import Tensor

from curvlinops.estimators._run import Moments, Options, Run
from curvlinops.estimators._sketch import (
    RangeSketch,
    by_blocks,
    coldot,
    complement,
    directions,
    double,
    exchangeable_error,
    products,
    refine,
)


def hutchinson_trace(
    A: Any,
    num_matvecs: int,
    distribution: str = "rademacher",
    **options: Unpack[Options],
) -> Any:
    r"""Estimate the trace by averaging quadratic forms of random vectors.

    .. math::
        \mathrm{tr}(A) = \mathbb{E}[v^{\mathrm{H}} A v]
        \approx \frac{1}{m} \sum_{i=1}^{m} v_i^{\mathrm{H}} A v_i

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
        ``rng``, ``until``, ``return_estimate``, ``block_size``, ``checkpoint``,
        ``progressbar``: see :class:`~curvlinops.estimators.Options`.

    Returns
    -------
    Tensor, numpy scalar, or Estimate
        The unbiased estimate, in the unit of ``A``; complex if ``A`` is, with an
        imaginary part of rounding where that is Hermitian.

    Raises
    ------
    ValueError
        If an argument breaks its rule, or a product is not finite.

    Notes
    -----
    For symmetric ``A`` the variance is :math:`2(\|A\|_F^2 - \sum_i A_{ii}^2)/m` with
    Rademacher and :math:`2\|A\|_F^2/m` with normal vectors. Costs ``m`` products and
    the memory of two blocks of vectors.

    References
    ----------
    Hutchinson, "A stochastic estimator of the trace of the influence matrix for
    Laplacian smoothing splines", Communications in Statistics 18 (1989),
    doi:10.1080/03610918908812806.

    Examples
    --------
    >>> import numpy as np
    >>> G = np.random.default_rng(0).standard_normal((100, 100))
    >>> A = G @ G.T
    >>> e = hutchinson_trace(A, 90, rng=0, return_estimate=True)
    >>> bool(abs(e.value - np.trace(A)) < 3 * e.standard_error), e.num_products
    (True, 90)
    """
    with Run(A, "hutchinson_trace", options, distribution, num_matvecs) as run:
        return run.mean(coldot, num_matvecs)


def hutchpp_trace(
    A: Any,
    num_matvecs: int,
    distribution: str = "rademacher",
    **options: Unpack[Options],
) -> Any:
    r"""Estimate the trace exactly on a leading subspace, by Hutchinson on the rest.

    .. math::
        \mathrm{tr}(A) = \mathrm{tr}(Q^{\mathrm{H}} A Q) + \mathrm{tr}(PAP)
        \approx \mathrm{tr}(Q^{\mathrm{H}} A Q)
        + \frac{1}{k} \sum_{i=1}^{k} v_i^{\mathrm{H}} PAP\, v_i

    with :math:`Q` an orthonormal basis of :math:`A\Omega`, of :math:`k = m / 3` random
    columns, and :math:`P = I - QQ^{\mathrm{H}}`.

    Parameters
    ----------
    A : LinearOperator, array, sparse matrix, or Tensor
        Square matrix of shape ``(N, N)``.
    num_matvecs : int
        Products :math:`m`, rounded down to a multiple of 3 (``num_products`` says how
        many were made); with ``until`` the limit. As many as ``N`` give the exact
        value, with error 0.
    distribution : str, optional
        ``"rademacher"`` (entries ±1), ``"normal"``, or ``"sphere"``.
    **options : Options
        See :class:`~curvlinops.estimators.Options`. With ``until`` the subspace grows
        by half, and the rest is sampled anew, until the error is reached twice.

    Returns
    -------
    Tensor, numpy scalar, or Estimate
        The unbiased estimate, in the unit of ``A``; complex if ``A`` is. The standard
        error is that of the second term, given the subspace.

    Raises
    ------
    ValueError
        If an argument breaks its rule, or a product is not finite.

    Notes
    -----
    For positive semi-definite ``A`` a relative error :math:`\varepsilon` takes
    :math:`O(1/\varepsilon)` products, Hutchinson's :math:`O(1/\varepsilon^2)`. Costs
    ``m`` products and the memory of ``2 m / 3`` vectors (basis, and its
    orthonormalisation).

    References
    ----------
    Meyer, Musco, Musco, Woodruff, "Hutch++: optimal stochastic trace estimation",
    SOSA 2021, arXiv:2010.09649.

    Examples
    --------
    >>> import numpy as np
    >>> A = np.diag(1.0 / np.arange(1, 101) ** 2)
    >>> bool(abs(hutchpp_trace(A, 60, rng=0) - np.trace(A)) < 5e-3)
    True
    """
    with Run(A, "hutchpp_trace", options, distribution, num_matvecs) as run:
        sketch = RangeSketch(run)
        drawn = 0

        def estimate(k: int) -> tuple[Tensor, Tensor]:
            nonlocal drawn
            sketch.grow(k)
            Q, start = sketch.Q, num_matvecs // 3 + drawn  # beyond what Q knows of
            moments = Moments(offset=double(coldot(Q, sketch.images())).sum())
            for a, b in run.blocks(start, start + k):
                V = run.probes.block(a, b)
                V = V - Q @ (Q.mH @ V)
                moments.add(coldot(V, run.multiply(V)))
            drawn += k
            return moments.mean_and_sem()

        return refine(run, num_matvecs, estimate, coldot, grow=2, fresh=1)


def xtrace(
    A: Any,
    num_matvecs: int,
    distribution: str = "rademacher",
    **options: Unpack[Options],
) -> Any:
    r"""Estimate the trace as Hutch++ does, every vector serving both its terms.

    .. math::
        \mathrm{tr}(A) \approx \frac{1}{k} \sum_{i=1}^{k} \left[
        \mathrm{tr}(Q_{(i)}^{\mathrm{H}} A Q_{(i)})
        + v_i^{\mathrm{H}} P_{(i)} A P_{(i)} v_i \right],
        \quad P_{(i)} = I - Q_{(i)} Q_{(i)}^{\mathrm{H}}

    with :math:`Q_{(i)}` an orthonormal basis of :math:`A\Omega` without its column
    :math:`A v_i`, :math:`\Omega = (v_1, \dots, v_k)`, :math:`k = m / 2`.

    Parameters
    ----------
    A : LinearOperator, array, sparse matrix, or Tensor
        Square matrix of shape ``(N, N)``.
    num_matvecs : int
        Products :math:`m`, rounded down to a multiple of 2 (``num_products`` says how
        many were made); with ``until`` the limit. As many as ``N`` give the exact
        value, with error 0.
    distribution : str, optional
        ``"rademacher"`` (entries ±1), ``"normal"``, or ``"sphere"``. With the last two
        the residuals :math:`P_{(i)} v_i` are scaled to their expected norm, which
        lowers the variance.
    **options : Options
        See :class:`~curvlinops.estimators.Options`.

    Returns
    -------
    Tensor, numpy scalar, or Estimate
        The unbiased estimate, in the unit of ``A``; complex if ``A`` is. The standard
        error accounts for the dependence of the samples, which share vectors.

    Raises
    ------
    ValueError
        If an argument breaks its rule, or a product is not finite.

    Notes
    -----
    Costs ``m`` products and the memory of ``m`` vectors: :math:`Q` and :math:`AQ`.
    Exact for matrices of rank below ``k``.

    References
    ----------
    Epperly, Tropp, Webber, "XTrace: making the most of every sample in stochastic trace
    estimation", SIAM J. Matrix Analysis and Applications 45 (2024), arXiv:2301.07825.

    Examples
    --------
    >>> import numpy as np
    >>> A = np.diag(1.0 / np.arange(1, 101) ** 2)
    >>> bool(abs(xtrace(A, 60, rng=0) - np.trace(A)) < 2e-3)
    True
    """
    with Run(A, "xtrace", options, distribution, num_matvecs) as run:
        sketch = RangeSketch(run)

        def estimate(k: int) -> tuple[Tensor, Tensor]:
            sketch.grow(k)
            return _mean_and_sem(run, _xtrace_samples(run, sketch, sketch.images()), k)

        return refine(run, num_matvecs, estimate, coldot, grow=2)


def _mean_and_sem(
    run: Run, samples: Callable[[int | None], Tensor], size: int
) -> tuple[Tensor, Tensor]:
    """Return mean and standard error of leave-one-out samples.

    For an argument ``j`` they are the samples had vector ``j`` never been drawn. The
    covariance is averaged over at most 32 vectors.
    """
    terms, without, moments = samples(None), cache(samples), Moments()
    moments.add(terms)
    mean, sem = moments.mean_and_sem()

    def change(i: int, j: int) -> Tensor:
        return terms[i] - without(j)[i - (i > j)]

    return mean, exchangeable_error(run, sem, change, min(size, 32))


def _xtrace_samples(
    run: Run, sketch: RangeSketch, Z: Tensor
) -> Callable[[int | None], Tensor]:
    """Return the samples from ``A V = Q R`` and ``Z = A Q``.

    With ``P_(i) = I - Q (I - s_i s_i^H) Q^H``, ``w_i = Q^H v_i`` and
    ``x_i = (I - s_i s_i^H) w_i``, the residual is ``P_(i) v_i = v_i - Q x_i``.
    """
    Q, k = sketch.Q, sketch.size

    def inner(a: int, b: int) -> Tensor:
        V = run.probes.block(a, b)
        return double(torch.cat([Q.mH @ V, Z.mH @ V, (V * V).sum(0, keepdim=True)]))

    all_W, all_ZV, squares = by_blocks(run, 0, k, inner).split([k, k, 1])
    all_H = double(Q.mH @ Z)

    def samples(left_out: int | None) -> Tensor:
        keep = [i for i in range(k) if i != left_out]
        H, R, W, ZV = all_H, sketch.R, all_W[:, keep], all_ZV[:, keep]
        if left_out is not None:
            N = complement(R, left_out)
            H, R, W, ZV = N.mH @ H @ N, N.mH @ R[:, keep], N.mH @ W, N.mH @ ZV
        S = directions(R)
        SW = coldot(S, W)
        X = W - S * SW
        residual = SW.conj() * coldot(S, R) + coldot(X, H @ X) - coldot(ZV, X)
        if run.rotation_invariant:
            rest = squares[0, keep].real - torch.linalg.vector_norm(X, dim=0) ** 2
            residual = residual * ((run.dim - len(H) + 1) / rest)
        return H.trace() + residual - coldot(S, H @ S)

    return samples


def xnystrace(
    A: Any,
    num_matvecs: int,
    distribution: str = "rademacher",
    **options: Unpack[Options],
) -> Any:
    r"""Estimate the trace of a positive semi-definite matrix by Nyström approximation.

    .. math::
        \mathrm{tr}(A) \approx \frac{1}{m} \sum_{i=1}^{m} \left[
        \mathrm{tr}(\hat A_{(i)}) + v_i^{\mathrm{H}} (A - \hat A_{(i)}) v_i \right],
        \quad \hat A = A\Omega (\Omega^{\mathrm{H}} A \Omega)^{-1}
        (A\Omega)^{\mathrm{H}}

    with :math:`\hat A_{(i)}` the Nyström approximation without column :math:`v_i` of
    :math:`\Omega = (v_1, \dots, v_m)`.

    Parameters
    ----------
    A : LinearOperator, array, sparse matrix, or Tensor
        Positive semi-definite matrix of shape ``(N, N)``.
    num_matvecs : int
        Products :math:`m`; with ``until`` the limit. As many as ``N`` give the exact
        value, with error 0.
    distribution : str, optional
        ``"rademacher"`` (entries ±1), ``"normal"``, or ``"sphere"``. With the last two
        residuals are scaled to their expected norm, which lowers the variance.
    **options : Options
        See :class:`~curvlinops.estimators.Options`.

    Returns
    -------
    Tensor, numpy scalar, or Estimate
        The estimate, real, in the unit of ``A``; unbiased up to rounding. The standard
        error accounts for the dependence of the samples, which share vectors.

    Raises
    ------
    ValueError
        If an argument breaks its rule, a product is not finite, or the matrix turns
        out not to be Hermitian or positive semi-definite, beyond rounding.

    Notes
    -----
    Costs ``m`` products and the memory of ``3 m`` vectors. Sign vectors that repeat, as
    they do in few dimensions, and matrices of rank below ``m`` make the inverse
    singular: eigenvalues below rounding error are raised to it.

    References
    ----------
    Epperly, Tropp, Webber, "XTrace: making the most of every sample in stochastic trace
    estimation", SIAM J. Matrix Analysis and Applications 45 (2024), arXiv:2301.07825.

    Examples
    --------
    >>> import numpy as np
    >>> A = np.diag(1.0 / np.arange(1, 101) ** 2)
    >>> bool(abs(xnystrace(A, 60, rng=0) - np.trace(A)) < 1e-3)
    True
    """
    with Run(A, "xnystrace", options, distribution, num_matvecs) as run:
        Y = run.probes.block(0, 0)

        def estimate(k: int) -> tuple[Tensor, Tensor]:
            nonlocal Y
            Y = torch.cat([Y, products(run, Y.shape[1], k)], dim=1)
            return _mean_and_sem(run, _xnystrace_samples(run, Y), k)

        return refine(run, num_matvecs, estimate, coldot, grow=1)


def _xnystrace_samples(run: Run, Y: Tensor) -> Callable[[int | None], Tensor]:
    """Return the samples from ``Y = A V`` as function of a vector never drawn.

    With the inverse ``P`` of ``V^H Y`` the approximation is ``Y P Y^H``. Leaving out
    ``v_i`` lowers it by ``u u^H`` with ``u = Y P e_i / sqrt(P_ii)``, and ``v_i`` sees
    ``1 / P_ii`` of the rest: next to nothing if the other vectors span it, as they do
    where the matrix has low rank or sign vectors repeat, whence ``P`` is all but
    infinite. Eigenvalues of ``V^H Y`` below rounding are raised to it.
    """
    k, eps = Y.shape[1], run.operand.eps
    V = by_blocks(run, 0, k, run.probes.block)
    core, VV = double(V.mH @ Y), double(V.mH @ V)
    R = double(torch.linalg.qr(Y, mode="r")[1])
    norm = torch.linalg.matrix_norm
    rounding = 10 * eps * float(norm(V) * norm(Y)) / k**0.5
    hermitian = norm(core - core.mH, 2) <= rounding
    if not hermitian or torch.linalg.eigvalsh(core)[0] < -rounding:
        reason = "has negative quadratic forms" if hermitian else "is not Hermitian"
        raise ValueError(
            f"xnystrace needs a positive semi-definite matrix; this one {reason}. Use "
            "xtrace, which takes any matrix."
        )

    def samples(left_out: int | None) -> Tensor:
        keep = [i for i in range(k) if i != left_out]
        values, U = torch.linalg.eigh(core[keep][:, keep])
        if values[-1] <= 0:  # the zero matrix
            return torch.zeros_like(values)
        values = values.clamp(min=eps * float(values[-1]))
        RU = R[:, keep] @ U
        RP = RU @ (U / values).mH
        diagonal = (U.abs() ** 2 / values).sum(1)
        residual = 1 / diagonal
        if run.rotation_invariant:
            rest = 1 / torch.linalg.inv(VV[keep][:, keep]).diagonal().real
            residual = residual * (run.dim - len(U) + 1) / rest
        removed = coldot(RP, RP).real / diagonal
        return (coldot(RU, RU).real / values).sum() + residual - removed

    return samples
