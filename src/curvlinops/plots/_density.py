"""Spectral densities, drawn with their bands and the eigenvalues taken out."""

from __future__ import annotations

from typing import Any

import numpy as np

from curvlinops._operand import to_numpy
from curvlinops.estimators import SpectralDensity
from curvlinops.plots._style import (
    COLORS,
    LINES,
    MARKERS,
    drawing,
    named,
    place,
    show_legend,
)

#: Kernels are at least this wide, relative to what is shown: narrower ones show every
#: eigenvalue that a run has found by itself, as a comb.
LEAST_WIDTH = 0.01


def _signed(density: SpectralDensity, x: Any) -> np.ndarray:
    """Return eigenvalues, or their magnitudes if those are what the density is of."""
    x = np.asarray(to_numpy(x), dtype=np.float64).ravel()
    return x if density.scale == "linear" else np.abs(x)


def _bulk(density: SpectralDensity, share: float = 0.98) -> tuple[float, float]:
    """Return the interval that holds the central part of the mass, and a margin."""
    nodes = _signed(density, density.nodes)
    order = np.argsort(nodes)
    mass = np.cumsum(to_numpy(density.weights).ravel()[order])
    tails = mass[-1] * np.array([(1 - share) / 2, (1 + share) / 2])
    low, high = nodes[order][np.searchsorted(mass, tails).clip(max=len(mass) - 1)]
    if density.scale == "log":
        return max(float(low), density.epsilon) / 2, 2 * float(high)
    margin = 0.2 * (high - low) or 0.05 * abs(high) or 1.0
    return float(low - margin), float(high + margin)


def _whole(density: SpectralDensity) -> tuple[float, float]:
    """Return the boundaries, those of the spikes included."""
    ends = np.append(density.boundaries, _signed(density, density.spikes))
    return float(ends.min()), float(ends.max())


def _length(density: SpectralDensity, window: tuple[float, float]) -> float:
    """Return the length of a window, in the axis of the kernels."""
    if density.scale == "log":
        return float(np.diff(np.log(np.add(window, density.epsilon)))[0])
    return window[1] - window[0]


def _width(density: SpectralDensity, window: tuple[float, float]) -> float:
    """Return the width of kernels that suits a window."""
    steps = max(to_numpy(density.nodes).shape[1] - 1, 1)
    own = 1 / steps / np.sqrt(8 * np.log(density.kappa))
    return _length(density, window) * max(own, LEAST_WIDTH)


def _seen(
    density: SpectralDensity, window: tuple[float, float], width: float
) -> SpectralDensity:
    """Return a density with grid and kernels for a window.

    The spacing of the nodes stays part of the kernels' width, so that bands keep their
    meaning. The grid is longer than the window: kernels are cut off where it ends.
    """
    length = _length(density, window)
    is_log = density.scale == "log"  # then spacing is no length of the axis
    spacing = 0.0 if is_log else float(density.spacing(window).max())
    margin = 0.05 + 4 * (width + spacing) / length
    length *= 1 + 2 * margin
    steps = max(to_numpy(density.nodes).shape[1] - 1, 1)
    kappa = np.exp(np.clip((length / steps / width) ** 2 / 8, 1e-12, 700.0))
    return density.smooth(
        boundaries=window,
        margin=float(margin),
        kappa=float(kappa),
        num_points=int(min(8 * length / width, 8192)) + 2,
    )


def _peaks(density: SpectralDensity, grid: np.ndarray) -> np.ndarray:
    """Return the spikes as kernels of the density's width, per unit of its axis."""
    axis, centers = grid, _signed(density, density.spikes)
    if density.scale == "log":
        axis, centers = np.log(grid), np.log(centers + density.epsilon)
    distances = (axis - centers[:, None]) / density.width
    height = 1 / density.dim / density.width / np.sqrt(2 * np.pi)
    return height * np.exp(-(distances**2) / 2).sum(0)


