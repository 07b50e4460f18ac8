"""What is kept between products at the moment."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass
from itertools import product

from curvlinops._linearization import Linearization


@dataclass(frozen=True)
class Status:
    """What the next product with an operator finds; ``str`` gives it in words.

    Parameters
    ----------
    batches : tuple of str
        What is kept of each batch (or part of one), in order: ``"sensitivities"``,
        ``"recording"``, ``"graph"``, or ``"recomputed"`` if nothing is. Empty as long
        as the number of batches is not known.
    held : int
        Bytes that everything takes that is kept, for all operators of the risk.
    matrix : bool
        Whether the matrix, or its factors, are kept, so that batches do not matter.
    reason : str
        Why nothing is kept, or not everything; empty if everything is.
    """

    batches: tuple[str, ...]
    held: int
    matrix: bool
    reason: str

    def __str__(self) -> str:
        """Return it in words."""
        if self.matrix:
            return f"The matrix is kept; {self.held} bytes in all."
        counts = Counter(self.batches)
        parts = [f"{number} {form}" for form, number in counts.items()]
        listing = f" ({', '.join(parts)})" if parts else ""
        text = f"{len(self.batches)} batches{listing}; {self.held} bytes are kept."
        return f"{text} {self.reason}".rstrip()


def form_of(batches: Iterable[Linearization], keys: Iterable[Hashable]) -> str:
    """Say what batches that are kept are multiplied by, for products of these names."""
    pairs = [*product(batches, keys)]
    if not pairs or not all(batch.replays(key) for batch, key in pairs):
        return "graph"
    folded = all(batch.is_folded(key) for batch, key in pairs)
    return "sensitivities" if folded else "recording"


def status_of(
    recordings: Mapping[int, Linearization],
    number: int | None,
    keys: Iterable[Hashable],
    matrices: Mapping[Hashable, object],
    held: int,
    full: bool,
    reason: str,
) -> Status:
    """Return the status of products that are named by some keys.

    Parameters
    ----------
    recordings : mapping of int to Linearization
        The batches that are kept, by their places.
    number : int or None
        The number of batches, if that is known.
    keys : iterable of hashable
        The products' names.
    matrices : mapping
        Matrices that are kept, by name.
    held : int
        Bytes of everything that is kept.
    full : bool
        Whether something did not fit.
    reason : str
        Why nothing is kept, as far as that is known beforehand.
    """
    keys = [*keys]
    forms = []
    for place in range(number or 0):
        batch = recordings.get(place)
        forms.append("recomputed" if batch is None else form_of([batch], keys))
    if not reason and not recordings and not full:
        reason = "Nothing is kept yet, since there was no product."
    if not reason and "recomputed" in forms:
        reason = (
            "Not all is kept: recordings are, from the first batch on, as long as they "
            "fit into `cache` and `max_memory`."
        )
    matrix = bool(keys) and all(key in matrices for key in keys)
    return Status(tuple(forms), held, matrix, reason)
