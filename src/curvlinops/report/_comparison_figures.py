"""Figures of a comparison, drawn from what it contains."""

from __future__ import annotations

from collections.abc import Iterator
from math import hypot
from pathlib import Path
from typing import Any

import numpy as np

from curvlinops.plots import OKABE_ITO, plot_eigenvalues
from curvlinops.plots._matrices import shortened
from curvlinops.report._comparison import Change, Comparison, Moved, Pair
from curvlinops.report._pictures import (
    Drawing,
    Picture,
    draw_overlap,
    draw_pair,
    new_figure,
    shared_part,
    title_of,
    write_pictures,
)

#: What the reports are called in figures; their paths stand on the page.
NAMES = ("first", "second")

#: Layers that one figure has room for: those that moved most.
ROWS = 40


def write_comparison_figures(comparison: Comparison, folder: Path) -> list[Picture]:
    """Write all figures that a comparison has data for, as PNG and SVG.

    Parameters
    ----------
    comparison : Comparison
        What to draw.
    folder : Path
        Gets a folder ``figures``.

    Returns
    -------
    list of Picture
        In the order in which they are to be read.
    """
    drawings = (d for pair in comparison.pairs for draw in FIGURES for d in draw(pair))
    return write_pictures(drawings, folder)


def _densities(pair: Pair) -> Iterator[Drawing]:
    a, b = pair.first.density, pair.second.density
    if a is None or b is None:
        return
    figure = draw_pair(dict(zip(NAMES, (a, b), strict=True)))
    caption = "The same window and kernels for both, with their bands."
    if pair.distance is not None:
        caption += (
            f" Jensen-Shannon distance of the logarithmic densities "
            f"{pair.distance.value:.3f}, up to {pair.distance.chance:.3f} by chance."
        )
    title = f"Spectral densities of the {title_of(pair.name)}"
    yield f"density_{pair.name}", title, caption, figure


def _eigenvalues(pair: Pair) -> Iterator[Drawing]:
    if not pair.eigenvalues:
        return
    figure = new_figure(2.5)
    ax = figure.subplots()
    for name in NAMES:
        found = [getattr(change, name) for change in pair.eigenvalues]
        values, errors = (
            np.array([getattr(n, x) for n in found]) for x in ("value", "error")
        )
        plot_eigenvalues((values, errors), ax, label=name)
    moved = sum(change.significant for change in pair.eigenvalues)
    caption = (
        f"Largest eigenvalues, bars are residuals: {moved} of {len(pair.eigenvalues)} "
        "differ by more than these."
    )
    title = f"Leading eigenvalues of the {title_of(pair.name)}"
    yield f"eigenvalues_{pair.name}", title, caption, figure


def _overlap(pair: Pair) -> Iterator[Drawing]:
    if pair.overlap is None:
        return
    title = title_of(pair.name)
    figure = draw_overlap(pair.overlap, *(f"{name} {title}" for name in NAMES))
    caption = shared_part(pair.overlap, pair.first.size)
    yield f"overlap_{pair.name}", f"Eigenvectors of the {title}", caption, figure


def _ratio(change: Change) -> tuple[float, float]:
    """Return a ratio's binary logarithm, and half its interval; NaN if signs differ."""
    a, b = change.first, change.second
    if not a.value * b.value > 0:
        return np.nan, np.nan
    parts = (x.half_width() / abs(x.value) for x in (a, b))
    return float(np.log2(b.value / a.value)), hypot(*parts) / np.log(2)


def _layers(pair: Pair) -> Iterator[Drawing]:
    shown = pair.layers[:ROWS]
    if not shown:
        return
    figure = new_figure(0.9 + 0.2 * len(shown))
    apart = any(layer.distance is not None for layer in shown)
    widths = (1.6, 1) if apart else (1,)
    options = {"sharey": True, "squeeze": False, "width_ratios": widths}
    left, *right = figure.subplots(1, len(widths), **options)[0]
    places = np.arange(len(shown))[::-1]
    for kind, (shift, name, marker) in enumerate(
        zip((0.14, -0.14), ("blue", "vermilion"), ("v", "o"), strict=True)
    ):
        _ratios(
            left,
            [layer.changes[kind] for layer in shown],
            places + shift,
            (name, marker),
        )
    left.axvline(0, color="0.5", linewidth=0.6, zorder=0)
    left.set_yticks(places, shortened([layer.name for layer in shown]))
    left.set_ylim(-0.6, len(shown) - 0.4)
    left.set_xlabel(r"$\log_2$ (second / first)")
    if apart:
        _distances(right[0], shown, places)
    figure.legend(loc="outside upper center", ncols=2)
    count = sum(layer.significant for layer in pair.layers)
    caption = (
        f"{count} of {len(pair.layers)} layers moved by more than chance explains; "
        "those that moved most come first. Bars are 95 % intervals, full marks are "
        "significant."
    )
    if apart:
        caption += " Distances are Jensen-Shannon's, up to the black tick by chance."
    title = f"Layers of the {title_of(pair.name)}"
    yield f"layers_{pair.name}", title, caption, figure


def _ratios(ax: Any, changes: list[Change], places: Any, look: tuple[str, str]) -> None:
    color, marker = OKABE_ITO[look[0]], look[1]
    for change, place in zip(changes, places, strict=True):
        ratio, margin = _ratio(change)
        fill = color if change.significant else "white"
        bars = {"color": color, "fmt": marker, "mfc": fill, "elinewidth": 0.8}
        ax.errorbar([ratio], [place], xerr=[margin], gid=change.name, **bars)
    ax.plot([], [], marker, color=color, label=changes[0].name)


def _distances(ax: Any, layers: tuple[Moved, ...], places: Any) -> None:
    largest = 0.0
    for layer, place in zip(layers, places, strict=True):
        if layer.distance is None:
            continue
        largest = max(largest, layer.distance.value, layer.distance.chance)
        color = OKABE_ITO["blue"] if layer.distance.significant else "0.75"
        ax.barh(place, layer.distance.value, height=0.5, color=color)
        ends = (place - 0.35, place + 0.35)
        ax.vlines(layer.distance.chance, *ends, color="black", linewidth=0.8)
    ax.set_xlim(0, 1.1 * largest or 1)
    ax.set_xlabel("distance")
    ax.tick_params(axis="y", length=0)


#: Every kind of figure of one matrix, in the order of the page.
FIGURES = (_densities, _eigenvalues, _layers, _overlap)
