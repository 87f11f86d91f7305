"""Run a plan: list its tasks, skip finished ones, run the rest and write records; a rerun resumes."""

from __future__ import annotations

import contextlib
import functools
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ...data import Dataset, load, untrained
from ...devices import Place, place_of
from ...errors import DamageError, PlanError, UserError
from ...files import canonical_json, sha256_bytes
from ...history import append_entry, read_history
from ...records import Cell, PlanFile, Record, Store, read_plan, write_plan
from ...units import percent
from ..plans._dry_run import estimate, foretold, rehearse
from ..plans._memory import fitted
from ..plans._plan import AUTO, BATCH_SIZE, Plan, refuse_another
from ..plans._task_graph import DataFacts, Work, lay_out
from ..stages._networks import Context, Factory, fingerprint
from ..stages._table import perform_stage
from ._executors import Executor, InProcess, Processes
from ._ray import RayCluster
from ._schedule import Watcher, environment, execute


@dataclass(frozen=True)
class Progress:
    """Counts of a study's tasks; `stages` are the numbers of records, `failures` the records of failed tasks."""

    plan: str
    tasks: int
    done: int
    stages: dict[str, int]
    failures: tuple[Record, ...]


def progress(out: str | Path) -> Progress:
    """Return the progress of a study; safe while it is running; raise UserError if `out` is not a study's folder."""
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


def register(plan: Plan, out: str | Path) -> dict[str, Any]:
    """Write a plan and its hash to the history of the folder `out` before its first record, and return that entry.

    A registered plan is not registered again. Raises PlanError if the folder has records and the plan is not the
    registered one, DamageError if the history is damaged, and UserError as `run` does.
    """
    store = Store(out)
    store.prepare()
    table = plan.table()
    name = sha256_bytes(canonical_json(table).encode())
    with store.lock():
        known = [entry for entry in read_history(out) if entry["kind"] == "registered"]
        if known and known[-1]["plan"] == name:
            return known[-1]
        if any(store.records.iterdir()):
            raise PlanError(
                f"{store.out} has records already, but a plan must be registered before the first; choose another "
                "folder with --out, or omit --register"
            )
        return append_entry(out, {"kind": "registered", "plan": name, "table": table})


def run(
    plan: Plan,
    out: str | Path,
    *,
    dataset: Dataset | None = None,
    workers: int | None = None,
    retry: bool = False,
    watch: Watcher | None = None,
    device: str = "cpu",
    dtype: str | None = None,
    factory: Factory | None = None,
    ray: str | None = None,
    command: str = "",
) -> list[Record]:
    """Run a plan in the folder `out` and return its records, in the plan's order.

    `dataset` replaces the plan's data set. `factory`, called without arguments, replaces its model; the plan then names
    it "module:name". Existing results in the folder are not computed again. `workers` tasks run at a time (default: one
    per core; 0: in this process), or as many as fit on the Ray cluster at the address `ray` ("auto": the one on this
    machine). `device` is "cpu", a GPU such as "cuda:0", or "auto": a GPU if there is one; `dtype` "float64" computes in
    double precision. A failed task does not stop the others; `retry` runs failed ones again. Raises UserError if the
    folder belongs to another plan, is in use, or cannot be written, or if there is no such device.
    """
    place = place_of(device, dtype, training=True, here=ray is None)
    store = Store(out)
    store.prepare()
    if dataset is None:
        dataset = load(plan.data, request=plan.request())
    dataset = dataset if plan.trains else untrained(dataset)
    with store.lock():
        read_history(out)  # a damaged history is reported before the work, not after it
        facts = DataFacts.of(dataset)
        code = {} if factory is None else {plan.model.name: fingerprint(factory)}
        context = Context(dataset, store.tensors, store.scratch, place, factory)
        rehearse(plan, context)
        plan, work = _fitted(plan, context, store, _slots(workers, place, ray), facts, code)
        _write_plan(store, plan, work, dataset, command)
        executor = _executor(context, workers, ray)
        foretell = functools.partial(estimate, context=context, workers=executor.slots)
        try:
            return execute(
                work.tasks.values(),
                store,
                executor,
                retry=retry,
                watch=watch,
                labels=_labels(work.cells),
                origins=_origins(plan, work.cells),
                foretell=foretell,
                place=place,
            )
        finally:
            executor.close()


