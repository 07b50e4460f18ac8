r"""Inverses as operators: every product solves a linear system.

``A_inv @ b`` returns an approximation of :math:`x = A^{-1} b`, where ``b`` is a vector
or a block of vectors, in NumPy or torch. What the solver did is found in
``A_inv.statistics`` afterwards.

:class:`CGInverseLinearOperator`
    for a symmetric positive definite ``A``: one product with ``A`` per iteration.
:class:`MINRESInverseLinearOperator`
    for a symmetric ``A``: one product with ``A`` per iteration.
:class:`LSMRInverseLinearOperator`
    for any square ``A``: a product with ``A`` and one with its adjoint per iteration.
:class:`NeumannInverseLinearOperator`
    if all eigenvalues of ``scale * P A`` lie in (0, 2): one product per term.

Every solve makes one more product, for the true residual. The Krylov solvers are those
of :mod:`scipy.sparse.linalg`, which take one right-hand side. Several are solved in
step, with block products, if there are at least :data:`TOGETHER_MIN_COLUMNS` and ``N``
is at most :data:`TOGETHER_MAX_DIM`; one by one otherwise, or with a callback or log.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from math import isfinite, sqrt
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from numpy.linalg import LinAlgError, norm
from scipy.sparse.linalg import LinearOperator, cg, lsmr, minres
from torch import Tensor

from curvlinops._lockstep import Multiply, Products, solve_each, solve_together
from curvlinops._operator import TorchOperator, _is_tensor_list
from curvlinops._spaces import numeric_array, real_scalar, to_numpy, to_torch
from curvlinops.structured import IdentityLinearOperator, as_operator

__all__ = [
    "CGInverseLinearOperator",
    "LSMRInverseLinearOperator",
    "MINRESInverseLinearOperator",
    "NeumannInverseLinearOperator",
    "SolverStatistics",
]

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


class _Inverse(TorchOperator):
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
        return statistics


class _Function(TorchOperator, LinearOperator):
    """A user's function of ``(N, K)`` tensors as an operator without known adjoint."""

    def __init__(self, function: Callable[[Tensor], Any], A: TorchOperator) -> None:
        super().__init__(A._out_space, A._in_space)
        self._function = function

    def _apply(self, V: Tensor) -> Tensor:
        result = torch.as_tensor(self._function(V.clone())).detach()
        if result.shape != V.shape:
            raise ValueError(
                f"The preconditioner {self._function!r} turned a tensor of shape "
                f"{tuple(V.shape)} into one of shape {tuple(result.shape)}. It must "
                "multiply blocks of columns and keep their shape."
            )
        return result.to(V.device, V.dtype)

    def _adjoint(self) -> TorchOperator:
        raise TypeError(
            f"The adjoint of the preconditioner {self._function!r} is not known. Pass "
            "an operator, an array, or a sparse matrix instead of a function."
        )


def _preconditioner(M: Any, A: TorchOperator) -> TorchOperator:
    """Return a preconditioner of ``A`` as one of our operators."""
    if callable(M) and not hasattr(M, "shape"):
        return _Function(M, A)
    P = as_operator(M)
    if P.shape != A.shape:
        raise ValueError(
            f"A preconditioner approximates the inverse of {A!r}, got one of shape "
            f"{P.shape}. For a diagonal pass `DiagonalLinearOperator(entries)`."
        )
    return P


# -- Krylov solvers -----------------------------------------------------------------


class _Run(NamedTuple):
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


