r"""Krylov spaces of a matrix: Lanczos, Golub-Kahan, and the Gauss rules they give.

Every rule is made of products that are at hand: with :math:`m` steps from a vector
:math:`v`, :math:`v^{\mathrm{H}} f(A) v \approx \|v\|^2 \sum_j w_j f(\theta_j)`.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from scipy.linalg import eigh_tridiagonal
from torch import Tensor

from curvlinops._operand import to_numpy
from curvlinops.estimators._run import Moments, Run

#: Bytes that the basis of Krylov vectors may take up.
BASIS_BYTES = 2**31
#: A matrix is Hermitian if what ought to vanish is below so many times rounding error.
SYMMETRY = 1e3

Multiply = Callable[[Tensor], Tensor]
T = TypeVar("T")
Stop = Callable[[np.ndarray, np.ndarray], bool]


@dataclass(frozen=True)
class Recurrence:
    """What Lanczos or Golub-Kahan found for ``K`` start vectors in ``m`` steps.

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


def block_size(run: Run, steps: int, zeros: int = 0) -> int:
    """Return how many runs' bases fit into 2 GiB at once: 0 if not even one does."""
    return BASIS_BYTES // ((run.dim + zeros) * steps * run.operand.dtype.itemsize)


class Indefinite(Exception):
    """An eigenvalue is negative where none should be."""


class NotHermitian(ValueError):
    """The Lanczos method was given a matrix that is not Hermitian."""

    def __init__(self, error: float, scale: float) -> None:
        super().__init__(
            "The Lanczos method needs a Hermitian matrix, the same in every product: "
            f"u^H A v and v^H A u differ by {error:.1e} here, for a matrix of norm "
            f"{scale:.1e} or more. Symmetrise it, e.g. (A + A.H) / 2; if products are "
            "made in lower precision than its dtype says, declare that dtype."
        )


def require_symmetry(error: Tensor, scale: Tensor, eps: float) -> None:
    """Raise unless errors are at rounding, relative to the matrix's norm."""
    if (error > SYMMETRY * eps * scale).any():
        worst = (error / scale).argmax()
        raise NotHermitian(float(error[worst]), float(scale[worst]))


def project_out(W: Tensor, basis: Tensor) -> Tensor:
    r"""Subtract from every row of ``W`` its part along ``basis[row]``; return the part.

    Parameters
    ----------
    W : Tensor
        Vectors as rows, of shape ``(K, N)``; changed.
    basis : Tensor
        Orthonormal rows, of shape ``(K, m, N)``.

    Returns
    -------
    Tensor
        Coefficients, of shape ``(K, m)``. Twice is enough (Kahan, Parlett).
    """
    total = W.new_zeros(basis.shape[:2])
    for _ in range(2):
        part = torch.bmm(basis.conj(), W[:, :, None])
        W -= torch.bmm(part.mT, basis)[:, 0]
        total += part[:, :, 0]
    return total


