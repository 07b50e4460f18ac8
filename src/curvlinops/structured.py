"""Operators whose matrix has a visible structure: diagonal, dense, low-rank, blocks.

They are built from tensors or from other operators, live on the device and compute in
the dtype of what they are given, and multiply blocks of columns at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.linalg import LinAlgError
from scipy.sparse.linalg import LinearOperator, aslinearoperator
from torch import Tensor

from curvlinops._operator import Foreign, TorchOperator, _check_same_side
from curvlinops._spaces import TensorSpace

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

    A tensor stays on its device.

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
    try:
        return Foreign(aslinearoperator(A))
    except TypeError as error:
        raise TypeError(
            "Expected an operator, a 2-d array or tensor, or a sparse matrix, got "
            f"{type(A).__name__}: {error}."
        ) from error


def _tensors(name: str, *tensors: Any) -> list[Tensor]:
    """Return tensors of one dtype on one device, without their autograd graphs."""
    for t in tensors:
        if not torch.is_tensor(t):
            raise TypeError(
                f"{name} is built from tensors, got {type(t).__name__}. Convert it "
                "with `torch.as_tensor(x)`."
            )
    if len({(t.dtype, t.device) for t in tensors}) > 1:
        given = ", ".join(f"{t.dtype} on {t.device}" for t in tensors)
        raise TypeError(
            f"{name} needs tensors of one dtype on one device, got {given}. Bring them "
            "together with `x.to(dtype=..., device=...)`."
        )
    return [t.detach() for t in tensors]


class IdentityLinearOperator(TorchOperator, LinearOperator):
    r"""The identity :math:`I \in \mathbb{R}^{N \times N}`.

    Parameters
    ----------
    shapes : iterable of sequences of int
        Shapes of the tensors that make up a vector; ``N`` is their number of entries.
    device : torch.device or str
        Device of the vectors.
    dtype : torch.dtype
        Floating-point type of the vectors.

    Raises
    ------
    TypeError
        If ``dtype`` is not a real floating-point type.

    Notes
    -----
    Self-adjoint. A product copies its operand.

    Examples
    --------
    >>> import torch
    >>> from curvlinops.structured import IdentityLinearOperator
    >>> I = IdentityLinearOperator([(2, 2), (3,)], "cpu", torch.float64)
    >>> bool(torch.equal((2.0 * I).to_dense(), 2.0 * torch.eye(7).double()))
    True
    """

    def __init__(
        self,
        shapes: Iterable[Sequence[int]],
        device: torch.device | str,
        dtype: torch.dtype,
    ) -> None:
        space = TensorSpace(shapes, dtype, device)
        super().__init__(space, space)

    def _apply(self, V: Tensor) -> Tensor:
        return V.clone()


class DiagonalLinearOperator(TorchOperator, LinearOperator):
    r"""A diagonal matrix :math:`\operatorname{diag}(d) \in \mathbb{R}^{N \times N}`.

    Parameters
    ----------
    diagonal : list of Tensor, or Tensor
        The entries :math:`d`, in the shapes of the tensors that make up a vector.
        They are copied.

    Raises
    ------
    TypeError
        If an entry of the list is no tensor, or dtypes or devices differ.
    ValueError
        If the list is empty.

    Notes
    -----
    Self-adjoint. A product costs one multiplication per entry.

    Examples
    --------
    >>> import torch
    >>> from curvlinops.structured import DiagonalLinearOperator
    >>> D = DiagonalLinearOperator([torch.tensor([1.0, 2.0]), torch.tensor([[3.0]])])
    >>> bool(torch.equal(D.to_dense(), torch.diag(torch.tensor([1.0, 2.0, 3.0]))))
    True
    >>> D.inverse(damping=1.0) @ torch.ones(3)
    tensor([0.5000, 0.3333, 0.2500])
    """

    def __init__(self, diagonal: Sequence[Tensor] | Tensor) -> None:
        given = [diagonal] if torch.is_tensor(diagonal) else list(diagonal)
        if not given:
            raise ValueError("A diagonal operator needs at least one tensor, got none.")
        entries = _tensors("A diagonal operator", *given)
        space = TensorSpace(
            [t.shape for t in entries], entries[0].dtype, entries[0].device
        )
        super().__init__(space, space)
        self._diagonal = space.pack(entries)

    def _apply(self, V: Tensor) -> Tensor:
        return V * self._diagonal.unsqueeze(1)

    def diagonal(self) -> Tensor:
        """Return a copy of the entries, flattened, of shape ``(N,)``."""
        return self._diagonal.clone()

    def inverse(self, damping: float = 0.0) -> DiagonalLinearOperator:
        r"""Return :math:`(\operatorname{diag}(d) + \delta I)^{-1}`.

        Parameters
        ----------
        damping : float, optional
            The number :math:`\delta` that is added to every entry.

        Returns
        -------
        DiagonalLinearOperator
            The inverse, with vectors of the same shapes.

        Raises
        ------
        numpy.linalg.LinAlgError
            If an entry of the damped diagonal is zero.
        """
        damped = self._diagonal + damping
        if zeros := int((damped == 0).sum()):
            raise LinAlgError(
                f"{self!r} plus damping={damping} is singular: {zeros} of its entries "
                "are zero. Pass another damping, e.g. `inverse(damping=1e-3)`."
            )
        return DiagonalLinearOperator(self._in_space.unpack(damped.reciprocal()))


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
    matrix is symmetric is not looked at. A product costs :math:`2 M N` operations.

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
        (self._matrix,) = _tensors("A dense operator", A)
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
    memory; the matrix of shape ``(N, N)`` is never formed.

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
        self._coefficients, self._vectors = _tensors("A sum of outer products", c, A)
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
    The adjoint is the block-diagonal matrix of the adjoints. A product costs one
    product with each block.

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
            _check_same_side(self.blocks[0], block, "put on one diagonal")
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

    def _adjoint(self) -> TorchOperator:
        adjoint = self._full.adjoint()
        if adjoint is self._full and torch.equal(self._rows, self._cols):
            return self
        return SubmatrixLinearOperator(adjoint, self._cols, self._rows)


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
