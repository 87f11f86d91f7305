"""Run a plan: lay out its tasks, skip what is done, run the rest, write records; killed and run again, it goes on."""

from __future__ import annotations

import functools
import os
import platform
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from .. import __version__
from ..data import Dataset, load
from ..errors import PlanError, UserError
from ..files import canonical_json, read_json, write_json
from .estimate import estimate
from .executors import Done, Executor, InProcess, Processes, Task
from .networks import Context, Factory
from .plan import Plan
from .stages import perform_stage
from .store import SCHEMA, Record, Store
from .tasks import Cell, DataFacts, Work, lay_out

__all__ = ["Event", "environment", "execute", "run"]

# What may differ between a folder's plan and a new one: the plan may grow, its foundations may not change.
FOUNDATIONS = ("data", "model", "recipe", "finetune", "training")


@dataclass(frozen=True)
class Event:
    """Tell a watcher what happened: counts of tasks, and the record that was just made.

    The first event has no record but an `estimate` of the seconds that the rest will take (None: nobody made one).
    """

    total: int
    done: int
    cached: int
    failed: int
    running: tuple[Task, ...]
    record: Record | None = None
    label: str = ""
    estimate: float | None = None


Watcher = Callable[[Event], None]


def run(
    plan: Plan,
    out: str | Path,
    *,
    dataset: Dataset | None = None,
    workers: int | None = None,
    retry: bool = False,
    watch: Watcher | None = None,
    device: str = "cpu",
    factory: Factory | None = None,
    command: str = "",
) -> list[Record]:
    """Run a plan into the folder `out` and return its records, in the plan's order.

    `dataset` stands in for the one that the plan names; `factory`, called without arguments, for its model. Whatever the folder already holds is not done again. `workers` tasks run at a time (default: one per core; 0: in
    this process). A task that fails fails its cell alone; `retry` tries failed ones again. Raise UserError if the
    folder belongs to another plan, is in use, or cannot be written.
    """
    store = Store(out)
    store.prepare()
    if dataset is None:
        dataset = load(plan.data)
    with store.lock():
        facts = DataFacts.of(dataset)
        work = lay_out(plan, facts, device=device)
        _write_plan(store, plan, work, dataset, command)
        context = Context(dataset, store.tensors, store.scratch, device, factory)
        executor = _executor(context, workers, device)
        foretell = functools.partial(estimate, context=context, workers=executor.slots)
        try:
            return execute(
                work.tasks.values(),
                store,
                executor,
                retry=retry,
                watch=watch,
                labels=_labels(work.cells),
                foretell=foretell,
            )
        finally:
            executor.close()


def _executor(context: Context, workers: int | None, device: str) -> Executor:
    count = available_cores() if workers is None else workers
    if count < 0:
        raise UserError(f"workers must be 0 or more, not {count}")

    def perform(task: Task) -> Any:
        return perform_stage(context, task)

    return InProcess(perform) if count == 0 or device != "cpu" else Processes(perform, count)


def available_cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def execute(
    tasks: Iterable[Task],
    store: Store,
    executor: Executor,
    *,
    retry: bool = False,
    watch: Watcher | None = None,
    labels: Mapping[str, str] = MappingProxyType({}),
    foretell: Callable[[list[Task]], float] | None = None,
) -> list[Record]:
    """Run tasks (parents first) that the store lacks, and return all records in the tasks' order.

    A task whose parent failed is not run and has no record.
    """
    scheduler = _Scheduler(list(tasks), store, executor, retry, watch, labels, foretell)
    scheduler.run()
    return [scheduler.records[task.key] for task in scheduler.order if task.key in scheduler.records]