def forecast(
    plan: Plan, dataset: Dataset, *, workers: int | None = None, device: str = "cpu", dtype: str | None = None,
    factory: Factory | None = None,
) -> str:  # fmt: skip
    """Return a sentence on how long a plan takes, after its network has been run on some images of the data.

    The images' values do not matter; pass this as `begin` to `data.load`. "" if nothing is trained. Raises UserError,
    as `run` would, for settings that the network does not support, and if memory is too small.
    """
    place = place_of(device, dtype, training=True)
    context, slots = Context(dataset, lambda _: {}, place=place, factory=factory), _slots(workers, place, None)
    rehearse(plan, context)
    facts = DataFacts("", len(dataset.test.x), len(dataset.valid.x), tuple(dataset.train.x.shape[1:]), dataset.classes)
    code = {} if factory is None else {plan.model.name: fingerprint(factory)}
    work = lay_out(fitted(plan, context, slots), facts, place=place, code=code)
    return foretold(work.tasks.values(), context, workers=slots)


def _fitted(
    plan: Plan, context: Context, store: Store, slots: int, facts: DataFacts, code: Mapping[str, str]
) -> tuple[Plan, Work]:
    """Return the plan with its batch size, and its tasks; memory is measured only if a task has no record yet."""
    kept = _kept_size(store)
    drawn_up = replace(plan, batch_size=kept or BATCH_SIZE) if plan.batch_size == AUTO else plan
    work = lay_out(drawn_up, facts, place=context.place, code=code)
    if work.tasks.keys() <= {record.stem for record in store.records.iterdir()}:
        return drawn_up, work
    plan = fitted(plan, context, slots, kept=kept)
    return plan, work if plan == drawn_up else lay_out(plan, facts, place=context.place, code=code)


def _slots(workers: int | None, place: Place, ray: str | None) -> int:
    """Return how many tasks share this machine's memory; 1 for a cluster, whose machines are unknown."""
    alone = ray is not None or place.device != "cpu"
    return 1 if alone else max(1, available_cores() if workers is None else workers)


def _kept_size(store: Store) -> int | None:
    with contextlib.suppress(UserError):
        size = read_plan(store.out).plan.get("batch_size")
        return size if isinstance(size, int) else None
    return None


def _executor(context: Context, workers: int | None, ray: str | None) -> Executor:
    if ray is not None:
        return RayCluster(perform_stage, context, ray)
    count = available_cores() if workers is None else workers
    if count < 0:
        raise UserError(f"workers must be 0 or more, not {count}")
    work = functools.partial(perform_stage, context)
    return InProcess(work) if count == 0 or context.device != "cpu" else Processes(work, count)


def available_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _labels(cells: Iterable[Cell]) -> dict[str, str]:
    """Name each task by the last cell that contains it; the dense training, which all share, by the seed only."""
    labels: dict[str, str] = {}
    for cell in cells:
        for key in cell.tasks:
            text = f"seed {cell.seed} · {cell.method}" + (f" {percent(cell.sparsity)}" if cell.sparsity else "")
            labels[key] = f"seed {cell.seed}" if key in labels else text
    return labels


def _origins(plan: Plan, cells: Sequence[Cell]) -> dict[str, dict[str, Any]]:
    """Return each task's plan and seed; the first seed for a shared task."""
    return {key: {"plan": plan.name, "seed": cell.seed} for cell in reversed(cells) for key in cell.tasks}


def _write_plan(store: Store, plan: Plan, work: Work, dataset: Dataset, command: str) -> None:
    """Write plan.json unless it is the same already; refuse a folder that belongs to another plan.

    The latest command is stored, since an earlier one may now mean another plan (a preset changes); without one, the
    stored command stays.
    """
    kept, content = _kept(store, work), _described(plan, work, dataset)
    if kept is not None:
        refuse_another(store.out, kept.plan, content.plan)
        command = command or kept.command
    document = replace(content, command=command)
    if kept != document:
        write_plan(store.out, document)


def _kept(store: Store, work: Work) -> PlanFile | None:
    """Return the content of plan.json. A damaged one is set aside and counts as none if the records are this plan's."""
    damaged = False
    if store.plan.exists():
        try:
            return read_plan(store.out)
        except DamageError:
            damaged = True
    records = [record.stem for record in store.records.iterdir()]
    if records and work.tasks.keys().isdisjoint(records):
        raise PlanError(
            f"{store.out} holds records of another plan and {'a damaged' if damaged else 'no'} plan.json; "
            "choose another folder with --out"
        )
    if damaged:
        store.set_aside(store.plan)
    return None


def _described(plan: Plan, work: Work, dataset: Dataset) -> PlanFile:
    return PlanFile(
        plan=plan.table(),
        cells=tuple(work.cells),
        dataset={
            "name": dataset.name,
            "classes": list(dataset.class_names),
            "class_count": dataset.classes,
            "train": 0 if dataset.train is dataset.valid else len(dataset.train.x),
            "valid": len(dataset.valid.x),
            "test": len(dataset.test.x),
            "shape": list(dataset.train.x.shape[1:]),
        },
        environment=environment(),
    )
