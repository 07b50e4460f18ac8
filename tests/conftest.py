"""Settings of the whole suite."""

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
import torch

# The helpers that hold assertions explain a failure like a test does.
pytest.register_assert_rewrite("laws", "references", "tolerances")

# Problems are tiny: threads only wait for each other, and tests run side by side.
torch.set_num_threads(1)


def modes():
    """Return what decides, in this thread, whether torch records graphs."""
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        str(torch._C._dispatch_tls_local_include_set()),
        str(torch._C._dispatch_tls_local_exclude_set()),
    )


@pytest.fixture(autouse=True)
def as_it_was():
    """Hold every test to leaving alone what all later tests of the thread run in."""
    before = modes()
    assert before[:2] == (True, False), "a test before has left a mode of torch's open"
    yield
    after = modes()
    torch.set_grad_enabled(True)
    assert after == before, "the test left a mode of torch's open, or took one away"


@pytest.fixture
def tf32():
    """Yield what says whether torch rounds to TF32; set back at the end."""
    backends = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [backend.allow_tf32 for backend in backends]
    yield backends
    for backend, allowed in zip(backends, before, strict=True):
        backend.allow_tf32 = allowed


@pytest.fixture
def folder():
    """A folder that everybody can look into, and that is gone afterwards."""
    open_places = (
        place
        for place in map(Path, (tempfile.gettempdir(), "/var/tmp", "/dev/shm"))
        if all(p.is_dir() and p.stat().st_mode & 0o001 for p in (place, *place.parents))
    )
    if (place := next(open_places, None)) is None:
        pytest.skip("no folder for temporary files that everybody can look into")
    path = Path(tempfile.mkdtemp(dir=place))
    path.chmod(0o777)
    yield path
    for place in [path, *path.rglob("*")]:
        if not place.is_symlink():
            place.chmod(0o777)
    shutil.rmtree(path)


@pytest.fixture
def disk(tmp_path):
    """A disk of 4 MiB."""
    path = tmp_path / "disk"
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", path]
    if os.geteuid() or subprocess.run(mount, stderr=subprocess.DEVNULL).returncode:
        pytest.skip("mounting a small disk is not permitted here")
    yield path
    subprocess.run(["umount", "-l", path], check=True)
