"""Two distributions install the import name ``curvlinops``: mixtures are refused."""

import importlib.metadata
import os
import shutil
import subprocess
import sys
import time
import warnings
from functools import partial
from pathlib import Path

import pytest

from curvlinops import _conflicts
from curvlinops._conflicts import FOREIGN_FILE, OURS, THEIRS, check

PACKAGE = Path(_conflicts.__file__).parent


def install(site: Path, name: str, *, editable: bool = False, record: bool = True):
    """Write what an installer leaves of ``name`` in the folder ``site``."""
    info = site / f"{name.replace('-', '_')}-9.9.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\n")
    if record:
        files = "__editable__.pth,," if editable else "curvlinops/__init__.py,,"
        (info / "RECORD").write_text(f"{files}\n{info.name}/METADATA,,\n")
    if not editable:
        (site / "curvlinops").mkdir(exist_ok=True)
        (site / "curvlinops" / "__init__.py").touch()
    return site


def search(*sites: Path):
    """Look for distributions in the given folders only."""
    return partial(importlib.metadata.distributions, path=[str(s) for s in sites])


@pytest.mark.parametrize("record", [True, False])
def test_both_in_one_folder_is_refused(tmp_path, record):
    install(tmp_path, OURS)
    install(tmp_path, THEIRS, record=record)
    with pytest.raises(ImportError) as caught:
        check(tmp_path / "curvlinops", search(tmp_path))
    message = str(caught.value)
    assert str(tmp_path / "curvlinops") in message
    assert f"pip uninstall -y {THEIRS} {OURS}\n" in message
    assert f"pip install {OURS}\n" in message


def test_a_symlinked_folder_is_the_same_folder(tmp_path):
    site = install(install(tmp_path / "site", OURS), THEIRS)
    (tmp_path / "link").symlink_to(site)
    with pytest.raises(ImportError, match="two distributions"):
        check(tmp_path / "link" / "curvlinops", search(site))


def test_left_over_files_are_refused(tmp_path):
    site = install(tmp_path, OURS)
    (site / "curvlinops" / FOREIGN_FILE).touch()
    with pytest.raises(ImportError, match="two distributions"):
        check(site / "curvlinops", search(site))


def test_the_left_over_file_is_none_of_ours():
    assert not (PACKAGE / FOREIGN_FILE).exists()


@pytest.mark.parametrize("editable", [OURS, THEIRS])
def test_an_editable_install_beside_the_other_warns(tmp_path, editable):
    site = tmp_path / "site"
    for name in OURS, THEIRS:
        install(site, name, editable=name == editable)
    running = (tmp_path / "src" if editable == OURS else site) / "curvlinops"
    with pytest.warns(ImportWarning, match=f"pip uninstall -y {THEIRS}"):
        check(running, search(site))


@pytest.mark.parametrize("names", [(), (OURS,)])
def test_alone_is_silent(tmp_path, names):
    for name in names:
        install(tmp_path, name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check(tmp_path / "curvlinops", search(tmp_path))


def test_an_environment_over_another_is_silent(tmp_path):
    inner, outer = install(tmp_path / "in", OURS), install(tmp_path / "out", THEIRS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check(inner / "curvlinops", search(inner, outer))


def test_the_check_is_cheap():
    def once() -> float:
        start = time.perf_counter()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ImportWarning)
            check(PACKAGE, importlib.metadata.distributions)
        return time.perf_counter() - start

    assert min(once() for _ in range(5)) < 2e-3


def test_import_of_a_mixture_stops_before_anything_else(tmp_path):
    site = install(install(tmp_path, OURS), THEIRS)
    shutil.copytree(PACKAGE, site / "curvlinops", dirs_exist_ok=True)
    code = (
        "import sys\n"
        "try:\n"
        "    import curvlinops\n"
        "except ImportError as error:\n"
        "    assert 'torch' not in sys.modules, 'imported torch first'\n"
        "    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert f"pip uninstall -y {THEIRS} {OURS}" in done.stdout
