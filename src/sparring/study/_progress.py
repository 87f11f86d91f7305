"""Say how far a study is, and whether a folder is of the same plan."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import PlanError
from ..records import Record, Store, read_plan

# What may differ between a folder's plan and a new one: the plan may grow, its foundations may not change.
FOUNDATIONS = ("data", "model", "recipe", "finetune", "training")


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
    keys = sorted({key for cell in content.cells for key in cell.tasks})
    stages: Counter[str] = Counter()
    failures = []
    for key in keys:
        record = store.peek(key)
        if record is not None:
            stages[record.stage] += 1
            failures += [record] if record.error else []
    done = stages.total() - len(failures)
    return Progress(content.plan["name"], len(keys), done, dict(stages), tuple(failures))


def refuse_another(out: Path, kept: dict[str, Any], table: dict[str, Any]) -> None:
    """Raise PlanError if a folder's plan has other foundations than a new one."""
    for name in FOUNDATIONS:
        if kept.get(name) != table.get(name):
            raise PlanError(
                f"{out} belongs to another plan: its {name} is {kept.get(name)}, this one's is "
                f"{table.get(name)}; choose another folder with --out"
            )
