"""The folder of a report: complete, or not there."""

from __future__ import annotations

import glob
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from curvlinops.report._contents import Number, Report
from curvlinops.report._files import JSON, NPZ
from curvlinops.report._mistakes import MistakeError
from curvlinops.report._settings import NAME as RUN

if sys.platform != "win32":  # there, what a killed process has left stays
    import fcntl

SUMMARY = "summary.tsv"
#: What a report's folder holds; with these, and nothing else, it may be replaced.
KNOWN = {JSON, NPZ, SUMMARY, RUN, "comparison.json"}
SUFFIXES = {".png", ".svg", ".html", ".pdf"}
#: In the hidden folder beside it: what will take its place, and what it replaces.
NEW, OLD = "new", "old"


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

    It lies in a hidden one, named by :func:`_prefix`, which stays behind only if the
    process is killed. The next call for the same target takes that away.

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
    target = Path(target).resolve()  # a link stays, and leads to the report
    _discard_unused(target)
    require_replaceable(target)
    missing = [p for p in target.parents if not p.exists()]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        aside, lock = _hidden(target)
    except OSError as error:
        raise MistakeError(
            f"--output {target} cannot be written to: {error.strerror}."
        ) from error
    try:
        yield aside / NEW
        require_replaceable(target)
        if target.exists():
            target.rename(aside / OLD)
        (aside / NEW).rename(target)
    except BaseException:
        with suppress(OSError):
            _discard(aside, target)
        for parent in missing:
            with suppress(OSError):
                parent.rmdir()
        raise
    else:  # not the old report, even if another call has moved this one meanwhile
        shutil.rmtree(aside, ignore_errors=True)
    finally:
        if lock is not None:
            os.close(lock)


def _prefix(target: Path) -> str:
    return f".{target.name}.unfinished-"


def _hidden(target: Path) -> tuple[Path, int | None]:
    """Make a hidden folder, and lock it until its descriptor is closed."""
    while True:
        aside = Path(tempfile.mkdtemp(prefix=_prefix(target), dir=target.parent))
        try:
            lock = _locked(aside)
            (aside / NEW).mkdir()
        except (BlockingIOError, FileNotFoundError):
            continue  # another call has taken it for one that was left behind
        return aside, lock


def _locked(folder: Path) -> int | None:
    """Lock a folder until its descriptor is closed, or the process ends.

    ``None`` if there are no such locks.

    Raises
    ------
    BlockingIOError
        If another process has done so.
    """
    if sys.platform == "win32":
        return None
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        if isinstance(error, BlockingIOError):
            raise
        return None
    return descriptor


def _discard(aside: Path, target: Path) -> None:
    """Remove a hidden folder; a report that lies only there goes back to its place."""
    if (aside / OLD).exists() and not target.exists():
        (aside / OLD).rename(target)
    shutil.rmtree(aside, ignore_errors=True)


def _discard_unused(target: Path) -> None:
    """Remove the hidden folders that processes have left which were killed."""
    for aside in target.parent.glob(glob.escape(_prefix(target)) + "*"):
        with suppress(OSError):
            if (lock := _locked(aside)) is not None:
                try:
                    _discard(aside, target)
                finally:
                    os.close(lock)


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
