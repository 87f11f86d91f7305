"""Let OpenMP's threads sleep instead of spinning while other processes need the cores.

GNU's OpenMP, which torch includes, spins at every barrier for milliseconds. On free cores that is fastest. On shared
cores, each barrier waits for a thread that is not running while another one spins: work on two threads then takes ten
times as long as on one. The environment variables for this are read when torch is imported, too late for a notebook.
But libgomp hardly spins while it manages more threads than there are cores, so a few idle threads switch spinning off,
and on again. The number of threads that do the work, and so the last bit of every result, does not change. Waking a
sleeping thread on a core that another process uses takes longer than the products of a small network. If the threads
together get less of the cores than one thread would, they take turns on one core (`together`), and work whose result
does not depend on the number of threads is left to one thread (`alone`).
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

__all__ = ["Stopwatch", "alone", "courteous", "crowd", "together"]

NAME = "sparring looks for cores"
PAUSE, LONGEST = 0.03, 0.24  # seconds between two looks: at first, and at most while each finds free cores
TURNS, LONG_TURNS = 0.3, 2.4  # seconds on one core before the threads are released: at first, and while that is best
LINGER = 1.0  # seconds that a crowd waits for the next call: under load, creating it takes longer than short calls
SMALL = 1 << 19  # numbers that one thread finishes before a sleeping one has woken
BUSY, FREE = 0.1, 0.03  # seconds per second that threads wait for a core: above, it is shared; below, it is free again


class Stopwatch:
    """Count the seconds of work since it was made: of the clock, or of the processor while other processes use it."""

    def __init__(self) -> None:
        self.began = time.perf_counter(), time.process_time()

    def seconds(self) -> float:
        """Return the smaller of both; on several threads the clock's is."""
        return min(time.perf_counter() - self.began[0], time.process_time() - self.began[1])


@contextmanager
def courteous() -> Iterator[None]:
    """Watch whether the threads of the work inside get their cores; if not, let them sleep.

    Does nothing if torch has one thread, and without GNU's OpenMP or Linux.
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
    """Do elementwise work on few numbers without the sleeping threads; its bits do not depend on threads."""
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
    """Add `size` sleeping threads to OpenMP's count."""
    here, leave = threading.Event(), threading.Event()

    def gather() -> None:
        openmp.GOMP_parallel(ctypes.CDLL(None).free, None, size + 1, 0)  # no work: each thread returns at once
        here.set()
        leave.wait()  # the threads live as long as the one that created them

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
    """Keep this process's threads on the core of its first one, so that none waits for another's core."""
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
            with suppress(OSError):  # a thread that started meanwhile has the affinity of its creator
                os.sched_setaffinity(thread, before.get(thread, own))


class _Look(NamedTuple):
    """The time of a look, the seconds for which the threads have waited for cores and run so far, and their sleeps."""

    time: float
    waited: float
    ran: float
    sleeps: int


class _Watcher(threading.Thread):
    """Keep a crowd as long as the process's threads wait for cores, from one call to the next."""

    def __init__(self, openmp: Any) -> None:
        super().__init__(name=NAME, daemon=True)
        self.openmp, self.cores = openmp, len(os.sched_getaffinity(0))
        self.calls, self.shared, self.over = 0, False, False
        self.small = True  # until a look finds that each thread has a core
        self.pace = 0.0  # sleeps a second on one core: threads sleep at every barrier, so that it shows their progress
        self.pause, self.turns = PAUSE, TURNS
        self.change = threading.Condition()

    def comes(self) -> bool:
        """Count a call, unless this watcher has ended; the outermost call checks whether the cores are shared."""
        with self.change:
            if self.calls == 0 and not self.over:
                self.threads, self.pause = torch.get_num_threads(), PAUSE
                self.shared = _others() >= self.cores  # fewer may be one that is about to sleep: looks decide
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
                            before = _sleeps()
                            time.sleep(self.turns)
                            self.pace = (_sleeps() - before) / self.turns
                        self.turns = min(2 * self.turns, LONG_TURNS)
                    last = self._look(last)

    def _look(self, last: _Look | None) -> _Look | None:
        """Wait a moment, or for a call; judge from the last look whether the cores are shared."""
        with self.change:
            if self.calls == 0:
                self.over = not self.change.wait_for(lambda: self.calls, LINGER)
                return None
            self.change.wait(self.pause)
            waited = _waited(threading.get_native_id())
            if waited is None or self.calls == 0:
                return None
            now = _Look(time.perf_counter(), waited, time.process_time(), _sleeps())
            if last is None:
                return now
            passed = now.time - last.time
            self.shared = (now.waited - last.waited) / passed > (FREE if self.shared else BUSY)
            self.pause = PAUSE if self.shared else min(2 * self.pause, LONGEST)
            if not self.shared:
                self.turns = TURNS
                return now
            share = 1 / (1 + _others() / self.cores)  # of a core, which one thread would get
            self.small = (now.ran - last.ran) / passed < share or (now.sleeps - last.sleeps) / passed < self.pace
            return None if self.small else now


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
    """Return how many threads of other processes run or wait for a core; 0 if unknown."""
    with suppress(OSError, ValueError, IndexError):
        running = int((system / "loadavg").read_text().split()[3].partition("/")[0])
        states = [path.read_text().rpartition(")")[2].split()[0] for path in system.glob("self/task/*/stat")]
        return max(0, running - states.count("R"))
    return 0


def _sleeps() -> int:
    """Return how often this process's threads have gone to sleep so far."""
    import resource  # which Windows does not have

    return resource.getrusage(resource.RUSAGE_SELF).ru_nvcsw


def _waited(without: int) -> float | None:
    """Return for how many seconds the process's threads, except one, have waited for a core; None if unknown."""
    total, known = 0, False
    for thread in Path("/proc/self/task").iterdir():
        with suppress(OSError, ValueError, IndexError):  # a thread that has just ended, or a system without this file
            total += int((thread / "schedstat").read_text().split()[1]) * (thread.name != str(without))
            known = True
    return total / 1e9 if known else None
