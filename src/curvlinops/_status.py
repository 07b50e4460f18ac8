"""What is kept between products at the moment."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass

from curvlinops._linearization import Linearization


@dataclass(frozen=True)
class Status:
    """What the next product with an operator finds; ``str`` gives it in words.

    Parameters
    ----------
    batches : tuple of str
        What is kept of each batch (or part of one), in order: ``"recording"``,
        ``"graph"``, or ``"recomputed"`` if nothing is. Empty as long as the number of
        batches is not known.
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
        replays = batch is not None and all(batch.replays(key) for key in keys)
        form = "recording" if replays and keys else "graph"
        forms.append("recomputed" if batch is None else form)
    if not reason and not recordings and not full:
        reason = "Nothing is kept yet, since there was no product."
    if not reason and "recomputed" in forms:
        reason = (
            "Not all is kept: recordings are, from the first batch on, as long as they "
            "fit into `cache` and `max_memory`."
        )
    matrix = bool(keys) and all(key in matrices for key in keys)
    return Status(tuple(forms), held, matrix, reason)
