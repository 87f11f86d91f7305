"""Run tasks with one thread each, in this process or in local processes; `_ray` runs them on a cluster."""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing as mp
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection, wait
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from ...children import end_with
from ...errors import TERMINATED, StorageError, UserError, place, short_of_memory, told
from ...files import pack_tensors
from ...ram import bounded
from ..stages._inputs import Inputs

MAX_DEATHS = 3


Asked = TypeVar("Asked", bound=Inputs, covariant=True)


@dataclass(frozen=True)
class Task(Generic[Asked]):
    """A pure function of its inputs; `parents` are the keys of the tasks whose tensors it reads.

    `code` has the hash of a user's code by its name. `key` is the hash of all three.
    """

    key: str
    inputs: Asked
    parents: tuple[str, ...] = ()
    code: Mapping[str, str] = field(default_factory=dict)

    @property
    def stage(self) -> str:
        """The name of the function."""
        return self.inputs.stage

    def table(self) -> dict[str, Any]:
        """Return everything that the result depends on, as stored in records."""
        return whole_table(self.inputs.table(), self.parents, self.code)


def whole_table(inputs: dict[str, Any], parents: Sequence[str], code: Mapping[str, str]) -> dict[str, Any]:
    """Return a task's inputs with its parents and hashes of a user's code, if any."""
    return {**inputs, **({"parents": list(parents)} if parents else {}), **({"code": dict(code)} if code else {})}


@dataclass(frozen=True)
class TaskOutcome:
    """Result of a stage: numbers, series, flags, tensors, and times, which may vary."""

    metrics: dict[str, float | None] = field(default_factory=dict)
    series: dict[str, Any] = field(default_factory=dict)
    flags: list[dict[str, str]] = field(default_factory=list)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    times: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Done:
    """Report a finished task: an outcome, or the error that ended it, and the seconds it took.

    The outcome's tensors are sent as `content`, the bytes of a safetensors file, because torch would use shared memory,
    which is small in containers. `stops` means that storage failed and the study must end. `images`: how many the task
    said that it worked on.
    """

    task: Task[Inputs]
    outcome: TaskOutcome | None
    error: str | None
    seconds: float
    content: bytes = b""
    stops: bool = False
    images: int = 0


@dataclass(frozen=True)
class Under:
    """Report a task that is under way: the images that are done, their number, and the seconds so far."""

    task: Task[Inputs]
    done: int
    total: int
    seconds: float


AnyTask = Task[Inputs]
Tell = Callable[[int, int], None]
Work = Callable[[AnyTask, Tell], TaskOutcome]
"""Perform a task, and tell meanwhile how many images are done, of how many."""

PATIENCE, PAUSE = 2.0, 1.0  # seconds of a task before it is reported, and between two reports


class Executor(Protocol):
    """Run tasks. `slots` is the largest number of tasks at a time; `wait` blocks until at least one has finished.

    Meanwhile `hear` is called with tasks that are under way, if the executor can see into them.
    """

    hear: Callable[[Under], None]

    @property
    def slots(self) -> int: ...

    def submit(self, task: AnyTask) -> None: ...

    def wait(self) -> list[Done]: ...

    def close(self) -> None: ...


def ignore(_: Under) -> None:
    """Hear of a task, and do nothing."""


def perform(work: Work, task: AnyTask, hear: Callable[[Under], None] = ignore) -> Done:
    """Run one task on one thread and turn any exception into an error text."""
    began = time.perf_counter()
    torch.set_num_threads(1)
    stops, images, due = False, 0, PATIENCE

    def tell(done: int, total: int) -> None:
        nonlocal images, due
        images, seconds = done, time.perf_counter() - began
        if seconds >= due:
            due = seconds + PAUSE
            hear(Under(task, done, total, seconds))

    try:
        outcome = work(task, tell)
        content = pack_tensors(outcome.tensors) if outcome.tensors else b""
        return Done(task, replace(outcome, tensors={}), None, time.perf_counter() - began, content, images=images)
    except UserError as problem:
        where = place(problem)
        error = f"{problem} ({where})" if where and where not in str(problem) else str(problem)
        stops = isinstance(problem, StorageError)
    except BaseException as problem:  # a user's factory or pruner can raise anything; only this cell fails
        if isinstance(problem, KeyboardInterrupt) or (isinstance(problem, SystemExit) and problem.code == TERMINATED):
            raise
        short = short_of_memory(problem)
        error = "out of memory; use a smaller batch_size or fewer workers" if short else told(problem)
        if "SPARRING_TRACEBACK" in os.environ:
            traceback.print_exception(problem)
    return Done(task, None, error, time.perf_counter() - began, stops=stops)


