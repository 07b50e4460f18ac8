"""Files of arrays: written in whole or not at all, and read only if they are whole."""

import errno
import io
import json
import os
import pickle
import resource
import signal
import stat
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from curvlinops import EKFACLinearOperator, KFACLinearOperator, _files
from curvlinops._files import ArrayFile, replacing
from curvlinops.estimators import (
    SpectralDensity,
    Track,
    lanczos_approximate_spectrum,
)
from curvlinops.kfac import load as load_factors
from faults import forked, unprivileged

FILE = ArrayFile("figures", "test-figures", 3)
ABOUT = {"name": "é", "numbers": [1, 0.1, None]}
ARRAYS = {
    "x": np.arange(6.0).reshape(2, 3),
    "file": np.array([True, False]),
    "scalar": np.float32(np.pi),
    "complex/..": np.array([[1 + 2j], [np.nan]]),
    "empty": np.zeros((0, 4), np.int16),
    "text": np.array(["a", "bcd"]),
    "strided": np.arange(9)[::-2],
    "swapped": np.arange(3, dtype=">i4"),
    "fortran": np.asfortranarray(np.arange(6, dtype=np.float32).reshape(2, 3)),
}


def network(width=0, seed=0):
    torch.manual_seed(seed)
    model = nn.Linear(2, 2)
    if width:
        model = nn.Sequential(nn.Linear(2, width), nn.Tanh(), nn.Linear(width, 2))
    model.double()
    data = [(torch.rand(5, 2).double(), torch.tensor([0, 1, 1, 0, 1]))]
    return model, nn.CrossEntropyLoss(), dict(model.named_parameters()), data


def factored(cls):
    def make(size):
        return cls(*network(20 * (size - 1)), fisher_type="type-2")

    def numbers(path):
        matrix = load_factors(path)
        return matrix @ np.ones(matrix.shape[1])

    return make, numbers


def density(size):
    D = np.diag(np.linspace(-1, 1, 20 * size))
    return lanczos_approximate_spectrum(D, 4, num_points=8 * size, rng=0)


def density_numbers(path):
    result = SpectralDensity.load(path)
    parts = [result.nodes, result.weights, result.density, [result.dim]]
    return np.concatenate([np.ravel(part) for part in parts])


def table(size):
    rows = np.arange(4 * size)
    return Track({"step": rows, "trace": 0.1 * rows, "file": rows.astype("U4")})


def table_numbers(path):
    columns = Track.load(path).columns
    return np.concatenate([x.astype(float) for x in columns.values()])


#: What makes something to save, by its size, and what reads numbers from its file.
KINDS = {
    "density": (density, density_numbers),
    "track": (table, table_numbers),
    "kfac": factored(KFACLinearOperator),
    "ekfac": factored(EKFACLinearOperator),
}


@pytest.fixture(params=KINDS)
def kind(request):
    return KINDS[request.param]


# -- content ---------------------------------------------------------------------------


def test_arrays_come_back_as_they_were(tmp_path):
    path = tmp_path / "f"
    FILE.write(path, ABOUT | {"tensor": torch.tensor([2.5])}, ARRAYS)
    about, arrays = FILE.read(path)
    assert about == ABOUT | {"tensor": [2.5]}
    assert [*arrays] == [*ARRAYS]
    for name, array in ARRAYS.items():
        array = np.asarray(array)
        assert arrays[name].dtype == array.dtype
        assert arrays[name].shape == array.shape
        assert arrays[name].tobytes() == array.tobytes()
        if array.flags.forc:
            assert arrays[name].flags.f_contiguous == array.flags.f_contiguous
        assert arrays[name].flags.writeable
    content = path.read_bytes()
    FILE.write(path, ABOUT | {"tensor": torch.tensor([2.5])}, ARRAYS)
    assert path.read_bytes() == content
    with np.load(path) as other:  # as other programs read it
        assert np.array_equal(other["x"], ARRAYS["x"])


def test_a_large_array_is_read_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(_files, "_PIECE", 1000)
    x = np.random.default_rng(0).standard_normal((7, 333))
    FILE.write(tmp_path / "f", {}, {"x": x})
    assert np.array_equal(FILE.read(tmp_path / "f")[1]["x"], x)


