"""The folder of a report: complete, or not there."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from curvlinops.report._contents import Number, Report
from curvlinops.report._files import JSON, NPZ
from curvlinops.report._mistakes import MistakeError
from curvlinops.report._settings import NAME as RUN

SUMMARY = "summary.tsv"
#: What a report's folder holds; with these, and nothing else, it may be replaced.
KNOWN = {JSON, NPZ, SUMMARY, RUN, "comparison.json"}
SUFFIXES = {".png", ".svg", ".html", ".pdf"}


def require_replaceable(folder: Path) -> None:
    """Raise unless a folder is absent, empty, or a report's with no other files."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise MistakeError(f"--output {folder} is a file. Give another name.")
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name not in KNOWN and path.suffix not in SUFFIXES:
            raise MistakeError(
                f"--output {folder} holds {path.relative_to(folder)}, which is no file "
                "of a report. Give a folder of its own, so that nothing gets lost."
            )
    if any(folder.iterdir()) and not any((folder / name).exists() for name in KNOWN):
        raise MistakeError(
            f"--output {folder} holds files, but no report. Give a folder of its own, "
            "so that nothing gets lost."
        )


@contextmanager
def fresh_folder(target: Path) -> Iterator[Path]:
    """Give a folder beside the target, which takes its place at the end.

    Parameters
    ----------
    target : Path
        Absent, empty, or an earlier report, which is replaced.

    Yields
    ------
    Path
        Where to write. If an exception passes, nothing of it is left, and the target is
        as it was.

    Raises
    ------
    MistakeError
        If the target may not be replaced, or nothing can be written beside it.
    """
    target = Path(target).absolute()
    require_replaceable(target)
    missing = [p for p in target.parents if not p.exists()]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise MistakeError(
            f"--output {target} cannot be written to: {error.strerror}."
        ) from error
    try:
        folder.chmod(0o777 & ~_umask())
        yield folder
        _put_in_place(folder, target)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        for parent in missing:
            with suppress(OSError):
                parent.rmdir()
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _put_in_place(folder: Path, target: Path) -> None:
    require_replaceable(target)
    if not target.exists():
        folder.rename(target)
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    target.rename(aside / "old")
    try:
        folder.rename(target)
    except OSError:
        (aside / "old").rename(target)
        raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def summary(report: Report) -> str:
    """Return all numbers as tab-separated lines, below comments with the provenance.

    Parameters
    ----------
    report : Report
        The report.

    Returns
    -------
    str
        Columns matrix, block (empty for the whole), quantity, value, error (standard
        error; of eigenvalues the residual), number of samples.
    """
    p = report.provenance
    head = [
        f"# {p.command}",
        f"# {p.started}, seed {p.seed}, {p.device}, {p.dtype}",
        "# " + ", ".join(f"{name} {version}" for name, version in p.versions.items()),
        f"# parameters {p.parameters_sha256}",
        f"# data {p.data_sha256}",
        f"# {p.products} products, {p.seconds:.1f} s",
        "matrix\tblock\tquantity\tvalue\terror\tsamples",
    ]
    rows = []
    for m in report.matrices:
        found: list[tuple[str, str, Number]] = []
        for name, end in (("top", m.top), ("bottom", m.bottom)):
            if end is not None:
                pairs = zip(end.values, end.residuals, strict=True)
                found += [
                    ("", f"{name} eigenvalue {i}", Number(value, residual))
                    for i, (value, residual) in enumerate(pairs, 1)
                ]
        found += [("", name, number) for name, number in m.numbers()]
        if m.condition_number is not None:
            found.append(("", "condition number", m.condition_number))
        for layer in m.layers:
            quantities = (
                ("trace", layer.trace),
                ("top eigenvalue", layer.top_eigenvalue),
                ("frobenius norm", layer.frobenius_norm),
                ("effective dimension", layer.effective_dimension),
            )
            found += [(layer.name, name, number) for name, number in quantities]
        rows += [
            f"{m.name}\t{block}\t{name}\t{x.value!r}\t{x.error!r}\t{x.num_samples}"
            for block, name, x in found
        ]
    return "\n".join([*head, *rows]) + "\n"
