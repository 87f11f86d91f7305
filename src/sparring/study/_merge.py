"""Merge studies that ran separately. Folders of others are untrusted; every hash is verified."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any

from ..errors import DamageError, PlanError, UserError
from ..files import load_tensors
from ..history import append_entry, read_history
from ..records import (
    Cell,
    Folder,
    PlanFile,
    Record,
    Store,
    read_plan,
    read_record,
    tensor_bytes,
    write_plan,
)
from .plans._plan import Plan, refuse_another
from .plans._task_graph import is_key_of

GRIDS = {"pruning": "sparsities", "activation": "levels"}  # tables that are merged by label
CONTROLS = ("decays", "small_dense", "wide_sparse")


@dataclass(frozen=True)
class Merged:
    """Result of a merge: records added and already present; refused files with reasons; keys of differing records."""

    added: int
    known: int
    refused: tuple[str, ...]
    different: tuple[str, ...]


def merge(sources: Sequence[str | Path], out: str | Path) -> Merged:
    """Merge studies with the same data, model and recipe into `out`, which may be one of them or its own study.

    A record is accepted if it is valid, its checksum is correct, its key is the hash of its inputs, its object has the
    stated hash, and the weights that it was made from are present. Failed records are replaced by successful ones. If
    two records of the same task differ, the first one is kept and the key is reported. Raises UserError if plans or
    data do not match. Others may still have invented results: hashes show damage and mistakes, not honesty.
    """
    store = Store(out)
    folders = [Path(source) for source in sources]
    if store.plan.exists():
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
    """Add to a folder's history the looks of others at its new content; only its own registration counts."""
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
        self.refused.append(str(reason) if isinstance(reason, DamageError) else f"{path}: {reason}")

    def take(self, folder: Path, path: Path, record: Record) -> None:
        self._same_data(folder, record)
        try:
            content = _tensors_of(record)
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
            if not record.error and not _agree(mine, record):
                self.different.append(record.key)

    def _same_data(self, folder: Path, record: Record) -> None:
        data = record.inputs.get("data")
        self.data = self.data or data
        if data != self.data:
            raise UserError(f"{folder} has different data from the other folders, under the same name")

    def _same_weights(self, record: Record) -> None:
        """Raise UserError if a record was made from tensors that differ from those stored here under the same key."""
        for key, checksum in record.weights.items():
            parent = self.store.peek(key)
            if parent is not None and parent.object is not None and parent.object["sha256"] != checksum:
                raise UserError(f"it was made from other weights than the ones of {key}")


def _parents_first(folder: Path, tally: _Tally) -> Iterator[tuple[Path, Record]]:
    """Yield the valid records of an untrusted folder; the tally counts the others."""
    before: dict[str, list[str]] = {}
    for path in sorted(Folder(folder).records.glob("*.json")):
        try:
            record = _checked(folder, path.stem)
        except UserError as error:
            tally.refuse(path, error)
        else:
            before[record.key] = sorted(record.weights)
    for key in TopologicalSorter(before).static_order():  # no cycles: a key is a hash of its parents' keys
        if key in before:
            yield Folder(folder).record(key), _checked(folder, key)


def _checked(folder: Path, key: str) -> Record:
    """Return an untrusted record; raise UserError unless its own hashes are correct."""
    record = read_record(folder, key)
    if record is None:
        raise UserError("it is missing")
    if not is_key_of(record.key, record.stage, record.inputs, record.environment):
        raise UserError("its key is not the hash of its inputs")
    if not set(record.weights) <= set(record.inputs.get("parents", [])):
        raise UserError("it lists weights that it was not made from")
    return record


def _tensors_of(record: Record) -> bytes:
    """Return the bytes of an untrusted object; raise UserError unless they match the record."""
    content = tensor_bytes(record)
    if content:
        load_tensors(Folder(record.folder or "").object(record.key))  # raises for an invalid file of tensors
    return content


def _agree(one: Record, other: Record) -> bool:
    """Return whether two results of a task are the same, to the bit; objects of other schemas cannot be compared."""
    names = ("metrics", "series", "flags", "error", *(("object",) if one.schema == other.schema else ()))
    return all(getattr(one, name) == getattr(other, name) for name in names)


