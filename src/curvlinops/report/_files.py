"""Reading and writing reports: JSON for numbers and texts, npz for arrays."""

from __future__ import annotations

import hashlib
import io
import json
import math
import types
import zipfile
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

import numpy as np

from curvlinops._files import replacing
from curvlinops.report._contents import FORMAT, VERSION, Report
from curvlinops.report._mistakes import MistakeError

JSON, NPZ = "report.json", "report.npz"


class ReportError(MistakeError):
    """A file is no report, or one that cannot be read here; the message says why."""


def encode(value: Any, arrays: dict[str, np.ndarray], place: str = "") -> Any:
    """Return what JSON can hold; arrays are put under the places they have.

    Parameters
    ----------
    value : object
        A dataclass, mapping, tuple, array, number, text, or ``None``.
    arrays : dict
        Gets the arrays.
    place : str, optional
        Of the value, such as ``"matrices/0/density/nodes"``.

    Returns
    -------
    object
        Numbers that are not finite are ``"nan"``, ``"inf"``, ``"-inf"``, which
        ``float`` takes; JSON has none.
    """
    if isinstance(value, np.ndarray):
        arrays[place] = value
        return place
    if is_dataclass(value):
        named = {f.name: getattr(value, f.name) for f in fields(value)}
    elif isinstance(value, tuple | list):
        return [encode(x, arrays, f"{place}/{i}") for i, x in enumerate(value)]
    elif isinstance(value, dict):
        named = value
    else:
        odd = isinstance(value, float) and not math.isfinite(value)
        return str(value) if odd else value
    prefix = f"{place}/" if place else ""
    return {str(k): encode(x, arrays, f"{prefix}{k}") for k, x in named.items()}


def decode(kind: Any, value: Any, arrays: Any) -> Any:
    """Return an object of a type from what :func:`encode` made of it.

    Parameters
    ----------
    kind : type
        As in the annotations of the contents.
    value : object
        From JSON.
    arrays : mapping
        From places to arrays.
    """
    origin, args = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        (kind,) = (arg for arg in args if arg is not type(None))
        return None if value is None else decode(kind, value, arrays)
    if origin is tuple:
        return tuple(decode(args[0], x, arrays) for x in _as(list, value))
    if origin is dict:
        pairs = _as(dict, value).items()
        return {key: decode(args[1], x, arrays) for key, x in pairs}
    if kind is np.ndarray:
        return np.asarray(arrays[value])
    if is_dataclass(kind):
        hints, given = get_type_hints(kind), _as(dict, value)
        names = [f.name for f in fields(kind)]
        if missing := [name for name in names if name not in given]:
            raise KeyError(missing[0])
        named = {name: decode(hints[name], given[name], arrays) for name in names}
        return kind(**named)  # type: ignore[operator]
    return kind(value) if kind is float else _as(kind, value)


def _as(kind: Any, value: Any) -> Any:
    if not isinstance(value, kind):
        raise TypeError(f"{value!r} is no {kind.__name__}")
    return value


def write(path: Path, content: bytes) -> None:
    """Write a file as a whole: what reads it sees the old content, or all of the new.

    Parameters
    ----------
    path : Path
        Where to; replaced if it exists.
    content : bytes
        What.
    """
    with replacing(path) as file:
        file.write(content)


def save(report: Report, folder: Path) -> None:
    """Write ``report.json`` and ``report.npz`` into a folder that exists.

    Parameters
    ----------
    report : Report
        What to write.
    folder : Path
        Where to. The arrays are written first, and the JSON holds their digest: a pair
        of different runs is noticed.
    """
    arrays: dict[str, np.ndarray] = {}
    content = encode(report, arrays)
    buffer = io.BytesIO()
    named: dict[str, Any] = {
        place: np.asarray(array) for place, array in arrays.items()
    }
    np.savez_compressed(buffer, **named)
    binary = buffer.getvalue()
    digest = hashlib.sha256(binary).hexdigest()
    head = {"format": FORMAT, "version": VERSION, "arrays_sha256": digest}
    text = json.dumps(head | content, indent=1, ensure_ascii=False, allow_nan=False)
    write(folder / NPZ, binary)
    write(folder / JSON, text.encode() + b"\n")


def load(path: Path) -> Report:
    """Read a report, from its folder or its ``report.json``.

    Parameters
    ----------
    path : Path
        Of either.

    Returns
    -------
    Report
        As it was saved.

    Raises
    ------
    ReportError
        If a file is missing or unreadable, is no report, is one of another version, or
        the two files do not belong together; the message names file, cause and cure.
    """
    path = path / JSON if path.is_dir() else path
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ReportError(f"{path} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise ReportError(f"{path} is no report: it is not JSON ({error}).") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ReportError(f'{path} is no report: it lacks "format": "{FORMAT}".')
    if content.get("version") != VERSION:
        raise ReportError(
            f"{path} has version {content.get('version')!r} of the format, and this "
            f"package reads version {VERSION}. Compute it again, or use the package "
            f"that wrote it ({_writer(content)})."
        )
    binary = path.with_name(NPZ)
    try:
        arrays = _arrays(binary, content.get("arrays_sha256"))
        return decode(Report, content, arrays)
    except OSError as error:
        raise ReportError(f"{binary} cannot be read: {error.strerror}.") from error
    except KeyError as error:
        raise ReportError(f"{path} is damaged: {error} is missing.") from error
    except (TypeError, ValueError) as error:
        if isinstance(error, ReportError):
            raise
        raise ReportError(f"{path} is damaged: {error}.") from error


def _writer(content: dict[str, Any]) -> str:
    provenance = content.get("provenance")
    versions = provenance.get("versions") if isinstance(provenance, dict) else None
    version = versions.get("curvlinops") if isinstance(versions, dict) else None
    return f"curvlinops {version}" if version else "unknown"


def _arrays(path: Path, digest: Any) -> dict[str, np.ndarray]:
    binary = path.read_bytes()
    if hashlib.sha256(binary).hexdigest() != digest:
        raise ReportError(
            f"{path} is not the file that {JSON} was written with. Copy both from the "
            "same folder, or compute the report again."
        )
    try:
        with np.load(io.BytesIO(binary)) as file:
            return {name: file[name] for name in file.files}
    except zipfile.BadZipFile as error:
        raise ReportError(f"{path} is damaged ({error}).") from error