class _KrylovInverse(_Inverse):
    """Inverse by one of SciPy's Krylov solvers, run on every column.

    Subclasses list the hyperparameters that they know by every spelling, and write
    ``_solve``.
    """

    #: From every accepted spelling of a hyperparameter to SciPy's.
    _names: ClassVar[dict[str, str]]

    def __init__(self, A: Any, **hyperparameters: Any) -> None:
        super().__init__(A)
        self._options = self._read(hyperparameters)
        if "x0" in self._options:
            self._options["x0"] = self._read_guess(self._options["x0"])
        #: The system that SciPy solves; its dtype is that of SciPy's vectors.
        self._system: TorchOperator = self._A

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
        if (limit := real_scalar(options.get("maxiter", 1))) is None or not (
            limit >= 1 and limit.is_integer()
        ):
            raise ValueError(
                f"{name} needs a positive integer as 'maxiter' (or 'max_iter'), got "
                f"{options['maxiter']!r}."
            )
        return options | ({"maxiter": int(limit)} if "maxiter" in options else {})

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

    def _solve(self, b: np.ndarray, x0: np.ndarray | None, multiply: Multiply) -> _Run:
        """Solve for one right-hand side."""
        raise NotImplementedError

    def _apply(self, V: Tensor) -> Tensor:
        self._require_finite(V)
        B = to_numpy(V).astype(self._system.dtype, copy=False)
        K, products = B.shape[1], self._products()
        guesses = self._guesses(K)

        def solve(j: int, multiply: Multiply) -> _Run:
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
        return to_torch(X, self._out_space)

    def _warn_if_unsolved(self, runs: list[_Run], statistics: SolverStatistics) -> None:
        """Warn of columns that ended unsolved, unless by a limit of the caller's."""
        limits = {
            run.limit
            for run, converged in zip(runs, statistics.converged, strict=True)
            if not converged
        }
        for limit in sorted(limits - self._options.keys(), key=str):
            cause = (
                "ended with a large residual: the operator is singular or nearly so, "
                "or the system has no solution. Add damping (`A + d * I`)"
                if limit is None
                else f"reached SciPy's default {limit!r}. Pass a larger one (or this "
                "one, to accept the result), a preconditioner or a looser tolerance "
                "where the method has one, or add damping (`A + d * I`)"
            )
            # Level 8 is the line that says `A_inv @ b`.
            warnings.warn(
                f"{self.solver} {cause}. {statistics!r}",
                RuntimeWarning,
                stacklevel=8,
            )


class _NullDirection(Exception):
    """A vector whose product is zero up to rounding stops a solver."""


class _Watch:
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
                f"{name} is singular or nearly so. Add damping (`A + d * I`), or limit "
                "the iterations with `maxiter`."
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
            raise _NullDirection
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


class _SymmetricInverse(_KrylovInverse):
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
            self._options["M"] = _preconditioner(self._options["M"], self._A)

    def _adjoint(self) -> TorchOperator:
        adjoint = self._A.adjoint()
        return self if adjoint is self._A else type(self)(adjoint, **self._options)

    def _products(self) -> Products:
        M = self._options.get("M")
        return {**super()._products(), **({} if M is None else {"M": M.dot})}

    def _solve(self, b: np.ndarray, x0: np.ndarray | None, multiply: Multiply) -> _Run:
        options = {k: v for k, v in self._options.items() if k in self._own}
        eps = torch.finfo(self.torch_dtype).eps
        floor = float(np.finfo(b.dtype).eps) ** 2
        rtol = max(self._options.get("rtol", DEFAULT_RTOL[self.torch_dtype]), floor)
        start = np.zeros_like(b) if x0 is None else x0
        watch = _Watch(multiply, start, eps, self._options.get("callback"))
        M = None
        if "M" in self._options:
            M = watch.operator("M", cure="Pass a positive definite preconditioner.")
        A = watch.operator("A", cure=self._cure)
        accepted = max(rtol * float(norm(b)), self._options.get("atol", 0.0))
        try:
            x, info = self._scipy(
                A, b, x0=x0, rtol=rtol, M=M, callback=watch.step, **options
            )
        except _NullDirection:
            return _Run(watch.x, watch.iterations, accepted, None)
        if info == 0:
            # What met SciPy's rule also carries rounding, and MINRES measures against
            # ||A|| ||x||; which is everything if a singular A made x blow up.
            relative = max(rtol, eps)
            size = watch.norms.get("A", 0.0) * float(norm(x)) + float(norm(b))
            backward = 10.0 * sqrt(watch.iterations + 1) * relative * size
            accepted = max(accepted, min(backward, sqrt(relative) * float(norm(b))))
        return _Run(x, watch.iterations, accepted, "maxiter" if info else None)


