r"""Matrices that small problems keep, once that costs less than products without.

First the batches' Jacobians, for products :math:`J^\top M J v`. Then :math:`M J`, so
that a product is two with matrices and nothing else. Last the matrix itself, unless
that is more work.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from curvlinops._agreement import agree, random_like
from curvlinops._columns import VJPS, Columns
from curvlinops._ledger import Ledger
from curvlinops._linearization import Linearization
from curvlinops._memory import raise_if_out_of_memory
from curvlinops._parts import jacobian_by_datum
from curvlinops._policy import Policy
from curvlinops._spaces import TensorSpace, rounding

if TYPE_CHECKING:
    from curvlinops.risk import EmpiricalRisk

Batches = list[Linearization]
Jacobians = list[tuple[Linearization, Tensor]]
#: Matrices by which a vector is multiplied one after the other.
Factors = tuple[Tensor, ...]


def may_be_dense(space: TensorSpace, policy: Policy) -> bool:
    """Whether matrices with so many columns, of this type, may be kept if that pays."""
    return space.dim <= policy.dense_dim and space.dtype.itemsize >= 4


class Dense:
    """A risk's materialised matrices, and its batches' Jacobians.

    Costs are counted, not measured, so that the route depends on nothing but the
    products asked for. The unit is a product with one vector.

    Parameters
    ----------
    space : TensorSpace
        Space of the parameters.
    columns : Columns
        How many columns are multiplied at once.
    ledger : Ledger
        Where what is kept is entered.
    """

    def __init__(self, space: TensorSpace, columns: Columns, ledger: Ledger) -> None:
        self._space, self._columns, self._ledger = space, columns, ledger
        #: The matrix by key, alone or as two factors.
        self.matrices: dict[Hashable, Factors] = {}
        #: Batches with their Jacobians; all of them, or none.
        self.jacobians: Jacobians = []
        #: All their rows, if some matrix has been made from these.
        self._stacked: Tensor | None = None
        #: Cost of the products so far, by key.
        self.spent: dict[Hashable, float] = {}

    def cost(self, key: Hashable, K: int, batches: Batches) -> float:
        """Return the cost of ``K`` columns in products with a single vector."""
        if K == 1:
            return 1.0
        width = min((self._columns.at_once(key, b) for b in batches), default=1)
        return K if width == 1 else -(-K // width) + K / 16

    def cost_of_matrix(self, key: Hashable, batches: Batches, factored: bool) -> float:
        """Return the cost of the products after which a matrix is computed.

        That of computing it from two factors. Without these computing it costs twice as
        much; and it is put off twice as long, since a product with it costs about half
        of one without.
        """
        return (1 if factored else 2) * self.cost(key, self._space.dim, batches)

    def cost_of_factors(self, nbytes: int, batches: int) -> float:
        """Return the cost of the products after which Jacobians become factors."""
        return nbytes / batches / self._columns.policy.factor_bytes

    def has_factors(self) -> bool:
        """Whether there are Jacobians, which lose no digits in :math:`M J`."""
        same = (b.output_space.dtype == self._space.dtype for b, _ in self.jacobians)
        return bool(self.jacobians) and all(same)

    def factors_suffice(self, rows: int) -> bool:
        """Whether products with Jacobians of so many rows are cheaper than dense."""
        return 2 * rows <= self._space.dim

    def settled(self, key: Hashable) -> Factors | None:
        """Return the matrix, or its factors, if they are what is kept for good."""
        known = self.matrices.get(key)
        if known is None or (
            len(known) > 1 and not self.factors_suffice(len(known[0]))
        ):
            return None
        return known

    def matrix(
        self,
        key: Hashable,
        V: Tensor,
        batches: Batches,
        complete: bool,
        multiply: Callable[[Tensor], Tensor],
        left_factor: Callable[[Jacobians], Tensor] | None,
    ) -> Factors | None:
        r"""Return the matrix, or factors of it, if known or paying from now on.

        Unless what is kept is :meth:`settled`.

        Parameters
        ----------
        key : hashable
            Names the matrix.
        V : Tensor
            Vectors that it is to be multiplied with.
        batches : list of Linearization
            What products without it are made of.
        complete : bool
            Whether all batches are recorded.
        multiply : callable
            Multiplies vectors by the matrix without knowing it.
        left_factor : callable or None
            Maps Jacobians :math:`J` to :math:`M J` if the matrix is their product with
            :math:`J^\top`.
        """
        known = self.matrices.get(key)
        spent = self.spent.get(key, 0.0)
        self.spent[key] = spent + self.cost(key, V.shape[1], batches)
        if not complete:
            return known
        if known is None and left_factor is not None and self.has_factors():
            known = self._make_factors(key, spent, left_factor)
        # The cost of a matrix, which takes longer to find, is never below this.
        if spent < self._space.dim / 16 or spent < self.cost_of_matrix(
            key, batches, factored=known is not None
        ):
            return known
        return self._make_matrix(key, V, known, multiply)

    def _make_factors(
        self, key: Hashable, spent: float, left_factor: Callable[[Jacobians], Tensor]
    ) -> Factors | None:
        r"""Return :math:`M J` and :math:`J^\top` if that pays, and there is room."""
        parts = [J for _, J in self.jacobians]
        nbytes = sum(J.nbytes for J in parts)
        pays = spent >= self.cost_of_factors(nbytes, len(parts))
        if not pays or not self._ledger.room_for(nbytes):
            return None
        if self._stacked is None:
            self._stacked = parts[0] if len(parts) == 1 else torch.cat(parts)
            rows = self._stacked.split([len(part) for part in parts])
            batches = [batch for batch, _ in self.jacobians]
            self.jacobians[:] = zip(batches, rows, strict=True)
        del parts
        return self._enter(key, left_factor(self.jacobians), self._stacked.T)

    def _make_matrix(
        self,
        key: Hashable,
        V: Tensor,
        factors: Factors | None,
        multiply: Callable[[Tensor], Tensor],
    ) -> Factors | None:
        """Return the matrix if there is room."""
        P = self._space.dim
        if not self._ledger.room_for(P * P * V.element_size()):
            return factors
        if factors is not None:
            MJ, JT = factors
            return self._enter(key, JT @ MJ)
        identity = torch.eye(P, dtype=V.dtype, device=V.device)
        return self._enter(key, multiply(identity))

    def _enter(self, key: Hashable, first: Tensor, *shared: Tensor) -> Factors:
        """Keep factors, of which all but the first are counted already."""
        self.matrices[key] = first, *shared
        self._ledger.enter_other(("matrix", key), first.nbytes)
        return self.matrices[key]

    def jacobians_pay(self, sizes: Iterable[int], batches: Batches) -> bool:
        """Whether Jacobians with so many rows each cost few products."""
        most = self._columns.policy.jacobian_cost
        return self.cost(VJPS, max(sizes), batches) <= most

    def keep_jacobians(
        self, risk: EmpiricalRisk, kept: Jacobians, batches: Batches, asked: bool
    ) -> Jacobians | None:
        """Compute the batches' Jacobians if that is possible, fits, and pays.

        Parameters
        ----------
        risk : EmpiricalRisk
            The risk.
        kept : list
            The empty list of Jacobians, unless it has been replaced since.
        batches : list of Linearization
            All the batches that went with it.
        asked : bool
            Whether they are kept even if they do not pay.
        """
        if not self._columns.vectorises(VJPS):
            return None
        sizes = [b.output_space.dim for b in batches]
        nbytes = sum(sizes) * self._space.dim * self._space.dtype.itemsize
        if not (asked or self.jacobians_pay(sizes, batches)):
            return None
        if not self._ledger.room_for(nbytes):
            return None
        jacobians = []
        for batch in batches:
            if (J := _jacobian(risk, batch, self._columns)) is None:
                self._columns.refuse(VJPS)
                return None
            jacobians.append((batch, J))
        with risk._lock:
            if not kept:  # no other thread was faster
                kept[:] = jacobians
                if kept is self.jacobians:  # not dropped in the meantime
                    self._ledger.enter_other("jacobians", nbytes)
        return kept

    def drop_jacobians(self) -> None:
        """Keep no Jacobians of the batches up to now."""
        self.jacobians, self._stacked = [], None
        self._ledger.strike_other("jacobians")
        self._drop([k for k, factors in self.matrices.items() if len(factors) > 1])

    def drop_matrices(self) -> None:
        """Keep no matrices up to now."""
        self._drop([*self.matrices])

    def _drop(self, keys: Iterable[Hashable]) -> None:
        for key in keys:
            self.matrices.pop(key, None)
            self._ledger.strike_other(("matrix", key))


def _jacobian(
    risk: EmpiricalRisk, batch: Linearization, columns: Columns
) -> Tensor | None:
    """Return a batch's Jacobian as a matrix if it can be computed at once.

    Datum by datum, where the model allows it: of the rows of one datum, only that
    datum's part of the batch matters.
    """
    if risk.model.by_datum:
        J = jacobian_by_datum(risk, batch, columns.at_once(VJPS, batch))
        if J is not None and is_jacobian(J, risk.space, batch, 0.75):
            return J
        risk.model.by_datum = False
    f = batch.output_space
    identity = torch.eye(f.dim, dtype=f.dtype, device=f.device)
    width = columns.at_once(VJPS, batch)
    try:
        chunks = [
            risk.space.join(batch.vjp(rows.reshape(-1, *f.shapes[0])), leading=1)
            for rows in identity.split(width)
        ]
    except RuntimeError as error:  # some operation cannot
        raise_if_out_of_memory(error)
        return None
    J = torch.cat(chunks)
    return J if is_jacobian(J, risk.space, batch, 0.5) else None


def is_jacobian(
    J: Tensor, space: TensorSpace, batch: Linearization, exponent: float
) -> bool:
    r"""Whether a matrix is a batch's Jacobian, up to ``eps ** exponent``.

    Its products with a random vector :math:`u` of output space are compared with those
    in reverse mode, entry by entry. So are those with vectors that are random for one
    parameter and zero for the others: what is wrong about an output's derivatives by
    one of them does not hide behind those by another. That costs one product each way
    (one with as many vectors as there are parameters), and a few more where rounding
    errors have to be told from others.
    """
    f = batch.output_space
    like = torch.empty(f.shapes[0], dtype=f.dtype, device=f.device)
    [u], eps = random_like([like]), rounding(f.dtype, f.device, batch.convolves)

    def pull_back(vectors: list[Tensor]) -> Sequence[Tensor]:
        return batch.vjp(vectors[0])

    size, flat = J.abs(), u.reshape(-1).to(J.dtype)
    found, sizes = space.split(flat @ J), space.split(flat.abs() @ size)
    if not agree(found, pull_back([u]), eps, exponent, pull_back, [u], sizes):
        return False
    V = J.new_zeros(len(space.shapes), space.dim)
    for row, place in zip(V, space.slices(), strict=True):
        row[place] = random_like([row[place]])[0]

    def push_forward(vectors: list[Tensor]) -> Sequence[Tensor]:
        return [batch.jvp(vectors).reshape(-1, f.dim).to(J.dtype)]

    rows, sizes, vectors = [V @ J.T], [V.abs() @ size.T], space.split(V)
    try:
        expected = push_forward(vectors)
        return agree(rows, expected, eps, exponent, push_forward, vectors, sizes)
    except RuntimeError as error:  # some operation cannot with several vectors
        raise_if_out_of_memory(error)
        return False
