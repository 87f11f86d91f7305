"""Measure what a study costs beside its work, and what a cell's work costs by stage.

    python benchmarks/scaling.py [--json] [--cells N] [--epochs N] [--rounds N]

All but the last are seconds of the processor, so that other work on the machine counts less.

1. A cached study: a plan of N cells (default 1,000) over digits is laid out, every record and object is written by a
   stand-in for the work, and then the plan is run, in a process of its own. That run must find every record and do
   nothing. Measured: seconds of `run` and peak memory of the process, with its libraries.
2. Scheduling alone: tasks a second through `execute` with work that does nothing, for two sizes (the time per task must
   not grow with their number). Beside it, milliseconds for writing a record with the weights of LeNet-300-100 and
   without, to which the wait for the disk adds.
3. Seconds by stage of a short form of the preset `quick` in this process: docs/scaling.md is built on them.
4. Workers: the same on one worker and on two, alternating, by the wall clock, so that the cores must be idle. Records
   must be equal. `--rounds 0` leaves it out.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing as mp
import resource
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast
from unittest import mock

import torch

from sparring import data
from sparring.files import pack_tensors
from sparring.records import DatasetFacts, PlanFile, Record, Store, write_plan
from sparring.study import DataFacts, Event, InProcess, Plan, Task, TaskOutcome, environment, execute, lay_out, run
from sparring.study.stages._inputs import Inputs, Network


@dataclass(frozen=True, kw_only=True)
class Nothing(Inputs):
    """The inputs of tasks that do nothing."""

    stage = "train"


NOTHING = Nothing(data="", model=Network(name="linear"))


def in_a_child(work: Callable[[], dict[str, float]]) -> dict[str, float]:
    """Run something in a process of its own and return what it returns and its peak memory in MiB."""
    context = mp.get_context("fork")
    here, there = context.Pipe()

    def send() -> None:
        there.send({**work(), "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024})

    process = context.Process(target=send)
    process.start()
    there.close()  # so that a child that fails ends the wait
    found: dict[str, float] = here.recv()
    process.join()
    return found


def cached(cells: int, folder: Path) -> dict[str, float]:
    """Time a study that has nothing to do."""
    seeds = 10 if cells >= 100 else 1
    points = cells // seeds - 2  # the reference and the control are cells too
    plan = Plan.from_table(
        {
            "name": "cached",
            "data": "digits",
            "model": {"name": "mlp", "widths": [32]},
            "seeds": seeds,
            "sparsities": [(i + 1) / (points + 1) for i in range(points)],
            "attacks": [
                {"name": "fgsm", "eps": [0.05, 0.1, 0.2]},
                {"name": "pgd", "eps": [0.1]},
                {"name": "deepfool", "norm": "l2"},
            ],
        }
    )
    dataset = data.load("digits")
    work = lay_out(plan, DataFacts.of(dataset))
    store = Store(folder)
    store.prepare()
    write_plan(folder, PlanFile(plan.table(), (), cast(DatasetFacts, {}), environment()))
    content = pack_tensors({"distance": torch.zeros(300), "success": torch.zeros(300, dtype=torch.bool)})
    with mock.patch("os.fsync"):  # thousands of syncs, which the run that is timed does not make, take minutes
        for task in work.tasks.values():
            record = Record(task.key, task.stage, task.table(), {"accuracy": 0.5}, environment=environment())
            store.write(record, content)
    events: list[Event] = []

    def again() -> dict[str, float]:
        began = time.process_time()
        records = run(plan, folder, dataset=dataset, watch=events.append)
        seconds = time.process_time() - began
        assert len(records) == len(work.tasks) and events[0].cached == events[0].total == len(records)
        return {"seconds": seconds}

    return {"cells": len(work.cells), "tasks": len(work.tasks), **in_a_child(again)}


class Forgetful(Store):
    """Write nothing, to time the scheduler alone."""

    def write(self, record: Record, content: bytes = b"") -> Record:
        return record


def scheduling(count: int, folder: Path) -> float:
    """Return microseconds per task of a scheduler whose tasks, a third of them parents of two others, do nothing."""
    keys = [f"{i:032x}" for i in range(count)]
    tasks = [Task(key, NOTHING, (keys[i - i % 3],) if i % 3 else ()) for i, key in enumerate(keys)]
    store = Forgetful(folder)
    store.prepare()
    began = time.process_time()
    records = execute(tasks, store, InProcess(lambda task, tell: TaskOutcome()))
    assert len(records) == count
    return (time.process_time() - began) / count * 1e6


def writing(numbers: int, folder: Path) -> float:
    """Return the median of milliseconds of writing a record with so many numbers."""
    store, content, seconds = Store(folder), pack_tensors({"numbers": torch.zeros(numbers)}), []
    store.prepare()
    for i in range(50):
        record = Record(f"{i:032x}", "measure", {}, {"accuracy": 0.5}, environment=environment())
        began = time.process_time()
        store.write(record, content)
        seconds.append(time.process_time() - began)
    return 1e3 * statistics.median(seconds)


def short(epochs: int) -> Plan:
    """Return a short form of `quick`."""
    changes = [f"recipe.epochs={epochs}", f"finetune.epochs={max(1, epochs // 2)}", "seeds=2", "sparsities=[0.5, 0.9]"]
    return Plan.load("quick", changes)


def stages(plan: Plan) -> dict[str, float]:
    """Run a plan in this process; return the median of processor seconds of each stage's tasks."""
    seconds: dict[str, list[float]] = defaultdict(list)
    began = time.process_time()

    def watch(event: Event) -> None:
        nonlocal began
        if event.record is not None:
            inputs = event.record.inputs
            name = inputs["attack"]["name"] if event.record.stage == "attack" else event.record.stage
            seconds[name].append(time.process_time() - began)
        if event.under is None:  # one of those that come while a task runs
            began = time.process_time()

    with tempfile.TemporaryDirectory() as folder:
        run(plan, folder, dataset=data.load(plan.data), workers=0, watch=watch)
    return {name: statistics.median(times) for name, times in sorted(seconds.items())}


