"""SciPy's Krylov solvers as operators: what all inverses have in common."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, fields
from math import isfinite, sqrt
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from numpy.linalg import LinAlgError, norm
from scipy.sparse.linalg import LinearOperator
from torch import Tensor

from curvlinops._counts import as_count
from curvlinops._journal import JournalledOperator
from curvlinops._lockstep import Multiply, Products, solve_each, solve_together
from curvlinops._operator import TorchOperator, _is_tensor_list
from curvlinops._spaces import numeric_array, real_scalar, to_numpy, to_torch
from curvlinops.structured import as_operator

#: Relative residual at which a solve counts as converged, by the dtype of products.
DEFAULT_RTOL = {
    torch.float64: 1e-10,
    torch.float32: 1e-6,
    torch.float16: 1e-3,
    torch.bfloat16: 1e-2,
}

#: When several right-hand sides share block products. Small models are bound by the
#: fixed cost of a product, large ones by arithmetic and memory; handing a vector over
#: costs about 50 microseconds. With GGNs of N = 1e3, 1e4, 5e4, and 7e5 on a CPU,
#: ``benchmarks/block_solves.py`` measured gains of 2.9, 2.2, 1.2, and 0.8 for 16
#: columns, of 1.0, 1.7, 1.1, and 0.9 for 8, and of 0.7, 1.3, 1.0, and 0.9 for 4.
TOGETHER_MIN_COLUMNS, TOGETHER_MAX_DIM = 8, 50_000


@dataclass(frozen=True, eq=False, repr=False)
class SolverStatistics:
    r"""What a solver did in one product, with an entry for each of ``K`` columns.

    Complex columns are two: first come all real parts, then the imaginary ones.

    Attributes
    ----------
    solver : str
        Name of the method.
    iterations : numpy.ndarray
        Number of iterations, of shape ``(K,)``; for a Neumann series of terms after
        the first.
    residual_norms : numpy.ndarray
        The true residual :math:`\|b - A x\|_2`, recomputed from the result.
    relative_residuals : numpy.ndarray
        The same, divided by :math:`\|b\|_2`.
    converged : numpy.ndarray of bool
        Whether the result is as accurate as the solver's stopping rule asks for.
    """

    solver: str
    iterations: np.ndarray
    residual_norms: np.ndarray
    relative_residuals: np.ndarray
    converged: np.ndarray

    def __repr__(self) -> str:
        """Return solver, converged columns, iterations, largest relative residual."""
        low, high = self.iterations.min(), self.iterations.max()
        return (
            f"<{self.solver}: {self.converged.sum()} of {self.converged.size} columns "
            f"converged in {low if low == high else f'{low}-{high}'} iterations, "
            f"relative residual <= {self.relative_residuals.max():.1e}>"
        )


def _joined(blocks: list[SolverStatistics]) -> SolverStatistics:
    """Return the statistics of several blocks of columns as those of one."""
    solver, *names = (field.name for field in fields(SolverStatistics))
    return SolverStatistics(
        getattr(blocks[0], solver),
        *(np.concatenate([getattr(b, name) for b in blocks]) for name in names),
    )


class Inverse(TorchOperator):
    """What all inverses have in common: a square operator and statistics.

    Attributes
    ----------
    statistics : SolverStatistics or None
        What the solver did in the last product; ``None`` before the first.
    """

    solver: ClassVar[str]

    def __init__(self, A: Any) -> None:
        A = as_operator(A)
        if A.shape[0] != A.shape[1]:
            raise ValueError(
                f"Only a square operator has an inverse, got {A!r}. For a least-squares"
                " solution call `scipy.sparse.linalg.lsmr(A, b)`."
            )
        super().__init__(A._out_space, A._in_space)
        self._A: TorchOperator = A
        self.statistics: SolverStatistics | None = None
        #: The statistics of all blocks of a product that is computed block by block.
        self._blocks: list[SolverStatistics] | None = None

    def to_dense(self, block_size: int = 64) -> Tensor:
        """Return the matrix, by solves for blocks of columns of the identity.

        Parameters
        ----------
        block_size : int, optional
            Number of columns that are solved for at once.

        Returns
        -------
        Tensor
            Of shape ``(N, N)``; :attr:`statistics` are those of all columns.
        """
        self._blocks = []
        try:
            return super().to_dense(block_size)
        finally:
            self._blocks = None

    def _require_finite(self, V: Tensor) -> None:
        if not V.isfinite().all():
            raise ValueError(
                f"{self!r} got a right-hand side with NaN or infinite entries. Look at "
                "the computation of the operand."
            )

    def _record(
        self, B: Any, R: Any, iterations: Any, accepted: Any
    ) -> SolverStatistics:
        """Store and return the statistics of right-hand sides and residuals."""
        b, r = (norm(np.asarray(block, np.float64), axis=0) for block in (B, R))
        relative = np.divide(r, b, out=np.zeros_like(r), where=b > 0)
        limits = np.where(b > 0, accepted, np.inf)
        statistics = SolverStatistics(
            self.solver,
            np.broadcast_to(np.asarray(iterations), r.shape).copy(),
            residual_norms=r,
            relative_residuals=relative,
            converged=r <= limits,
        )
        self.statistics = statistics
        if self._blocks is not None:
            self._blocks.append(statistics)
            self.statistics = _joined(self._blocks)
        return statistics


class FunctionOperator(TorchOperator, LinearOperator):
    """A user's function of ``(N, K)`` tensors as an operator without known adjoint."""

    def __init__(self, function: Callable[[Tensor], Any], A: TorchOperator) -> None:
        super().__init__(A._out_space, A._in_space)
        self._function = function

    def _apply(self, V: Tensor) -> Tensor:
        returned = self._function(V.clone())
        array = returned if torch.is_tensor(returned) else np.asarray(returned)
        if tuple(array.shape) != tuple(V.shape):
            raise ValueError(
                f"The preconditioner {self._function!r} turned a tensor of shape "
                f"{tuple(V.shape)} into {type(returned).__name__} of shape "
                f"{tuple(array.shape)}. It must multiply blocks of columns and keep "
                "their shape."
            )
        result = torch.as_tensor(array).detach()
        if result.is_complex():
            raise TypeError(
                f"The preconditioner {self._function!r} turned real numbers into "
                f"{result.dtype}. It must be real: take `.real` of what it returns."
            )
        return result.to(V.device, V.dtype)

    def _adjoint(self) -> TorchOperator:
        raise TypeError(
            f"The adjoint of the preconditioner {self._function!r} is not known. Pass "
            "an operator, an array, or a sparse matrix instead of a function."
        )


