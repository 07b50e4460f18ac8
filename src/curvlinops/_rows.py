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
from curvlinops._data import joined
from curvlinops._forms import Middle
from curvlinops._ledger import Ledger
from curvlinops._linearization import Linearization
from curvlinops._memory import raise_if_out_of_memory
from curvlinops._model import Model, graph_nodes
from curvlinops._parts import RefusedError, RowsByDatum, units
from curvlinops._spaces import TensorSpace, rounding

#: Least number of columns for which it is worth asking.
LEAST_COLUMNS = 8
#: Name of the Jacobian among what is kept.
JACOBIAN = "Jacobian"
#: Bytes of rows, with what going back keeps, that are there at once.
CHUNK_BYTES = 1 << 26
#: Bytes of rows that are looked at several times in a row.
CACHED_BYTES = 1 << 20
#: Most outputs of a datum.
MOST_OUTPUTS = 1024
#: Costs in floating-point operations of a large matrix product: of starting a product
#: with a vector, of an operation inside of one, and of writing an entry of a matrix.
STARTING, OPERATION, ENTRY = 5e6, 4, 16
#: The same of starting to compute rows.
OVERHEAD = 10 * STARTING


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
        return torch.bmm(self.M.to(C.dtype), C.view(n, s, -1)).flatten(0, 1)


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
        found = self._found(wanted, middle, batches, model, size_of, width_of)
        total: Tensor | None = None
        try:
            for rows in found:
                total = wanted.zeros() if total is None else total
                wanted.add(total, rows)
        except RefusedError:
            model.by_datum = False
        except _UnpaidError:
            pass
        else:
            if total is not None:
                return self._kept(wanted, key, divide(total))
        return None

    def _found(
        self,
        wanted: Wanted,
        middle: Middle | None,
        batches: Iterable[Linearization],
        model: Model,
        size_of: Callable[[Any], int | None],
        width_of: Callable[[Linearization], int],
    ) -> Iterator[Rows]:
        """Yield all rows; several small batches' are computed at once."""
        group, nbytes = list[_Part](), 0
        J, start = self.matrices.get(JACOBIAN), 0
        for batch in batches:
            size, f = size_of(batch.X), batch.output_space
            coarse = f.dtype.itemsize < self._space.dtype.itemsize  # products round
            if coarse or not size or not f.shapes[0] or f.shapes[0][0] % size:
                raise _UnpaidError
            if J is None and not self.pay(batch, size, middle, wanted, width_of(batch)):
                raise _UnpaidError
            part = _part_of(batch, size, middle, start, J is not None)
            if J is not None:
                B = J[start : start + f.dim].view(size, -1, J.shape[1])
                yield Rows(B, part.M, start)
            else:
                each = self._bytes(part) * size * part.U.shape[1]
                if group and nbytes + each > CHUNK_BYTES:
                    yield from self._rows(model, group)
                    group, nbytes = [], 0
                group, nbytes = [*group, part], nbytes + each
            start += f.dim
            del batch
        yield from self._rows(model, group)

    def _bytes(self, part: _Part) -> int:
        """Return how many bytes going back with one vector of a datum takes."""
        space = self._space
        return space.dim * space.dtype.itemsize + part.batch.nbytes // part.size

    def _rows(self, model: Model, group: list[_Part]) -> Iterator[Rows]:
        """Yield the rows of some batches, and compare each batch's in the end.

        Raises
        ------
        RefusedError
            If they cannot be computed so, or are not the batches'.
        """
        checks = [_Check(part, self._space) for part in group]
        if len(group) > 1 and (whole := _joined(group)) is not None:
            pull = RowsByDatum(model, whole[0], sum(whole[1]), whole[2], self._space)
            blocks = pull(slice(None)).split(whole[1])
            for part, check, B in zip(group, checks, blocks, strict=True):
                check.see(B, slice(None))
                yield Rows(B, part.M, part.start)
        else:
            for part, check in zip(group, checks, strict=True):
                yield from self._chunks(model, part, check)
        if not all(check.passes() for check in checks):
            raise RefusedError

    def _chunks(self, model: Model, part: _Part, check: _Check) -> Iterator[Rows]:
        """Yield the rows of a batch, some data at a time."""
        batch, size, U, M, start = part
        width = max(1, CHUNK_BYTES // self._bytes(part))
        pull = RowsByDatum(model, batch.X, size, U, self._space, width)
        step = max(1, width // max(U.shape[1], 1))
        for first in range(0, size, step):
            some = slice(first, min(first + step, size))
            B = pull(some)
            check.see(B, some)
            before = start + first * (batch.output_space.dim // size)
            yield Rows(B, None if M is None else M[some], before)

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
        return rows + OVERHEAD < products


class _UnpaidError(Exception):
    """Rows cost more than products, or it is not known which outputs are a datum's."""


class _Part(NamedTuple):
    """A batch, with the vectors of every datum and the matrices between."""

    batch: Linearization
    size: int
    U: Tensor
    M: Tensor | None
    start: int


def _part_of(
    batch: Linearization, size: int, middle: Middle | None, start: int, known: bool
) -> _Part:
    """Return it, with all unit vectors where the products with those are known."""
    try:
        U, M = _between(batch, size, middle, known)
    except Exception as error:  # whatever a loss raises with several vectors
        raise_if_out_of_memory(error)
        raise RefusedError from error
    return _Part(batch, size, units(batch, size) if U is None else U, M, start)


def _joined(group: list[_Part]) -> tuple[Any, list[int], Tensor] | None:
    """Put inputs and vectors of some batches together, if they fit."""
    sizes = [part.size for part in group]
    try:
        X = joined([part.batch.X for part in group], sizes)
        return X, sizes, torch.cat([part.U for part in group])
    except (ValueError, RuntimeError) as error:
        raise_if_out_of_memory(error)
        return None


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
    r"""Whether rows are those of a batch: a random sum of theirs is compared.

    With weights by which all rows are of the same size, so that none hides behind
    others, and entry by entry of the parameters.
    """

    def __init__(self, part: _Part, space: TensorSpace) -> None:
        self._part, self._space = part, space
        shape = part.U.shape[:2]
        like = torch.empty(shape, dtype=space.dtype, device=space.device)
        [self._weights] = random_like([like])
        self._found = like.new_zeros(1, space.dim)
        self._squares = like.new_zeros(1, space.dim)

    def see(self, B: Tensor, some: slice) -> None:
        """Count some data's rows."""
        step = max(1, CACHED_BYTES // max(B[:1].nbytes, 1))
        pairs = zip(B.split(step), self._weights[some].split(step), strict=True)
        for block, weights in pairs:
            squares = block.square()
            norms = squares.sum(2).sqrt_()
            weights *= torch.where(norms > 0, 1 / norms, 0.0)
            flat = weights.reshape(1, -1)
            self._found.addmm_(flat, block.flatten(0, 1))
            self._squares.addmm_(flat.square(), squares.flatten(0, 1))

    def passes(self) -> bool:
        """Whether they agree with a backward pass of the batch."""
        batch, (shape,) = self._part.batch, self._part.batch.output_space.shapes
        eps = rounding(self._found.dtype, self._found.device, batch.convolves)
        u = torch.bmm(self._weights.unsqueeze(1).to(self._part.U.dtype), self._part.U)
        u = u.reshape(shape)

        def pull_back(vectors: list[Tensor]) -> list[Tensor]:
            return batch.vjp(vectors[0])

        # No sum of sizes is above this, by Cauchy and Schwarz.
        most = (self._weights.numel() * self._squares[0]).sqrt()
        found, sizes = map(self._space.split, (self._found[0], most))
        return agree(found, pull_back([u]), eps, 0.75, pull_back, [u], [*sizes])


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
