"""Eigenvalues, histories of solvers, and training runs as curves."""

from __future__ import annotations

from typing import Any

import numpy as np

from curvlinops._operand import to_numpy
from curvlinops.estimators import Eigenpairs, Estimate, Track
from curvlinops.plots._style import (
    COLORS,
    LINES,
    MARKERS,
    OKABE_ITO,
    drawing,
    named,
    place,
    show_legend,
)


def _values_and_errors(item: Any) -> tuple[np.ndarray, np.ndarray | None]:
    """Return eigenvalues, and how far off they may be if that is known."""
    if isinstance(item, Eigenpairs):
        values, errors = item.values, item.residual_norms
    elif isinstance(item, Estimate):
        values, errors = item.value, item.error
    elif isinstance(item, tuple):
        values, errors = item
    else:
        values, errors = item, None
    known = None if errors is None else np.ravel(to_numpy(errors))
    return np.ravel(to_numpy(values)), known


def plot_eigenvalues(values: Any, ax: Any = None, *, label: str | None = None) -> Any:
    """Draw eigenvalues by rank, positive ones filled and negative ones hollow.

    Parameters
    ----------
    values : Eigenpairs, Estimate, array, Tensor, pair, or mapping
        Eigenvalues; a tuple ``(values, errors)``; or several of these by label. Bars
        are residual norms of eigenpairs, or standard errors.
    ax : matplotlib.axes.Axes, optional
        Where to; default: a new figure.
    label : str, optional
        For the legend.

    Returns
    -------
    matplotlib.axes.Axes
        What was drawn on: magnitudes on a logarithmic axis, ranked from either end of
        the spectrum, without zeros.

    Raises
    ------
    ImportError
        If there are no axes to draw on, and no Matplotlib to make some.

    Examples
    --------
    >>> import numpy as np
    >>> from matplotlib.figure import Figure
    >>> ax = plot_eigenvalues(np.array([1.0, 5.0, -2.0]), Figure().add_subplot())
    >>> ax.lines[0].get_ydata().tolist()
    [5.0, 1.0]
    """
    with drawing(ax) as ax:
        for name, item in named(values, label).items():
            index = len({line.get_color() for line in ax.lines if line.get_gid()})
            color, marker = (all_[index % len(all_)] for all_ in (COLORS, MARKERS))
            found, errors = _values_and_errors(item)
            look = {"color": color, "marker": marker, "linewidth": 0.5, "mew": 0.8}
            for sign, word in ((1, ""), (-1, "negative")):
                order = np.argsort(-sign * found)
                order = order[sign * found[order] > 0]
                if not len(order):
                    continue
                ranks, sizes = np.arange(1, len(order) + 1), np.abs(found[order])
                text = ", ".join(filter(None, (name, word))) or None
                fill = {"mfc": "white" if word else color, "gid": word or "eigenvalues"}
                ax.plot(ranks, sizes, label=text, zorder=3, **look, **fill)
                if errors is not None:
                    bars = {"fmt": "none", "color": color, "elinewidth": 0.8}
                    ax.errorbar(ranks, sizes, yerr=errors[order], **bars)
        ax.set_yscale("log")
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.set_xlabel("rank, from its end of the spectrum")
        ax.set_ylabel("magnitude of the eigenvalue")
        show_legend(ax)
    return ax


def plot_convergence(
    histories: Any,
    ax: Any = None,
    *,
    tol: float | None = None,
    label: str | None = None,
    xlabel: str = "products with the matrix",
    ylabel: str = "relative residual",
) -> Any:
    """Draw residuals, or errors, of iterative methods by the products they cost.

    Parameters
    ----------
    histories : array, Tensor, pair, or mapping
        One number for each product, from the first on; ``(products, numbers)``, a
        tuple, where they have a distance; or several of these by label.
    ax : matplotlib.axes.Axes, optional
        Where to; default: a new figure.
    tol : float, optional
        What is wanted: a dashed line.
    label : str, optional
        For the legend.
    xlabel, ylabel : str, optional
        Of the axes.

    Returns
    -------
    matplotlib.axes.Axes
        What was drawn on; the vertical axis is logarithmic, and ends at a dot.

    Raises
    ------
    ImportError
        If there are no axes to draw on, and no Matplotlib to make some.
    ValueError
        If products and numbers are not equally many.

    Examples
    --------
    >>> from matplotlib.figure import Figure
    >>> ax = plot_convergence({"CG": [1.0, 0.1, 0.01]}, Figure().add_subplot())
    >>> ax.lines[0].get_xdata().tolist()
    [1, 2, 3]
    """
    with drawing(ax) as ax:
        for name, item in named(histories, label).items():
            index = place(ax, "history")
            x, y = item if isinstance(item, tuple) else (None, item)
            y = np.ravel(to_numpy(y))
            x = np.arange(1, len(y) + 1) if x is None else np.ravel(to_numpy(x))
            if len(x) != len(y):
                raise ValueError(f"{name}: {len(x)} products, and {len(y)} numbers.")
            color, line = COLORS[index % len(COLORS)], LINES[index % len(LINES)]
            ax.plot(x, y, color=color, linestyle=line, label=name, gid="history")
            ax.plot(x[-1:], y[-1:], "o", color=color, gid="end")
        if tol is not None:
            ax.axhline(tol, color="0.4", linestyle="--", linewidth=0.8)
            here = {"xycoords": ("axes fraction", "data"), "fontsize": "small"}
            ax.annotate("tolerance", (1, tol), ha="right", va="bottom", **here)
        ax.set_yscale("log", nonpositive="mask")
        ax.set_xlabel(xlabel)
        ax.set_ylabel(ylabel)
        show_legend(ax)
    return ax


