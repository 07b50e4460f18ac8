r"""Jacobians as matrices, computed for all data apart, and what is made of them.

Going back from the outputs of datum :math:`n` alone gives its rows
:math:`J_n^\top U_n` for a few vectors :math:`U_n`: unit vectors, or columns :math:`b_n`
of the matrix :math:`M_n = \sum b_n b_n^\top` between the Jacobians. A dense matrix
:math:`\sum_n J_n^\top M_n J_n` is one product of such matrices, where multiplying by
every unit vector of parameter space goes back as often as there are parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from curvlinops._agreement import agree, random_like
from curvlinops._ledger import Ledger
from curvlinops._linearization import Linearization, Middle
from curvlinops._memory import raise_if_out_of_memory
from curvlinops._model import Model, graph_nodes
from curvlinops._parts import RefusedError, RowsByDatum
from curvlinops._spaces import TensorSpace, rounding

#: Least number of columns for which it is worth asking.
LEAST_COLUMNS = 8
#: Name of the Jacobian among what is kept.
JACOBIAN = "Jacobian"
#: Bytes of rows, with what going back keeps, that are there at once.
CHUNK_BYTES = 1 << 26
#: Most outputs of a datum.
MOST_OUTPUTS = 1024
#: Costs in floating-point operations of a large matrix product: of starting a product
#: with a vector, of an operation inside of one, and of writing an entry of a matrix.
STARTING, OPERATION, ENTRY = 5e6, 4, 16


class Rows(NamedTuple):
    r"""Rows of some data of a batch.

    Attributes
    ----------
    B : Tensor
        The products :math:`J_n^\top U_n`, of shape ``[data, vectors, P]``.
    M : Tensor or None
        The matrices between, ``[data, vectors, vectors]``; ``None`` for the identity.
    start : int
        Number of outputs of all data before these.
    """

    B: Tensor
    M: Tensor | None
    start: int

    def multiply(self, C: Tensor) -> Tensor:
        """Multiply a matrix with as many rows by the matrices between."""
        if self.M is None:
            return C
        n, s, _ = self.B.shape
        return torch.bmm(self.M, C.view(n, s, -1)).flatten(0, 1)


class Wanted:
    """What is made of rows: the sum over all data.

    Attributes
    ----------
    columns : int
        Number of columns of products that give the same.
    multiplies : int
        Number of products of large matrices.
    whole : bool
        Whether it is the matrix itself, hence kept.
    """

    columns: int
    multiplies = 1
    whole = False

    def zeros(self) -> Tensor:
        """Return what is added to."""
        raise NotImplementedError

    def add(self, total: Tensor, rows: Rows) -> None:
        """Add what is made of some rows."""
        raise NotImplementedError

    def of(self, matrix: Tensor) -> Tensor:
        """Return the same of the matrix, where that is known."""
        raise NotImplementedError


class MatrixOfRows(Wanted):
    r"""The matrix :math:`\sum_n B_n^\top M_n B_n`."""

    whole = True

    def __init__(self, space: TensorSpace) -> None:
        self.columns, self._space = space.dim, space

    def zeros(self) -> Tensor:
        P, space = self.columns, self._space
        return torch.zeros(P, P, dtype=space.dtype, device=space.device)

    def add(self, total: Tensor, rows: Rows) -> None:
        B = rows.B.flatten(0, 1)
        total.addmm_(B.T, rows.multiply(B))

    def of(self, matrix: Tensor) -> Tensor:
        return matrix.clone()


class JacobianOfRows(MatrixOfRows):
    """The rows of the Jacobian themselves."""

    multiplies = 0

    def __init__(self, space: TensorSpace, length: int) -> None:
        super().__init__(space)
        self._length = length

    def zeros(self) -> Tensor:
        space = self._space
        return torch.empty(
            self._length, self.columns, dtype=space.dtype, device=space.device
        )

    def add(self, total: Tensor, rows: Rows) -> None:
        B = rows.B.flatten(0, 1)
        total[rows.start : rows.start + len(B)] = B


class DiagonalOfRows(MatrixOfRows):
    """Its diagonal."""

    whole, multiplies = False, 0

    def zeros(self) -> Tensor:
        space = self._space
        return torch.zeros(self.columns, dtype=space.dtype, device=space.device)

    def add(self, total: Tensor, rows: Rows) -> None:
        B = rows.B.flatten(0, 1)
        total += torch.linalg.vecdot(B, rows.multiply(B), dim=0)

    def of(self, matrix: Tensor) -> Tensor:
        return matrix.diagonal().clone()


class ProductOfRows(Wanted):
    """Its product with some columns."""

    multiplies = 2

    def __init__(self, V: Tensor) -> None:
        self.columns, self._V = V.shape[1], V

    def zeros(self) -> Tensor:
        return torch.zeros_like(self._V)

    def add(self, total: Tensor, rows: Rows) -> None:
        B = rows.B.flatten(0, 1)
        total.addmm_(B.T, rows.multiply(B @ self._V))

    def of(self, matrix: Tensor) -> Tensor:
        return matrix @ self._V


class DataRows:
    """Dense matrices of a risk, made of the rows of its data, and those that are kept.

    Costs are counted, not measured, so that the route depends on nothing but what is
    asked for.

    Parameters
    ----------
    space : TensorSpace
        Space of the parameters.
    ledger : Ledger
        Where what is kept is entered.
    """

    def __init__(self, space: TensorSpace, ledger: Ledger) -> None:
        self._space, self._ledger = space, ledger
        #: What is kept, by name.
        self.matrices: dict[Hashable, Tensor] = {}

    def make(
        self,
        wanted: Wanted,
        key: Hashable,
        middle: Middle | None,
        batches: Iterable[Linearization],
        divide: Callable[[Tensor], Tensor],
        model: Model,
        size_of: Callable[[Any], int | None],
        width_of: Callable[[Linearization], int],
    ) -> Tensor | None:
        """Return what is wanted, or ``None`` if it does not pay or cannot be computed.

        Parameters
        ----------
        wanted : Wanted
            What that is.
        key : hashable
            Name of the matrix.
        middle : Middle or None
            The matrix between; ``None`` for rows of the Jacobian itself.
        batches : iterable of Linearization
            All the batches, which are read if they are needed.
        divide : callable
            Divides a sum over all data.
        model : Model
            The model.
        size_of : callable
            Maps inputs to their number of data, if that is known.
        width_of : callable
            Maps a batch to the number of columns that are multiplied at once.
        """
        if (known := self.matrices.get(key)) is not None:
            return wanted.of(known)
        if not model.by_datum or self._space.dtype.itemsize < 4:
            return None
        if wanted.columns < LEAST_COLUMNS:
            return None
        total: Tensor | None = None
        J, start = self.matrices.get(JACOBIAN), 0
        for batch in batches:
            size, f = size_of(batch.X), batch.output_space
            if not size or not f.shapes[0] or f.shapes[0][0] % size:
                return None
            if J is not None:
                own = J[start : start + f.dim]
                found = iter([_kept_rows(own, batch, size, middle, start)])
            elif self.pay(batch, size, middle, wanted, width_of(batch)):
                found = self.chunks(model, batch, size, middle, start)
            else:
                return None
            total = wanted.zeros() if total is None else total
            if not _add(wanted, total, found):
                model.by_datum = False
                return None
            start += f.dim
            del batch
        return None if total is None else self._kept(wanted, key, divide(total))

    def _kept(self, wanted: Wanted, key: Hashable, total: Tensor) -> Tensor:
        """Keep a whole matrix if there is room, and return what the user gets."""
        fits = self._ledger.room_for(total.nbytes)
        if key is None or not (wanted.whole and fits):
            return total
        self.matrices[key] = total
        self._ledger.enter_other(("rows", key), total.nbytes)
        return wanted.of(total)

    def pay(
        self,
        batch: Linearization,
        size: int,
        middle: Middle | None,
        wanted: Wanted,
        width: int,
    ) -> bool:
        """Whether rows of a batch cost less than products with columns.

        Parameters
        ----------
        batch : Linearization
            The batch.
        size : int
            Its number of data.
        middle, wanted
            As for :meth:`make`.
        width : int
            Number of columns that are multiplied at once.
        """
        outputs, P = batch.output_space.dim // size, self._space.dim
        if outputs > MOST_OUTPUTS:
            return False
        columns = None if middle is None else middle.columns(batch)
        vectors = outputs if columns is None else len(columns)
        forward = max(2 * size * P, _work(batch.output))
        passes, K = 2 if middle is None else 4, wanted.columns
        products = K * passes * OPERATION * forward + K / width * STARTING
        entries = size * vectors * P
        rows = OPERATION * (1 + 2 * vectors) * forward + ENTRY * entries
        rows += 2 * wanted.multiplies * K * entries
        return rows + 10 * STARTING < products

    def chunks(
        self,
        model: Model,
        batch: Linearization,
        size: int,
        middle: Middle | None,
        start: int,
    ) -> Iterator[Rows]:
        """Yield the rows of a batch, some data at a time, and compare them in the end.

        Parameters
        ----------
        model : Model
            The model.
        batch : Linearization
            The batch.
        size : int
            Its number of data.
        middle : Middle or None
            The matrix between; ``None`` for rows of the Jacobian itself.
        start : int
            Number of outputs of the batches before.

        Raises
        ------
        RefusedError
            If they cannot be computed so, or are not the batch's.
        """
        space, f = self._space, batch.output_space
        try:
            U, M = _between(batch, size, middle)
            vectors = f.dim // size if U is None else U.shape[1]
            each = space.dim * space.dtype.itemsize + batch.nbytes // size
            width = max(1, CHUNK_BYTES // each)
            pull = RowsByDatum(model, batch, size, space, U, width)
            check = _Check(batch, size, vectors, space)
            step = max(1, width // max(vectors, 1))
        except Exception as error:  # whatever a loss raises with several vectors
            raise_if_out_of_memory(error)
            raise RefusedError from error
        for first in range(0, size, step):
            part = slice(first, min(first + step, size))
            B, outputs = pull(part), f.dim // size
            check.see(B, part)
            yield Rows(B, None if M is None else M[part], start + first * outputs)
        if not check.passes(U):
            raise RefusedError


def _add(wanted: Wanted, total: Tensor, found: Iterator[Rows]) -> bool:
    """Add what is made of a batch's rows; return whether they are right."""
    try:
        for rows in found:
            wanted.add(total, rows)
    except RefusedError:
        return False
    return True


