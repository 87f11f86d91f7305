"""Choose, once for each host and geometry, how each layer is cut: time a few candidates, remember the fastest."""

from __future__ import annotations

import ctypes
import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from ...errors import UserError
from ...files import read_json, write_json
from ._abi import Call, Tiling, add_cached_kernels, add_kernels
from ._fusion import FusedLayer
from ._native import Code, cache_folder, host_identity, host_registers
from ._plan import Planner

_KERNEL = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)


@dataclass(frozen=True)
class _Tuning:
    """The number of the fastest choice for each layer's key, and the names of all kernels that were compiled for it."""

    winners: dict[str, int]
    kernels: list[str]


Memory = tuple[int, int]  # the addresses of an arena and of a kernel's call fields
_SHARE = 0.02  # a layer with less of the network's work than this is not worth tuning
_ROUNDS = 5
_NEAR = 24 * 1024  # bytes of input that the nearest cache holds beside weights and sums


def _candidates(lanes: int, tiles: bool) -> list[Tiling]:
    """Return the choices that are tried; the first is taken for layers that are not worth tuning."""
    few, many, half = host_registers() // 2, host_registers() * 3 // 4, max(4, lanes // 2)
    choices = [Tiling(many, lanes, _NEAR), Tiling(few, lanes, _NEAR), Tiling(many, lanes), Tiling(few, lanes)]
    return choices if tiles else [*choices, Tiling(many, half), Tiling(many, half, _NEAR)]


def usual(lanes: int) -> Tiling:
    """Return what is good for most layers."""
    return _candidates(lanes, True)[0]


def tuned(planner: Planner, code: Code, memory: Memory, *, lanes: int, lookup: bool) -> Callable[[str], Tiling]:
    """Return the fastest choice for each layer's key, from an earlier tuning on this host if there was one.

    `memory` is for one run of the planner's layout; what it holds is overwritten.
    """
    candidates = _candidates(lanes, planner.layout.tiles)
    layers = _worth_tuning(planner)
    if not layers:
        return lambda key: candidates[0]
    path = _path(sorted(layers), candidates)
    found = _remembered(path, layers, len(candidates))
    if found is None:
        found = _measure(planner, layers, candidates, code, memory, lookup)
        _remember(path, found)
    else:
        add_cached_kernels(code, found.kernels)  # they were compiled together with those that lost
    winners = found.winners
    return lambda key: candidates[winners.get(key, 0)]


def _worth_tuning(planner: Planner) -> dict[str, FusedLayer]:
    """Return one layer for each key that stands for enough of the work, where there is anything to choose."""
    work: dict[str, int] = {}
    layers: dict[str, FusedLayer] = {}
    for task in planner.tasks:
        if isinstance(task, FusedLayer) and len(planner.shapes[task.source]) == 3:
            key = planner.key(task)
            layers[key] = task
            work[key] = work.get(key, 0) + task.op.nonzeros * int(np.prod(planner.shapes[task.result][1:]))
    total = sum(work.values())
    return {key: layer for key, layer in layers.items() if work[key] > _SHARE * total}


def _measure(
    planner: Planner,
    layers: dict[str, FusedLayer],
    candidates: list[Tiling],
    code: Code,
    memory: Memory,
    lookup: bool,
) -> _Tuning:
    calls: dict[str, list[Call]] = {
        key: [planner.layer(layer, choice, lookup=lookup) for choice in candidates] for key, layer in layers.items()
    }
    names = add_kernels(code, (call.spec for tried in calls.values() for call in tried))
    for layer in layers.values():
        _write_zeros(planner, layer, memory[0])
    times = {key: _shortest([_runner(call, code, memory) for call in tried]) for key, tried in calls.items()}
    return _Tuning({key: int(np.argmin(one)) for key, one in times.items()}, names)


def _write_zeros(planner: Planner, layer: FusedLayer, arena: int) -> None:
    """Write what a layer reads: pages never written are all one page, which would always be in the nearest cache."""
    buffer = planner.buffer(layer.source)
    own = buffer.origin < 0
    for unit in range(planner.layout.units if own else 1):
        place = planner.common_bytes + unit * planner.unit_bytes - 1 - buffer.origin if own else buffer.origin
        ctypes.memset(arena + place - buffer.before, 0, buffer.size)


def _runner(call: Call, code: Code, memory: Memory) -> Callable[[], None]:
    function, arguments = _KERNEL(code[call.spec.name]), call.arguments.ctypes.data
    return lambda: function(memory[0], arguments, memory[1])


def _shortest(runs: Sequence[Callable[[], None]]) -> list[float]:
    """Return the shortest time of each function over a few interleaved rounds, in seconds."""
    times = [float("inf")] * len(runs)
    for _ in range(_ROUNDS):
        for number, run in enumerate(runs):
            start = time.thread_time()  # what else the machine does is not counted
            run()
            times[number] = min(times[number], time.thread_time() - start)
    return times


def _path(keys: list[str], candidates: list[Tiling]) -> Path | None:
    folder = cache_folder()
    identity = "\0".join((*keys, repr(candidates), host_identity()))
    return None if folder is None else folder / f"{hashlib.sha256(identity.encode()).hexdigest()}.json"


def _remembered(path: Path | None, layers: dict[str, FusedLayer], count: int) -> _Tuning | None:
    if path is None or not path.exists():
        return None
    try:
        found = _Tuning(**read_json(path))
        sound = found.winners.keys() == layers.keys() and all(type(name) is str for name in found.kernels)
        return found if sound and all(type(i) is int and 0 <= i < count for i in found.winners.values()) else None
    except (UserError, TypeError, AttributeError):
        return None


def _remember(path: Path | None, found: _Tuning) -> None:
    if path is not None:
        try:
            write_json(path, asdict(found))
        except UserError:
            return  # a full disk costs time at the next start, nothing else
