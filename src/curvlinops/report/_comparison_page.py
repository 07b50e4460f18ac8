"""Figures and page of a comparison."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from curvlinops.plots import (
    OKABE_ITO,
    plot_eigenvalues,
    plot_matrix,
    plot_spectral_density,
)
from curvlinops.plots._matrices import shortened
from curvlinops.report._comparison import Change, Comparison, Distance, Moved, Pair
from curvlinops.report._figures import (
    Drawing,
    Picture,
    spectral,
    title_of,
    write_drawings,
)
from curvlinops.report._files import write
from curvlinops.report._html import inline, render, with_error

NAME = "comparison.html"
SIDES = ("first", "second")
COLORS = tuple(OKABE_ITO.values())[:2]
#: Layers that one figure has room for.
MOST = 20


def write_comparison(comparison: Comparison, folder: Path) -> list[Picture]:
    """Write all figures of a comparison as PNG and SVG; see :func:`write_figures`."""
    drawings = (d for p in comparison.pairs for draw in FIGURES for d in draw(p))
    return write_drawings(drawings, folder)


def _figure(height: float) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(3.4, height))


def _densities(pair: Pair) -> Iterator[Drawing]:
    found = pair.first.density, pair.second.density
    if None in found:
        return
    figure = _figure(4.2)
    whole, bulk = figure.subplots(2, 1)
    named = {s: spectral(d) for s, d in zip(SIDES, found, strict=True) if d is not None}
    plot_spectral_density(named, whole)
    plot_spectral_density(named, bulk, bulk="auto")
    bulk.get_legend().remove()
    bulk.set_xlabel("eigenvalue, where the central 98 % are")
    caption = "The same window and kernels for both. Bands are pointwise."
    if pair.distance is not None:
        caption += f" Jensen-Shannon distance {_words(pair.distance)}."
    yield (
        f"density_{pair.name}",
        f"Density of the {title_of(pair.name)}",
        caption,
        figure,
    )


def _eigenvalues(pair: Pair) -> Iterator[Drawing]:
    if not pair.eigenvalues:
        return
    figure = _figure(2.4)
    sides = (
        [(getattr(c, side).value, getattr(c, side).error) for c in pair.eigenvalues]
        for side in SIDES
    )
    named = {
        side: tuple(np.array(pairs).T) for side, pairs in zip(SIDES, sides, strict=True)
    }
    plot_eigenvalues(named, figure.subplots())
    title = f"Largest eigenvalues of the {title_of(pair.name)}"
    yield f"eigenvalues_{pair.name}", title, "Bars are residual norms.", figure


def _overlaps(pair: Pair) -> Iterator[Drawing]:
    if pair.overlap is None:
        return
    figure = _figure(3.0)
    options: dict[str, Any] = {"log": False, "vmin": 0, "vmax": 1}
    count = len(pair.overlap.squares) + 0.5
    options |= {"colorbar": "squared inner product"}
    options["extent"] = (0.5, count, count, 0.5)
    ax = plot_matrix(pair.overlap.squares, figure.subplots(), **options)
    ax.set_xlabel("eigenvector of the second")
    ax.set_ylabel("eigenvector of the first")
    caption = (
        "Squared inner products of the leading eigenvectors: in all, the subspaces "
        f"share {pair.overlap.subspace:.1%}."
    )
    title = f"Eigenvectors of the {title_of(pair.name)}"
    yield f"overlap_{pair.name}", title, caption, figure


def _layers(pair: Pair) -> Iterator[Drawing]:
    rows = pair.layers[:MOST]
    if not rows:
        return
    figure = _figure(0.8 + 0.45 * len(rows))
    axes = figure.subplots(1, 2, sharey=True)
    for ax, place, name in zip(axes, (0, 1), ("trace", "top eigenvalue"), strict=True):
        for side, shift, color in zip(SIDES, (-0.15, 0.15), COLORS, strict=True):
            numbers = [getattr(row.changes[place], side) for row in rows]
            ax.errorbar(
                [x.value for x in numbers],
                np.arange(len(rows)) + shift,
                xerr=[x.half_width() for x in numbers],
                fmt="o",
                markersize=3,
                linewidth=1,
                color=color,
                label=side,
            )
        if all(c.first.value > 0 < c.second.value for c in _places(rows, place)):
            ax.set_xscale("log")
        ax.set_xlabel(name)
    names = shortened([row.name for row in rows], 14)
    axes[0].set_yticks(range(len(rows)), names)
    axes[0].invert_yaxis()
    axes[1].legend()
    caption = "Those that moved most come first. Bars are 95 % intervals."
    title = f"Layers of the {title_of(pair.name)}"
    yield f"layers_{pair.name}", title, caption, figure


def _places(rows: Sequence[Moved], place: int) -> list[Change]:
    return [row.changes[place] for row in rows]


FIGURES = (_densities, _eigenvalues, _overlaps, _layers)


# -- the page -------------------------------------------------------------------------


def _words(distance: Distance) -> str:
    return f"{distance.value:.3f}, up to {distance.chance:.3f} by chance"


def _row(change: Change) -> list[str]:
    return [
        change.name,
        with_error(change.first),
        with_error(change.second),
        f"{change.difference:+.3g}",
        f"{change.margin:.2g}",
        "significant" if change.significant else "by chance",
    ]


def _layer_row(layer: Moved) -> list[str]:
    numbers = [x for c in layer.changes[:2] for x in (c.first, c.second)]
    return [
        layer.name,
        *map(with_error, numbers),
        "–" if layer.distance is None else _words(layer.distance),
        "moved" if layer.significant else "by chance",
    ]


def write_comparison_page(
    comparison: Comparison, folder: Path, pictures: Sequence[Picture]
) -> Path:
    """Write ``comparison.html``: tables and figures in one file.

    Parameters
    ----------
    comparison : Comparison
        What to show.
    folder : Path
        Where to.
    pictures : sequence of Picture
        What :func:`write_comparison` returned.

    Returns
    -------
    Path
        Of the page.

    Raises
    ------
    ImportError
        If Jinja2 is missing.
    """
    pairs = [
        {
            "title": title_of(pair.name),
            "rows": [_row(change) for change in pair.changes()],
            "overlap": None if pair.overlap is None else f"{pair.overlap.subspace:.1%}",
            "distance": None if pair.distance is None else _words(pair.distance),
            "layers": [_layer_row(layer) for layer in pair.layers],
        }
        for pair in comparison.pairs
    ]
    text = render(
        "comparison.html",
        comparison=comparison,
        pairs=pairs,
        pictures=list(map(inline, pictures)),
    )
    path = folder / NAME
    write(path, text.encode())
    return path