class CGInverseLinearOperator(_SymmetricInverse, LinearOperator):
    r"""Inverse of a symmetric positive definite operator by conjugate gradients.

    Iterate :math:`x_k` minimises :math:`\frac12 x^\top A x - b^\top x` over the Krylov
    space :math:`\operatorname{span}(b, A b, \dots, A^{k-1} b)`.

    Parameters
    ----------
    A : LinearOperator, array, sparse matrix, or Tensor
        Symmetric positive definite, of shape ``(N, N)``; e.g. a damped GGN.
    **hyperparameters
        See below. ``None`` stands for the default.

    Other Parameters
    ----------------
    rtol, tolerance : float
        Stop at :math:`\|b - A x\| \le \text{rtol} \, \|b\|`. Default:
        ``stop_updating_after`` if given, else 1e-10 in float64, 1e-6 in float32, 1e-3
        in float16, and 1e-2 in bfloat16. Below the squared precision it is raised to
        that: a residual of zero divides zero by zero.
    atol : float
        Stop at this residual norm, too. Default: 0.
    maxiter, max_iter : int
        Limit of iterations. Default: SciPy's ``10 N``; reaching that one warns.
    M, preconditioner : LinearOperator, array, sparse matrix, Tensor, or callable
        Symmetric positive definite approximation of :math:`A^{-1}`. A callable gets a
        tensor of shape ``(N, K)`` on the operator's device and returns such a tensor.
    x0, initial_guess : array_like, Tensor, or list of Tensor
        Where to start: a vector, or a block with one column per right-hand side.
        Default: zero.
    callback : callable
        Called as ``callback(x)`` with the iterate after every iteration, for one
        right-hand side after the other. ``x`` may be overwritten later: copy it.
    stop_updating_after : float
        Default of ``rtol``.
    eps, max_tridiag_iter
        Accepted without effect.
    n_tridiag : int
        Only 0 is accepted.

    Attributes
    ----------
    statistics : SolverStatistics or None
        What the solver did in the last product.

    Raises
    ------
    ValueError
        If ``A`` is not square, a hyperparameter is given in two spellings or has an
        impossible value, or (at a product) the operator returns NaN or infinity.
    TypeError
        If a hyperparameter is unknown.
    numpy.linalg.LinAlgError
        If a product finds :math:`p^\top A p \le 0` by more than rounding: ``A`` or the
        preconditioner is not positive definite.

    Warns
    -----
    RuntimeWarning
        If the default ``maxiter`` is reached, or ``A`` turns out to be singular to
        working precision. If the caller set ``maxiter``, reaching it is silent.

    Notes
    -----
    Self-adjoint if ``A`` is. A product costs one product with ``A`` (and ``M``) per
    iteration, one for the residual, and one more with an initial guess.

    References
    ----------
    Hestenes, M. R., and Stiefel, E. (1952). Methods of conjugate gradients for solving
    linear systems. Journal of Research of the National Bureau of Standards, 49(6).
    doi:10.6028/jres.049.044

    Examples
    --------
    >>> import numpy as np
    >>> from curvlinops.inverse import CGInverseLinearOperator
    >>> A, b = np.array([[4.0, 1.0], [1.0, 3.0]]), np.array([1.0, 2.0])
    >>> A_inv = CGInverseLinearOperator(A)
    >>> bool(np.allclose(A_inv @ b, np.linalg.solve(A, b)))
    True
    >>> A_inv.statistics
    <CG: 1 of 1 columns converged in 2 iterations, relative residual <= ...>
    """

    solver = "CG"
    _names: ClassVar[dict[str, str]] = _SymmetricInverse._names | {
        "atol": "atol",
        "stop_updating_after": "stop_updating_after",
        "eps": "eps",
        "max_tridiag_iter": "max_tridiag_iter",
        "n_tridiag": "n_tridiag",
    }
    _scipy = staticmethod(cg)
    _own: ClassVar[set[str]] = {"atol", "maxiter"}
    _cure = (
        "CG needs a positive definite operator: add damping (`A + d * I`), or use "
        "`MINRESInverseLinearOperator`."
    )

    def __init__(self, A: Any, **hyperparameters: Any) -> None:
        super().__init__(A, **hyperparameters)
        if self._options.get("n_tridiag", 0):
            raise ValueError(
                f"CG returns no tridiagonal matrices, got n_tridiag="
                f"{self._options['n_tridiag']}. For eigenvalues call "
                "`scipy.sparse.linalg.eigsh(A, k)`."
            )
        if "stop_updating_after" in self._options:
            self._options.setdefault("rtol", self._options["stop_updating_after"])


