"""Unite studies that were run apart. What a stranger's folder claims is believed only as far as its hashes go."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any

from ..errors import PlanError, UserError
from ..files import load_tensors, read_bounded, read_json, sha256_bytes
from ..history import append_entry, read_history
from ._plan_file import is_key, read_plan, refuse_another, write_plan
from ._store import Record, Store, parse_record
from .plans._plan import Plan
from .plans._task_graph import is_key_of

MAX_OBJECT = 1 << 30


@dataclass(frozen=True)
class Merged:
    """Say what a merge did: records added and known before; files refused, with the reason; keys that contradict."""

    added: int
    known: int
    refused: tuple[str, ...]
    different: tuple[str, ...]


def merge(sources: Sequence[str | Path], out: str | Path) -> Merged:
    """Unite studies of the same foundations into `out`, which may be one of them or a study of its own.

    A record is taken if it is sound, its checksum is right, its key is the hash of what it says it was made from, its
    object has the hash that it names, and the weights that it was made from are those kept here. A failed one gives way
    to one that is not. Where two equal tasks have different results, the first stays and the key is reported. Raise
    UserError if plans or data do not fit together. A stranger may still have invented results: hashes show damage and
    mistakes, not honesty.
    """
    store = Store(out)
    folders = [Path(source) for source in sources]
    if (store.out / "plan.json").exists():
        folders = [store.out, *(folder for folder in folders if folder.resolve() != store.out.resolve())]
    contents = [read_plan(folder) for folder in folders]
    united = contents[0]
    for folder, content in zip(folders[1:], contents[1:], strict=True):
        united = _united(folder, united, content)
    tally = _Tally(store)
    store.prepare()
    with store.lock():
        for folder in folders:
            for path, record in _parents_first(folder, tally):
                tally.take(folder, path, record)
        write_plan(store.out, united)
        _carry_looks(folders, store.out)
    return Merged(tally.added, tally.known, tuple(tally.refused), tuple(tally.different))


def _carry_looks(folders: Sequence[Path], out: Path) -> None:
    """Add to a folder's history the looks that others had at what is now in it; of registrations only its own count."""
    known = {entry["state"] for entry in read_history(out) if entry["kind"] == "look"}
    for folder in folders:
        for entry in read_history(folder):
            if entry["kind"] == "look" and entry["state"] not in known:
                number = 1 + len(known)
                known.add(entry["state"])
                append_entry(out, {**entry, "look": number, "from": folder.name})


class _Tally:
    def __init__(self, store: Store) -> None:
        self.store = store
        self.added = self.known = 0
        self.refused: list[str] = []
        self.different: list[str] = []
        self.data: str | None = None

    def refuse(self, path: Path, reason: UserError) -> None:
        self.refused.append(f"{path}: {reason}")

    def take(self, folder: Path, path: Path, record: Record) -> None:
        self._same_data(folder, record)
        try:
            content = _tensors_of(folder, record)
            self._same_weights(record)
        except UserError as error:
            self.refuse(path, error)
            return
        mine = self.store.read(record.key)
        if mine is None or (mine.error and not record.error):
            self.store.write(record, content)
            self.added += 1
        else:
            self.known += 1
            if not record.error and _result(mine) != _result(record):
                self.different.append(record.key)

    def _same_data(self, folder: Path, record: Record) -> None:
        data = record.inputs.get("data")
        self.data = self.data or data
        if data != self.data:
            raise UserError(f"{folder} was made from other data than the rest, though under the same name")

    def _same_weights(self, record: Record) -> None:
        """Raise UserError if a record was made from other tensors than those that are kept here under the same key."""
        for key, checksum in _weights(record).items():
            parent = self.store.peek(key)
            if parent is not None and parent.object is not None and parent.object["sha256"] != checksum:
                raise UserError(f"it was made from other weights than those kept of {key}")


def _parents_first(folder: Path, tally: _Tally) -> Iterator[tuple[Path, Record]]:
    """Yield the sound records of a stranger's folder; the tally is told of the others."""
    found: dict[str, Path] = {}
    before: dict[str, list[str]] = {}
    for path in sorted((folder / "records").glob("*.json")):
        try:
            record = _checked(path)
        except UserError as error:
            tally.refuse(path, error)
        else:
            found[record.key] = path
            before[record.key] = sorted(_weights(record))
    for key in TopologicalSorter(before).static_order():  # no circle: a key is the hash of its parents' keys
        if key in found:
            yield found[key], _checked(found[key])


