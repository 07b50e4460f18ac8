"""Whether the parts of batches contribute apart, as bounds for memory need."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from curvlinops._agreement import agree, in_units, random_like, rows_agree
from curvlinops._data import Share, Tables, cloned, part_of
from curvlinops._determinism import close
from curvlinops._linearization import Linearization
from curvlinops._memory import raise_if_out_of_memory
from curvlinops._order import Order
from curvlinops._spaces import rounding
from curvlinops._tracker import within

if TYPE_CHECKING:
    from curvlinops.risk import EmpiricalRisk


class Batch:
    r"""A batch that is to be cut.

    Every part's outputs are compared with the same rows of the whole batch's, which
    costs two evaluations of the model without gradients, and :math:`J^\top u` of the
    first part with that of its halves. So are derivatives of a loss that is not known,
    and numbers of terms. Where some parameter is zero, which may hide what comes before
    it, outputs are compared once more with other numbers in its place.

    Parameters
    ----------
    risk : EmpiricalRisk
        Whose model may be evaluated.
    item : tuple
        Inputs and targets.
    parts : list of Share
        How it is cut.
    tables : Tables
        Tensors that are not.
    room : int
        Bytes that this may take.
    """

    def __init__(
        self,
        risk: EmpiricalRisk,
        item: tuple[Any, Any],
        parts: list[Share],
        tables: Tables,
        room: int,
    ) -> None:
        self._risk, self._item, self._parts = risk, item, parts
        self._tables, self._room = tables, room

    def comes_apart(self) -> bool | None:
        """Whether its parts give what they give together; ``None`` without room."""
        leaves = [leaf.detach() for leaf in self._risk.model.leaves]
        same = within(self._room, partial(self._outputs_agree, leaves))
        if same and not all(leaf.any() for leaf in leaves):
            other = partial(self._outputs_agree, without_zeros(leaves))
            same = within(self._room, other)
        return self._halves_agree() if same else same

    def _cut(self, start: int, stop: int) -> tuple[Any, Any]:
        share = Share(start, stop, self._parts[-1].stop)
        return part_of(self._item, share, self._tables)

    def _outputs_agree(self, leaves: list[Tensor]) -> bool:
        """Compare rows; what the whole batch raises is left to products."""
        try:
            whole, count = evaluated(self._risk, self._item, leaves)
        except Exception as error:  # whatever the user's model or loss raises
            raise_if_out_of_memory(error)
            return True
        eps = rounding(whole[0].dtype, whole[0].device, self._risk.model.convolves)
        total = torch.zeros_like(count)
        units = [in_units(b) for b in whole]
        try:
            for start, stop, size in self._parts:
                part, terms = evaluated(self._risk, self._cut(start, stop), leaves)
                total += terms
                own = partial(Order(0).pick, picked=range(start, stop), size=size)
                for a, b, unit in zip(part, whole, units, strict=True):
                    if not rows_agree(a, own(b), eps**0.75, own(unit)):
                        return not b.isfinite().all()  # left to products, too
        except Exception as error:  # whatever the user's model or loss raises on a part
            raise_if_out_of_memory(error)
            return False
        return close(total, count, eps**0.5)

    def _halves_agree(self) -> bool:
        r"""Whether :math:`J^\top u` of the first part is that of its halves.

        Of as many of its data as there is room for: two have been tried before.
        """
        size, same = max(2, self._parts[0].stop), None
        while size > 1 and same is None:
            same = within(self._room, partial(self._is_sum_of_halves, size))
            size //= 2
        return same is not False

    def _is_sum_of_halves(self, size: int) -> bool:
        def pull_back(stop: int, start: int, vectors: list[Tensor]) -> list[Tensor]:
            X, y = self._cut(start, stop)
            return Linearization(self._risk.model, X, y).vjp(vectors[0])

        space, middle = self._risk.space, size // 2
        try:
            [U] = random_like([outputs_of(self._risk, self._cut(0, size)[0])])
            first, second = U.split([rows := len(U) // size * middle, len(U) - rows])
            found = space.split(space.join(pull_back(middle, 0, [first])))
            for row, g in zip(found, pull_back(size, middle, [second]), strict=True):
                row.add_(g)
            whole = partial(pull_back, size, 0)
            eps = rounding(U.dtype, U.device, self._risk.model.convolves)
            return agree(found, whole([U]), eps, 0.75, whole, [U])
        except Exception as error:  # whatever the user's model raises on a part
            raise_if_out_of_memory(error)
            return False


def evaluated(
    risk: EmpiricalRisk, item: tuple[Any, Any], leaves: list[Tensor] | None = None
) -> tuple[list[Tensor], Tensor]:
    """Evaluate what parts are compared by, with other parameters if given.

    Returns
    -------
    list of Tensor
        Outputs, and derivatives of a loss that is not known in closed form.
    Tensor
        The number of terms, which is a sum over parts.
    """
    X, y = item
    f = outputs_of(risk, X, leaves)
    if (make_loss := risk._loss_maker(X)) is None:
        return [f], f.new_zeros(())
    loss = make_loss(f, y)
    rows = [f, loss.gradient().detach()] if loss.opaque else [f]
    return rows, torch.as_tensor(loss.count, dtype=torch.float64)


def without_zeros(leaves: list[Tensor]) -> list[Tensor]:
    """Return parameters with random numbers in place of those that are zero."""
    return [
        leaf if leaf.any() else random_like([leaf], seed)[0].mul_(0.1)
        for seed, leaf in enumerate(leaves)
    ]


def outputs_of(
    risk: EmpiricalRisk, X: Any, leaves: list[Tensor] | None = None
) -> Tensor:
    """Evaluate the model, without a graph unless it needs one itself.

    What it notes in itself is taken back, so that all parts meet the same model.
    """
    model = risk.model
    run: Callable[[Any], Tensor] = (
        partial(model.at, tensors=leaves) if leaves else model
    )
    with model.left_as_it_is():
        try:
            with torch.no_grad():
                return run(cloned(X))
        except Exception as error:  # it may differentiate by its inputs
            raise_if_out_of_memory(error)
    with model.left_as_it_is():
        return run(cloned(X)).detach()
