"""Operators whose matrix has a visible structure: diagonal, dense, low-rank, blocks.

They are built from tensors or from other operators, live on the device and compute in
the dtype of what they are given, and multiply blocks of columns at once.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from numpy.linalg import LinAlgError
from scipy.sparse.linalg import LinearOperator, aslinearoperator
from torch import Tensor

from curvlinops._closed_forms import require_square
from curvlinops._composites import Foreign
from curvlinops._operator import TorchOperator, check_same_side
from curvlinops._spaces import TensorSpace, to_torch
from curvlinops.diag import (
    Diagonal,
    DiagonalLinearOperator,
    IdentityLinearOperator,
    tensors_of,
)

__all__ = [
    "BlockDiagonalLinearOperator",
    "DiagonalLinearOperator",
    "IdentityLinearOperator",
    "OuterProductLinearOperator",
    "SubmatrixLinearOperator",
    "TensorLinearOperator",
]


def as_operator(A: Any) -> TorchOperator:
    """Return an operator, array, sparse matrix or 2-d tensor as one of ours.

    A tensor stays on its device, and an array's memory is shared where torch can.

    Raises
    ------
    TypeError
        If ``A`` is none of these, or complex.
    ValueError
        If it is an array of another dimension.
    """
    if isinstance(A, TorchOperator):
        return A
    if torch.is_tensor(A):
        return TensorLinearOperator(A)
    if isinstance(A, np.ndarray) and A.ndim != 2:
        raise ValueError(
            f"A matrix has two dimensions, got an array of shape {A.shape}. For a "
            "diagonal matrix pass `DiagonalLinearOperator(entries)`."
        )
    if isinstance(A, np.ndarray) and A.dtype.kind in "biuf":
        dtype = torch.float32 if A.dtype == np.float32 else torch.float64
        space = TensorSpace.flat(A.shape[1], dtype, "cpu")
        return TensorLinearOperator(to_torch(np.asarray(A), space))
    try:
        return Foreign(aslinearoperator(A))
    except TypeError as error:
        raise TypeError(
            "Expected an operator, a 2-d array or tensor, or a sparse matrix, got "
            f"{type(A).__name__}: {error}."
        ) from error


class TensorLinearOperator(TorchOperator, LinearOperator):
    r"""A dense matrix :math:`A \in \mathbb{R}^{M \times N}`.

    Parameters
    ----------
    A : Tensor
        Of shape ``(M, N)``. Not copied: later changes of its values are seen.

    Raises
    ------
    TypeError
        If ``A`` is no tensor, or not of a real floating-point type.
    ValueError
        If it is not two-dimensional.

    Notes
    -----
    The adjoint multiplies with the transposed view of the same memory; whether the
    matrix is symmetric is not looked at. A product costs :math:`2 M N` operations, a
    determinant or an inverse :math:`O(N^3)`.

    Examples
    --------
    >>> import torch
    >>> from curvlinops.structured import TensorLinearOperator
    >>> matrix = torch.arange(6.0).reshape(2, 3)
    >>> A = TensorLinearOperator(matrix)
    >>> bool(torch.equal(A.T @ torch.ones(2), matrix.T @ torch.ones(2)))
    True
    """

    def __init__(self, A: Tensor) -> None:
        (self._matrix,) = tensors_of("A dense operator", A)
        if A.ndim != 2:
            raise ValueError(
                f"A dense operator needs a tensor of shape (M, N), got {tuple(A.shape)}"
                ". For a diagonal use `DiagonalLinearOperator`."
            )
        super().__init__(
            TensorSpace.flat(A.shape[1], A.dtype, A.device),
            TensorSpace.flat(A.shape[0], A.dtype, A.device),
        )

    def _apply(self, V: Tensor) -> Tensor:
        return self._matrix @ V

    def _adjoint(self) -> TensorLinearOperator:
        return TensorLinearOperator(self._matrix.T)

    def _wide(self, delta: float = 0.0) -> Tensor:
        """Return a copy plus a multiple of the identity that can be decomposed."""
        wide = self._matrix.to(_decomposable(self._matrix.dtype), copy=True)
        wide.diagonal().add_(delta)
        return wide

    def trace(self) -> Tensor:
        require_square(self, "trace")
        return self._matrix.trace()

    def diagonal(self) -> Tensor:
        require_square(self, "diagonal")
        return self._matrix.diagonal().clone()

    def frobenius_norm(self) -> Tensor:
        return self._matrix.norm()

    def _slogdet(self, delta: float = 0.0) -> tuple[Tensor, Tensor]:
        sign, logarithm = torch.linalg.slogdet(self._wide(delta))
        return sign.to(self.torch_dtype), logarithm.to(self.torch_dtype)

    def _inverse_of_damped(self, delta: float, **options: Any) -> TensorLinearOperator:
        inverse, info = torch.linalg.inv_ex(self._wide(delta))
        if info:
            raise LinAlgError(
                f"{self!r} plus damping={delta} is singular. Pass another damping, "
                "e.g. `inverse(damping=1e-3)`."
            )
        return TensorLinearOperator(inverse.to(self.torch_dtype))


class OuterProductLinearOperator(TorchOperator, LinearOperator):
    r"""A sum of outer products :math:`\sum_{i=1}^{R} c_i a_i a_i^\top`.

    Parameters
    ----------
    c : Tensor
        The coefficients, of shape ``(R,)``.
    A : Tensor
        The vectors :math:`a_i` as columns, of shape ``(N, R)``. Neither is copied.

    Raises
    ------
    TypeError
        If one is no tensor, or their dtypes or devices differ.
    ValueError
        If their shapes are not ``(R,)`` and ``(N, R)``.

    Notes
    -----
    Self-adjoint. A product costs :math:`4 N R` operations and :math:`R` numbers of
    memory; the matrix of shape ``(N, N)`` is never formed, not even for determinants
    and inverses, which take :math:`O(N R^2)` operations.

    Examples
    --------
    >>> import torch
    >>> from curvlinops.structured import OuterProductLinearOperator
    >>> c, A = torch.tensor([2.0, -1.0]), torch.tensor([[1.0, 0.0], [1.0, 3.0]])
    >>> OuterProductLinearOperator(c, A).to_dense()
    tensor([[ 2.,  2.],
            [ 2., -7.]])
    """

    def __init__(self, c: Tensor, A: Tensor) -> None:
        self._coefficients, self._vectors = tensors_of("A sum of outer products", c, A)
        if A.ndim != 2 or c.shape != A.shape[1:]:
            raise ValueError(
                "A sum of outer products needs coefficients of shape (R,) and vectors "
                f"as the columns of an (N, R) tensor, got {tuple(c.shape)} and "
                f"{tuple(A.shape)}. Pass `A.T` if the vectors are its rows."
            )
        space = TensorSpace.flat(A.shape[0], A.dtype, A.device)
        super().__init__(space, space)

    def _apply(self, V: Tensor) -> Tensor:
        return self._vectors @ (self._coefficients.unsqueeze(1) * (self._vectors.T @ V))

    def trace(self) -> Tensor:
        return self.diagonal().sum()

    def diagonal(self) -> Tensor:
        return self._vectors.square() @ self._coefficients

    def frobenius_norm(self) -> Tensor:
        return self._decomposed()[0].norm().to(self.torch_dtype)

    def _decomposed(self) -> tuple[Tensor, Tensor]:
        """Return ``min(N, R)`` eigenvalues, and eigenvectors; all others are zero."""
        dtype = _decomposable(self.torch_dtype)
        Q, R = torch.linalg.qr(self._vectors.to(dtype))
        small = (R * self._coefficients.to(dtype)) @ R.T
        evals, vectors = torch.linalg.eigh((small + small.T) / 2)
        return evals, Q @ vectors

    def _slogdet(self, delta: float = 0.0) -> tuple[Tensor, Tensor]:
        evals, _ = self._decomposed()
        rest = evals.new_full((self.shape[0] - len(evals),), delta)
        damped = torch.cat([evals + delta, rest])
        sign, logarithm = damped.sign().prod(), damped.abs().log().sum()
        return sign.to(self.torch_dtype), logarithm.to(self.torch_dtype)

    def _inverse_of_damped(self, delta: float, **options: Any) -> TorchOperator:
        evals, vectors = self._decomposed()
        rest = self.shape[0] - len(evals)
        damped = evals + delta
        if (zeros := int((damped == 0).sum())) or (rest and not delta):
            raise LinAlgError(
                f"{self!r} plus damping={delta} is singular: "
                f"{zeros + rest * (not delta)} of its eigenvalues are zero. Pass "
                "another damping, e.g. `inverse(damping=1e-3)`."
            )
        elsewhere = 1.0 / delta if rest else 0.0
        coefficients = (damped.reciprocal() - elsewhere).to(self.torch_dtype)
        vectors = vectors.to(self.torch_dtype)
        inverse = OuterProductLinearOperator(coefficients, vectors)
        return inverse._damped(elsewhere) if rest else inverse


class BlockDiagonalLinearOperator(TorchOperator, LinearOperator):
    r"""A block-diagonal matrix :math:`\operatorname{diag}(A_1, \dots, A_L)`.

    Parameters
    ----------
    blocks : sequence of LinearOperator, arrays, sparse matrices, or Tensors
        The blocks :math:`A_l \in \mathbb{R}^{M_l \times N_l}`, of one dtype on one
        device. The tensors of their spaces are concatenated.

    Raises
    ------
    ValueError
        If there are no blocks.
    TypeError
        If their dtypes or devices differ.

    Notes
    -----
    The adjoint, multiples and inverses are block-diagonal matrices of those of the
    blocks. A product costs one product with each block.

    Examples
    --------
    >>> import torch
    >>> from curvlinops.structured import BlockDiagonalLinearOperator
    >>> A, B = torch.ones(1, 2), torch.eye(2)
    >>> dense = BlockDiagonalLinearOperator([A, B]).to_dense()
    >>> bool(torch.equal(dense, torch.block_diag(A, B)))
    True
    """

    def __init__(self, blocks: Iterable[Any]) -> None:
        self.blocks = tuple(map(as_operator, blocks))
        if not self.blocks:
            raise ValueError("A block-diagonal operator needs at least one block.")
        for block in self.blocks[1:]:
            check_same_side(self.blocks[0], block, "put on one diagonal")
        dtype, device = self.blocks[0].torch_dtype, self.blocks[0].device
        in_shapes = [shape for block in self.blocks for shape in block.in_shapes]
        out_shapes = [shape for block in self.blocks for shape in block.out_shapes]
        super().__init__(
            TensorSpace(in_shapes, dtype, device),
            TensorSpace(out_shapes, dtype, device),
        )

    def _apply(self, V: Tensor) -> Tensor:
        parts = V.split([block.shape[1] for block in self.blocks])
        products = [
            block._apply(part) for block, part in zip(self.blocks, parts, strict=True)
        ]
        return torch.cat(products)

    def _parts(self) -> list[TorchOperator]:
        return [*self.blocks]

    def _adjoint(self) -> TorchOperator:
        adjoints = tuple(block.adjoint() for block in self.blocks)
        if adjoints == self.blocks:
            return self
        return BlockDiagonalLinearOperator(adjoints)

    def _times(self, c: float) -> TorchOperator:
        return BlockDiagonalLinearOperator(block._times(c) for block in self.blocks)

    def _inverse_of_damped(self, delta: float, **options: Any) -> TorchOperator:
        self._require_square_blocks("inverse")
        return BlockDiagonalLinearOperator(
            block._inverse_of_damped(delta, **options) for block in self.blocks
        )

    def _require_square_blocks(self, what: str) -> None:
        for block in self.blocks:
            require_square(block, what)

    def trace(self) -> Tensor:
        self._require_square_blocks("trace")
        return torch.stack([block.trace() for block in self.blocks]).sum()

    def diagonal(self) -> Tensor:
        self._require_square_blocks("diagonal")
        return torch.cat([block.diagonal() for block in self.blocks])

    def frobenius_norm(self) -> Tensor:
        return torch.stack([block.frobenius_norm() for block in self.blocks]).norm()

    def _slogdet(self, delta: float = 0.0) -> tuple[Tensor, Tensor]:
        self._require_square_blocks("determinant")
        signs, logarithms = zip(*(b._slogdet(delta) for b in self.blocks), strict=True)
        return torch.stack(signs).prod(), torch.stack(logarithms).sum()


class SubmatrixLinearOperator(TorchOperator, LinearOperator):
    r"""Some rows and columns of a matrix, :math:`A_{R, C} = S_R A S_C^\top`.

    Parameters
    ----------
    A : LinearOperator, array, sparse matrix, or Tensor
        The full matrix, of shape ``(M, N)``.
    row_idxs, col_idxs : sequence of int or bool, array, Tensor, slice, or range
        The rows and columns to keep, in this order: 1-d integer indices (negative
        ones count from the end), a slice, or a mask with one entry per row or column.

    Raises
    ------
    IndexError
        If an index is out of range.
    ValueError
        If an index occurs twice, the indices are not 1-d, or a mask has a wrong length.
    TypeError
        If the indices are not integers.

    Notes
    -----
    A product scatters the operand into a vector of length ``N``, multiplies it once
    by ``A``, and gathers the rows: it costs one product with ``A``. The adjoint is the
    submatrix of ``A``'s adjoint with the indices exchanged.

    Examples
    --------
    >>> import torch
    >>> from curvlinops.structured import SubmatrixLinearOperator
    >>> matrix = torch.arange(9.0).reshape(3, 3)
    >>> A = SubmatrixLinearOperator(matrix, [2, 0], slice(1, None))
    >>> bool(torch.equal(A.to_dense(), matrix[[2, 0], 1:]))
    True
    """

    def __init__(self, A: Any, row_idxs: Any, col_idxs: Any) -> None:
        self._full = as_operator(A)
        self.set_submatrix(row_idxs, col_idxs)

    def set_submatrix(self, row_idxs: Any, col_idxs: Any) -> None:
        """Choose other rows and columns; changes the operator's shape.

        Adjoints and composites built before keep the old ones or become invalid;
        build them again.

        Parameters
        ----------
        row_idxs, col_idxs : sequence of int or bool, array, Tensor, slice, or range
            The rows and columns to keep, in this order.
        """
        M, N = self._full.shape
        rows, cols = _indices(row_idxs, M, "row"), _indices(col_idxs, N, "column")
        dtype, device = self._full.torch_dtype, self._full.device
        super().__init__(
            TensorSpace.flat(cols.size, dtype, device),
            TensorSpace.flat(rows.size, dtype, device),
        )
        self._rows = torch.from_numpy(rows).to(device)
        self._cols = torch.from_numpy(cols).to(device)

    def _apply(self, V: Tensor) -> Tensor:
        scattered = V.new_zeros(self._full.shape[1], V.shape[1])
        scattered[self._cols] = V
        return self._full._apply(scattered)[self._rows]

    def _parts(self) -> list[TorchOperator]:
        return [self._full]

    def _is_principal(self) -> bool:
        return torch.equal(self._rows, self._cols)

    def _adjoint(self) -> TorchOperator:
        adjoint = self._full.adjoint()
        if adjoint is self._full and self._is_principal():
            return self
        return SubmatrixLinearOperator(adjoint, self._cols, self._rows)

    def _chosen(self) -> TorchOperator | None:
        """Return the same matrix with a structure, if that of the full one stays."""
        if isinstance(self._full, TensorLinearOperator):
            matrix = self._full._matrix[self._rows][:, self._cols]
            return TensorLinearOperator(matrix)
        if isinstance(self._full, Diagonal) and self._is_principal():
            return DiagonalLinearOperator(self._full.diagonal()[self._rows])
        return None

    def trace(self) -> Tensor:
        require_square(self, "trace")
        return self.diagonal().sum()

    def diagonal(self) -> Tensor:
        require_square(self, "diagonal")
        if (chosen := self._chosen()) is not None:
            return chosen.diagonal()
        if self._is_principal():
            return self._full.diagonal()[self._rows]
        return super().diagonal()

    def frobenius_norm(self) -> Tensor:
        chosen = self._chosen()
        return super().frobenius_norm() if chosen is None else chosen.frobenius_norm()

    def _slogdet(self, delta: float = 0.0) -> tuple[Tensor, Tensor]:
        chosen = self._chosen()
        return super()._slogdet(delta) if chosen is None else chosen._slogdet(delta)

    def _inverse_of_damped(self, delta: float, **options: Any) -> Any:
        if (chosen := self._chosen()) is None:
            return super()._inverse_of_damped(delta, **options)
        return chosen._inverse_of_damped(delta, **options)


def _decomposable(dtype: torch.dtype) -> torch.dtype:
    """Return a type in which there are decompositions: not half precision."""
    return torch.promote_types(dtype, torch.float32)


TorchOperator._makers["matrix"] = as_operator


def _indices(given: Any, size: int, axis: str) -> np.ndarray:
    """Return what selects rows or columns as distinct indices in ``[0, size)``."""
    if isinstance(given, slice):
        return np.arange(size)[given].copy()
    indices = np.asarray(given.cpu() if torch.is_tensor(given) else given)
    if indices.ndim != 1:
        raise ValueError(
            f"Expected 1-d {axis} indices, got an array of shape {indices.shape} from "
            f"{type(given).__name__}. Pass a list, e.g. `[3]` for a single {axis}."
        )
    if indices.dtype == bool:
        if indices.size != size:
            raise ValueError(
                f"A mask of the {axis}s needs {size} entries, got {indices.size}."
            )
        return np.flatnonzero(indices)
    if indices.size == 0:
        return np.zeros(0, np.int64)
    if indices.dtype.kind not in "iu":
        raise TypeError(
            f"Expected integers as {axis} indices, got dtype {indices.dtype}. Pass "
            "integers, a slice, or a mask of bools."
        )
    if (outside := indices[(indices < -size) | (indices >= size)]).size:
        raise IndexError(
            f"The {axis} index {outside[0]} is out of range for {size} {axis}s: "
            f"indices run from {-size} to {size - 1}."
        )
    indices = indices.astype(np.int64)
    indices = np.where(indices < 0, indices + size, indices)
    values, counts = np.unique(indices, return_counts=True)
    if (repeated := values[counts > 1]).size:
        raise ValueError(
            f"The {axis} index {repeated[0]} occurs more than once. A submatrix keeps "
            "every row and column once: pass distinct indices."
        )
    return indices
