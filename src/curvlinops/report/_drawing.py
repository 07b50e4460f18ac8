"""Figures and page of a report, where what draws them is installed."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from curvlinops.report._contents import Report
from curvlinops.report._figures import write_figures
from curvlinops.report._html import write_page

#: Packages behind figures and pages, by the names that they are imported under.
PACKAGES = {"matplotlib": "Matplotlib", "jinja2": "Jinja2"}


def draw(report: Report, folder: Path) -> str:
    """Write figures and page into the folder of a report.

    Parameters
    ----------
    report : Report
        What to draw.
    folder : Path
        Where to.

    Returns
    -------
    str
        What is missing, and how to get it; empty if nothing is.
    """
    missing = [name for key, name in PACKAGES.items() if not find_spec(key)]
    if "Matplotlib" not in missing:
        pictures = write_figures(report, folder)
        if not missing:
            write_page(report, folder, pictures)
            return ""
    what = "Figures and page are" if "Matplotlib" in missing else "The page is"
    return (
        f"{what} left out, for want of {' and '.join(missing)}: "
        'pip install "curvlinops-scipy[report]".'
    )
