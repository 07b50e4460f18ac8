"""The range of a matrix from its products with random vectors, one left out at a time.

Background of Hutch++, XTrace and XDiag.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from curvlinops.estimators._run import Moments, Run


def coldot(X: Tensor, Y: Tensor) -> Tensor:
    r"""Return the inner products :math:`x_i^{\mathrm{H}} y_i` of the columns."""
    return (X.conj() * Y).sum(0)


def double(X: Tensor) -> Tensor:
    """Return a small matrix in double precision, real or complex."""
    return X.to(torch.promote_types(X.dtype, torch.float64))


def multiply_blocks(
    run: Run,
    columns: Callable[[int, int], Tensor],
    start: int,
    stop: int,
    adjoint: bool = False,
) -> Tensor:
    """Return ``A @ columns(start, stop)`` (or with the adjoint), block by block."""
    A = run.operand
    Y = torch.empty(A.dim, stop - start, dtype=A.dtype, device=A.device)
    for a, b in run.blocks(start, stop):
        Y[:, a - start : b - start] = run.multiply(columns(a, b), adjoint)
    return Y


class RangeSketch:
    r"""Orthonormal basis :math:`Q` of :math:`A\Omega = QR`, which can grow.

    Attributes
    ----------
    Q : Tensor
        Of shape ``(N, k)``, with orthonormal columns.
    R : Tensor
        Of shape ``(k, k)``, upper triangular, in double precision.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        dtype, device = run.operand.dtype, run.operand.device
        self.Q = torch.empty(run.dim, 0, dtype=dtype, device=device)
        self.R = double(self.Q[:0])

    @property
    def size(self) -> int:
        """Number of test vectors taken in."""
        return self.Q.shape[1]

    def grow(self, size: int) -> None:
        """Take in the test vectors up to ``size``."""
        Q, old = self.Q, self.size
        new = multiply_blocks(self._run, self._run.probes.block, old, size)
        if not old:
            self.Q, R = torch.linalg.qr(new)
            self.R = double(R)
            return
        overlap = new.new_zeros(old, size - old)
        for _ in range(2):  # twice is enough
            coefficients = Q.mH @ new
            new -= Q @ coefficients
            overlap += coefficients
        new, triangle = torch.linalg.qr(new)
        # Columns of a low-rank matrix are noise by now, not yet orthogonal to Q.
        new = torch.linalg.qr(new - Q @ (Q.mH @ new))[0]
        self.Q = torch.cat([Q, new], dim=1)
        corner = self.R.new_zeros(size - old, old)
        upper = torch.cat([self.R, double(overlap)], dim=1)
        self.R = torch.cat([upper, torch.cat([corner, double(triangle)], dim=1)])

    def multiply_basis(self, start: int, adjoint: bool = False) -> Tensor:
        """Return ``A @ Q[:, start:]``, or with the adjoint."""
        columns = self.Q.__getitem__
        return multiply_blocks(
            self._run,
            lambda a, b: columns((slice(None), slice(a, b))),
            start,
            self.size,
            adjoint,
        )


def directions(R: Tensor) -> Tensor:
    r"""Return the unit vectors :math:`s_i` that leaving out a column takes away.

    The range of :math:`QR` without column :math:`i` is the range of
    :math:`Q(I - s_i s_i^{\mathrm{H}})`, where :math:`s_i` is column :math:`i` of
    :math:`R^{-\mathrm{H}}`, normalised (Epperly, Tropp, Webber 2024). Singular values
    at the level of rounding are raised to it, for matrices of low rank.
    """
    U, singular, Vh = torch.linalg.svd(R)
    limits = torch.finfo(R.dtype)
    floor = limits.eps * float(singular[0]) + limits.tiny
    S = U @ (Vh / singular.clamp(min=floor)[:, None])
    return S / torch.linalg.vector_norm(S, dim=0)


def complement(R: Tensor, i: int) -> Tensor:
    r"""Return an orthonormal basis, of shape ``(k, k-1)``, of all but :math:`s_i`."""
    return torch.linalg.qr(directions(R)[:, i : i + 1], mode="complete")[0][:, 1:]


def exchangeable_error(
    run: Run, samples: Callable[[int | None], Tensor], size: int
) -> tuple[Tensor, Tensor]:
    r"""Return the mean of leave-one-out samples and its standard error.

    .. math::
        \mathrm{se}^2 = \frac{s^2}{k} + \frac{1}{k (k - 1)} \sum_{i \neq j}
        (t_i - t_i^{(j)}) (t_j - t_j^{(i)})

    with :math:`s^2` the samples' variance and :math:`t_i^{(j)}` sample :math:`i` had
    vector :math:`j` never been drawn.

    Parameters
    ----------
    run : Run
        The estimation; the error is NaN if it needs none.
    samples : callable
        Returns :math:`(t_i)_i`, or for an argument ``j`` :math:`(t_i^{(j)})_{i \ne j}`.
    size : int
        Number of samples.

    Notes
    -----
    The samples share vectors, so their spread alone is too small a measure. What is
    missing is the covariance of :math:`t_i` and :math:`t_j`. Given all other vectors,
    :math:`t_i^{(j)}` and :math:`t_j^{(i)}` are independent and unbiased, and
    :math:`t_j - t_j^{(i)}` has mean zero given :math:`v_i`: so of the covariance only
    the product of the two differences is left. It is averaged over at most 32 vectors.
    """
    terms = samples(None)
    moments = Moments()
    moments.add(terms)
    mean, sem = moments.mean_and_sem()
    if size < 3 or not run.needs_error:
        return mean, sem
    paired = min(size, 32)
    change = terms.new_zeros(paired, paired)
    for j in range(paired):
        others = torch.arange(size, device=terms.device) != j
        change[others[:paired], j] = (terms[others] - samples(j))[: paired - 1]
    covariance = (change * change.mH).real.sum() / (paired * (paired - 1))
    return mean, (sem**2 + covariance.clamp(min=0)).sqrt()
