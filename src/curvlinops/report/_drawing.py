"""Figures and page of a report, where what draws them is installed."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

#: Import names of the packages that figures and page need, with their distributions.
PACKAGES = {"matplotlib": "matplotlib", "jinja2": "Jinja2"}


def draw(content: Any, folder: Path, what: str = "") -> str:
    """Write figures and page of a report, or a comparison, into its folder.

    Parameters
    ----------
    content : Report or Comparison
        What to draw.
    folder : Path
        Where to.
    what : str, optional
        ``"comparison_"`` for a comparison.

    Returns
    -------
    str
        What is missing, and how to get it; empty if nothing is.
    """
    missing = {key: name for key, name in PACKAGES.items() if not find_spec(key)}
    if "matplotlib" not in missing:
        pictures = _step("_figures", f"write_{what}figures")(content, folder)
        if not missing:
            _step("_html", f"write_{what}page")(content, folder, pictures)
    if not missing:
        return ""
    names, left_out = " ".join(missing.values()), "The page is"
    if "matplotlib" in missing:
        left_out = "Figures and page are"
    return f"{left_out} left out: `pip install {names}`."


def _step(module: str, name: str) -> Callable[..., Any]:
    """Return a function of a module that is imported only now."""
    if find_spec(f"curvlinops.report.{module}") is None:
        return lambda *arguments: None
    found = import_module(f"curvlinops.report.{module}")
    return getattr(found, name, lambda *arguments: None)
