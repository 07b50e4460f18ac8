"""Many tiny batches that are read as a few."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor

from curvlinops._agreement import agree, random_like, rows_agree
from curvlinops._apart import without_zeros
from curvlinops._data import cloned, joined, length_of, moved, tensors_in
from curvlinops._linearization import Linearization
from curvlinops._memory import raise_if_out_of_memory
from curvlinops._model import Model
from curvlinops._policy import POLICY
from curvlinops._spaces import rounding
from curvlinops.losses import Loss

#: Least number of batches that are put together before anything is known of them.
LEAST_BATCHES = 256
#: Most batches that become one, ...
MOST_TOGETHER = 256
#: ... and most entries of their inputs.
MOST_ENTRIES = POLICY.small // 2

Pair = tuple[Any, Any]
LossMaker = Callable[[Any], Callable[[Tensor, Any], Loss] | None]


class Groups(NamedTuple):
    """How batches that follow each other are put together.

    Parameters
    ----------
    sizes : tuple of tuple of int
        For every group, the numbers of data in its batches.
    """

    sizes: tuple[tuple[int, ...], ...]

    def read(self, pairs: Iterable[Pair]) -> Iterator[tuple[int, Pair, None]]:
        """Yield the number of each group's first batch, its data, and no share."""
        batches, first = iter(pairs), 0
        for sizes in self.sizes:
            yield first, together([*islice(batches, len(sizes))], sizes), None
            first += len(sizes)

    def output_shapes(self, shapes: list[torch.Size]) -> list[torch.Size]:
        """Return the shapes of the batches' outputs from those of the groups'."""
        found = []
        for sizes, (length, *rest) in zip(self.sizes, shapes, strict=True):
            rows = length // sum(sizes)
            found += [torch.Size([rows * size, *rest]) for size in sizes]
        return found


def together(batches: list[Pair], sizes: tuple[int, ...]) -> Pair:
    """Put the data of some batches into one."""
    if len(batches) == 1:
        return batches[0]
    X = joined([x for x, _ in batches], sizes)
    return X, joined([y for _, y in batches], sizes, several=True)


class Grouping:
    """Whether batches are put together, which is decided once.

    Attributes
    ----------
    groups : Groups or None
        How they are.
    """

    def __init__(self) -> None:
        self.groups: Groups | None = None
        self._found: Groups | None = None
        self._open = True

    def pays(self, data: Any) -> bool:
        """Whether that is still to be decided, and there are many batches."""
        return self._open and (length_of(data) or 0) >= LEAST_BATCHES

    def find(self, pairs: Callable[[], Iterable[Pair]], *args: Any) -> None:
        """Look for groups, see :func:`find_groups`."""
        self._found = find_groups(pairs(), *args)

    def close(self) -> bool:
        """Decide as was found; return whether this is a change."""
        changes = self._open and self._found is not None
        if self._open:
            self.groups, self._open = self._found, False
        return changes


def find_groups(
    pairs: Iterable[Pair],
    size_of: Callable[[Any], int],
    model: Model,
    loss_of: LossMaker,
) -> Groups | None:
    r"""Return how tiny batches may be put together, if they give the same so.

    To be called where the model may be evaluated.

    Parameters
    ----------
    pairs : iterable of tuple
        The batches: inputs and targets.
    size_of : callable
        Maps inputs to the number of data in them.
    model : Model
        The model.
    loss_of : callable
        Maps inputs to what builds their loss from outputs and targets.

    Returns
    -------
    Groups or None
        ``None`` if some batch is not tiny, if outputs of a group are not those of its
        batches, if :math:`J^\top u` of a group is not that of its halves, or if a loss
        has another number of terms.

    Notes
    -----
    Costs one evaluation of every batch without a graph, two where some parameter is
    zero, which might hide what comes before it; and six backward passes per group,
    three of them at other parameters, where no derivative vanishes by chance.
    """
    try:
        check, found = _Check(model, loss_of), []
        for batches, sizes in _cut(pairs, size_of, POLICY.small - model.space.dim):
            if not (all(sizes) and check(batches, sizes)):
                return None
            found.append(sizes)
        return Groups(tuple(found))
    except Exception as error:  # whatever a model or a loss raises on other batches
        raise_if_out_of_memory(error)
        return None