def speedup(plan: Plan, rounds: int) -> dict[str, float]:
    """Run a plan on one worker and on two in turn; return their medians and the median of ratios."""
    dataset = data.load(plan.data)
    seconds: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(rounds):
        found = {}
        for workers in (1, 2):
            with tempfile.TemporaryDirectory() as folder:
                began = time.perf_counter()
                records = run(plan, folder, dataset=dataset, workers=workers)
                seconds[workers].append(time.perf_counter() - began)
            found[workers] = {record.key: (record.metrics, record.object) for record in records}
        assert found[1] == found[2], "two workers made other records than one"
    return {
        "one_worker": statistics.median(seconds[1]),
        "two_workers": statistics.median(seconds[2]),
        "speedup": statistics.median(one / two for one, two in zip(seconds[1], seconds[2], strict=True)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--cells", type=int, default=1000)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        result: dict[str, Any] = {"cached": cached(options.cells, folder / "cached")}
        result["scheduler_us_per_task"] = {
            str(count): round(scheduling(count, folder / f"{count}"), 1) for count in (1_000, 16_000)
        }
        result["writing_ms"] = {str(n): writing(n, folder / f"writing{n}") for n in (300, 266_610)}
    result["stages"] = stages(short(options.epochs))
    if options.rounds:
        result["workers"] = speedup(short(options.epochs), options.rounds)
    if options.json:
        print(json.dumps(result))
        return
    found = result["cached"]
    print(f"cached study, {found['cells']} cells, {found['tasks']} tasks: {found['seconds']:.2f} s, ", end="")
    print(f"peak {found['peak_mib']:.0f} MiB")
    for count, cost in result["scheduler_us_per_task"].items():
        print(f"scheduler, {count} tasks: {cost:.0f} µs per task")
    for numbers, cost in result["writing_ms"].items():
        print(f"a record of {numbers} numbers: {cost:.1f} ms")
    for stage, seconds in result["stages"].items():
        print(f"{stage}: {seconds:.3f} s")
    if "workers" in result:
        print(
            "quick, short: {one_worker:.1f} s on one worker, {two_workers:.1f} s on two ({speedup:.2f}×)".format_map(
                result["workers"]
            )
        )


if __name__ == "__main__":
    main()