class InProcess:
    """Run each task in this process, for debugging and for devices that cannot be shared."""

    def __init__(self, work: Work) -> None:
        self.work = work
        self.slots = 1
        self.hear: Callable[[Under], None] = ignore
        self.queue: list[AnyTask] = []

    def submit(self, task: AnyTask) -> None:
        self.queue.append(task)

    def wait(self) -> list[Done]:
        threads = torch.get_num_threads()
        try:
            return [perform(self.work, self.queue.pop(0), self.hear)]
        finally:
            torch.set_num_threads(threads)

    def close(self) -> None:
        self.queue.clear()


@dataclass
class _Worker:
    process: Any
    pipe: Connection
    task: AnyTask | None = None


class Processes:
    """Run up to `slots` tasks at a time, each in a forked process with one thread.

    Forking shares the data set and the caller's models and pruners, including notebook cells. A worker that crashes is
    replaced and its task tried again, at most three times. A worker exits if its driver ends.
    """

    def __init__(self, work: Work, slots: int) -> None:
        self.work = work
        self.slots = slots
        self.hear: Callable[[Under], None] = ignore
        self.workers: list[_Worker] = []
        self.deaths: dict[str, int] = {}

    def submit(self, task: AnyTask) -> None:
        worker = next((w for w in self.workers if w.task is None), None) or self._start()
        worker.task = task
        # wait() finds a worker that died while idle, and starts another.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            worker.pipe.send(task)

    def wait(self) -> list[Done]:
        done: list[Done] = []
        while not done:
            busy = [w for w in self.workers if w.task is not None]
            ready = set(wait([w.pipe for w in busy] + [w.process.sentinel for w in busy]))
            for worker in busy:
                if worker.pipe in ready or worker.process.sentinel in ready:
                    done += self._collect(worker)
        return done

    def _collect(self, worker: _Worker) -> list[Done]:
        task = worker.task
        assert task is not None
        try:
            if worker.pipe.poll():
                result: Done | Under = worker.pipe.recv()
                if isinstance(result, Under):
                    self.hear(result)
                    return []
                worker.task = None
                return [result]
        except (EOFError, ConnectionResetError, OSError):
            pass
        self._bury(worker)
        self.deaths[task.key] = self.deaths.get(task.key, 0) + 1
        if self.deaths[task.key] >= MAX_DEATHS:
            code = worker.process.exitcode
            return [
                Done(
                    task,
                    None,
                    f"its process crashed {MAX_DEATHS} times (exit code {code}); it may be out of memory",
                    0.0,
                )
            ]
        self.submit(task)
        return []

    def _start(self) -> _Worker:
        context = mp.get_context("fork")
        here, there = context.Pipe()
        process = context.Process(target=_serve, args=(there, self.work, os.getpid(), self.slots), daemon=True)
        process.start()
        there.close()
        worker = _Worker(process, here)
        self.workers.append(worker)
        return worker

    def _bury(self, worker: _Worker) -> None:
        worker.process.kill()
        worker.process.join()
        worker.pipe.close()
        self.workers.remove(worker)

    def close(self) -> None:
        """End all workers immediately."""
        for worker in list(self.workers):
            self._bury(worker)


def _serve(pipe: Connection, work: Work, driver: int, slots: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the driver handles interrupts
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _die_with(driver)
    with bounded(slots):
        while True:
            try:
                task = pipe.recv()
            except (EOFError, OSError):
                return
            pipe.send(perform(work, task, pipe.send))


def _die_with(driver: int) -> None:
    """End this process when the driver is gone: by the kernel if possible, else by polling."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    end_with(driver)
