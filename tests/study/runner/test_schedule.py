"""In what order tasks are handed out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from sparring.records import Store
from sparring.study import Task, TaskOutcome, execute
from sparring.study.runner._executors import Done, Under, ignore
from sparring.study.stages._inputs import Inputs, Network

SEEDS, EACH = 3, 6
TRAINING = 5


LINEAR = Network(name="linear")


@dataclass(frozen=True, kw_only=True)
class Seeded(Inputs):
    """The inputs of a training of which only the seed matters."""

    stage = "train"
    seed: int


class Attacked(Seeded):
    """Those of what hangs on it."""

    stage = "attack"


def plan() -> list[Task[Seeded]]:
    """Return a training of each seed and what hangs on it."""
    tasks: list[Task[Seeded]] = []
    for seed in range(SEEDS):
        root = Task(f"{len(tasks):032x}", Seeded(data="", model=LINEAR, seed=seed))
        tasks.append(root)
        for _ in range(EACH):
            tasks.append(Task(f"{len(tasks):032x}", Attacked(data="", model=LINEAR, seed=seed), (root.key,)))
    return tasks


class Clock:
    """Pretend to run tasks on some workers: a training takes TRAINING ticks, all else one."""

    def __init__(self, slots: int) -> None:
        self.slots, self.now, self.idle = slots, 0, 0
        self.hear: Callable[[Under], None] = ignore
        self.ends: list[tuple[int, Task[Any]]] = []
        self.order: list[Task[Any]] = []

    def submit(self, task: Task[Any]) -> None:
        self.order.append(task)
        self.ends.append((self.now + (TRAINING if task.stage == "train" else 1), task))

    def wait(self) -> list[Done]:
        end = min(end for end, _ in self.ends)
        self.idle += (end - self.now) * (self.slots - len(self.ends))
        self.now = end
        done = [task for at, task in self.ends if at == end]
        self.ends = [(at, task) for at, task in self.ends if at != end]
        return [Done(task, TaskOutcome(), None, 0.0) for task in done]

    def close(self) -> None:
        self.ends.clear()


def _run(folder: Path, slots: int) -> Clock:
    store = Store(folder)
    store.prepare()
    clock = Clock(slots)
    execute(plan(), store, clock)
    return clock


def test_the_last_training_does_not_keep_a_worker_waiting(tmp_path: Path) -> None:
    clock = _run(tmp_path, 2)
    assert len(clock.order) == SEEDS * (1 + EACH)
    assert clock.idle <= 1


@pytest.mark.parametrize("slots", [1, 2])
def test_first_results_come_early(tmp_path: Path, slots: int) -> None:
    seeds = [task.inputs.seed for task in _run(tmp_path, slots).order if task.stage == "attack"]
    assert seeds == sorted(seeds)
