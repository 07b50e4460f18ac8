"""The command: exit status, what it prints, what it writes, what it leaves alone."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections import Counter
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path

import numpy as np
import pytest
import report_problems
import torch

from curvlinops import __version__
from curvlinops.estimators._run import BLOCK_COLUMNS
from curvlinops.report import _files
from curvlinops.report._arguments import make_parser, nbytes
from curvlinops.report._cli import main, settings_of
from curvlinops.report._contents import Counts
from curvlinops.report._files import load, save
from curvlinops.report._mistakes import MistakeError
from curvlinops.report._output import fresh_folder
from curvlinops.report._problem import Choice
from curvlinops.report._settings import Settings, from_toml, to_toml
from report_samples import sample

FILE = Path(report_problems.__file__)
COUNTS = Counts(3, 80, 40, 8, 16, 6, 8, 6, 2, 2, 50, True)
#: What may differ between two runs of the same.
TIMES = {"seconds", "started", "command", "products", "notes"}


@pytest.fixture
def config(tmp_path):
    """A run.toml of a small problem, with small counts."""
    settings = Settings(Choice(f"{FILE}:small"), counts=COUNTS)
    path = tmp_path / "given.toml"
    path.write_text(to_toml(settings, __version__))
    return path


def call(capsys, *arguments):
    """Return exit status, output and error of a command."""
    try:
        status = main([str(argument) for argument in arguments])
    except SystemExit as error:
        status = error.code
    text = capsys.readouterr()
    return status, text.out, text.err


def same(a, b, place=""):
    """Assert that two reports hold the same bits, but for times."""
    if is_dataclass(a):
        for f in fields(a):
            if f.name not in TIMES:
                same(getattr(a, f.name), getattr(b, f.name), f"{place}.{f.name}")
    elif isinstance(a, tuple):
        assert len(a) == len(b), place
        for i, pair in enumerate(zip(a, b, strict=True)):
            same(*pair, f"{place}[{i}]")
    elif isinstance(a, np.ndarray):
        np.testing.assert_array_equal(a, b, place)
    else:
        assert a == b or (a != a and b != b), (place, a, b)


def test_report(config, tmp_path, capsys):
    """A table, the verdicts, a complete folder; the same again from its run.toml."""
    out = tmp_path / "new" / "report"
    status, text, _ = call(capsys, "report", "--config", config, "--output", out)
    report = load(out)
    assert status == int(report.failed > 0) == 0
    assert {"report.json", "report.npz", "summary.tsv", "run.toml"} <= {
        path.name for path in out.iterdir()
    }
    assert [m.name for m in report.matrices] == ["hessian", "ggn"]
    for word in ("Problem", "trace", "effective dimension", "Verdicts", "Overlap"):
        assert word in text
    for verdict in report.verdicts:
        start = f"{verdict.status}  {verdict.rule} "
        (line,) = (
            line
            for line in text.splitlines()
            if line.startswith(start) and f" {verdict.subject} " in line
        )
        assert f"{verdict.number:.3g}" in line
        assert verdict.text in line
    assert report.blocks is not None and len(report.blocks.blocks) == 2
    assert report.baseline is not None and report.baseline.loss > 0.5
    assert len(report.matrices[0].layers) == 4
    assert report.matrices[0].dense.shape == (43, 43)
    p = report.provenance
    assert p.versions["torch"] == str(torch.__version__)
    assert f"--output {out}" in p.command
    assert (p.dtype, p.device, p.seed) == ("float64", "cpu", 0)
    assert p.products > 100

    again = tmp_path / "again"
    replay = ["report", "--config", out / "run.toml", "--output", again, "--quiet"]
    assert call(capsys, *replay)[:2] == (0, "")
    same(load(again), report)


def test_summary(config, tmp_path, capsys):
    out = tmp_path / "report"
    call(capsys, "report", "--config", config, "--output", out, "--quiet")
    lines = (out / "summary.tsv").read_text().splitlines()
    rows = [line.split("\t") for line in lines if not line.startswith("#")]
    assert rows[0] == ["matrix", "block", "quantity", "value", "error", "samples"]
    assert all(len(row) == 6 for row in rows)
    report = load(out)
    assert any(report.provenance.parameters_sha256 in line for line in lines)
    found = {tuple(row[:3]): float(row[3]) for row in rows[1:]}
    assert found["ggn", "", "trace"] == report.matrix("ggn").trace.value
    assert ("hessian", "0.weight", "frobenius norm") in found


def test_json_is_all_that_is_printed(config, tmp_path, capsys):
    out = tmp_path / "report"
    arguments = "report", "--config", config, "--output", out, "--json"
    status, text, errors = call(capsys, *arguments)
    content = json.loads(text)
    assert status == 0
    assert errors == ""
    assert content["matrices"][1]["name"] == "ggn"


def test_a_failure_sets_the_status(config, tmp_path, capsys):
    out = tmp_path / "report"
    arguments = "report", "--config", config, "--output", out, "--learning-rate", "1e5"
    status, text, _ = call(capsys, *arguments)
    assert status == 1
    assert load(out).failed >= 1
    assert "FAIL  sharpness" in text


@pytest.mark.parametrize("name", ["loader", "tokens", "functional", "risk"])
def test_problems_of_all_kinds(name, config, tmp_path, capsys):
    """Loaders, attention on dict batches, functions, and risks, through everything."""
    out = tmp_path / "report"
    arguments = ["report", f"{FILE}:{name}", "--config", config, "--output", out]
    if name == "loader":
        arguments += ["--max-memory", "2MB"]
    status, text, errors = call(capsys, *arguments)
    assert status == 0, text + errors
    report = load(out)
    assert report.problem.name == f"{FILE}:{name}"
    assert all(m.failures == () for m in report.matrices)
    assert (report.baseline is None) is (name == "functional")


def test_other_matrices(config, tmp_path, capsys):
    out = tmp_path / "report"
    names = ["fisher", "ef", "kfac", "ekfac", "kfoc", "ggn-diagonal"]
    options = [option for name in names for option in ("--matrix", name)]
    arguments = "report", "--config", config, "--output", out, *options
    status, text, errors = call(capsys, *arguments)
    assert status == 0, text + errors
    report = load(out)
    assert [m.name for m in report.matrices] == names
    assert all(m.semidefinite and m.failures == () for m in report.matrices)


# -- from minutes to counts ------------------------------------------------------------


def test_budget_becomes_counts(tmp_path, capsys):
    out = tmp_path / "report"
    problem = f"{FILE}:small"
    arguments = "report", problem, "--budget", "0.02", "--output", out
    status, text, _ = call(capsys, *arguments)
    assert status == 0
    assert text.startswith("Plan      at most ")
    run = tomllib.loads((out / "run.toml").read_text())
    assert run["counts"] == asdict(load(out).counts)
    assert run["problem"] == problem


def test_plan_and_verify(config, capsys):
    problem = f"{FILE}:small"
    status, text, _ = call(capsys, "plan", problem, "--budget", "quick")
    assert status == 0
    assert "kept" in text
    assert "Plan      at most" in text
    status, text, _ = call(capsys, "plan", problem, "--matrix", "kfac", "--json")
    assert json.loads(text)["kfac"]["peak_bytes"] is None
    status, text, _ = call(capsys, "verify", problem)
    assert (status, text.count("  ok  ")) == (0, 14)
    status, text, _ = call(capsys, "verify", problem, "--matrix", "ef", "--json")
    checks = json.loads(text)["ef"]
    assert status == 0
    assert {check["passed"] for check in checks} == {True}


def test_verify_fails(monkeypatch, capsys):
    from curvlinops import GGNLinearOperator

    honest = GGNLinearOperator._apply
    monkeypatch.setattr(GGNLinearOperator, "_apply", lambda A, V: 1.01 * honest(A, V))
    status, text, _ = call(capsys, "verify", f"{FILE}:small", "--matrix", "ggn")
    assert status == 1
    assert "FAIL" in text


def test_spectrum(tmp_path, capsys):
    """Eigenvalues and densities, no more; files only if asked for."""
    os.chdir(tmp_path)
    arguments = "spectrum", f"{FILE}:small", "--budget", "0.02", "--matrix", "ggn"
    status, text, _ = call(capsys, *arguments)
    assert status == 0
    assert "largest eigenvalues" in text
    assert "trace" not in text
    assert list(tmp_path.iterdir()) == []
    call(capsys, *arguments, "--output", "out")
    (m,) = load(tmp_path / "out").matrices
    assert m.trace is None
    assert m.density is not None


def test_version_and_help(capsys):
    assert call(capsys, "--version")[:2] == (0, f"curvlinops {__version__}\n")
    for command in ("report", "compare", "spectrum", "verify", "plan"):
        status, text, _ = call(capsys, command, "--help")
        assert status == 0
        assert f"  curvlinops {command}" in text


# -- settings --------------------------------------------------------------------------


def test_settings_come_back_from_their_file(tmp_path):
    odd = 'a "quoted\\path"\twith ümläuts\x7f'
    choice = Choice(odd, "enc.*", "w.pt", "cpu", "float64", 12345, 7)
    settings = Settings(
        choice, ("ef", "kfac"), ("pairs",), 0.25, 1e-3, "2.5", 4, COUNTS
    )
    path = tmp_path / "run.toml"
    path.write_text(to_toml(settings, "1"), encoding="utf-8")
    assert from_toml(path) == settings


def test_options_change_a_file(config):
    parse = make_parser().parse_args
    args = parse(["report", "--config", str(config), "--top", "2", "--seed", "9"])
    settings = settings_of(args)
    assert settings.counts.top == 2
    assert settings.choice.seed == 9
    assert settings.choice.problem == f"{FILE}:small"
    args = parse(["report", "--config", str(config), "--budget", "full"])
    assert settings_of(args).counts is None


def test_sizes():
    given = ("12", "3kB", "2MB", "1.5G", "1GiB")
    assert [nbytes(text) for text in given] == [12, 3000, 2 * 10**6, 15 * 10**8, 2**30]
    for text in ("", "GB", "1XB", "-3", "nan"):
        with pytest.raises(Exception, match="is no size"):
            nbytes(text)


# -- what cannot be used ---------------------------------------------------------------


def newer(folder):
    save(sample(), folder)
    path = folder / "report.json"
    path.write_text(path.read_text().replace('"version": 1', '"version": 99'))
    return path


WRONG = {
    "no such file": lambda f: ["report", "there/is/none.py:f"],
    "a function that raises": lambda f: ["report", f"{FILE}:raises"],
    "a wrong return": lambda f: ["report", f"{FILE}:two_things"],
    "NaN data": lambda f: ["report", f"{FILE}:nan_data"],
    "no such budget": lambda f: ["report", f"{FILE}:small", "--budget", "huge"],
    "no such matrix": lambda f: ["report", f"{FILE}:small", "--matrix", "no"],
    "no such parameters": lambda f: ["report", f"{FILE}:small", "--params", "x*"],
    "no weights": lambda f: ["report", f"{FILE}:small", "--weights", f / "none.pt"],
    "no device": lambda f: ["report", f"{FILE}:small", "--device", "cuda:77"],
    "no memory": lambda f: ["report", f"{FILE}:small", "--max-memory", "1"],
    "no config": lambda f: ["report", "--config", f / "none.toml"],
    "another version": lambda f: ["report", "--from", newer(f)],
    "a report that is none": lambda f: ["report", "--from", f],
    "verify of none": lambda f: ["verify", f"{FILE}:absent"],
    "plan of none": lambda f: ["plan", f"{FILE}:absent"],
    "no command": lambda f: [],
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input(case, tmp_path, capsys, monkeypatch):
    """One clear line, status 2, and nothing written."""
    work, given = tmp_path / "work", tmp_path / "given"
    work.mkdir()
    given.mkdir()
    monkeypatch.chdir(work)
    status, text, errors = call(capsys, *WRONG[case](given))
    assert status == 2
    assert text == ""
    lines = [line for line in errors.splitlines() if not line.startswith("usage")]
    lines = [line for line in lines if not line.startswith(" ")]
    assert len(lines) == 1, errors
    assert lines[0].startswith("curvlinops")
    assert list(work.iterdir()) == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("x = = 1", "is no TOML"),
        ("version = 2", "is no run.toml of version 1"),
        ("version = 1\nmatrixes = 3", "'matrixes' is unknown"),
        ('version = 1\nmatrices = ["no"]', "'no' is none of hessian"),
        ("version = 1\n[counts]\ntop = -1", "top = -1 is no count"),
        ("version = 1\n[counts]\ntop = 1", "is damaged"),
    ],
)
def test_wrong_settings(content, message, tmp_path):
    path = tmp_path / "run.toml"
    path.write_text(content)
    with pytest.raises(MistakeError, match=message):
        from_toml(path)


# -- folders ---------------------------------------------------------------------------


def test_folders_are_complete_or_not_there(tmp_path):
    target = tmp_path / "a" / "b"
    with pytest.raises(KeyError), fresh_folder(target) as folder:
        (folder / "report.json").write_text("half")
        raise KeyError
    assert list(tmp_path.iterdir()) == []
    with fresh_folder(target) as folder:
        (folder / "report.json").write_text("old")
        assert not target.exists()
    mask = os.umask(0)
    os.umask(mask)
    assert target.stat().st_mode & 0o777 == 0o777 & ~mask
    with pytest.raises(KeyError), fresh_folder(target) as folder:
        raise KeyError
    assert (target / "report.json").read_text() == "old"
    with fresh_folder(target) as folder:
        (folder / "report.json").write_text("new")
    assert (target / "report.json").read_text() == "new"
    assert list(target.parent.iterdir()) == [target]


def test_a_link_stays_and_leads_to_the_report(tmp_path):
    link, target = tmp_path / "link", tmp_path / "far" / "real"
    link.symlink_to(Path("far", "real"))
    for text in "old", "new":
        with fresh_folder(link) as folder:
            (folder / "report.json").write_text(text)
        assert link.is_symlink()
        assert (target / "report.json").read_text() == text


def test_a_folder_that_another_call_takes_away_is_made_again(tmp_path, monkeypatch):
    """Between making a hidden folder and locking it, it looks like one left behind."""
    made, make = [], tempfile.mkdtemp

    def taken_away(**options):
        made.append(make(**options))
        if len(made) == 1:
            shutil.rmtree(made[0])
        return made[-1]

    monkeypatch.setattr(tempfile, "mkdtemp", taken_away)
    with fresh_folder(tmp_path / "a") as folder:
        assert folder.parent == Path(made[1])


def left_behind(target, *names):
    """Leave what a process leaves that is killed while it writes."""
    aside = target.parent / f".{target.name}.unfinished-abc"
    for name in names:
        (aside / name).mkdir(parents=True)
        (aside / name / "report.json").write_text(name)
    return aside


def test_what_killed_processes_leave_is_removed(tmp_path):
    """But neither what a process uses, nor another target's, nor a report."""
    target = tmp_path / "a"
    with fresh_folder(target) as mine:
        other = left_behind(tmp_path / "a.b", "new")
        gone = left_behind(target, "new")
        with fresh_folder(target) as folder:
            (folder / "report.json").write_text("first")
            assert mine.exists()
            assert not gone.exists()
    assert set(tmp_path.iterdir()) == {target, other}
    shutil.rmtree(target)

    left_behind(target, "new", "old")  # killed between two renames
    with pytest.raises(KeyError), fresh_folder(target):
        raise KeyError
    assert (target / "report.json").read_text() == "old"
    assert set(tmp_path.iterdir()) == {target, other}


