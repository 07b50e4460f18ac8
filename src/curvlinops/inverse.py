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
step, with block products, if there are enough of them and ``A`` is not too large (see
``TOGETHER_MIN_COLUMNS`` and ``TOGETHER_MAX_DIM`` of :mod:`curvlinops._krylov`); one by
one otherwise, or with a callback or log.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import torch
from numpy.linalg import LinAlgError, norm
from scipy.sparse.linalg import LinearOperator, cg, lsmr, minres
from torch import Tensor

from curvlinops._counts import as_count
from curvlinops._krylov import (
    DEFAULT_RTOL,
    Inverse,
    KrylovInverse,
    Run,
    SolverStatistics,
    SymmetricInverse,
    Watch,
    as_preconditioner,
)
from curvlinops._lockstep import Multiply, Products
from curvlinops._operator import TorchOperator
from curvlinops._spaces import real_scalar, to_numpy, to_torch

__all__ = [
    "CGInverseLinearOperator",
    "LSMRInverseLinearOperator",
    "MINRESInverseLinearOperator",
    "NeumannInverseLinearOperator",
    "SolverStatistics",
]


class CGInverseLinearOperator(SymmetricInverse, LinearOperator):
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
        tensor of shape ``(N, K)`` on the operator's device and returns such a tensor;
        a method that multiplies (``P.__matmul__``) stands for its matrix.
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
    checkpoint : str, path-like, or Checkpoint
        File to journal all products in, one vector for each;
        :class:`~curvlinops.estimators.Checkpoint` bounds how many. A solve of the same
        system that finds the file goes on where the last one was stopped, however it
        was, and ends with the same bits; another right-hand side needs another file.
        See
        :class:`~curvlinops.estimators.JournalledOperator`.

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
    _names: ClassVar[dict[str, str]] = SymmetricInverse._names | {
        "atol": "atol",
        "stop_updating_after": "stop_updating_after",
        "eps": "eps",
        "max_tridiag_iter": "max_tridiag_iter",
        "n_tridiag": "n_tridiag",
        "checkpoint": "checkpoint",
    }
    _scipy = staticmethod(cg)
    _own: ClassVar[set[str]] = {"atol", "maxiter"}
    _cure = (
        "CG needs a positive definite operator: add damping (`A.damped(d)`), or use "
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


class MINRESInverseLinearOperator(SymmetricInverse, LinearOperator):
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
    _names: ClassVar[dict[str, str]] = SymmetricInverse._names | {
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
            self._system = self._A.damped(-shift)


class LSMRInverseLinearOperator(KrylovInverse, LinearOperator):
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

    def _solve(self, b: np.ndarray, x0: np.ndarray | None, multiply: Multiply) -> Run:
        options = {k: v for k, v in self._options.items() if k in self._own}
        watch = Watch(multiply, b, torch.finfo(self.torch_dtype).eps)
        operator = watch.operator("A", adjoint="A^T")
        x, istop, iterations, *_ = lsmr(operator, b, x0=x0, **options)
        limit = {3: "conlim", 7: "maxiter"}.get(istop)
        solved = istop in (0, 1, 2, 4, 5)
        return Run(x, iterations, np.inf if solved else -1.0, limit)


def _solver(A: TorchOperator, **hyperparameters: Any) -> TorchOperator:
    """Return the inverse by the solver that every such matrix has."""
    symmetric = A.adjoint() is A
    cls = MINRESInverseLinearOperator if symmetric else LSMRInverseLinearOperator
    return cls(A, **hyperparameters)


TorchOperator._makers["solver"] = _solver


# -- Neumann series -----------------------------------------------------------------


class NeumannInverseLinearOperator(Inverse, LinearOperator):
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
        tensor; the adjoint of this series is not known then. A method that multiplies
        (``P.__matmul__``) stands for its matrix.

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
        terms, alpha = as_count(num_terms), real_scalar(scale)
        if terms is None or terms < 0:
            raise ValueError(
                f"A Neumann series needs num_terms = 0, 1, 2, ..., got {num_terms!r}."
            )
        if alpha is None or not 0 < alpha < np.inf:
            raise ValueError(
                f"A Neumann series needs a positive scale, got {scale!r}. Pass e.g. "
                "1.99 divided by the largest eigenvalue."
            )
        self.num_terms, self.scale, self.check_nan = terms, alpha, check_nan
        self._P = (
            None
            if preconditioner is None
            else as_preconditioner(preconditioner, self._A)
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
            "lambda_max, or add damping (`A.damped(d)`) to an indefinite operator."
        )
