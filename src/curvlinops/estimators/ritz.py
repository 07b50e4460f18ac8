"""Eigenvalues of a Hermitian matrix from one Krylov space, with a certificate."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from curvlinops.estimators._base import to_numpy
from curvlinops.estimators._run import Run
from curvlinops.estimators.lanczos import BASIS_BYTES, project_out, require_symmetry

#: Steps from a fresh vector that say whether a wanted eigenvalue was missed.
CERTIFICATE = 20

#: How eigenvalues are ordered, the wanted ones first.
WHICH: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "LA": lambda values: -values,
    "LM": lambda values: -np.abs(values),
    "SA": lambda values: values,
    "SM": np.abs,
    "BE": lambda values: values,
}


def pick(values: np.ndarray, k: int, which: str) -> np.ndarray:
    """Return the indices of the ``k`` wanted eigenvalues, the first first."""
    order = np.argsort(WHICH[which](values), kind="stable")
    if which == "BE" and k < len(order):
        return np.r_[order[: k // 2], order[len(order) - (k - k // 2) :]]
    return order[:k]


@dataclass(frozen=True, eq=False)
class Ritz:
    """Approximate eigenpairs.

    Attributes
    ----------
    values : numpy.ndarray
        Of shape ``(k,)``.
    vectors : Tensor
        Orthonormal columns, of shape ``(N, k)``.
    residuals : numpy.ndarray
        ``|A v - lambda v|`` of each.
    norm : float
        Largest eigenvalue in magnitude that was seen.
    converged : bool
        Whether the error asked for was reached, and no missed eigenvalue was found.
    """

    values: np.ndarray
    vectors: Tensor
    residuals: np.ndarray
    norm: float
    converged: bool


class KrylovSpace:
    r"""An orthonormal basis that grows by products; the projection of a matrix on it.

    Every basis vector :math:`v_j` is multiplied at most once. What of :math:`A v_j` is
    not in the basis becomes its next vector, so that for the multiplied ones
    :math:`A V_m = V H`, and residuals need no products. Vectors may be added at any
    time: it is then a block method.

    Parameters
    ----------
    run : Run
        Whose products are used.
    dtype : torch.dtype
        Of the basis.
    deflated : Tensor, optional
        Orthonormal columns: the space is kept orthogonal to them.
    norm : float, optional
        Of the matrix, if known to be at least that.
    """

    def __init__(
        self,
        run: Run,
        dtype: torch.dtype,
        deflated: Tensor | None = None,
        norm: float = 0.0,
    ) -> None:
        self._run, self._dtype, self.norm = run, dtype, norm
        self._eps = torch.finfo(dtype).eps
        self._deflated = None if deflated is None else deflated.mT.to(dtype)
        self._V = torch.empty(0, run.dim, dtype=dtype, device=run.operand.device)
        self._H = np.zeros((0, 0), np.complex128 if dtype.is_complex else np.float64)
        self.size = 0
        self.done: list[int] = []
        self.queue: list[int] = []
        self.parked: list[int] = []

    def add(self, W: Tensor, scale: float = 1.0) -> np.ndarray:
        """Queue what is new in rows ``W``; return their coefficients in the basis.

        What is left of a row of norm ``scale`` counts if it is above rounding.
        """
        coefficients = np.zeros((self.size + len(W), len(W)), self._H.dtype)
        for j, w in enumerate(W):
            w = w[None].clone()
            if self._deflated is not None:
                project_out(w, self._deflated[None])
            along = to_numpy(project_out(w, self._V[None, : self.size])[0])
            coefficients[: self.size, j] = along
            rest = float(torch.linalg.vector_norm(w))
            if rest <= 10 * self._eps * scale or self.size == self.limit:
                continue
            self._grow()
            self._V[self.size] = w[0] / rest
            coefficients[self.size, j] = rest
            self.queue.append(self.size)
            self.size += 1
        return coefficients[: self.size]

    @property
    def limit(self) -> int:
        """Dimension of the whole space."""
        deflated = 0 if self._deflated is None else len(self._deflated)
        return self._run.dim - deflated

    def _grow(self) -> None:
        if self.size < len(self._V):
            return
        more = min(max(32, self.size), self._run.dim - self.size)
        self._V = torch.cat([self._V, self._V.new_empty(more, self._run.dim)])
        self._H = np.pad(self._H, (0, len(self._V) - len(self._H)))

    def step(self, count: int) -> None:
        """Multiply the vectors that are queued, at most so many."""
        now, self.queue = self.queue[:count], self.queue[count:]
        X = self._V[now]
        W = self._run.multiply(X.mT.to(self._run.operand.dtype)).mT.to(self._dtype)
        self.norm = max(self.norm, float(torch.linalg.vector_norm(W, dim=1).max()))
        coefficients = self.add(W.contiguous(), self.norm)
        self._H[: self.size, now] = coefficients
        self.done += now
        # v_i^H A v_j of two multiplied vectors was found twice.
        mine, theirs = (
            coefficients[self.done],
            self._H[np.ix_(np.array(now), np.array(self.done))],
        )
        error = np.abs(mine - theirs.conj().T).max()
        eps = self._run.operand.eps
        require_symmetry(torch.tensor([error]), torch.tensor([self.norm]), eps)

    def pairs(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return Ritz values, their coefficients, and the norms of their residuals."""
        H = self._H[np.ix_(self.done, self.done)]
        values, S = np.linalg.eigh((H + H.conj().T) / 2)
        rest = np.setdiff1d(np.arange(self.size), self.done)
        residuals = np.linalg.norm(
            self._H[np.ix_(np.array(rest, int), np.array(self.done))] @ S, axis=0
        )
        self.norm = max(self.norm, np.abs(values).max())
        return values, S, residuals

    def vectors(self, S: np.ndarray) -> Tensor:
        """Return the vectors of coefficients in the multiplied ones, as columns."""
        coefficients = self._V.new_zeros(self.size, S.shape[1])
        coefficients[self.done] = torch.from_numpy(S).to(coefficients)
        return self._V[: self.size].mT @ coefficients

    def restart(self, S: np.ndarray, values: np.ndarray) -> None:
        """Keep some Ritz vectors, and what is not multiplied (thick restart).

        References
        ----------
        Wu, Simon, "Thick-restart Lanczos method for large symmetric eigenvalue
        problems", SIAM J. Matrix Analysis and Applications 22 (2000),
        doi:10.1137/S0895479898334605.
        """
        k, rest = len(values), np.array([*self.queue, *self.parked], int)
        coupling = self._H[np.ix_(np.array(rest, int), np.array(self.done))] @ S
        kept = torch.cat([self.vectors(S).mT, self._V[rest]])
        self.size, self._H[:] = len(kept), 0
        self._V[: self.size] = kept
        self._H[range(k), range(k)] = values
        self._H[k : self.size, :k] = coupling
        moved = list(range(k, self.size))
        self.done, queued = list(range(k)), len(self.queue)
        self.queue, self.parked = moved[:queued], moved[queued:]


