"""Which pages there are, in the order in which to read them, and how long they take."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple


class Seconds(NamedTuple):
    """Processor time of the last measured run of a page, imports included.

    Pages compute in one thread: on an idle machine it is the time that passes.
    """

    full: float
    quick: float


#: Measured by ``python -m curvlinops.examples --measure`` on a machine with other work.
PAGES = {
    "matrix_vector_products": Seconds(12, 6.8),
    "eigenvalues": Seconds(6, 7.1),
    "submatrices": Seconds(11, 5.1),
    "monte_carlo_fisher": Seconds(11, 6.7),
    "traces": Seconds(24, 6.2),
    "edge_of_stability": Seconds(15, 9.3),
    "preconditioned_spectrum": Seconds(8, 6.2),
    "preconditioned_cg": Seconds(8, 6.7),
    "natural_gradient": Seconds(12, 9.6),
    "pinn": Seconds(14, 5.9),
    "laplace": Seconds(6, 5.7),
    "influence": Seconds(9, 4.3),
    "hypergradients": Seconds(16, 6.7),
    "quantisation": Seconds(4, 5.0),
    "model_merging": Seconds(12, 6.8),
    "dict_batches": Seconds(34, 9.9),
    "language_model": Seconds(13, 8.6),
}


def line(name: str) -> str:
    """Return the first line of a page's docstring, without importing it."""
    source = Path(__file__).with_name(f"{name}.py").read_text(encoding="utf-8")
    docstring = ast.get_docstring(ast.parse(source)) or ""
    return docstring.split("\n")[0]


def listing() -> str:
    """Return the table of all pages."""
    width = max(map(len, PAGES))
    rows = [
        f"{name:<{width}}  {seconds.full:5.0f} s  {seconds.quick:5.1f} s  {line(name)}"
        for name, seconds in PAGES.items()
    ]
    return "\n".join(
        [
            "python -m curvlinops.examples.NAME [--quick] [--output DIR] [--seed N]",
            "",
            f"{'NAME':<{width}}    full   --quick  (seconds when last measured)",
            *rows,
            "",
            f"{'functorch':<{width}}  no page, but what others compare with: "
            f"{line('functorch')}",
        ]
    )


def measure(name: str, *options: str) -> float:
    """Return the processor seconds that a page takes in a process of its own."""
    module = f"curvlinops.examples.{name}"
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", module, "--output", folder, *options]
        before = os.times()
        subprocess.run(command, check=True, capture_output=True)
        after = os.times()
    user = after.children_user - before.children_user
    return user + after.children_system - before.children_system
