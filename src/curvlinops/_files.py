"""Files that are written in whole or not at all, and that prove what they are.

A file of arrays is an ``npz`` file, which NumPy and other programs read, with one more
member that says what the file is: name and version of its format, what its writer tells
about it, name, dtype, shape and order of every array, and a checksum of all that and of
the arrays. Nothing in it is ever executed.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from math import prod
from pathlib import Path
from secrets import token_hex
from typing import IO, Any, BinaryIO
from zipfile import ZIP_STORED, BadZipFile, ZipFile, ZipInfo

import numpy as np

from curvlinops._memory import raise_if_out_of_memory
from curvlinops._operand import to_json

#: The member of a file that says what the others are.
_ABOUT = "curvlinops.json"
#: What every zip file with something in it begins with.
_ZIP = b"PK\3\4"
#: Bytes that are read or written at once.
_PIECE = 1 << 22
_ELSEWHERE = "Give a path where you may write"
_ROOM = "Make room, or give another path"
#: From the number of a system's error to the cure.
_CURES = {
    errno.ENOSPC: _ROOM,
    errno.EDQUOT: _ROOM,
    errno.EFBIG: _ROOM,
    errno.EACCES: _ELSEWHERE,
    errno.EPERM: _ELSEWHERE,
    errno.EROFS: _ELSEWHERE,
}


def regular_file(path: str | os.PathLike[str]) -> Path:
    """Return what a path leads to, links followed, if a file can be there.

    Raises
    ------
    ValueError
        If something else is there: a folder, a device, a pipe.
    """
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_file():
        raise ValueError(f"{os.fspath(path)} is no regular file. Give another path.")
    return target


def unfinished(path: Path) -> str:
    """Return how the names of files begin that may yet replace one, see `replacing`."""
    return f".{path.name[:40]}."


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Write a file, which takes the place of an earlier one once it is complete.

    Until then, whatever happens, the earlier one stays as it was: errors, a full disk,
    an interrupt, the end of the process, a power failure.

    Parameters
    ----------
    path : str or path-like
        The file. A link is followed. Permissions of an earlier file are kept.

    Yields
    ------
    file
        To be written to, in bytes.

    Raises
    ------
    ValueError
        If something that is no regular file is there.
    OSError
        If the file cannot be written; the message says why.

    Notes
    -----
    It is written beside the earlier one, as ``.NAME.*.tmp``, and removed if that fails.
    Only a process that is killed leaves it behind. So there must be room for both.
    """
    name, target = os.fspath(path), regular_file(path)
    beside = target.with_name(f"{unfinished(target)}{token_hex(8)}.tmp")
    try:
        try:
            earlier = target.stat() if target.exists() else None
            if earlier:  # it may be protected, though its folder is not
                os.close(os.open(target, os.O_WRONLY))
            with open(beside, "xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            if earlier:
                with suppress(OSError, AttributeError):  # another owner's, or Windows
                    os.chown(beside, earlier.st_uid, earlier.st_gid)
                os.chmod(beside, stat.S_IMODE(earlier.st_mode))
            os.replace(beside, target)
        except BaseException:
            with suppress(OSError):
                beside.unlink()
            raise
    except OSError as error:
        number = error.errno or errno.EIO
        raise OSError(
            number,
            f"{name} was not written, whatever was there before is as it was "
            f"({error.strerror or error}). {_CURES.get(number, 'Give another path')}.",
        ) from error
    with suppress(OSError, AttributeError):  # not everywhere can folders be opened
        folder = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


@dataclass(frozen=True)
class ArrayFile:
    """A kind of file with arrays in it.

    Parameters
    ----------
    content : str
        What is in it, for messages.
    format : str
        Its name, in the file.
    version : int
        Which other versions of the package may not be able to read.
    """

    content: str
    format: str
    version: int

    def write(
        self,
        path: str | os.PathLike[str],
        about: Mapping[str, Any],
        arrays: Mapping[str, Any],
    ) -> None:
        """Write arrays, and what is to be known of them.

        Parameters
        ----------
        path : str or path-like
            The file, which replaces an earlier one once it is complete.
        about : mapping
            As JSON, numbers of NumPy and torch included.
        arrays : mapping of str to array_like
            By name.

        Raises
        ------
        TypeError
            If an array has something else in it than numbers or text.
        ValueError
            If something that is no regular file is there.
        OSError
            If the file cannot be written. What was there before is as it was.
        """
        plain = {name: _in_one_piece(np.asarray(x)) for name, x in arrays.items()}
        for name, array in plain.items():
            if not _is_plain(array.dtype):
                raise TypeError(
                    f"{name!r} holds {array.dtype}, but a file of {self.content} holds "
                    "numbers and text: convert it, e.g. with `.astype(float)`."
                )
        layout = {
            name: [a.dtype.str, list(a.shape), not a.flags.c_contiguous]
            for name, a in plain.items()
        }
        header = {
            "format": self.format,
            "version": self.version,
            "about": json.loads(to_json(dict(about))),
            "arrays": layout,
        }
        header["checksum"] = _checksum(header, plain)
        with replacing(path) as file, ZipFile(file, "w", ZIP_STORED) as archive:
            archive.writestr(ZipInfo(_ABOUT), json.dumps(header, indent=1))
            for name, array in plain.items():
                info = ZipInfo(f"{name}.npy")
                with archive.open(info, "w", force_zip64=True) as member:
                    np.lib.format.write_array(member, array, allow_pickle=False)

    def read(
        self, path: str | os.PathLike[str]
    ) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """Return what :meth:`write` was given, exactly.

        Raises
        ------
        ValueError
            If the file is another one, of another version, cut off, or damaged.
        OSError
            If there is no such file, or it cannot be read.
        """
        name, target = os.fspath(path), regular_file(path)
        with open(target, "rb") as file:
            if file.read(len(_ZIP)) != _ZIP:
                raise ValueError(
                    f"{name} holds no {self.content}: it is no zip file, or its "
                    "beginning is damaged. Give one that `save` has written."
                )
            with self._guarded(name):
                archive = ZipFile(file)
                members = archive.infolist()
                _require_sizes(members, os.fstat(file.fileno()).st_size)
                is_ours = members[0].filename == _ABOUT
                header = json.loads(archive.read(members[0])) if is_ours else {}
                its_format, version = header.get("format"), header.get("version")
            self._require(name, its_format, version)
            with self._guarded(name):
                checksum, layout = header.pop("checksum"), header["arrays"]
                arrays = {}
                for info, key in zip(members[1:], layout, strict=True):
                    with archive.open(info) as member:
                        arrays[key] = _array(member, info.file_size, *layout[key])
                if checksum != _checksum(header, arrays):
                    raise BadZipFile("the checksum is another one")
        return header["about"], arrays

    def _require(self, name: str, its_format: Any, version: Any) -> None:
        """Raise unless a file is of this format and version."""
        if its_format is None:
            raise ValueError(
                f"{name} holds no {self.content}: another program has written it, or "
                "an earlier version of this one. Give one that `save` has written, or "
                f"make the {self.content} anew."
            )
        if its_format != self.format:
            raise ValueError(
                f"{name} holds no {self.content}: its format is {its_format!r}, not "
                f"{self.format!r}."
            )
        if version != self.version:
            raise ValueError(
                f"{name} has version {version!r} of the format {self.format!r}, and "
                f"this package reads version {self.version}. Read it with the package "
                f"that wrote it, or make the {self.content} anew."
            )

    @contextmanager
    def _guarded(self, name: str) -> Iterator[None]:
        """Say that a file is damaged, wherever its numbers lead to."""
        try:
            yield
        except Exception as error:
            raise_if_out_of_memory(error)
            if isinstance(error, OSError) and error.errno != errno.EINVAL:
                raise
            raise ValueError(
                f"{name} is cut off or damaged ({error}): nothing of it is used. Take "
                f"a copy of it, or make the {self.content} anew."
            ) from error


def _require_sizes(members: list[ZipInfo], size: int) -> None:
    """Raise if a member is larger than the file, or was packed by another program."""
    for info in members:
        if info.compress_type != ZIP_STORED or info.file_size > size:
            raise BadZipFile(f"{info.filename} has a wrong size")


def _is_plain(dtype: np.dtype[Any]) -> bool:
    return dtype.kind in "biufcSU" and dtype.itemsize > 0


def _checksum(header: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.sha256(json.dumps(header).encode())
    for array in arrays.values():
        flat = array.reshape(-1, order="C" if array.flags.c_contiguous else "F")
        digest.update(flat.view(np.uint8).data)
    return digest.hexdigest()


def _in_one_piece(array: np.ndarray) -> np.ndarray:
    """Return an array by rows or by columns, as it was if it was so.

    Products with either differ in their last bits.
    """
    return array if array.flags.forc else np.asarray(array, order="C")


def _array(
    member: IO[bytes], size: int, dtype: str, shape: list[int], by_columns: bool
) -> np.ndarray:
    """Read one array, of which everything is known, from a member of a size."""
    kind = np.dtype(dtype)
    nbytes = kind.itemsize * prod(shape)
    if not (_is_plain(kind) and min(shape, default=0) >= 0 and nbytes <= size):
        raise BadZipFile("the layout is another one")
    read_header = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }[np.lib.format.read_magic(member)]
    if read_header(member) != (tuple(shape), by_columns, kind):
        raise BadZipFile("an array has another shape or dtype")
    buffer = np.empty(nbytes, np.uint8)
    for start in range(0, nbytes, _PIECE):
        stop = min(start + _PIECE, nbytes)
        while start < stop:
            if not (count := member.readinto(buffer[start:stop].data)):  # type: ignore[attr-defined]
                raise EOFError("an array ends too early")
            start += count
    if member.read(1):
        raise BadZipFile("an array goes on after its end")
    return buffer.view(kind).reshape(shape, order="F" if by_columns else "C")