class MINRESInverseLinearOperator(_SymmetricInverse, LinearOperator):
    r"""Inverse of a symmetric operator, definite or not, by minimal residuals.

    Iterate :math:`x_k` minimises :math:`\|b - (A - \sigma I) x\|_2` over the Krylov
    space :math:`\operatorname{span}(b, A b, \dots, A^{k-1} b)`.

    Parameters
    ----------
    A : LinearOperator, array, sparse matrix, or Tensor
        Symmetric, of shape ``(N, N)``. It may be singular if the right-hand side lies
        in its range.
    **hyperparameters
        ``rtol`` (``tolerance``), ``maxiter`` (``max_iter``; default: SciPy's ``5 N``),
        ``M`` (``preconditioner``), ``x0`` (``initial_guess``), and ``callback``: see
        :class:`CGInverseLinearOperator`. And those below.

    Other Parameters
    ----------------
    shift : float
        The number :math:`\sigma`: the inverse is that of :math:`A - \sigma I`.
        Default: 0.
    show, check : bool
        Print a log; test on every solve whether ``A`` and ``M`` are symmetric. Default:
        False.

    Attributes
    ----------
    statistics : SolverStatistics or None
        What the solver did in the last product.

    Raises
    ------
    ValueError
        If ``A`` is not square, a hyperparameter is given in two spellings or has an
        impossible value, or (at a product) the operator returns NaN or infinity.
    TypeError
        If a hyperparameter is unknown.
    numpy.linalg.LinAlgError
        If a product finds that the preconditioner is not positive definite.

    Warns
    -----
    RuntimeWarning
        If the default ``maxiter`` is reached, or the system has no solution. If the
        caller set ``maxiter``, reaching it is silent.

    Notes
    -----
    Self-adjoint if ``A`` is. Costs are those of CG. SciPy's stopping rule measures the
    residual against :math:`\text{rtol} \, \|A\| \|x\|`.

    References
    ----------
    Paige, C. C., and Saunders, M. A. (1975). Solution of sparse indefinite systems of
    linear equations. SIAM Journal on Numerical Analysis, 12(4). doi:10.1137/0712047

    Examples
    --------
    >>> import numpy as np
    >>> from curvlinops.inverse import MINRESInverseLinearOperator
    >>> A, b = np.array([[1.0, 2.0], [2.0, -1.0]]), np.array([1.0, 2.0])
    >>> bool(np.allclose(MINRESInverseLinearOperator(A) @ b, np.linalg.solve(A, b)))
    True
    """

    solver = "MINRES"
    _names: ClassVar[dict[str, str]] = _SymmetricInverse._names | {
        "shift": "shift",
        "show": "show",
        "check": "check",
    }
    _scipy = staticmethod(minres)
    _own: ClassVar[set[str]] = {"maxiter", "show", "check"}

    def __init__(self, A: Any, **hyperparameters: Any) -> None:
        super().__init__(A, **hyperparameters)
        if shift := self._options.get("shift", 0.0):
            # Not SciPy's shift, which is wrong together with an initial guess.
            space = self._A._in_space
            identity = IdentityLinearOperator(space.shapes, space.device, space.dtype)
            self._system = self._A - shift * identity


