"""Time and memory against the number of batches, of parameters, and of columns.

Run ``python benchmarks/growth.py --other 3.0.1=PYTHON --output DIR`` (the other
package is optional). Contenders take turns as in ``products.py``; products are
repeated ones, process CPU time, one thread, medians; memory is the peak of building an
operator and multiplying with it, in a fresh process. Writes ``growth.json`` and
``growth.png``.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

from problems import MATRICES
from products import SHORTEST, Contender, Worker, machine, memory, others_of
from tqdm import tqdm

#: Along every axis: problems, and the columns that are multiplied.
AXES: dict[str, list[tuple[int, str, int]]] = {
    "batches": [(n, f"mlp:batches={n},width=128", 1) for n in (1, 2, 4, 8, 16)],
    "width": [(n, f"mlp:batches=1,width={n}", 1) for n in (16, 64, 256, 1024)],
    "columns": [(n, "mlp:batches=1,width=128", n) for n in (1, 2, 4, 8, 16, 32, 64)],
}
QUICK = 3


def measure(
    contenders: list[Contender], name: str, matrix: str, columns: int, repeats: int
) -> list[dict[str, Any]]:
    """Time a product with some columns, all contenders in turns."""
    command = {"task": "time_product"}
    if columns > 1:
        command = {"task": "block", "arguments": [columns]}
    with ExitStack() as stack:
        workers = [stack.enter_context(Worker(n, p, **o)) for n, p, o in contenders]
        rows = []
        for worker in workers:
            dim = worker.ask(setup=[name, matrix])["dim"]
            first = worker.ask(**command, number=1)
            rows.append({"contender": worker.name, "dim": dim, "time": []})
            rows[-1]["number"] = max(1, int(SHORTEST / max(first["time"], 1e-6)))
        for turn in range(repeats):
            start = turn % len(workers)
            pairs = list(zip(workers, rows, strict=True))
            for worker, row in pairs[start:] + pairs[:start]:
                row["time"].append(worker.ask(**command, number=row["number"])["time"])
    return rows


def save_picture(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw milliseconds and mebibytes against every axis."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, grid = plt.subplots(2, len(AXES), figsize=(5 * len(AXES), 8))
    for j, axis in enumerate(AXES):
        chosen = [r for r in rows if r["axis"] == axis]
        for contender in dict.fromkeys(r["contender"] for r in chosen):
            points = [r for r in chosen if r["contender"] == contender]
            x = [r["dim"] if axis == "width" else r["value"] for r in points]
            times = [1e3 * median(r["time"]) for r in points]
            grid[0, j].plot(x, times, "o-", label=contender)
            held = [(at, r["bytes"]) for at, r in zip(x, points, strict=True)]
            held = [(at, nbytes / 2**20) for at, nbytes in held if nbytes]
            if held:
                grid[1, j].plot(*zip(*held, strict=True), "o-", label=contender)
        label = "parameters" if axis == "width" else axis
        for i, what in enumerate(("CPU time per product (ms)", "peak memory (MiB)")):
            grid[i, j].set_xscale("log", base=2)
            grid[i, j].set_yscale("log")
            grid[i, j].set_xlabel(label)
            grid[i, j].set_ylabel(what)
            grid[i, j].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Measure all axes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--axes", nargs="+", default=list(AXES), choices=list(AXES))
    parser.add_argument("--matrix", default="ggn", choices=list(MATRICES))
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="two turns, few points")
    parser.add_argument("--other", action="append", default=[], metavar="NAME=PYTHON")
    parser.add_argument("--output", type=Path, default=Path("."), metavar="DIR")
    options = parser.parse_args()
    contenders: list[Contender] = [
        ("ours", sys.executable, {}),
        ("cache off", sys.executable, {"cache": "off"}),
        *others_of(options.other),
    ]
    options.output.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    points = [
        (axis, *point)
        for axis in options.axes
        for point in AXES[axis][: QUICK if options.quick else None]
    ]
    for axis, value, name, columns in tqdm(points, desc="growth"):
        repeats = 2 if options.quick else options.repeats
        timed = measure(contenders, name, options.matrix, columns, repeats)
        held = {
            row["contender"]: row["bytes"]
            for row in memory(contenders, name, options.matrix, columns)
            if row["task"] != "peakmem_gradient"
        }
        for row in timed:
            nbytes = held.get(row["contender"])
            rows.append({"axis": axis, "value": value, **row, "bytes": nbytes})
        report = {
            "command": shlex.join(["python", *sys.argv]),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": machine(),
            "matrix": options.matrix,
            "results": rows,
        }
        path = options.output / "growth.json"
        path.write_text(json.dumps(report, indent=1) + "\n")
    save_picture(rows, options.output / "growth.png")


if __name__ == "__main__":
    main()
