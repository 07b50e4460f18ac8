"""Figures of a report, drawn from what it contains: no operator is multiplied."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from curvlinops.plots import (
    OKABE_ITO,
    plot_eigenvalues,
    plot_layer_summary,
    plot_matrix,
    plot_spectral_density,
)
from curvlinops.plots._matrices import shortened
from curvlinops.report._contents import Density, Layer, Matrix, Report
from curvlinops.report._pictures import (
    Drawing,
    Picture,
    draw_overlap,
    draw_pair,
    new_figure,
    shared_part,
    spectral,
    title_of,
    write_pictures,
)

#: Matrices that one axes holds.
MOST = 5

#: Layers that one figure has room for.
ROWS = 60


def write_figures(report: Report, folder: Path) -> list[Picture]:
    """Write all figures that a report has data for, as PNG and SVG.

    Parameters
    ----------
    report : Report
        What to draw.
    folder : Path
        Gets a folder ``figures``. Equal reports give equal files.

    Returns
    -------
    list of Picture
        In the order in which they are to be read.

    Raises
    ------
    ImportError
        If there is no Matplotlib.
    """
    return write_pictures((d for draw in FIGURES for d in draw(report)), folder)


def _known(report: Report) -> dict[str, tuple[Matrix, Density]]:
    """Return matrices with a density by their titles."""
    found = ((m, m.density) for m in report.matrices)
    return {title_of(m.name): (m, d) for m, d in found if d is not None}


def _runs(density: Density) -> str:
    """Say what a density was made of."""
    runs, steps = density.nodes.shape
    text = f"{runs} Lanczos run{'s' * (runs > 1)} of {steps} steps"
    if len(density.spikes):
        text += (
            f", and {len(density.spikes)} eigenvalues that were computed one by one "
            "(marked; dashed peaks of their true mass)"
        )
    return text


# -- one kind of figure each -----------------------------------------------------------


def _densities(report: Report) -> Iterator[Drawing]:
    for title, (m, density) in _known(report).items():
        figure = new_figure(4.2)
        whole, bulk = figure.subplots(2, 1)
        known = spectral(density)
        plot_spectral_density(known, whole, label=title)
        plot_spectral_density(known, bulk, label=title, bulk="auto")
        bulk.get_legend().remove()
        bulk.set_xlabel("eigenvalue, where the central 98 % are")
        caption = (
            "All of the spectrum (top), and the bulk through narrower kernels (below), "
            f"from {_runs(density)}. The band is pointwise; the vertical axis ends at "
            f"a tenth of one of {density.dim} eigenvalues."
        )
        yield f"density_{m.name}", f"Spectral density of the {title}", caption, figure


def _comparison(report: Report) -> Iterator[Drawing]:
    known = dict(list(_known(report).items())[:MOST])
    if len(known) < 2:
        return
    figure = new_figure(4.2)
    whole, bulk = figure.subplots(2, 1)
    named = {title: spectral(density) for title, (_, density) in known.items()}
    plot_spectral_density(named, whole)
    plot_spectral_density(named, bulk, bulk="auto")
    bulk.get_legend().remove()
    bulk.set_xlabel("eigenvalue, where the central 98 % are")
    caption = (
        "The same window and kernels for all. What the Hessian has and the GGN has not "
        "is curvature of the model in its parameters, weighted by the loss's gradient."
    )
    yield "comparison", " against ".join(known), caption, figure


def _logarithmic(report: Report) -> Iterator[Drawing]:
    known = dict(list(_known(report).items())[:MOST])
    if not known:
        return
    figure = new_figure(2.5)
    named = {title: spectral(density, "log") for title, (_, density) in known.items()}
    plot_spectral_density(named, figure.subplots())
    epsilon = max(density.epsilon for _, density in known.values())
    caption = (
        "Density of the magnitudes' logarithm: areas are shares of the eigenvalues. "
        f"Magnitudes below {epsilon:.1e} count as that."
    )
    yield "log_density", "Magnitudes of the eigenvalues", caption, figure


def _eigenvalues(report: Report) -> Iterator[Drawing]:
    shown = [(m, m.top) for m in report.matrices[:MOST] if m.top is not None]
    if not shown:
        return
    figure = new_figure(2.5)
    ax = figure.subplots()
    for m, top in shown:
        values, errors = np.array(top.values), np.array(top.residuals)
        if m.bottom is not None:
            low = np.array(m.bottom.values) < 0
            values = np.append(values, np.array(m.bottom.values)[low])
            errors = np.append(errors, np.array(m.bottom.residuals)[low])
        sure = errors < 0.5 * np.abs(values)  # rounding around zero has no magnitude
        plot_eigenvalues((values[sure], errors[sure]), ax, label=title_of(m.name))
    caption = (
        "Largest eigenvalues, and smallest if they are negative (hollow), counted from "
        "their end; bars are residuals."
    )
    rate = report.problem.learning_rate
    if rate is not None:
        ax.axhline(2 / rate, color="black", linestyle="--", linewidth=0.8)
        where = {"xycoords": ("axes fraction", "data"), "fontsize": 7}
        ax.annotate(
            "2 / learning rate", (1, 2 / rate), ha="right", va="bottom", **where
        )
        caption += f" Gradient descent needs them below 2 / {rate:g} = {2 / rate:.4g}."
    yield "eigenvalues", "Leading eigenvalues", caption, figure


def _overlaps(report: Report) -> Iterator[Drawing]:
    for overlap in report.overlaps:
        first, second = title_of(overlap.first), title_of(overlap.second)
        figure = draw_overlap(overlap, first, second)
        size = next(m.size for m in report.matrices if m.name == overlap.first)
        name = f"overlap_{overlap.first}_{overlap.second}"
        title = f"Eigenvectors of {first} and {second}"
        yield name, title, shared_part(overlap, size), figure


def layer_columns(layers: tuple[Layer, ...]) -> dict[str, list[Any]]:
    """Return a table of layers as columns, as figures take them."""
    columns: dict[str, list[Any]] = {"name": [layer.name for layer in layers]}
    columns["size"] = [layer.size for layer in layers]
    for name in ("trace", "top_eigenvalue", "frobenius_norm", "effective_dimension"):
        numbers = [getattr(layer, name) for layer in layers]
        columns[name] = [number.value for number in numbers]
        columns[f"{name}_error"] = [number.error for number in numbers]
    return columns


def _layers(report: Report) -> Iterator[Drawing]:
    for m in report.matrices:
        if not m.layers:
            continue
        largest = sorted(m.layers, key=lambda layer: -abs(layer.trace.value))[:ROWS]
        shown = tuple(layer for layer in m.layers if layer in largest)
        figure = new_figure(0.7 + 0.17 * len(shown))
        plot_layer_summary(layer_columns(shown), figure.subplots())
        caption = (
            "Diagonal block of every parameter; brighter is nearer to the column's "
            "largest. Standard errors stand in parentheses, in units of the last digit."
        )
        if len(shown) < len(m.layers):
            caption += f" The {ROWS} of {len(m.layers)} with the largest traces."
        yield f"layers_{m.name}", f"Layers of the {title_of(m.name)}", caption, figure


def _blocks(report: Report) -> Iterator[Drawing]:
    found = report.blocks
    if found is None:
        return
    count = len(found.blocks)
    figure = new_figure(0.8 + 0.36 * count)
    ax = figure.subplots()
    curves = [
        [
            np.log(10) * b.curve.grid * y
            for y in (b.curve.density, b.curve.low, b.curve.high)
        ]
        for b in found.blocks
    ]
    highest = max(float(density.max()) for density, _, _ in curves)
    for row, (block, (density, low, high)) in enumerate(
        zip(found.blocks, curves, strict=True)
    ):
        base = count - 1 - row
        color = OKABE_ITO["blue"]
        x, unit = block.curve.grid, 0.9 / highest
        ax.axhline(base, color="0.7", linewidth=0.4, zorder=0)
        ax.fill_between(
            x, base + unit * low, base + unit * high, color=color, alpha=0.25, lw=0
        )
        ax.plot(x, base + unit * density, color=color, linewidth=0.9)
    ax.axvline(1, color="black", linestyle=":", linewidth=0.7)
    ax.set_xscale("log")
    names = shortened([block.name for block in found.blocks])
    ax.set_yticks(range(count - 1, -1, -1), names)
    ax.tick_params(axis="y", length=0)
    ax.spines["left"].set_visible(False)
    ax.set_ylim(-0.1, count + 0.05)
    ax.set_xlabel("magnitude / 10th largest of the block")
    title = title_of(found.matrix)
    caption = (
        f"Densities per decade of diagonal blocks of the {title}, each in units of its "
        "10th largest eigenvalue (or of the last that is not zero), one scale for all. "
    )
    if np.isfinite(found.mean_distance):
        caption += (
            f"Mean Jensen-Shannon distance between blocks: {found.mean_distance:.3f} "
            "(0 for equal spectra, 1 for disjoint ones)."
        )
    yield "blocks", f"Blocks of the {title}", caption, figure
    if count > 1:
        yield _distances(found, names, title)


def _distances(found: Any, names: list[str], title: str) -> Drawing:
    figure = new_figure(3.0)
    ax = figure.subplots()
    options: dict[str, Any] = {"log": False, "vmin": 0.0, "vmax": 1.0}
    plot_matrix(found.distances, ax, colorbar="Jensen-Shannon distance", **options)
    ax.set_xticks(range(len(names)), names, rotation=90)
    ax.set_yticks(range(len(names)), names)
    ax.tick_params(length=0)
    caption = (
        "Square roots of divergences to the base 2, between the blocks' densities as "
        f"drawn. Their mean over pairs is {found.mean_distance:.3f}."
    )
    return "block_distances", f"How blocks of the {title} differ", caption, figure


def _dense(report: Report) -> Iterator[Drawing]:
    sizes = report.problem.parameters
    for m in report.matrices:
        if m.dense is None:
            continue
        blocks = sizes if sum(sizes.values()) == len(m.dense) else None
        figure = new_figure(3.0)
        plot_matrix(m.dense, figure.subplots(), blocks=blocks)
        caption = (
            "Logarithm of the entries' magnitude, over six decades; zeros are white. "
            "Lines part the parameters."
        )
        yield f"matrix_{m.name}", f"The {title_of(m.name)} itself", caption, figure


def _baseline(report: Report) -> Iterator[Drawing]:
    start = report.baseline
    m = report.matrix(start.matrix) if start is not None else None
    if start is None or m is None or m.density is None:
        return
    figure = draw_pair({"as it is": m.density, "random initialisation": start.density})
    title = title_of(m.name)
    caption = (
        f"The loss is {report.problem.loss_value:.4g} as it is, and {start.loss:.4g} "
        "with random parameters"
    )
    if m.top is not None:
        caption += (
            f"; the largest eigenvalue {m.top.values[0]:.4g}, and "
            f"{start.top.values[0]:.4g}"
        )
    name = f"The {title} at random parameters"
    yield "baseline", name, f"{caption}. Both through the same kernels.", figure


#: Every kind of figure, in the order of the page.
FIGURES: list[Callable[[Report], Iterator[Drawing]]] = [
    _densities,
    _comparison,
    _logarithmic,
    _eigenvalues,
    _layers,
    _overlaps,
    _blocks,
    _baseline,
    _dense,
]
