"""Files of journals: whatever happens to them, no wrong number comes out."""

import os
import resource
import signal
import sqlite3
import stat
import subprocess
import sys
import textwrap
import threading
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

import curvlinops
from curvlinops import CGInverseLinearOperator, _journal
from curvlinops._journal import Checkpoint, Journal, read_identity
from faults import forked, unprivileged

IDENTITY = {"task": "chain", "seed": 3}
SECTIONS, LENGTH = 12, 5


def multiply(x):
    return np.cos(3 * x) + np.roll(x, 1)


def chain(journal=None, told=None, sections=SECTIONS, size=500):
    """A recurrence with a state after every fifth product; calls `told` after each."""
    state = None if journal is None else journal.load("chain")
    first, x = (0, np.arange(size) / size) if state is None else state.values()
    for i in range(int(first), sections):
        for _ in range(LENGTH):
            x, computed = _product(journal, x)
            if told and computed:
                told()
        if journal is not None and i < sections - 1:  # products stay after the last
            journal.save("chain", i=i + 1, x=x)
    return x


def _product(journal, x):
    if journal is None:
        return multiply(x), True
    new = []
    y = journal.product(x, lambda: new.append(1) or multiply(x))
    return y, bool(new)


def finished(path, **options):
    """Return the journal's result, and how many products it took."""
    products = []
    journal = Journal(path, IDENTITY)
    try:
        return chain(journal, lambda: products.append(1), **options), len(products)
    finally:
        journal.close()


def interrupted(path, products=8):
    """Leave the journal of a process that was killed after so many products."""
    read, write = os.pipe()

    def work():
        chain(Journal(path, IDENTITY), lambda: os.write(write, b"."))

    with forked(work):
        while len(os.read(read, 1)) and (products := products - 1):
            pass
    os.close(read)
    os.close(write)


# -- killed ----------------------------------------------------------------------------


@pytest.mark.parametrize("size", [10, 30_000])
def test_nothing_is_lost_by_kill_9(tmp_path, size):
    """At any moment: while the file is opened, and in the middle of writing."""
    path, rng = tmp_path / "j", np.random.default_rng(0)
    told, killed = b"", 0
    while not told.endswith(b"!"):
        read, write = os.pipe()

        def work(write=write):
            journal = Journal(path, IDENTITY)
            chain(journal, lambda: os.write(write, b"."), size=size)
            journal.close()
            os.write(write, b"!")

        with forked(work) as pid:
            os.close(write)
            for _ in range(rng.integers(8)):
                told += os.read(read, 1)
            time.sleep(rng.exponential(0.0005))
            os.kill(pid, signal.SIGKILL)
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        told += os.read(read, 1000)
        os.close(read)
        assert code in (0, -signal.SIGKILL)
        killed += code != 0
    result, products = finished(path, size=size)
    assert np.array_equal(result, chain(size=size))
    assert killed and products == 0
    # What was told of is not made again; at every kill one more may be recorded.
    assert SECTIONS * LENGTH - killed <= told.count(b".") <= SECTIONS * LENGTH
    assert os.listdir(tmp_path) == ["j"]


@pytest.mark.parametrize("products", [1, LENGTH, LENGTH + 2])
def test_goes_on_after_the_last_product(tmp_path, products):
    interrupted(tmp_path / "j", products)
    assert finished(tmp_path / "j")[1] <= SECTIONS * LENGTH - products
    assert finished(tmp_path / "j")[1] == 0
    assert os.listdir(tmp_path) == ["j"]


# -- damaged ---------------------------------------------------------------------------


def outcomes(path, content, places):
    """Flip bits; count the results that are right, warned of, or errors."""
    want, counts = chain(sections=4), dict.fromkeys(["right", "warned", "error"], 0)
    for place, bit in places:
        damaged = bytearray(content)
        damaged[place] ^= 1 << int(bit)
        path.write_bytes(damaged)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                result, _ = finished(path, sections=4)
            except (OSError, ValueError) as error:
                assert str(path.parent) in str(error)
                counts["error"] += 1
                continue
        assert np.array_equal(result, want), (place, bit)
        assert all(str(path) in str(one.message) for one in caught)
        counts["warned" if caught else "right"] += 1
    return counts


def test_a_flipped_bit_gives_no_wrong_number(tmp_path):
    path, rng = tmp_path / "j", np.random.default_rng(0)
    finished(path, sections=4)
    content = path.read_bytes()
    places = [*range(108), *rng.integers(len(content), size=150)]  # the header first
    counts = outcomes(path, content, [(place, rng.integers(8)) for place in places])
    assert min(counts.values()) > 9, counts