def test_what_is_no_report_is_not_replaced(tmp_path):
    (tmp_path / "file").touch()
    with (
        pytest.raises(MistakeError, match="is a file"),
        fresh_folder(tmp_path / "file"),
    ):
        pass
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "report.json").touch()
    (mine / "thesis.tex").touch()
    with pytest.raises(MistakeError, match=r"holds thesis\.tex"), fresh_folder(mine):
        pass
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    (pictures / "holidays.png").touch()
    with pytest.raises(MistakeError, match="but no report"), fresh_folder(pictures):
        pass
    assert (pictures / "holidays.png").exists()


def test_places_that_cannot_be_written_to(tmp_path, capsys):
    (tmp_path / "file").touch()
    arguments = "report", f"{FILE}:small", "--output", tmp_path / "file" / "below"
    status, _, errors = call(capsys, *arguments)
    assert status == 2
    assert errors.count("\n") == 1
    assert "cannot be written to: " in errors


def test_a_report_is_drawn_again(config, tmp_path, capsys):
    """From its JSON, in place or elsewhere, with the same numbers."""
    out = tmp_path / "report"
    call(capsys, "report", "--config", config, "--output", out, "--quiet")
    before = (out / "report.json").read_bytes()
    status, text, _ = call(capsys, "report", "--from", out / "report.json")
    assert status == 0
    assert "Verdicts" in text
    assert (out / "report.json").read_bytes() == before
    copy = tmp_path / "copy"
    call(capsys, "report", "--from", out, "--output", copy, "--quiet")
    same(load(copy), load(out))
    drawn = {p.relative_to(out) for p in out.rglob("*") if p.is_file()}
    again = {p.relative_to(copy) for p in copy.rglob("*") if p.is_file()}
    assert drawn - again == {Path("run.toml")}


