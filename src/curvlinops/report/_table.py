"""A report on the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from curvlinops.report._contents import Layer, Matrix, Number, Pairs, Report

#: Eigenvalues that are shown, of all that the files hold.
SHOWN = 5


def rounded(number: Number | None) -> str:
    """Return a number with its error, to the digits that the error leaves.

    Examples
    --------
    >>> rounded(Number(8.13058, 0.0432)), rounded(Number(123.456)), rounded(None)
    ('8.131 ± 0.043', '123.456', '-')
    >>> rounded(Number(4.9e-24, 2e-16)), rounded(Number(1.49e-9, 2e-10))
    ('0 ± 2e-16', '1.5e-09 ± 2e-10')
    """
    if number is None:
        return "-"
    if number.error <= 1e-6 * abs(number.value):
        return f"{number.value:.6g}"
    if not abs(number.error) < float("inf"):
        return f"{number.value:.4g} ± ?"
    places = max(0, 1 - int(f"{number.error:.0e}".partition("e")[2]))
    plain = 1e-4 <= max(abs(number.value), number.error) < 1e7 and places < 8
    if plain:
        return f"{number.value:.{places}f} ± {number.error:.{places}f}"
    return f"{_as_known(number)} ± {number.error:.1g}"


def _as_known(number: Number) -> str:
    """Return a value to the last digit of its error: 0 if nothing of it is left."""
    if abs(number.value) < number.error / 20:
        return "0"
    places = f"{number.value:.0e}", f"{number.error:.0e}"
    high, low = (int(place.partition("e")[2]) for place in places)
    return f"{number.value:.{min(max(high - low, 0), 5)}e}"


def aligned(rows: Sequence[Sequence[str]], left: int = 1) -> list[str]:
    """Return rows as lines with aligned columns, the first ones to the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return lines


def head(report: Report) -> list[str]:
    """Return what the report is of."""
    problem, p = report.problem, report.provenance
    data = f"{problem.num_data} data in {problem.num_batches} batches"
    return [
        f"Problem   {problem.name}: {problem.model}, {problem.loss}, {data}",
        f"Size      P = {problem.num_params} in {len(problem.parameters)} parameters, "
        f"{p.dtype} on {p.device}",
        f"Loss      {problem.loss_value:.5g}, its gradient has norm "
        f"{problem.gradient_norm:.3g}",
    ]


def _ends(end: Pairs | None) -> str:
    if end is None:
        return "-"
    values = "  ".join(f"{value:.6g}" for value in end.values[:SHOWN])
    return f"{values}  (residuals <= {max(end.residuals):.1e})"


def matrix(m: Matrix) -> list[str]:
    """Return the lines of one matrix."""
    mass = m.negative_mass
    below = f"below {-m.negative_threshold:.1e}" if mass is not None else ""
    rows = [
        ("largest eigenvalues", _ends(m.top)),
        ("smallest eigenvalues", _ends(m.bottom)),
        ("trace", rounded(m.trace)),
        ("Frobenius norm", rounded(m.frobenius_norm)),
        (f"effective dimension at {m.damping:g}", rounded(m.effective_dimension)),
        (f"negative mass {below}".strip(), rounded(mass)),
        (f"condition number of + {m.damping:g} I", rounded(m.condition_number)),
    ]
    title = f"{m.name}: {m.class_name}, {m.size} x {m.size}"
    cost = f"{m.products} products, {m.seconds:.1f} s"
    lines = [f"{title} ({cost})"]
    lines += [f"  {line}" for line in aligned([r for r in rows if r[1] != "-"], 2)]
    if m.layers:
        lines += ["", *(f"  {line}" for line in layers(m.layers))]
    return lines


def layers(rows: Sequence[Layer]) -> list[str]:
    """Return the table of the layers."""
    total = sum(row.trace.value for row in rows)
    titles = ("layer", "size", "trace", "share", "top eigenvalue", "norm")
    table: list[Sequence[str]] = [(*titles, "effective dimension")]
    for row in rows:
        share = f"{row.trace.value / total:.1%}" if total else "-"
        numbers = (row.top_eigenvalue, row.frobenius_norm, row.effective_dimension)
        table.append(
            (row.name, str(row.size), rounded(row.trace), share, *map(rounded, numbers))
        )
    return aligned(table)


def between(report: Report) -> list[str]:
    """Return what is compared inside the report."""
    lines = [
        f"Overlap   of the leading {len(o.squares)} eigenvectors of {o.first} and "
        f"{o.second}: {o.subspace:.1%}"
        for o in report.overlaps
    ]
    if report.blocks is not None:
        number, mean = len(report.blocks.blocks), report.blocks.mean_distance
        lines.append(
            f"Blocks    mean Jensen-Shannon distance between {number} blocks' "
            f"densities: {mean:.3f}"
        )
    if report.baseline is not None:
        lines.append(
            f"Baseline  random parameters: loss {report.baseline.loss:.4g}, largest "
            f"eigenvalue of the {report.baseline.matrix} "
            f"{report.baseline.top.values[0]:.4g}"
        )
    return lines


def verdict_lines(report: Report) -> list[str]:
    """Return one line for every verdict: status, rule, number, bound, text."""
    rows = [
        (v.status, v.rule, v.subject, f"{v.number:.3g}", f"<= {v.bound:.3g}", v.text)
        for v in report.verdicts
    ]
    if not rows:
        return []
    short = aligned([row[:5] for row in rows], 3)
    return [f"{line}  {row[5]}" for line, row in zip(short, rows, strict=True)]


def render(report: Report) -> str:
    """Return the whole report as text."""
    lines = head(report)
    for m in report.matrices:
        lines += ["", *matrix(m)]
    if compared := between(report):
        lines += ["", *compared]
    if rules := verdict_lines(report):
        lines += ["", "Verdicts", *rules]
    if report.notes:
        lines += ["", "Notes", *(f"- {note}" for note in report.notes)]
    return "\n".join(lines)