#: Methods that multiply, of operators, arrays, sparse matrices and tensors.
_PRODUCTS = {"__matmul__", "__call__", "dot", "matmul", "matmat", "matvec", "mv", "mm"}


def as_preconditioner(M: Any, A: TorchOperator) -> TorchOperator:
    """Return a preconditioner of ``A`` as one of our operators.

    A method that multiplies by a matrix, such as ``P.__matmul__``, stands for it.
    """
    if callable(M) and not hasattr(M, "shape"):
        owner = getattr(M, "__self__", None)
        if getattr(M, "__name__", "") not in _PRODUCTS or not hasattr(owner, "shape"):
            return FunctionOperator(M, A)
        M = owner  # whose adjoint is known, too
    P = as_operator(M)
    if P.shape != A.shape:
        raise ValueError(
            f"A preconditioner approximates the inverse of {A!r}, got one of shape "
            f"{P.shape}. For a diagonal pass `DiagonalLinearOperator(entries)`."
        )
    return P


# -- Krylov solvers -----------------------------------------------------------------


class Run(NamedTuple):
    """How SciPy solved for one right-hand side.

    ``accepted`` is the residual norm up to which the result counts as converged,
    ``limit`` the hyperparameter that ended the run before its stopping rule did.
    """

    x: np.ndarray
    iterations: int
    accepted: float
    limit: str | None


#: Hyperparameters that are numbers, not negative except the shift.
_NUMBERS = {"rtol", "atol", "btol", "conlim", "damp", "shift", "stop_updating_after"}


