"""The command `compare`: two reports, or two weight files of one problem."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

from curvlinops.report import _comparison_table as table
from curvlinops.report._comparison import Comparison, compare, require_alike
from curvlinops.report._contents import Report
from curvlinops.report._drawing import Drawn, draw
from curvlinops.report._files import load, save, write
from curvlinops.report._mistakes import MistakeError
from curvlinops.report._output import fresh_folder
from curvlinops.report._rules import Condition, condition
from curvlinops.report._run import Job, threads
from curvlinops.report._settings import Settings

#: From settings to a job; gives the command's progress and provenance.
MakeJob = Callable[[Settings, "Path | None"], Job]


def is_report(path: Path) -> bool:
    """Whether a path is that of a report, not of a file with weights."""
    return path.is_dir() or path.suffix == ".json"


def run_compare(args: argparse.Namespace, settings: Settings, make_job: MakeJob) -> int:
    """Compare; print and write the comparison.

    Parameters
    ----------
    args : argparse.Namespace
        With ``first``, ``second``, ``fail_if``, ``output``, ``json``, ``quiet``,
        ``checkpoint``.
    settings : Settings
        For weight files.
    make_job : callable
        Maps settings and the folder of a checkpoint to a job.

    Returns
    -------
    int
        1 if a condition of ``--fail-if`` holds, else 0.
    """
    conditions = [condition(text) for text in args.fail_if]
    paths = [args.first, args.second]
    if not all(path.exists() for path in paths):
        (missing, *_) = (path for path in paths if not path.exists())
        raise MistakeError(f"There is no {missing}.")
    kinds = [is_report(path) for path in paths]
    if kinds[0] != kinds[1]:
        raise MistakeError(
            f"{paths[0]} and {paths[1]} are a report and a file of weights: compare "
            "two of one kind."
        )
    names = str(paths[0]), str(paths[1])
    opened = nullcontext(None) if args.output is None else fresh_folder(args.output)
    with opened as folder:
        reports = (
            [load(path) for path in paths]
            if kinds[0]
            else _computed(names, args, settings, make_job, folder)
        )
        found = compare(reports[0], reports[1], names)
        drawn = Drawn() if folder is None else _write(found, folder)
    _print(found, args, drawn)
    return max(_judged(found, conditions, args), int(drawn.failed))


def _computed(
    names: Sequence[str],
    args: argparse.Namespace,
    settings: Settings,
    make_job: MakeJob,
    folder: Path | None,
) -> list[Report]:
    """Compute the reports of two weight files, with the same counts."""
    if settings.choice.weights is not None:
        raise MistakeError("Two files of weights are compared: leave --weights out.")
    reports: list[Report] = []
    for name, place in zip(names, ("first", "second"), strict=True):
        choice = replace(settings.choice, weights=name)
        settings = replace(settings, choice=choice)
        keep = None if args.checkpoint is None else args.checkpoint / place
        with threads(settings):
            job = make_job(settings, keep)
            if not reports and not (args.quiet or args.json):
                print(job.prediction(), flush=True)
            settings = job.resolved()
            reports.append(job.report())
        if folder is not None:
            (folder / place).mkdir()
            save(reports[-1], folder / place)
    require_alike(reports[0], reports[1], (names[0], names[1]))
    return reports


def _write(found: Comparison, folder: Path) -> Drawn:
    text = json.dumps(table.as_json(found), indent=1, ensure_ascii=False)
    write(folder / table.NAME, text.encode() + b"\n")
    return draw(found, folder)


def _print(found: Comparison, args: argparse.Namespace, drawn: Drawn) -> None:
    if args.json:
        print(json.dumps(table.as_json(found), indent=1))
    elif not args.quiet:
        print(table.render(found))
        if args.output is not None:
            print(f"\nWritten to {args.output}.")
    if drawn.text and not (args.quiet and not drawn.failed):
        print(drawn.text, file=sys.stderr)


def _judged(
    found: Comparison, conditions: Sequence[Condition], args: argparse.Namespace
) -> int:
    status = 0
    for rule in conditions:
        holds, number = rule.holds(found)
        if holds:
            status = 1
            if not args.quiet:
                text = f"FAIL {rule.name} is {number:.3g}, above {rule.bound:g}."
                print(text, file=sys.stderr)
    return status
