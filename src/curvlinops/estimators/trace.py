r"""Estimators of :math:`\mathrm{tr}(A)` from products with random vectors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from curvlinops.estimators._run import (
    Moments,
    Options,
    Run,
    require_num_matvecs,
)
from curvlinops.estimators._sketch import (
    RangeSketch,
    coldot,
    complement,
    directions,
    double,
    exchangeable_error,
    multiply_blocks,
)

if TYPE_CHECKING:
    from typing_extensions import Unpack


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
        Products :math:`m`, below ``N``; with ``until`` the limit.
    distribution : str, optional
        ``"rademacher"`` (entries ±1), ``"normal"``, or ``"sphere"``.
    **options : Options
        ``rng``, ``until``, ``return_estimate``, ``block_size``, ``checkpoint``,
        ``progressbar``: see :class:`~curvlinops.estimators.Options`.

    Returns
    -------
    Tensor, numpy scalar, or Estimate
        The unbiased estimate, in the unit of ``A``.

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
        m = require_num_matvecs(run, num_matvecs)
        return run.mean(lambda V: coldot(V, run.multiply(V, record=False)), m)


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
        Products :math:`m`: a multiple of 3, below ``N``; with ``until`` the limit.
    distribution : str, optional
        ``"rademacher"`` (entries ±1), ``"normal"``, or ``"sphere"``.
    **options : Options
        See :class:`~curvlinops.estimators.Options`. With ``until`` the subspace is
        doubled, and the rest sampled anew, until the error is reached.

    Returns
    -------
    Tensor, numpy scalar, or Estimate
        The unbiased estimate, in the unit of ``A``. The standard error is that of the
        second term, given the subspace.

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
    size: dict[str, Any] = {"num_matvecs": num_matvecs}
    with Run(A, "hutchpp_trace", options, distribution, num_matvecs, **size) as run:
        limit = require_num_matvecs(run, num_matvecs, multiple_of=3)
        sketch, exact, spent = RangeSketch(run), torch.zeros(()), 0

        def residual(V: Tensor) -> Tensor:
            V = V - Q @ (Q.mH @ V)
            return coldot(V, run.multiply(V))

        for stage in run.stages(limit):
            k, old = min(stage, (num_matvecs - spent) // 3), sketch.size
            if k <= old:
                break
            sketch.grow(k)
            Q = sketch.Q
            for a, b in run.blocks(old, k):
                exact = exact + double(coldot(Q[:, a:b], run.multiply(Q[:, a:b]))).sum()
            moments = Moments(offset=exact)
            run.accumulate(moments, residual, k, start=limit + spent)
            spent += moments.count
            if run.enough(moments):
                break
        return run.result(*moments.mean_and_sem(), moments.count)


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
        Products :math:`m`: a multiple of 2, below ``N``; with ``until`` the limit.
    distribution : str, optional
        ``"rademacher"`` (entries ±1), ``"normal"``, or ``"sphere"``. With the last two
        the residuals :math:`P_{(i)} v_i` are scaled to their expected norm, which
        lowers the variance.
    **options : Options
        See :class:`~curvlinops.estimators.Options`.

    Returns
    -------
    Tensor, numpy scalar, or Estimate
        The unbiased estimate, in the unit of ``A``. The standard error accounts for
        the dependence of the samples, which share vectors.

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
    size: dict[str, Any] = {"num_matvecs": num_matvecs}
    with Run(A, "xtrace", options, distribution, num_matvecs, **size) as run:
        limit = require_num_matvecs(run, num_matvecs, multiple_of=2)
        sketch, Z = RangeSketch(run), None
        for k in run.stages(limit):
            start = sketch.size
            sketch.grow(k)
            new = sketch.multiply_basis(start)
            Z = new if Z is None else torch.cat([Z, new], dim=1)
            core = _XTraceCore.of(run, sketch, Z)
            mean, sem = exchangeable_error(run, core.samples, k)
            if run.reached(mean, sem, k):
                break
        return run.result(mean, sem, k)


@dataclass(frozen=True)
class _XTraceCore:
    """Inner products of the test vectors ``V``, ``A V = Q R``, and ``Z = A Q``."""

    H: Tensor  # Q^H A Q
    R: Tensor
    W: Tensor  # Q^H V
    VZ: Tensor  # V^H A Q
    norms: Tensor | None  # of the columns of V, squared, if residuals are rescaled
    dim: int

    @classmethod
    def of(cls, run: Run, sketch: RangeSketch, Z: Tensor) -> _XTraceCore:
        """Compute the inner products, block by block."""
        Q, W, VZ, norms = sketch.Q, [], [], []
        for a, b in run.blocks(0, sketch.size):
            V = run.probes.block(a, b)
            W.append(double(Q.mH @ V))
            VZ.append(double(V.mH @ Z))
            norms.append(double(torch.linalg.vector_norm(V, dim=0)) ** 2)
        scaled = torch.cat(norms) if run.rotation_invariant else None
        H = double(Q.mH @ Z)
        return cls(H, sketch.R, torch.cat(W, 1), torch.cat(VZ), scaled, run.dim)

    def samples(self, left_out: int | None) -> Tensor:
        """Return the leave-one-out samples, without one of the vectors if asked.

        With ``P_(i) = I - Q (I - s_i s_i^H) Q^H``, ``w_i = Q^H v_i`` and
        ``x_i = (I - s_i s_i^H) w_i``, the residual is ``P_(i) v_i = v_i - Q x_i``.
        """
        if left_out is not None:
            return self._without(left_out).samples(None)
        H, R, W, S = self.H, self.R, self.W, directions(self.R)
        k, SW = len(H), coldot(S, W)
        X = W - S * SW
        residual = SW.conj() * coldot(S, R) + coldot(X, H @ X) - (self.VZ.T * X).sum(0)
        if self.norms is not None:
            rest = self.norms - torch.linalg.vector_norm(X, dim=0) ** 2
            residual = residual * ((self.dim - k + 1) / rest)
        return H.trace() + residual - coldot(S, H @ S)

    def _without(self, j: int) -> _XTraceCore:
        N = complement(self.R, j)
        keep = torch.arange(len(self.R), device=self.R.device) != j
        return _XTraceCore(
            N.mH @ self.H @ N,
            N.mH @ self.R[:, keep],
            N.mH @ self.W[:, keep],
            self.VZ[keep] @ N,
            None if self.norms is None else self.norms[keep],
            self.dim,
        )


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
        Products :math:`m`, below ``N``; with ``until`` the limit.
    distribution : str, optional
        ``"rademacher"`` (entries ±1), ``"normal"``, or ``"sphere"``. With the last two
        residuals are scaled to their expected norm, which lowers the variance.
    **options : Options
        See :class:`~curvlinops.estimators.Options`.

    Returns
    -------
    Tensor, numpy scalar, or Estimate
        The estimate, in the unit of ``A``; unbiased up to rounding. The standard error
        accounts for the dependence of the samples, which share vectors.

    Raises
    ------
    ValueError
        If an argument breaks its rule, a product is not finite, or the matrix turns
        out not to be positive semi-definite.

    Notes
    -----
    Costs ``m`` products and the memory of ``4 m`` vectors. A shift by rounding error
    times :math:`\|A\Omega\|_F` makes the inverse safe, and is taken off again.

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
    size: dict[str, Any] = {"num_matvecs": num_matvecs}
    with Run(A, "xnystrace", options, distribution, num_matvecs, **size) as run:
        limit = require_num_matvecs(run, num_matvecs)
        Y: Tensor | None = None
        for k in run.stages(limit):
            start = 0 if Y is None else Y.shape[1]
            new = multiply_blocks(run, run.probes.block, start, k)
            Y = new if Y is None else torch.cat([Y, new], dim=1)
            mean, sem = exchangeable_error(run, _xnystrace_samples(run, Y), k)
            if run.reached(mean, sem, k):
                break
        return run.result(mean, sem, k)


def _xnystrace_samples(run: Run, Y: Tensor) -> Callable[[int | None], Tensor]:
    """Return the samples from ``Y = A V`` as function of a vector never drawn.

    With ``C^H C = V^H Y`` the approximation is ``B B^H``, ``B = Y C^-1``. Leaving out
    ``v_i`` lowers it by ``u u^H`` with ``u = B t / |t|``, ``t = C^-H e_i``. It
    reproduces ``Y``, so that ``v_i`` sees ``1 / |t|^2`` of the rest.
    """
    k, dim = Y.shape[1], run.dim
    shift = float(torch.linalg.matrix_norm(Y)) * torch.finfo(Y.dtype).eps
    V = torch.cat([run.probes.block(a, b) for a, b in run.blocks(0, k)], dim=1)
    shifted = Y + shift * V
    VY, VV = double(V.mH @ shifted), double(V.mH @ V)
    R = double(torch.linalg.qr(shifted, mode="r")[1])

    def samples(left_out: int | None) -> Tensor:
        keep = torch.arange(k, device=Y.device) != (
            -1 if left_out is None else left_out
        )
        core, size = VY[keep][:, keep], int(keep.sum())
        C, info = torch.linalg.cholesky_ex((core + core.mH) / 2, upper=True)
        if int(info):
            raise ValueError(
                "xnystrace needs a positive semi-definite matrix; this one has "
                "negative quadratic forms. Use xtrace, which takes any matrix."
            )
        B = torch.linalg.solve_triangular(C, R[:, keep], upper=True, left=False)
        T = torch.linalg.inv(C).mH
        norms = coldot(T, T).real
        BT = B @ T
        residual = 1 / norms
        if run.rotation_invariant:
            rest = 1 / torch.linalg.inv(VV[keep][:, keep]).diagonal().real
            residual = residual * (dim - size + 1) / rest
        removed = coldot(BT, BT).real / norms
        return coldot(B, B).real.sum() + residual - removed - shift * dim

    return samples