class _Scheduler:
    def __init__(
        self,
        tasks: list[Task],
        store: Store,
        executor: Executor,
        retry: bool,
        watch: Watcher | None,
        labels: Mapping[str, str],
        foretell: Callable[[list[Task]], float] | None,
    ) -> None:
        self.foretell = foretell
        self.labels = labels
        self.order, self.store, self.executor, self.watch = tasks, store, executor, watch
        self.records: dict[str, Record] = {}
        self.failed: set[str] = set()
        self.running: dict[str, Task] = {}
        for task in tasks:
            record = store.read(task.key)
            if record is not None and not (retry and record.error):
                self.records[task.key] = record
        needed = {parent for task in tasks if task.key not in self.records for parent in task.parents}
        for key in needed & set(self.records):
            if store.verify(key) is None:
                del self.records[key]  # damaged: set aside by the store, to be made again
        self.failed = {key for key, record in self.records.items() if record.error}
        self.cached = len(self.records)

    def run(self) -> None:
        waiting = [task for task in self.order if task.key not in self.records]
        self._tell(None, None if self.foretell is None else self.foretell(waiting))
        while waiting or self.running:
            waiting = self._submit(waiting)
            if self.running:
                for done in self.executor.wait():
                    self._keep(done)

    def _submit(self, waiting: list[Task]) -> list[Task]:
        """Hand out tasks whose parents are done, in order; drop those whose parents failed; return what is left."""
        left = []
        for task in waiting:
            if self.failed.intersection(task.parents):
                self.failed.add(task.key)
            elif len(self.running) < self.executor.slots and all(p in self.records for p in task.parents):
                self.running[task.key] = task
                self.executor.submit(task)
            else:
                left.append(task)
        return left

    def _keep(self, done: Done) -> None:
        task, outcome = done.task, done.outcome
        record = Record(task.key, task.stage, task.inputs, environment=environment(), times={"seconds": done.seconds})
        if outcome is None:
            record = replace(record, error=done.error)
            self.failed.add(task.key)
            self.store.write(record)
        else:
            record = replace(
                record,
                metrics=outcome.metrics,
                series=outcome.series,
                flags=outcome.flags,
                times={**outcome.times, **record.times},
            )
            record = self.store.write(record, outcome.tensors)
            (self.store.scratch / f"{task.key}.safetensors").unlink(missing_ok=True)
        del self.running[task.key]
        self.records[task.key] = record
        self._tell(record)

    def _tell(self, record: Record | None, estimate: float | None = None) -> None:
        if self.watch is not None:
            errors = sum(1 for r in self.records.values() if r.error)
            running = tuple(self.running.values())
            label = self.labels.get(record.key, "") if record is not None else ""
            self.watch(Event(len(self.order), len(self.records), self.cached, errors, running, record, label, estimate))


def _labels(cells: Iterable[Cell]) -> dict[str, str]:
    """Name each task by the last cell that holds it; the dense training, which all share, by the seed alone."""
    labels: dict[str, str] = {}
    for cell in cells:
        for key in cell.tasks:
            text = f"seed {cell.seed} · {cell.method}" + (f" {cell.sparsity:.1%}" if cell.sparsity else "")
            labels[key] = f"seed {cell.seed}" if key in labels else text
    return labels


def environment() -> dict[str, Any]:
    """Return what a record says of where it was made."""
    return {
        "sparring": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "system": platform.system(),
        "threads": 1,
    }


def _write_plan(store: Store, plan: Plan, work: Work, dataset: Dataset, command: str) -> None:
    """Write plan.json unless it says the same already; refuse a folder that belongs to another plan."""
    path = store.out / "plan.json"
    content = _described(plan, work, dataset)
    if path.exists():
        kept = read_json(path)
        _refuse_another(store, kept.get("plan", {}), content["plan"])
        kept.pop("command", None)
        if canonical_json(kept) == canonical_json(content):
            return
    elif any(store.records.iterdir()):
        raise PlanError(f"{store.out} holds records but no plan.json; choose another folder with --out")
    write_json(path, {**content, "command": command})


def _refuse_another(store: Store, kept: dict[str, Any], table: dict[str, Any]) -> None:
    for name in FOUNDATIONS:
        if kept.get(name) != table.get(name):
            raise PlanError(
                f"{store.out} belongs to another plan: its {name} is {kept.get(name)}, this one's is "
                f"{table.get(name)}; choose another folder with --out"
            )


def _described(plan: Plan, work: Work, dataset: Dataset) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "plan": plan.table(),
        "dataset": {
            "name": dataset.name,
            "classes": list(dataset.class_names),
            "train": len(dataset.train.x),
            "valid": len(dataset.valid.x),
            "test": len(dataset.test.x),
            "shape": list(dataset.train.x.shape[1:]),
        },
        "environment": environment(),
        "cells": [asdict(cell) for cell in work.cells],
    }