def _checked(path: Path) -> Record:
    """Return a record of a stranger's; raise UserError unless its own hashes are right."""
    record = parse_record(read_json(path))
    if record.key != path.stem or not is_key(record.key):
        raise UserError("it does not bear its own key")
    if not is_key_of(record.key, record.stage, record.inputs, record.environment):
        raise UserError("its key is not the hash of its inputs")
    if not set(_weights(record)) <= set(record.inputs.get("parents", [])):
        raise UserError("it names weights that it was not made from")
    return record


def _weights(record: Record) -> dict[str, str]:
    """Return the hashes of the tensors that a record was made from, by their keys; the first records named none."""
    found: dict[str, str] = record.origin.get("weights", {})
    return found


def _tensors_of(folder: Path, record: Record) -> bytes:
    """Return the bytes of a stranger's object; raise UserError unless it is the one that its record names."""
    if record.object is None:
        return b""
    file = folder / "objects" / f"{record.key}.safetensors"
    content = read_bounded(file, limit=MAX_OBJECT)
    if sha256_bytes(content) != record.object["sha256"]:
        raise UserError("its object is not the one that it names")
    load_tensors(file)  # raises where it is no sound file of tensors
    return content


def _result(record: Record) -> tuple[Any, ...]:
    return record.metrics, record.series, record.flags, record.object, record.error


# -- plans ------------------------------------------------------------------------------------------------------------


def _united(folder: Path, first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Return plan.json of both studies; raise PlanError if they cannot be one."""
    mine, other = (Plan.from_table(content["plan"], source=str(folder)).table() for content in (first, second))
    refuse_another(folder, other, mine)
    if first.get("dataset") != second.get("dataset"):
        raise PlanError(f"{folder} has other splits or classes than the rest")
    plan = Plan.from_table(_grown(mine, other), source=str(folder)).table()
    return {**first, "plan": plan, "cells": _all_cells(first["cells"], second["cells"])}


def _grown(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Return the smallest plan that asks for all that either asks for; other settings are the first's."""
    table = {**second, **first}
    table["seeds"] = max(first["seeds"], second["seeds"])
    table["sparsities"] = sorted({*first["sparsities"], *second["sparsities"]})
    table["pruning"] = list(_methods(first, second, "pruning", "sparsities"))
    table["activation"] = list(_methods(first, second, "activation", "levels"))
    for name in ("attacks", "transfer", "certify", "lipschitz", "exact", "linear", "checkpoints"):
        table[name] = [*first[name], *(item for item in second[name] if item not in first[name])]
    return table


def _methods(first: dict[str, Any], second: dict[str, Any], name: str, grid: str) -> Iterator[dict[str, Any]]:
    """Unite methods by label, each with all its seeds and the points of its grid."""
    others = {method["label"]: method for method in second[name]}
    for method in first[name]:
        other = others.pop(method["label"], method)
        varying = (grid, "seeds")
        if _without(method, varying) != _without(other, varying):
            raise PlanError(f"'{method['label']}' means one method in one study and another in the other; rename one")
        seeds = [m.get("seeds") for m in (method, other)]
        points = [m.get(grid, plan["sparsities"]) for m, plan in ((method, first), (other, second))]
        own = {grid: sorted({*points[0], *points[1]})} if grid in method or grid in other else {}
        some = {} if None in seeds else {"seeds": max(s for s in seeds if s is not None)}
        yield {**_without(method, varying), **own, **some}
    yield from others.values()


def _without(table: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    return {name: value for name, value in table.items() if name not in names}


def _all_cells(first: list[dict[str, Any]], second: list[dict[str, Any]]) -> list[dict[str, Any]]:
    cells: dict[tuple[Any, ...], dict[str, Any]] = {}
    for cell in (*first, *second):
        who = (cell["seed"], cell["method"], cell["sparsity"], cell["axis"])
        tasks = cells[who]["tasks"] if who in cells else []
        cells[who] = {**cell, "tasks": [*tasks, *(key for key in cell["tasks"] if key not in tasks)]}
    return list(cells.values())
