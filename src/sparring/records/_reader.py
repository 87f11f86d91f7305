"""Read a study's folder: paths, and checks that refuse damaged, unrelated or huge files."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast, get_args

import numpy as np
from numpy.typing import NDArray

from ..errors import DamageError, UserError
from ..files import canonical_json, finite, read_bounded, read_json, sha256_bytes
from ._schema import CELLS, READ, Cell, Checkpoint, DatasetFacts, Kind, PlanFile, Record, pruning_kind

# The largest sizes that are read, and therefore written. A large study's plan.json lists millions of keys.
MAX_PLAN, MAX_RECORD, MAX_OBJECT = 512 << 20, 64 << 20, 1 << 30
AGAIN = "rerun the study to recompute it, or restore it"
BEST = " (best epoch)"  # suffix of cells of that checkpoint in schema 1
CELL: dict[str, Any] = {"seed": int, "method": str, "sparsity": int | float | None, "axis": str, "tasks": list}
FACTS: dict[str, Any] = {"name": str, **dict.fromkeys(("class_count", "train", "valid", "test"), int)}
FACTS |= {"classes": list, "shape": list}
FIELDS: dict[str, Any] = {"schema": int, "flags": list, "error": str | None, "object": dict | None}
FIELDS |= dict.fromkeys(("key", "stage"), str)
FIELDS |= dict.fromkeys(("inputs", "metrics", "series", "environment", "times", "origin"), dict)


class Folder:
    """The paths of the files of the study in `out`; no file is opened or created."""

    def __init__(self, out: str | Path) -> None:
        self.out = Path(out)
        self.plan = self.out / "plan.json"
        self.records = self.out / "records"
        self.objects = self.out / "objects"
        self.scratch = self.out / "scratch"  # checkpoints of long trainings
        self.damaged = self.out / "damaged"  # files that were set aside
        self.locked = self.out / ".lock"
        self.report = self.out / "report.html"
        self.results = self.out / "results.csv"
        self.ledger = self.out / "ledger.json"
        self.figures = self.out / "figures"

    def record(self, key: str) -> Path:
        """Return the file of a task's record."""
        return self.records / f"{key}.json"

    def object(self, key: str) -> Path:
        """Return the file of a task's tensors."""
        return self.objects / f"{key}.safetensors"

    def checkpoint(self, key: str) -> Path:
        """Return the checkpoint file of a long training."""
        return self.scratch / f"{key}.safetensors"


def is_key(text: Any) -> bool:
    """Return whether this is a task's key, which is safe as a file name."""
    return isinstance(text, str) and re.fullmatch("[0-9a-f]{32}", text) is not None


def read_plan(out: str | Path) -> PlanFile:
    """Return a study's plan.json.

    Raise UserError if it is missing or of another version, DamageError if its content has changed since it was written.
    """
    path = Folder(out).plan
    if not path.exists():
        raise UserError(f"{out} is not a study's output folder: it has no plan.json; run 'sparring study' first")
    try:
        content = read_json(path, limit=MAX_PLAN)
    except UserError as error:
        raise DamageError(f"{path} cannot be read; {AGAIN} ({error})") from error
    if not isinstance(content, dict):
        raise DamageError(f"{path} is not a plan; {AGAIN}")
    if content.get("schema") not in READ:
        raise UserError(f"{path} is not a plan of schema {READ[-1]}: it is damaged or from another version")
    stated = content.pop("sha256", None)
    if stated != plan_checksum(content) and (stated is not None or content["schema"] > 1):
        raise DamageError(f"{path} was damaged or changed: its checksum is wrong; {AGAIN}")
    plan, cells, facts = content.get("plan"), content.get("cells"), content.get("dataset", {})
    environment, command = content.get("environment", {}), content.get("command", "")
    if not isinstance(plan, dict) or not isinstance(plan.get("name"), str) or not isinstance(cells, list):
        raise DamageError(f"{path} has no plan or no cells; {AGAIN}")
    if not _are(facts, FACTS if cells else {}) or not _are({"e": environment, "c": command}, {"e": dict, "c": str}):
        raise DamageError(f"{path} has no data set or no settings; {AGAIN}")
    try:
        cells = [_cell(cell if content["schema"] > 1 else _told_by_its_label(cell, plan)) for cell in cells]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DamageError(f"{path} has an invalid cell; {AGAIN}") from error
    return PlanFile(plan, tuple(cells), cast(DatasetFacts, facts), environment, command, content["schema"])


def plan_checksum(content: Mapping[str, Any]) -> str:
    """Return the SHA-256 of the rest of plan.json."""
    return sha256_bytes(canonical_json(finite(content)).encode())


def _are(content: Any, kinds: Mapping[str, Any]) -> bool:
    """Return whether the named values of a table have their types."""
    return isinstance(content, dict) and all(isinstance(content.get(name), kind) for name, kind in kinds.items())


def _cell(content: Mapping[str, Any]) -> Cell:
    """Return a cell of schema 2; raise ValueError if it is invalid."""
    sound = set(content) == {*CELL, "kind", "checkpoint"} and _are(content, CELL)
    named = sound and content["kind"] in _KINDS and content["checkpoint"] in get_args(Checkpoint)
    if not named or content["axis"] not in ("weights", "activations") or not all(map(is_key, content["tasks"])):
        raise ValueError("not a cell")
    return Cell(**{**content, "tasks": tuple(content["tasks"])})


