"""The uses of a layer as rows whose outer products sum up to its gradients."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from curvlinops._order import table
from curvlinops.kfac._layers import Gradients, Layer
from curvlinops.kfac._uses import pixels

#: Bytes of intermediate tensors that are computed at once.
CHUNK_BYTES = 1 << 24
#: Bytes of gradients that a CPU computes at once: they stay in its cache.
CACHE_BYTES = 1 << 20


def slots(layer: Layer, swapped: bool) -> Iterator[tuple[slice, list[Any]]]:
    """Yield the ranges of groups that uses fill, and these uses."""
    by_slot: dict[int | None, list[Any]] = defaultdict(list)
    for use, is_swapped in layer.uses:
        if is_swapped == swapped:
            slot = use.options.get("slot")
            by_slot[None if slot is None else slot[0]].append(use)
    for slot, uses in by_slot.items():
        yield slice(None) if slot is None else slice(slot, slot + 1), uses


@dataclass
class Part:
    """Uses of a layer: which groups they fill, and whether the roles are exchanged.

    Rows ``b`` and ``a`` are of shape ``[G, K, N, R, m]`` and ``[G, K, N, R, n]``, those
    that come from inputs with ``K = 1``. There are several uses if the data's rows lie
    anywhere in them; those of a datum with fewer than others are filled up by zeros.
    """

    groups: slice
    uses: list[Any]
    swapped: bool

    def inputs(self, layer: Layer, N: int) -> Tensor:
        """Return the rows of inputs, ``[G, N, R, n]``."""
        if not lies_anywhere(self.uses[0]):
            return layer.inputs(self.uses[0], N)
        rows = [layer.inputs(use, 1) for use in self.uses]
        return self._sorted([a.unsqueeze(1) for a in rows], N)[:, 0]

    def outputs(self, layer: Layer, grads: Gradients, N: int) -> Tensor:
        """Return the rows of gradients, ``[G, K, N, R, m]``."""
        if not lies_anywhere(self.uses[0]):
            (use,) = self.uses
            return layer.outputs(use, grads[id(use)], N)
        rows = [layer.outputs(use, grads[id(use)], 1) for use in self.uses]
        return self._sorted(rows, N)

    def rows(
        self, layer: Layer, grads: Gradients, N: int, dtype: torch.dtype
    ) -> tuple[slice, Tensor, Tensor]:
        """Return groups and rows."""
        a = self.inputs(layer, N).unsqueeze(1).to(dtype)
        b = self.outputs(layer, grads, N).to(dtype)
        return self.groups, *((a, b) if self.swapped else (b, a))

    def numbers(self, layer: Layer, N: int, inputs: Tensor) -> Tensor:
        """Return how many of the rows of inputs every datum has, ``[N, 1]``.

        Raises
        ------
        ValueError
            If that is not known.
        """
        if not lies_anywhere(self.uses[0]):
            return torch.full((N, 1), inputs.shape[2], device=inputs.device)
        owners = self._owners()
        if bool((owners < 0).any()):
            raise ValueError(
                f"No output depends on some of the rows that {layer.name!r} is "
                "multiplied with, so it is not known which datum they belong to, nor "
                "its mean over them: use `kfac_approx='expand'`, or keep the data's "
                "rows on an axis of their own, filled up to equal lengths."
            )
        return owners.bincount(minlength=N).unsqueeze(1)

    def _owners(self) -> Tensor:
        """Return the datum of every row."""
        return torch.cat([u.place.repeat_interleave(pixels(u)) for u in self.uses])

    def _sorted(self, rows: list[Tensor], N: int) -> Tensor:
        """Sort all uses' rows, ``[G, K, 1, R, d]``, by data."""
        index = table(self._owners(), N)
        return F.pad(torch.cat(rows, 3)[:, :, 0], (0, 0, 0, 1))[:, :, index]


def parts_of(layer: Layer) -> list[Part]:
    """Return a layer's uses, those together whose rows lie anywhere in them."""
    parts = []
    for swapped in (False, True):
        for groups, uses in slots(layer, swapped):
            parts += parts_among(groups, uses, swapped)
    return parts


def parts_among(groups: slice, uses: list[Any], swapped: bool = False) -> list[Part]:
    """Return the parts that uses of one range of groups are."""
    anywhere = [use for use in uses if lies_anywhere(use)]
    parts = [Part(groups, [u], swapped) for u in uses if not lies_anywhere(u)]
    return parts + ([Part(groups, anywhere, swapped)] if anywhere else [])


def lies_anywhere(use: Any) -> bool:
    """Whether the data's rows have no order. Sums of a column need none."""
    return isinstance(use.place, Tensor) and use.kind != "elementwise"


def gradients(
    rows: list[tuple[slice, Tensor, Tensor]], size: Sequence[int]
) -> Iterator[Tensor]:
    """Yield the gradients ``[G, chunk, m, n]`` for all vectors, in chunks of data.

    Parameters
    ----------
    rows : list of (slice, Tensor, Tensor)
        The groups and rows of every part.
    size : sequence of int
        ``(G, m, n)``.
    """
    (G, m, n), like = size, rows[0][1]
    K = max(max(b.shape[1], a.shape[1]) for _, b, a in rows)
    N = like.shape[2]
    nbytes = CHUNK_BYTES if like.is_cuda else CACHE_BYTES
    chunk = max(1, nbytes // max(1, G * m * n * like.element_size()))
    for k in range(K):
        for start in range(0, N, chunk):
            part = slice(start, start + chunk)
            M: Any = None
            for groups, b, a in rows:
                b, a = (t[:, k if t.shape[1] == K else 0, part] for t in (b, a))
                if groups == slice(None) and M is None:
                    M = b.mT @ a
                    continue
                if M is None:
                    M = like.new_zeros(G, b.shape[1], m, n)
                M[groups] += b.mT @ a
            yield M
