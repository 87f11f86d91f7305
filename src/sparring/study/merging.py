"""Unite studies that were run apart. What a stranger's folder claims is believed only as far as its hashes go."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import PlanError, UserError
from ..files import load_tensors, read_bounded, read_json, sha256_bytes, write_json
from .kept import is_key, read_plan, refuse_another
from .plan import Plan
from .store import Record, Store, parse_record
from .tasks import is_key_of

__all__ = ["Merged", "merge"]

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

    A record is taken if it is sound, its checksum is right, its key is the hash of what it says it was made from, and
    its object has the hash that it names. A failed one gives way to one that is not. Where two equal tasks have
    different results, the first stays and the key is reported. Raise UserError if plans or data do not fit together.
    A stranger may still have invented results: hashes show damage and mistakes, not honesty.
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
            for path in sorted((folder / "records").glob("*.json")):
                tally.take(folder, path)
        write_json(store.out / "plan.json", united)
    return Merged(tally.added, tally.known, tuple(tally.refused), tuple(tally.different))


class _Tally:
    def __init__(self, store: Store) -> None:
        self.store = store
        self.added = self.known = 0
        self.refused: list[str] = []
        self.different: list[str] = []
        self.data: str | None = None

    def take(self, folder: Path, path: Path) -> None:
        try:
            record, content = _checked(folder, path)
        except UserError as error:
            self.refused.append(f"{path}: {error}")
            return
        self._same_data(folder, record)
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


def _checked(folder: Path, path: Path) -> tuple[Record, bytes]:
    """Return a record of a stranger's and its object's bytes; raise UserError unless all hashes are right."""
    record = parse_record(read_json(path))
    if record.key != path.stem or not is_key(record.key):
        raise UserError("it does not bear its own key")
    if not is_key_of(record.key, record.stage, record.inputs, record.environment):
        raise UserError("its key is not the hash of its inputs")
    if record.object is None:
        return record, b""
    file = folder / "objects" / f"{record.key}.safetensors"
    content = read_bounded(file, limit=MAX_OBJECT)
    if sha256_bytes(content) != record.object["sha256"]:
        raise UserError("its object is not the one that it names")
    load_tensors(file)  # raises where it is no sound file of tensors
    return record, content


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
