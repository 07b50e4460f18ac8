"""Journals: a long computation that was killed goes on where it was.

A journal is one append-only file of records, each with its length and its checksum. It
is created, and compacted, by writing a new file, ``fsync`` and ``rename``. Records are
appended and handed to the system at once, where they survive the end of the process;
``fsync``, for power failures, follows at most once a second. Records are of two kinds:
the state of a named section of the computation, and products made since the last state.
Algorithms that can be told their state load it; all others (SciPy's solvers) are
started again and get the recorded products replayed, which on the same machine leads
them through the same bits.
"""

from __future__ import annotations

import io
import json
import os
import struct
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from time import monotonic
from typing import Any, BinaryIO

import numpy as np
import scipy
import torch
from scipy.sparse.linalg import LinearOperator
from torch import Tensor

from curvlinops._random import Probes
from curvlinops.estimators._base import Operand, to_json, to_numpy

_HEADER = struct.Struct("<4sQI")
_MARK = b"CLOj"
#: A journal is compacted when it has more superseded bytes than live ones, and this.
_GARBAGE = 2**22

VERSIONS = {
    "numpy": np.__version__,
    "scipy": scipy.__version__,
    "torch": torch.__version__,
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
    """
    try:
        with open(path, "rb") as file:
            payload = _read_record(file)
    except FileNotFoundError:
        return {}
    return {} if payload is None else json.loads(payload)


def _read_record(file: BinaryIO) -> bytes | None:
    """Return the next record's payload, ``None`` if it is damaged or missing."""
    header = file.read(_HEADER.size)
    if len(header) < _HEADER.size:
        return None
    mark, length, checksum = _HEADER.unpack(header)
    left = os.fstat(file.fileno()).st_size - file.tell()
    if mark != _MARK or length > left:
        return None
    payload = file.read(length)
    return payload if zlib.crc32(payload) == checksum else None


def _pack(payload: bytes) -> bytes:
    return _HEADER.pack(_MARK, len(payload), zlib.crc32(payload)) + payload


def _pack_arrays(label: str, arrays: dict[str, Any]) -> bytes:
    buffer = io.BytesIO()
    named: dict[str, Any] = {name: to_numpy(array) for name, array in arrays.items()}
    np.savez(buffer, label__=np.array(label), **named)
    return buffer.getvalue()


class Journal:
    """Progress of one computation in a file that survives being killed.

    Parameters
    ----------
    path : str or path-like
        The file; created if missing, continued otherwise.
    identity : dict
        What makes the computation what it is, as JSON. A file with another identity is
        refused.
    rtol : float, optional
        To which the entries ``"fingerprint"``, lists of numbers, are compared,
        relative to the first number.

    Raises
    ------
    ValueError
        If the file belongs to another computation, or is no journal.

    Warns
    -----
    UserWarning
        If a record at the end is damaged: everything before it is used.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        identity: dict[str, Any],
        rtol: float = 0.0,
    ) -> None:
        self.path = Path(path)
        self.identity = json.loads(to_json(identity | {"versions": VERSIONS}))
        self._states: dict[str, tuple[int, int]] = {}
        self._products: list[tuple[int, int]] = []
        self._replayed = 0
        if self.path.exists() and self.path.stat().st_size:
            self._refuse_other(read_identity(self.path), rtol)
        else:
            self._write_anew([])
        self._file, self._synced = self._open(), monotonic()
        self._index()

    def _open(self) -> BinaryIO:
        return open(self.path, "r+b")

    def _refuse_other(self, stored: dict[str, Any], rtol: float) -> None:
        if not stored:
            raise ValueError(
                f"{self.path} is no checkpoint, or its very beginning is damaged. "
                "Delete it to start from the beginning."
            )
        mine = self.identity
        differing = [
            f"{key}: stored {stored.get(key)!r}, now {mine.get(key)!r}"
            for key in sorted(stored.keys() | mine.keys())
            if key != "versions" and _differ(key, stored.get(key), mine.get(key), rtol)
        ]
        if differing:
            raise ValueError(
                f"The checkpoint {self.path} belongs to another computation "
                f"({'; '.join(differing)}). Give this one another path."
            )
        if stored["versions"] != mine["versions"]:
            warnings.warn(
                f"The checkpoint {self.path} was begun with {stored['versions']}, and "
                f"goes on with {mine['versions']}: the last digits may differ.",
                stacklevel=2,
            )

    def _write_anew(self, payloads: list[bytes]) -> None:
        """Put a file with the given records in place of the present one, atomically."""
        temporary = self.path.with_name(self.path.name + ".tmp")
        with open(temporary, "wb") as file:
            for payload in [json.dumps(self.identity).encode(), *payloads]:
                file.write(_pack(payload))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self.path)
        if os.name == "posix":  # elsewhere directories cannot be opened
            directory = os.open(self.path.parent, os.O_RDONLY)
            os.fsync(directory)
            os.close(directory)

    def _index(self) -> None:
        """Find the records; cut off what follows the last good one."""
        self._states, self._products = {}, []
        self._file.seek(0)
        _read_record(self._file)
        good = start = self._file.tell()
        while (payload := _read_record(self._file)) is not None:
            with np.load(io.BytesIO(payload)) as arrays:
                self._enter(str(arrays["label__"]), start, len(payload))
            good = start = self._file.tell()
        size = self._file.seek(0, os.SEEK_END)
        if good < size:
            warnings.warn(
                f"The checkpoint {self.path} is damaged or cut off at byte {good} of "
                f"{size}; going on from the last good state.",
                stacklevel=2,
            )
            self._file.truncate(good)
        self._file.seek(good)

    def _enter(self, label: str, start: int, length: int) -> None:
        if label == "product":
            self._products.append((start, length))
        else:
            self._states[label] = (start, length)
            self._products, self._replayed = [], 0

    def _payload(self, place: tuple[int, int]) -> bytes:
        self._file.seek(place[0] + _HEADER.size)
        return self._file.read(place[1])

    def _arrays(self, place: tuple[int, int]) -> dict[str, np.ndarray]:
        with np.load(io.BytesIO(self._payload(place))) as arrays:
            return {name: arrays[name] for name in arrays.files if name != "label__"}

    def _append(self, label: str, arrays: dict[str, Any]) -> None:
        payload = _pack_arrays(label, arrays)
        start = self._file.seek(0, os.SEEK_END)
        self._file.write(_pack(payload))
        self._file.flush()
        if monotonic() - self._synced > 1:
            self._sync()
        self._enter(label, start, len(payload))

    def _sync(self) -> None:
        os.fsync(self._file.fileno())
        self._synced = monotonic()

    def save(self, section: str, **arrays: Any) -> None:
        """Record the state of a section; products recorded before are dropped."""
        self._append(section, arrays)
        live = sum(length for _, length in self._states.values())
        if self._file.tell() > 2 * live + _GARBAGE:
            kept = [self._payload(place) for place in self._states.values()]
            self._file.close()
            self._write_anew(kept)
            self._file = self._open()
            self._index()

    def load(self, section: str) -> dict[str, np.ndarray] | None:
        """Return the state saved last for a section, ``None`` if there is none."""
        place = self._states.get(section)
        return None if place is None else self._arrays(place)

    @property
    def replays(self) -> bool:
        """Whether the next product is a recorded one."""
        return self._replayed < len(self._products)

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
        checksum = zlib.crc32(np.ascontiguousarray(X).tobytes())
        if self.replays:
            record = self._arrays(self._products[self._replayed])
            if int(record["operand"]) != checksum:
                raise ValueError(
                    f"The checkpoint {self.path} belongs to another computation: "
                    f"product {self._replayed + 1} was made with another vector. Give "
                    "this computation another path."
                )
            self._replayed += 1
            return record["product"]
        result = compute()
        self._append("product", {"operand": np.int64(checksum), "product": result})
        self._replayed += 1
        return result

    def close(self) -> None:
        """Close the file, which stays; a finished computation is returned from it."""
        self._sync()
        self._file.close()


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
    path : str or path-like
        The checkpoint.
    task : str, optional
        Name of the computation; a checkpoint of another one is refused.

    Notes
    -----
    SciPy's solvers expose no state. But they are deterministic: given the same products
    they do the same. After a restart this operator returns the recorded ones, each
    checked against its operand, and goes on with new ones. One product is spent on the
    fingerprint of the matrix. The file grows by one vector per product.

    Raises
    ------
    ValueError
        If the checkpoint belongs to another matrix or another computation.

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
    if journal.replays:
        operand.num_products += X.shape[1]
    product = journal.product(
        to_numpy(X.T), lambda: to_numpy(operand.multiply(X, adjoint))
    )
    return torch.from_numpy(product).to(operand.device)
