"""Read back what a study's folder says of itself, whoever wrote it: its plan, its cells, and how far it is."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import DamageError, PlanError, UserError
from ..files import canonical_json, finite, read_json, sha256_bytes, write_json
from ._store import SCHEMA, Record, Store

# What may differ between a folder's plan and a new one: the plan may grow, its foundations may not change.
FOUNDATIONS = ("data", "model", "recipe", "finetune", "training")
# A large study's plan.json lists hundreds of thousands of keys.
MAX_BYTES = 512 << 20
CELL = {"seed": int, "method": str, "sparsity": int | float | None, "axis": str, "tasks": list}


@dataclass(frozen=True)
class Progress:
    """Count a study's tasks; `stages` are the numbers of records, `failures` the records of failed tasks."""

    plan: str
    tasks: int
    done: int
    stages: dict[str, int]
    failures: tuple[Record, ...]


def progress(out: str | Path) -> Progress:
    """Say how far a study is, without disturbing whoever runs it; raise UserError if `out` is no study's folder."""
    content, store = read_plan(out), Store(out)
    keys = sorted({key for cell in content["cells"] for key in cell["tasks"]})
    stages: Counter[str] = Counter()
    failures = []
    for key in keys:
        record = store.peek(key)
        if record is not None:
            stages[record.stage] += 1
            failures += [record] if record.error else []
    done = stages.total() - len(failures)
    return Progress(content["plan"]["name"], len(keys), done, dict(stages), tuple(failures))


def read_plan(out: str | Path) -> dict[str, Any]:
    """Return the content of a study's plan.json (docs/design.md, "Records").

    Raise UserError if there is none or it is another version's, DamageError if it is not what was written.
    """
    path = Path(out) / "plan.json"
    if not path.exists():
        raise UserError(f"{out} is not a study's output folder: it has no plan.json")
    way_out = "run the study again, which makes it anew, or get it again"
    try:
        content = read_json(path, limit=MAX_BYTES)
    except UserError as error:
        raise DamageError(f"{path} cannot be read; {way_out} ({error})") from error
    if not isinstance(content, dict):
        raise DamageError(f"{path} is no plan; {way_out}")
    if content.get("schema") != SCHEMA:
        raise UserError(f"{path} is not a plan of schema {SCHEMA}: it is damaged, or another version's")
    plan, cells, stated = content.get("plan"), content.get("cells"), content.pop("sha256", None)
    if stated is not None and stated != _checksum(content):
        raise DamageError(f"{path} was damaged or changed: its checksum is wrong; {way_out}")
    if not isinstance(plan, dict) or not isinstance(plan.get("name"), str) or not isinstance(cells, list):
        raise DamageError(f"{path} lacks a plan or its cells; {way_out}")
    if not all(_is_cell(cell) for cell in cells):
        raise DamageError(f"{path} has a cell that is none; {way_out}")
    return content


def write_plan(out: str | Path, content: dict[str, Any]) -> None:
    """Write a study's plan.json and the checksum of its content."""
    write_json(Path(out) / "plan.json", {**content, "sha256": _checksum(content)})


def _checksum(content: dict[str, Any]) -> str:
    return sha256_bytes(canonical_json(finite(content)).encode())


def _is_cell(cell: Any) -> bool:
    if not isinstance(cell, dict) or set(cell) != set(CELL):
        return False
    return all(isinstance(cell[name], kind) for name, kind in CELL.items()) and all(map(is_key, cell["tasks"]))


def is_key(text: Any) -> bool:
    """Say whether this is a task's key, which is safe as a file name."""
    return isinstance(text, str) and re.fullmatch("[0-9a-f]{32}", text) is not None


def refuse_another(out: Path, kept: dict[str, Any], table: dict[str, Any]) -> None:
    """Raise PlanError if a folder's plan has other foundations than a new one."""
    for name in FOUNDATIONS:
        if kept.get(name) != table.get(name):
            raise PlanError(
                f"{out} belongs to another plan: its {name} is {kept.get(name)}, this one's is "
                f"{table.get(name)}; choose another folder with --out"
            )
