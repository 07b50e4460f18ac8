"""Whether the parts of batches contribute apart, as bounds for memory need."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from gc import collect
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from curvlinops._agreement import agree, random_like, rows_agree
from curvlinops._data import (
    Share,
    checked_pair,
    cloned,
    joined,
    moved,
    part_of,
    shares,
)
from curvlinops._determinism import close
from curvlinops._linearization import Linearization
from curvlinops._memory import raise_if_out_of_memory
from curvlinops._plan import (
    Fit,
    LimitExceededError,
    Product,
    Tracker,
    number_of_parts,
    numel,
    refusal,
    twin_of,
)
from curvlinops._spaces import rounding

if TYPE_CHECKING:
    from curvlinops.risk import EmpiricalRisk

T = TypeVar("T")


def check_parts(
    risk: EmpiricalRisk, fit: Fit, products: Sequence[Product], K: int
) -> None:
    r"""Raise if parts of batches give something else than they give in their batches.

    Every part's outputs and loss are compared with those of its data in the whole
    batch, and :math:`J^\top u` of every batch's first part with that of its halves.
    That costs two evaluations of the model without gradients per batch. Where one of a
    whole batch does not fit into the bound, outputs are compared with those of batches
    that are put together from halves of two parts.

    Parameters
    ----------
    risk : EmpiricalRisk
        The risk, of which nothing is changed.
    fit : Fit
        Says how batches are cut.
    products, K
        The product that is to fit, and its number of columns.

    Raises
    ------
    MemoryError
        If some part differs; the message says what products with whole batches take.
    """
    assert fit.entries is not None and risk.max_memory is not None
    length = products[0].lengths(0, risk.space.dim)[0]
    room = risk.max_memory - K * length * risk.space.dtype.itemsize
    twin: EmpiricalRisk | None = None
    for index, item in enumerate(risk.data):
        X, y = checked_pair(item, index)
        size = risk._size_or_none(X)
        number = number_of_parts(size, numel(X), fit.entries)
        if size is None or number == 1:
            continue
        twin = twin or twin_of(risk, [item], "off")
        device = risk.space.device
        whole = moved(X, device), moved(y, device)
        batch = _Batch(twin, whole, shares(size, number), fit, room)
        if not twin.session(batch.comes_apart):
            cause = (
                f"They cannot be cut, since parts of batch {index} do not give what "
                "they give together: does the model couple data (means over the batch, "
                "positions counted in it, a branch on all of it), or is a tensor as "
                "long as the batch, but no data?"
            )
            message = refusal(products, K, risk.max_memory, fit.whole, cause)
            raise MemoryError(message)


class _Batch:
    """A batch that is to be cut.

    Parameters
    ----------
    risk : EmpiricalRisk
        Whose model may be evaluated.
    item : tuple
        Inputs and targets.
    parts : list of Share
        How it is cut.
    fit : Fit
        Says which tensors are.
    room : int
        Bytes that evaluating it may take.
    """

    def __init__(
        self,
        risk: EmpiricalRisk,
        item: tuple[Any, Any],
        parts: list[Share],
        fit: Fit,
        room: int,
    ) -> None:
        self._risk, self._item, self._parts = risk, item, parts
        self._tables, self._room = fit.tables, room

    def comes_apart(self) -> bool:
        """Whether its parts give what they give together.

        What the whole batch raises is left to products, which say more about it.
        """
        try:
            whole = self._within_room(partial(self._outputs, self._item[0]))
        except Exception as error:
            raise_if_out_of_memory(error)
            return True
        try:
            if whole is None:
                same = all(self._pair_agrees(*pair) for pair in _pairs(self._parts))
            else:
                same = not whole.isfinite().all() or self._outputs_agree(whole)
            del whole
            return same and self._halves_agree()
        except Exception as error:  # whatever the user's model or loss raises on a part
            raise_if_out_of_memory(error)
            return False

    def _cut(self, start: int, stop: int) -> tuple[Any, Any]:
        share = Share(start, stop, self._parts[-1].stop)
        return part_of(self._item, share, self._tables)

    def _outputs(self, X: Any) -> Tensor:
        """Evaluate the model, without a graph unless it needs one itself."""
        model: Callable[[Any], Tensor] = self._risk.model
        try:
            with torch.no_grad():
                return model(cloned(X))
        except LimitExceededError:
            raise
        except Exception as error:  # it may differentiate by its inputs
            raise_if_out_of_memory(error)
        return model(cloned(X)).detach()

    def _within_room(self, run: Callable[[], T]) -> T | None:
        """Return ``run()``, or ``None`` where that takes more bytes than there are."""
        with Tracker() as tracker, suppress(LimitExceededError):
            tracker.limit = self._room
            return run()
        collect()  # what is left of it may be in reference cycles
        return None

    def _outputs_agree(self, f: Tensor) -> bool:
        losses, counts = [], []
        for start, stop, size in self._parts:
            X, y = self._cut(start, stop)
            rows, part = len(f) // size, self._outputs(X)
            if not self._same(part, f[start * rows : stop * rows]):
                return False
            loss, count = self._loss(part, X, y)
            losses.append(loss)
            counts.append(count)
        loss, count = self._loss(f, *self._item)
        eps = rounding(f.dtype, f.device, self._risk.model.convolves)
        return all(
            close(torch.stack(parts).sum(), total, eps**0.5)
            for parts, total in ((losses, loss), (counts, count))
        )

    def _loss(self, f: Tensor, X: Any, y: Any) -> tuple[Tensor, Tensor]:
        """Return what is summed over parts: the loss, and its number of terms."""
        if (make_loss := self._risk._loss_maker(X)) is None:
            return f.new_zeros(()), f.new_zeros(())
        loss = make_loss(f, y)
        return loss.value().detach(), torch.as_tensor(loss.count)

    def _same(self, part: Tensor, whole: Tensor) -> bool:
        eps = rounding(part.dtype, part.device, self._risk.model.convolves)
        return rows_agree(part, whole, eps**0.75)

    def _pair_agrees(self, first: Share, second: Share) -> bool:
        """Whether halves of two parts give together what they give in their parts."""
        (a, b, _), (c, d, _) = first, second
        middle, end = (a + b) // 2, (c + d + 1) // 2
        together = joined(
            [self._cut(middle, b)[0], self._cut(c, end)[0]], [b - middle, end - c]
        )
        f = self._outputs(together)
        rows = len(f) // (b - middle + end - c)
        here = self._outputs(self._cut(a, b)[0])[(middle - a) * rows :]
        there = self._outputs(self._cut(c, d)[0])[: (end - c) * rows]
        split = (b - middle) * rows
        return self._same(here, f[:split]) and self._same(there, f[split:])

    def _halves_agree(self) -> bool:
        r"""Whether :math:`J^\top u` of the first part is that of its halves.

        Of what fits of it: two data have been tried before.
        """
        size, same = self._parts[0].stop, None
        while size > 1 and same is None:
            same = self._within_room(partial(self._is_sum_of_halves, size))
            size //= 2
        return same is not False

    def _is_sum_of_halves(self, size: int) -> bool:
        def pull_back(stop: int, start: int, vectors: list[Tensor]) -> list[Tensor]:
            X, y = self._cut(start, stop)
            return Linearization(self._risk.model, X, y).vjp(vectors[0])

        space, middle = self._risk.space, size // 2
        [U] = random_like([self._outputs(self._cut(0, size)[0])])
        first, second = U.split([rows := len(U) // size * middle, len(U) - rows])
        found = space.split(space.join(pull_back(middle, 0, [first])))
        for row, g in zip(found, pull_back(size, middle, [second]), strict=True):
            row.add_(g)
        whole = partial(pull_back, size, 0)
        eps = rounding(U.dtype, U.device, self._risk.model.convolves)
        return agree(found, whole([U]), eps, 0.75, whole, [U])


def _pairs(parts: list[Share]) -> Iterator[tuple[Share, Share]]:
    """Pair every part with the next one, and with one far away."""
    n = len(parts)
    for i, part in enumerate(parts):
        yield part, parts[(i + 1) % n]
        if n > 3:
            yield part, parts[(i + n // 2) % n]
