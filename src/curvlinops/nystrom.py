"""A preconditioner from a few products with a positive semi-definite matrix."""

from __future__ import annotations

from typing import Any

import torch
from scipy.sparse.linalg import LinearOperator
from torch import Tensor

from curvlinops._counts import as_count
from curvlinops._operator import TorchOperator
from curvlinops._random import Probes, Rng, as_seed
from curvlinops.structured import OuterProductLinearOperator, as_operator

__all__ = ["NystromPreconditionerLinearOperator"]


class NystromPreconditionerLinearOperator(TorchOperator, LinearOperator):
    r"""Approximate inverse of :math:`A + \delta I` from a randomised Nyström sketch.

    .. math::

        M = (\hat\lambda_k + \delta) \, U (\hat\Lambda + \delta I)^{-1} U^\top
            + (I - U U^\top) , \qquad
        U \hat\Lambda U^\top = (A \Omega) (\Omega^\top A \Omega)^{-1} (A \Omega)^\top

    with a random orthonormal :math:`\Omega \in \mathbb{R}^{N \times k}` and
    :math:`\hat\lambda_k` the least of the :math:`k` eigenvalues.

    Parameters
    ----------
    A : LinearOperator, array, sparse matrix, or Tensor
        A symmetric positive semi-definite matrix, without the damping.
    rank : int
        The number :math:`k` of products with ``A``, at most ``N``.
    damping : float, optional
        The number :math:`\delta` of the system that is to be solved.
    rng : int, numpy.random.Generator, torch.Generator, or None, optional
        Source of the sketch's random numbers; the same seed gives the same operator.

    Raises
    ------
    ValueError
        If ``A`` is not square, ``rank`` is not between 1 and ``N``, or ``damping`` is
        negative.

    Notes
    -----
    Symmetric positive definite. Its eigenvalues on the sketched subspace approximate
    :math:`(\hat\lambda_k + \delta) (\lambda_i + \delta)^{-1}`, elsewhere they are one:
    it is the inverse of :math:`A + \delta I` up to the factor
    :math:`\hat\lambda_k + \delta`, which no Krylov method sees. With ``rank`` about 1.5
    to 2 times the effective dimension :math:`\operatorname{tr} A (A + \delta I)^{-1}`,
    the preconditioned condition number is bounded by a constant in expectation.

    Of a GGN with more parameters than data, most eigenvalues are far below the damping:
    a sketch of rank 50 saved half to three quarters of the iterations of conjugate
    gradients, for several networks. Kronecker factors, whose rank is full, cost
    iterations there. With more data than parameters and a small damping many
    eigenvalues count: ``KFACLinearOperator(...).inverse(damping,
    use_exact_damping=True)`` saves iterations then, more than a sketch of low rank.
    ``benchmarks/kfac.rst`` has a table.

    It is a snapshot of ``A`` at construction, and does not follow changes of its
    parameters or data: a solve stays right with an old one, but takes more iterations.
    Build a new one after such changes.

    Cost: ``rank`` products with ``A`` in one block at construction, and
    :math:`O(N k^2)` operations; a product takes :math:`4 N k`. Memory: :math:`N k`.

    References
    ----------
    Z. Frangella, J. Tropp and M. Udell, "Randomized Nyström preconditioning",
    arXiv:2110.02820.

    Examples
    --------
    >>> import torch
    >>> from curvlinops import NystromPreconditionerLinearOperator
    >>> A = torch.diag(torch.tensor([5.0, 3.0, 0.0, 0.0]).double())
    >>> M = NystromPreconditionerLinearOperator(A, rank=2, damping=1.0, rng=0)
    >>> eigenvalues = torch.linalg.eigvals((M @ (A + torch.eye(4)))).real
    >>> bool(torch.allclose(eigenvalues.sort().values,
    ...     torch.tensor([1.0, 1.0, 4.0, 4.0]).double()))
    True
    """

    def __init__(
        self, A: Any, rank: int, damping: float = 0.0, *, rng: Rng = None
    ) -> None:
        A = as_operator(A)
        N, number = A.shape[0], as_count(rank) or 0
        if A.shape != (N, N) or not 1 <= number <= N or damping < 0:
            raise ValueError(
                "A Nyström preconditioner needs a square matrix, 1 <= rank <= N, and "
                f"damping >= 0; got {A!r} with rank={rank}, damping={damping}."
            )
        super().__init__(A._in_space, A._out_space)
        self.damping = damping
        self.U, self.evals = _nystrom(A, number, as_seed(rng))

    def _coefficients(self) -> Tensor:
        """Return what the eigenvalues of the sketched subspace have more than one."""
        least = self.evals[-1] + self.damping
        scale = torch.where(least > 0, least / (self.evals + self.damping), 1.0)
        return scale - 1

    def _apply(self, V: Tensor) -> Tensor:
        coefficients = self.U.T @ V
        return V + self.U @ (self._coefficients().unsqueeze(1) * coefficients)

    def _low_rank(self) -> TorchOperator:
        """Return this matrix minus the identity."""
        return OuterProductLinearOperator(self._coefficients(), self.U)

    def trace(self) -> Tensor:
        return self._low_rank().trace() + self.shape[0]

    def diagonal(self) -> Tensor:
        return self._low_rank().diagonal() + 1

    def frobenius_norm(self) -> Tensor:
        rest = self.shape[0] - len(self.evals)
        return ((self._coefficients() + 1).square().sum() + rest).sqrt()

    def _slogdet(self, delta: float = 0.0) -> tuple[Tensor, Tensor]:
        return self._low_rank()._slogdet(1 + delta)

    def _inverse_of_damped(self, delta: float, **options: Any) -> Any:
        return self._low_rank()._inverse_of_damped(1 + delta)


def _nystrom(A: TorchOperator, rank: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return eigenvectors ``(N, rank)`` and eigenvalues, descending."""
    probes = Probes(A.shape[0], "normal", seed, torch.float64, A.device)
    Omega = torch.linalg.qr(probes.block(0, rank)).Q
    Y = A._apply(Omega.to(A.torch_dtype)).double()
    # a shift that makes the small matrix positive definite, taken off at the end
    shift = torch.finfo(A.torch_dtype).eps * Y.norm() * A.shape[0] ** 0.5
    shift = shift.clamp(min=torch.finfo(torch.float64).tiny)
    Y = Y + shift * Omega
    small = Omega.T @ Y
    evals, Q = torch.linalg.eigh((small + small.T) / 2)
    keep = evals.clamp(min=float(shift) * 1e-3)
    U, singular, _ = torch.linalg.svd(Y @ (Q / keep.sqrt()), full_matrices=False)
    spectrum = (singular.square() - shift).clamp(min=0)
    return U.to(A.torch_dtype), spectrum.to(A.torch_dtype)