def plot_spectral_density(
    density: Any,
    ax: Any = None,
    *,
    label: str | None = None,
    bulk: tuple[float, float] | str | None = None,
    width: float | None = None,
    level: float | None = 0.95,
    log: bool | None = None,
) -> Any:
    r"""Draw spectral densities, their confidence bands, and eigenvalues taken out.

    .. math::
        \int \text{line} + \int \text{dashed peaks} = 1

    Eigenvalues that were computed one by one (``deflate``) are drawn dashed, through
    the kernels through which all others are seen: the area of their peaks is their
    true share, ``1 / N`` each, marked at the top. The vertical axis ends at a tenth of
    the height of one eigenvalue.

    Parameters
    ----------
    density : SpectralDensity, pair of arrays, or mapping
        Density to draw, or ``(grid, density)``; or several by their labels, which share
        window and width, such as those of a Hessian and a GGN.
    ax : matplotlib.axes.Axes, optional
        Where to; default: a new figure.
    label : str, optional
        For the legend, of one density.
    bulk : tuple of float or str, optional
        Part of the spectrum to show, ``(low, high)`` in the unit of the matrix;
        ``"auto"``: where the central 98 % of the eigenvalues are. Default: all.
    width : float, optional
        Standard deviation of the kernels where nodes are resolved, in the unit of the
        matrix (of the logarithm's if the density is logarithmic). Default: that of the
        density's ``kappa`` and of the window, the largest of several densities, but at
        least a hundredth of the window. The spacing of the nodes is always added.
    level : float, optional
        Probability of the band. ``None``: no band.
    log : bool, optional
        Whether the vertical axis is logarithmic, so that one eigenvalue of many is
        seen. Default: unless the density is. On a linear axis, places of the spikes are
        marked at the bottom, without peaks.

    Returns
    -------
    matplotlib.axes.Axes
        What was drawn on. A logarithmic density is drawn per decade,
        :math:`\log(10) \, \lambda \phi(\lambda)`, whose area over
        :math:`\log_{10} \lambda` is the share of the eigenvalues.

    Raises
    ------
    ImportError
        If there are no axes to draw on, and no Matplotlib to make some.
    ValueError
        If ``bulk`` is neither ``"auto"`` nor a pair in ascending order, or logarithmic
        and other densities are drawn at once.

    Examples
    --------
    >>> import numpy as np
    >>> from scipy.integrate import trapezoid
    >>> from curvlinops import lanczos_approximate_spectrum
    >>> A = np.diag(np.r_[np.linspace(-1.0, 1.0, 498), 5.0, 8.0])
    >>> density = lanczos_approximate_spectrum(A, 20, deflate=2, rng=0)
    >>> from matplotlib.figure import Figure
    >>> ax = plot_spectral_density(density, Figure().add_subplot())
    >>> line, peaks, _ = ax.lines
    >>> bool(np.isclose(trapezoid(*line.get_data()[::-1]), 498 / 500, rtol=1e-3))
    True
    >>> bool(np.isclose(trapezoid(*peaks.get_data()[::-1]), 2 / 500, rtol=1e-3))
    True
    """
    shown = named(density, label)
    known = {k: d for k, d in shown.items() if isinstance(d, SpectralDensity)}
    window = _window(list(known.values()), bulk)
    scale = next((d.scale for d in known.values()), "linear")
    width = width or max((_width(d, window) for d in known.values()), default=1.0)
    with drawing(ax) as ax:
        log = scale != "log" if log is None else log
        for name, item in shown.items():
            index = place(ax, "density")
            style: dict[str, Any] = {"color": COLORS[index % len(COLORS)]}
            style["linestyle"] = LINES[index % len(LINES)]
            if name in known:
                view = _seen(item, window, width)
                _draw(ax, view, name, level, log, style)
            else:
                x, y = map(to_numpy, item)
                ax.plot(x, y, label=name, gid="density", **style)
        _frame(ax, scale, window if bulk is not None else None, log)
        show_legend(ax)
    return ax


