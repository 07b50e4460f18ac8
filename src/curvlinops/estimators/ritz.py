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

#: How eigenvalues are ordered, the wanted ones first; "BE" is half "SA", half "LA".
WHICH: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "LA": lambda values: -values,
    "LM": lambda values: -np.abs(values),
    "SA": lambda values: values,
    "SM": np.abs,
    "BE": lambda values: values,
}


def pick(values: np.ndarray, handicap: np.ndarray, k: int, which: str) -> np.ndarray:
    """Return the indices of the ``k`` wanted eigenvalues, the first first.

    Those with a handicap are wanted only if they are ahead of others by more than that.
    """
    if which == "BE" and k < len(values):
        low = pick(values, handicap, k // 2, "SA")
        return np.r_[low, pick(values, handicap, k - k // 2, "LA")[::-1]]
    return np.argsort(WHICH[which](values) + handicap, kind="stable")[:k]


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

    Attributes
    ----------
    basis : Tensor
        Vectors as rows, the first ``size`` of them in use.
    done, queue, parked : list of int
        Vectors that are multiplied, to be multiplied, and set aside.
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
        self.basis = torch.empty(0, run.dim, dtype=dtype, device=run.operand.device)
        self._H = np.zeros((0, 0), np.complex128 if dtype.is_complex else np.float64)
        self.size = 0
        self.done: list[int] = []
        self.queue: list[int] = []
        self.parked: list[int] = []

    def park(self, left: int) -> None:
        """Set the queued vectors aside, but for the last ``left``."""
        first = max(len(self.queue) - left, 0)
        self.parked += self.queue[:first]
        self.queue = self.queue[first:]

    def unpark(self) -> None:
        """Queue again what was set aside."""
        self.queue, self.parked = [*self.queue, *self.parked], []

    def covered(self, start: Tensor, S: np.ndarray) -> bool:
        """Whether Ritz vectors lie in the span of other vectors, to 45 degrees."""
        Q = torch.linalg.qr(start.to(self.basis))[0]
        return bool(
            (torch.linalg.vector_norm(Q.mH @ self.vectors(S), dim=0) > 0.7).all()
        )

    def add(self, W: Tensor, norm: float | None = None) -> np.ndarray:
        """Queue what is new in rows ``W``; return their coefficients in the basis.

        What is left of a row counts if it is above rounding, relative to ``norm``, or
        else to its own.
        """
        coefficients = np.zeros((self.size + len(W), len(W)), self._H.dtype)
        for j, w in enumerate(W):
            w = w[None].to(self.basis, copy=True)
            scale = float(torch.linalg.vector_norm(w)) if norm is None else norm
            if self._deflated is not None:
                project_out(w, self._deflated[None])
            along = to_numpy(project_out(w, self.basis[None, : self.size])[0])
            coefficients[: self.size, j] = along
            rest = float(torch.linalg.vector_norm(w))
            if rest <= 10 * self._eps * scale or self.size == self.limit:
                continue
            self._grow()
            self.basis[self.size] = w[0] / rest
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
        if self.size < len(self.basis):
            return
        more = min(max(32, self.size), self._run.dim - self.size)
        self.basis = torch.cat([self.basis, self.basis.new_empty(more, self._run.dim)])
        self._H = np.pad(self._H, (0, len(self.basis) - len(self._H)))

    def step(self, block: int) -> None:
        """Multiply the vectors that are queued, at most so many."""
        now, self.queue = self.queue[:block], self.queue[block:]
        X = self.basis[now]
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
        values, S = np.linalg.eigh(self.projection(0))
        rest = np.setdiff1d(np.arange(self.size), self.done)
        residuals = np.linalg.norm(
            self._H[np.ix_(np.array(rest, int), np.array(self.done))] @ S, axis=0
        )
        self.norm = max(self.norm, np.abs(values).max())
        return values, S, residuals

    def projection(self, first: int) -> np.ndarray:
        """Return the matrix's projection on what was multiplied since then."""
        H = self._H[np.ix_(self.done[first:], self.done[first:])]
        return (H + H.conj().T) / 2

    def vectors(self, S: np.ndarray) -> Tensor:
        """Return the vectors of coefficients in the multiplied ones, as columns."""
        coefficients = self.basis.new_zeros(self.size, S.shape[1])
        coefficients[self.done[: len(S)]] = torch.from_numpy(S).to(coefficients)
        return self.basis[: self.size].mT @ coefficients

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
        kept = torch.cat([self.vectors(S).mT, self.basis[rest]])
        self.size, self._H[:] = len(kept), 0
        self.basis[: self.size] = kept
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
        Vectors near the wanted ones, as columns. They serve as certificate.
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
    Vectors ``start`` that span the wanted ones roughly, found for another matrix, are
    as good, and need to be multiplied only once: of a second copy they have a part.
    """
    dtype = run.operand.dtype if dtype is None else dtype
    space = KrylovSpace(run, dtype, deflated, norm)
    products = space.limit if max_products is None else min(space.limit, max_products)
    room = BASIS_BYTES // (run.dim * dtype.itemsize) if ncv is None else ncv
    search = _Search(run, space, k, which, tol, products, max(room, 2 * k + 10))
    if max(2 * k, 20) >= space.limit:  # nothing is cheaper than the matrix itself
        space.add(torch.eye(run.dim).to(space.basis))
    while True:
        found, enough = search.converge()
        if not enough or not certify or len(space.done) == space.limit:
            break
        warm = start is not None and space.covered(start, found[1])
        witness, start = (start if warm else None), None
        missed = search.missed(found[0], witness, 1 if warm else CERTIFICATE)
        if not missed:
            enough = missed is not None
            break
    values, S, residuals = found
    return Ritz(values, space.vectors(S), residuals, space.norm, enough)


Pairs = tuple[np.ndarray, np.ndarray, np.ndarray]


@dataclass
class _Search:
    """A search for eigenpairs; its arguments are those of :func:`eigenpairs`."""

    run: Run
    space: KrylovSpace
    k: int
    which: str
    tol: float
    products: int
    room: int
    spent: int = 0
    drawn: int = 0

    def converge(self) -> tuple[Pairs, bool]:
        """Return the wanted pairs, and if their residuals are as small as asked."""
        space, look = self.space, 0
        space.unpark()
        while True:
            if not space.queue and len(space.done) < space.limit:
                self.add(None)
            self.step()
            over = self.spent >= self.products or len(space.done) == space.limit
            full = self.room < space.limit and space.size >= self.room
            if self.spent < look and not over and not full:
                continue
            look = self.spent + max(1, self.spent // 10)
            values, S, residuals = space.pairs()
            handicap = self.accuracy * (residuals > self.accuracy)
            wanted = pick(values, handicap, self.k, self.which)
            enough = len(wanted) == self.k and not handicap[wanted].any()
            if over or enough:
                return (values[wanted], S[:, wanted], residuals[wanted]), bool(enough)
            if full:
                others = np.setdiff1d(np.argsort(residuals), wanted, assume_unique=True)
                kept = np.r_[wanted, others][: max(self.k, self.room // 2)]
                space.restart(S[:, kept], values[kept])

    def missed(
        self, known: np.ndarray, start: Tensor | None, steps: int
    ) -> bool | None:
        """Whether new vectors show an eigenvalue that is wanted more than known ones.

        Their space, orthogonal to the known vectors, begins with what is not multiplied
        yet, and goes on from the new ones alone. ``None`` if products ran out.
        """
        space, before = self.space, len(self.space.done)
        self.add(start)
        while steps and space.queue:
            if self.spent >= self.products:
                return None
            self.step()
            new = np.linalg.eigvalsh(space.projection(before))
            handicap = self.accuracy * (np.arange(len(known) + len(new)) >= len(known))
            if pick(np.r_[known, new], handicap, self.k, self.which).max() >= self.k:
                return True
            steps -= 1
            space.park(1)
        return False

    def step(self) -> None:
        """Multiply what is queued, within the limits."""
        left = min(len(self.space.queue), self.products - self.spent)
        self.spent += left
        for first in range(0, left, self.run.block_size):
            self.space.step(min(self.run.block_size, left - first))

    def add(self, vectors: Tensor | None) -> None:
        """Queue vectors, or a random one."""
        if vectors is None:
            vectors = self.run.probes.block(self.drawn, self.drawn + 1)
            self.drawn += 1
        self.space.add(vectors.mT.to(self.space.basis))

    @property
    def accuracy(self) -> float:
        """Largest residual that is accepted."""
        rounding = 10 * torch.finfo(self.space.basis.dtype).eps
        return max(self.tol, rounding) * self.space.norm


def eigenvalues(run: Run) -> np.ndarray:
    """Return all eigenvalues of the Hermitian matrix, from as many products."""
    D = run.dense()
    error, scale = (D - D.mH).abs().max(), torch.linalg.vector_norm(D, dim=0).max()
    require_symmetry(error[None], scale[None], run.operand.eps)
    return to_numpy(torch.linalg.eigvalsh((D + D.mH) / 2)).astype(np.float64)


def singular_values(run: Run) -> np.ndarray:
    """Return all singular values, from as many products as there are columns."""
    return to_numpy(torch.linalg.svdvals(run.dense())).astype(np.float64)
