"""The Lanczos recurrence, for several vectors at once, and Gauss quadrature by it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.linalg import eigh_tridiagonal
from torch import Tensor

from curvlinops.estimators._base import (
    Operand,
    require_choice,
    require_positive_int,
    to_numpy,
)

#: Bytes that the basis of Krylov vectors may take up.
BASIS_BYTES = 2**31
REORTHOGONALIZATIONS = ("auto", "full", "selective", "none")


@dataclass(frozen=True)
class Tridiagonal:
    """What Lanczos found for ``K`` start vectors in ``m`` steps.

    Attributes
    ----------
    alpha : numpy.ndarray
        Diagonals, of shape ``(K, m)``, in float64.
    beta : numpy.ndarray
        Off-diagonals, of shape ``(K, m)``; the last is the norm of the residual. Zero
        where an invariant subspace was found: the steps after it have no weight.
    norms : numpy.ndarray
        Norms of the start vectors, of shape ``(K,)``.
    basis : Tensor or None
        Krylov vectors, of shape ``(K, m, N)``, if they were kept.
    """

    alpha: np.ndarray
    beta: np.ndarray
    norms: np.ndarray
    basis: Tensor | None


def choose_reorthogonalization(choice: str, operand: Operand, ncv: int) -> str:
    """Resolve ``"auto"``: full if the basis of one run fits into 2 GiB, else none."""
    require_choice("reorthogonalization", choice, REORTHOGONALIZATIONS)
    if choice != "auto":
        return choice
    size = operand.dim * ncv * operand.dtype.itemsize
    return "full" if size <= BASIS_BYTES else "none"


def require_ncv(ncv: int, dim: int) -> int:
    """Return the number of Lanczos steps, or raise with the rule that it breaks."""
    require_positive_int("ncv", ncv)
    if ncv > dim:
        raise ValueError(
            f"ncv ({ncv}) must not be above the dimension ({dim}): a Krylov space "
            "is no larger than that."
        )
    return int(ncv)


def lanczos(
    multiply: Callable[[Tensor], Tensor],
    start: Tensor,
    ncv: int,
    reorthogonalization: str = "full",
    stop: Callable[[np.ndarray, np.ndarray], bool] | None = None,
) -> Tridiagonal:
    r"""Reduce a Hermitian matrix to tridiagonal form, :math:`V^{\mathrm{H}} A V = T`.

    .. math::
        \beta_j v_{j+1} = A v_j - \alpha_j v_j - \beta_{j-1} v_{j-1}

    Parameters
    ----------
    multiply : callable
        From a block of shape ``(N, K)`` to its product of the same shape.
    start : Tensor
        Start vectors as columns, of shape ``(N, K)``.
    ncv : int
        Steps ``m``: products per start vector.
    reorthogonalization : str, optional
        ``"full"``: against all earlier vectors, twice (Gram-Schmidt); ``"selective"``:
        against converged Ritz vectors only, which is where orthogonality gets lost;
        ``"none"``: the recurrence alone, whose eigenvalues may repeat ("ghosts"). All
        but the last keep the basis, ``m K`` vectors.
    stop : callable, optional
        From the diagonals and off-diagonals after a step to whether it was the last.

    Returns
    -------
    Tridiagonal
        Diagonals, off-diagonals and basis.

    Raises
    ------
    ValueError
        If the second product shows that the matrix is not Hermitian.

    References
    ----------
    Golub, Van Loan, "Matrix Computations", section 10.1-10.3. Parlett, Scott, "The
    Lanczos algorithm with selective orthogonalization", Mathematics of Computation 33
    (1979), doi:10.1090/S0025-5718-1979-0514820-3.
    """
    norms = torch.linalg.vector_norm(start, dim=0)
    v = (start / norms).T.contiguous()
    (K, N), eps = v.shape, torch.finfo(v.dtype).eps
    keep = reorthogonalization != "none"
    basis = v.new_empty(K, ncv, N) if keep else None
    alpha, beta = (
        torch.zeros(K, ncv, dtype=torch.float64, device=v.device) for _ in range(2)
    )
    previous = torch.zeros_like(v)
    locked: dict[int, Tensor] = {}
    for j in range(ncv):
        if basis is not None:
            basis[:, j] = v
        w = multiply(v.T).T.contiguous()
        a = (v.conj() * w).real.sum(1, keepdim=True)
        w -= a * v
        if j == 1:
            _require_hermitian(previous, w, beta[:, 0])
        if j:
            w -= beta[:, j - 1, None].to(a.dtype) * previous
        if reorthogonalization == "full" and basis is not None:
            for _ in range(2):
                _project_out(w, basis[:, : j + 1])
        alpha[:, j] = a[:, 0]
        b = torch.linalg.vector_norm(w, dim=1, keepdim=True)
        if reorthogonalization == "selective" and basis is not None:
            beta[:, j] = b[:, 0]
            for i in range(K):
                _lock(locked, i, basis[i, : j + 1], alpha[i], beta[i], eps)
                if i in locked:
                    _project_out(w[i : i + 1], locked[i][None])
            b = torch.linalg.vector_norm(w, dim=1, keepdim=True)
        scale = torch.maximum(alpha.abs(), beta).amax(1, keepdim=True)
        b = torch.where(b > 10 * eps * scale, b, 0.0)
        beta[:, j] = b[:, 0]
        previous, v = v, torch.where(b > 0, w / b, 0.0)
        steps = j + 1
        if stop and stop(to_numpy(alpha[:, :steps]), to_numpy(beta[:, :steps])):
            break
    alpha, beta = alpha[:, :steps], beta[:, :steps]
    return Tridiagonal(to_numpy(alpha), to_numpy(beta), to_numpy(norms), basis)


def _require_hermitian(first: Tensor, w: Tensor, beta: Tensor) -> None:
    """Raise unless the second product has the part along the first vector it must."""
    difference = ((first.conj() * w).sum(1) - beta).abs()
    rounding = torch.finfo(w.dtype).eps ** 0.5 * torch.linalg.vector_norm(w, dim=1)
    if (difference > 0.1 * beta + rounding).any():
        raise ValueError(
            "The Lanczos method needs a Hermitian matrix, the same in every product: "
            "v_1^H A v_2 and v_2^H A v_1 are not conjugate here."
        )


def _project_out(w: Tensor, basis: Tensor) -> None:
    """Subtract from every row of ``w`` its part along orthonormal ``basis[row]``."""
    coefficients = torch.bmm(basis.conj(), w[:, :, None])
    w -= torch.bmm(coefficients.mT, basis)[:, 0]


def _lock(
    locked: dict[int, Tensor],
    run: int,
    basis: Tensor,
    alpha: Tensor,
    beta: Tensor,
    eps: float,
) -> None:
    """Form the Ritz vectors that converged to the square root of rounding."""
    size = len(basis)
    nodes, vectors = eigh_tridiagonal(
        to_numpy(alpha[:size]), to_numpy(beta[: size - 1])
    )
    error = float(beta[size - 1]) * np.abs(vectors[-1])
    converged = np.flatnonzero(error < np.sqrt(eps) * np.abs(nodes).max())
    if len(converged) > len(locked.get(run, ())):
        chosen = torch.from_numpy(vectors[:, converged]).to(basis.device, basis.dtype)
        locked[run] = torch.linalg.qr(basis.T @ chosen)[0].T.contiguous()


def gauss_rules(alpha: np.ndarray, beta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    r"""Return nodes and weights such that :math:`v^{\mathrm{H}} f(A) v = \sum w f`.

    Parameters
    ----------
    alpha, beta : numpy.ndarray
        Of shape ``(K, m)``, as in :class:`Tridiagonal`.

    Returns
    -------
    tuple of numpy.ndarray
        Nodes, ascending, and weights, which sum to one, of shape ``(K, m)``.

    References
    ----------
    Golub, Welsch, "Calculation of Gauss quadrature rules", Mathematics of Computation
    23 (1969), doi:10.1090/S0025-5718-69-99647-1.
    """
    rules = [_gauss_rule(a, b[:-1]) for a, b in zip(alpha, beta, strict=True)]
    nodes, weights = zip(*rules, strict=True)
    return np.array(nodes), np.array(weights)


def _gauss_rule(alpha: np.ndarray, beta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return one run's rule; past an invariant subspace the last node, weightless."""
    ends = np.flatnonzero(beta == 0)
    steps = int(ends[0]) + 1 if len(ends) else len(alpha)
    nodes, vectors = eigh_tridiagonal(alpha[:steps], beta[: steps - 1])
    missing = (0, len(alpha) - steps)
    return np.pad(nodes, missing, mode="edge"), np.pad(vectors[0] ** 2, missing)


