"""Turn the figures of ``products.py`` and ``growth.py`` into tables for README.rst.

Run ``python benchmarks/tables.py RESULT.json ... [--write README.rst]``. Prints the
tables, or replaces what stands between the comments ``.. begin tables`` and
``.. end tables`` of a file. Figures are never typed by hand.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterable, Iterator
from itertools import accumulate
from pathlib import Path
from statistics import median
from typing import Any

Key = tuple[str, str, str]
Row = dict[str, Any]

#: Least gain over version 3.0.1, and most gradients, of a repeated product.
TARGETS: dict[tuple[str, str], tuple[float, float]] = {
    ("mlp", "ggn"): (2.1, 1.25),
    ("mlp", "hessian"): (2.0, 1.65),
    ("mlp", "ef"): (2.1, float("inf")),
    ("cnn", "ggn"): (1.55, 1.4),
    ("cnn", "hessian"): (1.7, 2.2),
    ("cnn", "ef"): (1.45, float("inf")),
    ("gpt", "ggn"): (1.65, 1.4),
    ("gpt", "hessian"): (1.8, 2.05),
    ("gpt", "ef"): (1.55, float("inf")),
    ("tiny", "ggn"): (15.0, float("inf")),
    ("tiny", "hessian"): (13.0, float("inf")),
    ("tiny", "ef"): (10.0, float("inf")),
    ("tiny8", "ggn"): (100.0, float("inf")),
    ("tiny8", "hessian"): (80.0, float("inf")),
    ("tiny8", "ef"): (70.0, float("inf")),
}
#: Least gain of solves, from building the operator on or settled, and of blocks.
SOLVES: dict[tuple[str, str], float] = {
    ("mlp", "cg_50_cold"): 2.0,
    ("mlp", "eigsh_10_cold"): 1.5,
    ("mlp", "block_16"): 1.15,
    ("tiny", "cg_50_cold"): 10.0,
    ("tiny", "cg_50"): 20.0,
    ("tiny", "eigsh_10_cold"): 10.0,
    ("tiny", "eigsh_10"): 20.0,
    ("tiny", "block_16"): 5.0,
}
UNIT = "3.0.1"


def table(head: list[str], rows: Iterable[list[str]]) -> Iterator[str]:
    """Yield the lines of a list table."""
    yield ".. list-table::"
    yield "   :header-rows: 1"
    yield ""
    for row in [head, *rows]:
        for i, cell in enumerate(row):
            yield f"   {'* -' if i == 0 else '  -'} {cell}".rstrip()
    yield ""


def duration(seconds: float) -> str:
    """Return milliseconds with three digits."""
    return f"{1e3 * seconds:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


def typical(row: Row | None, key: str = "time") -> float | None:
    """Return the median of a row's measurements."""
    return median(row[key]) if row and row.get(key) else None


def indexed(rows: list[Row]) -> dict[Key, dict[str, Row]]:
    """Return rows by problem, matrix and task, then contender."""
    found: dict[Key, dict[str, Row]] = {}
    for row in rows:
        key = row["problem"], row["matrix"], row["task"]
        found.setdefault(key, {})[row["contender"]] = row
    return found


def repeated(found: dict[Key, dict[str, Row]], device: str) -> Iterator[str]:
    """Yield the table of repeated products against their targets."""
    head = "problem, matrix, ours, gradients, at most, gain over 3.0.1, at least, met"
    targets = TARGETS if device == "cpu" else {}
    rows = []
    for (problem, matrix, task), by in found.items():
        ours = typical(by.get("ours"))
        if task != "time_product" or ours is None:
            continue
        unit = typical(found.get((problem, matrix, "time_gradient"), {}).get("ours"))
        other = typical(by.get(UNIT))
        gain, gradients = targets.get((problem, matrix), (1.0, float("inf")))
        met = (not other or other / ours >= gain) and (
            not unit or ours / unit <= gradients
        )
        rows.append(
            [
                problem,
                matrix,
                duration(ours),
                f"{ours / unit:.2f}" if unit else "",
                f"{gradients:g}" if gradients < 1e9 else "",
                f"{other / ours:.2f}" if other else "",
                f"{gain:g}",
                "yes" if met else "**no**",
            ]
        )
    yield from table(head.split(", "), rows)


def solves(found: dict[Key, dict[str, Row]]) -> Iterator[str]:
    """Yield the table of solves and blocks against their targets."""
    rows = []
    for (problem, matrix, task), by in found.items():
        name = task.removeprefix("time_")
        ours, other = typical(by.get("ours")), typical(by.get(UNIT))
        least = SOLVES.get((problem, name))
        if least is None or ours is None or other is None:
            continue
        met = "yes" if other / ours >= least else "**no**"
        gain = f"{other / ours:.3g}"
        rows.append([problem, matrix, name, duration(ours), gain, f"{least:g}", met])
    head = ["problem", "matrix", "task", "ours", "gain over 3.0.1", "at least", "met"]
    yield from table(head, rows)


def speed(found: dict[Key, dict[str, Row]]) -> Iterator[str]:
    """Yield the table of all tasks and contenders, as multiples of ours."""
    names = list(dict.fromkeys(name for by in found.values() for name in by))
    others = [name for name in names if name not in ("ours",)]
    rows = []
    for (problem, matrix, task), by in found.items():
        ours = typical(by.get("ours"))
        if ours is None or task == "time_gradient":
            continue
        cells = [problem, matrix, task.removeprefix("time_"), duration(ours)]
        for name in others:
            other = typical(by.get(name))
            slower = other is not None and other < ours
            text = "" if other is None else f"{other / ours:.2f}"
            if by.get(name, {}).get("right") is False:
                text += f" (off by {by[name]['error']:.1e})"
            cells.append(f"**{text}**" if slower else text)
        rows.append(cells)
    yield from table(["problem", "matrix", "task", "ours", *others], rows)


