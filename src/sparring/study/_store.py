"""The output folder: content-addressed records and objects, written atomically, checked when read."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import StorageError, UserError
from ..files import (
    canonical_json,
    explain,
    finite,
    load_tensors,
    lock,
    read_json,
    remove_leftovers,
    sha256_bytes,
    sha256_file,
    write_atomic,
    write_json,
)

SCHEMA = 1
# The fields of a record as JSON has them.
FIELDS: dict[str, Any] = {
    "key": str,
    "stage": str,
    "inputs": dict,
    "metrics": dict,
    "series": dict,
    "flags": list,
    "error": str | None,
    "object": dict | None,
    "environment": dict,
    "times": dict,
    "schema": int,
    "origin": dict,
}
# Tensors that a report reads are smaller, and are checked at every start; larger ones, weights, when they are needed.
SMALL_OBJECT = 1 << 20


@dataclass(frozen=True)
class Record:
    """Hold the result of one task; see docs/design.md, "Records". `error` is None where the task succeeded.

    `origin` says what the inputs do not: the plan's name, the seed, and the SHA-256 of each parent's tensors.
    """

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
    origin: dict[str, Any] = field(default_factory=dict)

    def checksum(self) -> str:
        """Return the SHA-256 of everything but times, which may differ between equal runs."""
        left_out = ("times",) if self.origin else ("times", "origin")  # the first records knew of no origin
        content = {name: value for name, value in vars(self).items() if name not in left_out}
        return sha256_bytes(canonical_json(content).encode())


def parse_record(content: Any) -> Record:
    """Return a record from its JSON content; raise UserError if a field or the checksum is wrong."""
    if not isinstance(content, dict) or {"origin", *content} != {*FIELDS, "sha256"}:
        raise UserError("not a record: its fields are not those of a record")
    content.setdefault("origin", {})
    wrong = [name for name, kind in FIELDS.items() if not isinstance(content[name], kind)]
    if wrong:
        raise UserError(f"not a record: {wrong[0]} is {content[wrong[0]]!r:.80}")
    numbers = [*content["metrics"].values(), *content["times"].values()]
    if not all(value is None or isinstance(value, int | float) for value in numbers):
        raise UserError("not a record: a metric or a time is no number")
    if not all(isinstance(flag, dict) and {"name", "detail"} <= set(flag) for flag in content["flags"]):
        raise UserError("not a record: a flag lacks its name or detail")
    found = content["object"]
    if found is not None and (set(found) != {"file", "sha256"} or found["file"] != f"{content['key']}.safetensors"):
        raise UserError("not a record: its object is not its own")
    weights = content["origin"].get("weights", {})
    if not isinstance(weights, dict) or not all(isinstance(checksum, str) for checksum in weights.values()):
        raise UserError("not a record: its origin names weights without their hashes")
    checksum = content.pop("sha256")
    record = Record(**content)
    if record.checksum() != checksum:
        raise UserError("its checksum is wrong: it was damaged or changed")
    return record


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
        self.found_damaged: list[str] = []  # what this process has set aside

    @contextlib.contextmanager
    def lock(self, wait: float = 5.0) -> Iterator[None]:
        """Hold the folder for writing, and clear what killed writers left in it.

        The kernel frees it when the process dies. Raise UserError if another process has it after `wait` seconds.
        """
        with lock(self.out / ".lock", wait=wait):
            for folder in (self.out, self.records, self.objects, self.scratch):
                remove_leftovers(folder)
            yield

    def prepare(self) -> None:
        """Make the folders; raise UserError if they are not writable."""
        for folder in (self.out, self.records, self.objects, self.scratch):
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UserError(f"cannot make {folder}: {error.strerror}; choose another folder with --out") from error
            if not os.access(folder, os.W_OK):
                raise UserError(f"{folder} is not writable; choose another folder with --out")

    def write(self, record: Record, content: bytes = b"") -> Record:
        """Write tensors (packed), then the record that vouches for them; a record on disk is always whole."""
        if content:
            path = write_atomic(self.objects / f"{record.key}.safetensors", content)
            record = replace(record, object={"file": path.name, "sha256": sha256_bytes(content)})
        # The checksum is of what can be read back, and JSON has no NaN.
        record = replace(record, metrics=finite(record.metrics), series=finite(record.series))
        write_json(self.records / f"{record.key}.json", {**vars(record), "sha256": record.checksum()})
        return record

    def peek(self, key: str) -> Record | None:
        """Return a record without touching anything, even if another process writes; None if missing or damaged."""
        path = self.records / f"{key}.json"
        try:
            record = parse_record(read_json(path))
        except UserError:
            return None
        if record.key != key:
            return None
        return record if record.object is None or (self.objects / f"{key}.safetensors").exists() else None

    def read(self, key: str) -> Record | None:
        """Return a record; None if there is none. A damaged one is set aside and counts as none."""
        record, path = self.peek(key), self.records / f"{key}.json"
        if record is None and path.exists():
            self.set_aside(path)
        return record

    def tensors(self, key: str) -> dict[str, Tensor]:
        """Return a record's tensors; raise StorageError if the file is damaged (it is set aside, to be made again)."""
        record = self.read(key)
        path = self.objects / f"{key}.safetensors"
        if record is None or record.object is None:
            raise StorageError(f"{path} was damaged or removed; run the same command again to make it anew")
        if sha256_file(path) != record.object["sha256"]:
            self.set_aside(path)
            self.set_aside(self.records / f"{key}.json")
            raise StorageError(f"{path} was damaged and has been set aside; run the same command again to make it anew")
        return load_tensors(path)

    def recall(self, key: str) -> Record | None:
        """Return a record as `verify` does, but spare objects so large that hashing all of them would take long."""
        record = self.read(key)
        if record is None or record.object is None:
            return record
        small = (self.objects / f"{key}.safetensors").stat().st_size <= SMALL_OBJECT
        return self.verify(key, record) if small else record

    def verify(self, key: str, record: Record | None = None) -> Record | None:
        """Return a record whose object's checksum was read anew; None, and both set aside, if either is damaged.

        `record` spares reading it once more.
        """
        record = record or self.read(key)
        if record is None or record.object is None:
            return record
        path = self.objects / f"{key}.safetensors"
        if sha256_file(path) == record.object["sha256"]:
            return record
        self.set_aside(path)
        self.set_aside(self.records / f"{key}.json")
        return None

    def checkpoint(self, key: str) -> Path:
        """Return where a long training keeps what it has so far."""
        return self.scratch / f"{key}.safetensors"

    def set_aside(self, path: Path) -> None:
        """Move a damaged file where it is in nobody's way but can still be looked at."""
        try:
            self.damaged.mkdir(parents=True, exist_ok=True)
            path.replace(self.damaged / path.name)
        except FileNotFoundError:  # another worker found it too
            return
        except OSError as error:
            raise explain(error, path, "set aside") from error
        self.found_damaged.append(path.name)
