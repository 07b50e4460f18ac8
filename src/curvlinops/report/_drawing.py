"""Figures and page of a report, where what draws them is installed."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

#: Modules, their functions, and the packages that they need.
STEPS = (
    ("_figures", "write_figures", {"matplotlib": "matplotlib"}),
    ("_html", "write_page", {"matplotlib": "matplotlib", "jinja2": "Jinja2"}),
)


def draw(report: Any, folder: Path) -> str:
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
    missing: dict[str, str] = {}
    for module, name, packages in STEPS:
        absent = {key: value for key, value in packages.items() if not find_spec(key)}
        if absent:
            missing |= absent
        elif find_spec(f"curvlinops.report.{module}"):
            found = import_module(f"curvlinops.report.{module}")
            step: Callable[[Any, Path], None] = getattr(found, name)
            step(report, folder)
    if not missing:
        return ""
    names = " ".join(missing.values())
    return f"Figures and page are left out: `pip install {names}`."
