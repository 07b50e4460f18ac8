"""What every estimator shares: the matrix as it sees it, and the result it returns."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.sparse.linalg import aslinearoperator
from scipy.stats import t as student_t
from torch import Tensor

#: Torch's name of the NumPy dtypes in which foreign operators are multiplied; all
#: others (integers, half precision, long double) are multiplied in float64.
_TORCH_DTYPES = {
    "float32": torch.float32,
    "complex64": torch.complex64,
    "complex128": torch.complex128,
}
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


@dataclass(frozen=True, eq=False)
class Estimate(ArrayResult):
    """A number, or an array of numbers, with its error and its price.

    Attributes
    ----------
    value : Tensor or numpy.ndarray
        The estimate, of the operator's kind and on its device.
    standard_error : Tensor or numpy.ndarray
        Standard deviation of ``value`` over seeds, estimated from the samples; NaN if
        there is one sample only, 0 if nothing is random.
    num_products : int
        Products with the matrix that were spent, one per column.
    num_samples : int
        Samples whose mean ``value`` is.
    seed : int or None
        Seed that reproduces ``value``; ``None`` if nothing is random.
    truncation_error : float
        Estimated error of the Krylov approximation inside each sample (0 if there is
        none). It is not part of ``standard_error``.
    converged : bool
        Whether the error asked for was reached.
    """

    value: Any
    standard_error: Any
    num_products: int
    num_samples: int = 1
    seed: int | None = None
    truncation_error: float = 0.0
    converged: bool = True

    def confidence_interval(self, level: float = 0.95) -> tuple[Any, Any]:
        """Return lower and upper end of Student's interval for the true value.

        Parameters
        ----------
        level : float, optional
            Probability that the interval covers the true value, in (0, 1).

        Returns
        -------
        tuple
            Two objects like :attr:`value`.
        """
        quantile = float(student_t.ppf((1 + level) / 2, max(self.num_samples - 1, 1)))
        margin = quantile * self.standard_error
        return self.value - margin, self.value + margin

    def numpy(self) -> np.ndarray:
        """Return :attr:`value` as NumPy array."""
        return to_numpy(self.value)

    def __float__(self) -> float:
        """Return a scalar :attr:`value` as Python float."""
        return float(self.value)


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
        """Return a tensor or number in this dtype, on this device or as NumPy's."""
        tensor = torch.as_tensor(x)
        if tensor.is_complex() and not self.dtype.is_complex:
            tensor = tensor.real
        real = self.dtype.to_real()
        tensor = tensor.to(self.dtype if tensor.is_complex() else real)
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
    gram : bool, optional
        Stand for the smaller of ``A^H A`` and ``A A^H`` instead of ``A``.

    Attributes
    ----------
    shape : tuple of int
        Of the matrix.
    dtype : torch.dtype
        In which vectors are kept: the matrix's own, but float32 for half precision
        and float64 for integers.
    device : torch.device
        On which vectors live.
    num_products : int
        Products so far, one per column.
    """

    def __init__(self, A: Any, gram: bool = False) -> None:
        self.on_torch = torch.is_tensor(A) or hasattr(A, "torch_dtype")
        if not self.on_torch:
            A = aslinearoperator(A)
            name = "float64" if A.dtype is None else np.dtype(A.dtype).name
            native = _TORCH_DTYPES.get(name, torch.float64)
            self.device = torch.device("cpu")
        elif torch.is_tensor(A):
            A = A.detach() if A.is_floating_point() or A.is_complex() else A.double()
            native, self.device = A.dtype, A.device
        else:
            native, self.device = A.torch_dtype, torch.device(A.device)
        self._native = native
        self.dtype = torch.float32 if native in _HALF else native
        M, N = A.shape
        self._tall, self._gram = M >= N, gram
        self.shape = (min(M, N), min(M, N)) if gram else (M, N)
        self.num_products = 0
        self.matrix = A
        self._adjoint: Any = None

    @property
    def dim(self) -> int:
        """Number of columns."""
        return int(self.shape[1])

    @property
    def products_per_column(self) -> int:
        """Products with the matrix that one column takes."""
        return 1 + self._gram

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
        if self._gram:
            return self._multiply(self._multiply(X, not self._tall), self._tall)
        return self._multiply(X, adjoint)

    def _multiply(self, X: Tensor, adjoint: bool) -> Tensor:
        A = self.adjoint() if adjoint else self.matrix
        x = X[:, 0] if X.shape[1] == 1 else X
        try:
            if self.on_torch:
                Y = (A @ x.to(self._native)).to(self.dtype)
            else:
                Y = torch.from_numpy(np.array(A @ x.numpy())).to(self.dtype)
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


def require_positive_int(name: str, value: Any) -> int:
    """Return a positive integer argument, or raise naming it."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name} is a positive integer, got {value!r}.")
    if value < 1:
        raise ValueError(f"{name} is a positive integer, got {value}.")
    return int(value)


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
