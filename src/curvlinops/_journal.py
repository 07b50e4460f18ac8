"""Journals: a long computation that was killed goes on where it was.

A journal is an SQLite database of three tables: what the computation is, the last state
of each of its named sections, and the products made since the last state. Algorithms
that can be told their state load it; all others (SciPy's solvers) are started again and
get the recorded products replayed, which on the same machine leads them through the
same bits.
"""

from __future__ import annotations

import ctypes
import io
import json
import os
import sqlite3
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from math import inf
from pathlib import Path
from time import monotonic
from typing import Any
from weakref import WeakSet

import numpy as np
import scipy
import torch
from scipy.sparse.linalg import LinearOperator
from torch import Tensor

from curvlinops._counts import optional_count
from curvlinops._files import regular_file
from curvlinops._locks import new_lock
from curvlinops._operand import Operand, to_json, to_numpy
from curvlinops._random import Probes

VERSIONS = {p.__name__: str(p.__version__) for p in (np, scipy, torch)}

_TABLES = [
    f"CREATE TABLE {name} (key, part INTEGER, checksum INTEGER, payload BLOB, "
    "PRIMARY KEY (key, part)) WITHOUT ROWID"
    for name in ("identity", "products", "states")
]
#: Locks the file until it is closed. 64 MiB may wait beside it for `fsync`.
_SETTINGS = """
    PRAGMA locking_mode = EXCLUSIVE; PRAGMA synchronous = NORMAL;
    PRAGMA wal_autocheckpoint = 16384; BEGIN EXCLUSIVE; COMMIT
"""
#: Bytes of a record that go into one row, of which SQLite takes 1e9 at most.
_ROW_BYTES = 2**28
#: What the first version of the format, which was no database, begins with.
_FIRST_FORMAT = b"CLOj"

#: From SQLite's result codes to what is the matter, and the cure.
_UNWRITABLE = "cannot be written here. Copy it elsewhere, with the `-wal` beside it"
_FAULTS = {
    sqlite3.SQLITE_BUSY: "is in use by another process, or elsewhere in this one. Wait "
    "for its end, or give another path",
    sqlite3.SQLITE_FULL: "has no room. Make some and start again: nothing is lost",
    sqlite3.SQLITE_IOERR: "cannot be read or written. Make room, or copy it elsewhere",
    sqlite3.SQLITE_READONLY: _UNWRITABLE,
    sqlite3.SQLITE_CANTOPEN: _UNWRITABLE,
}


def matrix_fingerprint(operand: Operand) -> list[float]:
    r"""Return four numbers that tell one matrix from another.

    The norm of :math:`y = A x` for a fixed pseudo-random :math:`x`, and three inner
    products of :math:`y` with fixed vectors of signs. Costs one product.
    """
    x = Probes(operand.dim, "rademacher", 0, operand.dtype, operand.device).block(0, 1)
    y = operand.multiply(x)
    signs = Probes(len(y), "rademacher", 1, operand.dtype, operand.device).block(0, 3)
    numbers = [torch.linalg.vector_norm(y), *(signs.mH @ y).flatten().real]
    return [float(number) for number in numbers]


def parameters_fingerprint(operand: Operand) -> str | None:
    """Return the digest of a model's parameters, ``None`` for other matrices."""
    digest = getattr(operand.matrix, "parameters_fingerprint", None)
    return None if digest is None else digest()


def _differ(key: str, a: Any, b: Any, rtol: float) -> bool:
    if key != "fingerprint" or a is None:
        return bool(a != b)
    return max(abs(x - y) for x, y in zip(a, b, strict=True)) > rtol * abs(a[0])


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Raise SQLite's errors with the file, the cause and the cure."""
    try:
        yield
    except sqlite3.ProgrammingError:
        raise  # the caller's, as after `close`
    except sqlite3.Error as error:
        code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT) & 255
        if code in _FAULTS:
            text = f"The checkpoint {path} {_FAULTS[code]} ({error})."
            raise OSError(text) from error
        text = f"{path} is no checkpoint, or a damaged one ({error})"
        if code == sqlite3.SQLITE_NOTADB:
            with open(path, "rb") as file:  # SQLite holds no lock on it
                if file.read(len(_FIRST_FORMAT)) == _FIRST_FORMAT:
                    text = f"The checkpoint {path} has format 1, of earlier versions"
        cure = "Delete it to start from the beginning, or give another path."
        raise ValueError(f"{text}. {cure}") from error