def _kept_rows(
    J: Tensor, batch: Linearization, size: int, middle: Middle | None, start: int
) -> Rows:
    """Return rows of a batch whose Jacobian is known."""
    _, M = _between(batch, size, middle, units=True)
    return Rows(J.view(size, -1, J.shape[1]), M, start)


def _between(
    batch: Linearization, size: int, middle: Middle | None, units: bool = False
) -> tuple[Tensor | None, Tensor | None]:
    r"""Return vectors of every datum, and the matrices between their products.

    ``None`` for all unit vectors, and for identity matrices. A matrix that is no one of
    single data is refused.
    """
    if middle is None:
        return None, None
    f, shape = batch.output.detach(), batch.output_space.shapes[0]
    outputs = f.numel() // size
    columns = None if units or shape[0] != size else middle.columns(batch)
    if columns is not None:
        return columns.detach().reshape(-1, size, outputs).transpose(0, 1), None
    basis = torch.eye(outputs, dtype=f.dtype, device=f.device)
    basis = basis.unsqueeze(1).expand(-1, size, -1).reshape(outputs, *shape)
    M = middle(batch, basis).detach().reshape(outputs, size, outputs).movedim(0, 2)
    [u] = random_like([f])
    flat, Mu = u.reshape(size, outputs), middle(batch, u).detach().view(size, outputs)
    eps = rounding(f.dtype, f.device, convolves=False)
    found = torch.bmm(M, flat.unsqueeze(-1)).squeeze(-1)
    sizes = torch.bmm(M.abs(), flat.abs().unsqueeze(-1)).squeeze(-1)
    if not bool(((found - Mu).abs() <= eps**0.75 * sizes).all()):
        raise ValueError("The matrix between the Jacobians couples data.")
    return None, M


