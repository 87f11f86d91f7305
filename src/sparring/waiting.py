"""Let OpenMP's threads sleep, not spin, while others need the cores.

GNU's OpenMP, which torch brings along, spins at every barrier for milliseconds. On free cores that is fastest; on cores
that something else also uses, each barrier waits for a thread that is not running while another burns its share: work
on two threads then takes ten times as long as on one. The environment variables that choose the way to wait are read
when torch is imported, too late for a notebook. But libgomp itself hardly spins while it manages more threads than
there are cores, so a few threads that do nothing switch it over, and back. How many threads share the work, and so the
last bit of every result, stays as it was.
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
from typing import Any

import torch

__all__ = ["courteous", "crowd"]

NAME = "sparring looks for cores"
PAUSE = 0.03  # seconds between two looks
BUSY, FREE = 0.1, 0.03  # seconds a second that threads wait for a core: above it is shared, below it is ours again


@contextmanager
def courteous() -> Iterator[None]:
    """Watch, while the work inside runs on several threads, whether they get their cores; if not, let them sleep.

    Nothing is done where torch has one thread, and where OpenMP or the system is another than GNU's and Linux.
    """
    watched = any(thread.name == NAME for thread in threading.enumerate())
    openmp = None if watched or torch.get_num_threads() == 1 else _openmp()
    if openmp is None:
        yield
        return
    done = threading.Event()
    watcher = threading.Thread(target=_watch, args=(openmp, done), name=NAME, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()


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


def _watch(openmp: Any, done: threading.Event) -> None:
    """Hold a crowd for as long as the process's threads wait for cores."""
    threads, cores, own = torch.get_num_threads(), len(os.sched_getaffinity(0)), threading.get_native_id()
    shared = _running() - 1 + threads > cores
    if not shared and done.wait(PAUSE):
        return
    at, before = time.perf_counter(), _waited(own)
    while before is not None and not done.is_set():
        with crowd(openmp, max(1, cores - threads + 1)) if shared else nullcontext():
            was = shared
            while shared == was and not done.wait(PAUSE):
                now, total = time.perf_counter(), _waited(own) or 0.0
                shared = (total - before) / (now - at) > (FREE if was else BUSY)
                at, before = now, total


@cache
def _openmp() -> Any | None:
    """Return the OpenMP library that torch has loaded, if it is GNU's and this is Linux."""
    places = sorted((Path(torch.__file__).parent / "lib").glob("libgomp*")) if sys.platform == "linux" else []
    for place in [*map(str, places), "libgomp.so.1"]:
        with suppress(OSError, AttributeError):
            openmp = ctypes.CDLL(place, mode=os.RTLD_NOLOAD)
            return openmp if openmp.GOMP_parallel and sys.platform == "linux" else None
    return None


def _running() -> int:
    """Return how many threads run on this machine, or wait for a core; 0 where none can tell."""
    with suppress(OSError, ValueError, IndexError):
        return int(Path("/proc/loadavg").read_text().split()[3].partition("/")[0])
    return 0


def _waited(without: int) -> float | None:
    """Return for how many seconds the process's threads, but one, have waited for a core; None if none can tell."""
    total, known = 0, False
    for thread in Path("/proc/self/task").iterdir():
        with suppress(OSError, ValueError, IndexError):  # a thread that has just ended, or a system that does not say
            total += int((thread / "schedstat").read_text().split()[1]) * (thread.name != str(without))
            known = True
    return total / 1e9 if known else None