class LSMRInverseLinearOperator(_KrylovInverse, LinearOperator):
    r"""Inverse of any square operator by the least-squares method LSMR.

    .. math::
        x = \arg\min_x \|b - A x\|_2^2 + \text{damp}^2 \|x\|_2^2

    Parameters
    ----------
    A : LinearOperator, array, sparse matrix, or Tensor
        Of shape ``(N, N)``, with an adjoint. For a singular one the result is the
        least-squares solution of smallest norm.
    **hyperparameters
        Those of :func:`scipy.sparse.linalg.lsmr`, with its defaults, listed below.

    Other Parameters
    ----------------
    atol, btol : float
        Stop at :math:`\|r\| \le \text{atol} \|A\| \|x\| + \text{btol} \|b\|`, or at
        :math:`\|A^\top r\| \le \text{atol} \|A\| \|r\|`. Default: 1e-6.
    damp : float
        Damping of the least-squares problem. Default: 0.
    conlim : float
        Stop if the estimated condition number exceeds this limit. Default: 1e8.
    maxiter : int
        Limit of iterations. Default: SciPy's ``N``; reaching that one warns.
    show : bool
        Print a log. Default: False.
    x0 : array_like, Tensor, or list of Tensor
        Where to start: a vector, or a block with one column per right-hand side.
        Default: zero.

    Attributes
    ----------
    statistics : SolverStatistics or None
        What the solver did in the last product. A column has converged if SciPy's
        ``istop`` names a solution or a least-squares solution (0, 1, 2, 4, 5).

    Raises
    ------
    ValueError
        If ``A`` is not square, a hyperparameter has an impossible value, ``damp``
        comes with ``x0``, or (at a product) the operator returns NaN or infinity.
    TypeError
        If a hyperparameter is unknown.

    Warns
    -----
    RuntimeWarning
        If a default limit is reached. If the caller set it, reaching it is silent.

    Notes
    -----
    The adjoint is the LSMR inverse of the adjoint. An iteration costs a product with
    ``A`` and one with its adjoint. The solver's vectors are in float64 whatever the
    operator's dtype: in float32 SciPy 1.17 overflows.

    References
    ----------
    Fong, D. C.-L., and Saunders, M. A. (2011). LSMR: an iterative algorithm for sparse
    least-squares problems. SIAM Journal on Scientific Computing, 33(5).
    arXiv:1006.0758

    Examples
    --------
    >>> import numpy as np
    >>> from curvlinops.inverse import LSMRInverseLinearOperator
    >>> A, b = np.array([[1.0, 2.0], [0.0, 3.0]]), np.array([1.0, 2.0])
    >>> bool(np.allclose(LSMRInverseLinearOperator(A) @ b, np.linalg.solve(A, b)))
    True
    """

    solver = "LSMR"
    _own: ClassVar[set[str]] = {"damp", "atol", "btol", "conlim", "maxiter", "show"}
    _names: ClassVar[dict[str, str]] = {name: name for name in (*_own, "x0")}

    def __init__(self, A: Any, **hyperparameters: Any) -> None:
        super().__init__(A, **hyperparameters)
        self._system = self._A.to_scipy(np.float64)
        if self._options.get("damp") and "x0" in self._options:
            raise ValueError(
                "With 'x0', SciPy's LSMR damps the distance to it instead of the "
                "solution. Pass either 'damp' or 'x0'."
            )

    def _adjoint(self) -> TorchOperator:
        adjoint = self._A.adjoint()
        if adjoint is self._A:
            return self
        return LSMRInverseLinearOperator(adjoint, **self._options)

    def _products(self) -> Products:
        return {**super()._products(), "A^T": self._system.adjoint().dot}

    def _solve(self, b: np.ndarray, x0: np.ndarray | None, multiply: Multiply) -> _Run:
        options = {k: v for k, v in self._options.items() if k in self._own}
        watch = _Watch(multiply, b, torch.finfo(self.torch_dtype).eps)
        operator = watch.operator("A", adjoint="A^T")
        x, istop, iterations, *_ = lsmr(operator, b, x0=x0, **options)
        limit = {3: "conlim", 7: "maxiter"}.get(istop)
        solved = istop in (0, 1, 2, 4, 5)
        return _Run(x, iterations, np.inf if solved else -1.0, limit)


# -- Neumann series -----------------------------------------------------------------


