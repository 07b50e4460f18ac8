"""Conditions of ``--fail-if``: names of differences, and how large they may be."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from curvlinops.report._comparison import Change, Comparison
from curvlinops.report._mistakes import MistakeError


def _sure(change: Change) -> float:
    """Return the relative size of a change, 0 if chance explains it."""
    if not change.significant:
        return 0.0
    return abs(change.relative) if change.first.value else float("inf")


def _relative(name: str) -> Callable[[Comparison], float]:
    """Return what finds the largest sure change of a quantity over all matrices."""

    def measure(comparison: Comparison) -> float:
        found = (c for pair in comparison.pairs for c in pair.changes())
        return max((_sure(c) for c in found if c.name == name), default=0.0)

    return measure


def _negative(comparison: Comparison) -> float:
    found = (c for pair in comparison.pairs for c in pair.numbers)
    mass = [c for c in found if c.name == "negative mass" and c.significant]
    return max((abs(c.difference) for c in mass), default=0.0)


def _density(comparison: Comparison) -> float:
    found = (pair.distance for pair in comparison.pairs)
    return max((d.value for d in found if d is not None and d.significant), default=0.0)


def _layers(comparison: Comparison) -> float:
    return float(
        max(
            (sum(m.significant for m in pair.layers) for pair in comparison.pairs),
            default=0,
        )
    )


def _turned(comparison: Comparison) -> float:
    found = (pair.overlap for pair in comparison.pairs)
    return max((1 - o.subspace for o in found if o is not None), default=0.0)


def _anything(comparison: Comparison) -> float:
    changes = [c for pair in comparison.pairs for c in pair.changes()]
    return sum(c.significant for c in changes) + _layers(comparison)


#: What can be measured: changes that error bars explain count as zero.
MEASURES: dict[str, tuple[Callable[[Comparison], float], str]] = {
    "loss": (lambda c: _sure(c.loss), "relative change of the loss"),
    "top-eigenvalue": (_relative("eigenvalue 1"), "of the largest eigenvalue"),
    "trace": (_relative("trace"), "of the trace"),
    "norm": (_relative("frobenius norm"), "of the Frobenius norm"),
    "effective-dimension": (_relative("effective dimension"), "of that"),
    "negative-mass": (_negative, "difference of the shares"),
    "density": (_density, "Jensen-Shannon distance of the densities"),
    "turned": (_turned, "1 - overlap of the leading subspaces"),
    "layers": (_layers, "number of layers that moved"),
    "anything": (_anything, "number of significant changes"),
}


@dataclass(frozen=True)
class Condition:
    """Something that must not be above a bound."""

    name: str
    bound: float

    def holds(self, comparison: Comparison) -> tuple[bool, float]:
        """Return whether the comparison is above the bound, and the number."""
        number = MEASURES[self.name][0](comparison)
        return number > self.bound, number


def condition(text: str) -> Condition:
    """Return the condition of a text such as ``"trace>10%"``, ``"layers>2"``.

    Parameters
    ----------
    text : str
        A name of :data:`MEASURES`, alone (above zero) or with a bound.

    Raises
    ------
    MistakeError
        If it is nothing of the kind.

    Examples
    --------
    >>> condition("trace > 10%"), condition("anything")
    (Condition(name='trace', bound=0.1), Condition(name='anything', bound=0.0))
    """
    match = re.fullmatch(r"\s*([a-z-]+)\s*(?:>\s*([0-9.eE+-]+)\s*(%?)\s*)?", text)
    try:
        if match is None or match[1] not in MEASURES:
            raise ValueError
        bound = float(match[2] or 0.0) / (100 if match[3] else 1)
    except ValueError as error:
        raise MistakeError(
            f"--fail-if is NAME or NAME>NUMBER with NAME one of "
            f"{', '.join(MEASURES)}; got {text!r}."
        ) from error
    return Condition(match[1], bound)
