"""What every estimator shares: the matrix as it sees it, and the result it returns."""

from __future__ import annotations

import json
from dataclasses import dataclass
from operator import index
from typing import Any

import numpy as np
import torch
from scipy.sparse.linalg import aslinearoperator
from scipy.special import stdtrit
from torch import Tensor

#: Dtypes of NumPy in which foreign operators are multiplied; all others (integers, half
#: precision, long double) are multiplied in float64.
DTYPES = ("float32", "float64", "complex64", "complex128")
_HALF = (torch.float16, torch.bfloat16)


def to_numpy(x: Any) -> np.ndarray:
    """Return a tensor (from any device) or array-like as NumPy array."""
    return x.detach().cpu().numpy() if torch.is_tensor(x) else np.asarray(x)


def to_json(x: Any) -> str:
    """Return nested settings as JSON, numbers of NumPy and torch included."""
    return json.dumps(x, default=lambda number: to_numpy(number).tolist())


class ArrayResult:
    """Mixin that lets NumPy and Matplotlib take a result object as an array."""

    def numpy(self) -> np.ndarray:
        """Return the result as NumPy array, copied from the device if need be."""
        raise NotImplementedError

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """Return :meth:`numpy`, for NumPy functions."""
        if copy is None:  # which NumPy 1 does not know
            return np.asarray(self.numpy(), dtype=dtype)
        return np.array(self.numpy(), dtype=dtype, copy=copy)


#: Fewest samples whose spread is believed: below it nothing counts as converged.
FEWEST_SAMPLES = 8


def student(num_samples: int, level: float = 0.95) -> float:
    """Return how many standard errors a two-sided interval takes to either side.

    Fewer than three samples have no standard error: then nothing is random, and the
    normal distribution's number is returned.
    """
    freedom = num_samples - 1 if num_samples > 2 else np.inf
    return float(stdtrit(freedom, (1 + level) / 2))


@dataclass(frozen=True, eq=False, repr=False)
class Estimate(ArrayResult):
    r"""A number, or an array of numbers, with its error and its price.

    Prints as ``value +- error``.

    Attributes
    ----------
    value : Tensor or numpy.ndarray
        The estimate, of the operator's kind and on its device.
    standard_error : Tensor or numpy.ndarray
        Sampling error: the standard deviation of ``value`` over seeds, estimated from
        the samples. NaN for fewer than three of them, 0 if nothing is random.
    num_products : int
        Products with the matrix that were spent, one per column.
    num_samples : int
        Samples whose mean ``value`` is.
    seed : int or None
        Seed that reproduces ``value``; ``None`` if nothing is random.
    krylov_error : float
        How far the exact mean over the same samples may be from ``value``, because
        Krylov spaces of finite depth stand for the matrix: half of a bracket where the
        function has one, else the change from half the depth.
    converged : bool
        Whether the error asked for was reached. If none was, whether there are at least
        eight samples, and the Krylov error is no larger than the sampling error or one
        per cent of the value.
    """

    value: Any
    standard_error: Any
    num_products: int
    num_samples: int = 1
    seed: int | None = None
    krylov_error: float = 0.0
    converged: bool = True

    @property
    def error(self) -> Any:
        r"""Both errors, :math:`\sqrt{\mathrm{se}^2 + \mathrm{krylov}^2}`."""
        return (self.standard_error**2 + self.krylov_error**2) ** 0.5

    @property
    def truncation_error(self) -> float:
        """Another name of :attr:`krylov_error`."""
        return self.krylov_error

    def confidence_interval(self, level: float = 0.95) -> tuple[Any, Any]:
        """Return lower and upper end of Student's interval, of :attr:`error`.

        Parameters
        ----------
        level : float, optional
            Probability that the interval covers the true value, in (0, 1).

        Returns
        -------
        tuple
            Two objects like :attr:`value`.
        """
        if not 0 < level < 1:
            raise ValueError(f"level is a probability in (0, 1), got {level!r}.")
        margin = student(self.num_samples, level) * self.error
        return self.value - margin, self.value + margin

    def numpy(self) -> np.ndarray:
        """Return :attr:`value` as NumPy array."""
        return to_numpy(self.value)

    def __float__(self) -> float:
        """Return a scalar :attr:`value` as Python float."""
        return float(self.value)

    def __repr__(self) -> str:
        """Return value, error, and a word if it is not converged."""
        value, error = self.numpy(), to_numpy(self.error)
        text = f"{value} +- {error}" if value.ndim else f"{value:.8g} +- {error:.2g}"
        return text if self.converged else f"{text} (not converged)"


@dataclass(frozen=True)
class Home:
    """Where a matrix's results live; knows the matrix no more.

    Attributes
    ----------
    dtype : torch.dtype
        Of the matrix.
    device : torch.device or None
        Of the matrix; ``None`` if its results are NumPy's.
    """

    dtype: torch.dtype
    device: torch.device | None

    def __call__(self, x: Any) -> Any:
        """Return a tensor or number in this precision, here or as NumPy's."""
        tensor = torch.as_tensor(x)
        complexity = self.dtype.to_complex() if tensor.is_complex() else None
        tensor = tensor.to(complexity or self.dtype.to_real())
        if self.device is None:
            return tensor.cpu().numpy()[()]
        return tensor.to(self.device)


