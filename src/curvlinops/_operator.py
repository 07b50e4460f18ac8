"""What every operator of this package can do: the contract, written once.

:class:`TorchOperator` is a plain mixin that stands in front of SciPy's
:class:`~scipy.sparse.linalg.LinearOperator` among an operator's bases. It recognises
the operand (NumPy, tensor, list of tensors), converts it once, and calls the hook
``_apply``. A new operator writes that hook and, unless it is self-adjoint,
``_adjoint``; everything else is inherited.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from numbers import Number
from reprlib import repr as shortened
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import DTypeLike
from scipy.sparse.linalg import LinearOperator, aslinearoperator
from torch import Tensor, promote_types

from curvlinops._closed_forms import ClosedForms
from curvlinops._counts import count
from curvlinops._spaces import (
    TensorSpace,
    dense_tensor,
    numeric_array,
    real_scalar,
    scalar,
    to_numpy,
    to_torch,
)


def _is_tensor_list(x: Any) -> bool:
    return isinstance(x, (list, tuple)) and bool(x) and all(map(torch.is_tensor, x))


def _factors(a: Any, b: Any, out: Any = None) -> tuple[Any, Any]:
    """Take the arguments of ``numpy.dot``."""
    if out is not None:
        raise TypeError(
            "Products with an operator have their own memory: leave out `out`, and "
            "write `out[...] = A @ x`."
        )
    return a, b


_COMPLEX = (complex, np.complexfloating)


def _no_number(x: Any) -> Any:
    """Return an operand of ``@``, or raise as SciPy does if it is a number."""
    if isinstance(x, Number) or getattr(x, "ndim", None) == 0:
        raise ValueError(
            f"A number is no operand of `@`, got {shortened(x)}. A multiple is `c * A`."
        )
    return x


#: NumPy's functions that are products of operators, and what takes their arguments.
_PRODUCTS: dict[Any, Callable[..., tuple[Any, Any]]] = {np.dot: _factors}
if hasattr(np.linalg, "matmul"):  # `numpy.matmul` itself is no such function
    _PRODUCTS[np.linalg.matmul] = lambda x1, x2, /: (x1, x2)


class TorchOperator(ClosedForms):
    r"""Mixin that makes a SciPy operator out of a product with torch tensors.

    For an operator :math:`A \in \mathbb{R}^{M \times N}`, ``A @ x`` accepts

    * NumPy arrays of shape ``(N,)``, ``(N, 1)`` or ``(N, K)`` and returns NumPy;
    * tensors of these shapes and returns a tensor, on the operand's device;
    * a list of tensors in the input's shapes (``[*shape]`` or ``[*shape, K]``) and
      returns a list of tensors in the output's shapes.

    ``x @ A`` accepts the same with rows in place of columns: ``(M,)``, ``(K, M)``, and
    lists of ``[*shape]`` or ``[K, *shape]`` in the output's shapes.

    Parameters
    ----------
    in_space, out_space : TensorSpace
        Spaces of the vectors that are multiplied, and of the results.

    Notes
    -----
    Subclasses list :class:`scipy.sparse.linalg.LinearOperator` after this mixin and
    write two hooks:

    * ``_apply(V)``: the product with a tensor ``V`` of shape ``(N, K)``, on the
      operator's device and in its dtype, as a tensor of shape ``(M, K)`` that nothing
      else holds. ``K`` is at least one. ``V`` must not be changed.
    * ``_adjoint()``: the adjoint as an operator. Operators with equal spaces inherit
      one that returns the operator itself.

    Results carry no autograd graph. The result's NumPy dtype is ``np.result_type`` of
    operator and operand; arithmetic is done in :attr:`torch_dtype`. Complex operands
    are multiplied as real and imaginary part in one block.
    """

    shape: tuple[int, int]
    dtype: np.dtype

    def __init__(self, in_space: TensorSpace, out_space: TensorSpace) -> None:
        LinearOperator.__init__(
            self, in_space.numpy_dtype, (out_space.dim, in_space.dim)
        )
        self._in_space = in_space
        self._out_space = out_space

    # -- hooks ------------------------------------------------------------------

    def _apply(self, V: Tensor) -> Tensor:
        """Multiply a ``(N, K)`` tensor; return a fresh ``(M, K)`` tensor."""
        raise NotImplementedError(f"{type(self).__name__} defines no product.")

    def _adjoint(self) -> TorchOperator:
        """Return the adjoint: the operator itself, being self-adjoint."""
        return self

    def _transpose(self) -> TorchOperator:
        """Return the transpose: the adjoint, since all entries are real."""
        return self._adjoint()

    # -- torch's side -----------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """Device on which products are computed."""
        return self._in_space.device

    @property
    def torch_dtype(self) -> torch.dtype:
        """Floating-point type in which products are computed."""
        return self._in_space.dtype

    @property
    def in_shapes(self) -> tuple[torch.Size, ...]:
        """Shapes of the tensors in a list that is multiplied."""
        return self._in_space.shapes

    @property
    def out_shapes(self) -> tuple[torch.Size, ...]:
        """Shapes of the tensors in the resulting list."""
        return self._out_space.shapes

    # -- products ---------------------------------------------------------------

    def dot(self, x: Any) -> Any:
        """Multiply a scalar, an operator, an array, a tensor, or a list of tensors.

        Parameters
        ----------
        x : scalar, LinearOperator, array_like, Tensor, or list of Tensor
            Scalars and operators give a lazy operator, everything else the product.

        Returns
        -------
        LinearOperator, numpy.ndarray, Tensor, or list of Tensor
            The product in the operand's container.

        Raises
        ------
        ValueError
            If the operand's shape does not fit.
        TypeError
            If it holds no numbers, or is a tensor of another floating-point type.
        """
        if isinstance(x, (np.ndarray, Tensor)) and x.ndim:  # solvers' operands, at once
            return self._product(x)
        if isinstance(x, LinearOperator):
            if isinstance(x, TorchOperator):
                return self._after(x)
            return LinearOperator.dot(self, x)
        if (number := real_scalar(x)) is not None:
            return self._times(number)
        if isinstance(number := scalar(x), _COMPLEX):
            return LinearOperator.dot(self, number)
        return self._product(x)

    def __matmul__(self, x: Any) -> Any:
        """Return the product, see :meth:`dot`; numbers are no operands."""
        if isinstance(x, (np.ndarray, Tensor)) and x.ndim:  # solvers' operands, at once
            return self._product(x)
        return self.dot(_no_number(x))

    def __rmatmul__(self, x: Any) -> Any:
        """Return ``x @ A``, see :meth:`rdot`; numbers are no operands."""
        return self.__rmul__(_no_number(x))

    def matvec(self, x: Any) -> Any:
        """Multiply one vector of shape ``(N,)`` or ``(N, 1)``; keeps the shape."""
        return self._product(x, columns=1)

    def matmat(self, X: Any) -> Any:
        """Multiply a block of vectors of shape ``(N, K)``."""
        return self._product(X, ndim=2)

    def rmatvec(self, x: Any) -> Any:
        """Multiply one vector of shape ``(M,)`` or ``(M, 1)`` by the adjoint."""
        return self.adjoint().matvec(x)

    def rmatmat(self, X: Any) -> Any:
        """Multiply a block of vectors of shape ``(M, K)`` by the adjoint."""
        return self.adjoint().matmat(X)

    def adjoint(self) -> TorchOperator:
        r"""Return :math:`A^\top`, which is :math:`A^{\mathrm{H}}` as entries are real.

        ``A.H``, ``A.T``, and ``A.transpose()`` are the same.
        """
        return self._adjoint()

    def _rdot(self, x: Any) -> Any:
        if isinstance(x, LinearOperator):
            return LinearOperator._rdot(self, x)
        transposed = self._transpose()
        if _is_tensor_list(x):
            if (rows := self._out_space.pack_rows(x)) is None:
                return transposed._product(x)
            return self._in_space.split(self._rdot(rows))
        x = dense_tensor(x) if torch.is_tensor(x) else numeric_array(x)
        return transposed._product(x.T).T if x.ndim == 2 else transposed._product(x)

    def rdot(self, x: Any) -> Any:
        """Return ``x @ A`` for ``x`` of shape ``(M,)`` or ``(K, M)``.

        Tensors in a list have the shapes ``[*shape]`` of the output or, several rows
        at once, ``[K, *shape]``: rows come first, as in an array.
        """
        return self._rdot(x)

    def __rmul__(self, x: Any) -> Any:
        """Return ``x * A`` for a scalar, ``x @ A`` for anything else."""
        if (number := real_scalar(x)) is not None:
            return self._times(number)
        if isinstance(number := scalar(x), _COMPLEX):
            return LinearOperator.__rmul__(self, number)
        return self._rdot(x)

    def _matmat(self, X: np.ndarray) -> np.ndarray:
        """Multiply a NumPy block (the hook that SciPy looks for in a subclass)."""
        return cast(np.ndarray, self._product(X))

    def _product(
        self, x: Any, columns: int | None = None, ndim: int | None = None
    ) -> Any:
        """Convert the operand, multiply, convert back."""
        if _is_tensor_list(x):
            packed = self._in_space.pack(x)
            return self._out_space.unpack(self._product(packed, columns, ndim))
        on_torch = torch.is_tensor(x)
        block: Any = dense_tensor(x) if on_torch else numeric_array(x)
        N, is_vector = self.shape[1], block.ndim == 1
        fits = is_vector or (block.ndim == 2 and columns in (None, block.shape[1]))
        if not fits or (is_vector and ndim == 2) or block.shape[0] != N:
            width = 1 if columns == 1 else "K"
            raise ValueError(
                f"Dimension mismatch: {self!r} multiplies operands of shape "
                f"{'' if ndim == 2 else f'({N},) or '}({N}, {width}), got "
                f"{tuple(block.shape)}."
            )
        multiply = self._multiply_torch if on_torch else self._multiply_numpy
        result = multiply(block.reshape(N, 1) if is_vector else block)
        return result[:, 0] if is_vector else result

    def _multiply_numpy(self, X: np.ndarray) -> np.ndarray:
        dtype = np.result_type(self.dtype, X.dtype)
        if X.dtype.kind == "c":
            K = X.shape[1]
            parts = self._multiply_numpy(np.concatenate([X.real, X.imag], axis=1))
            return (parts[:, :K] + 1j * parts[:, K:]).astype(dtype, copy=False)
        if X.shape[1] == 0:
            return np.zeros((self.shape[0], 0), dtype)
        with self._in_space.staging.convert(X, self._in_space) as V:
            return to_numpy(self._apply(V)).astype(dtype, copy=False)

    def _multiply_torch(self, X: Tensor) -> Tensor:
        if X.requires_grad and X.grad_fn is not None:
            warnings.warn(
                "The operand is part of an autograd graph, but products with an "
                "operator are not differentiable. Call `x.detach()` first.",
                stacklevel=4,  # the line that says `A @ x`
            )
        if X.is_complex():
            self._in_space.require_dtype(X.dtype)
            K = X.shape[1]
            parts = self._multiply_torch(torch.cat([X.real, X.imag], dim=1))
            return torch.complex(parts[:, :K], parts[:, K:])
        V, dtype = self._in_space.adopt(X), promote_types(X.dtype, self.torch_dtype)
        if X.shape[1] == 0:
            return V.new_zeros((self.shape[0], 0), dtype=dtype)
        return self._apply(V).to(X.device, dtype)

    # -- algebra ----------------------------------------------------------------

    def _plus(self, other: TorchOperator) -> TorchOperator:
        """Return the sum with another operator of ours, of equal shape and type."""
        return cast(TorchOperator, self._makers["sum"](self, other))

    def _times(self, c: float) -> TorchOperator:
        """Return a multiple."""
        return cast(TorchOperator, self._makers["multiple"](self, c))

    def _after(self, other: TorchOperator) -> TorchOperator:
        """Return the product with another operator of ours, which comes first."""
        return cast(TorchOperator, self._makers["product"](self, other))

    def __add__(self, other: Any) -> Any:
        """Return the lazy sum with an operator, an array, a tensor or a sparse matrix.

        With a foreign SciPy operator it is SciPy's own. Arrays are converted to the
        operator's dtype, tensors as operands are. A number names :meth:`damped`.
        """
        if isinstance(other, LinearOperator):
            if not isinstance(other, TorchOperator):
                return LinearOperator.__add__(self, other)
            if self.shape != other.shape:
                raise ValueError(
                    f"Cannot add {self!r} and {other!r}: their shapes differ. Build "
                    "both for the same parameters."
                )
            check_same_side(self, other, "add")
            if (c := other._identity_multiple()) is not None:
                return self._damped(c)
            if (c := self._identity_multiple()) is not None:
                return other._damped(c)
            return self._plus(other)
        if getattr(other, "ndim", None) == 2:
            return self + self._matrix_to_add(other)
        if isinstance(other, Number) or getattr(other, "ndim", None) == 0:
            raise TypeError(
                f"A number and a matrix have no sum, got {other!r} and {self!r}. For "
                f"the sum with its multiple of the identity, call `A.damped({other})`."
            )
        return NotImplemented

    def __radd__(self, other: Any) -> Any:
        """Return ``M + A`` for an array, a tensor or a sparse matrix."""
        return self + other

    def __rsub__(self, other: Any) -> Any:
        """Return ``M - A`` for an array, a tensor or a sparse matrix."""
        return -self + other

    def _matrix_to_add(self, M: Any) -> Any:
        """Return a matrix of numbers as an operator that goes with this one."""
        if tuple(M.shape) != self.shape:
            raise ValueError(
                f"Cannot add a matrix of shape {tuple(M.shape)} to {self!r}."
            )
        if torch.is_tensor(M):
            if M.layout is torch.strided:
                dense_tensor(M)
            if M.is_complex():
                raise TypeError(
                    f"The matrix is {M.dtype}, the operator real: add `M.real`, or a "
                    "NumPy array, with which SciPy's sum is complex."
                )
            return self._makers["matrix"](self._in_space.adopt(M))
        if np.dtype(M.dtype).kind == "c":
            return aslinearoperator(M)  # SciPy's own sum
        if isinstance(M, np.ndarray):
            matrix = to_torch(numeric_array(M), self._in_space)
            return self._makers["matrix"](matrix)
        foreign = self._makers["matrix"](M.astype(self.dtype))
        same = foreign.device == self.device and foreign.torch_dtype == self.torch_dtype
        return foreign if same else aslinearoperator(M)

    def __neg__(self) -> Any:
        """Return ``-1 * A``."""
        return self._times(-1.0)

    def __truediv__(self, other: Any) -> Any:
        """Return ``A / c`` for a scalar ``c``."""
        if (number := real_scalar(other)) is not None:
            return self._times(1.0 / number)
        return LinearOperator.__truediv__(self, scalar(other))

    def __pow__(self, p: Any) -> Any:
        """Return the lazy power for a non-negative integer exponent."""
        return self._makers["power"](self, p)

    def __array_function__(
        self, func: Any, types: Any, args: Any, kwargs: dict[str, Any]
    ) -> Any:
        """Make ``numpy.dot`` the product; leave other functions of NumPy as they are.

        It would take the operator for a scalar, and multiply every entry by it.
        """
        if func not in _PRODUCTS:
            if not all(issubclass(t, (TorchOperator, np.ndarray)) for t in types):
                return NotImplemented
            return func._implementation(*args, **kwargs)
        a, b = _PRODUCTS[func](*args, **kwargs)
        return a.dot(b) if isinstance(a, TorchOperator) else b.__rmul__(a)

    # -- conversions ------------------------------------------------------------

    def to_scipy(self, dtype: DTypeLike | None = None) -> Any:
        """Return the operator as SciPy operator, of another NumPy dtype if asked.

        Parameters
        ----------
        dtype : numpy dtype, optional
            ``float32`` or ``float64``: the dtype of the result's vectors. Products
            are still computed in :attr:`torch_dtype`. ``None`` keeps the dtype.

        Returns
        -------
        LinearOperator
            The operator itself, or a thin cast of it.
        """
        # Half precision is reported as float32: asked for, that is another type.
        in_half = self.torch_dtype.itemsize < self.dtype.itemsize
        if dtype is None or (np.dtype(dtype) == self.dtype and not in_half):
            return self
        return self._makers["cast"](self, dtype)

    def to_dense(self, block_size: int = 64) -> Tensor:
        r"""Return the matrix, computed as :math:`A I` in blocks of columns.

        Parameters
        ----------
        block_size : int, optional
            Number of columns multiplied at once.

        Returns
        -------
        Tensor
            Of shape ``(M, N)``, in :attr:`torch_dtype`, on :attr:`device`.
        """
        M, N = self.shape
        block_size = count("block_size", block_size, 1)
        dense = torch.empty(M, N, dtype=self.torch_dtype, device=self.device)
        for start in range(0, N, block_size):
            stop = min(start + block_size, N)
            columns = dense.new_zeros(N, stop - start)
            columns[start:stop].fill_diagonal_(1.0)
            dense[:, start:stop] = self._apply(columns)
        return dense

    def fix_route(self, route: str | None = None) -> str:
        """Compute all further products in one way, whatever was computed before.

        Products may be computed in several ways, which agree up to rounding. With a
        fixed route, a computation that is interrupted and resumed gives the same bits.
        Estimators and solvers with ``checkpoint=`` fix it for as long as they run.

        Parameters
        ----------
        route : str, optional
            The route. There is one to choose, ``"plain"``: no recorded operations are
            replayed, and no matrix is materialised.

        Returns
        -------
        str
            The route taken.
        """
        if route not in (None, "plain"):
            raise ValueError(f"The one route to fix is 'plain', got {route!r}.")
        for part in self._parts():
            part.fix_route(route)
        return "plain"

    def free_route(self) -> None:
        """Take back one :meth:`fix_route`."""
        for part in self._parts():
            part.free_route()

    def parameters_fingerprint(self) -> str | None:
        """Return a digest of the parameters behind the matrix, ``None`` without any."""
        digests = [part.parameters_fingerprint() for part in self._parts()]
        found = dict.fromkeys(digest for digest in digests if digest is not None)
        return " ".join(found) or None

    def _parts(self) -> list[TorchOperator]:
        """Return the operators of which this one is composed."""
        parts = getattr(self, "args", ())
        return [part for part in parts if isinstance(part, TorchOperator)]

    def __repr__(self) -> str:
        """Return shape, class, dtype, device."""
        M, N = self.shape
        name, dtype = type(self).__name__, self.torch_dtype
        return f"<{M}x{N} {name} with dtype={dtype}, device={self.device}>"


def check_same_side(A: TorchOperator, B: TorchOperator, verb: str) -> None:
    """Raise if two operators compute in different dtypes or on different devices."""
    a, b = (A.torch_dtype, A.device), (B.torch_dtype, B.device)
    if a != b:
        raise TypeError(
            f"Cannot {verb} {A!r} and {B!r}: one computes in {a[0]} on {a[1]}, the "
            f"other in {b[0]} on {b[1]}. Bring both to the same dtype with "
            "`A.to_scipy(dtype)`, or build them on the same device."
        )