class _Check:
    r"""Whether rows are those of a batch: random sums of theirs are compared.

    Once with weights of the same size, and once with such that rows are of the same
    size, so that none hides behind others. Entry by entry of the parameters.
    """

    def __init__(
        self, batch: Linearization, size: int, vectors: int, space: TensorSpace
    ) -> None:
        self._batch, self._space = batch, space
        like = torch.empty(size, vectors, dtype=space.dtype, device=space.device)
        self._weights = torch.stack(random_like([like, like]))
        self._found = like.new_zeros(2, space.dim)
        self._squares = like.new_zeros(2, space.dim)

    def see(self, B: Tensor, part: slice) -> None:
        """Count some data's rows."""
        rows, weights = B.flatten(0, 1), self._weights[:, part]
        largest = torch.linalg.vector_norm(B, torch.inf, dim=2)
        weights[1] *= torch.where(largest > 0, 1 / largest, 0.0)
        weights = weights.flatten(1)
        self._found.addmm_(weights, rows)
        self._squares.addmm_(weights.square(), rows.square())

    def passes(self, U: Tensor | None) -> bool:
        """Whether they agree with backward passes of the batch."""
        batch, (shape,) = self._batch, self._batch.output_space.shapes
        eps = rounding(self._found.dtype, self._found.device, batch.convolves)

        def pull_back(vectors: list[Tensor]) -> list[Tensor]:
            return batch.vjp(vectors[0])

        for weights, found, squares in zip(
            self._weights, self._found, self._squares, strict=True
        ):
            u = weights if U is None else torch.bmm(weights.unsqueeze(1), U)
            u = u.reshape(shape).to(batch.output_space.dtype)
            parts, sizes = map(self._space.split, (found, squares.sqrt()))
            if not agree(parts, pull_back([u]), eps, 0.75, pull_back, [u], [*sizes]):
                return False
        return True


def _work(output: Tensor) -> int:
    """Count the operations of an evaluation's convolutions and matrix products."""
    total = 0
    for node in graph_nodes(output):
        if not node._input_metadata:
            continue
        made = torch.Size(node._input_metadata[0].shape).numel()
        if (weight := getattr(node, "_saved_weight", None)) is not None:
            total += 2 * made * (weight[1:].numel() if weight.ndim > 1 else 1)
        elif sizes := getattr(node, "_saved_mat2_sym_sizes", None):
            total += 2 * made * int(sizes[0])
    return total
