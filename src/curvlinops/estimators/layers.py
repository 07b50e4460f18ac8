"""Every layer's curvature in one table, from products with the whole matrix."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.linalg import eigh_tridiagonal
from torch import Tensor

from curvlinops._operand import to_numpy
from curvlinops._random import Rng
from curvlinops.estimators._base import require_positive_int
from curvlinops.estimators._blocks import Blocks, block_places
from curvlinops.estimators._layer_table import QUANTITIES, LayerSummary
from curvlinops.estimators._run import Moments, Options, Run
from curvlinops.estimators._sketch import double
from curvlinops.estimators.functions import Integrand, bracketed
from curvlinops.estimators.lanczos import (
    BASIS_BYTES,
    Recurrence,
    Rule,
    lanczos_steps,
    project_out,
    require_symmetry,
)

#: Damping, where none is given, relative to the largest eigenvalue of all blocks.
DAMPING = 1e-3
#: Ritz vectors are projected out of test vectors if their relative residual is lower.
SHARP = 1e-2


def layer_summary(
    A: Any,
    damping: float | None = None,
    ncv: int = 20,
    num_repeats: int = 8,
    *,
    blocks: Mapping[str, Any] | None = None,
    distribution: str = "rademacher",
    rng: Rng = None,
    block_size: int | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    progressbar: bool = False,
) -> LayerSummary:
    r"""Estimate trace, top eigenvalue, norm, and effective dimension of every block.

    .. math::
        \mathrm{tr}\, A_{bb}, \quad \lambda_{\max}(A_{bb}), \quad \|A_{bb}\|_F, \quad
        \mathrm{tr}\, |A_{bb}| (|A_{bb}| + \delta I)^{-1}

    of the diagonal blocks :math:`A_{bb}` of a Hermitian matrix, with error bars.

    Parameters
    ----------
    A : LinearOperator, array, sparse matrix, or Tensor
        Hermitian matrix of shape ``(N, N)``, also an indefinite one. Operators of a
        model's parameters, and composites of these, name their blocks.
    damping : float, optional
        :math:`\delta`, above 0 and finite, in the unit of ``A``; by default a
        thousandth of the largest eigenvalue (in magnitude) found in any block.
    ncv : int, optional
        Lanczos steps per test vector.
    num_repeats : int, optional
        Test vectors whose spread gives the error bars; one more goes before them. With
        fewer than three, errors are NaN.
    blocks : mapping, optional
        From names to blocks: patterns of parameters' names (``"encoder.*"``, or a list
        of some), slices, indices, or masks. By default every parameter is a block.
    distribution : str, optional
        Of the test vectors: ``"rademacher"`` (entries ±1), ``"normal"``, or
        ``"sphere"``.
    rng, block_size, checkpoint, progressbar : optional
        See :class:`~curvlinops.estimators.Options`.

    Returns
    -------
    LayerSummary
        A table, one row per block in the order of the matrix.

    Raises
    ------
    ValueError
        If the matrix has no named blocks and none are given, they overlap, the matrix
        turns out not to be Hermitian, or a product is not finite.

    Notes
    -----
    Of a vector :math:`z` over the whole space, :math:`(A z)_b` also holds what other
    blocks send to block :math:`b`. For traces that is noise; for norms it is another
    quantity, :math:`\|A_{b,:}\|_F`; and it hides small blocks beside large ones. So
    every test vector is split into its blocks, one column each, and all blocks take
    their steps together: a step is *one* product with as many columns as there are
    groups of blocks. Blocks between which the matrix is zero form a group, as one
    product per block finds out beforehand: with Kronecker-factored and other
    block-diagonal matrices a step is a single column.

    The first vector's Lanczos run in every block gives its top eigenvalue (error:
    the residual norm :math:`r`, or :math:`r^2` over the gap to the next one, if that is
    smaller), and eigenvectors that are known by now, which are split off:
    :math:`\mathrm{tr}\, A = \sum_i u_i^\top A u_i + \mathrm{tr}\, P A P`, and so with
    the squared norm, exactly. The other vectors sample only the rest, each all three
    quantities in one run. So trace and squared norm are unbiased. Blocks with fewer
    rows than such runs have steps are multiplied out, without error.

    Costs ``groups * ncv * (num_repeats + 1)`` products at most, plus one per block, and
    the memory of ``ncv`` vectors per block column that is multiplied at once: a vector
    of the whole space holds one of every block.

    References
    ----------
    Meyer, Musco, Musco, Woodruff, "Hutch++: optimal stochastic trace estimation", SOSA
    (2021), arXiv:2010.09649. Ubaru, Chen, Saad, "Fast estimation of tr(f(A)) via
    stochastic Lanczos quadrature", SIAM J. Matrix Analysis and Applications 38 (2017),
    doi:10.1137/16M1104974.

    Examples
    --------
    >>> import torch
    >>> from curvlinops import GGNLinearOperator, layer_summary
    >>> net = torch.nn.Sequential(torch.nn.Linear(30, 20), torch.nn.Linear(20, 2))
    >>> loss, params = torch.nn.MSELoss(), dict(net.named_parameters())
    >>> data = [(torch.rand(9, 30), torch.rand(9, 2))]
    >>> G = GGNLinearOperator(net, loss, params, data)
    >>> table = layer_summary(G, ncv=10, rng=0)
    >>> table["name"].tolist()
    ['0.weight', '0.bias', '1.weight', '1.bias']
    >>> block = G.block("0.weight").to_dense()
    >>> low, high = table.confidence_interval("trace")
    >>> bool(low[0] <= block.trace() <= high[0])
    True
    """
    if damping is not None and not 0 < damping < np.inf:
        raise ValueError(f"damping is above 0 and finite, got {damping!r}.")
    steps = require_positive_int("ncv", ncv)
    repeats = require_positive_int("num_repeats", num_repeats)
    places = block_places(A, blocks)
    options: Options = {
        "rng": rng,
        "block_size": block_size,
        "checkpoint": checkpoint,
        "progressbar": progressbar,
    }
    settings: dict[str, Any] = {"ncv": steps, "num_repeats": repeats}
    settings["blocks"] = {name: len(where) for name, where in places.items()}
    with Run(A, "layer_summary", options, distribution, **settings) as run:
        found = _Search(run, Blocks(run, places), steps, repeats).blocks()
        size = max(block.largest for block in found)
        damping = (DAMPING * size or 1.0) if damping is None else float(damping)
        integrand = bracketed(lambda x: abs(x) / (abs(x) + damping), run.operand.eps)
        numbers = np.array([block.numbers(integrand) for block in found])
        sizes = np.array([len(where) for where in places.values()])
        columns = {"name": np.array(list(places)), "size": sizes}
        for q, quantity in enumerate(QUANTITIES):
            columns[quantity] = numbers[:, q, 0]
            columns[f"{quantity}_error"] = numbers[:, q, 1]
        total = columns["trace"].sum()
        columns["share"] = columns["trace"] / (total if total else np.nan)
        made = run.operand.num_products
        return LayerSummary(columns, damping, made, repeats, run.probes.seed)


class _Known:
    """A block of which all eigenvalues are known."""

    def __init__(self, eigenvalues: np.ndarray) -> None:
        self._eigenvalues = eigenvalues
        self.largest = float(abs(eigenvalues).max())

    def numbers(self, integrand: Integrand) -> list[tuple[float, float]]:
        """Return the quantities, each with its error."""
        values = self._eigenvalues
        dimension, _ = integrand(Rule(values, np.ones(len(values))))
        exact = values.sum(), values.max(), np.linalg.norm(values), dimension
        return [(float(number), 0.0) for number in exact]


@dataclass
class _Sampled:
    """A block known by Lanczos runs: a first one, and those of what it leaves.

    Attributes
    ----------
    alpha, beta : numpy.ndarray
        Recurrences of all runs, of shape ``(R + 1, m)``, the first one first.
    norms : numpy.ndarray
        Norms of their start vectors, of shape ``(R + 1,)``.
    keep : bool
        Whether vectors of the first run were kept, hence split off.
    eps : float
        Rounding error of a product.
    """

    alpha: np.ndarray
    beta: np.ndarray
    norms: np.ndarray
    keep: bool
    eps: float

    @property
    def largest(self) -> float:
        """Largest magnitude of an eigenvalue that was found."""
        return max(float(abs(_ritz(*run)[0]).max()) for run in self._runs())

    def _runs(self) -> list[tuple[np.ndarray, np.ndarray]]:
        return list(zip(self.alpha, self.beta, strict=True))

    def numbers(self, integrand: Integrand) -> list[tuple[float, float]]:
        """Return the quantities, each with its error."""
        theta, residuals, _ = _sharp(self.alpha[0], self.beta[0], self.keep)
        squares, a, b = self.norms[1:] ** 2, self.alpha[1:, 0], self.beta[1:, 0]
        split_off = np.sum(theta**2 + residuals**2)
        square, error = _mean(split_off + squares * (a**2 + b**2))
        norm = square**0.5
        return [
            _mean(theta.sum() + squares * a),
            max(_top(*run, self.eps) for run in self._runs()),
            (norm, error / (2 * norm) if norm else 0.0),
            self._dimension(integrand, theta, residuals),
        ]

    def _dimension(
        self, integrand: Integrand, theta: np.ndarray, residuals: np.ndarray
    ) -> tuple[float, float]:
        """Return the trace of a function of the block, and its error.

        The function at a Ritz value stands for the mean over the Ritz vector's
        spectrum, whose standard deviation is the residual norm.
        """
        one = np.ones(1)
        low, values, high = (
            np.array([integrand(Rule(node[None], one))[0] for node in theta + shift])
            for shift in (-residuals, 0.0 * residuals, residuals)
        )
        krylov = float(np.maximum(abs(low - values), abs(high - values)).sum())
        found = np.array([integrand(Rule.gauss(*run)) for run in self._runs()[1:]])
        samples, errors = found.T * self.norms[1:] ** 2
        mean, sem = _mean(values.sum() + samples)
        return mean, float(np.hypot(sem, krylov + errors.mean()))


def _mean(samples: np.ndarray) -> tuple[float, float]:
    """Return the mean of samples and its standard error."""
    moments = Moments()
    moments.add(torch.from_numpy(samples))
    mean, sem = moments.mean_and_sem()
    return float(mean), float(sem)


Ritz = tuple[np.ndarray, np.ndarray, np.ndarray]


def _ritz(alpha: np.ndarray, beta: np.ndarray) -> Ritz:
    """Return a run's Ritz values, residual norms, and vectors in the Krylov basis."""
    ends = np.flatnonzero(beta == 0)
    m = int(ends[0]) + 1 if len(ends) else len(alpha)
    values, S = eigh_tridiagonal(alpha[:m], beta[: m - 1])
    return values, beta[m - 1] * abs(S[-1]), S