def _window(
    densities: list[SpectralDensity], bulk: tuple[float, float] | str | None
) -> tuple[float, float]:
    """Return the part of the spectrum that is shown of all densities."""
    if len({density.scale for density in densities}) > 1:
        raise ValueError(
            "Densities in one picture have one scale; got "
            f"{', '.join(sorted({d.scale for d in densities}))}. Draw them on two axes."
        )
    if bulk is not None and not isinstance(bulk, str):
        low, high = (float(end) for end in bulk)
        least = {"linear": -np.inf, "abs": 0.0, "log": 1e-300}
        low = max([low, *(least[density.scale] for density in densities)])
        if low < high:
            return low, high
    elif bulk in (None, "auto") and densities:
        ends = [_bulk(d) if bulk == "auto" else _whole(d) for d in densities]
        low = min(low for low, _ in ends)
        low = low if densities[0].scale == "linear" else max(low, 0.0)
        return low, max(high for _, high in ends)
    elif not densities and bulk is None:
        return -np.inf, np.inf
    raise ValueError(
        f"bulk is 'auto' or a pair (low, high), low < high; got {bulk!r}"
        f"{'' if densities else ' (and no density that knows its nodes)'}."
    )


def _draw(
    ax: Any,
    view: SpectralDensity,
    name: str | None,
    level: float | None,
    log: bool,
    style: dict[str, Any],
) -> None:
    """Draw one density, its band and its spikes."""
    x, density = view.numpy()
    # Logarithmic densities are drawn per decade, whose peaks have equal heights.
    unit = np.log(10) * x if view.scale == "log" else 1.0
    ax.plot(x, unit * density, label=name, gid="density", **style)
    color = style["color"]
    if level is not None:
        ends = (unit * to_numpy(end) for end in view.band(level))
        look = {"color": color, "alpha": 0.25, "linewidth": 0, "gid": "band"}
        ax.fill_between(x, *ends, label=f"{100 * level:g} % band", **look)
    spikes = _signed(view, view.spikes)
    spikes = spikes[(spikes >= x[0]) & (spikes <= x[-1])]
    if len(spikes):
        peaks = _peaks(view, x) * (np.log(10) if view.scale == "log" else 1.0)
        tops = np.zeros_like(spikes)
        if log:
            ax.plot(x, peaks, ":", color=color, linewidth=0.7, gid="spikes")
            tops = np.interp(spikes, x, peaks)
        marker = MARKERS[(place(ax, "density") - 1) % len(MARKERS)]
        look = {"color": color, "marker": marker, "mfc": "none", "mew": 0.8}
        text = f"one eigenvalue, 1/{view.dim}"
        ax.plot(spikes, tops, linestyle="", label=text, gid="tops", **look)
    if log:
        height = 1 / view.dim / view.width / np.sqrt(2 * np.pi)
        height *= np.log(10) if view.scale == "log" else 1.0
        _reach(ax, height / 10, 3 * max(line.get_ydata().max() for line in ax.lines))


def _reach(ax: Any, low: float, high: float) -> None:
    """Make the vertical axis logarithmic, with at least these ends."""
    if ax.get_yscale() == "log" and place(ax, "density") > 1:
        low, high = min(low, ax.get_ylim()[0]), max(high, ax.get_ylim()[1])
    ax.set_yscale("log")
    ax.set_ylim(low, high)


def _frame(ax: Any, scale: str, window: Any, log: bool) -> None:
    """Name the axes, and show the window."""
    ax.set_xlabel("eigenvalue" if scale == "linear" else "magnitude of the eigenvalue")
    ax.set_ylabel("density per decade" if scale == "log" else "density")
    if log:
        ax.set_yscale("log")
    if scale == "log":
        ax.set_xscale("log")
        if not log:  # room for the legend
            ax.set_ylim(top=1.45 * max(line.get_ydata().max() for line in ax.lines))
    if window is not None:
        ax.set_xlim(*window)
