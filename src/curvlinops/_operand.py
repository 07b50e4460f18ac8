"""A matrix as algorithms see it: products of tensors, whatever the matrix is."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.sparse.linalg import aslinearoperator
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
