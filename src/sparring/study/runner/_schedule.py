"""Run missing tasks, parents before children, as many at a time as an executor allows."""

from __future__ import annotations

import functools
import heapq
import itertools
import platform
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from graphlib import TopologicalSorter
from importlib.metadata import version
from types import MappingProxyType
from typing import Any

import torch

from ... import __version__
from ...devices import CPU, Place
from ...errors import StorageError
from ...ram import used_memory
from ...records import Record, Store
from ...train import is_whole
from ._executors import AnyTask, Done, Executor, Under

# A report's tensors are smaller, and are checked at every start; larger ones (weights) are checked when needed.
SMALL_OBJECT = 1 << 20
FEW = 3  # finished tasks until which the remaining time is predicted


@dataclass(frozen=True)
class Event:
    """A progress event: counts of tasks, and the record that was just written; the first has none.

    `estimate`: remaining seconds (None: unknown), foretold until three tasks show how long they take. `memory`:
    resident bytes of this process and its workers. `damaged`: the files that were found damaged and set aside so far.
    `images`: how many the task of the record worked on, as far as it said so. Events in between have no record either,
    but `under`: a task that takes longer than two seconds, and `label` is its own.
    """

    total: int
    done: int
    cached: int
    failed: int
    running: tuple[AnyTask, ...]
    record: Record | None = None
    label: str = ""
    estimate: float | None = None
    damaged: tuple[str, ...] = ()
    memory: int = 0
    images: int = 0
    under: Under | None = None


Watcher = Callable[[Event], None]


def execute(
    tasks: Iterable[AnyTask],
    store: Store,
    executor: Executor,
    *,
    retry: bool = False,
    watch: Watcher | None = None,
    labels: Mapping[str, str] = MappingProxyType({}),
    origins: Mapping[str, dict[str, Any]] = MappingProxyType({}),
    foretell: Callable[[list[AnyTask]], float | None] | None = None,
    place: Place = CPU,
) -> list[Record]:
    """Run tasks (parents first) that the store does not have, and return all records in the tasks' order.

    `labels` and `origins` give, by key, the label for watchers and the place of a task that its record stores. `place`
    is where tasks run; records store it too. A task whose parent failed is not run and has no record. Raises
    StorageError if the disk is full or a required file is damaged; finished tasks are kept.
    """
    scheduler = _Scheduler(list(tasks), store, executor, watch, labels, origins, place)
    scheduler.recall(retry)
    scheduler.run(foretell)
    return [scheduler.records[task.key] for task in scheduler.order if task.key in scheduler.records]


