"""A comparison on the terminal, and as JSON."""

from __future__ import annotations

from typing import Any

from curvlinops.report._comparison import Change, Comparison, Distance, Moved, Pair
from curvlinops.report._files import encode
from curvlinops.report._table import aligned, rounded

FORMAT, VERSION = "curvlinops comparison", 1
NAME = "comparison.json"


def _row(change: Change) -> tuple[str, ...]:
    return (
        change.name,
        rounded(change.first),
        rounded(change.second),
        f"{change.difference:+.3g}",
        f"{change.margin:.2g}",
        "yes" if change.significant else "no",
    )


def _distance(found: Distance | None) -> str:
    if found is None:
        return "-"
    return f"{found.value:.3f} ({found.chance:.3f})"


def pair_lines(pair: Pair, first: str, second: str) -> list[str]:
    """Return the lines of one matrix."""
    heads = ("", first, second, "difference", "by chance", "significant")
    rows: list[tuple[str, ...]] = [heads, *map(_row, pair.changes())]
    lines = [f"{pair.name}, {pair.first.size} x {pair.first.size}"]
    lines += [f"  {line}" for line in aligned(rows)]
    if pair.overlap is not None:
        k, share = len(pair.overlap.squares), pair.overlap.subspace
        lines.append(
            f"  The leading {k} eigenvectors span subspaces that share {share:.1%}."
        )
    if pair.distance is not None:
        verdict = "significant" if pair.distance.significant else "by chance"
        lines.append(
            f"  Jensen-Shannon distance of the densities {pair.distance.value:.3f}, up "
            f"to {pair.distance.chance:.3f} by chance: {verdict}."
        )
    if pair.layers:
        lines += ["", *(f"  {line}" for line in layer_lines(pair, first, second))]
    return lines


def layer_lines(pair: Pair, first: str, second: str) -> list[str]:
    """Return which layers moved, those that moved most first."""
    heads = ("layer", f"trace {first}", second, f"top {first}", second)
    rows: list[tuple[str, ...]] = [(*heads, "JS distance (by chance)", "moved")]
    for layer in pair.layers:
        trace, top = layer.changes[:2]
        rows.append(
            (
                layer.name,
                *(rounded(x) for x in (trace.first, trace.second)),
                *(rounded(x) for x in (top.first, top.second)),
                _distance(layer.distance),
                "yes" if layer.significant else "no",
            )
        )
    return aligned(rows)


def render(comparison: Comparison) -> str:
    """Return the whole comparison as text."""
    loss = comparison.loss
    lines = [
        f"First     {comparison.first}, loss {loss.first.value:.6g}",
        f"Second    {comparison.second}, loss {loss.second.value:.6g}",
    ]
    for pair in comparison.pairs:
        lines += ["", *pair_lines(pair, "first", "second")]
    if comparison.notes:
        lines += ["", "Notes", *(f"- {note}" for note in comparison.notes)]
    return "\n".join(lines)


def as_json(comparison: Comparison) -> dict[str, Any]:
    """Return the comparison without arrays, as JSON."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "first": comparison.first,
        "second": comparison.second,
        "loss": _change(comparison.loss),
        "matrices": {pair.name: _pair(pair) for pair in comparison.pairs},
        "notes": list(comparison.notes),
    }


def _pair(pair: Pair) -> dict[str, Any]:
    found = pair.overlap
    overlap = None if found is None else found.subspace
    return {
        "changes": {change.name: _change(change) for change in pair.changes()},
        "subspace_overlap": overlap,
        "distance": _plain(pair.distance),
        "layers": [_moved(layer) for layer in pair.layers],
    }


def _moved(layer: Moved) -> dict[str, Any]:
    return {
        "name": layer.name,
        "significant": layer.significant,
        "changes": {change.name: _change(change) for change in layer.changes},
        "distance": _plain(layer.distance),
    }


def _change(change: Change) -> dict[str, Any]:
    plain: dict[str, Any] = encode(change, {})
    del plain["name"]
    more = {
        "difference": change.difference,
        "margin": change.margin,
        "significant": change.significant,
    }
    return {**plain, **encode(more, {})}


def _plain(distance: Distance | None) -> dict[str, Any] | None:
    if distance is None:
        return None
    return {**encode(distance, {}), "significant": distance.significant}
