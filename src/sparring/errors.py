"""The errors that sparring raises on purpose."""

from __future__ import annotations

import difflib
import re
import sysconfig
import traceback
from collections.abc import Iterable
from pathlib import Path

__all__ = [
    "TERMINATED",
    "DamageError",
    "DataError",
    "DataWarning",
    "PlanError",
    "StorageError",
    "UnknownNameError",
    "Unsupported",
    "UserError",
    "place",
    "short_of_memory",
    "told",
]

TERMINATED = 143  # the exit code of SIGTERM: 128 plus the signal's number, as in shells
# Code under these folders is not the user's own: sparring, the standard library, and what is installed.
_OTHERS = (str(Path(__file__).parent), *(sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")))


class UserError(Exception):
    """Signal a problem that the user can fix; the message names the cause and the way out (exit code 2)."""


class PlanError(UserError):
    """Signal a plan that cannot be run as written."""


class DataError(UserError):
    """Signal data that are missing, damaged or of the wrong shape."""


class DataWarning(UserWarning):
    """Warn of data that were left out, or of assumptions about them."""


class DamageError(UserError):
    """Signal a study's file that has changed since it was written."""


class StorageError(UserError):
    """Signal a disk that is full or fails, or a damaged file: a study stops there, since no network is to blame."""


_NO_MEMORY = ("can't allocate memory", "not enough memory", "out of memory")
MANY = 100  # the most names that are all listed


class UnknownNameError(UserError):
    """Signal a name that is not in a table, with the nearest match."""

    def __init__(self, kind: str, name: str, known: Iterable[str]) -> None:
        names = sorted(known)
        near = [one for one in names if one.lower() == name.lower()] or difflib.get_close_matches(name, names, n=1)
        hint = f" Did you mean '{near[0]}'?" if near else ""
        shown = names if len(names) <= MANY else difflib.get_close_matches(name, names, n=12, cutoff=0.3)
        super().__init__(f"unknown {kind} '{name}'.{hint} {'Known' if shown is names else 'Near'}: {', '.join(shown)}")


class Unsupported(UserError):
    """Signal an operation that has no sound rule for this model or layer, and say why."""


def short_of_memory(error: BaseException) -> bool:
    """Return whether an exception says that memory is short; torch's RuntimeErrors are told apart by their text."""
    if isinstance(error, MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in _text(error) for words in _NO_MEMORY)


def told(error: BaseException) -> str:
    """Describe an exception in one line: its type, its text, and the last line of the user's own code."""
    text, where = _text(error), place(error)
    if short_of_memory(error):
        asked = re.search(r"allocate (\d+) bytes", text)
        count = f" {int(asked[1]) / 2**20:,.0f} MiB more do not fit;" if asked else ""
        text = f"out of memory:{count} use a smaller model, smaller batches or fewer images"
        return f"{text}{f' ({where})' if where else ''}"
    text = text if len(text) <= 300 else f"{text[:297]}..."
    return f"{type(error).__name__}{': ' if text else ''}{text}{f' ({where})' if where else ''}"


def _text(error: BaseException) -> str:
    try:
        return " ".join((error.msg if isinstance(error, SyntaxError) else str(error)).split())
    except Exception:  # a user's own exception may fail even at this
        return "(its message cannot be read)"


def place(error: BaseException) -> str | None:
    """Return "path:line: code" of the last line in the user's own files that an exception came through, or None."""
    if isinstance(error, SyntaxError) and error.filename and not error.filename.startswith("<"):
        return f"{error.filename}:{error.lineno}: {(error.text or '').strip()}"
    cause = place(error.__cause__) if error.__cause__ is not None else None
    if isinstance(error, UserError) and cause is not None:  # raised here, from what the user's code raised
        return cause
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        installed = "site-packages" in frame.filename or "dist-packages" in frame.filename
        if not (installed or frame.filename.startswith((*_OTHERS, "<"))):
            return f"{frame.filename}:{frame.lineno}: {frame.line or ''}".rstrip(": ")
    return cause
