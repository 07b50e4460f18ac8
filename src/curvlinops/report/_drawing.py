"""Figures and page of a report, where what draws them is installed."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from curvlinops._memory import raise_if_out_of_memory
from curvlinops.report._comparison import Comparison
from curvlinops.report._comparison_figures import write_comparison_figures
from curvlinops.report._contents import Report
from curvlinops.report._figures import write_figures
from curvlinops.report._html import write_comparison_page, write_page
from curvlinops.report._mistakes import one_line

#: Packages behind figures and pages, by the names that they are imported under.
PACKAGES = {"matplotlib": "Matplotlib", "jinja2": "Jinja2"}


class Drawn(NamedTuple):
    """What has not been drawn.

    Attributes
    ----------
    text : str
        Why not, and what helps; empty if everything was.
    failed : bool
        Whether that is an error, not for want of a package.
    """

    text: str = ""
    failed: bool = False


def draw(content: Report | Comparison, folder: Path) -> Drawn:
    """Write figures and page of a report, or of a comparison, into its folder.

    Parameters
    ----------
    content : Report or Comparison
        What to draw.
    folder : Path
        Where to.

    Returns
    -------
    Drawn
        Numbers that took long to compute are not lost for a figure: an error is
        handed back instead of raised.
    """
    missing = [name for key, name in PACKAGES.items() if not find_spec(key)]
    if "Matplotlib" not in missing:
        try:
            _draw(content, folder, page=not missing)
        except Exception as error:
            raise_if_out_of_memory(error)
            return Drawn(f"Figures and page are incomplete: {one_line(error)}.", True)
        if not missing:
            return Drawn()
    what = "Figures and page are" if "Matplotlib" in missing else "The page is"
    return Drawn(
        f"{what} left out, for want of {' and '.join(missing)}: "
        'pip install "curvlinops-scipy[report]".'
    )


def _draw(content: Report | Comparison, folder: Path, page: bool) -> None:
    if isinstance(content, Report):
        pictures = write_figures(content, folder)
        if page:
            write_page(content, folder, pictures)
    else:
        pictures = write_comparison_figures(content, folder)
        if page:
            write_comparison_page(content, folder, pictures)