class KrylovInverse(Inverse):
    """Inverse by one of SciPy's Krylov solvers, run on every column.

    Subclasses list the hyperparameters that they know by every spelling, and write
    ``_solve``.
    """

    #: From every accepted spelling of a hyperparameter to SciPy's.
    _names: ClassVar[dict[str, str]]

    def __init__(self, A: Any, **hyperparameters: Any) -> None:
        super().__init__(A)
        self._options = self._read(hyperparameters)
        self._checkpoint = self._options.pop("checkpoint", None)
        if "x0" in self._options:
            self._options["x0"] = self._read_guess(self._options["x0"])
        #: The system that SciPy solves; its dtype is that of SciPy's vectors.
        self._system: TorchOperator = self._A

    def _parts(self) -> list[TorchOperator]:
        return [self._A]

    def _read(self, given: dict[str, Any]) -> dict[str, Any]:
        """Return the hyperparameters that are not ``None`` under SciPy's names."""
        name = type(self).__name__
        if unknown := sorted(given.keys() - self._names.keys()):
            raise TypeError(
                f"{name} has no hyperparameter {', '.join(unknown)}. It knows "
                f"{', '.join(sorted(self._names))}."
            )
        options: dict[str, Any] = {}
        for spelling, value in given.items():
            if value is None:
                continue
            if (canonical := self._names[spelling]) in options:
                raise ValueError(
                    f"{name} got {canonical!r} in two spellings, one of them "
                    f"{spelling!r}. Pass one."
                )
            options[canonical] = value
        for key in options.keys() & _NUMBERS:
            scalar = real_scalar(options[key])
            if scalar is None or not (scalar >= 0 or key == "shift"):
                raise ValueError(
                    f"{name} needs a non-negative number as {key!r}, got "
                    f"{options[key]!r}."
                )
            options[key] = scalar
        if (limit := as_count(options.get("maxiter", 1))) is None or limit < 1:
            raise ValueError(
                f"{name} needs a positive integer as 'maxiter' (or 'max_iter'), got "
                f"{options['maxiter']!r}."
            )
        return options | ({"maxiter": limit} if "maxiter" in options else {})

    def _read_guess(self, x0: Any) -> np.ndarray:
        """Return an initial guess as an array of shape ``(N, K)`` or ``(N, 1)``."""
        if _is_tensor_list(x0):
            x0 = self._out_space.pack(x0)
        if torch.is_tensor(x0):
            x0 = x0.detach().to("cpu", torch.float64)
        guess = numeric_array(x0)
        if guess.ndim not in (1, 2) or guess.shape[0] != self.shape[0]:
            raise ValueError(
                f"The initial guess of {self!r} must be of shape ({self.shape[0]},) or "
                f"({self.shape[0]}, K), got {guess.shape}."
            )
        return guess.reshape(self.shape[0], -1)

    def _guesses(self, K: int) -> list[np.ndarray | None]:
        """Return an initial guess, or none, for each of ``K`` columns."""
        if (x0 := self._options.get("x0")) is None:
            return [None] * K
        if x0.shape[1] not in (1, K):
            raise ValueError(
                f"The initial guess of {self!r} has {x0.shape[1]} columns, the "
                f"right-hand side {K}. Pass one vector, or one for each column."
            )
        columns = np.broadcast_to(x0, (self.shape[0], K)).T
        return [np.array(column, dtype=self._system.dtype) for column in columns]

    def _products(self) -> Products:
        """Return the products that a run asks for, by name."""
        return {"A": self._system.dot}

    def _solve(self, b: np.ndarray, x0: np.ndarray | None, multiply: Multiply) -> Run:
        """Solve for one right-hand side."""
        raise NotImplementedError

    def _apply(self, V: Tensor) -> Tensor:
        self._require_finite(V)
        B = to_numpy(V).astype(self._system.dtype, copy=False)
        if self._checkpoint is None:
            return to_torch(self._solve_columns(B, self._products()), self._out_space)
        with JournalledOperator(self._system, self._checkpoint, self.solver) as journal:
            products = {**self._products(), "A": journal.dot}
            return to_torch(self._solve_columns(B, products), self._out_space)

    def _solve_columns(self, B: np.ndarray, products: Products) -> np.ndarray:
        """Solve for every column of ``B``."""
        K = B.shape[1]
        guesses = self._guesses(K)

        def solve(j: int, multiply: Multiply) -> Run:
            try:
                return self._solve(np.ascontiguousarray(B[:, j]), guesses[j], multiply)
            except Exception as error:
                if K > 1:
                    error.add_note(f"This was right-hand side {j} of {K}.")
                raise

        # A callback, like a log, follows one solve after the other.
        watched = self._options.keys() & {"callback", "show"}
        many_and_small = K >= TOGETHER_MIN_COLUMNS and len(B) <= TOGETHER_MAX_DIM
        run_all = solve_together if many_and_small and not watched else solve_each
        runs = run_all(solve, products, K)
        X = np.stack([run.x for run in runs], axis=1)
        residual = B - products["A"](X)
        accepted = [run.accepted for run in runs]
        iterations = [run.iterations for run in runs]
        self._warn_if_unsolved(runs, self._record(B, residual, iterations, accepted))
        return X

    def _warn_if_unsolved(self, runs: list[Run], statistics: SolverStatistics) -> None:
        """Warn of columns that ended unsolved, unless by a limit of the caller's."""
        limits = {
            run.limit
            for run, converged in zip(runs, statistics.converged, strict=True)
            if not converged
        }
        for limit in sorted(limits - self._options.keys(), key=str):
            cause = (
                "ended with a large residual: the operator is singular or nearly so, "
                "or the system has no solution. Add damping (`A.damped(d)`)"
                if limit is None
                else f"reached SciPy's default {limit!r}. Pass a larger one (or this "
                "one, to accept the result), a preconditioner or a looser tolerance "
                "where the method has one, or add damping (`A.damped(d)`)"
            )
            # Level 9 is the line that says `A_inv @ b`.
            warnings.warn(
                f"{self.solver} {cause}. {statistics!r}",
                RuntimeWarning,
                stacklevel=7,
            )