class Operand:
    """A matrix as algorithms see it: products of tensors, checked and counted.

    Parameters
    ----------
    A : LinearOperator, array, sparse matrix, or Tensor
        Operators with ``torch_dtype`` and ``device`` and tensors are multiplied on
        their device; everything else is multiplied through NumPy.

    Attributes
    ----------
    shape : tuple of int
        Of the matrix.
    dtype : torch.dtype
        In which vectors are kept: the matrix's own, but float32 for half precision
        and float64 for integers.
    device : torch.device
        On which vectors live.
    eps : float
        Rounding error of a product: of the coarsest dtype that it is made in.
    num_products : int
        Products so far, one per column.
    """

    def __init__(self, A: Any) -> None:
        self.on_torch = torch.is_tensor(A) or hasattr(A, "torch_dtype")
        if not self.on_torch:
            A = aslinearoperator(A)
            name = "float64" if A.dtype is None else np.dtype(A.dtype).name
            native = getattr(torch, name if name in DTYPES else "float64")
            self.device = torch.device("cpu")
        elif torch.is_tensor(A):
            A = A.detach() if A.is_floating_point() or A.is_complex() else A.double()
            native, self.device = A.dtype, A.device
        else:
            native, self.device = A.torch_dtype, torch.device(A.device)
        self._native = native
        self.dtype = torch.float32 if native in _HALF else native
        self.eps = _coarsest(A, torch.finfo(native).eps)
        self.shape = (int(A.shape[0]), int(A.shape[1]))
        self.num_products = 0
        self.matrix = A
        self._numpy_dtype = to_numpy(torch.empty(0, dtype=self.dtype)).dtype
        self._adjoint: Any = None

    @property
    def dim(self) -> int:
        """Number of columns."""
        return self.shape[1]

    @property
    def name(self) -> str:
        """Class of the matrix, for messages."""
        return type(self.matrix).__name__

    def require_square(self) -> None:
        """Raise a ``ValueError`` unless the matrix is square."""
        if self.shape[0] != self.shape[1]:
            raise ValueError(f"A square matrix is needed, got shape {self.shape}.")

    def adjoint(self) -> Any:
        """Return the conjugate transpose of the matrix."""
        if self._adjoint is None:
            A = self.matrix
            self._adjoint = A.mH if torch.is_tensor(A) else A.adjoint()
        return self._adjoint

    def multiply(self, X: Tensor, adjoint: bool = False) -> Tensor:
        """Return ``A @ X`` (or ``A^H @ X``) for ``X`` of shape ``(N, K)``.

        Raises
        ------
        ValueError
            If the result has NaN or infinite entries.
        """
        A = self.adjoint() if adjoint else self.matrix
        x = X[:, 0] if X.shape[1] == 1 else X
        try:
            if self.on_torch:
                Y = (A @ x.to(self._native)).to(self.dtype)
            else:
                product = np.asarray(A @ x.numpy())
                if product.dtype.kind in "fc":  # it may be coarser than A.dtype
                    self.eps = max(self.eps, float(np.finfo(product.dtype).eps))
                Y = torch.from_numpy(product.astype(self._numpy_dtype))
        except Exception as error:
            error.add_note(f"This was product {self.num_products + 1}.")
            raise
        self.num_products += X.shape[1]
        self.require_finite(Y)
        return Y.reshape(len(Y), X.shape[1])

    def require_finite(self, Y: Tensor) -> None:
        """Raise if the product made last is not finite."""
        # A finite sum proves finite entries in one pass; it may also overflow.
        if not torch.isfinite(Y.sum()) and not torch.isfinite(Y).all():
            raise ValueError(
                f"Product {self.num_products} with {self.name} of shape {self.shape} "
                "has NaN or infinite entries. Check the matrix, or the model and data "
                "behind it (overflow in half precision, a batch without targets)."
            )

    @property
    def result(self) -> Home:
        """What brings numbers to where the user of this matrix works."""
        return Home(self.dtype, self.device if self.on_torch else None)


def _coarsest(A: Any, eps: float) -> float:
    """Return the largest rounding error among an operator and its parts."""
    parts = [part for part in getattr(A, "args", ()) if hasattr(part, "torch_dtype")]
    return max([eps] + [_coarsest(p, torch.finfo(p.torch_dtype).eps) for p in parts])


def require_positive_int(name: str, value: Any) -> int:
    """Return a positive integer argument (all that has an index), or raise."""
    try:
        number = None if isinstance(value, bool) else index(value)
    except TypeError:
        number = None
    if number is None:
        raise TypeError(f"{name} is a positive integer, got {value!r}.")
    if number < 1:
        raise ValueError(f"{name} is a positive integer, got {value}.")
    return number


def require_tolerance(name: str, value: Any) -> None:
    """Raise unless a tolerance is a number that is not negative."""
    if not 0 <= value < np.inf:
        raise ValueError(f"{name} is a tolerance, 0 or above, got {value!r}.")


def require_choice(name: str, value: Any, choices: Any) -> Any:
    """Return an argument that is one of a few values, or raise listing them."""
    if value not in choices:
        raise ValueError(
            f"{name} is one of {', '.join(map(repr, choices))}; got {value!r}."
        )
    return value
