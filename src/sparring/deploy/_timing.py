"""Time engines side by side: interleaved rounds on one core, medians with their spread, joules where told."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from .format._program import Program, Sparse

_SHORTEST = 1e-3  # seconds of a round: what is shorter is repeated
_ENERGY = Path("/sys/class/powercap")


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: median and quartiles over rounds; joules of one call, None where nothing counts them."""

    median: float
    low: float
    high: float
    joules: float | None = None


def interleaved(functions: Sequence[Callable[[], object]], *, rounds: int = 60) -> list[Timing]:
    """Time functions in turns, so that what else the machine does falls on all of them."""
    repeats = [_repeats(function) for function in functions]
    seconds = np.zeros((len(functions), rounds))
    joules = np.full((len(functions), rounds), np.nan)
    for turn in range(rounds):
        for number, (function, repeat) in enumerate(zip(functions, repeats, strict=True)):
            energy, start = _energy(), time.perf_counter()
            for _ in range(repeat):
                function()
            seconds[number, turn] = (time.perf_counter() - start) / repeat
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
    """Return the joules that the processor's packages have counted, or None where the machine does not tell."""
    try:
        counters = _ENERGY.glob("intel-rapl:[0-9]")
        values = [int((counter / "energy_uj").read_text()) for counter in counters]
    except (OSError, ValueError):
        return None
    return sum(values) / 1e6 if values else None


def multiplications(program: Program) -> int:
    """Return how many products of a nonzero weight and an input one image needs."""
    shapes = program.shapes
    layers = [(step.op, shapes[number + 1]) for number, step in enumerate(program.steps)]
    return sum(op.nonzeros * math.prod(shape[1:]) for op, shape in layers if isinstance(op, Sparse))


@cache
def peak_flops() -> float:
    """Measure the floating-point operations per second of one core at its best: a product of two matrices."""
    side, best = 384, math.inf
    a = np.ones((side, side), np.float32)
    for _ in range(100):  # short, so that some rounds are not interrupted
        start = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - start)
    return 2 * side**3 / best
