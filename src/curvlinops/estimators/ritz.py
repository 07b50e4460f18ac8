"""Eigenvalues of a Hermitian matrix from one Krylov space, with a certificate."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from curvlinops._operand import to_numpy
from curvlinops.estimators._run import Run
from curvlinops.estimators._sketch import double
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

    Every basis vector :math:`v_j` is multiplied once. What of :math:`A v_j` is not in
    the basis becomes its next vector, so that :math:`A V_m = V H` for the multiplied
    ones, and residuals need no products. Vectors may be added at any time: it is then a
    block method.

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
        Vectors as rows: ``done`` that are multiplied, then others up to ``size``.
    norm : float
        Largest norm of a product so far, of a vector of norm one.
    """

    def __init__(
        self,
        run: Run,
        dtype: torch.dtype,
        deflated: Tensor | None = None,
        norm: float = 0.0,
    ) -> None:
        self._run, self.norm = run, norm
        self._deflated = run.probes.block(0, 0) if deflated is None else deflated
        self._deflated = self._deflated.mT.to(dtype)[None]
        self.basis = torch.empty(0, run.dim, dtype=dtype, device=run.operand.device)
        self._H = np.zeros((0, 0), np.complex128 if dtype.is_complex else np.float64)
        self._aside: list[tuple[Tensor, np.ndarray]] = []
        self.done = self.size = 0

    @property
    def limit(self) -> int:
        """Dimension of the whole space."""
        return self._run.dim - self._deflated.shape[1]

    def add(self, W: Tensor, norm: float | None = None) -> np.ndarray:
        """Append what is new in rows ``W``; return their coefficients in the basis.

        What is left of a row counts if it is above rounding, relative to ``norm``, or
        else to its own.
        """
        coefficients = np.zeros((self.size + len(W), len(W)), self._H.dtype)
        for j, row in enumerate(W):
            w = row[None].to(self.basis, copy=True)
            least = float(torch.linalg.vector_norm(w)) if norm is None else norm
            along = project_out(w, self.basis[None, : self.size])
            project_out(w, self._deflated)  # last: w may be small by now
            coefficients[: self.size, j] = to_numpy(along[0])
            rest = float(torch.linalg.vector_norm(w))
            if rest > 10 * torch.finfo(w.dtype).eps * least and self.size < self.limit:
                coefficients[self.size, j] = rest
                self._append(w[0] / rest)
        return coefficients[: self.size]

    def _append(self, v: Tensor) -> None:
        if self.size == len(self.basis):
            more = min(max(32, self.size), self._run.dim - self.size)
            self.basis = torch.cat([self.basis, self.basis.new_empty(more, len(v))])
            self._H = np.pad(self._H, (0, more))
        self.basis[self.size], self._H[self.size] = v, 0
        for q, row in self._aside:
            along = torch.dot(v.conj(), q)
            self._H[self.size, : len(row)] += along.item() * row
            q -= along * v
        self.size += 1

    def step(self, block: int) -> None:
        """Multiply the next vectors of the basis, so many of them."""
        m, n = self.done, self.done + block
        X = self.basis[m:n].mT.to(self._run.operand.dtype)
        W = self._run.multiply(X).mT.to(self.basis).contiguous()
        self.norm = max(self.norm, float(torch.linalg.vector_norm(W, dim=1).max()))
        coefficients = self.add(W, self.norm)
        self._H[: self.size, m:n], self.done = coefficients, n
        # v_i^H A v_j of two multiplied vectors was found twice.
        error = np.abs(coefficients[:n] - self._H[m:n, :n].conj().T).max()
        eps = self._run.operand.eps
        require_symmetry(torch.tensor([error]), torch.tensor([self.norm]), eps)

    def set_aside(self) -> None:
        """Take what is not multiplied out of the basis, for others to come first.

        As part of later vectors it still counts.
        """
        for i in range(self.done, self.size):
            self._aside.append((self.basis[i].clone(), self._H[i, : self.done].copy()))
        self.size = self.done

    def take_back(self) -> None:
        """Append what was set aside to the basis again."""
        aside, self._aside = self._aside, []
        for q, row in aside:
            coefficients = self.add(q[None], 1.0)
            self._H[: self.size, : len(row)] += coefficients * row

    def values(self) -> np.ndarray:
        """Return the Ritz values, ascending."""
        H = self._H[: self.done, : self.done]
        return np.linalg.eigvalsh((H + H.conj().T) / 2)

    def pairs(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return Ritz values, their coefficients, and the norms of their residuals."""
        H = self._H[: self.done, : self.done]
        values, S = np.linalg.eigh((H + H.conj().T) / 2)
        self.norm = max(self.norm, np.abs(values).max())
        rest = self._H[self.done : self.size, : self.done]
        return values, S, np.linalg.norm(rest @ S, axis=0)

    def vectors(self, S: np.ndarray) -> Tensor:
        """Return the vectors of coefficients in the first of the basis, as columns."""
        coefficients = torch.from_numpy(S).to(self.basis)
        return self.basis[: len(S)].mT @ coefficients

    def covered(self, start: Tensor, S: np.ndarray) -> bool:
        """Whether Ritz vectors lie in the span of other vectors, to 45 degrees."""
        cosines = torch.linalg.qr(start.to(self.basis))[0].mH @ self.vectors(S)
        return bool((torch.linalg.vector_norm(cosines, dim=0) > 0.7).all())

    def restart(self, S: np.ndarray, values: np.ndarray) -> None:
        """Keep some Ritz vectors, and what is not multiplied (thick restart).

        References
        ----------
        Wu, Simon, "Thick-restart Lanczos method for large symmetric eigenvalue
        problems", SIAM J. Matrix Analysis and Applications 22 (2000),
        doi:10.1137/S0895479898334605.
        """
        k, m, n = len(values), self.done, self.size
        coupling = self._H[m:n, :m] @ S
        kept = torch.cat([self.vectors(S).mT, self.basis[m:n]])
        self.done, self.size, self._H[:] = k, len(kept), 0
        self.basis[: self.size] = kept
        self._H[range(k), range(k)] = values
        self._H[k : self.size, :k] = coupling


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
        if not enough or not certify or space.done == space.limit:
            break
        warm = start is not None and space.covered(start, found[1])
        witness, start = (start if warm else None), None
        missed = search.missed(found[0], witness)
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
        space.take_back()
        while True:
            if space.done == space.size < space.limit:
                space.add(self.fresh())
            self.step()
            over = self.spent >= self.products or space.done == space.limit
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
                others = np.argsort(residuals)
                others = others[~np.isin(others, wanted)]
                kept = np.r_[wanted, others][: max(self.k, self.room // 2)]
                space.restart(S[:, kept], values[kept])

    def missed(self, known: np.ndarray, start: Tensor | None) -> bool | None:
        """Whether new vectors change wanted values; ``None`` if products ran out."""
        space, steps = self.space, CERTIFICATE if start is None else 1
        if self.spent < 3 * CERTIFICATE:
            space.set_aside()  # else rounding has had time to find half of a copy there
        space.add(self.fresh() if start is None else start.mT)
        while steps and space.size > space.done:
            if self.spent >= self.products:
                return None
            self.step()
            steps -= 1
            values = space.values()
            values = values[pick(values, np.zeros(1), self.k, self.which)]
            if np.abs(values - known).max() > self.accuracy:
                return True
        return False

    def step(self) -> None:
        """Multiply what is not yet, within the limits."""
        left = self.space.size - self.space.done
        left = min(left, self.products - self.spent)
        self.spent += left
        for first in range(0, left, self.run.block_size):
            self.space.step(min(self.run.block_size, left - first))

    def fresh(self) -> Tensor:
        """Return a random vector, as row."""
        self.drawn += 1
        return self.run.probes.block(self.drawn - 1, self.drawn).mT

    @property
    def accuracy(self) -> float:
        """Largest residual that is accepted: half of what was asked for.

        The other half is for eigenvalues beyond, whose Ritz values are not there yet.
        """
        rounding = 10 * torch.finfo(self.space.basis.dtype).eps
        return max(self.tol / 2, rounding) * self.space.norm


def eigenvalues(run: Run) -> np.ndarray:
    """Return all eigenvalues of the Hermitian matrix, from as many products."""
    D = run.dense()
    error, scale = (D - D.mH).abs().max(), torch.linalg.vector_norm(D, dim=0).max()
    require_symmetry(error[None], scale[None], run.operand.eps)
    return to_numpy(torch.linalg.eigvalsh(double(D + D.mH) / 2))


def singular_values(run: Run) -> np.ndarray:
    """Return all singular values, from as many products as there are columns."""
    return to_numpy(torch.linalg.svdvals(double(run.dense())))