def repaid(found: dict[Key, dict[str, Row]]) -> Iterator[str]:
    """Yield from which product on building and recording are repaid."""
    rows = []
    for (problem, matrix, task), by in found.items():
        if task != "time_products_20" or UNIT not in by or "laps" not in by["ours"]:
            continue
        sums = {}
        for name in ("ours", UNIT):
            laps = [median(steps) for steps in zip(*by[name]["laps"], strict=True)]
            sums[name] = list(accumulate(laps))[1:]  # building, and n products
        if not sums["ours"] or not sums[UNIT]:
            continue
        ahead = [a <= b for a, b in zip(sums["ours"], sums[UNIT], strict=True)]
        behind = [n for n, is_ahead in enumerate(ahead, start=1) if not is_ahead]
        since = 1 + max(behind, default=0)
        ratios = [f"{sums[UNIT][n - 1] / sums['ours'][n - 1]:.2f}" for n in (1, 3, 8)]
        rows.append(
            [problem, matrix, *ratios, str(since) if since <= len(ahead) else "later"]
        )
    head = ["problem", "matrix", "first", "first 3", "first 8", "ahead from product"]
    yield from table(head, rows)


def memory(found: dict[Key, dict[str, Row]]) -> Iterator[str]:
    """Yield the table of peak memory."""
    chosen = {k: v for k, v in found.items() if k[2] == "peakmem_products"}
    names = list(dict.fromkeys(name for by in chosen.values() for name in by))
    rows = []
    for (problem, matrix, _), by in chosen.items():
        unit = found.get((problem, matrix, "peakmem_gradient"), {}).get("ours", {})
        cells = [unit.get("bytes"), *(by.get(n, {}).get("bytes") for n in names)]
        shown = ["" if c is None else f"{c / 2**20:.1f}" for c in cells]
        rows.append([problem, matrix, *shown])
    yield from table(["problem", "matrix", "gradient", *names], rows)


def growth(report: dict[str, Any]) -> Iterator[str]:
    """Yield time and memory along every axis."""
    points: dict[tuple[str, int, int], dict[str, Row]] = {}
    for row in report["results"]:
        key = row["axis"], row["value"], row["dim"]
        points.setdefault(key, {})[row["contender"]] = row
    names = list(dict.fromkeys(name for by in points.values() for name in by))
    rows = []
    for (axis, value, dim), by in points.items():
        cells = [f"{axis} = {value}", str(dim)]
        for name in names:
            spent, held = typical(by.get(name)), by.get(name, {}).get("bytes")
            text = "" if spent is None else duration(spent)
            cells.append(text + (f", {held / 2**20:.0f} MiB" if held else ""))
        rows.append(cells)
    yield f"Growth ({report['matrix']}): CPU time per product, peak memory."
    yield ""
    yield from table(["axis", "parameters", *names], rows)


def about(report: dict[str, Any]) -> Iterator[str]:
    """Yield machine, versions, and command of a run."""
    computer = report["machine"]
    load = ", ".join(f"{x:.1f}" for x in computer["load"])
    yield (
        f"{report['date']}; {computer['cpu']}, {computer['cores']} cores, "
        f"{computer['system']}; one thread; load {load} at the start. Command::"
    )
    yield ""
    # Folders of the machine that ran it are nobody else's.
    command = re.sub(r"(?<=[= ])/[^ =]*/bin/python", "PYTHON", report["command"])
    yield f"    {re.sub(r'/[^ =]*/(?=[^ /]+( |$))', '', command)}"
    yield ""
    rows = [
        [name, ", ".join(f"{k} {v}" for k, v in (versions or {}).items())]
        for name, versions in report.get("versions", {}).items()
    ]
    if rows:
        yield from table(["contender", "versions"], rows)


def pages(reports: list[dict[str, Any]]) -> Iterator[str]:
    """Yield all tables."""
    products = [r for r in reports if "problems" in r]
    for report in reports:
        yield from about(report)
    if products:
        found = indexed([row for r in products for row in r["results"]])
        yield "Repeated products, against version 3.0.1 and in gradients:"
        yield ""
        device = products[0]["machine"].get("device", "cpu")
        yield from repeated(found, device)
        if device == "cpu":
            yield "Solves and blocks, the first including their set-up if ``_cold``:"
            yield ""
            yield from solves(found)
        yield "Time as a multiple of ours; below one (bold) we are slower:"
        yield ""
        yield from speed(found)
        yield (
            "Building an operator and its first products: time of 3.0.1 as a "
            "multiple of ours, and the product from which on we are ahead for good:"
        )
        yield ""
        yield from repaid(found)
        if any(task == "peakmem_products" for _, _, task in found):
            yield "Peak memory in MiB, beyond model, data and the libraries' code:"
            yield ""
            yield from memory(found)
    for report in reports:
        if "matrix" in report:
            yield from growth(report)


def main() -> None:
    """Print or write the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", nargs="+", type=Path)
    parser.add_argument("--write", type=Path, metavar="FILE")
    options = parser.parse_args()
    text = "\n".join(pages([json.loads(p.read_text()) for p in options.results]))
    if options.write is None:
        print(text)
        return
    begin, end = ".. begin tables\n", ".. end tables\n"
    before, _, rest = options.write.read_text().partition(begin)
    _, _, after = rest.partition(end)
    options.write.write_text(f"{before}{begin}\n{text}\n{end}{after}")


if __name__ == "__main__":
    main()
