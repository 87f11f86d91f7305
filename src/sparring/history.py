"""An append-only file: one JSON object per line, each with its hash and the hash of the line before it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from .errors import DamageError
from .files import canonical_json, finite, lock, read_bounded, sha256_bytes, write_atomic

__all__ = ["append_entry", "read_history"]

NAME = "history.jsonl"
LIMIT = 64 << 20
CHAIN = ("previous", "sha256")


def read_history(out: Path | str) -> list[dict[str, Any]]:
    """Return the entries of OUT/history.jsonl, the oldest first; none if there is no such file.

    Raises DamageError if an entry was changed, or does not follow the one before it. A truncated end cannot be
    detected.
    """
    path = Path(out) / NAME
    if not path.exists():
        return []
    entries: list[dict[str, Any]] = []
    for number, line in enumerate(read_bounded(path, limit=LIMIT).splitlines(), 1):
        entry = _parsed(line)
        previous = entries[-1]["sha256"] if entries else ""
        if entry is None or entry["previous"] != previous or entry["sha256"] != _checksum(entry):
            raise DamageError(
                f"{path} was damaged or changed at line {number}; restore it, or move it away: "
                "the report then says that earlier looks are unknown"
            )
        entries.append(entry)
    return entries


def append_entry(out: Path | str, entry: Mapping[str, Any]) -> dict[str, Any]:
    """Add an entry, with the time unless it has one, to OUT/history.jsonl and return it as written.

    The file is replaced as a whole, under a lock. Raises as `read_history` does, and UserError if it cannot be written.
    """
    path = Path(out) / NAME
    with lock(path.with_name(f".{NAME}.lock"), wait=5.0):
        entries = read_history(out)
        content: dict[str, Any] = {"time": datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")} | finite(entry)
        content["previous"] = entries[-1]["sha256"] if entries else ""
        content["sha256"] = _checksum(content)
        write_atomic(path, "".join(f"{canonical_json(one)}\n" for one in [*entries, content]))
    return content


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return entry if isinstance(entry, dict) and {"kind", "time", *CHAIN} <= set(entry) else None


def _checksum(entry: Mapping[str, Any]) -> str:
    return sha256_bytes(canonical_json({name: value for name, value in entry.items() if name != "sha256"}).encode())
