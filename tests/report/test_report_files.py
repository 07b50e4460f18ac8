"""Reports are what was saved; what is no report says so."""

import json
import os
from dataclasses import fields, is_dataclass, replace

import numpy as np
import pytest

from curvlinops.report import _files
from curvlinops.report._contents import VERSION, Number
from curvlinops.report._files import ReportError, load, save
from report_samples import sample


@pytest.fixture(scope="module")
def report():
    return sample()


def assert_same(a, b, place=""):
    assert type(a) is type(b), place
    if is_dataclass(a):
        for f in fields(a):
            assert_same(getattr(a, f.name), getattr(b, f.name), f"{place}.{f.name}")
    elif isinstance(a, tuple):
        assert len(a) == len(b), place
        for i, pair in enumerate(zip(a, b, strict=True)):
            assert_same(*pair, f"{place}[{i}]")
    elif isinstance(a, dict):
        assert list(a) == list(b), place
        for key in a:
            assert_same(a[key], b[key], f"{place}[{key}]")
    elif isinstance(a, np.ndarray):
        assert a.dtype == b.dtype, place
        np.testing.assert_array_equal(a, b, place)
    else:
        assert a == b or (a != a and b != b), place


def test_round_trip(report, tmp_path):
    """Everything comes back, down to the bit, odd numbers included."""
    odd = Number(float("inf"), float("nan"), 1, False)
    matrices = (replace(report.matrices[0], condition_number=odd), report.matrices[1])
    report = replace(report, matrices=matrices, baseline=None)
    save(report, tmp_path)
    for path in (tmp_path, tmp_path / "report.json"):
        assert_same(load(path), report)
    assert {p.name for p in tmp_path.iterdir()} == {"report.json", "report.npz"}
    strict = (tmp_path / "report.json").read_text()
    assert json.loads(strict, parse_constant=pytest.fail)["version"] == VERSION


def test_arrays_are_readable_without_this_package(report, tmp_path):
    save(report, tmp_path)
    content = json.loads((tmp_path / "report.json").read_text())
    place = content["matrices"][0]["density"]["linear"]["grid"]
    with np.load(tmp_path / "report.npz") as arrays:
        grid = arrays[place]
    np.testing.assert_array_equal(grid, report.matrices[0].density.linear.grid)
    assert (
        content["matrices"][0]["top"]["values"][0] == report.matrices[0].top.values[0]
    )


def spoil(folder, **changes):
    path = folder / "report.json"
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not ...}))


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda f: (f / "report.json").unlink(), "report.json cannot be read: No such"),
        (lambda f: (f / "report.npz").unlink(), "report.npz cannot be read: No such"),
        (
            lambda f: (f / "report.json").write_text("no"),
            "is no report: it is not JSON",
        ),
        (lambda f: (f / "report.json").write_text("[]"), "is no report: it lacks"),
        (lambda f: spoil(f, format="other"), "is no report: it lacks"),
        (lambda f: spoil(f, version=99), "version 99 .* reads version 1.*0.1.0"),
        (lambda f: spoil(f, matrices=...), "is damaged: 'matrices' is missing"),
        (lambda f: spoil(f, matrices=3), "is damaged: 3 is no list"),
        (lambda f: spoil(f, problem={"name": 3}), "is damaged"),
        (lambda f: (f / "report.npz").write_bytes(b"x"), "not the file that"),
    ],
)
def test_what_is_no_report(report, tmp_path, harm, message):
    save(report, tmp_path)
    assert load(tmp_path).problem.name == "digits"
    harm(tmp_path)
    with pytest.raises(ReportError, match=message):
        load(tmp_path)


def test_pairs_of_different_runs(report, tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    save(report, tmp_path / "a")
    save(sample(1), tmp_path / "b")
    (tmp_path / "b" / "report.npz").replace(tmp_path / "a" / "report.npz")
    with pytest.raises(ReportError, match="is not the file that"):
        load(tmp_path / "a")


def test_writing_is_all_or_nothing(tmp_path, monkeypatch):
    """A failure in the middle leaves the old content, and nothing beside it."""
    path = tmp_path / "file"
    _files.write(path, b"old")
    assert path.stat().st_mode & 0o777 == 0o666 & ~_umask()

    def fail(*args):
        raise OSError("no room")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no room"):
        _files.write(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_intervals():
    """Few samples widen; nothing random does not."""
    assert Number(3.0).interval() == (3.0, 3.0)
    few, many = Number(0.0, 1.0, 5), Number(0.0, 1.0, 10**6)
    assert many.half_width() == pytest.approx(1.96, abs=1e-3)
    assert few.half_width() > 1.5 * many.half_width()
