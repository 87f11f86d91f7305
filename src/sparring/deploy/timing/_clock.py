"""Time calls in turns on one core, and measure the speed of the core."""

from __future__ import annotations

import math
import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch

from ..kernels._native import native_available
from ._peak import register_flops

_SHORTEST = 1e-3  # seconds of a round: shorter calls are repeated
_ENERGY = Path("/sys/class/powercap")
_CPUINFO = Path("/proc/cpuinfo")
_UNITS = {
    "AMX": {"amx_tile"},
    "VNNI": {"avx512_vnni", "avx_vnni"},
}  # for int8, as in /proc/cpuinfo


@dataclass(frozen=True)
class Timing:
    """Seconds per call: median and quartiles over rounds; joules per call, None if they cannot be measured."""

    median: float
    low: float
    high: float
    joules: float | None = None


def interleaved(
    functions: Sequence[Callable[[], object]],
    *,
    rounds: int = 60,
    clock: Callable[[], float] = time.perf_counter,
    progress: Callable[[int, int], None] = lambda *_: None,
) -> list[Timing]:
    """Time functions in turns, so that other load on the machine affects all of them equally.

    clock: seconds; `time.thread_time` leaves out the time in which other programs have the core, for functions that
    compute on the calling thread.
    """
    repeats = [_repeats(function) for function in functions]
    seconds = np.zeros((len(functions), rounds))
    joules = np.full((len(functions), rounds), np.nan)
    for turn in range(rounds):
        progress(turn, rounds)
        for number, (function, repeat) in enumerate(zip(functions, repeats, strict=True)):
            energy, start = _energy(), clock()
            for _ in range(repeat):
                function()
            seconds[number, turn] = (clock() - start) / repeat
            after = _energy()
            if energy is not None and after is not None and after > energy:
                joules[number, turn] = (after - energy) / repeat
    spent = [float(np.nanmedian(row)) if np.isfinite(row).any() else None for row in joules]
    low, median, high = np.quantile(seconds, [0.25, 0.5, 0.75], axis=1)
    return [Timing(float(m), float(a), float(b), j) for m, a, b, j in zip(median, low, high, spent, strict=True)]


def _repeats(function: Callable[[], object]) -> int:
    function()
    start = time.perf_counter()
    function()
    return max(1, math.ceil(_SHORTEST / max(1e-7, time.perf_counter() - start)))


def _energy() -> float | None:
    """Return the joules that the processor's packages have counted, or None if no counter can be read."""
    try:
        counters = _ENERGY.glob("intel-rapl:[0-9]")
        values = [int((counter / "energy_uj").read_text()) for counter in counters]
    except (OSError, ValueError):
        return None
    return sum(values) / 1e6 if values else None


@contextmanager
def one_core() -> Iterator[None]:
    """Pin this process, and threads that it starts meanwhile, to one core if the system allows it."""
    threads, cores = torch.get_num_threads(), None
    if hasattr(os, "sched_setaffinity"):
        cores = os.sched_getaffinity(0)
        os.sched_setaffinity(0, {max(cores)})
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        if cores is not None:
            os.sched_setaffinity(0, cores)


@cache
def peak_flops() -> float:
    """Measure the floating-point operations per second of one core: multiply-adds on registers, no memory read.

    If no kernels can be generated, the rate of a product of two matrices is used.
    """
    with one_core():
        return register_flops() if native_available() else _product_flops()


def _product_flops() -> float:
    side, best, a = 384, math.inf, torch.ones(384, 384)
    for _ in range(200):  # short, so that some rounds are not interrupted
        start = time.perf_counter()
        torch.mm(a, a)
        best = min(best, time.perf_counter() - start)
    return 2 * side**3 / best


@cache
def processor() -> str:
    """Return the name of this machine's processor, and its units for int8: AMX, VNNI or none."""
    try:
        lines = [line.partition(":") for line in _CPUINFO.read_text().splitlines()]
    except OSError:
        lines = []
    said = {name.strip(): value.strip() for name, _, value in reversed(lines)}
    flags = set(said.get("flags", said.get("Features", "")).split())
    units = [unit for unit, names in _UNITS.items() if names & flags]
    width = "AVX-512" if "avx512f" in flags else "AVX2" if "avx2" in flags else platform.machine()
    return f"{said.get('model name', platform.processor() or 'unknown')} ({width}, {' and '.join(units) or 'no VNNI'})"