def _open(path: Path) -> tuple[sqlite3.Connection, dict[str, Any]]:
    """Open and lock a file, and return what it is of: nothing, if it was not begun.

    Where nothing can be written, it is opened for reading.
    """
    target = regular_file(path)
    target.parent.stat()  # raises if there is none
    uri = f"{target.as_uri()}?mode=rwc"
    with _explained(path):  # which waits for whoever reads the identity
        db = sqlite3.connect(uri, timeout=0.1, check_same_thread=False, uri=True)
        try:
            db.executescript(_SETTINGS)
            tables = db.execute("SELECT sql FROM sqlite_master ORDER BY name")
            if not (found := [sql for (sql,) in tables]):
                return db, {}
            if found != _TABLES or not (identity := _get(db, "identity", "")):
                raise sqlite3.DatabaseError("other tables, or a wrong checksum")
            return db, json.loads(identity)
        except BaseException:
            db.close()
            raise


def _checksum(table: str, key: str | int, payload: Any) -> int:
    return zlib.crc32(payload, zlib.crc32(f"{table} {key!r}".encode()))


def _put(db: sqlite3.Connection, table: str, key: str | int, payload: Any) -> None:
    db.execute(f"DELETE FROM {table} WHERE key = ?", (key,))
    checksum = _checksum(table, key, payload)
    for part, start in enumerate(range(0, len(payload), _ROW_BYTES)):
        row = (key, part, checksum, payload[start : start + _ROW_BYTES])
        db.execute(f"INSERT INTO {table} VALUES (?, ?, ?, ?)", row)


def _get(db: sqlite3.Connection, table: str, key: str | int) -> bytes | None:
    """Return a record: ``None`` if there is none, and nothing if it is damaged."""
    columns = "checksum, CAST(payload AS BLOB)"
    query = f"SELECT {columns} FROM {table} WHERE key = ? ORDER BY part"
    rows = db.execute(query, (key,)).fetchall()
    payload = b"".join(part or b"" for _, part in rows)
    intact = {checksum for checksum, _ in rows} == {_checksum(table, key, payload)}
    return (payload if intact else b"") if rows else None


def _packed(arrays: dict[str, Any]) -> memoryview:
    """Return arrays, with their names first, as bytes."""
    buffer = io.BytesIO()
    for array in ([*arrays], *arrays.values()):
        np.save(buffer, to_numpy(array), allow_pickle=False)
    return buffer.getbuffer()