def eigenpairs(
    run: Run,
    k: int,
    which: str,
    tol: float,
    *,
    start: Tensor | None = None,
    ncv: int | None = None,
    max_products: int | None = None,
    dtype: torch.dtype | None = None,
    deflated: Tensor | None = None,
    norm: float = 0.0,
    certify: bool = True,
) -> Ritz:
    r"""Return the wanted Ritz pairs, to ``residual <= tol |A|`` if products suffice.

    Parameters
    ----------
    run : Run
        Whose products and test vectors are used.
    k, which : int, str
        How many, and which: ``"LA"``, ``"SA"``, ``"LM"``, ``"SM"``, ``"BE"``.
    tol : float
        Of residuals, relative to the norm of the matrix.
    start : Tensor, optional
        Vectors near the wanted ones, as columns. A random one is added always.
    ncv : int, optional
        Basis vectors at most, before a restart; default: as many as fit into 2 GiB.
    max_products : int, optional
        Products at most; never more than dimensions.
    dtype : torch.dtype, optional
        Of the basis; default: the matrix's own.
    deflated : Tensor, optional
        Orthonormal columns, eigenvectors that do not count.
    norm : float, optional
        Of the matrix, if known to be at least that.
    certify : bool, optional
        Look for missed eigenvalues.

    Notes
    -----
    A Krylov space sees one vector of an eigenspace only, and none of what its start
    vector has no part of. So once the wanted pairs have converged, a fresh random
    vector, orthogonal to all there is, is multiplied ``CERTIFICATE`` times: where its
    Ritz values belong to the wanted ones, some were missed, and the search goes on.
    """
    dtype = run.operand.dtype if dtype is None else dtype
    space = KrylovSpace(run, dtype, deflated, norm)
    limit = space.limit
    products = limit if max_products is None else min(limit, max_products)
    room = BASIS_BYTES // (run.dim * dtype.itemsize) if ncv is None else ncv
    room = min(limit, max(room, 2 * k + 10))
    drawn = 0

    def fresh() -> None:
        nonlocal drawn
        vector = run.probes.block(drawn, drawn + 1).mT.to(dtype)
        space.add(vector / torch.linalg.vector_norm(vector))
        drawn += 1

    if max(2 * k, 20) >= limit:  # nothing is cheaper than the matrix itself
        space.add(torch.eye(run.dim, dtype=dtype, device=run.operand.device))
    else:
        if start is not None:
            space.add((start / torch.linalg.vector_norm(start, dim=0)).mT.to(dtype))
        fresh()
    spent = look = 0
    certificate: tuple[int, np.ndarray] | None = None  # since when, of which values
    while True:
        block = min(len(space.queue), products - spent, run.block_size)
        space.step(block)
        spent += block
        over = spent >= products or len(space.done) == limit
        full = room < limit and space.size + len(space.queue) >= room
        if spent < look and space.queue and not over and not full:
            continue
        look = spent + max(1, spent // 10)
        values, S, residuals = space.pairs()
        wanted, rounding = pick(values, k, which), 10 * torch.finfo(dtype).eps
        accuracy = max(tol, rounding) * space.norm
        enough = len(wanted) == min(k, limit) and (residuals[wanted] <= accuracy).all()
        complete = len(space.done) == limit
        sure = complete or not certify
        if over or (enough and sure):
            break
        if certificate is not None and enough:
            since, before = certificate
            if np.abs(values[wanted] - before).max() > accuracy:
                certificate = None
            elif not space.queue or spent - since >= CERTIFICATE:
                sure = True
                break
        if enough and certificate is None:
            certificate = spent, values[wanted]
            space.parked, space.queue = [*space.queue, *space.parked], []
            fresh()
        elif not enough or not space.queue:
            certificate = None if not enough else certificate
            space.queue, space.parked = [*space.queue, *space.parked], []
        if not space.queue:
            fresh()
        if full:
            order = np.argsort(residuals, kind="stable")
            kept = np.r_[wanted, order[~np.isin(order, wanted)]][: max(k, room // 2)]
            space.restart(S[:, kept], values[kept])
    return Ritz(
        values[wanted],
        space.vectors(S[:, wanted]),
        residuals[wanted],
        space.norm,
        bool(enough and sure),
    )


def eigenvalues(run: Run) -> np.ndarray:
    """Return all eigenvalues of the Hermitian matrix, from as many products."""
    D = run.dense()
    error, scale = (D - D.mH).abs().max(), torch.linalg.vector_norm(D, dim=0).max()
    require_symmetry(error[None], scale[None], run.operand.eps)
    return to_numpy(torch.linalg.eigvalsh((D + D.mH) / 2)).astype(np.float64)


def singular_values(run: Run) -> np.ndarray:
    """Return all singular values, from as many products as there are columns."""
    return to_numpy(torch.linalg.svdvals(run.dense())).astype(np.float64)
