"""An estimate = sampler x integrand x estimator: the loop that all of them share."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any, Self, TypedDict

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from curvlinops._journal import (
    Journal,
    close_journal,
    journalled_multiply,
    open_journal,
    read_identity,
)
from curvlinops._operand import Operand
from curvlinops._random import Probes, Rng, as_seed
from curvlinops.estimators._base import (
    FEWEST_SAMPLES,
    Estimate,
    require_positive_int,
    student,
)

#: Bytes of test vectors that are multiplied at once, and their largest number: beyond
#: about 16 columns models gain nothing from more.
BLOCK_BYTES = 2**26
BLOCK_COLUMNS = 16
#: Bytes that a matrix may take up where it replaces an estimate of it.
DENSE_BYTES = 2**31


class Options(TypedDict, total=False):
    """Keywords that every stochastic estimator takes.

    Attributes
    ----------
    rng : int, numpy.random.Generator, torch.Generator, or None
        Source of randomness: same seed, same number. ``None``, the default, draws a
        seed from torch's global generator.
    until : float
        Stop as soon as the error (sampling and Krylov error, widened by Student's
        factor for few samples) is at most ``until`` times the estimate (for arrays: in
        Euclidean norm), twice in a row and with eight samples at least. The number of
        products (or repeats) asked for then is the limit; reaching it first warns, or,
        if it leaves products enough, has the matrix multiplied out. Krylov spaces are
        deepened where they limit the error, up to ``ncv * num_repeats`` steps; once as
        many products are spent as the matrix has columns, it is multiplied out, and the
        result exact.
    return_estimate : bool
        Return an :class:`~curvlinops.estimators.Estimate` (value, standard error,
        products, seed) instead of the bare value.
    block_size : int
        Vectors multiplied at once. Default: as many as fit into 64 MiB, at most 16.
        Affects speed and memory only, but for rounding (and above 8 where ``until``
        stops).
    checkpoint : str, path-like, or Checkpoint
        File that keeps the progress. A call that was killed and is made again goes on
        from there, and ends with the same bits on the same machine. Costs one product,
        for the matrix's fingerprint. The file grows by one vector per product, until
        the state of a run or a block of samples is saved in their place;
        :class:`~curvlinops.estimators.Checkpoint` bounds that.
    progressbar : bool
        Show products, time left and time per product on stderr.
    """

    rng: Rng
    until: float | None
    return_estimate: bool
    block_size: int | None
    checkpoint: str | os.PathLike[str] | None
    progressbar: bool


class Moments:
    """Mean and standard error of a stream of numbers or arrays, block by block.

    Merges blocks by their means and sums of squared deviations (Chan, Golub, LeVeque
    1983), in float64 for scalars and in the samples' dtype for arrays.

    Parameters
    ----------
    offset : Tensor or float, optional
        Added to the mean: what is known exactly.
    krylov_error : float, optional
        Of the mean, see :class:`~curvlinops.estimators.Estimate`.
    """

    def __init__(self, offset: Tensor | float = 0.0, krylov_error: float = 0.0) -> None:
        self.offset, self.krylov_error = offset, krylov_error
        self.count = 0
        self.mean = self.squares = torch.zeros(())

    def add(self, samples: Tensor) -> None:
        """Take in samples along the last axis."""
        if samples.ndim == 1:
            samples = samples.to(torch.promote_types(samples.dtype, torch.float64))
        size = samples.shape[-1]
        mean = samples.mean(-1)
        squares = (samples - mean[..., None]).abs().square().sum(-1)
        if self.count:
            shift = mean - self.mean
            share = size / (self.count + size)
            squares = (
                squares + self.squares + shift.abs().square() * (self.count * share)
            )
            mean = self.mean + shift * share
        self.mean, self.squares, self.count = mean, squares, self.count + size

    def mean_and_sem(self) -> tuple[Tensor, Tensor]:
        """Return the mean and its standard error (NaN for one sample or two)."""
        if self.count < 3:
            sem = torch.full_like(self.squares, torch.nan)
        else:
            sem = (self.squares / (self.count * (self.count - 1))).sqrt()
        return self.offset + self.mean, sem

    def moments(self) -> Moments:
        """Return itself."""
        return self

    def state(self) -> dict[str, Any]:
        """Return count, mean, and sum of squared deviations."""
        return {"count": self.count, "mean": self.mean, "squares": self.squares}

    def restore(self, state: dict[str, Any]) -> None:
        """Go back to a state."""
        device = self.mean.device
        self.count = int(state["count"])
        self.mean = torch.from_numpy(state["mean"]).to(device)
        self.squares = torch.from_numpy(state["squares"]).to(device)


class Total(Moments):
    """Sum of a stream of numbers or arrays, in place of their mean."""

    def add(self, samples: Tensor) -> None:
        """Take in samples along the last axis."""
        self.mean = self.mean + samples.sum(-1)
        self.count += samples.shape[-1]


class Run:
    """One estimation: products of one matrix with seeded vectors, to be counted.

    Parameters
    ----------
    A : LinearOperator, array, sparse matrix, or Tensor
        The matrix.
    task : str
        Name of the estimator, for the progress bar and the checkpoint.
    options : Options
        As the user gave them.
    distribution : str, optional
        Of the test vectors.
    total : int, optional
        Products that will be made at most, for the progress bar.
    square : bool, optional
        Whether the matrix must be square.
    **settings
        Everything else that makes the computation what it is, for the checkpoint.
    """

    def __init__(
        self,
        A: Any,
        task: str,
        options: Options,
        distribution: str = "rademacher",
        total: int | None = None,
        square: bool = True,
        **settings: Any,
    ) -> None:
        if unknown := options.keys() - Options.__annotations__.keys():
            raise TypeError(
                f"{task} has no argument {', '.join(sorted(map(repr, unknown)))}. Its "
                f"options are {', '.join(Options.__annotations__)}."
            )
        self.until = options.get("until")
        if self.until is not None and not self.until > 0:
            raise ValueError(
                f"until is a relative standard error above 0, got {self.until!r}."
            )
        self.operand = Operand(A)
        if square:
            self.operand.require_square()
        self.dim = self.operand.dim
        path, rng = options.get("checkpoint"), options.get("rng")
        stored = {} if path is None or rng is not None else read_identity(path)
        self.seed = stored.get("seed", None)
        self.seed = as_seed(rng) if self.seed is None else self.seed
        self.probes = Probes(
            self.dim, distribution, self.seed, self.operand.dtype, self.operand.device
        )
        size = options.get("block_size")
        self.block_size = (
            self._default_block_size()
            if size is None
            else require_positive_int("block_size", size)
        )
        self.full_output = bool(options.get("return_estimate", False))
        self.converged = True
        self.advice = ""
        self._path, self._task = path, task
        self.settings = settings | {
            "distribution": distribution,
            "seed": self.seed,
            "until": self.until,
            "block_size": self.block_size,
        }
        self.bar = tqdm(
            desc=f"{task} {self.operand.name} on {self.operand.device}",
            total=total,
            unit="product",
            disable=not options.get("progressbar", False),
        )

    @cached_property
    def journal(self) -> Journal | None:
        """The checkpoint; opened at first use, when all arguments have been checked."""
        return open_journal(self._path, self.operand, self._task, self.settings)

    def _default_block_size(self) -> int:
        columns = BLOCK_BYTES // max(self.dim * self.operand.dtype.itemsize, 1)
        most = BLOCK_COLUMNS if self.until is None else FEWEST_SAMPLES
        return max(1, min(columns, most))

    @property
    def needs_error(self) -> bool:
        """Whether the standard error has any use."""
        return self.full_output or self.until is not None

    @property
    def rotation_invariant(self) -> bool:
        """Whether the test vectors' directions are uniformly distributed."""
        return self.probes.distribution in ("normal", "sphere")

    def __enter__(self) -> Self:
        """Return the run."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Close progress bar and checkpoint."""
        self.bar.close()
        close_journal(vars(self).get("journal"), self.operand)

    def save(self, section: str, arrays: dict[str, Any]) -> None:
        """Record the state of a section in the checkpoint, if there is one."""
        if self.journal is not None:
            count = self.operand.num_products
            self.journal.save(section, **arrays, num_products__=count)

    def load(self, section: str) -> dict[str, Any] | None:
        """Return the state saved last for a section; its products count again."""
        state = None if self.journal is None else self.journal.load(section)
        if state is not None:
            count = int(state.pop("num_products__"))
            self.bar.update(max(count - self.operand.num_products, 0))
            self.operand.num_products = max(count, self.operand.num_products)
        return state

    def multiply(self, X: Tensor, adjoint: bool = False, record: bool = True) -> Tensor:
        """Multiply a ``(N, K)`` tensor, recorded in the checkpoint unless told not."""
        journal = self.journal if record else None
        before = self.operand.num_products
        Y = journalled_multiply(journal, self.operand, X, adjoint)
        made = self.operand.num_products - before
        if self.bar.total is not None and self.bar.n + made > self.bar.total:
            self.expect(max(made, 10))  # a solver goes on: for how long is not known
        self.bar.update(made)
        return Y

    def expect(self, products: int) -> None:
        """Tell the progress bar that at least so many more products follow."""
        self.bar.total = max(self.bar.total or 0, self.bar.n + products)

    def blocks(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Yield the ranges of columns to be multiplied at once."""
        for first in range(start, stop, self.block_size):
            yield first, min(first + self.block_size, stop)

    def accumulate(
        self,
        accumulator: Any,
        integrand: Callable[[Tensor], Any],
        num_samples: int,
        *,
        start: int = 0,
        section: str | None = None,
        vectors: Callable[[int, int], Tensor] | None = None,
    ) -> None:
        """Feed samples of an integrand to an accumulator: to the error, or the limit.

        The error must be reached twice in a row, eight samples apart (or a block, if
        that is larger): where it is small by chance, so is what skewed samples average.

        Parameters
        ----------
        accumulator : Accumulator
            Where the samples go.
        integrand : callable
            From test vectors, of shape ``(N, K)``, to ``K`` samples.
        num_samples : int
            The limit.
        start : int, optional
            Index of the first test vector.
        section : str, optional
            Name under which the accumulator's state is kept in the checkpoint.
        vectors : callable, optional
            From a range of indices to the vectors; default :attr:`probes`.
        """
        draw, reached = vectors or self.probes.block, False
        stride = max(self.block_size, FEWEST_SAMPLES if self.until is not None else 1)
        if section is not None and (state := self.load(section)) is not None:
            reached = bool(state.pop("reached__"))
            accumulator.restore(state)
        while (count := accumulator.count) < num_samples:
            if count % stride == 0:
                before, reached = reached, self.enough(accumulator)
                if before and reached:
                    break
            size = min(self.block_size, stride - count % stride, num_samples - count)
            first = start + count
            accumulator.add(integrand(draw(first, first + size)))
            if section is not None:
                self.save(section, accumulator.state() | {"reached__": reached})

    def enough(self, accumulator: Any) -> bool:
        """Whether the error asked for is reached, or more samples cannot reach it."""
        if self.until is None or accumulator.count < FEWEST_SAMPLES:
            return False
        moments = accumulator.moments()
        mean, sem = moments.mean_and_sem()
        krylov = moments.krylov_error
        return self.limited(mean, krylov) or self.reached(
            mean, sem, moments.count, krylov
        )

    def limited(self, mean: Tensor, krylov_error: float) -> bool:
        """Whether the Krylov error alone takes up most of what is allowed."""
        allowed = 0.7 * (self.until or np.inf) * torch.linalg.vector_norm(mean)
        return bool(krylov_error > allowed)

    def reached(
        self, mean: Tensor, sem: Tensor, num_samples: int, krylov_error: float = 0.0
    ) -> bool:
        """Whether the relative error is the one asked for, if any."""
        if self.until is None:
            return True
        error = self.relative_error(mean, sem, num_samples, krylov_error)
        return num_samples >= FEWEST_SAMPLES and error <= self.until

    @staticmethod
    def relative_error(
        mean: Tensor, sem: Tensor, num_samples: int, krylov_error: float
    ) -> float:
        """Return the error relative to the mean, by Student's factor more than 1/1.96.

        That is: of an interval that covers with 95 %, what a normal one would have.
        """
        norm = torch.linalg.vector_norm
        both = float(norm(sem) ** 2 + krylov_error**2) ** 0.5
        size = float(norm(mean))
        widened = both * student(num_samples) / student(1)
        return 0.0 if widened == 0 else widened / size if size else np.inf

    def mean(
        self, integrand: Callable[[Tensor, Tensor], Tensor], num_matvecs: int
    ) -> Any:
        r"""Return the mean over test vectors, or what it estimates, as the user wants.

        Parameters
        ----------
        integrand : callable
            From vectors ``V`` and ``A @ V`` to samples along the last axis; its mean
            depends on :math:`\mathbb{E}[v v^{\mathrm{H}}] = I` alone.
        num_matvecs : int
            Products, see :func:`require_num_matvecs`.
        """
        limit = require_num_matvecs(self, num_matvecs)
        moments = Moments()
        self.accumulate(moments, self._of_products(integrand), limit, section="moments")
        if moments.count > num_matvecs:
            raise ValueError(
                f"The checkpoint {self._path} holds {moments.count} samples, and "
                f"{num_matvecs} were asked for. Ask for no fewer, or give another path."
            )
        if num_matvecs >= self.dim and not (limit and self.enough(moments)):
            return self.total(integrand)
        return self.result(*moments.mean_and_sem(), moments.count)

    def total(self, integrand: Callable[[Tensor, Tensor], Tensor]) -> Any:
        """Return what the mean of an integrand estimates: its sum over unit vectors."""
        self.until = None
        self.expect(self.dim)
        total = Total()
        samples = self._of_products(integrand)
        self.accumulate(total, samples, self.dim, section="total", vectors=self.units)
        return self.exact(total.mean)

    def _of_products(
        self, integrand: Callable[[Tensor, Tensor], Tensor]
    ) -> Callable[[Tensor], Tensor]:
        return lambda V: integrand(V, self.multiply(V, record=False))

    def stages(self, products: int, grow: int, fresh: int = 0) -> Iterator[int]:
        """Yield the sizes of a sketch: the largest, or by steps of half if adaptive.

        Parameters
        ----------
        products : int
            How many there are in all.
        grow : int
            What a vector costs that the sketch takes in.
        fresh : int, optional
            What every vector of every stage costs besides.
        """
        size = 0
        while (most := (products + grow * size) // (grow + fresh)) > size:
            step = most if self.until is None else max(FEWEST_SAMPLES, size * 3 // 2)
            old, size = size, min(most, step)
            products -= grow * (size - old) + fresh * size
            yield size

    def check(
        self, mean: Tensor, sem: Tensor, num_samples: int, krylov_error: float = 0.0
    ) -> None:
        """Find out whether the result is converged; warn if what was asked for is not.

        Without ``until``, warn where Krylov spaces, not the samples, limit the error.
        """
        size = float(torch.linalg.vector_norm(mean))
        sampling = float(torch.linalg.vector_norm(sem).nan_to_num())
        if self.until is not None:
            self.converged = self.reached(mean, sem, num_samples, krylov_error)
            error = self.relative_error(mean, sem, num_samples, krylov_error)
            message = (
                f"The relative error {error:.1e} is above until={self.until:.1e} after "
                f"{num_samples} samples. Allow more products, or a larger error."
            )
        else:
            deep = krylov_error <= max(sampling, 0.01 * size)
            self.converged = deep and num_samples >= FEWEST_SAMPLES
            message = (
                f"The Krylov spaces are too shallow: {size:.4g} has a Krylov error of "
                f"{krylov_error:.1e} beside a sampling error of {sampling:.1e}. "
                f"{self.advice or 'Allow a larger ncv'}, or say with `until` how "
                "accurate it is to be."
            )
            if deep or np.isnan(krylov_error):
                return
        if not self.converged:
            warnings.warn(f"{self._task}: {message}", stacklevel=4)

    def result(
        self,
        mean: Tensor,
        sem: Tensor,
        num_samples: int,
        krylov_error: float = 0.0,
        transform: Callable[[Tensor, Any], tuple[Tensor, Any]] | None = None,
    ) -> Any:
        """Return what the user asked for: the value, or all that is known of it.

        Parameters
        ----------
        mean, sem : Tensor
            The estimate and its standard error.
        num_samples : int
            Samples behind them.
        krylov_error : float, optional
            Error of the Krylov spaces behind them.
        transform : callable, optional
            From mean and an error to those of a function of it.
        """
        self.check(mean, sem, num_samples, krylov_error)
        if transform is not None:
            krylov_error = float(transform(mean, krylov_error)[1])
            mean, sem = transform(mean, sem)
        return self._wrapped(mean, sem, num_samples, self.seed, krylov_error)

    def exact(self, value: Any, krylov_error: float = 0.0) -> Any:
        """Return a result in which nothing is random."""
        value = torch.as_tensor(value)
        sem = torch.zeros_like(value.real)
        return self._wrapped(value, sem, 1, None, krylov_error)

    def _wrapped(
        self, value: Tensor, sem: Tensor, count: int, seed: int | None, krylov: float
    ) -> Any:
        home = self.operand.result
        if not self.full_output:
            return home(value)
        return Estimate(
            home(value),
            home(sem),
            self.operand.num_products,
            count,
            seed,
            krylov,
            self.converged,
        )

    def dense(self) -> Tensor:
        """Return the matrix: as many products as it has columns."""
        A = self.operand
        D = torch.empty(A.shape, dtype=A.dtype, device=A.device)
        for a, b in self.blocks(0, self.dim):
            D[:, a:b] = self.multiply(self.units(a, b))
        return D

    def units(self, start: int, stop: int) -> Tensor:
        """Return columns of the identity."""
        A = self.operand
        unit = torch.zeros(self.dim, stop - start, dtype=A.dtype, device=A.device)
        unit[start:stop].fill_diagonal_(1)
        return unit

    def dense_is_due(self, more: int = 0) -> bool:
        """Whether, after so many more products, the matrix itself had been cheaper.

        Only if an error was asked for, and there is memory for the matrix.
        """
        bytes_needed = self.dim * max(self.operand.shape) * self.operand.dtype.itemsize
        due = self.operand.num_products + more >= self.dim
        return self.until is not None and due and bytes_needed <= DENSE_BYTES


def require_num_matvecs(run: Run, num_matvecs: int, cost: int = 1) -> int:
    """Return the number of products for samples, which cost so many each.

    It is 0 if as many as there are columns give the exact value. With ``until`` those
    beyond are spent on samples before, if they suffice for an error.
    """
    number = require_positive_int("num_matvecs", num_matvecs)
    if number >= run.dim:
        spare = min(number - run.dim, run.dim - 1)
        return spare if run.until is not None and spare >= cost * FEWEST_SAMPLES else 0
    if number < cost:
        raise ValueError(
            f"num_matvecs ({number}) is too small: one sample takes {cost} products. "
            f"Ask for {cost} or more, or use Hutchinson's estimator, which takes one."
        )
    return number
