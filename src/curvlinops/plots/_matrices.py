"""Matrices and tables of layers as images."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from curvlinops._operand import to_numpy
from curvlinops.plots._style import drawing

#: Images have at most so many pixels on a side; larger matrices show the largest entry
#: of every tile.
PIXELS = 800

#: What is drawn of a table of layers, and how it is called.
QUANTITIES = {
    "trace": "trace",
    "top_eigenvalue": "top\neigenvalue",
    "frobenius_norm": "Frobenius\nnorm",
    "effective_dimension": "effective\ndimension",
}


def _dense(A: Any) -> np.ndarray:
    """Return a matrix as an array of its own dtype."""
    A = to_numpy(A.to_dense()) if hasattr(A, "to_dense") else to_numpy(A)
    if A.ndim != 2 or not A.size:
        raise ValueError(f"A matrix with entries is needed, got shape {A.shape}.")
    return A if np.iscomplexobj(A) else A.astype(np.float64, copy=False)


def _pooled(A: np.ndarray) -> np.ndarray:
    """Return the entry of largest magnitude of every tile of a large matrix."""
    for axis in (0, 1):
        tiles = -(-A.shape[axis] // PIXELS)
        starts = np.arange(0, A.shape[axis], tiles)
        most = np.maximum.reduceat(A, starts, axis=axis)
        least = np.minimum.reduceat(A, starts, axis=axis)
        A = np.where(-least > most, least, most)
    return A


def plot_matrix(
    A: Any,
    ax: Any = None,
    *,
    blocks: Mapping[str, int] | None = None,
    log: bool = True,
    decades: float = 6.0,
    colorbar: str | bool = True,
    **style: Any,
) -> Any:
    r"""Draw a matrix as an image, by default :math:`\log_{10} |a_{ij}|`.

    Parameters
    ----------
    A : array, Tensor, or operator
        Matrix of shape ``(M, N)``; operators of this package are multiplied out, which
        costs ``N`` products.
    ax : matplotlib.axes.Axes, optional
        Where to; default: a new figure.
    blocks : mapping of str to int, optional
        Numbers of rows (and columns) of named blocks, in their order, such as
        ``{n: p.numel() for n, p in model.named_parameters()}``: lines between them, and
        names at those that have room for one.
    log : bool, optional
        Logarithm of the magnitude, in which zeros are white; or the entries themselves,
        symmetric about zero if some are negative.
    decades : float, optional
        How far below the largest magnitude the colours of the logarithm go.
    colorbar : str or bool, optional
        Whether to draw one, or its label.
    **style
        Passed on to ``ax.imshow``.

    Returns
    -------
    matplotlib.axes.Axes
        What was drawn on. Tiles of matrices with more than 800 rows or columns show
        their entry of largest magnitude.

    Raises
    ------
    ImportError
        If there are no axes to draw on, and no Matplotlib to make some.
    ValueError
        If ``A`` is no matrix, or the sizes of ``blocks`` do not sum to its.

    Examples
    --------
    >>> import numpy as np
    >>> from matplotlib.figure import Figure
    >>> ax = plot_matrix(np.diag([1.0, 1e-3]), Figure().add_subplot())
    >>> ax.images[0].get_array().tolist()  # zeros are masked
    [[0.0, None], [None, -3.0]]
    """
    A = _dense(A)
    if blocks is not None and {sum(blocks.values())} != set(A.shape):
        raise ValueError(
            f"blocks sum to {sum(blocks.values())} rows and columns, and the matrix "
            f"has shape {A.shape}."
        )
    image = _pooled(np.abs(A) if log or np.iscomplexobj(A) else A)
    largest = float(np.abs(image).max()) or 1.0
    label = r"$\log_{10}$ |entry|" if log else "entry"
    if log:
        image = np.ma.log10(image)  # zeros are masked
        top = np.log10(largest)
        style = {"vmin": top - decades, "vmax": top, "cmap": "cividis"} | style
    elif image.min() < 0:
        style = {"vmin": -largest, "vmax": largest, "cmap": "PuOr"} | style
    else:
        style = {"vmin": 0.0, "cmap": "cividis"} | style
    rows, columns = A.shape
    extent = (-0.5, columns - 0.5, rows - 0.5, -0.5)
    with drawing(ax, height=3.0) as ax:
        picture = ax.imshow(
            image, **{"extent": extent, "interpolation": "nearest"} | style
        )
        ax.spines[:].set_visible(True)
        if blocks:
            _name_blocks(ax, blocks)
        if colorbar:
            text = colorbar if isinstance(colorbar, str) else label
            ax.figure.colorbar(picture, ax=ax, label=text, shrink=0.8)
    return ax


def _name_blocks(ax: Any, blocks: Mapping[str, int]) -> None:
    """Draw lines between blocks, and write names where there is room."""
    sizes = np.array(list(blocks.values()))
    ends = np.cumsum(sizes)
    line = {"color": "white", "linewidth": 0.5}
    for end in ends[:-1] - 0.5:
        ax.axhline(end, **line)
        ax.axvline(end, **line)
    room = sizes > 0.06 * ends[-1]
    centers = (ends - sizes / 2 - 0.5)[room]
    short = shortened(list(blocks))
    names = [name for name, fits in zip(short, room, strict=True) if fits]
    ax.set_yticks(centers, names)
    ax.set_xticks(centers, names, rotation=90)
    ax.tick_params(length=0)


def shortened(names: list[str], length: int = 18) -> list[str]:
    """Return names that are at most so long, if they differ then; else all longer.

    Dollar signs are escaped: to Matplotlib, what is between two of them is a formula.

    Examples
    --------
    >>> shortened(["a.0.weight", "a.1.weight"])
    ['a.0.weight', 'a.1.weight']
    >>> shortened(["transformer.0.mlp.weight", "transformer.1.mlp.weight"])
    ['…0.mlp.weight', '…1.mlp.weight']
    """
    parts = [name.split(".") for name in names]
    alike = [len(set(part)) == 1 for part in zip(*parts, strict=False)]
    common = [*alike, False].index(False) if len(parts) > 1 else 0
    if common and max(map(len, names)) > length:
        names = ["…" + ".".join(part[common:]) for part in parts]
    longest = max(map(len, names), default=0)
    short = names
    for size in range(length, longest + 1):
        head = size // 2
        short = [
            n if len(n) <= size else f"{n[:head]}…{n[len(n) - (size - head - 1) :]}"
            for n in names
        ]
        if len(set(short)) == len(set(names)):
            break
    return [name.replace("$", r"\$") for name in short]


def compact(value: Any, error: Any = 0.0) -> str:
    """Return a number with its error in parentheses, in units of the last digit.

    Three digits are shown, or as many as the error allows, up to five.

    Examples
    --------
    >>> compact(0.01234, 0.0005), compact(123.4, 20.0), compact(3.0)
    ('1.23(5)e-2', '123(20)', '3.00')
    >>> compact(0.0), compact(0.5, 2.0), compact(1.0, 1e-15)
    ('0', '0(2)', '1.00')
    """
    if not np.isfinite(value) or (value == 0 and not error > 0):
        return f"{value:g}"
    # Errors below what is shown anyway count as none.
    is_known = np.isfinite(error) and error > 1e-5 * abs(value)
    scale = int(np.floor(np.log10(max(abs(value), error if is_known else 0.0))))
    shift = 0 if -1 <= scale <= 3 else scale
    digits = max(2 + shift - scale, 0)
    if is_known:
        last = int(np.floor(np.log10(error)))
        digits = int(np.clip(shift - last, 0, max(4 + shift - scale, 0)))
    mantissa = f"{value / 10.0**shift:.{digits}f}"
    if is_known:
        mantissa += f"({max(round(error / 10.0**shift * 10.0**digits), 1)})"
    return mantissa if shift == 0 else f"{mantissa}e{shift:+d}"


def plot_layer_summary(
    summary: Any, ax: Any = None, *, quantities: Iterable[str] | None = None
) -> Any:
    """Draw a table of layers as a heat map: numbers, coloured by their part of the top.

    Parameters
    ----------
    summary : mapping or object with ``to_dict()``
        Columns by name: ``"name"``, and for every quantity its values and, as
        ``"trace_error"`` for ``"trace"``, their standard errors. What
        :func:`~curvlinops.layer_summary` returns.
    ax : matplotlib.axes.Axes, optional
        Where to; default: a new figure that has room for all layers.
    quantities : iterable of str, optional
        Columns to draw; default: trace, top eigenvalue, Frobenius norm, effective
        dimension, as far as they are there.

    Returns
    -------
    matplotlib.axes.Axes
        What was drawn on. Colours are magnitudes relative to the column's largest. An
        error stands behind its number as digits in parentheses: ``1.23(5)e-2`` is
        0.0123 with the standard error 0.0005.

    Raises
    ------
    ImportError
        If there are no axes to draw on, and no Matplotlib to make some.
    ValueError
        If there is no row, or a quantity that is no column.

    Examples
    --------
    >>> from matplotlib.figure import Figure
    >>> table = {"name": ["0.weight", "0.bias"], "trace": [4.0, 1.0]}
    >>> ax = plot_layer_summary(table, Figure().add_subplot())
    >>> [text.get_text() for text in ax.texts]
    ['4.00', '1.00']
    >>> ax.images[0].get_array().tolist()
    [[1.0], [0.25]]
    """
    columns = summary.to_dict() if hasattr(summary, "to_dict") else summary
    names = [str(name) for name in columns["name"]]
    found = [q for q in QUANTITIES if q in columns]
    chosen = found if quantities is None else list(quantities)
    if not names or not chosen or any(q not in columns for q in chosen):
        raise ValueError(
            f"A row, and quantities among {', '.join(columns)} are needed; got "
            f"{len(names)} rows and quantities {', '.join(chosen) or 'none'}."
        )
    values = np.array([np.asarray(to_numpy(columns[q]), float) for q in chosen]).T
    missing = np.zeros(len(names))
    errors = [np.asarray(columns.get(f"{q}_error", missing), float) for q in chosen]
    sizes = np.abs(values)
    most = np.nanmax(np.where(np.isfinite(sizes), sizes, 0.0), axis=0)
    parts = sizes / np.where(most > 0, most, 1.0)
    with drawing(ax, height=0.7 + 0.17 * len(names)) as ax:
        ax.imshow(parts, cmap="cividis", vmin=0, vmax=1, aspect="auto")
        for (i, j), part in np.ndenumerate(parts):
            color = "black" if part > 0.55 else "white"
            text = compact(values[i, j], errors[j][i])
            center = {"ha": "center", "va": "center", "color": color, "fontsize": 6.5}
            ax.text(j, i, text, clip_on=True, **center)
        ax.set_yticks(range(len(names)), shortened(names))
        ax.set_xticks(range(len(chosen)), [QUANTITIES.get(q, q) for q in chosen])
        ax.xaxis.tick_top()
        ax.tick_params(length=0)
        ax.spines[:].set_visible(False)
    return ax
