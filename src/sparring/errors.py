"""The few errors that sparring raises on purpose."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = ["DamageError", "DataError", "PlanError", "StorageError", "UnknownNameError", "Unsupported", "UserError"]


class UserError(Exception):
    """Signal something the user can mend; the message names the cause and the way out (exit code 2)."""


class PlanError(UserError):
    """Signal a plan that cannot be run as written."""


class DataError(UserError):
    """Signal data that are missing, damaged or of the wrong shape."""


class DamageError(UserError):
    """Signal a file of a study's that is not what it was when it was written."""


class StorageError(UserError):
    """Signal a disk that is full or fails, or a damaged file: a study stops there, since no network is to blame."""


class UnknownNameError(UserError):
    """Signal a name that is not in a table, with the nearest match."""

    def __init__(self, kind: str, name: str, known: Iterable[str]) -> None:
        names = sorted(known)
        near = difflib.get_close_matches(name, names, n=1)
        hint = f" Did you mean '{near[0]}'?" if near else ""
        super().__init__(f"unknown {kind} '{name}'.{hint} Known: {', '.join(names)}")


class Unsupported(UserError):
    """Signal an operation that has no sound rule for this model or layer, and say why."""
