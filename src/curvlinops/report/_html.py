"""A report as one page: no file beside it, nothing fetched, no script."""

from __future__ import annotations

import math
from base64 import b64encode
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from curvlinops.report._comparison import Change, Comparison, Pair
from curvlinops.report._comparison_figures import write_comparison_figures
from curvlinops.report._contents import STATUSES, Matrix, Number, Pairs, Report
from curvlinops.report._figures import write_figures
from curvlinops.report._files import write
from curvlinops.report._pictures import Picture, title_of
from curvlinops.report._table import rounded

NAME, COMPARISON = "report.html", "comparison.html"
TEMPLATES = Path(__file__).parent / "templates"

#: Vector graphics with more bytes are replaced by their PNG.
LARGEST = 2**19

#: Eigenvalues in a cell of the table.
EIGENVALUES = 10


def short(number: float) -> str:
    """Return a number in four digits.

    Examples
    --------
    >>> short(0.0123456), short(3), short(1e-12), short(float("nan"))
    ('0.01235', '3', '1e-12', 'unknown')
    """
    return "unknown" if math.isnan(number) else f"{number:.4g}"


def with_error(number: Number | None) -> str:
    """Return a number with as many digits as its error allows.

    Examples
    --------
    >>> with_error(Number(12.3456, 0.0213)), with_error(Number(1234.5, 80.0))
    ('12.346 ± 0.021', '1234 ± 80')
    >>> with_error(Number(0.5)), with_error(Number(2.0, float("nan"), converged=False))
    ('0.5', '2 ± unknown (not converged)')
    """
    if number is None:
        return "–"
    value, error = number.value, number.error
    known = math.isfinite(value) and math.isfinite(error)
    text = rounded(number) if known else short(value)
    if not known and error != 0:
        text += " ± unknown"
    return text if number.converged else f"{text} (not converged)"


def _eigenvalues(pairs: Pairs | None) -> Any:
    if pairs is None:
        return "–"
    found = zip(pairs.values, pairs.residuals, strict=True)
    return [(f"{x:.6g}", f"{r:.0e}") for x, r in list(found)[:EIGENVALUES]]


#: Rows of the table of matrices: what they are called, and what their cells say.
ROWS = {
    "class": lambda m: m.class_name,
    "size": lambda m: str(m.size),
    "largest eigenvalues": lambda m: _eigenvalues(m.top),
    "smallest eigenvalues": lambda m: _eigenvalues(m.bottom),
    "trace": lambda m: with_error(m.trace),
    "Frobenius norm": lambda m: with_error(m.frobenius_norm),
    "damping": lambda m: short(m.damping),
    "effective dimension": lambda m: with_error(m.effective_dimension),
    "negative mass": lambda m: with_error(m.negative_mass),
    "condition number": lambda m: with_error(m.condition_number),
    "asymmetry (noise)": lambda m: _symmetry(m),
    "rows of zeros": lambda m: "–" if m.dead is None else str(m.dead.count),
    "products": lambda m: str(m.products),
    "seconds": lambda m: f"{m.seconds:.1f}",
}


def _symmetry(m: Matrix) -> str:
    if m.symmetry is None:
        return "–"
    return f"{m.symmetry.error:.1e} ({m.symmetry.noise:.1e})"


def layer_table(m: Matrix) -> dict[str, Any]:
    """Return the table of a matrix's layers, as texts."""
    whole = sum(layer.trace.value for layer in m.layers)
    rows = []
    for layer in m.layers:
        numbers = (
            layer.trace,
            layer.top_eigenvalue,
            layer.frobenius_norm,
            layer.effective_dimension,
        )
        share = layer.trace.value / whole if whole else math.nan
        part = "–" if math.isnan(share) else f"{share:.1%}"
        rows.append([layer.name, str(layer.size), *map(with_error, numbers), part])
    head = ["parameter", "size", "trace", "top eigenvalue", "Frobenius norm"]
    return {"head": [*head, "effective dimension", "share"], "rows": rows}


def provenance(report: Report) -> list[tuple[str, str]]:
    """Return where a report comes from, in words."""
    found, counts = report.provenance, asdict(report.counts)
    words = ", ".join(f"{k.replace('_', ' ')} {v}" for k, v in counts.items())
    return [
        ("command", found.command),
        ("started", found.started),
        ("versions", ", ".join(f"{k} {v}" for k, v in found.versions.items())),
        ("machine", found.machine),
        ("device, dtype", f"{found.device}, {found.dtype}"),
        ("seed", str(found.seed)),
        ("counts", words),
        ("products", str(found.products)),
        ("seconds", f"{found.seconds:.1f}"),
        ("SHA-256 of parameters", found.parameters_sha256),
        ("SHA-256 of data", found.data_sha256),
    ]