class NeumannInverseLinearOperator(_Inverse, LinearOperator):
    r"""Inverse by a truncated Neumann series.

    .. math::
        A^{-1} \approx \alpha \sum_{k=0}^{K} (I - \alpha P A)^k P

    Parameters
    ----------
    A : LinearOperator, array, sparse matrix, or Tensor
        Of shape ``(N, N)``.
    num_terms : int, optional
        The number :math:`K` of terms after the first.
    scale : float, optional
        The positive number :math:`\alpha`. The series converges if all eigenvalues of
        :math:`\alpha P A` lie in :math:`(0, 2)`, e.g. with 1.99 divided by the largest
        eigenvalue of a positive definite :math:`A`.
    check_nan : bool, optional
        Look for NaN and infinity after every term, instead of in the result only.
    preconditioner : LinearOperator, array, sparse matrix, Tensor, or callable, optional
        Approximation :math:`P` of :math:`A^{-1}`; the identity if absent. A callable
        gets a tensor of shape ``(N, K)`` on the operator's device and returns such a
        tensor.

    Attributes
    ----------
    statistics : SolverStatistics or None
        Terms and residuals of the last product. A column has converged if the relative
        residual is at most the default ``rtol`` of :class:`CGInverseLinearOperator`.

    Raises
    ------
    ValueError
        If ``A`` is not square, ``num_terms`` is negative, or ``scale`` is not positive.
    numpy.linalg.LinAlgError
        If a product finds that the series diverges: a term is not finite, or the last
        one is larger than the first. Terms in between may grow.

    Notes
    -----
    The adjoint is the series of the adjoints,
    :math:`\alpha \sum_k (I - \alpha P^\top A^\top)^k P^\top`. A product costs
    :math:`K` products with ``A`` (and :math:`K + 1` with ``P``), and one for the
    residual.

    References
    ----------
    Lorraine, J., Vicol, P., and Duvenaud, D. (2020). Optimizing millions of
    hyperparameters by implicit differentiation. AISTATS. arXiv:1911.02590

    Examples
    --------
    >>> import numpy as np
    >>> from curvlinops.inverse import NeumannInverseLinearOperator
    >>> A, b = np.array([[1.0, 0.2], [0.2, 0.5]]), np.array([1.0, 2.0])
    >>> A_inv = NeumannInverseLinearOperator(A, num_terms=50)
    >>> bool(np.allclose(A_inv @ b, np.linalg.solve(A, b)))
    True
    """

    solver = "Neumann"

    def __init__(
        self,
        A: Any,
        num_terms: int = 100,
        scale: float = 1.0,
        check_nan: bool = True,
        preconditioner: Any = None,
    ) -> None:
        super().__init__(A)
        terms, alpha = real_scalar(num_terms), real_scalar(scale)
        if terms is None or not (terms >= 0 and terms.is_integer()):
            raise ValueError(
                f"A Neumann series needs num_terms = 0, 1, 2, ..., got {num_terms!r}."
            )
        if alpha is None or not 0 < alpha < np.inf:
            raise ValueError(
                f"A Neumann series needs a positive scale, got {scale!r}. Pass e.g. "
                "1.99 divided by the largest eigenvalue."
            )
        self.num_terms, self.scale, self.check_nan = int(terms), alpha, check_nan
        self._P = (
            None if preconditioner is None else _preconditioner(preconditioner, self._A)
        )

    def _adjoint(self) -> TorchOperator:
        A, P = self._A.adjoint(), None if self._P is None else self._P.adjoint()
        if A is self._A and P is self._P:
            return self
        return NeumannInverseLinearOperator(
            A, self.num_terms, self.scale, self.check_nan, P
        )

    def _precondition(self, V: Tensor) -> Tensor:
        """Multiply by ``P``, through NumPy if it lives elsewhere."""
        P = self._P
        if P is None:
            return V
        if (P.torch_dtype, P.device) == (self.torch_dtype, self.device):
            return P._apply(V)
        return to_torch(P @ to_numpy(V), self._out_space)

    def _apply(self, V: Tensor) -> Tensor:
        self._require_finite(V)
        A, alpha = self._A, self.scale
        term = first = self._precondition(V)
        total = term.clone()
        for k in range(1, self.num_terms + 1):
            term = term - alpha * self._precondition(A._apply(term))
            total += term
            if self.check_nan and not total.isfinite().all():
                raise LinAlgError(self._divergence(f"term {k} is not finite"))
        total *= alpha
        if not total.isfinite().all():
            raise LinAlgError(self._divergence("the result is not finite"))
        start, end = (
            torch.linalg.vector_norm(t, dim=0, dtype=torch.float64)
            for t in (first, term)
        )
        rounding = torch.finfo(self.torch_dtype).eps ** 0.5
        if (end > (1.0 + rounding) * start).any():
            growth = float((end / start).nan_to_num(0.0).max())
            raise LinAlgError(
                self._divergence(
                    f"term {self.num_terms} is {growth:.3g} times as large as the first"
                )
            )
        self._record_residual(V, total)
        return total

    def _record_residual(self, V: Tensor, X: Tensor) -> None:
        B, R = to_numpy(V), to_numpy(V - self._A._apply(X))
        accepted = DEFAULT_RTOL[self.torch_dtype] * norm(B.astype(np.float64), axis=0)
        self._record(B, R, self.num_terms, accepted)

    def _divergence(self, symptom: str) -> str:
        return (
            f"The Neumann series with scale={self.scale:.3g} diverges: {symptom}. It "
            "converges if the eigenvalues of scale * P A lie in (0, 2): pass scale="
            "1.99 / lambda_max, with `scipy.sparse.linalg.eigsh(A, k=1)` for "
            "lambda_max, or add damping (`A + d * I`) to an indefinite operator."
        )