# -- checkpoints -----------------------------------------------------------------------


def test_checkpoint(config, tmp_path, capsys, monkeypatch):
    """A second call computes nothing; another run is refused."""
    keep, outs = tmp_path / "keep", [tmp_path / "one", tmp_path / "two"]
    for i, out in enumerate(outs):
        if i:  # stages are read from the folder, not computed
            monkeypatch.setattr("curvlinops.report._checkpoint._computed", None)
        arguments = ["--config", config, "--output", out, "--checkpoint", keep]
        assert call(capsys, "report", *arguments, "--quiet")[0] == 0
    same(load(outs[1]), load(outs[0]))
    assert load(outs[1]).provenance.seconds == load(outs[0]).provenance.seconds
    assert not list(keep.glob("*.journal*"))

    status, _, errors = call(capsys, "report", *arguments, "--damping", "0.5")
    assert status == 2
    assert "belongs to another run (damping: stored 0.01, now 0.5)" in errors


def test_damaged_checkpoint(config, tmp_path, capsys):
    keep = tmp_path / "keep"
    arguments = ["--config", config, "--output", tmp_path / "o", "--checkpoint", keep]
    call(capsys, "report", *arguments, "--quiet")
    (keep / "ggn-trace.npz").write_bytes(b"PK no more")
    status, _, errors = call(capsys, "report", *arguments, "--quiet")
    assert status == 2
    assert "ggn-trace.npz is damaged: delete this file" in errors
    (keep / "ggn-trace.npz").unlink()
    assert call(capsys, "report", *arguments, "--quiet")[0] == 0


