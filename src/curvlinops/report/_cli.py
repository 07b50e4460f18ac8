"""The command ``curvlinops``: arguments in, text, files and an exit status out."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from curvlinops import __version__
from curvlinops._memory import raise_if_out_of_memory
from curvlinops.report import _table
from curvlinops.report._arguments import make_parser
from curvlinops.report._budget import level_of, predicted
from curvlinops.report._compare import run_compare
from curvlinops.report._contents import Report
from curvlinops.report._drawing import Drawn, draw
from curvlinops.report._files import encode, load, save, write
from curvlinops.report._matrices import KINDS
from curvlinops.report._measure import PARTS
from curvlinops.report._mistakes import MistakeError, one_line
from curvlinops.report._output import SUMMARY, fresh_folder, summary
from curvlinops.report._problem import build
from curvlinops.report._run import Job, threads
from curvlinops.report._settings import NAME as RUN
from curvlinops.report._settings import Settings, from_toml, to_toml

#: Groups of stages that a command runs.
COMMAND_PARTS = {
    "report": PARTS,
    "spectrum": ("symmetry", "pairs", "density"),
    "compare": PARTS,
    "plan": PARTS,
}

# -- from arguments to settings -------------------------------------------------------


def settings_of(args: argparse.Namespace) -> Settings:
    """Return the settings: those of a file if one is given, changed by the options."""
    config = getattr(args, "config", None)
    base = Settings(parts=COMMAND_PARTS.get(args.command, ("verify",)))
    if config is not None:
        base = from_toml(config)
    elif getattr(args, "budget", None) is not None:
        level_of(args.budget)
    names = ("problem", "params", "weights", "device", "dtype", "seed", "max_memory")
    given = {name: getattr(args, name) for name in names}
    choice = replace(base.choice, **{k: v for k, v in given.items() if v is not None})
    changes: dict[str, Any] = {"choice": choice}
    if args.matrix:
        changes["matrices"] = tuple(args.matrix)
    for name in ("damping", "learning_rate", "budget", "top"):
        if getattr(args, name, None) is not None:
            changes[name] = getattr(args, name)
    if "budget" in changes:
        level_of(changes["budget"])
        changes["counts"] = None
    elif base.counts is not None and "top" in changes:
        changes["counts"] = replace(base.counts, top=changes["top"])
    return replace(base, **changes)


class Progress:
    """One bar over the stages of a run, on stderr."""

    def __init__(self, quiet: bool) -> None:
        self._quiet = quiet
        self._bar: Any = None

    def __call__(self, name: str) -> None:
        """Show the name of the stage that starts."""
        if self._bar is None:
            shape = "{desc} ({n_fmt} stages, {elapsed})"
            hidden = True if self._quiet else None  # None: where nobody watches
            self._bar = tqdm(bar_format=shape, leave=False, disable=hidden)
        self._bar.set_description_str(name)
        self._bar.update()

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.close()


def command_line(argv: Sequence[str]) -> str:
    """Return the command as it would be typed."""
    return shlex.join(["curvlinops", *argv])


# -- the commands ---------------------------------------------------------------------


@contextmanager
def job_of(args: argparse.Namespace, argv: Sequence[str]) -> Iterator[Job]:
    """Give the job of a command's arguments, in the threads that suit it."""
    settings = settings_of(args)
    progress = Progress(args.quiet or args.json)
    with threads(settings):
        try:
            yield Job(
                settings,
                command_line(argv),
                getattr(args, "checkpoint", None),
                progress,
            )
        finally:
            progress.close()


def run_report(args: argparse.Namespace, argv: Sequence[str]) -> int:
    """Compute a report; print and write it."""
    if getattr(args, "source", None) is not None:
        return rebuild(args)
    output = args.output or (args.default_output and Path(args.default_output))
    if output is None:
        with job_of(args, argv) as job:
            report = _computed(job, args)
        return _finish(report, None, args)
    with fresh_folder(output) as folder:
        with job_of(args, argv) as job:
            report = _computed(job, args)
            resolved = job.resolved()
        save(report, folder)
        write(folder / RUN, to_toml(resolved, __version__).encode())
        write(folder / SUMMARY, summary(report).encode())
        drawn = draw(report, folder)
    return _finish(report, output, args, drawn)


def _computed(job: Job, args: argparse.Namespace) -> Report:
    if not (args.quiet or args.json):
        print(job.prediction(), flush=True)
    return job.report()