class GaussRules:
    """A stream of Lanczos runs, and the statistic of them that is asked for.

    Parameters
    ----------
    statistic : callable
        From nodes, weights (each of shape ``(R, m)``) and squared norms of the start
        vectors (``(R,)``) to samples along the last axis.
    """

    def __init__(
        self, statistic: Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]
    ) -> None:
        self._statistic = statistic
        self._alpha = self._beta = np.zeros((0, 1))
        self._norms = np.zeros(0)

    @property
    def count(self) -> int:
        """Number of runs."""
        return len(self._norms)

    def keep(self, count: int) -> None:
        """Forget all but the first runs."""
        self.restore({name: array[:count] for name, array in self.state().items()})

    def add(self, samples: Tridiagonal) -> None:
        """Take in some runs."""
        new = {
            "alpha": samples.alpha,
            "beta": samples.beta,
            "norms": samples.norms.astype(np.float64) ** 2,
        }
        old = self.state() if self.count else {name: new[name][:0] for name in new}
        self.restore({name: np.concatenate([old[name], new[name]]) for name in new})

    def rules(self, drop: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Return nodes and weights, of the runs as if ``drop`` steps shorter."""
        steps = max(self._alpha.shape[1] - drop, 1)
        return gauss_rules(self._alpha[:, :steps], self._beta[:, :steps])

    def samples(self, drop: int = 0) -> np.ndarray:
        """Return the statistic of every run."""
        return self._statistic(*self.rules(drop), self._norms)

    def mean_and_sem(self) -> tuple[Tensor, Tensor]:
        """Return the statistic's mean and standard error (NaN for one run)."""
        samples = self.samples()
        mean = torch.as_tensor(samples.mean(-1))
        if self.count < 2:
            return mean, torch.full_like(mean, torch.nan)
        sem = samples.std(-1, ddof=1) / np.sqrt(self.count)
        return mean, torch.as_tensor(sem)

    def truncation_error(self) -> float:
        """Return how much the mean changes if a tenth of the steps is left out."""
        steps = self._alpha.shape[1]
        if steps == 1:
            return float("nan")
        shorter = self.samples(drop=-(-steps // 10))
        return float(np.linalg.norm(self.samples().mean(-1) - shorter.mean(-1)))

    def state(self) -> dict[str, Any]:
        """Return the tridiagonal matrices and the norms."""
        return {"alpha": self._alpha, "beta": self._beta, "norms": self._norms}

    def restore(self, state: dict[str, Any]) -> None:
        """Go back to a state."""
        self._alpha, self._beta = state["alpha"], state["beta"]
        self._norms = state["norms"]