def inline(picture: Picture) -> dict[str, Any]:
    """Return a figure with its image in it, as templates take it."""
    png, svg = picture.paths
    path, kind = (svg, "svg+xml") if svg.stat().st_size <= LARGEST else (png, "png")
    # Width and height stand at fixed places of a PNG; space is kept before it is shown.
    head = png.read_bytes()[16:24]
    width, height = (int.from_bytes(head[i : i + 4]) for i in (0, 4))
    source = f"data:image/{kind};base64,{b64encode(path.read_bytes()).decode()}"
    plain = {"name": picture.name, "title": picture.title, "caption": picture.caption}
    return plain | {"source": source, "width": width // 2, "height": height // 2}


def render(template: str, **values: Any) -> str:
    """Fill a template in; all texts are escaped.

    Raises
    ------
    ImportError
        If there is no Jinja2.
    """
    try:
        import jinja2
    except ImportError as error:
        raise ImportError(
            "Pages need Jinja2, an extra of this package: "
            'pip install "curvlinops-scipy[report]".'
        ) from error
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"short": short, "title_of": title_of}
    return environment.get_template(template).render(values)


def write_page(
    report: Report, folder: Path, pictures: Sequence[Picture] | None = None
) -> Path:
    """Write ``report.html``: tables, verdicts, figures and provenance in one file.

    Parameters
    ----------
    report : Report
        What to show.
    folder : Path
        Where to.
    pictures : sequence of Picture, optional
        What :func:`write_figures` returned; default: it is called.

    Returns
    -------
    Path
        Of the page.

    Raises
    ------
    ImportError
        If Jinja2 or Matplotlib is missing.
    """
    drawn = write_figures(report, folder) if pictures is None else pictures
    problem, matrices = report.problem, report.matrices
    found = {verdict.status for verdict in report.verdicts}
    data = f"{problem.num_data} data in {problem.num_batches} batches"
    if not problem.num_data:
        data = f"{problem.num_batches} batches"
    text = render(
        "report.html",
        problem=problem,
        data=data,
        matrices=matrices,
        rows=[(name, [cell(m) for m in matrices]) for name, cell in ROWS.items()],
        layers=[(m.name, layer_table(m)) for m in matrices if m.layers],
        verdicts=sorted(report.verdicts, key=lambda v: -STATUSES.index(v.status)),
        worst=max(found, key=STATUSES.index, default="PASS"),
        notes=report.notes,
        pictures=list(map(inline, drawn)),
        provenance=provenance(report),
    )
    path = folder / NAME
    write(path, text.encode())
    return path


# -- comparisons -----------------------------------------------------------------------


def _sentences(pair: Pair) -> list[str]:
    """Say what no table has room for."""
    found = []
    if pair.overlap is not None:
        found.append(
            f"The leading {len(pair.overlap.squares)} eigenvectors span subspaces that "
            f"share {pair.overlap.subspace:.1%} of their dimensions."
        )
    if pair.distance is not None:
        word = "significant" if pair.distance.significant else "not significant"
        found.append(
            "The densities have the Jensen-Shannon distance "
            f"{pair.distance.value:.3f}; up to {pair.distance.chance:.3f} is by "
            f"chance: {word}."
        )
    return found


def _changes(changes: Iterable[Change]) -> list[tuple[Any, ...]]:
    return [
        (
            change.name,
            with_error(change.first),
            with_error(change.second),
            f"{change.difference:+.3g}",
            f"{change.margin:.2g}",
            change.significant,
        )
        for change in changes
    ]


def _moved(pair: Pair) -> list[tuple[list[str], bool]]:
    rows = []
    for layer in pair.layers:
        numbers = [n for c in layer.changes[:2] for n in (c.first, c.second)]
        cells = [layer.name, *map(with_error, numbers)]
        apart = layer.distance
        text = "–" if apart is None else f"{apart.value:.3f} ({apart.chance:.3f})"
        rows.append(([*cells, text], layer.significant))
    return rows


def write_comparison_page(
    comparison: Comparison, folder: Path, pictures: Sequence[Picture] | None = None
) -> Path:
    """Write ``comparison.html``: what changed, by how much, and whether by chance.

    Parameters
    ----------
    comparison : Comparison
        What to show.
    folder : Path
        Where to.
    pictures : sequence of Picture, optional
        What :func:`write_comparison_figures` returned; default: it is called.

    Returns
    -------
    Path
        Of the page.

    Raises
    ------
    ImportError
        If Jinja2 or Matplotlib is missing.
    """
    drawn = pictures
    if drawn is None:
        drawn = write_comparison_figures(comparison, folder)
    loss = comparison.loss
    heads = [
        (key, f"{name}, loss {short(number.value)}")
        for key, name, number in (
            ("first", comparison.first, loss.first),
            ("second", comparison.second, loss.second),
        )
    ]
    pairs = [
        {
            "name": pair.name,
            "anchor": f"matrix-{number}",
            "sentences": _sentences(pair),
            "changes": _changes(pair.changes()),
            "layers": _moved(pair),
        }
        for number, pair in enumerate(comparison.pairs)
    ]
    text = render(
        "compare.html",
        first=comparison.first,
        second=comparison.second,
        heads=heads,
        notes=comparison.notes,
        pairs=pairs,
        pictures=list(map(inline, drawn)),
    )
    path = folder / COMPARISON
    write(path, text.encode())
    return path
