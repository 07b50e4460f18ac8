"""What is computed, as ``run.toml`` says it: all that a replay needs."""

from __future__ import annotations

import json
import tomllib
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from curvlinops.report._contents import Counts
from curvlinops.report._matrices import DEFAULT, KINDS
from curvlinops.report._measure import PARTS
from curvlinops.report._mistakes import MistakeError
from curvlinops.report._problem import Choice

NAME = "run.toml"
#: Of the file.
VERSION = 1


@dataclass(frozen=True)
class Settings:
    """A run, but for where its files go.

    Attributes
    ----------
    choice : Choice
        Problem, parameters, weights, device, dtype, seed.
    matrices : tuple of str
        Names of the matrices, see :data:`~curvlinops.report._matrices.KINDS`.
    parts : tuple of str
        Groups of stages, see :data:`~curvlinops.report._measure.PARTS`.
    damping : float
        In the unit of the matrices.
    learning_rate : float or None
        With which the sharpness is compared.
    budget : str
        From which the counts come, if there are none.
    top : int or None
        Eigenpairs, if not those of the budget.
    counts : Counts or None
        How much is computed.
    """

    choice: Choice = field(default_factory=Choice)
    matrices: tuple[str, ...] = DEFAULT
    parts: tuple[str, ...] = PARTS
    damping: float = 0.01
    learning_rate: float | None = None
    budget: str = "standard"
    top: int | None = None
    counts: Counts | None = None

    def __post_init__(self) -> None:
        """Check what does not depend on the problem."""
        for name, known in (("matrices", KINDS), ("parts", PARTS)):
            given = getattr(self, name)
            if odd := [value for value in given if value not in known]:
                raise MistakeError(f"{name}: {odd[0]!r} is none of {', '.join(known)}.")
            if not given or len(set(given)) < len(given):
                raise MistakeError(f"{name}: give each once, and one at least.")
        if not 0 < self.damping < float("inf"):
            raise MistakeError(f"damping is above 0, got {self.damping}.")
        if self.learning_rate is not None and not self.learning_rate > 0:
            raise MistakeError(f"The learning rate is above 0: {self.learning_rate}.")

    def identity(self) -> dict[str, Any]:
        """Return everything but the counts, as JSON."""
        plain = asdict(self)
        del plain["counts"]
        return plain


def to_toml(settings: Settings, version: str) -> str:
    """Return the text of a run.toml.

    Parameters
    ----------
    settings : Settings
        What to write; ``None`` is left out, as TOML has none.
    version : str
        Of this package.
    """
    plain = asdict(settings)
    counts, choice = plain.pop("counts"), plain.pop("choice")
    lines = [
        f"# Written by curvlinops {version}. `curvlinops report --config {NAME}` gives",
        "# the same numbers again, on a slower machine, too: counts are what is fixed.",
        f"version = {VERSION}",
    ]
    for key, value in {**choice, **plain}.items():
        if value is not None:
            lines.append(f"{key} = {_toml(value)}")
    if counts is not None:
        lines += ["", "[counts]"]
        lines += [f"{key} = {_toml(value)}" for key, value in counts.items()]
    return "\n".join(lines) + "\n"


def _toml(value: Any) -> str:
    """Return a value as TOML, of which JSON's strings, numbers and arrays are part."""
    text = json.dumps(value, ensure_ascii=False)
    return text.replace("\x7f", "\\u007f")


def from_toml(path: Path) -> Settings:
    """Read a run.toml.

    Parameters
    ----------
    path : Path
        The file.

    Raises
    ------
    MistakeError
        If it cannot be read, is no TOML, has a wrong version, or a key or value that
        is unknown here.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise MistakeError(f"{path} cannot be read: {error.strerror}.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise MistakeError(f"{path} is no TOML: {error}.") from error
    if content.pop("version", None) != VERSION:
        raise MistakeError(f"{path} is no {NAME} of version {VERSION}.")
    counts = content.pop("counts", None)
    choice = {f.name: content.pop(f.name) for f in fields(Choice) if f.name in content}
    known = {f.name for f in fields(Settings)} - {"choice", "counts"}
    if odd := sorted(content.keys() - known):
        raise MistakeError(f"{path}: {odd[0]!r} is unknown.")
    for key in ("matrices", "parts"):
        if key in content:
            content[key] = tuple(content[key])
    try:
        given = None if counts is None else _counts(counts)
        return Settings(Choice(**choice), counts=given, **content)
    except MistakeError as error:
        raise MistakeError(f"{path}: {error}") from error
    except TypeError as error:
        raise MistakeError(f"{path} is damaged: {error}.") from error


def _counts(plain: dict[str, Any]) -> Counts:
    for key, value in plain.items():
        kind = bool if key == "baseline" else int
        if type(value) is not kind or value < 0:
            raise MistakeError(f"counts: {key} = {value!r} is no count.")
    return Counts(**plain)
