"""Let OpenMP's threads sleep instead of spinning while other processes need the cores.

GNU's OpenMP, which torch brings along, spins at every barrier for milliseconds. On free cores that is fastest; on cores
that something else also uses, each barrier waits for a thread that is not running while another burns its share: work
on two threads then takes ten times as long as on one. The environment variables that choose the way to wait are read
when torch is imported, too late for a notebook. But libgomp itself hardly spins while it manages more threads than
there are cores, so a few threads that do nothing switch it over, and back. How many threads share the work, and so the
last bit of every result, stays as it was. Waking a thread that sleeps, on a core that another process holds, takes
longer than the products of a small network. Where the threads together then get less of the cores than one alone would,
they take turns on one core (`together`), and work that no thread count changes is left to one thread (`alone`).
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

__all__ = ["alone", "courteous", "crowd", "together"]

NAME = "sparring looks for cores"
PAUSE = 0.03  # seconds between two looks
TURNS = 0.3  # seconds on one core, before the threads are let go to see whether they still need it
LINGER = 1.0  # seconds that a crowd waits for the next call: under load it takes longer to gather than short calls run
SMALL = 1 << 19  # numbers, on which one thread is done before another that sleeps has woken
BUSY, FREE = 0.1, 0.03  # seconds a second that threads wait for a core: above it is shared, below it is ours again


@contextmanager
def courteous() -> Iterator[None]:
    """Watch, while the work inside runs on several threads, whether they get their cores; if not, let them sleep.

    Nothing is done where torch has one thread, and where OpenMP or the system is another than GNU's and Linux.
    """
    openmp = None if torch.get_num_threads() == 1 else _openmp()
    if openmp is None:
        yield
        return
    watcher = next((t for t in threading.enumerate() if isinstance(t, _Watcher) and t.comes()), None)
    if watcher is None:
        watcher = _Watcher(openmp)
        watcher.comes()
        watcher.start()
    try:
        yield
    finally:
        watcher.goes()


@contextmanager
def alone(count: int) -> Iterator[None]:
    """Work number by number, on few, without the threads that sleep; the bits of such work do not depend on threads."""
    threads = torch.get_num_threads()
    if threads == 1 or count >= SMALL or not any(isinstance(t, _Watcher) and t.shared for t in threading.enumerate()):
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def crowd(openmp: Any, size: int) -> Iterator[None]:
    """Keep `size` more threads in OpenMP's count, asleep."""
    here, leave = threading.Event(), threading.Event()

    def gather() -> None:
        openmp.GOMP_parallel(ctypes.CDLL(None).free, None, size + 1, 0)  # of nothing: each thread returns at once
        here.set()
        leave.wait()  # the threads live as long as the one that called them

    host = threading.Thread(target=gather, daemon=True)
    host.start()
    here.wait()
    try:
        yield
    finally:
        leave.set()
        host.join()


@contextmanager
def together() -> Iterator[None]:
    """Keep this process's threads on the core where its first one is: none then waits for another's core."""
    own, before, threads = os.sched_getaffinity(os.getpid()), {}, Path("/proc/self/task")
    with suppress(OSError, ValueError, IndexError):
        core = int((threads / str(os.getpid()) / "stat").read_text().rpartition(")")[2].split()[36])
        for thread in (int(path.name) for path in threads.iterdir()):
            before[thread] = os.sched_getaffinity(thread)
            os.sched_setaffinity(thread, {core})
    try:
        yield
    finally:
        for thread in (int(path.name) for path in threads.iterdir()):
            with suppress(OSError):  # a thread that began meanwhile has the affinity of the one that started it
                os.sched_setaffinity(thread, before.get(thread, own))


class _Look(NamedTuple):
    """When it was, and for how many seconds the threads have waited for cores and run so far."""

    time: float
    waited: float
    ran: float


class _Watcher(threading.Thread):
    """Hold a crowd for as long as the process's threads wait for cores, from one call to the next."""

    def __init__(self, openmp: Any) -> None:
        super().__init__(name=NAME, daemon=True)
        self.openmp, self.cores = openmp, len(os.sched_getaffinity(0))
        self.calls, self.shared, self.over = 0, False, False
        self.small = True  # until a look finds that the threads get on beside each other
        self.change = threading.Condition()

    def comes(self) -> bool:
        """Count a call, unless this watcher has ended; the outermost looks whether the cores are shared."""
        with self.change:
            if self.calls == 0 and not self.over:
                self.threads = torch.get_num_threads()
                self.shared = _others() + self.threads > self.cores
                self.change.notify()
            self.calls += not self.over
            return not self.over

    def goes(self) -> None:
        with self.change:
            self.calls -= 1

    def run(self) -> None:
        while not self.over:
            was, last = self.shared, None
            with crowd(self.openmp, max(1, self.cores - self.threads + 1)) if was else nullcontext():
                while self.shared == was and not self.over:
                    if was and last is None and self.small and _others() >= self.cores:
                        with together():
                            time.sleep(TURNS)
                    last = self._look(last)

    def _look(self, last: _Look | None) -> _Look | None:
        """Wait a moment, or for a call; from what the last look saw, judge who has the cores."""
        with self.change:
            if self.calls == 0:
                self.over = not self.change.wait_for(lambda: self.calls, LINGER)
                return None
            self.change.wait(PAUSE)
            waited = _waited(threading.get_native_id())
            if waited is None or self.calls == 0:
                return None
            now = _Look(time.perf_counter(), waited, time.process_time())
            if last is not None:
                passed = now.time - last.time
                self.shared = (now.waited - last.waited) / passed > (FREE if self.shared else BUSY)
                self.small = (now.ran - last.ran) / passed < 1 / (
                    1 + _others() / self.cores
                )  # one alone would get that
            return None if self.small and last is not None else now


@cache
def _openmp() -> Any | None:
    """Return the OpenMP library that torch has loaded, if it is GNU's and this is Linux."""
    places = sorted((Path(torch.__file__).parent / "lib").glob("libgomp*")) if sys.platform == "linux" else []
    for place in [*map(str, places), "libgomp.so.1"]:
        with suppress(OSError, AttributeError):
            openmp = ctypes.CDLL(place, mode=os.RTLD_NOLOAD)
            return openmp if openmp.GOMP_parallel and sys.platform == "linux" else None
    return None


def _others(system: Path = Path("/proc")) -> int:
    """Return how many threads of others run on this machine, or wait for a core; 0 where none can tell."""
    with suppress(OSError, ValueError, IndexError):
        running = int((system / "loadavg").read_text().split()[3].partition("/")[0])
        states = [path.read_text().rpartition(")")[2].split()[0] for path in system.glob("self/task/*/stat")]
        return max(0, running - states.count("R"))
    return 0


def _waited(without: int) -> float | None:
    """Return for how many seconds the process's threads, but one, have waited for a core; None if none can tell."""
    total, known = 0, False
    for thread in Path("/proc/self/task").iterdir():
        with suppress(OSError, ValueError, IndexError):  # a thread that has just ended, or a system that does not say
            total += int((thread / "schedstat").read_text().split()[1]) * (thread.name != str(without))
            known = True
    return total / 1e9 if known else None