def test_what_is_saved_is_loaded(tmp_path, kind):
    make, numbers = kind
    made = make(1)
    made.save(tmp_path / "a")
    made.save(tmp_path / "b")
    assert np.array_equal(numbers(tmp_path / "a"), numbers(tmp_path / "b"))
    if isinstance(made, KFACLinearOperator):
        want = made @ np.ones(made.shape[1])
        assert np.array_equal(numbers(tmp_path / "a"), want)


def test_objects_are_not_written(tmp_path):
    (tmp_path / "t").write_text("earlier")
    mixed = Track({"step": np.array([1, None])})
    with pytest.raises(TypeError, match=r"'step' holds object.*track.*astype"):
        mixed.save(tmp_path / "t")
    assert (tmp_path / "t").read_text() == "earlier"


# -- damaged, cut, foreign -------------------------------------------------------------


def outcome(read, path, content, want):
    """Return how a file with some content is refused: ``None`` if it is right."""
    path.write_bytes(content)
    try:
        numbers = read(path)
    except ValueError as error:
        assert str(error).startswith(str(path)), error
        return str(error)
    assert numbers.dtype == want.dtype and numbers.shape == want.shape
    assert np.array_equal(numbers, want, equal_nan=True)
    return None


def outcomes_of_flips(read, path, places):
    """Flip bits, and count how many of the files are right all the same."""
    content, want = path.read_bytes(), read(path)
    right = 0
    for place in places(len(content)):
        damaged = bytearray(content)
        damaged[place // 8] ^= 1 << place % 8
        right += outcome(read, path, damaged, want) is None
    path.write_bytes(content)
    return right


def test_every_flipped_bit_is_found(tmp_path):
    """Or is none of the content: in the zip's records, of 320 bytes in all."""
    path = tmp_path / "f"
    FILE.write(path, {"a": 1}, {"x": np.arange(3.0), "y": np.arange(2)})
    right = outcomes_of_flips(
        lambda path: np.concatenate([*FILE.read(path)[1].values()]),
        path,
        lambda size: range(8 * size),
    )
    assert 0 < right < 8 * 320


def test_flipped_bits_of_every_kind(tmp_path, kind):
    make, numbers = kind
    make(1).save(tmp_path / "f")
    rng = np.random.default_rng(0)
    outcomes_of_flips(
        numbers, tmp_path / "f", lambda size: rng.integers(8 * size, size=400)
    )


@pytest.mark.slow
def test_all_flipped_bits_of_every_kind(tmp_path, kind):
    make, numbers = kind
    make(1).save(tmp_path / "f")
    outcomes_of_flips(numbers, tmp_path / "f", lambda size: range(8 * size))


def test_cut_files_are_refused(tmp_path, kind):
    make, numbers = kind
    path = tmp_path / "f"
    make(1).save(path)
    content, want = path.read_bytes(), numbers(path)
    for size in [*range(0, len(content), 97), len(content) - 1]:
        text = outcome(numbers, path, content[:size], want)
        assert "cut off or damaged" in text or "no zip file" in text


def test_foreign_files_are_refused(tmp_path, kind):
    make, numbers = kind
    path, own = tmp_path / "f", tmp_path / "own"
    make(1).save(own)
    want = numbers(own)

    def refused(cause):
        text = outcome(numbers, path, path.read_bytes(), want)
        assert cause in text, text

    path.write_text("something else")
    refused("is no zip file")
    with open(path, "wb") as file:
        np.savez(file, nodes=np.ones(3))
    refused("another program has written it, or an earlier version")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("curvlinops.json", json.dumps({"format": 3}))
    refused("its format is 3, not 'curvlinops-")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("curvlinops.json", "[1]")
    refused("damaged")
    zipfile.ZipFile(path, "w").close()
    refused("is no zip file")
    for other, (make_other, _) in KINDS.items():
        if KINDS[other] is not kind and "kfac" not in other:
            make_other(1).save(path)
            refused(f"its format is 'curvlinops-{other}'")
    with pytest.raises(FileNotFoundError, match="none"):
        numbers(tmp_path / "none")


def test_other_versions_are_refused(tmp_path):
    ArrayFile("figures", "test-figures", 2).write(tmp_path / "f", {}, ARRAYS)
    with pytest.raises(ValueError, match=r"f has version 2 .*reads version 3\. Read"):
        FILE.read(tmp_path / "f")


class Trap:
    def __reduce__(self):
        return os.mkdir, (str(Trap.path),)


def handmade(path, layout, *members, compression=zipfile.ZIP_STORED):
    """Write a file that says what we want."""
    header = {"format": FILE.format, "version": 3, "about": {}, "arrays": layout}
    header["checksum"] = _files._checksum(header, {})
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("curvlinops.json", json.dumps(header))
        for i, member in enumerate(members):
            archive.writestr(f"{i}.npy", member)


def as_npy(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def test_nothing_is_executed(tmp_path):
    Trap.path, path = tmp_path / "executed", tmp_path / "f"
    pickled = as_npy(np.array([Trap()]))
    for dtype in ("|O", "<f8", "|V8"):
        handmade(path, {"x": [dtype, [1], False]}, pickled)
        with pytest.raises(ValueError, match="f is cut off or damaged"):
            FILE.read(path)
    path.write_bytes(pickle.dumps(Trap()))
    with pytest.raises(ValueError, match="f holds no figures: it is no zip file"):
        FILE.read(path)
    assert not Trap.path.exists()
    pickle.loads(pickle.dumps(Trap()))
    assert Trap.path.exists()


@pytest.mark.parametrize(
    "layout",
    [
        {"x": ["<f8", [1 << 50], False]},
        {"x": ["<f8", [-3], False]},
        {"x": ["<f8", [3]]},
        {"x": ["<f8", [3], True]},
        {"x": ["<f8", [2], False]},
        {"x": ["<i8", [3], False]},
        {"x": ["<f8", [3, 1], False]},
        {"x": "<f8"},
        {},
        {"x": ["<f8", [3], False], "y": ["<f8", [3], False]},
        [1],
    ],
)
def test_a_layout_that_is_not_that_of_the_arrays(tmp_path, layout):
    handmade(tmp_path / "f", layout, as_npy(np.arange(3.0)))
    with pytest.raises(ValueError, match="f is cut off or damaged"):
        FILE.read(tmp_path / "f")


def test_nothing_is_unpacked(tmp_path):
    handmade(tmp_path / "f", {}, b"0" * 10**6, compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(ValueError, match="has a wrong size"):
        FILE.read(tmp_path / "f")


# -- written in whole or not at all ----------------------------------------------------


def test_a_full_disk_leaves_the_earlier_file(disk, kind):
    make, numbers = kind
    path, large = disk / "f", make(30)
    make(1).save(path)
    content, want = path.read_bytes(), numbers(path)
    (disk / "filler").write_bytes(bytes(2**22 - 8192))
    for name in ("f", "new"):
        with pytest.raises(OSError, match=rf"{name} was not written.*Make room") as got:
            large.save(disk / name)
        assert got.value.errno == errno.ENOSPC
    assert path.read_bytes() == content and np.array_equal(numbers(path), want)
    assert sorted(os.listdir(disk)) == ["f", "filler"]


def test_a_limit_on_the_size_of_files(tmp_path):
    path = tmp_path / "f"
    table(1).save(path)
    content = path.read_bytes()

    def work():
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
        with pytest.raises(OSError, match=r"f was not written.*Make room"):
            table(1000).save(path)

    with forked(work) as pid:
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert path.read_bytes() == content and os.listdir(tmp_path) == ["f"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(errno.EIO, "bad disk")])
@pytest.mark.parametrize(
    "struck", ["os.fsync", "os.chmod", "os.replace", "np.lib.format.write_array"]
)
def test_an_interrupt_leaves_the_earlier_file(tmp_path, monkeypatch, struck, error):
    path = tmp_path / "f"
    FILE.write(path, {}, ARRAYS)
    content = path.read_bytes()

    def strike(*_, **__):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(f"curvlinops._files.{struck}", strike)
        with pytest.raises((KeyboardInterrupt, OSError), match=r"^$|f was not written"):
            FILE.write(path, {}, ARRAYS | {"x": np.ones(3)})
    assert path.read_bytes() == content and os.listdir(tmp_path) == ["f"]


@pytest.mark.parametrize("kills", [12, pytest.param(150, marks=pytest.mark.slow)])
def test_kill_9_leaves_a_whole_file(tmp_path, kills):
    """At any moment, a file is the earlier one or the later one."""
    path, rng = tmp_path / "f", np.random.default_rng(0)
    FILE.write(path, {}, {"x": np.full(40_000, 0)})

    def work():
        for i in range(10**6):
            FILE.write(path, {}, {"x": np.full(40_000, i)})

    seen = set()
    for _ in range(kills):
        with forked(work) as pid:
            time.sleep(0.01 + rng.exponential(0.01))
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        x = FILE.read(path)[1]["x"]
        assert x.shape == (40_000,) and (x == x[0]).all()
        seen.add(int(x[0]))
    assert len(seen) > 1
    beside = set(os.listdir(tmp_path)) - {"f"}
    assert all(name.startswith(".f.") and name.endswith(".tmp") for name in beside)


def test_permissions_stay(tmp_path):
    path, plain = tmp_path / "f", tmp_path / "plain"
    table(1).save(path)
    plain.touch()
    assert path.stat().st_mode == plain.stat().st_mode
    path.chmod(0o604)
    table(2).save(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o604
    assert len(Track.load(path)) == 8


@pytest.mark.parametrize(("mode", "of_folder"), [(0o444, 0o777), (0o666, 0o555)])
def test_where_nothing_can_be_written(folder, mode, of_folder):
    path = folder / "f"
    table(1).save(path)
    content = path.read_bytes()
    path.chmod(mode)
    folder.chmod(of_folder)
    with unprivileged():
        with pytest.raises(PermissionError, match=r"f was not written.*where you may"):
            table(2).save(path)
        assert len(Track.load(path)) == 4
    assert path.read_bytes() == content and os.listdir(folder) == ["f"]


def test_links_are_followed(tmp_path):
    (tmp_path / "there").mkdir()
    link, file = tmp_path / "link", tmp_path / "there" / "f"
    link.symlink_to(file)
    for size in (1, 2):  # a new file, and one in place of an earlier one
        table(size).save(link)
        assert link.is_symlink() and file.is_file() and not file.is_symlink()
        assert len(Track.load(link)) == len(Track.load(file)) == 4 * size
    assert os.listdir(tmp_path / "there") == ["f"]


def test_what_is_no_regular_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    for place in (tmp_path, tmp_path / "fifo", Path(os.devnull)):
        mode = place.stat().st_mode
        for work in (table(1).save, table(1).to_csv, Track.load):
            with pytest.raises(ValueError, match=f"{place} is no regular file"):
                work(place)
        assert place.stat().st_mode == mode
    with pytest.raises(FileNotFoundError, match="nowhere"):
        table(1).save(tmp_path / "nowhere" / "f")


def test_tables_as_text_are_written_in_whole(tmp_path, monkeypatch):
    path = tmp_path / "t.csv"
    table(1).to_csv(path)
    assert path.read_bytes() == (
        b"step,trace,file\r\n0,0.0,0\r\n1,0.1,1\r\n2,0.2,2\r\n"
        b"3,0.30000000000000004,3\r\n"
    )
    with (
        pytest.raises(OSError, match=r"t\.csv was not written"),
        monkeypatch.context() as m,
    ):
        m.setattr(os, "fsync", lambda _: os.stat(tmp_path / "none"))
        table(2).to_csv(path)
    assert path.read_bytes().startswith(b"step,trace,file\r\n0,0.0,0\r\n1,")
    assert os.listdir(tmp_path) == ["t.csv"]


def test_long_names(tmp_path):
    path = tmp_path / ("é" * 120)
    with replacing(path) as file:
        file.write(b"x")
    assert path.read_bytes() == b"x"