def _sharp(alpha: np.ndarray, beta: np.ndarray, keep: bool) -> Ritz:
    """Return those of :func:`_ritz` that are all but eigenpairs, if any are kept."""
    values, residuals, S = _ritz(alpha, beta)
    sharp = keep & (residuals <= SHARP * abs(values))
    return values[sharp], residuals[sharp], S[:, sharp]


def _top(alpha: np.ndarray, beta: np.ndarray, eps: float) -> tuple[float, float]:
    """Return a run's largest Ritz value and how far the eigenvalue may be from it."""
    values, residuals, _ = _ritz(alpha, beta)
    r, rounding = float(residuals[-1]), 10 * eps * float(abs(values).max())
    gap = float(values[-1] - values[-2]) if len(values) > 1 else 0.0
    error = r * min(1.0, r / gap) if gap else r
    return float(values[-1]), max(error, rounding)


def _eigenvalues(D: Tensor, eps: float) -> np.ndarray:
    """Return the eigenvalues of a Hermitian block."""
    error, scale = (D - D.mH).abs().max(), torch.linalg.vector_norm(D)
    require_symmetry(error[None], scale[None], eps)
    return to_numpy(torch.linalg.eigvalsh(double(D + D.mH) / 2))


def _coefficients(runs: list[Recurrence]) -> dict[str, np.ndarray]:
    """Return those of all blocks: of shapes ``(L, R, m)`` and ``(L, R)``."""
    names = ("alpha", "beta", "norms")
    return {n: np.stack([getattr(run, n) for run in runs]) for n in names}


