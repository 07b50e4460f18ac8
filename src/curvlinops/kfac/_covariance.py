"""Covariances with as few operations as their symmetry and structure allow."""

from __future__ import annotations

from typing import Any

from torch import Tensor

#: Below this size a covariance is one product.
LEAST_SIZE = 128


def gram(total: Tensor, rows: Tensor) -> None:
    r"""Add :math:`X^\top X` of every group's rows ``(G, M, d)`` to an upper triangle.

    Parameters
    ----------
    total : Tensor
        Of shape ``(G, d, d)``; the lower triangle is left undefined. If it is
        ``(G, d)``, the diagonal is added.
    rows : Tensor
        The rows :math:`X`.
    """
    rows = rows.to(total.dtype)
    if total.ndim == 2:
        total += rows.square().sum(1)
        return
    d = rows.shape[-1]
    if d < 2 * LEAST_SIZE:
        total.baddbmm_(rows.mT, rows)
        return
    half = d // 2
    left, right = rows[..., :half], rows[..., half:]
    gram(total[:, :half, :half], left)
    gram(total[:, half:, half:], right)
    total[:, :half, half:].baddbmm_(left.mT, right)


def patch_covariance(total: Tensor, use: Any, joint: bool) -> int | None:
    """Add the covariance of a convolution's patches; ``None`` if there is no short cut."""
    return None