_KINDS = {name for part in get_args(Kind) for name in get_args(part)}


def _told_by_its_label(cell: Mapping[str, Any], plan: Mapping[str, Any]) -> dict[str, Any]:
    """Convert a cell of schema 1, which is described by label, axis and plan, to schema 2."""
    method, axis = cell["method"], cell.get("axis", "weights")
    label = method.removesuffix(BEST)
    table: dict[str, Any] = next((one for one in plan.get("pruning") or () if one.get("label") == label), {})
    pruned = pruning_kind(table.get("score"), table.get("method"), table.get("structure"))
    kind = label if label in CELLS else "activations" if axis == "activations" else pruned
    kind = "linear" if plan.get("linear") else kind
    return {**cell, "axis": axis, "kind": kind, "checkpoint": "best" if label != method else "final"}


def read_record(out: str | Path, key: str) -> Record | None:
    """Return a task's record, or None if there is none; its object is checked when it is opened (`tensor_bytes`).

    Raise DamageError if its content has changed since it was written, or if it belongs to another task.
    """
    path = Folder(out).record(key)
    if is_key(key) and not path.exists():
        return None
    try:
        record = _parsed(read_json(path, limit=MAX_RECORD), Path(out))
        if record.key != key or not is_key(key):
            raise UserError("its file name does not match its key")
    except UserError as error:
        raise DamageError(f"{path} is damaged or from another study: {error}; {AGAIN}") from error
    return record


def _parsed(content: Any, out: Path) -> Record:
    """Return a record from its JSON content; raise UserError if a field or the checksum is wrong."""
    if not isinstance(content, dict) or {"origin", *content} != {*FIELDS, "sha256"}:
        raise UserError("not a record: its fields are not those of a record")
    content.setdefault("origin", {})
    wrong = [name for name, kind in FIELDS.items() if not isinstance(content[name], kind)]
    if wrong:
        raise UserError(f"not a record: {wrong[0]} is {content[wrong[0]]!r:.80}")
    if content["schema"] not in READ:
        raise UserError(f"it is of schema {content['schema']}, which belongs to another version")
    numbers = [*content["metrics"].values(), *content["times"].values()]
    if not all(value is None or isinstance(value, int | float) for value in numbers):
        raise UserError("not a record: a metric or a time is not a number")
    if not all(isinstance(flag, dict) and {"name", "detail"} <= set(flag) for flag in content["flags"]):
        raise UserError("not a record: a flag has no name or no detail")
    found = content["object"]
    if found is not None and (set(found) != {"file", "sha256"} or found["file"] != f"{content['key']}.safetensors"):
        raise UserError("not a record: its object file belongs to another record")
    weights = content["origin"].get("weights", {})
    if not isinstance(weights, dict) or not all(isinstance(checksum, str) for checksum in weights.values()):
        raise UserError("not a record: its origin has weights without hashes")
    checksum = content.pop("sha256")
    record = Record(**content, folder=out)
    if record.checksum() != checksum:
        raise UserError("its checksum is wrong: it was damaged or changed")
    return record


def tensor_bytes(record: Record) -> bytes:
    """Return the content of a record's object, or empty bytes if it has none.

    Raise DamageError if the file is missing or differs from the one that the record names.
    """
    if record.object is None or record.folder is None:
        return b""
    path = Folder(record.folder).object(record.key)
    try:
        content = read_bounded(path, limit=MAX_OBJECT)
    except UserError as error:
        raise DamageError(f"{error}; {AGAIN}") from error
    if sha256_bytes(content) != record.object["sha256"]:
        raise DamageError(f"{path} is damaged or from another study: it does not match its record; {AGAIN}")
    return content


def image_places(record: Record, held: Mapping[str, NDArray[Any]], facts: DatasetFacts) -> NDArray[np.int64]:
    """Return the positions in their split of the images that a record's tensors `held` describe, one per value.

    Schema 1 did not store them: its "measure" records hold all images in order, other records part of a random order.
    """
    if "images" in held:
        return held["images"].astype(np.int64)
    count, start = len(next(iter(held.values()))), int(record.inputs.get("start", 0))
    if record.stage == "measure":
        return np.arange(count)
    size = facts["valid" if record.inputs.get("split") == "valid" else "test"]
    return _random_order(size)[start : start + count]


@functools.cache
def _random_order(count: int) -> NDArray[np.int64]:
    """Return the permutation that torch.randperm draws from the seed 0."""
    draws = np.random.RandomState(0).randint(0, 1 << 32, size=count, dtype=np.uint32)
    order = np.arange(count)
    for k, draw in enumerate(draws[:-1].tolist()):
        other = k + draw % (count - k)
        order[[k, other]] = order[[other, k]]
    return order


def arrays(record: Record, *names: str) -> dict[str, NDArray[Any]]:
    """Return those of the named tensors that a record's object holds; raise the errors of `tensor_bytes`."""
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        held = load(tensor_bytes(record)) if record.object is not None else {}
    except SafetensorError as error:
        raise DamageError(f"the object of {record.key} in {record.folder} holds no tensors; {AGAIN}") from error
    return {name: np.asarray(held[name]) for name in names if name in held}
