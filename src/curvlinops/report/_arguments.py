"""The arguments of the command ``curvlinops``."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from curvlinops import __version__
from curvlinops.report._budget import LEVELS
from curvlinops.report._files import JSON
from curvlinops.report._matrices import DEFAULT, KINDS
from curvlinops.report._rules import MEASURES
from curvlinops.report._settings import NAME as RUN

EXAMPLES = {
    "": """examples:
  curvlinops report                           a network that reads digits
  curvlinops report model.py:problem          your own, see `curvlinops report --help`
  curvlinops compare before/ after/           two reports
  curvlinops verify model.py:problem          is every matrix what it claims to be?""",
    "report": """PROBLEM is path/to/file.py:function or package.module:function; the
function takes no arguments and returns (model, loss, data), (model, loss, params,
data), or a curvlinops.EmpiricalRisk. Without it, a network is trained on
scikit-learn's digits.

examples:
  curvlinops report
  curvlinops report model.py:problem --matrix hessian --matrix kfac --budget quick
  curvlinops report model.py:problem --weights epoch10.pt --learning-rate 0.1
  curvlinops report model.py:problem --budget 30 --checkpoint half_done/
  curvlinops report --config curvlinops_report/run.toml --output again/
  curvlinops report --from curvlinops_report/report.json""",
    "spectrum": """examples:
  curvlinops spectrum
  curvlinops spectrum model.py:problem --matrix hessian --top 20 --output spectrum/""",
    "verify": """examples:
  curvlinops verify
  curvlinops verify model.py:problem --matrix hessian --matrix ggn --matrix ef""",
    "compare": """A and B are folders of two reports, or two files of weights, which the
model of a problem (--problem) gets one after the other.

examples:
  curvlinops compare before/ after/
  curvlinops compare epoch1.pt epoch9.pt --problem model.py:problem
  curvlinops compare main/ branch/ --fail-if "top-eigenvalue>10%" --fail-if layers""",
    "plan": """examples:
  curvlinops plan
  curvlinops plan model.py:problem --max-memory 2GB --budget full""",
}

UNITS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "Ki": 2**10, "Mi": 2**20}
UNITS |= {"Gi": 2**30}


def nbytes(text: str) -> int:
    """Return a number of bytes, such as ``"2GB"`` or ``"512MiB"``."""
    number = text.rstrip("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")
    unit = text[len(number) :].removesuffix("B")
    try:
        value = float(number) * UNITS[unit]
    except (ValueError, KeyError):
        value = 0.0
    if not 1 <= value < 2**62:
        raise argparse.ArgumentTypeError(f"{text!r} is no size such as 512MB or 2GiB")
    return int(value)


def positive(kind: type) -> Callable[[str], Any]:
    """Return a converter of positive numbers."""

    def convert(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = 0
        if not 0 < value < float("inf"):
            what = "integer" if kind is int else "number"
            raise argparse.ArgumentTypeError(f"{text!r} is no positive {what}")
        return value

    return convert


def seed(text: str) -> int:
    """Return a seed."""
    if not text.isdecimal() or int(text) >= 2**32:
        raise argparse.ArgumentTypeError(f"{text!r} is no integer from 0 to 2**32 - 1")
    return int(text)


def add_problem(parser: argparse.ArgumentParser, option: bool = False) -> None:
    """Add the options that say what is looked at."""
    if option:
        parser.add_argument("--problem", metavar="PROBLEM", help="of the weights")
    else:
        parser.add_argument("problem", nargs="?", metavar="PROBLEM", help="see below")
    add = parser.add_argument_group("what is looked at").add_argument
    add(
        "--matrix",
        action="append",
        choices=KINDS,
        help=f"may be given several times (default: {' and '.join(DEFAULT)})",
    )
    add("--params", metavar="GLOB", help='names of parameters, such as "encoder.*"')
    add("--weights", metavar="FILE", help="state dict that the model gets")
    add("--device", help="cpu, cuda, cuda:1, ...")
    add("--dtype", choices=("float32", "float64", "bfloat16", "float16"))
    add("--seed", type=seed, help="of all randomness (default: 0)")
    add(
        "--max-memory",
        type=nbytes,
        metavar="SIZE",
        help="that a product may allocate, such as 2GB",
    )


def add_effort(parser: argparse.ArgumentParser) -> None:
    """Add the options that say how thoroughly."""
    add = parser.add_argument_group("how thoroughly").add_argument
    levels = ", ".join(f"{name} ({x.minutes:g} min)" for name, x in LEVELS.items())
    add("--budget", help=f"at most: {levels}, or minutes (default: standard)")
    add("--top", type=positive(int), metavar="K", help="number of leading eigenpairs")
    add(
        "--damping",
        type=positive(float),
        help="of effective dimension and condition number (default: 0.01)",
    )
    add(
        "--learning-rate",
        type=positive(float),
        metavar="LR",
        help="with which 2 / LR the sharpness is compared",
    )


def add_files(parser: argparse.ArgumentParser, output: str | None) -> None:
    """Add the options that say where things go."""
    add = parser.add_argument_group("files and text").add_argument
    default = f"default: {output}" if output else "default: none is written"
    add("--output", type=Path, metavar="DIR", help=f"folder of the results ({default})")
    add(
        "--checkpoint",
        type=Path,
        metavar="DIR",
        help="keeps what is finished: after a kill the same command goes on from there",
    )
    add(
        "--config", type=Path, metavar=RUN, help="replay a run; other options change it"
    )
    parser.set_defaults(default_output=output)


def add_text(parser: argparse.ArgumentParser) -> None:
    """Add the options that say what is printed."""
    parser.add_argument("--json", action="store_true", help="print JSON, no table")
    parser.add_argument("--quiet", action="store_true", help="no progress, no table")


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="curvlinops",
        description="Curvature matrices of PyTorch models: reports with error bars.",
        epilog=EXAMPLES[""],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--version", action="version", version=f"curvlinops {__version__}"
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, help_: str) -> argparse.ArgumentParser:
        made = commands.add_parser(
            name,
            help=help_,
            description=help_[0].upper() + help_[1:] + ".",
            epilog=EXAMPLES[name],
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        add_text(made)
        return made

    report = command("report", "spectra, traces, layers and verdicts of a model")
    report.add_argument(
        "--from",
        dest="source",
        type=Path,
        metavar=JSON,
        help="compute nothing: draw and write the page of a report again",
    )
    add_files(report, "curvlinops_report")
    spectrum = command("spectrum", "eigenvalues and spectral density only")
    add_files(spectrum, None)
    verify = command("verify", "check every matrix on its own model, loss and data")
    compare = command("compare", "what has changed from one report to another")
    for name, letter in (("first", "A"), ("second", "B")):
        compare.add_argument(name, type=Path, metavar=letter, help="see below")
    compare.add_argument(
        "--fail-if",
        action="append",
        default=[],
        metavar="NAME>NUMBER",
        help="exit with 1 if a change is significant and larger; may be given several "
        f"times; NAME is one of {', '.join(MEASURES)}",
    )
    add_files(compare, None)
    add_problem(compare, option=True)
    add_effort(compare)
    plan = command("plan", "predict memory and time; compute nothing else")
    for made in (report, spectrum, verify, plan):
        add_problem(made)
    for made in (report, spectrum, plan):
        add_effort(made)
    return parser