#: How columns of a track are called.
NAMES = {"eigenvalue_0": "sharpness", "squared_fro": "squared Frobenius norm"}


def plot_tracking(
    track: Any,
    ax: Any = None,
    *,
    columns: Any = None,
    lr: Any = None,
    loss: Any = None,
    xlabel: str = "step",
) -> Any:
    r"""Draw the sharpness through training, with :math:`2 / \eta` beside the loss.

    Gradient descent with the learning rate :math:`\eta` is stable on a quadratic
    function whose largest eigenvalue is below :math:`2 / \eta`.

    Parameters
    ----------
    track : Track or mapping
        Columns of numbers, one for each step, by name; ``"step"`` is the horizontal
        axis if there is one.
    ax : matplotlib.axes.Axes, optional
        Where to; default: a new figure.
    columns : str or iterable of str, optional
        Which to draw; default: the largest eigenvalue, if there is one, else all but
        errors. Errors (``"trace_error"``, ``"residual_0"``) are drawn as bands.
    lr : float or array, optional
        Learning rate :math:`\eta`, one number or one for each step: a dashed line at
        :math:`2 / \eta`.
    loss : array, Tensor, or pair, optional
        One number for each row, or ``(steps, losses)``, a tuple, drawn on an axis of
        its own on the right, ``ax.figure.axes[-1]``.
    xlabel : str, optional
        Of the horizontal axis.

    Returns
    -------
    matplotlib.axes.Axes
        What was drawn on, the left axis.

    Raises
    ------
    ImportError
        If there are no axes to draw on, and no Matplotlib to make some.
    ValueError
        If a column is unknown.

    References
    ----------
    Cohen, Kaur, Li, Kolter, Talwalkar, "Gradient descent on neural networks typically
    occurs at the edge of stability", ICLR 2021, arXiv:2103.00065.

    Examples
    --------
    >>> from matplotlib.figure import Figure
    >>> table = {"step": [0, 10], "eigenvalue_0": [5.0, 19.0]}
    >>> ax = plot_tracking(table, Figure().add_subplot(), lr=0.1, loss=[2.0, 0.5])
    >>> [line.get_label() for line in ax.lines]
    ['sharpness', '2 / learning rate']
    >>> float(ax.lines[1].get_ydata()[0])
    20.0
    """
    known = track.columns if isinstance(track, Track) else track
    known = {name: np.ravel(to_numpy(column)) for name, column in known.items()}
    errors = {name: f"{name}_error" for name in known}
    errors |= {f"eigenvalue_{i}": f"residual_{i}" for i in range(len(known))}
    plain = [name for name in known if name not in {"step", *errors.values()}]
    default = [n for n in plain if n == "eigenvalue_0"] or plain
    chosen = default if columns is None else np.atleast_1d(columns).tolist()
    if unknown := [name for name in chosen if name not in known]:
        raise ValueError(f"{unknown[0]!r} is no column; there are {', '.join(known)}.")
    steps = known.get("step", np.arange(len(known[chosen[0]])))
    with drawing(ax) as ax:
        for name in chosen:
            index = place(ax, "track")
            color, line = COLORS[index % len(COLORS)], LINES[index % len(LINES)]
            look: dict[str, Any] = {"color": color, "linestyle": line, "gid": "track"}
            y = known[name]
            ax.plot(steps, y, label=NAMES.get(name, name.replace("_", " ")), **look)
            if errors.get(name) in known:
                error = known[errors[name]]
                band = {"color": color, "alpha": 0.25, "linewidth": 0, "gid": "band"}
                ax.fill_between(steps, y - error, y + error, **band)
        if lr is not None:
            bound = np.broadcast_to(2 / to_numpy(lr), steps.shape)
            look = {"color": "black", "linestyle": "--", "linewidth": 0.9}
            ax.plot(steps, bound, label="2 / learning rate", gid="bound", **look)
        ax.set_xlabel(xlabel)
        ax.set_ylabel(NAMES.get(chosen[0], chosen[0].replace("_", " ")))
        if loss is not None:
            _beside(ax, *(loss if isinstance(loss, tuple) else (steps, loss)))
        # Above the axes, where neither the curves nor the loss can be.
        above = {"loc": "lower center", "bbox_to_anchor": (0.5, 1.0), "ncols": 2}
        show_legend(ax, **above)
    return ax


def _beside(ax: Any, steps: Any, loss: Any) -> None:
    """Draw the loss on an axis of its own, under the curves."""
    color = OKABE_ITO["bluish green"]
    right = ax.twinx()
    right.set_zorder(ax.get_zorder() - 1)
    ax.patch.set_visible(False)
    x, y = np.ravel(to_numpy(steps)), np.ravel(to_numpy(loss))
    right.plot(x, y, color=color, linewidth=0.8, gid="loss")
    if y.min() > 0 and y.max() > 20 * y.min():
        right.set_yscale("log")
    right.set_ylabel("loss", color=color)
    right.tick_params(axis="y", colors=color, which="both")
    right.spines["right"].set(visible=True, color=color)