#: Runs a command that logs the checksum of every vector it multiplies, and draws
#: nothing. Kills itself once it has multiplied so many; for 0, when it would draw.
KILLED = """
import os, signal, sys, zlib
import torch
from curvlinops._operand import Operand, to_numpy
from curvlinops.report import _cli, _drawing

log, most = open(sys.argv[1], "a", buffering=1), float(sys.argv[2])
multiply, made = Operand.multiply, 0
torch.set_num_threads(1)

def counted(self, X, adjoint=False):
    global made
    for x in to_numpy(X.T):
        log.write(f"{zlib.crc32(x.tobytes())}\\n")
    made += X.shape[1]
    if 0 < most <= made:
        os.kill(os.getpid(), signal.SIGKILL)
    return multiply(self, X, adjoint)

def draw(content, folder):
    if most == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return _drawing.Drawn()

Operand.multiply, _cli.draw = counted, draw
sys.exit(_cli.main(sys.argv[3:]))
"""


def spent(folder, most, *arguments):
    """Run a report, killed after some products; return those made, by checksum."""
    log, out = folder / "log", folder / "out"
    log.write_text("")
    command = "-c", KILLED, log, most, "report", "--output", out, "--quiet", *arguments
    run = subprocess.run([sys.executable, *map(str, command)])
    assert run.returncode == (-signal.SIGKILL if most < np.inf else 0)
    return Counter(log.read_text().split())


