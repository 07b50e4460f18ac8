"""How figures look: colours, sizes, legends."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

#: The palette of Okabe and Ito, in the order in which it is used here: the first three
#: are told apart best, whatever cones are missing.
OKABE_ITO = {
    "blue": "#0072B2",
    "vermilion": "#D55E00",
    "reddish purple": "#CC79A7",
    "bluish green": "#009E73",
    "orange": "#E69F00",
    "sky blue": "#56B4E9",
    "black": "#000000",
}
COLORS = list(OKABE_ITO.values())
LINES = ["-", (0, (4, 1.5)), "-.", (0, (1, 1)), (0, (6, 1, 1, 1, 1, 1))]
MARKERS = ["v", "o", "s", "D", "^"]

#: Names (``get_gid()``) of what belongs to a curve.
MARKS = ("band", "spikes", "tops")

#: Matplotlib's settings for figures that are one column of a paper wide.
STYLE: dict[str, Any] = {
    "figure.figsize": (3.4, 2.4),
    "figure.dpi": 200,
    "figure.constrained_layout.use": True,
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7,
    "legend.frameon": True,
    "legend.framealpha": 0.8,
    "legend.edgecolor": "none",
    "legend.handlelength": 2.2,
    "legend.labelspacing": 0.3,
    "lines.linewidth": 1.2,
    "lines.markersize": 3.5,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "image.cmap": "cividis",
}


@contextmanager
def drawing(ax: Any, height: float = 2.4) -> Iterator[Any]:
    """Hand on the given axes, or those of a new figure that has :data:`STYLE`."""
    if ax is not None:
        yield ax
        return
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError(
            "Figures need Matplotlib, an extra of this package: "
            'pip install "curvlinops-scipy[report]".'
        ) from error
    with plt.rc_context(STYLE):  # type: ignore[arg-type]
        yield plt.subplots(figsize=(3.4, height))[1]


def named(items: Any, label: str | None) -> dict[str | None, Any]:
    """Return what is to be drawn by its label."""
    return dict(items) if isinstance(items, Mapping) else {label: items}


def place(ax: Any, kind: str) -> int:
    """Return how many curves of a kind there are already, which choose the colour."""
    return sum(line.get_gid() == kind for line in ax.lines)


def show_legend(ax: Any, **options: Any) -> None:
    """Show the legend, curves first; what has the same label is one entry."""
    handles, labels = ax.get_legend_handles_labels()
    entries: dict[str, list[Any]] = {}
    for handle, text in sorted(
        zip(handles, labels, strict=True), key=lambda item: item[0].get_gid() in MARKS
    ):
        entries.setdefault(text, []).append(handle)
    if entries:
        from matplotlib.legend_handler import HandlerTuple

        together = {tuple: HandlerTuple(ndivide=None, pad=0.4)}
        merged = [h[0] if len(h) == 1 else tuple(h) for h in entries.values()]
        ax.legend(merged, list(entries), handler_map=together, **options)