class NullDirection(Exception):
    """A vector whose product is zero up to rounding stops a solver."""


class Watch:
    """Looks at every product of one run, and at its iterates."""

    def __init__(
        self,
        multiply: Multiply,
        x: np.ndarray,
        eps: float,
        callback: Callable[[np.ndarray], Any] | None = None,
    ) -> None:
        self.multiply, self.x, self.callback = multiply, x, callback
        # Rounding of v^T A v relative to ||A|| ||v||^2.
        self.noise = min(10.0 * eps * sqrt(x.size), 0.05)
        self.iterations = 0
        #: Largest ``||A v|| / ||v||`` seen: a lower bound of the norm of ``A``.
        self.norms: dict[str, float] = {}

    def step(self, x: np.ndarray) -> None:
        """Count an iteration (SciPy's callback)."""
        self.iterations, self.x = self.iterations + 1, x
        if self.callback is not None:
            self.callback(x)

    def operator(self, name: str, adjoint: str = "", cure: str = "") -> LinearOperator:
        """Return the operator that SciPy gets, which must be definite given a cure."""

        def product(name: str) -> Callable[[np.ndarray], np.ndarray]:
            return lambda v: self._checked(name, v, cure)

        N = self.x.size
        return LinearOperator(
            (N, N), product(name), product(adjoint or name), dtype=self.x.dtype
        )

    def _checked(self, name: str, v: np.ndarray, cure: str) -> np.ndarray:
        product = np.asarray(self.multiply(name, v), v.dtype)
        with np.errstate(over="ignore", invalid="ignore"):
            curvature = float(v @ product)
            length, stretched = (sqrt(u @ u) for u in (v, product))
        if not isfinite(curvature + length + stretched):
            if np.isfinite(v).all() and not np.isfinite(product).all():
                raise ValueError(
                    f"The product of {name} with a vector is not finite in iteration "
                    f"{self.iterations + 1}. Look for NaN or overflow in the model; it "
                    "may help to compute in float64."
                )
            raise LinAlgError(
                f"The solver's vectors overflow in iteration {self.iterations + 1}: "
                f"{name} is singular or nearly so. Add damping (`A.damped(d)`), or "
                "limit the iterations with `maxiter`."
            )
        if length > 0:
            known = self.norms.get(name, 0.0)
            self.norms[name] = max(known, stretched / length)
            if cure and curvature <= 0:
                self._judge(name, curvature, length, stretched, cure)
        return product

    def _judge(
        self, name: str, curvature: float, length: float, stretched: float, cure: str
    ) -> None:
        r"""Tell an indefinite operator from rounding along a null direction.

        A positive semi-definite A has :math:`\|Av\|^2 \le \|A\| \, v^\top A v`: where
        the right is rounding, so is the left.
        """
        scale = max(self.norms[name], self._norm_estimate(name))
        relative = curvature / (length**2 * scale) if scale else 0.0
        ratio = stretched / (length * scale) if scale else 0.0
        if relative >= -self.noise and ratio <= sqrt(self.noise):
            raise NullDirection
        raise LinAlgError(
            f"{name} is not positive definite: in iteration {self.iterations + 1} a "
            f"vector v has v^T {name} v = {curvature:.3e}, which is {relative:.1e} "
            f"times ||{name}|| ||v||^2 (rounding: {self.noise:.1e}). {cure}"
        )

    def _norm_estimate(self, name: str, steps: int = 4) -> float:
        """Return a lower bound of the norm by a few steps of the power method."""
        v = np.random.default_rng(0).standard_normal(self.x.size)
        for _ in range(steps):
            v = v / (norm(v) or 1.0)
            v = self.multiply(name, v.astype(self.x.dtype)).astype(np.float64)
        return float(norm(v))