@dataclass
class _Scheduler:
    """Finished, running and ready tasks. Each task and each of its parents is visited once, not once per round."""

    order: list[AnyTask]
    store: Store
    executor: Executor
    watch: Watcher | None
    labels: Mapping[str, str]
    origins: Mapping[str, dict[str, Any]]
    place: Place
    records: dict[str, Record] = field(default_factory=dict)
    running: dict[str, AnyTask] = field(default_factory=dict)
    waiting: TopologicalSorter[str] = field(default_factory=TopologicalSorter)
    ready: list[tuple[float, str]] = field(default_factory=list)  # a heap of ranks and keys
    cached: int = 0
    errors: int = 0
    began: float = 0.0
    estimate: float | None = None

    def recall(self, retry: bool) -> None:
        """Load existing records; the inputs of a missing task are checked byte by byte, however large."""
        for task in self.order:
            record = self.store.verify(task.key, at_most=SMALL_OBJECT)
            if record is not None and not (retry and record.error):
                self.records[task.key] = record
        missing = [task for task in self.order if task.key not in self.records]
        for key in {parent for task in missing for parent in task.parents} & set(self.records):
            if self.store.verify(key) is None:
                del self.records[key]  # damaged: set aside by the store, and recomputed
        for path in map(self.store.checkpoint, (task.key for task in missing)):
            if path.exists() and not is_whole(path):
                self.store.set_aside(path)
        self.cached = len(self.records)
        self.errors = sum(1 for record in self.records.values() if record.error)

    def run(self, foretell: Callable[[list[AnyTask]], float | None] | None) -> None:
        missing = {task.key: task for task in self.order if task.key not in self.records}
        ranks = dict(zip((task.key for task in self.order), _ranks(self.order), strict=True))
        for task in missing.values():
            # A failed parent is never done, so its children are never ready.
            self.waiting.add(task.key, *(p for p in task.parents if p not in self.records or self.records[p].error))
        self.began = time.monotonic()
        self.waiting.prepare()
        self._hand_out(missing, ranks)  # first, so that the workers need not wait for an estimate
        if foretell is not None and self.watch is not None:
            self.estimate = foretell(list(missing.values()))
        self._tell(None)
        self.executor.hear = self._hear
        while self.running:
            for done in self.executor.wait():
                self._keep(done)
            self._hand_out(missing, ranks)

    def _hand_out(self, missing: Mapping[str, AnyTask], ranks: Mapping[str, float]) -> None:
        for key in self.waiting.get_ready():
            if key in missing:
                heapq.heappush(self.ready, (ranks[key], key))
        while self.ready and len(self.running) < self.executor.slots:
            task = missing[heapq.heappop(self.ready)[1]]
            self.running[task.key] = task
            self.executor.submit(task)

    def _keep(self, done: Done) -> None:
        task, outcome = done.task, done.outcome
        if done.stops:
            raise StorageError(done.error)
        record = Record(
            task.key,
            task.stage,
            task.table(),
            environment=environment() | {"device": self.place.device, "dtype": self.place.numbers},
            times={"seconds": done.seconds},
            origin={**self.origins.get(task.key, {}), "weights": self._hashes(task.parents)},
        )
        if outcome is None:
            record = self.store.write(replace(record, error=done.error))
            self.errors += 1
        else:
            record = replace(
                record,
                metrics=outcome.metrics,
                series=outcome.series,
                flags=outcome.flags,
                times={**outcome.times, **record.times},
            )
            record = self.store.write(record, done.content)
            self.store.checkpoint(task.key).unlink(missing_ok=True)
            self.waiting.done(task.key)
        del self.running[task.key]
        self.records[task.key] = record
        self._tell(record, images=done.images)

    def _hear(self, under: Under) -> None:
        self._tell(None, under=under)

    def _hashes(self, keys: Iterable[str]) -> dict[str, str]:
        """Return the SHA-256 of the tensors that a task read, by the key of the parent that wrote them."""
        held = {key: self.records[key].object for key in keys}
        return {key: found["sha256"] for key, found in held.items() if found is not None}

    def _tell(self, record: Record | None, *, images: int = 0, under: Under | None = None) -> None:
        if self.watch is None:
            return
        fresh = len(self.records) - self.cached
        if fresh >= FEW:
            self.estimate = (time.monotonic() - self.began) / fresh * (len(self.order) - len(self.records))
        key = record.key if record is not None else under.task.key if under is not None else ""
        self.watch(
            Event(
                total=len(self.order),
                done=len(self.records),
                cached=self.cached,
                failed=self.errors,
                running=tuple(self.running.values()),
                record=record,
                label=self.labels.get(key, ""),
                estimate=self.estimate,
                damaged=tuple(self.store.found_damaged),
                memory=used_memory(children=True),
                images=images,
                under=under,
            )
        )


def _ranks(tasks: list[AnyTask]) -> list[float]:
    """Return the order in which ready tasks are started: the plan's, but tasks without parents earlier.

    Such a task (a dense training) takes the rank of the previous one. Otherwise the last seed's training would start
    when all other tasks are done, and one worker would train while the others wait.
    """
    ranks = [float(place) for place in range(len(tasks))]
    first = [place for place, task in enumerate(tasks) if not task.parents]
    for before, place in itertools.pairwise(first):
        ranks[place] = before + 0.5
    return ranks


@functools.cache
def _versions() -> dict[str, str]:
    """Return the version of every library that a stage uses."""
    return {name: version(name) for name in ("torch", "numpy", "scipy", "scikit-learn", "safetensors", "llvmlite")}


def environment() -> dict[str, Any]:
    """Return the environment that is stored in a record."""
    return {
        "sparring": __version__,
        **_versions(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "system": platform.system(),
        "threads": 1,
    }
