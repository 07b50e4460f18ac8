"""What the user gave cannot be used: one clear line, and exit status 2."""

from __future__ import annotations

import traceback


class MistakeError(ValueError):
    """An argument, a file, or what a user's function returns is not usable.

    The message is one line that names the cause and the cure.
    """


def one_line(error: BaseException) -> str:
    """Return an exception in one line: its name, unless it speaks for itself, and text.

    Examples
    --------
    >>> one_line(ZeroDivisionError("division by zero"))
    'ZeroDivisionError: division by zero'
    >>> one_line(MistakeError("no such file"))
    'no such file'
    """
    text = " ".join(str(error).split())
    name = type(error).__name__
    if isinstance(error, MistakeError):
        return text
    return f"{name}: {text}" if text else name


def where(error: BaseException, file: str) -> str:
    """Return the last line of a file that an exception came through.

    Parameters
    ----------
    error : BaseException
        With its traceback.
    file : str
        Name of the file.

    Returns
    -------
    str
        Such as ``" (line 12)"``; empty if it came through none.
    """
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == file]
    return f" (line {lines[-1]})" if lines else ""
