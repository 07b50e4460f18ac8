"""Which rows of a tensor belong to which datum of a batch: found, not guessed.

Two ways lead there. A batch's rows are compared with those of some of its data, which
are evaluated without the others: :func:`find_order`. Or every datum is given a number
that shows in whatever it has a part in: :func:`factors` and :func:`decode`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from curvlinops._determinism import close

#: How many data one factor tells apart: by signs and powers of two, which are exact.
#: Fewer, where large factors make rounding errors of some data visible beside others.
BASES = (16, 2)


class Order(NamedTuple):
    """Rows along an axis that are sorted: by data, or by positions first.

    Attributes
    ----------
    axis : int
        The axis. It has one row per datum or, for all data, equally many.
    interleaved : bool
        Whether rows ``n, n + N, n + 2 N, ...`` are those of datum ``n``.
    """

    axis: int
    interleaved: bool = False

    def data_first(self, x: Tensor, size: int) -> Tensor:
        """Return a tensor with the axis in front, as ``[data, rows]``."""
        x = x.movedim(self.axis, 0)
        if self.interleaved:
            return x.unflatten(0, (-1, size)).transpose(0, 1)
        return x.unflatten(0, (size, -1))

    def pick(self, whole: Tensor, picked: range, size: int) -> Tensor:
        """Return the rows of some data, sorted as they are without the others."""
        rows = self.data_first(whole, size)
        rows = rows[picked.start : picked.stop : picked.step]
        rows = rows.transpose(0, 1) if self.interleaved else rows
        return rows.flatten(0, 1).movedim(0, self.axis)

    def owners(self, shape: Sequence[int], size: int) -> Tensor:
        """Return the datum of every entry of a tensor, of that shape."""
        place = torch.arange(shape[self.axis])
        owner = place % size if self.interleaved else place * size // len(place)
        ones = [1] * (len(shape) - self.axis - 1)
        return owner.reshape(-1, *ones).expand(shape)


def orders(shape: Sequence[int], size: int) -> list[Order]:
    """Return how rows of so many data may be sorted: axes that are as long first."""
    exact = [Order(i) for i, length in enumerate(shape) if length == size]
    several = [i for i, n in enumerate(shape) if n > size and n % size == 0]
    return exact + [Order(i, flag) for i in several for flag in (False, True)]


def find_order(
    whole: Tensor, part: Tensor, picked: range, size: int, tolerance: float
) -> Order | None:
    """Return how a batch's rows are sorted, given the rows of some of its data.

    Parameters
    ----------
    whole, part : Tensor
        Rows of all data and of some, evaluated without the others.
    picked : range
        Which these are.
    size : int
        The number of all data.
    tolerance : float
        How far values may be apart, relative to the largest.

    Returns
    -------
    Order or None
        ``None`` unless there is one order, and only one, in which the rows are equal.
    """
    if whole.ndim != part.ndim:
        return None
    differ = [i for i in range(whole.ndim) if whole.shape[i] != part.shape[i]]
    if len(differ) != 1:
        return None
    (axis,) = differ
    if whole.shape[axis] * len(picked) != part.shape[axis] * size:
        return None
    found = [
        order
        for order in orders(whole.shape, size)
        if order.axis == axis and same(part, order.pick(whole, picked, size), tolerance)
    ]
    return found[0] if len(found) == 1 else None


def same(a: Tensor, b: Tensor, tolerance: float) -> bool:
    """Whether values agree, relative to the largest; integers are the same."""
    if a.shape != b.shape:
        return False
    if not a.numel() or not a.is_floating_point():
        return torch.equal(a, b)
    return close(a, b, tolerance)


def as_order(
    owners: Tensor, shape: Sequence[int], size: int, likely: Order | None = None
) -> Order | None:
    """Return the order of rows whose data are known.

    Where they are not, -1, an order is taken only if it is the likely one, or the only
    one, and the others are rows of several data: a datum alone tells of no order.
    """
    found = []
    for order in orders(shape, size):
        expected = order.owners(shape, size).reshape(-1).to(owners.device)
        if bool(((owners == expected) | (owners < 0)).all()):
            found.append(order)
    if likely in found:
        return likely
    known = owners[owners >= 0]
    several = bool((known != known[:1]).any())
    sure = len(known) == len(owners) or (several and len(found) == 1)
    return found[0] if found and sure else None


def filled(owners: Tensor, shape: Sequence[int], size: int) -> Tensor:
    """Replace -1 by the datum of all other rows at the same place along some axis.

    That has to have a datum, equally often each, at all its places.
    """
    for axis, length in enumerate(shape if owners.numel() else ()):
        here = owners.reshape(shape).movedim(axis, 0).reshape(length, -1)
        most = here.amax(1, keepdim=True)
        alike = bool(((here == most) | (here < 0)).all()) and bool((most >= 0).all())
        if alike and len({*most[:, 0].bincount(minlength=size).tolist()}) == 1:
            ones = [1] * (len(shape) - axis - 1)
            return most.reshape(-1, *ones).expand(*shape).reshape(-1)
    return owners


def ranks(owners: Tensor) -> Tensor:
    """Return for every row the number of rows before it that are of the same datum."""
    order = owners.argsort(stable=True)
    _, counts = owners[order].unique_consecutive(return_counts=True)
    starts = (counts.cumsum(0) - counts).repeat_interleave(counts)
    result = torch.empty_like(owners)
    result[order] = torch.arange(len(owners), device=owners.device) - starts
    return result


def table(owners: Tensor, size: int) -> Tensor:
    """Return every datum's rows, ``[size, most rows]``, filled up by a row too many."""
    known = (owners >= 0).nonzero()[:, 0]
    mine = owners[known]
    rank = ranks(mine)
    most = int(rank.max()) + 1 if len(rank) else 0
    result = owners.new_full((size, most), len(owners))
    result[mine, rank] = known
    return result