class SymmetricInverse(KrylovInverse):
    """Inverse of a symmetric operator, with a positive definite preconditioner."""

    _names: ClassVar[dict[str, str]] = {
        "rtol": "rtol",
        "tolerance": "rtol",
        "maxiter": "maxiter",
        "max_iter": "maxiter",
        "M": "M",
        "preconditioner": "M",
        "x0": "x0",
        "initial_guess": "x0",
        "callback": "callback",
    }
    _scipy: ClassVar[Callable[..., tuple[np.ndarray, int]]]
    #: Options that are handed on to SciPy as they are.
    _own: ClassVar[set[str]]
    #: What to do if the operator is not positive definite; empty if it need not be.
    _cure: ClassVar[str] = ""

    def __init__(self, A: Any, **hyperparameters: Any) -> None:
        super().__init__(A, **hyperparameters)
        if "M" in self._options:
            self._options["M"] = as_preconditioner(self._options["M"], self._A)

    def _adjoint(self) -> TorchOperator:
        adjoint = self._A.adjoint()
        return self if adjoint is self._A else type(self)(adjoint, **self._options)

    def _products(self) -> Products:
        M = self._options.get("M")
        return {**super()._products(), **({} if M is None else {"M": M.dot})}

    def _solve(self, b: np.ndarray, x0: np.ndarray | None, multiply: Multiply) -> Run:
        options = {k: v for k, v in self._options.items() if k in self._own}
        eps = torch.finfo(self.torch_dtype).eps
        floor = float(np.finfo(b.dtype).eps) ** 2
        rtol = max(self._options.get("rtol", DEFAULT_RTOL[self.torch_dtype]), floor)
        start = np.zeros_like(b) if x0 is None else x0
        watch = Watch(multiply, start, eps, self._options.get("callback"))
        M = None
        if "M" in self._options:
            M = watch.operator("M", cure="Pass a positive definite preconditioner.")
        A = watch.operator("A", cure=self._cure)
        accepted = max(rtol * float(norm(b)), self._options.get("atol", 0.0))
        try:
            x, info = self._scipy(
                A, b, x0=x0, rtol=rtol, M=M, callback=watch.step, **options
            )
        except NullDirection:
            return Run(watch.x, watch.iterations, accepted, None)
        if info == 0:
            # What met SciPy's rule also carries rounding, and MINRES measures against
            # ||A|| ||x||; which is everything if a singular A made x blow up.
            relative = max(rtol, eps)
            size = watch.norms.get("A", 0.0) * float(norm(x)) + float(norm(b))
            backward = 10.0 * sqrt(watch.iterations + 1) * relative * size
            accepted = max(accepted, min(backward, sqrt(relative) * float(norm(b))))
        return Run(x, watch.iterations, accepted, "maxiter" if info else None)
