"""The diagonal blocks of one matrix, multiplied all at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from curvlinops._operand import to_numpy
from curvlinops._random import Probes
from curvlinops.estimators._run import Run
from curvlinops.estimators.lanczos import Recurrence, Steps


def block_places(A: Any, blocks: Mapping[str, Any] | None) -> dict[str, np.ndarray]:
    """Return the indices of every named block of a matrix.

    Parameters
    ----------
    A : LinearOperator, array, sparse matrix, or Tensor
        The matrix.
    blocks : mapping or None
        From names to what the blocks are, see :func:`layer_summary`; by default every
        parameter is one.

    Raises
    ------
    TypeError
        If the blocks are no mapping.
    ValueError
        If the matrix names no blocks and none are given, a pattern matches nothing, a
        block is empty or no part of the matrix, or two overlap.
    """
    space = getattr(A, "_in_space", None)
    # A single tensor that nobody named is a vector, not a block of one.
    own: dict[str, slice] = {}
    if space is not None and tuple(space.names) != ("0",):
        own = dict(zip(space.names, space.slices(), strict=True))
    if blocks is None:
        blocks = {
            name: place for name, place in own.items() if place.stop > place.start
        }
    if not isinstance(blocks, Mapping):
        raise TypeError(f"blocks is a dictionary of blocks by name, got {blocks!r}.")
    if not blocks:
        raise ValueError(
            f"{type(A).__name__} of shape {tuple(A.shape)} has no named blocks: its "
            "vectors are not those of parameters with names. Say which blocks there "
            'are, e.g. `blocks={"first": slice(0, 100), "rest": slice(100, None)}`.'
        )
    found = {
        name: _indices(name, what, own, A.shape[1]) for name, what in blocks.items()
    }
    everything = np.concatenate([*found.values()])
    if len(np.unique(everything)) < len(everything):
        raise ValueError(
            f"The blocks {', '.join(found)} overlap: an index belongs to one at most."
        )
    return found


def _indices(name: str, what: Any, own: Mapping[str, slice], N: int) -> np.ndarray:
    """Return the indices of a block: from a slice, indices, a mask, or patterns."""
    everything = np.arange(N)
    if not isinstance(what, slice):
        what = np.atleast_1d(to_numpy(what))
        if what.dtype.kind == "U":
            matches = [n for n in own if any(fnmatchcase(n, p) for p in what.flat)]
            what = np.r_[everything[:0], *(everything[own[n]] for n in matches)]
    try:
        places = everything[what].ravel()
    except IndexError:
        places = everything[:0]
    if not places.size:
        names = f" Names are {', '.join(own)}." if own else ""
        raise ValueError(
            f"The block {name!r} is empty, or no part of the matrix: give patterns of "
            f"names, a slice, indices below {N}, or a mask of this length.{names}"
        )
    return places


class Blocks:
    r"""The block-diagonal matrix :math:`D = \mathrm{diag}(A_{11}, A_{22}, \dots)`.

    A vector of length ``N`` holds one vector of every block. Its product with ``D``
    takes one column per *group* of blocks: blocks between which ``A`` is zero share a
    column, those of a Kronecker-factored matrix a single one.

    Parameters
    ----------
    run : Run
        The estimation.
    places : dict of str to numpy.ndarray
        Indices of every block.
    """

    def __init__(self, run: Run, places: Mapping[str, np.ndarray]) -> None:
        self.run = run
        device = run.operand.device
        self.places = [_as_slice(p, device) for p in places.values()]
        self.sizes = np.array([len(p) for p in places.values()])

    def __len__(self) -> int:
        """Return the number of blocks."""
        return len(self.places)

    @cached_property
    def groups(self) -> list[list[int]]:
        """Blocks that share a column: ``A`` is zero between any two of them.

        Found by one product per block with a vector of normal entries, whose product
        with a row that is not zero is not zero, with probability one.
        """
        if len(self) == 1:
            return [[0]]
        if (state := self.run.load("coupled")) is not None:
            coupled = state["coupled"]
        else:
            coupled = self._coupled()
            self.run.save("coupled", {"coupled": coupled})
        groups: list[list[int]] = []
        for b in range(len(self)):
            free = (g for g in groups if not coupled[b, g].any())
            if (group := next(free, None)) is None:
                groups.append([b])
            else:
                group.append(b)
        return groups

    def _coupled(self) -> np.ndarray:
        """Return which blocks have something but zero between them."""
        run, B = self.run, len(self)
        A = run.operand
        probe = Probes(run.dim, "normal", run.probes.seed, A.dtype, A.device).block(
            0, 1
        )
        coupled = np.zeros((B, B), bool)

        def look(group: tuple[int, int], product: Tensor) -> None:
            b, _ = group
            coupled[:, b] = [bool(product[place].any()) for place in self.places]

        self._columns([([b], 0) for b in range(B)], probe, lambda j, y: look((j, 0), y))
        return coupled | coupled.T

    def _columns(
        self,
        columns: list[tuple[list[int], int]],
        V: Tensor,
        take: Callable[[int, Tensor], None],
    ) -> None:
        """Multiply columns, each made of some blocks of a vector, and hand them on."""
        run = self.run
        for first, last in run.blocks(0, len(columns)):
            X = V.new_zeros(last - first, run.dim).T
            for j, (group, r) in enumerate(columns[first:last]):
                for b in group:
                    X[self.places[b], j] = V[self.places[b], r]
            Y = run.multiply(X, record=False)
            for j in range(last - first):
                take(first + j, Y[:, j])

    def multiply(self, V: Tensor, members: list[list[int]]) -> Tensor:
        """Return ``D @ V`` for ``V`` of shape ``(N, K)``: of some blocks per column."""
        columns = [
            (some, r)
            for r, wanted in enumerate(members)
            for group in self.groups
            if (some := [b for b in group if b in wanted])
        ]
        result = torch.zeros_like(V)

        def take(j: int, product: Tensor) -> None:
            group, r = columns[j]
            for b in group:
                result[self.places[b], r] = product[self.places[b]]

        self._columns(columns, V, take)
        return result

    def cost(self, members: list[int]) -> int:
        """Return the products that one step takes for some of the blocks."""
        return sum(any(b in members for b in group) for group in self.groups)

    def dense(self, members: list[int]) -> dict[int, Tensor]:
        """Return some blocks as matrices: as many steps as the largest has columns."""
        found: dict[int, list[Tensor]] = {b: [] for b in members}
        A, sizes = self.run.operand, [int(size) for size in self.sizes]
        largest = max((sizes[b] for b in members), default=0)
        for first, last in self.run.blocks(0, largest):
            V = torch.zeros(self.run.dim, last - first, dtype=A.dtype, device=A.device)
            left = [b for b in members if sizes[b] > first]
            for b in left:
                columns = torch.arange(first, min(last, sizes[b]))
                unit = V.new_zeros(sizes[b], last - first)
                unit[columns, columns - first] = 1
                V[self.places[b]] = unit
            Y = self.multiply(
                V, [[b for b in left if sizes[b] > j] for j in range(first, last)]
            )
            for b in left:
                found[b].append(Y[self.places[b]][:, : sizes[b] - first])
        return {b: torch.cat(parts, dim=1) for b, parts in found.items()}

    def answer(self, methods: dict[int, Steps]) -> dict[int, Recurrence]:
        """Run one method on every block, all in step; return what they found."""
        found: dict[int, Recurrence] = {}
        asked = {b: next(steps) for b, steps in methods.items()}
        while asked:
            some = next(iter(asked.values()))
            V = some.new_zeros(self.run.dim, some.shape[1])
            for b, block in asked.items():
                V[self.places[b]] = block
            Y = self.multiply(V, [list(asked)] * some.shape[1])
            for b in list(asked):
                try:
                    asked[b] = methods[b].send(Y[self.places[b]])
                except StopIteration as end:
                    found[b] = end.value
                    del asked[b]
        return found


def _as_slice(places: np.ndarray, device: torch.device) -> Any:
    """Return contiguous indices as a slice, others as a tensor."""
    if (np.diff(places) == 1).all():
        return slice(int(places[0]), int(places[-1]) + 1)
    return torch.from_numpy(places).to(device)