def _cut(
    pairs: Iterable[Pair], size_of: Callable[[Any], int], most: int
) -> Iterator[tuple[list[Pair], tuple[int, ...]]]:
    """Yield batches that come next, and their sizes; none if some is not tiny."""
    current, sizes, entries = list[Pair](), list[int](), 0
    for pair in pairs:
        number = sum(t.numel() for t in tensors_in(pair[0]))
        full = entries + number > MOST_ENTRIES or len(current) == MOST_TOGETHER
        if current and full:
            yield current, tuple(sizes)
            current, sizes, entries = [], [], 0
        current.append(pair)
        sizes.append(size_of(pair[0]) if number <= most else 0)
        entries += number
    yield current, tuple(sizes)


class _Check:
    """Whether batches may be put together, group by group."""

    def __init__(self, model: Model, loss_of: LossMaker) -> None:
        self._model, self._loss_of = model, loss_of
        leaves = [leaf.detach() for leaf in model.leaves]
        self._zero = not all(leaf.any() for leaf in leaves)
        full = without_zeros(leaves)  # and none is where a derivative may vanish
        self._near = [p * (1 + random_like([p], i)[0] / 8) for i, p in enumerate(full)]
        self._shifted = model.shifted(self._near)

    def __call__(self, batches: list[Pair], sizes: tuple[int, ...]) -> bool:
        if len(batches) == 1:
            return True
        device = self._model.space.device
        batches = [(moved(x, device), moved(y, device)) for x, y in batches]
        slices = slice(None), slice(len(sizes) // 2), slice(len(sizes) // 2, None)
        pairs = [together(batches[s], sizes[s]) for s in slices]
        same = self._outputs_agree(pairs[0][0], batches, None)
        if same and self._zero:
            same = self._outputs_agree(pairs[0][0], batches, self._near)
        return same and all(
            model.run(partial(self._halves_agree, model, pairs))
            for model in (self._model, self._shifted)
        )

    def _outputs_agree(
        self, X: Any, batches: list[Pair], leaves: list[Tensor] | None
    ) -> bool:
        model = self._model

        def evaluate(X: Any) -> Tensor:
            X = cloned(X)  # which a model may write into
            return model(X) if leaves is None else model.at(X, leaves)

        with torch.no_grad(), model.left_as_it_is():
            f = evaluate(X)
            rows = torch.cat([evaluate(x) for x, _ in batches])
        eps = rounding(f.dtype, f.device, model.convolves)
        return bool(f.isfinite().all()) and rows_agree(rows, f, eps**0.75)

    def _halves_agree(self, model: Model, pairs: list[Pair]) -> bool:
        whole, *parts = (
            Linearization(model, cloned(X), y, self._loss_of(X)) for X, y in pairs
        )
        f = whole.output
        eps = rounding(f.dtype, f.device, self._model.convolves)
        if whole.make_loss is not None:
            rows = torch.cat([part.loss.gradient() for part in parts])
            number = sum(float(part.count) for part in parts)
            if not rows_agree(rows, whole.loss.gradient(), eps**0.75) or (
                abs(number - float(whole.count)) > eps**0.5 * number
            ):
                return False
        [U] = random_like([f.detach()])
        us = U.split([len(part.output) for part in parts])
        pulled = [part.vjp(u) for part, u in zip(parts, us, strict=True)]

        def pull_back(vectors: list[Tensor]) -> list[Tensor]:
            return whole.vjp(vectors[0])

        found = [*map(torch.add, *pulled)]
        return agree(found, pull_back([U]), eps, 0.75, pull_back, [U])