def _normalised(w: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return rows of norm one, or zero where there is rounding only, and the norms."""
    norms = torch.linalg.vector_norm(w, dim=1)
    norms = torch.where(norms > 10 * eps * scale, norms, 0.0)
    return torch.where(norms[:, None] > 0, w / norms[:, None], 0.0), norms


def lanczos(
    multiply: Multiply,
    start: Tensor,
    ncv: int,
    keep: bool = True,
    stop: Stop | None = None,
    *,
    eps: float | None = None,
    norm: float = 0.0,
    deflated: Tensor | None = None,
) -> Recurrence:
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
    keep : bool, optional
        Keep the basis, ``m K`` vectors, and orthogonalise against all of it. Without,
        eigenvalues may repeat ("ghosts"), and asymmetry shows in neighbours only.
    stop : callable, optional
        From the diagonals and off-diagonals after a step to whether it was the last.
    eps : float, optional
        Rounding error of a product; default: that of the vectors' dtype.
    norm : float, optional
        Of the matrix, if it is known to be larger than what the vectors see.
    deflated : Tensor, optional
        Orthonormal columns, eigenvectors to which start vectors are orthogonal, and all
        others are kept so.

    Raises
    ------
    NotHermitian
        If what full orthogonalisation must find zero is not, up to rounding.

    References
    ----------
    Golub, Van Loan, "Matrix Computations", sections 10.1-10.3.
    """
    steps = lanczos_steps(start, ncv, keep, stop, eps=eps, norm=norm, deflated=deflated)
    return answer(steps, multiply)


#: Yields blocks to be multiplied, is sent their products, and returns what it found.
Steps = Generator[Tensor, Tensor, Recurrence]


def answer(steps: Steps, multiply: Multiply) -> Recurrence:
    """Return what a method finds that asks for its products."""
    block = next(steps)
    while True:
        try:
            block = steps.send(multiply(block))
        except StopIteration as end:
            found: Recurrence = end.value
            return found


def lanczos_steps(
    start: Tensor,
    ncv: int,
    keep: bool = True,
    stop: Stop | None = None,
    *,
    eps: float | None = None,
    norm: float = 0.0,
    deflated: Tensor | None = None,
) -> Steps:
    """Do the same as :func:`lanczos`, but ask for every product.

    Parameters are those of :func:`lanczos`.
    """
    norms = torch.linalg.vector_norm(start, dim=0)
    v = (start / norms).T.contiguous()
    (K, N), dtype = v.shape, v.dtype
    eps = torch.finfo(dtype).eps if eps is None else eps
    basis = v.new_empty(K, ncv if keep else min(ncv, 2), N)
    alpha, beta = torch.zeros(2, K, ncv, dtype=torch.float64, device=v.device)
    scale = torch.full_like(alpha[:, 0], norm)
    for j in range(ncv):
        seen = j + 1 if keep else min(j + 1, 2)
        if not keep and j > 1:
            basis[:, 0] = basis[:, -1]
        basis[:, seen - 1] = v
        w = (yield v.T).T.contiguous()
        product = torch.linalg.vector_norm(w, dim=1).double()
        scale = torch.maximum(scale, product)
        known = basis[:, :seen]
        along = project_out(w, known).clone()
        if deflated is not None:  # last: w may be small by now
            project_out(w, deflated.mT.expand(K, -1, -1))
        alpha[:, j] = along[:, -1].real
        along[:, -1] -= alpha[:, j].to(along.dtype)
        if j:
            along[:, -2] -= beta[:, j - 1].to(along.dtype)
        require_symmetry(along.abs().amax(1).double(), scale, eps)
        v, norm_of_rest = _normalised(w, scale.to(w.real.dtype), eps)
        beta[:, j] = norm_of_rest
        steps = j + 1
        if stop and stop(to_numpy(alpha[:, :steps]), to_numpy(beta[:, :steps])):
            break
    a, b = to_numpy(alpha[:, :steps]), to_numpy(beta[:, :steps])
    return Recurrence(a, b, to_numpy(norms), basis if keep else None)


def hermitian_or_not(run: Run, attempt: Callable[[Multiply, int], T]) -> T:
    r"""Return ``attempt(multiply, 0)``, or with :math:`[[0, A], [A^{\mathrm{H}}, 0]]`.

    The latter if the matrix turns out not to be Hermitian, or the attempt raises
    :class:`Indefinite`: then it gets the number of zeros to put above a vector. That
    matrix's eigenvalues are plus and minus the singular values. Lanczos from a vector
    that is zero above is the bidiagonalisation of Golub and Kahan (1965,
    doi:10.1137/0702016): its vectors are zero above or below in turn, so that a step is
    one product, with :math:`A` or its adjoint, and no digits are lost to a square.
    """
    M, N = run.operand.shape

    def augmented(X: Tensor) -> Tensor:
        Y = torch.zeros_like(X)
        if X[M:].any():
            Y[:M] = run.multiply(X[M:].contiguous())
        if X[:M].any():
            Y[M:] = run.multiply(X[:M].contiguous(), adjoint=True)
        return Y

    if M == N:
        with suppress(NotHermitian, Indefinite):
            return attempt(run.multiply, 0)
    return attempt(augmented, M)


def below(zeros: int, V: Tensor) -> Tensor:
    """Return vectors as columns with so many zeros above."""
    return torch.cat([V.new_zeros(zeros, V.shape[1]), V])


@dataclass(frozen=True)
class Rule:
    """A Gauss rule: ascending nodes, and weights.

    Attributes
    ----------
    nodes, weights : numpy.ndarray
        Of one length. The weights of a run sum to one.
    alpha, beta : numpy.ndarray or None
        The recurrence behind it; ``None`` if the rule is exact for all functions, for
        it has all eigenvalues that count.
    """

    nodes: np.ndarray
    weights: np.ndarray
    alpha: np.ndarray | None = None
    beta: np.ndarray | None = None

    @classmethod
    def gauss(cls, alpha: np.ndarray, beta: np.ndarray) -> Rule:
        """Return the rule of one Lanczos run, up to an invariant subspace.

        References
        ----------
        Golub, Welsch, "Calculation of Gauss quadrature rules", Mathematics of
        Computation 23 (1969), doi:10.1090/S0025-5718-69-99647-1.
        """
        ends = np.flatnonzero(beta == 0)
        m = int(ends[0]) + 1 if len(ends) else len(alpha)
        nodes, S = eigh_tridiagonal(alpha[:m], beta[: m - 1])
        return cls(nodes, S[0] ** 2, *(() if len(ends) else (alpha, beta)))

    @property
    def rounding(self) -> float:
        """Distance below which nodes count as one."""
        return 100 * float(np.finfo(float).eps * np.abs(self.nodes).max())

    def __call__(self, function: Callable[[np.ndarray], np.ndarray]) -> Any:
        """Return the integral of a function."""
        return self.weights @ function(self.nodes)

    def indefinite(self, eps: float) -> bool:
        """Whether a node is negative, beyond rounding errors."""
        return bool(self.nodes[0] < -10 * eps * np.abs(self.nodes).max())

    def shorter(self) -> list[Rule]:
        """Return the rules of half the steps, and of one step less."""
        if self.alpha is None or self.beta is None:
            return [self]
        m = len(self.alpha)
        counts = (m // 2, m - 1) if m > 1 else ()
        return [Rule.gauss(self.alpha[:n], self.beta[:n]) for n in counts]

    def radau(self, node: float) -> Rule:
        r"""Return the rule of one more node, the given one, which costs no product.

        :math:`T` gets one more row with :math:`\beta_m` and the last entry
        :math:`a + \beta_m^2 \sum_j s_j^2 / (\theta_j - a)`, with the last entries
        :math:`s_j` of :math:`T`'s eigenvectors, so that :math:`a` is an eigenvalue. A
        rule that is exact stays as it is.

        References
        ----------
        Golub, Meurant, "Matrices, moments and quadrature with applications", Princeton
        (2010), chapter 6.
        """
        gap = self.nodes - node
        if self.alpha is None or self.beta is None:
            return self
        last = eigh_tridiagonal(self.alpha, self.beta[:-1])[1][-1]
        corner = node + self.beta[-1] ** 2 * float(np.sum(last**2 / gap))
        nodes, S = eigh_tridiagonal(np.append(self.alpha, corner), self.beta)
        return Rule(nodes, S[0] ** 2, self.alpha, self.beta)

    def below(self, end: float, eps: float) -> tuple[float, float]:
        """Return bounds of the weight of all that lies below a number.

        Those of Chebyshev, Markov and Stieltjes: the weight below a node of a rule, and
        the same with the node's own weight. If the rule is exact, what is nearer than
        rounding errors is in doubt.
        """
        if self.alpha is None:
            doubt = 10 * eps * float(np.abs(self.nodes).max())
            low, high = (self.nodes < x for x in (end - doubt, end + doubt))
            return float(self.weights[low].sum()), float(self.weights[high].sum())
        # Next to a node of its own the rule serves as it is: the corner would be huge.
        near = np.abs(self.nodes - end).min() < 1e-10 * np.abs(self.nodes).max()
        rule = self if near else self.radau(end)
        k = int(np.abs(rule.nodes - end).argmin())  # the given one, whatever rounding
        below = float(rule.weights[:k].sum())
        return below, below + float(rule.weights[k])


class Runs:
    """A stream of Lanczos runs, kept as the numbers that make their rules.

    Subclasses say with :meth:`samples` what is estimated from them.
    """

    def __init__(self) -> None:
        self.alpha = self.beta = np.zeros((0, 1))
        self.squared_norms = np.zeros(0)

    @property
    def count(self) -> int:
        """Number of runs."""
        return len(self.squared_norms)

    def add(self, samples: Recurrence) -> None:
        """Take in some runs."""
        new = {
            "alpha": samples.alpha,
            "beta": samples.beta,
            "squared_norms": samples.norms.astype(np.float64) ** 2,
        }
        old = self.state() if self.count else {name: new[name][:0] for name in new}
        self.restore({name: np.concatenate([old[name], new[name]]) for name in new})

    def keep(self, count: int) -> None:
        """Forget all but the first runs."""
        self.restore({name: array[:count] for name, array in self.state().items()})

    def rules(self) -> tuple[np.ndarray, np.ndarray]:
        """Return nodes and weights of all runs, of shape ``(R, m)``.

        Rules of fewer nodes are filled up with the last, weightless.
        """
        m = self.alpha.shape[1]
        nodes, weights = np.zeros_like(self.alpha), np.zeros_like(self.alpha)
        for i, rule in enumerate(map(Rule.gauss, self.alpha, self.beta)):
            nodes[i] = np.pad(rule.nodes, (0, m - len(rule.nodes)), mode="edge")
            weights[i, : len(rule.weights)] = rule.weights
        return nodes, weights

    def samples(self) -> tuple[np.ndarray, np.ndarray]:
        """Return a number or array of every run, along the last axis, and its error."""
        raise NotImplementedError

    def moments(self) -> Moments:
        """Return the samples' moments, with the mean of their errors."""
        values, errors = self.samples()
        moments = Moments(krylov_error=float(np.mean(errors)))
        moments.add(torch.from_numpy(values))
        return moments

    def state(self) -> dict[str, Any]:
        """Return the recurrences' coefficients and the norms."""
        return {
            name: getattr(self, name) for name in ("alpha", "beta", "squared_norms")
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go back to a state."""
        self.alpha, self.beta = state["alpha"], state["beta"]
        self.squared_norms = state["squared_norms"]