@pytest.mark.slow
def test_killed_in_the_middle(tmp_path):
    """A second call ends with the bits of a whole one, and repeats next to nothing.

    That one has no checkpoint, and the first to be killed has made all its products.
    Others repeat the block of products in which they are killed, and a fingerprint.
    """
    settings = Settings(Choice(f"{FILE}:wide"), counts=COUNTS)
    config = "--config", tmp_path / "given.toml"
    config[1].write_text(to_toml(settings, __version__))
    whole = spent(tmp_path, np.inf, *config)
    expected, made = load(tmp_path / "out"), Counter()
    for most in (0, whole.total() // 5, whole.total() // 2):
        folder = tmp_path / str(most)
        folder.mkdir()
        arguments = *config, "--checkpoint", folder / "keep"
        first = spent(folder, most, *arguments)
        assert not (folder / "out").exists()
        second = spent(folder, np.inf, *arguments)
        same(load(folder / "out"), expected)
        assert {path.name for path in folder.iterdir()} == {"keep", "log", "out"}
        assert not list((folder / "keep").glob("*.journal*"))
        made = made or first
        assert not made - (first + second)
        repeated = ((first + second) - made).total()
        assert repeated <= (BLOCK_COLUMNS + 1 if most else 0)
        assert second.total() < whole.total()


# -- the embedded problem --------------------------------------------------------------


@pytest.mark.slow
def test_embedded_problem(tmp_path, capsys):
    """The main job: no failures, and a complete folder. Took 30 s on a busy machine."""
    out = tmp_path / "report"
    start = time.perf_counter()
    status, text, _ = call(capsys, "report", "--output", out)
    assert status == 0, text
    assert time.perf_counter() - start < 240
    report = load(out)
    assert {v.status for v in report.verdicts} <= {"PASS", "WARN"}
    assert report.problem.num_params == 910
    assert _files.JSON in {path.name for path in out.iterdir()}
