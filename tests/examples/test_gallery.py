"""The gallery: every page passes its own checks, draws, and is listed."""

import importlib
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

from curvlinops import examples
from curvlinops.examples import _page
from curvlinops.examples.__main__ import main as list_pages
from curvlinops.examples._gallery import PAGES, line, measure
from curvlinops.examples._page import Check, Counted, command, relative_error

FOLDER = Path(examples.__file__).parent
NO_PAGES = {"functorch"}


def run(name, output, *options):
    module = importlib.import_module(f"curvlinops.examples.{name}")
    return module.main(["--output", str(output), *options])


def verdict(printed, output):
    """Check what every page prints at the end, and the figures that it names."""
    from matplotlib.image import imread

    *checks, _, last = printed.partition("\nChecks\n")[2].splitlines()
    assert checks
    assert all(check.startswith("ok     ") for check in checks)
    names = re.match(r"Figures: (.*) in .*\. Checks: all passed\.$", last)[1]
    assert {path.name for path in output.iterdir()} == set(names.split(", "))
    for path in output.iterdir():
        image = imread(path)
        assert min(image.shape[:2]) > 300
        assert len(np.unique(image[..., :3].sum(2))) > 20


@pytest.mark.parametrize("name", PAGES)
def test_quick(name, tmp_path, capsys):
    """It leaves torch's random state and its number of threads alone."""
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    assert run(name, tmp_path, "--quick") == 0
    verdict(capsys.readouterr().out, tmp_path)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads


@pytest.mark.slow
@pytest.mark.parametrize("name", PAGES)
def test_full(name, tmp_path, capsys):
    assert run(name, tmp_path) == 0
    verdict(capsys.readouterr().out, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", PAGES)
def test_quick_is_repeatable_by_seed(name, tmp_path, capsys):
    """All but seconds is the same again, and the checks hold for another seed."""

    def printed(seed):
        assert run(name, tmp_path, "--quick", "--seed", seed) == 0
        return [
            re.sub(r"\d+\.\d+( s\b|$)", "#", text)
            for text in capsys.readouterr().out.splitlines()
        ]

    assert printed("1") == printed("1")


@pytest.mark.parametrize("name", PAGES)
def test_story(name):
    """A story is told in the docstring; its first line fits into the listing."""
    module = importlib.import_module(f"curvlinops.examples.{name}")
    story = module.__doc__
    assert line(name) == story.splitlines()[0]
    assert line(name).endswith(".")
    assert f"python -m curvlinops.examples.{name}" in story
    assert len(story.splitlines()) > 10


def test_all_pages_are_listed(capsys):
    pages = {path.stem for path in FOLDER.glob("[!_]*.py")} - NO_PAGES
    assert pages == set(PAGES)
    list_pages([])
    printed = capsys.readouterr().out
    for name, seconds in PAGES.items():
        assert 0 < seconds.quick < 15
        assert 0 < seconds.full < 120
        (row,) = re.findall(rf"^{name} +(.*)$", printed, re.MULTILINE)
        assert re.match(r"[\d.]+ s +[\d.]+ s ", row)
        assert row.endswith(line(name))


def test_measure(monkeypatch, capsys):
    """The command runs the page twice, each in a process of its own."""
    commands = []

    def note(command, **options):
        commands.append(command)
        assert options["check"]

    monkeypatch.setattr(subprocess, "run", note)
    list_pages(["--measure", "natural_gradient"])
    assert re.match(
        r'"natural_gradient": Seconds\(0, 0\.\d\),$', capsys.readouterr().out
    )
    (full, quick) = commands
    start = [sys.executable, "-m", "curvlinops.examples.natural_gradient", "--output"]
    assert full[:4] == quick[:4] == start
    assert quick[-1] == "--quick"
    assert "--quick" not in full


def test_a_page_that_fails_cannot_be_measured():
    with pytest.raises(subprocess.CalledProcessError):
        measure("no_such_page")


def test_unknown_page(capsys):
    with pytest.raises(SystemExit) as caught:
        list_pages(["--measure", "nonsense"])
    assert caught.value.code == 2
    assert "no pages: nonsense; there are " in capsys.readouterr().err


# -- the frame --------------------------------------------------------------------


def tiny(value, figures=1):
    """Return a page with one check and some figures."""

    def body(page):
        page.check("something", value, 1)
        for i in range(figures):
            with page.figure(f"figure{i}", 2, 2) as ax:
                ax.plot([1, 2])

    return command(body)


@pytest.mark.parametrize(("value", "status"), [(1, 0), (1.1, 1), (np.nan, 1)])
def test_exit_status(value, status, tmp_path, capsys):
    assert tiny(value)(["--output", str(tmp_path)]) == status
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.endswith("1 of 1 checks FAILED." if status else "all passed.")


def test_page_without_figure(tmp_path):
    with pytest.raises(RuntimeError, match="at least one check and one figure"):
        tiny(0, figures=0)(["--output", str(tmp_path)])


def test_page_that_stops(tmp_path, capsys):
    def body(page):
        raise _page.Stop("Cannot go on.")

    assert command(body)(["--output", str(tmp_path)]) == 1
    assert capsys.readouterr().err == "Cannot go on.\n"


@pytest.mark.parametrize(
    ("value", "bound", "passed"),
    [(1.0, 2.0, True), (2.0, 2.0, True), (2.1, 2.0, False), (np.nan, 2.0, False)],
)
def test_check(value, bound, passed):
    check = Check("something", value, bound)
    assert check.passed is passed
    assert str(check).startswith("ok     " if passed else "FAILED ")
    assert (" <= " in str(check)) is passed


def test_relative_error():
    assert relative_error([3.0, 0.0], [0.0, 4.0]) == pytest.approx(5 / 4)
    with pytest.raises(ValueError, match=r"Shapes \(2,\) and \(1,\) differ"):
        relative_error([1.0, 2.0], [1.0])


def test_counted():
    A = Counted(np.array([[2.0, 1.0], [1.0, 3.0]]))
    assert np.array_equal(A.T @ np.eye(2), A.A)
    assert A.products == 2
    assert np.array_equal(A @ np.array([[1.0], [0.0]]), [[2.0], [1.0]])
    assert A.products == 3
