"""Write a study's folder: content-addressed records and objects, written atomically; damaged ones are set aside."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import DamageError, StorageError, UserError
from ..files import (
    explain,
    finite,
    load_tensors,
    lock,
    remove_leftovers,
    sha256_bytes,
    sha256_file,
    write_atomic,
    write_json,
)
from . import _reader as reader
from ._reader import Folder
from ._schema import SCHEMA, PlanFile, Record

if TYPE_CHECKING:
    from torch import Tensor


def write_plan(out: str | Path, plan: PlanFile) -> None:
    """Write a study's plan.json and the checksum of its content; raise UserError if it exceeds the read limit."""
    content = {**asdict(plan), "schema": SCHEMA}
    checked = {**content, "sha256": reader.plan_checksum(content)}
    write_json(Folder(out).plan, checked, limit=reader.MAX_PLAN)


class Store(Folder):
    """Keep a study's records (`records/<key>.json`) and tensors (`objects/<key>.safetensors`) in one folder.

    Only the process that holds `lock()` may write. Any process may read at any time.
    """

    def __init__(self, out: str | Path) -> None:
        super().__init__(out)
        self.found_damaged: list[str] = []  # files that this process has set aside

    @contextlib.contextmanager
    def lock(self, wait: float = 5.0) -> Iterator[None]:
        """Lock the folder for writing, and remove the temporary files of killed writers.

        The lock ends with the process. Raise UserError if another process holds it after `wait` seconds.
        """
        with lock(self.locked, wait=wait):
            for folder in (self.out, self.records, self.objects, self.scratch):
                remove_leftovers(folder)
            yield

    def prepare(self) -> None:
        """Create the folders; raise UserError if they are not writable."""
        for folder in (self.out, self.records, self.objects, self.scratch):
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UserError(f"cannot make {folder}: {error.strerror}; choose another folder with --out") from error
            if not os.access(folder, os.W_OK):
                raise UserError(f"{folder} is not writable; choose another folder with --out")

    def write(self, record: Record, content: bytes = b"") -> Record:
        """Write tensors (packed), then the record with their hash, so that a record on disk is always complete."""
        if content:
            path = write_atomic(self.object(record.key), content)
            record = replace(record, object={"file": path.name, "sha256": sha256_bytes(content)})
        # The checksum is of the values that can be read back, and JSON has no NaN.
        record = replace(record, metrics=finite(record.metrics), series=finite(record.series), folder=self.out)
        checked = {**record.content(), "sha256": record.checksum()}
        write_json(self.record(record.key), checked, limit=reader.MAX_RECORD)
        return record

    def peek(self, key: str) -> Record | None:
        """Return a record without changing any file, even while another process writes; None if missing or damaged."""
        try:
            record = reader.read_record(self.out, key)
        except DamageError:
            return None
        return None if record is not None and record.object is not None and not self.object(key).exists() else record

    def read(self, key: str) -> Record | None:
        """Return a record; None if there is none. A damaged one is set aside and counts as none."""
        record, path = self.peek(key), self.record(key)
        if record is None and path.exists():
            self.set_aside(path)
        return record

    def verify(self, key: str, *, at_most: float = math.inf) -> Record | None:
        """Return a record after checking its object too; None, with both set aside, if either is damaged.

        Objects of more than `at_most` bytes are not hashed, because that would take too long.
        """
        record, path = self.read(key), self.object(key)
        if record is None or record.object is None or path.stat().st_size > at_most:
            return record
        if sha256_file(path) == record.object["sha256"]:
            return record
        self.set_aside(path)
        self.set_aside(self.record(key))
        return None

    def tensors(self, key: str) -> dict[str, Tensor]:
        """Return a record's tensors; raise StorageError if the file is damaged (it is then set aside)."""
        record, path = self.verify(key), self.object(key)
        if record is None or record.object is None:
            raise StorageError(f"{path} was damaged or removed; rerun the same command to recompute it")
        return load_tensors(path)

    def set_aside(self, path: Path) -> None:
        """Move a damaged file to damaged/, where it can still be examined."""
        try:
            self.damaged.mkdir(parents=True, exist_ok=True)
            path.replace(self.damaged / path.name)
        except FileNotFoundError:  # another worker has moved it
            return
        except OSError as error:
            raise explain(error, path, "set aside") from error
        self.found_damaged.append(path.name)
