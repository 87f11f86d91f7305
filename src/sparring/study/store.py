"""The output folder: content-addressed records and objects, written atomically, checked when read."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import UserError
from ..files import (
    canonical_json,
    load_tensors,
    lock,
    read_json,
    remove_leftovers,
    save_tensors,
    sha256_bytes,
    sha256_file,
    write_json,
)

__all__ = ["SCHEMA", "Record", "Store"]

SCHEMA = 1


@dataclass(frozen=True)
class Record:
    """Hold the result of one task; see docs/design.md, "Records". `error` is None where the task succeeded."""

    key: str
    stage: str
    inputs: dict[str, Any]
    metrics: dict[str, float | None] = field(default_factory=dict)
    series: dict[str, Any] = field(default_factory=dict)
    flags: list[dict[str, str]] = field(default_factory=list)
    error: str | None = None
    object: dict[str, str] | None = None
    environment: dict[str, Any] = field(default_factory=dict)
    times: dict[str, float] = field(default_factory=dict)
    schema: int = SCHEMA

    def checksum(self) -> str:
        """Return the SHA-256 of everything but times, which may differ between equal runs."""
        content = {name: value for name, value in asdict(self).items() if name != "times"}
        return sha256_bytes(canonical_json(content).encode())


class Store:
    """Keep a study's records (`records/<key>.json`) and tensors (`objects/<key>.safetensors`) in one folder.

    Only the process that holds `lock()` may write; anybody may read at any time.
    """

    def __init__(self, out: str | Path) -> None:
        self.out = Path(out)
        self.records = self.out / "records"
        self.objects = self.out / "objects"
        self.scratch = self.out / "scratch"
        self.damaged = self.out / "damaged"

    def lock(self, wait: float = 5.0) -> AbstractContextManager[None]:
        """Hold the folder for writing; the kernel frees it when the process dies. Raise UserError if another has it."""
        return lock(self.out / ".lock", wait=wait)

    def prepare(self) -> None:
        """Make the folders and clear what killed writers left behind; raise UserError if the folder is not writable."""
        for folder in (self.out, self.records, self.objects, self.scratch):
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UserError(f"cannot make {folder}: {error.strerror}; choose another folder with --out") from error
            if not os.access(folder, os.W_OK):
                raise UserError(f"{folder} is not writable; choose another folder with --out")
            remove_leftovers(folder)

    def write(self, record: Record, tensors: dict[str, Tensor] | None = None) -> Record:
        """Write tensors, then the record that vouches for them; a record on disk is always whole."""
        if tensors:
            path = save_tensors(self.objects / f"{record.key}.safetensors", tensors)
            record = _with_object(record, {"file": path.name, "sha256": sha256_file(path)})
        write_json(self.records / f"{record.key}.json", {**asdict(record), "sha256": record.checksum()})
        return record

    def peek(self, key: str) -> Record | None:
        """Return a record without touching anything, even if another process writes; None if missing or damaged."""
        path = self.records / f"{key}.json"
        try:
            content = read_json(path)
            checksum = content.pop("sha256")
            record = Record(**content)
        except (UserError, TypeError, KeyError, AttributeError):
            return None
        if record.checksum() != checksum or record.key != key:
            return None
        return record if record.object is None or (self.objects / f"{key}.safetensors").exists() else None

    def read(self, key: str) -> Record | None:
        """Return a record; None if there is none. A damaged one is set aside and counts as none."""
        record, path = self.peek(key), self.records / f"{key}.json"
        if record is None and path.exists():
            self._set_aside(path)
        return record

    def tensors(self, key: str) -> dict[str, Tensor]:
        """Return a record's tensors; raise UserError if the file is damaged (it is set aside, to be made again)."""
        record = self.read(key)
        path = self.objects / f"{key}.safetensors"
        if record is None or record.object is None:
            raise UserError(f"{path} was damaged or removed; run the same command again to make it anew")
        if sha256_file(path) != record.object["sha256"]:
            self._set_aside(path)
            self._set_aside(self.records / f"{key}.json")
            raise UserError(f"{path} was damaged and has been set aside; run the same command again to make it anew")
        return load_tensors(path)

    def verify(self, key: str) -> Record | None:
        """Return a record whose object's checksum was read anew; None, and both set aside, if either is damaged."""
        record = self.read(key)
        if record is None or record.object is None:
            return record
        path = self.objects / f"{key}.safetensors"
        if sha256_file(path) == record.object["sha256"]:
            return record
        self._set_aside(path)
        self._set_aside(self.records / f"{key}.json")
        return None

    def _set_aside(self, path: Path) -> None:
        """Move a damaged file where it is in nobody's way but can still be looked at."""
        self.damaged.mkdir(parents=True, exist_ok=True)
        path.replace(self.damaged / path.name)


def _with_object(record: Record, found: dict[str, str]) -> Record:
    return Record(**{**asdict(record), "object": found})