def read_identity(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return what a journal says of its computation; empty if there is none.

    Parameters
    ----------
    path : str or path-like
        Of the journal.

    Returns
    -------
    dict
        Name of the task, its settings, seed, class, shape, dtype and fingerprint of the
        matrix, and the versions of the packages.

    Raises
    ------
    ValueError
        If the file is damaged, or no journal of this format.
    OSError
        If the file is in use by another process, or cannot be read.
    """
    if not os.path.exists(path):
        return {}
    db, identity = _open(Path(path))
    db.close()
    return identity


def _refuse_other(
    path: Path, stored: dict[str, Any], mine: dict[str, Any], rtol: float
) -> None:
    differing = [
        f"{key}: stored {stored.get(key)!r}, now {mine.get(key)!r}"
        for key in sorted(stored.keys() | mine.keys())
        if key != "versions" and _differ(key, stored.get(key), mine.get(key), rtol)
    ]
    if differing:
        raise ValueError(
            f"The checkpoint {path} belongs to another computation "
            f"({'; '.join(differing)}). Give this one another path."
        )
    if stored["versions"] != mine["versions"]:
        warnings.warn(
            f"The checkpoint {path} was begun with {stored['versions']}, and goes on "
            f"with {mine['versions']}: the last digits may differ.",
            stacklevel=3,
        )


@dataclass(frozen=True)
class Checkpoint:
    """The file of a checkpoint, and how large it may grow.

    Parameters
    ----------
    path : str or path-like
        The file.
    max_bytes : int, optional
        Bytes of products that are recorded between two states, by default all. Further
        ones are not, with a warning, and are computed again after a restart.

    Notes
    -----
    Stands wherever a checkpoint's path does. A product takes the bytes of its vectors
    and of a description, some hundred, rounded up to pages: 8 KiB more at most.
    Algorithms that save states drop the products before them; SciPy's solvers, which
    save none, keep all, one vector per iteration and right-hand side. The file also
    holds the last state, and beside it lies one of at most 64 MiB and a record while it
    is open.

    Examples
    --------
    >>> import tempfile, numpy as np
    >>> from curvlinops import CGInverseLinearOperator
    >>> from curvlinops.estimators import Checkpoint
    >>> file = Checkpoint(tempfile.mkdtemp() + "/cg.journal", max_bytes=2**30)
    >>> A, b = np.diag([1.0, 2.0, 3.0]), np.ones(3)
    >>> bool(np.allclose(CGInverseLinearOperator(A, checkpoint=file) @ (A @ b), b))
    True
    """

    path: str | os.PathLike[str]
    max_bytes: int | None = None

    def __post_init__(self) -> None:
        """Refuse what is no number of bytes."""
        optional_count("max_bytes", self.max_bytes)

    def __fspath__(self) -> str:
        """Return the path."""
        return os.fspath(self.path)

    def __str__(self) -> str:
        """Return the path."""
        return str(self.path)


class Journal:
    """Progress of one computation in a file that survives being killed.

    Parameters
    ----------
    path : str or path-like
        The file; created if missing, continued otherwise. A :class:`Checkpoint` bounds
        its growth.
    identity : dict
        What makes the computation what it is, as JSON. A file with another identity is
        refused.
    rtol : float, optional
        To which the entries ``"fingerprint"``, lists of numbers, are compared,
        relative to the first number.

    Raises
    ------
    ValueError
        If the file belongs to another computation, is damaged, or no journal of this
        format.
    OSError
        If the file is in use by another process (or elsewhere in this one), or cannot
        be read; later, if the disk is full, or something is to be recorded where
        nothing can be written. What was recorded before is kept.

    Warns
    -----
    UserWarning
        If a record is not what was written: it is made again. If versions differ. If
        there are as many products as the checkpoint allows.

    Notes
    -----
    While the file is open it is locked. A file of the same name with ``-wal`` lies
    beside it, and stays if the process is killed: together they are the journal.
    :meth:`close` leaves one file, from which a finished computation is also read where
    nothing can be written.

    Whatever was recorded survives the end of the process. ``fsync`` follows once a
    second, hence a power failure costs the records of the last second. The file grows
    by every product until a state is saved, and takes the next ones into that space;
    the one beside it grows to 64 MiB and one record.

    To be used by one thread at a time, and only by the process that opened it, not by
    one that is forked from it.
    """

    def __init__(
        self, path: str | os.PathLike[str], identity: dict[str, Any], rtol: float = 0.0
    ) -> None:
        self.path = Path(path)
        limit = path.max_bytes if isinstance(path, Checkpoint) else None
        self._limit = inf if limit is None else limit
        #: Bytes of products since the last state, recorded or not.
        self._bytes, self._warned = 0, False
        self.identity = json.loads(to_json(identity | {"versions": VERSIONS}))
        self._lock, self._process = new_lock(), os.getpid()
        self._position, self._synced = 0, monotonic()
        self._db, stored = _open(self.path)
        try:
            if stored:
                _refuse_other(self.path, stored, self.identity, rtol)
                with self._use() as db:
                    total = "SELECT total(length(payload)) FROM products"
                    self._bytes = int(db.execute(total).fetchone()[0])
            else:
                with self._use() as db:
                    db.execute("BEGIN")
                    for table in _TABLES:
                        db.execute(table)
                    _put(db, "identity", "", json.dumps(self.identity).encode())
        except BaseException:
            self._db.close()
            raise
        _OPENED.add(self)

    @contextmanager
    def _use(self) -> Iterator[sqlite3.Connection]:
        """Hand out the database for one transaction."""
        if self._process != os.getpid():
            raise RuntimeError(
                f"The checkpoint {self.path} is in use by the process that this one "
                "was forked from. Give another path here."
            )
        with self._lock, _explained(self.path), self._db as db:
            yield db

    def _load(self, table: str, key: str | int) -> dict[str, np.ndarray] | None:
        with self._use() as db:
            payload = _get(db, table, key)
        if payload == b"":
            warnings.warn(
                f"The checkpoint {self.path} is damaged: {table} {key!r} has a wrong "
                "checksum. It is computed again.",
                stacklevel=3,
            )
            with self._use() as db:  # what follows it
                db.execute("DELETE FROM products WHERE key >= ?", (self._position,))
        if not payload:
            return None
        buffer = io.BytesIO(payload)
        return {str(name): np.load(buffer) for name in np.load(buffer)}

    def _save(self, table: str, key: str | int, payload: memoryview) -> None:
        with self._use() as db:
            db.execute("PRAGMA journal_mode = WAL")
            if table == "states":
                db.execute("DELETE FROM products")
            _put(db, table, key, payload)
        if monotonic() > self._synced + 1:
            with self._use() as db:
                db.execute("PRAGMA wal_checkpoint")
            self._synced = monotonic()

    def save(self, section: str, **arrays: Any) -> None:
        """Record the state of a section; products recorded before are dropped."""
        self._save("states", section, _packed(arrays))
        self._position = self._bytes = 0

    def load(self, section: str) -> dict[str, np.ndarray] | None:
        """Return the state saved last for a section, ``None`` if there is none."""
        return self._load("states", section)

    def product(self, X: np.ndarray, compute: Callable[[], np.ndarray]) -> np.ndarray:
        """Return a product: the next recorded one, or a computed one, then recorded.

        Parameters
        ----------
        X : numpy.ndarray
            The operand.
        compute : callable
            Makes the product.

        Raises
        ------
        ValueError
            If the recorded product was made with another operand.
        """
        operand = zlib.crc32(np.ascontiguousarray(X).data)
        record = self._load("products", self._position)
        if record is None:
            record = {"operand": np.array(operand), "product": compute()}
            self._record(record)
        elif record["operand"] != operand:
            raise ValueError(
                f"The checkpoint {self.path} belongs to another computation: product "
                f"{self._position + 1} was made with another vector. Give this "
                "computation another path."
            )
        self._position += 1
        return record["product"]

    def _record(self, record: dict[str, np.ndarray]) -> None:
        """Record the next product, if the checkpoint may take it."""
        payload = _packed(record)
        self._bytes += payload.nbytes
        if self._bytes <= self._limit:
            self._save("products", self._position, payload)
        elif not self._warned:
            self._warned = True
            warnings.warn(
                f"The checkpoint {self.path} has as many products as "
                f"`max_bytes={self._limit}` allows, {self._position}: further ones are "
                "not recorded, and are made again after a restart. For more, pass a "
                "larger number.",
                stacklevel=3,
            )

    def close(self) -> None:
        """Close the file, which stays; a finished computation is returned from it."""
        if self._process == os.getpid():
            with self._lock, closing(self._db) as db, suppress(sqlite3.Error):
                # Without room two files stay, as after a kill.
                db.execute("PRAGMA journal_mode = DELETE")


_OPENED: WeakSet[Journal] = WeakSet()


def _leave_to_parent() -> None:
    """Keep a forked process from closing, even at its exit, what its parent uses."""
    for journal in _OPENED:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(journal._db))


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_to_parent)


def open_journal(
    path: str | os.PathLike[str] | None,
    operand: Operand,
    task: str,
    settings: dict[str, Any],
) -> Journal | None:
    """Open the journal of one task on one matrix; ``None`` without a path.

    Costs one product, for the matrix's fingerprint. An operator that chooses between
    several ways to multiply is asked to keep to one: its method ``fix_route(route)``,
    if it has one, gets the stored name (``None`` at first) and returns the name.
    :func:`close_journal` lets it choose again.
    """
    if path is None:
        return None
    stored = read_identity(path)
    fix_route = getattr(operand.matrix, "fix_route", None)
    identity = {
        "task": task,
        **settings,
        "class": operand.name,
        "shape": list(operand.shape),
        "dtype": str(operand.dtype),
        "route": None if fix_route is None else fix_route(stored.get("route")),
        "parameters": parameters_fingerprint(operand),
        "fingerprint": matrix_fingerprint(operand),
    }
    return Journal(path, identity, rtol=100 * torch.finfo(operand.dtype).eps)


def close_journal(journal: Journal | None, operand: Operand) -> None:
    """Close a journal, if there is one, and leave the operator its choice of route."""
    if journal is not None:
        journal.close()
        if free_route := getattr(operand.matrix, "free_route", None):
            free_route()


class JournalledOperator(LinearOperator):
    """A SciPy operator whose products are recorded, and replayed after a restart.

    Parameters
    ----------
    A : LinearOperator, array, sparse matrix, or Tensor
        The matrix.
    path : str, path-like, or Checkpoint
        The checkpoint.
    task : str, optional
        Name of the computation; a checkpoint of another one is refused.

    Notes
    -----
    SciPy's solvers expose no state. But they are deterministic: given the same products
    they do the same. After a restart this operator returns the recorded ones, each
    checked against its operand, and goes on with new ones. One product is spent on the
    fingerprint of the matrix. The file grows by one vector per product;
    :class:`~curvlinops.estimators.Checkpoint` in place of the path bounds that.

    Raises
    ------
    ValueError
        If the checkpoint belongs to another matrix or another computation, or is
        damaged.
    OSError
        If it is in use by another process, or cannot be read or written.

    Examples
    --------
    >>> import tempfile, numpy as np
    >>> from scipy.sparse.linalg import cg
    >>> A, b = np.diag([1.0, 2.0, 3.0]), np.ones(3)
    >>> path = tempfile.mkdtemp() + "/cg.journal"
    >>> with JournalledOperator(A, path) as J:
    ...     x, info = cg(J, b)
    >>> with JournalledOperator(A, path) as J:  # all products come from the file
    ...     again, info = cg(J, b)
    ...     products = J.num_products
    >>> bool((again == x).all()), products
    (True, 1)
    """

    def __init__(
        self, A: Any, path: str | os.PathLike[str], task: str = "products"
    ) -> None:
        self._operand = Operand(A)
        dtype = to_numpy(torch.empty(0, dtype=self._operand.dtype)).dtype
        super().__init__(dtype, self._operand.shape)
        journal = open_journal(path, self._operand, task, {})
        assert journal is not None
        self._journal = journal

    @property
    def num_products(self) -> int:
        """Products computed, not replayed, including the fingerprint's."""
        return self._operand.num_products

    def _multiply(self, X: np.ndarray, adjoint: bool) -> np.ndarray:
        def compute() -> np.ndarray:
            block = torch.as_tensor(np.array(X, dtype=self.dtype))
            block = block.reshape(len(X), -1).to(self._operand.device)
            return to_numpy(self._operand.multiply(block, adjoint)).reshape(
                -1, *X.shape[1:]
            )

        return self._journal.product(X, compute)

    def _matvec(self, x: np.ndarray) -> np.ndarray:
        return self._multiply(x, adjoint=False)

    _matmat = _matvec

    def _rmatvec(self, x: np.ndarray) -> np.ndarray:
        return self._multiply(x, adjoint=True)

    _rmatmat = _rmatvec

    def __enter__(self) -> JournalledOperator:
        """Return the operator."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Close the checkpoint's file."""
        close_journal(self._journal, self._operand)


def journalled_multiply(
    journal: Journal | None, operand: Operand, X: Tensor, adjoint: bool = False
) -> Tensor:
    """Multiply, through a journal if there is one."""
    if journal is None:
        return operand.multiply(X, adjoint)
    products = operand.num_products + X.shape[1]
    product = journal.product(
        to_numpy(X.T), lambda: to_numpy(operand.multiply(X, adjoint))
    )
    operand.num_products = products  # recorded ones count as well
    return torch.from_numpy(product).to(operand.device)