# -- plans ------------------------------------------------------------------------------------------------------------


def _united(folder: Path, first: PlanFile, second: PlanFile) -> PlanFile:
    """Return the merged plan.json of both studies; raise PlanError if they do not match."""
    mine, other = (Plan.from_table(file.plan, source=str(folder)).table() for file in (first, second))
    refuse_another(folder, other, mine)
    if first.dataset != second.dataset:
        raise PlanError(f"{folder} has different splits or classes from the other folders")
    plan = Plan.from_table(_grown(mine, other), source=str(folder)).table()
    return replace(first, plan=plan, cells=_all_cells(first.cells, second.cells))


def _grown(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Return the smallest plan that includes both; other settings are the first's."""
    asked = [controls for controls in (first["controls"], second["controls"]) if any(map(controls.get, CONTROLS))]
    if len(asked) > 1:
        _refuse_other_controls(first, second)
    methods = {name: list(_methods(first, second, name, grid)) for name, grid in GRIDS.items()}
    return {**_all_of(first, second), **methods, "controls": _all_of(*asked) if len(asked) > 1 else (*asked, {})[0]}


def _all_of(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Merge every setting of a table: lists have the items of both, numbers of seeds and switches the larger value.

    No `seeds` means all.
    """
    return {name: _more(name, first.get(name), second.get(name)) for name in dict.fromkeys([*first, *second])}


def _more(name: str, mine: Any, other: Any) -> Any:
    if name == "seeds":
        return None if None in (mine, other) else max(mine, other)
    if isinstance(mine, dict) and isinstance(other, dict):
        return _all_of(mine, other)
    if isinstance(mine, list) and mine and other and mine != other:
        every = [*mine, *(item for item in other if item not in mine)]
        return every if any(isinstance(item, dict | str) for item in every) else sorted(every)
    return other if mine is None or mine is False or mine == [] else mine


def _refuse_other_controls(first: dict[str, Any], second: dict[str, Any]) -> None:
    """Raise PlanError if the two studies have different controls of the same name."""
    mine, other = first["controls"], second["controls"]
    if mine["decays"] and other["decays"] and mine["decays"] != other["decays"]:
        raise PlanError("'tuned decay' was chosen from other controls.decays in one study; use the same ones")
    wide = [Plan.from_table(plan).first_to_a_sparsity for plan in (first, second) if plan["controls"]["wide_sparse"]]
    if len({repr(pruning) for pruning in wide}) > 1:
        raise PlanError("'wide sparse' was pruned by another method in one study; use the same first [[pruning]] table")


def _methods(first: dict[str, Any], second: dict[str, Any], name: str, grid: str) -> Iterator[dict[str, Any]]:
    """Merge methods by label, each with all its seeds and the points of its grid."""
    others = {method["label"]: method for method in second[name]}
    for method in first[name]:
        other = others.pop(method["label"], method)
        varying = (grid, "seeds")
        if _without(method, varying) != _without(other, varying):
            raise PlanError(f"'{method['label']}' has different meanings in the two studies; rename one")
        seeds = [m.get("seeds") for m in (method, other)]
        points = [m.get(grid, plan["sparsities"]) for m, plan in ((method, first), (other, second))]
        own = {grid: sorted({*points[0], *points[1]})} if grid in method or grid in other else {}
        some = {} if None in seeds else {"seeds": max(s for s in seeds if s is not None)}
        yield {**_without(method, varying), **own, **some}
    yield from others.values()


def _without(table: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    return {name: value for name, value in table.items() if name not in names}


def _all_cells(first: Sequence[Cell], second: Sequence[Cell]) -> tuple[Cell, ...]:
    cells: dict[tuple[Any, ...], Cell] = {}
    for cell in (*first, *second):
        who = (cell.seed, cell.method, cell.sparsity, cell.axis)
        tasks = cells[who].tasks if who in cells else ()
        cells[who] = replace(cell, tasks=(*tasks, *(key for key in cell.tasks if key not in tasks)))
    return tuple(cells.values())