def factors(owners: Tensor, size: int, base: int) -> list[Tensor]:
    """Return numbers to multiply rows by that tell so many data apart: ones first."""
    result, rest = [torch.ones_like(owners)], owners
    while size > 1:
        digit, rest, size = rest % base, rest // base, -(-size // base)
        result.append((1 - 2 * (digit % 2)) * 2 ** (digit // 2))
    return result


def decode(rows: Sequence[Tensor], size: int, base: int, eps: float) -> Tensor | None:
    """Return which data rows depend on, which are linear in what was multiplied.

    Parameters
    ----------
    rows : sequence of Tensor
        Of shape ``[rows, entries]``, for each of the :func:`factors`.
    size, base : int
        Number of data, and how many one factor tells apart.
    eps : float
        Relative rounding error. That of a multiple is the same, since factors are
        exact: there is hardly more than what sums over all data leave.

    Returns
    -------
    Tensor or None
        Of shape ``[rows]``, with -1 where a row is zero. ``None`` if some row depends
        on several data.
    """
    first, owners = rows[0], rows[0].new_zeros(len(rows[0]), dtype=torch.long)
    if not first.numel():
        return owners - 1
    largest, place = first.abs().max(1, keepdim=True)
    tolerance = (32 if eps < 1e-4 else 2) * eps
    live = largest[:, 0] > eps * largest.max()
    for step, row in enumerate(rows[1:]):
        ratio = row.gather(1, place) / first.gather(1, place)
        power = ratio.abs().log2().round().nan_to_num(0).clamp(0, base // 2 - 1)
        factor = torch.where(ratio < 0, -1, 1) * 2**power
        gap = (row - factor * first).abs().amax(1, keepdim=True)
        near = gap <= tolerance * (factor.abs() * largest + largest.max())
        if not bool((near[:, 0] | ~live).all()):
            return None
        digit = 2 * power.long() + (ratio < 0)
        owners += digit[:, 0] * base**step
    owners[~live] = -1
    return owners if bool((owners < size).all()) else None