def _finish(
    report: Report,
    output: Path | None,
    args: argparse.Namespace,
    drawn: Drawn = Drawn(),  # noqa: B008 - immutable
) -> int:
    if args.json:
        print(json.dumps(as_json(report), indent=1))
    elif not args.quiet:
        print(_table.render(report))
        if output is not None:
            print(f"\nWritten to {output}.")
    if drawn.text and not (args.quiet and not drawn.failed):
        print(drawn.text, file=sys.stderr)
    return int(report.failed > 0 or drawn.failed)


def as_json(report: Report) -> Any:
    """Return a report without its arrays, as JSON."""
    return encode(report, {})


def rebuild(args: argparse.Namespace) -> int:
    """Draw figures and page of a report that is there, and print it."""
    report = load(args.source)
    folder = args.source if args.source.is_dir() else args.source.parent
    output = args.output or folder
    if output.absolute() == folder.absolute():
        try:
            drawn = draw(report, folder)
        except OSError as error:
            raise MistakeError(f"{folder}: {error.strerror}.") from error
    else:
        with fresh_folder(output) as fresh:
            save(report, fresh)
            write(fresh / SUMMARY, summary(report).encode())
            drawn = draw(report, fresh)
    return _finish(report, output, args, drawn)


def run_verify(args: argparse.Namespace, argv: Sequence[str]) -> int:
    """Verify every matrix; print the checks."""
    settings = replace(settings_of(args), parts=("verify",))
    with threads(settings):
        risk = build(settings.choice)
        reports = {
            name: KINDS[name]
            .build(risk, settings.choice.seed)
            .verify(settings.choice.seed)
            for name in settings.matrices
        }
    if args.json:
        rows = {
            name: [
                {
                    "name": c.name,
                    "error": None if c.error != c.error else c.error,
                    "tolerance": c.tolerance,
                    "passed": c.passed,
                    "note": c.note,
                }
                for c in report.checks
            ]
            for name, report in reports.items()
        }
        print(json.dumps(rows, indent=1))
    elif not args.quiet:
        print(*reports.values(), sep="\n")
    return int(not all(report.ok for report in reports.values()))


def run_plan(args: argparse.Namespace, argv: Sequence[str]) -> int:
    """Print what memory and time a report would take."""
    with job_of(args, argv) as job:
        plans: dict[str, Any] = {}
        for name, A in job.matrices.items():
            try:
                plans[name] = A.plan(columns=8)
            except TypeError as error:  # Kronecker factors: products see no data
                raise_if_out_of_memory(error)
                plans[name] = one_line(error)
        line = job.prediction()
        seconds = dict(zip(job.matrices, job.timing.seconds, strict=True))
    if args.json:
        sizes, times = job.problem.parameters, job.timing.seconds
        products, total = predicted(job.timing.counts, sizes, times)
        rows = {
            name: {
                "seconds_per_product": seconds[name],
                "peak_bytes": getattr(plan, "peak", None),
                "held_bytes": getattr(plan, "held", None),
            }
            for name, plan in plans.items()
        }
        print(json.dumps({"products": products, "seconds": total, **rows}, indent=1))
    elif not args.quiet:
        for name, plan in plans.items():
            print(f"{name}, products with 8 columns\n{plan}\n")
        print(line)
    return 0


def run_comparison(args: argparse.Namespace, argv: Sequence[str]) -> int:
    """Compare two reports, or the weights of one problem."""
    progress = Progress(args.quiet or args.json)

    def make_job(settings: Settings, keep: Path | None) -> Job:
        return Job(settings, command_line(argv), keep, progress)

    try:
        return run_compare(args, settings_of(args), make_job)
    finally:
        progress.close()


COMMANDS = {
    "report": run_report,
    "compare": run_comparison,
    "spectrum": run_report,
    "verify": run_verify,
    "plan": run_plan,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Parameters
    ----------
    argv : sequence of str, optional
        Arguments; by default those of the process.

    Returns
    -------
    int
        The exit status: 0, 1 if a verdict is FAIL, 2 if what was given cannot be used.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    args = make_parser().parse_args(argv)
    try:
        return COMMANDS[args.command](args, argv)
    except MistakeError as error:
        print(f"curvlinops: {one_line(error)}", file=sys.stderr)
        return 2
    except MemoryError as error:
        print(f"curvlinops: {one_line(error)}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # of `curvlinops ... | head`
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - until the process ends
        return 1
    except KeyboardInterrupt:
        print("curvlinops: interrupted; nothing was written.", file=sys.stderr)
        return 130
