"""What figures of reports and of comparisons share: names, files, densities."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from curvlinops.estimators import SpectralDensity
from curvlinops.plots import STYLE, plot_matrix, plot_spectral_density
from curvlinops.report._contents import Density, Overlap

#: Of one figure: made under :data:`~curvlinops.plots.STYLE`, as large as it says.
Drawing = tuple[str, str, str, Any]

#: How the matrices are called in figures and tables.
TITLES = {
    "hessian": "Hessian",
    "ggn": "GGN",
    "fisher": "Monte-Carlo Fisher",
    "ef": "empirical Fisher",
    "kfac": "KFAC",
    "ekfac": "EKFAC",
    "kfoc": "KFOC",
    "ggn-diagonal": "diagonal of the GGN",
}


def title_of(name: str) -> str:
    """Return how a matrix is called."""
    return TITLES.get(name, name)


class Picture(NamedTuple):
    """A figure that has been written.

    Attributes
    ----------
    name : str
        Of its files, without suffix.
    title, caption : str
        In words.
    paths : tuple of Path
        PNG and SVG.
    """

    name: str
    title: str
    caption: str
    paths: tuple[Path, ...]


def write_pictures(drawings: Iterator[Drawing], folder: Path) -> list[Picture]:
    """Write figures as PNG and SVG; they are drawn under the style of this package.

    Parameters
    ----------
    drawings : iterator of Drawing
        Draws a figure whenever it is asked for one.
    folder : Path
        Gets a folder ``figures``. Equal figures give equal files.

    Returns
    -------
    list of Picture
        In the order in which they are to be read.

    Raises
    ------
    ImportError
        If there is no Matplotlib.
    """
    import matplotlib

    place = folder / "figures"
    place.mkdir(exist_ok=True)
    same = {"svg.hashsalt": "curvlinops", "path.simplify_threshold": 0.2}
    pictures = []
    with matplotlib.rc_context(STYLE | same):  # type: ignore[arg-type]
        for name, title, caption, figure in drawings:
            plain = re.sub(r"[^\w-]+", "_", name)
            paths = tuple(place / f"{plain}.{kind}" for kind in ("png", "svg"))
            figure.savefig(paths[0], metadata={"Software": None})
            figure.savefig(paths[1], metadata={"Date": None})
            pictures.append(Picture(plain, title, caption, paths))
    return pictures


def new_figure(height: float) -> Any:
    """Return a figure one column wide, and so many inches high."""
    from matplotlib.figure import Figure

    return Figure(figsize=(3.4, height))


def spectral(density: Density, scale: str = "linear") -> SpectralDensity:
    """Return a density that can be seen through other kernels.

    Parameters
    ----------
    density : Density
        Of a report.
    scale : str, optional
        ``"linear"`` or ``"log"``.
    """
    nodes = density.nodes
    low, high = float(nodes.min()), float(nodes.max())
    kappa = 3.0
    if scale == "log":
        low, high = float(np.abs(nodes).min()), float(np.abs(nodes).max())
        low, kappa = min(low, high / 2), 1.04
    if not low < high:  # one eigenvalue, many times
        room = 0.1 * abs(high) or density.epsilon
        low, high = max(low - room, 0.0) if scale == "log" else low - room, high + room
    return SpectralDensity(
        nodes,
        density.weights,
        (low, high),
        density.dim,
        density.spikes,
        scale,
        kappa=kappa,
        epsilon=density.epsilon,
    )


def draw_pair(pair: dict[str, Density]) -> Any:
    """Return a figure of densities by their labels, linear and logarithmic."""
    figure = new_figure(4.2)
    whole, log = figure.subplots(2, 1)
    plot_spectral_density({k: spectral(d) for k, d in pair.items()}, whole)
    plot_spectral_density({k: spectral(d, "log") for k, d in pair.items()}, log)
    log.get_legend().remove()
    return figure


def draw_overlap(overlap: Overlap, first: str, second: str) -> Any:
    """Return a figure of squared inner products of eigenvectors."""
    count, across = overlap.squares.shape
    figure = new_figure(2.9)
    extent = (0.5, across + 0.5, count + 0.5, 0.5)
    options: dict[str, Any] = {"log": False, "vmin": 0, "vmax": 1, "extent": extent}
    label = "squared inner product"
    ax = plot_matrix(overlap.squares, figure.subplots(), colorbar=label, **options)
    for axis in (ax.xaxis, ax.yaxis):
        axis.get_major_locator().set_params(integer=True)
    ax.set_xlabel(f"eigenvector of the {second}")
    ax.set_ylabel(f"eigenvector of the {first}")
    return figure


def shared_part(overlap: Overlap, size: int) -> str:
    """Say how much of their dimensions two subspaces share."""
    count = len(overlap.squares)
    return (
        "Leading eigenvectors, the first at the top left. The subspaces share "
        f"{overlap.subspace:.1%} of their dimensions; two random ones would share "
        f"{count / size:.2%}."
    )
