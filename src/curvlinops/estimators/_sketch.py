"""The range of a matrix from its products with random vectors, one left out at a time.

Background of Hutch++, XTrace, XNysTrace and XDiag.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from curvlinops.estimators._run import Run, require_num_matvecs


def coldot(X: Tensor, Y: Tensor) -> Tensor:
    r"""Return the inner products :math:`x_i^{\mathrm{H}} y_i` of the columns."""
    return (X.conj() * Y).sum(0)


def double(X: Tensor) -> Tensor:
    """Return a small matrix in double precision, real or complex."""
    return X.to(torch.promote_types(X.dtype, torch.float64))


def by_blocks(
    run: Run, start: int, stop: int, columns: Callable[[int, int], Tensor]
) -> Tensor:
    """Return columns that are computed block by block."""
    return torch.cat([columns(a, b) for a, b in run.blocks(start, stop)], dim=1)


def products(run: Run, start: int, stop: int) -> Tensor:
    """Return the products with test vectors."""
    return by_blocks(
        run, start, stop, lambda a, b: run.multiply(run.probes.block(a, b))
    )


def refine(
    run: Run,
    num_matvecs: int,
    estimate: Callable[[int], tuple[Tensor, Tensor]],
    integrand: Callable[[Tensor, Tensor], Tensor],
    grow: int,
    fresh: int = 0,
) -> Any:
    """Return the estimate of a sketch that grows until the error is reached twice.

    Parameters
    ----------
    run : Run
        The estimation.
    num_matvecs : int
        Products in all, see :func:`require_num_matvecs`.
    estimate : callable
        From a number of vectors to the mean and its standard error.
    integrand : callable
        What gives the value exactly, see :meth:`Run.mean`.
    grow, fresh : int
        Products that a vector costs, see :meth:`Run.stages`.
    """
    run.settings["num_matvecs"] = num_matvecs
    limit, reached = require_num_matvecs(run, num_matvecs, grow + fresh), False
    for k in run.stages(limit, grow, fresh):
        mean, sem = estimate(k)
        before, reached = reached, run.reached(mean, sem, k)
        if before and reached:
            break
    if num_matvecs >= run.dim and not reached:
        return run.total(integrand)
    return run.result(mean, sem, k)


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
        self.Q = self._images = run.probes.block(0, 0)
        self.R = double(self.Q[:0])

    @property
    def size(self) -> int:
        """Number of test vectors taken in."""
        return self.Q.shape[1]

    def grow(self, size: int) -> None:
        """Take in the test vectors up to ``size``."""
        Q, old = self.Q, self.size
        new = products(self._run, old, size)
        # Of both at once: columns of a low-rank matrix may leave nothing beyond Q.
        basis, triangle = torch.linalg.qr(torch.cat([Q, new], dim=1))
        self.Q = torch.cat([Q, basis[:, old:]], dim=1)
        triangle = double(triangle)
        triangle[:old] *= triangle.diagonal()[:old, None].conj()  # signs of Q
        triangle[:old, :old] = self.R
        self.R = triangle

    def images(self, adjoint: bool = False) -> Tensor:
        """Return ``A @ Q`` (or with the adjoint), of which only the rest is made."""
        run, Q, old = self._run, self.Q, self._images.shape[1]
        new = by_blocks(
            run, old, self.size, lambda a, b: run.multiply(Q[:, a:b], adjoint)
        )
        self._images = torch.cat([self._images, new], dim=1)
        return self._images


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
    run: Run, sem: Tensor, change: Callable[[int, int], Tensor], size: int
) -> Tensor:
    r"""Return the standard error of the mean of leave-one-out samples.

    .. math::
        \mathrm{se}^2 = \frac{s^2}{k} + \frac{1}{k (k - 1)} \sum_{i \neq j}
        (t_i - t_i^{(j)}) (t_j - t_j^{(i)})

    with :math:`s^2` the samples' variance and :math:`t_i^{(j)}` sample :math:`i` had
    vector :math:`j` never been drawn.

    Parameters
    ----------
    run : Run
        The estimation; without the covariance if it needs no error.
    sem : Tensor
        :math:`s / \sqrt{k}`.
    change : callable
        Returns :math:`t_i - t_i^{(j)}` for arguments ``i``, ``j``.
    size : int
        Number of vectors whose pairs are averaged.

    Notes
    -----
    The samples share vectors, so their spread alone is too small a measure. What is
    missing is the covariance of :math:`t_i` and :math:`t_j`. Given all other vectors,
    :math:`t_i^{(j)}` and :math:`t_j^{(i)}` are independent and unbiased, and
    :math:`t_j - t_j^{(i)}` has mean zero given :math:`v_i`: so of the covariance only
    the product of the two differences is left. Of a single number its average counts
    no less than its spread over so many vectors: it is noise, of either sign, where the
    other vectors leave few directions to the last.
    """
    if size < 3 or not run.needs_error:
        return sem
    total = squares = torch.zeros_like(sem)
    for i, j in combinations(range(size), 2):
        product = (change(i, j) * change(j, i).conj()).real
        total, squares = total + product, squares + product**2
    pairs = size * (size - 1) / 2
    covariance, least = total / pairs, torch.zeros_like(sem)
    if sem.ndim == 0:  # of many entries most are right
        least = (squares / pairs - covariance**2).clamp(min=0).sqrt() / size**0.5
    return (sem**2 + torch.maximum(covariance, least)).sqrt()