def test_a_flipped_bit_beside_a_killed_process(tmp_path):
    """What comes after it is made again: SQLite checks what lies beside the file."""
    path, rng = tmp_path / "killed" / "j", np.random.default_rng(0)
    path.parent.mkdir()
    interrupted(path, 8)
    beside = path.with_name("j-wal")
    content, wal = path.read_bytes(), beside.read_bytes()
    assert wal
    for place in rng.integers(len(wal), size=30):
        damaged = bytearray(wal)
        damaged[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(content)
        beside.write_bytes(damaged)
        assert np.array_equal(finished(path)[0], chain())


@pytest.mark.parametrize("content", ["zeroblob(9)", "NULL", "'text'", "7", "x''"])
@pytest.mark.parametrize(("table", "again"), [("products", 1), ("states", SECTIONS)])
def test_a_damaged_record_is_reported_and_made_again(tmp_path, table, again, content):
    path = tmp_path / "j"
    finished(path)
    with sqlite3.connect(path) as db:
        db.execute(f"UPDATE {table} SET payload = {content}")
    db.close()
    with pytest.warns(UserWarning, match=rf"j is damaged: {table} .* checksum"):
        result, products = finished(path)
    assert np.array_equal(result, chain())
    assert products == again * LENGTH
    assert finished(path)[1] == 0


def test_a_record_in_the_place_of_another_is_found(tmp_path):
    finished(tmp_path / "j")
    with sqlite3.connect(tmp_path / "j") as db:
        db.execute("UPDATE products SET key = 9 WHERE key = 1")
        db.execute("UPDATE products SET key = 1 WHERE key = 2")
    db.close()
    with pytest.warns(UserWarning, match="products 1 has a wrong checksum"):
        assert np.array_equal(finished(tmp_path / "j")[0], chain())


def test_cut_off_or_foreign_files_are_refused_by_name(tmp_path):
    path = tmp_path / "j"
    finished(path)
    content = path.read_bytes()
    for part in (99, 4096, len(content) // 2, len(content) - 4096):
        path.write_bytes(content[:part])
        with pytest.raises(ValueError, match=r"j is no checkpoint, or a damaged one"):
            read_identity(path)
    path.write_bytes(content + b"junk")  # which is none of the database
    assert finished(path)[1] == 0
    path.write_bytes(b"something else, which is a text of some length" * 9)
    with pytest.raises(ValueError, match=r"file is not a database.*Delete it"):
        finished(path)
    path.write_bytes(b"CLOj" + bytes(500))
    with pytest.raises(ValueError, match=r"j has format 1, of earlier.*Delete it"):
        finished(path)


def test_a_database_of_something_else_is_left_alone(tmp_path):
    path = tmp_path / "j"
    with sqlite3.connect(path) as db:
        db.execute("CREATE TABLE states (a)")
        db.execute("INSERT INTO states VALUES (1)")
    db.close()
    content = path.read_bytes()
    with pytest.raises(ValueError, match=r"other tables"):
        finished(path)
    assert path.read_bytes() == content


def test_objects_are_neither_written_nor_read(tmp_path):
    journal = Journal(tmp_path / "j", IDENTITY)
    with pytest.raises(ValueError, match="allow_pickle=False"):
        journal.save("objects", x=np.array([{}]))
    assert journal.load("objects") is None
    journal.close()


# -- places ----------------------------------------------------------------------------


def test_what_is_no_regular_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link").symlink_to("fifo")
    for place in (tmp_path, tmp_path / "fifo", tmp_path / "link", Path(os.devnull)):
        mode = place.stat().st_mode
        for opened in (read_identity, finished):
            with pytest.raises(ValueError, match=f"{place} is no regular file"):
                opened(place)
        assert place.stat().st_mode == mode
    assert stat.S_ISCHR(os.stat(os.devnull).st_mode)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        finished(tmp_path / "nowhere" / "j")


def test_links_are_followed(tmp_path):
    (tmp_path / "there").mkdir()
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "there" / "j ?#%20é")
    interrupted(link)
    assert link.is_symlink() and read_identity(link)["seed"] == 3
    finished(link)
    assert finished(tmp_path / "there" / "j ?#%20é")[1] == 0
    assert len(os.listdir(tmp_path / "there")) == 1


@pytest.mark.parametrize(("mode", "of_folder"), [(0o444, 0o777), (0o666, 0o555)])
def test_a_finished_journal_is_read_where_nothing_can_be_written(
    folder, mode, of_folder
):
    path = folder / "j"
    finished(path)
    content = path.read_bytes()
    path.chmod(mode)
    folder.chmod(of_folder)
    with unprivileged():
        result, products = finished(path)
        assert np.array_equal(result, chain()) and products == 0
        with pytest.raises(OSError, match="j cannot be written here"):
            finished(path, sections=SECTIONS + 1)
        if of_folder == 0o555:
            with pytest.raises(OSError, match="new cannot be written here"):
                finished(folder / "new")
    assert path.read_bytes() == content and os.listdir(folder) == ["j"]


def test_an_interrupted_journal_says_so_where_nothing_can_be_written(folder):
    path = folder / "j"
    interrupted(path)
    for place in folder.iterdir():
        place.chmod(0o444)
    folder.chmod(0o555)
    with unprivileged(), pytest.raises(OSError, match=r"j cannot be.*elsewhere"):
        finished(path)


@pytest.mark.parametrize("room", [0, 2**14, 2**17, 2**19])
def test_a_full_disk_costs_nothing_that_was_recorded(disk, room):
    path, filler, told = disk / "j", disk / "filler", []
    filler.write_bytes(bytes(2**22 - room))
    with pytest.raises(OSError, match=r"j has no room.*disk is full"):
        journal = Journal(path, IDENTITY)
        try:
            chain(journal, lambda: told.append(1), size=3_000)
        finally:
            journal.close()
    filler.unlink()
    result, products = finished(path, size=3_000)
    assert np.array_equal(result, chain(size=3_000))
    assert products + len(told) == SECTIONS * LENGTH
    assert len(told) > 2 or room < 2**17
    assert sorted(os.listdir(disk)) == ["j"]


def test_a_limit_on_the_size_of_files(tmp_path):
    def work():
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
        journal = Journal(tmp_path / "j", IDENTITY)
        with pytest.raises(OSError, match="j cannot be read or written"):
            chain(journal, lambda: told.write(b"."), size=3_000)
        told.flush()
        journal.close()

    with open(tmp_path / "told", "wb") as told, forked(work) as pid:
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    made = (tmp_path / "told").stat().st_size
    result, products = finished(tmp_path / "j", size=3_000)
    assert np.array_equal(result, chain(size=3_000))
    assert made and products == SECTIONS * LENGTH - made


# -- processes and threads -------------------------------------------------------------


def test_a_second_user_is_refused_at_once(tmp_path):
    path, (read, write) = tmp_path / "j", os.pipe()

    def work():
        journal = Journal(path, IDENTITY)
        chain(journal)
        os.write(write, b".")
        time.sleep(100)

    def refused():
        for opened in (read_identity, finished):
            start = time.monotonic()
            with pytest.raises(OSError, match="j is in use by another process"):
                opened(path)
            assert time.monotonic() - start < 5

    with forked(work):
        os.read(read, 1)
        refused()
    assert finished(path)[1] == 0  # it was killed
    journal = Journal(path, IDENTITY)
    refused()
    with forked(refused) as pid:
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    refused()  # still
    journal.close()
    assert finished(path)[1] == 0
    os.close(read)
    os.close(write)


FORKING = """
    import os, signal, sys, time
    import numpy as np
    from curvlinops._journal import Journal

    journal = Journal(sys.argv[1], {"task": "fork"})
    x = np.arange(9.0)
    journal.product(x, lambda: x + 1)
    if os.fork() == 0:
        try:
            journal.product(x, lambda: x + 2)
        except RuntimeError as error:
            print(error, flush=True)
        journal.close()
        sys.exit()  # in the ordinary way: all objects are taken down
    os.wait()
    for i in range(2, 5):
        journal.product(x, lambda: x + i)
    journal.save("state", x=x)
    journal.product(x, lambda: 7 * x)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_forked_process_leaves_the_journal_to_its_parent(tmp_path):
    path = tmp_path / "j"
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(FORKING), path],
        env=os.environ | {"PYTHONPATH": str(Path(curvlinops.__file__).parents[1])},
        capture_output=True,
        text=True,
    )
    assert run.returncode == -signal.SIGKILL, run.stderr
    assert "j is in use by the process that this one was forked from" in run.stdout
    journal, x = Journal(path, {"task": "fork"}), np.arange(9.0)
    assert np.array_equal(journal.load("state")["x"], x)
    assert np.array_equal(journal.product(x, None), 7 * x)
    journal.close()


def test_threads_take_turns(tmp_path):
    journal, results = Journal(tmp_path / "j", IDENTITY), []
    for _ in range(2):
        thread = threading.Thread(target=lambda: results.append(chain(journal)))
        thread.start()
        thread.join()
        journal.save("chain", i=0, x=np.arange(500) / 500)
    assert all(np.array_equal(result, chain()) for result in results)
    journal.close()
    assert len(results) == 2 and os.listdir(tmp_path) == ["j"]


# -- content ---------------------------------------------------------------------------

ARRAYS = {
    "scalar": np.float64(np.pi),
    "count": 3,
    "bool": np.array([True, False]),
    "complex": np.array([[1 + 2j], [np.nan]]),
    "fortran": np.asfortranarray(np.arange(6, dtype=np.float32).reshape(2, 3)),
    "empty": np.zeros((0, 4)),
    "tensor": torch.arange(3),
    "file": np.array([-0.0, np.inf]),
}


@pytest.mark.parametrize("bytes_of_a_row", [7, 2**28])
def test_arrays_come_back_as_they_were(tmp_path, monkeypatch, bytes_of_a_row):
    monkeypatch.setattr(_journal, "_ROW_BYTES", bytes_of_a_row)
    path = tmp_path / "j"
    journal = Journal(path, IDENTITY)
    journal.save("arrays", **{"more": 1} | ARRAYS)
    journal.save("arrays", **ARRAYS)  # in place of the first
    journal.save("none")
    journal.close()
    journal = Journal(path, IDENTITY)
    assert journal.load("none") == {} and journal.load("other") is None
    loaded = journal.load("arrays")
    journal.close()
    assert [*loaded] == [*ARRAYS]
    for name, array in ARRAYS.items():
        array = np.asarray(array)
        assert loaded[name].dtype == array.dtype
        assert loaded[name].shape == array.shape
        assert loaded[name].tobytes("A") == array.tobytes("A")
        assert loaded[name].flags.f_contiguous == array.flags.f_contiguous
    if bytes_of_a_row == 7:
        with sqlite3.connect(path) as db:
            last = "SELECT max(part) FROM states WHERE key = 'arrays'"
            db.execute(f"DELETE FROM states WHERE part = ({last})")
        db.close()
        journal = Journal(path, IDENTITY)
        with pytest.warns(UserWarning, match="states 'arrays' has a wrong checksum"):
            assert journal.load("arrays") is None
        journal.close()


def test_space_is_used_again(tmp_path):
    path = tmp_path / "j"
    finished(path, sections=3, size=20_000)
    few = path.stat().st_size
    path.unlink()
    finished(path, sections=20, size=20_000)
    assert path.stat().st_size <= 1.1 * few < 2.2e6


def test_growth_is_bounded(tmp_path):
    """What is beyond the bound is made again; numbers and bits stay the same."""
    path, most = tmp_path / "j", 4 * 8 * 500 - 100
    bounded = Checkpoint(path, max_bytes=most)
    with pytest.warns(UserWarning, match=r"j has as many products as .*allows, 3: "):
        result, products = finished(bounded)
    assert np.array_equal(result, chain()) and products == SECTIONS * LENGTH
    with pytest.warns(UserWarning, match="j has as many products as"):
        result, products = finished(bounded)  # of the last section, two are lost
    assert np.array_equal(result, chain()) and products == LENGTH - 3
    result, products = finished(path)  # now all are kept
    assert np.array_equal(result, chain()) and products == LENGTH - 3
    assert finished(bounded)[1] == 0  # what is there is used
    unbounded = tmp_path / "all"
    finished(unbounded)
    assert finished(Checkpoint(str(unbounded), max_bytes=0))[1] == 0


@pytest.mark.parametrize("most", [0, 8 * 500 - 1])
def test_products_need_not_be_recorded(tmp_path, most):
    bounded = Checkpoint(tmp_path / "j", most)
    for products in (SECTIONS * LENGTH, LENGTH):  # states are kept
        with pytest.warns(UserWarning, match=r"allows, 0: further"):
            assert finished(bounded)[1] == products
    with pytest.raises(ValueError, match="`max_bytes` must be a whole number"):
        Checkpoint(tmp_path / "j", 0.5)
    assert str(bounded) == os.fspath(bounded) == str(tmp_path / "j")


def test_solvers_take_bounded_checkpoints(tmp_path):
    d, b = np.linspace(1, 50, 300), np.ones(300)
    want = CGInverseLinearOperator(np.diag(d)) @ b
    few = Checkpoint(tmp_path / "cg", max_bytes=10 * 8 * 300)
    with pytest.warns(UserWarning, match="cg has as many products"):
        result = CGInverseLinearOperator(np.diag(d), checkpoint=few) @ b
    assert np.array_equal(result, want)
    size = os.path.getsize(tmp_path / "cg")
    assert size < 10 * (8 * 300 + 8192)
    CGInverseLinearOperator(np.diag(d), checkpoint=str(few)) @ b
    assert os.path.getsize(tmp_path / "cg") > 2 * size


def test_other_versions_are_warned_of(tmp_path, monkeypatch):
    finished(tmp_path / "j")
    monkeypatch.setitem(_journal.VERSIONS, "numpy", "9.9")
    with pytest.warns(UserWarning, match=r"begun with .*goes on with .*9\.9"):
        assert finished(tmp_path / "j")[1] == 0


def test_a_file_without_content_is_begun(tmp_path):
    (tmp_path / "j").touch()
    assert read_identity(tmp_path / "j") == {} == read_identity(tmp_path / "none")
    assert finished(tmp_path / "j")[1] == SECTIONS * LENGTH
    assert read_identity(tmp_path / "j").items() >= IDENTITY.items()
    assert not (tmp_path / "none").exists()
