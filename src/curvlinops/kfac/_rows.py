"""The uses of a layer as rows whose outer products sum up to its gradients."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from curvlinops.kfac._layers import Gradients, Layer

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
    """One use of a layer: which groups it fills, and whether the roles are exchanged.

    Its rows ``b`` and ``a`` are of shape ``[G, K, N, R, m]`` and ``[G, K, N, R, n]``,
    those that come from inputs with ``K = 1``.
    """

    groups: slice
    use: Any
    swapped: bool

    def rows(
        self, layer: Layer, grads: Gradients, N: int, dtype: torch.dtype
    ) -> tuple[slice, Tensor, Tensor]:
        """Return groups and rows."""
        a = layer.inputs(self.use, N).unsqueeze(1).to(dtype)
        b = layer.outputs(self.use, grads[id(self.use)], N).to(dtype)
        return self.groups, *((a, b) if self.swapped else (b, a))


def parts_of(layer: Layer) -> list[Part]:
    """Return a layer's uses."""
    return [
        Part(groups, use, swapped)
        for swapped in (False, True)
        for groups, uses in slots(layer, swapped)
        for use in uses
    ]


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
