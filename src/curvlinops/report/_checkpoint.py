"""A run in stages, each of which is computed once, however often the run is begun."""

from __future__ import annotations

import io
import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any, TypeVar

import numpy as np

from curvlinops._files import unfinished
from curvlinops._memory import raise_if_out_of_memory
from curvlinops.report._files import decode, encode, write
from curvlinops.report._mistakes import MistakeError, one_line

T = TypeVar("T")
#: What a folder's stages are of.
IDENTITY = "identity.json"


@dataclass(frozen=True)
class Stage:
    """What a finished stage was like, beside its result.

    Attributes
    ----------
    products : int
        Products with the matrix.
    seconds : float
        Wall time.
    notes : tuple of str
        Warnings that came up.
    failure : str
        Why there is no result; empty if there is one.
    """

    products: int
    seconds: float
    notes: tuple[str, ...] = ()
    failure: str = ""


class Stages:
    """Runs stages, and keeps their results in a folder if there is one.

    Parameters
    ----------
    folder : Path or None
        Where to; created if need be.
    identity : dict
        What makes the run what it is, as JSON. A folder of another run is refused.
    progress : callable, optional
        Told the name of every stage before it starts, and ``None`` after the last.

    Attributes
    ----------
    done : list of Stage
        All stages so far.

    Raises
    ------
    MistakeError
        If the folder belongs to another run, or cannot be written to.
    """

    def __init__(
        self,
        folder: Path | None,
        identity: dict[str, Any],
        progress: Callable[[str], None] = lambda name: None,
    ) -> None:
        self._folder, self._progress = folder, progress
        self.done: list[Stage] = []
        if folder is None:
            return
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._claim(folder / IDENTITY, json.loads(json.dumps(identity)))
        except OSError as error:
            raise MistakeError(
                f"--checkpoint {folder} cannot be used: {error.strerror}."
            ) from error

    @staticmethod
    def _claim(path: Path, identity: dict[str, Any]) -> None:
        if not path.exists():
            write(path, json.dumps(identity, indent=1).encode())
            return
        try:
            stored = json.loads(path.read_bytes())
        except ValueError as error:
            raise MistakeError(f"{path} is damaged. Delete its folder.") from error
        keys = [k for k in {**stored, **identity} if stored.get(k) != identity.get(k)]
        if keys:
            key = keys[0]
            raise MistakeError(
                f"--checkpoint {path.parent} belongs to another run ({key}: stored "
                f"{stored.get(key)!r}, now {identity.get(key)!r}). Give another folder."
            )

    def run(
        self, name: str, kind: Any, compute: Callable[[Path | None], tuple[T, int]]
    ) -> T | None:
        """Return the result of a stage, from the folder if it is there.

        Parameters
        ----------
        name : str
            Of the stage, such as ``"hessian trace"``.
        kind : type
            Of the result, as in annotations.
        compute : callable
            Maps the path of a journal, for what is not finished, to the result and the
            number of products that it took.

        Returns
        -------
        object or None
            ``None`` if the stage raised what estimators raise: :attr:`done` says why.
        """
        self._progress(name)
        stem = name.replace(" ", "-").replace("/", "-")
        path = None if self._folder is None else self._folder / f"{stem}.npz"
        if path is not None and path.exists():
            stage, result = _read(path, kind)
        else:
            journal = None if path is None else path.with_suffix(".journal")
            stage, result = _computed(name, compute, journal)
            if path is not None:
                _write(path, stage, result)
        if path is not None:  # also what a killed process has left
            parts = [unfinished(path), unfinished(path.with_name(IDENTITY))]
            for left in path.parent.iterdir():
                if left.name.startswith((f"{stem}.journal", f"{stem}@", *parts)):
                    left.unlink(missing_ok=True)
        self.done.append(stage)
        return result


def _computed(
    name: str, compute: Callable[[Path | None], tuple[T, int]], journal: Path | None
) -> tuple[Stage, T | None]:
    start, result, products, failure = perf_counter(), None, 0, ""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        # which the errors say, and the verdicts
        warnings.filterwarnings("ignore", message=".* Krylov spaces are too shallow")
        try:
            result, products = compute(journal)
        except (ValueError, TypeError, RuntimeError) as error:
            raise_if_out_of_memory(error)
            failure = f"{name}: {one_line(error)}"
    texts = (" ".join(str(warning.message).split()) for warning in caught)
    notes = tuple(dict.fromkeys(f"{name}: {text}" for text in texts))
    return Stage(products, perf_counter() - start, notes, failure), result


def _write(path: Path, stage: Stage, result: Any) -> None:
    arrays: dict[str, Any] = {}
    content = {"stage": encode(stage, {}), "result": encode(result, arrays, "result")}
    buffer = io.BytesIO()
    text = np.frombuffer(json.dumps(content, allow_nan=False).encode(), dtype=np.uint8)
    np.savez(buffer, content__=text, **arrays)
    write(path, buffer.getvalue())


def _read(path: Path, kind: Any) -> tuple[Stage, Any]:
    try:
        with np.load(path) as arrays:
            content = json.loads(arrays["content__"].tobytes())
            stage = decode(Stage, content["stage"], {})
            if content["result"] is None:
                return stage, None
            return stage, decode(kind, content["result"], arrays)
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise MistakeError(
            f"The checkpoint {path} is damaged: delete this file, and its stage is "
            "computed again."
        ) from error