class _Search:
    """The products behind a table; its arguments are those of the function."""

    def __init__(self, run: Run, blocks: Blocks, ncv: int, repeats: int) -> None:
        self._run, self._blocks = run, blocks
        self._ncv, self._repeats = ncv, repeats
        sizes, most = list(enumerate(blocks.sizes)), ncv * (repeats + 1)
        self._small = [b for b, size in sizes if size <= most]
        self._large = [b for b, size in sizes if size > most]
        self._keep = run.dim * ncv * run.operand.dtype.itemsize <= BASIS_BYTES

    def blocks(self) -> list[_Known | _Sampled]:
        """Return what is found of every block, in their order."""
        steps = self._ncv * (self._repeats + 1)
        self._run.expect(self._blocks.cost(self._large) * steps)
        found: dict[int, _Known | _Sampled] = {}
        found |= {b: _Known(values) for b, values in self._exact().items()}
        found |= self._sampled() if self._large else {}
        return [found[b] for b in sorted(found)]

    def _exact(self) -> dict[int, np.ndarray]:
        """Return all eigenvalues of the small blocks."""
        if (state := self._run.load("exact")) is None:
            eps = self._run.operand.eps
            dense = self._blocks.dense(self._small)
            state = {f"block {b}": _eigenvalues(D, eps) for b, D in dense.items()}
            self._run.save("exact", state)
        return {b: state[f"block {b}"] for b in self._small}

    def _sampled(self) -> dict[int, _Sampled]:
        """Return the Lanczos runs of the large blocks."""
        run, eps, (first, known) = self._run, self._run.operand.eps, self._first()
        state = run.load("runs") or {n: array[:, :0] for n, array in first.items()}
        most = max(1, run.block_size // self._blocks.cost(self._large))
        while (done := state["norms"].shape[1]) < self._repeats:
            stop = min(done + most, self._repeats)
            starts = self._starts(1 + done, 1 + stop)
            for start, U in zip(starts, known, strict=True):
                project_out(start.T, U.expand(stop - done, -1, -1))
            new = _coefficients(self._krylov(starts))
            state = {n: np.concatenate([state[n], new[n]], axis=1) for n in state}
            run.save("runs", state)
        both = {n: np.concatenate([first[n], state[n]], axis=1) for n in first}
        return {
            b: _Sampled(
                both["alpha"][i], both["beta"][i], both["norms"][i], self._keep, eps
            )
            for i, b in enumerate(self._large)
        }

    def _starts(self, start: int, stop: int) -> list[Tensor]:
        """Return the large blocks' parts of test vectors, each in memory of its own."""
        V = self._run.probes.block(start, stop)
        return [V[self._blocks.places[b]].T.clone().T for b in self._large]

    def _krylov(self, starts: list[Tensor]) -> list[Recurrence]:
        """Return the Lanczos runs of all large blocks, which take steps together."""
        eps = self._run.operand.eps
        methods = {
            b: lanczos_steps(start, self._ncv, self._keep, eps=eps)
            for b, start in zip(self._large, starts, strict=True)
        }
        found = self._blocks.answer(methods)
        return [found[b] for b in self._large]

    def _first(self) -> tuple[dict[str, np.ndarray], list[Tensor]]:
        """Return the first run, and in every block the vectors that are split off."""
        run = self._run
        if (state := run.load("first")) is not None:
            flat = torch.from_numpy(state.pop("vectors")).to(run.operand.device)
        else:
            found = self._krylov(self._starts(0, 1))
            state = _coefficients(found)
            flat = torch.cat([self._split_off(one).flatten() for one in found])
            run.save("first", state | {"vectors": flat})
        sizes = [int(self._blocks.sizes[b]) for b in self._large]
        counts = [
            len(_sharp(alpha[0], beta[0], self._keep)[0])
            for alpha, beta in zip(state["alpha"], state["beta"], strict=True)
        ]
        shapes = list(zip(counts, sizes, strict=True))
        parts = flat.split([k * n for k, n in shapes])
        return state, [p.view(s) for p, s in zip(parts, shapes, strict=True)]

    def _split_off(self, found: Recurrence) -> Tensor:
        """Return the sharp Ritz vectors of a run, as rows."""
        _, _, S = _sharp(found.alpha[0], found.beta[0], self._keep)
        if found.basis is None:
            return torch.zeros(0)
        return torch.from_numpy(S.T).to(found.basis) @ found.basis[0, : len(S)]
