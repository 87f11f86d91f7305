"""Execute plans: machine code, tables and memory for one layout, in one native call.

The tiling of each layer is chosen once for each host and geometry: a few candidates are timed, the fastest is stored.
"""

from __future__ import annotations

import ctypes
import hashlib
import math
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from itertools import groupby
from pathlib import Path
from threading import Lock

import numpy as np
from numpy.typing import NDArray

from ...errors import UserError
from ...files import read_json, write_json
from .._program import Floats, Program, multiplications
from ._abi import Call, Layout, Run, Tiling, add_cached_kernels, add_kernels, add_runner, fields_of, sources
from ._backward import GradientPlanner
from ._builtin import add_answer, answer_fields, builtin, reader
from ._fusion import FusedLayer, Task, tasks_of
from ._llvm_ir import Unit
from ._native import Code, cache_folder, host_identity, host_lanes, permutes, way_of_products
from ._plan import Planner, usual
from .int8._plan import BytePlanner

_NEAR_CACHE = 1 << 19  # bytes: half of a core's private cache
_FAR_CACHE = 1 << 24  # bytes of a layer's values, for as many images as a vector has lanes: no cache holds them
_TOLD = slice(int(Run.IMAGES), Run.COUNT + 1)  # images, logits and count at once: numpy is slow with enums
_RUN = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)
Memory = tuple[int, int]  # the addresses of an arena and of a kernel's call fields
Fills = list[tuple[int, int, int]]  # where in the arena, bytes, byte
_SHARE = 0.02  # a layer with less of the network's work than this is not worth tuning
_ROUNDS, _SHORTEST = 5, 2e-5  # seconds of a round
_SHORT = 1 << 18  # products for one image, about ten microseconds
_SHARED = 1 << 24  # products from which on threads share a call


class Arena:
    """Memory for values, all zero at first."""

    def __init__(self, size: int) -> None:
        self.size, self._memory = size, np.zeros(size + 64, np.uint8)
        self.address = self._memory.ctypes.data + -self._memory.ctypes.data % 64


class Workspace:
    """The memory of one run at a time: an arena, zeroed where padding is read, and the fields of the call."""

    def __init__(self, size: int, fills: Fills, fields: NDArray[np.int64]) -> None:
        self.arena = Arena(size)
        for where, count, byte in fills:
            ctypes.memset(self.arena.address + where, byte, count)
        self.call = fields.copy()
        self.call_address = self.call.ctypes.data


class Single(Workspace):
    """The memory of runs on one image, whose logits are written to one place: `answer(image)` returns a copy of them.

    It is None if there are no built-ins. Otherwise it returns None for what is not one image (see `builtin`).
    """

    def __init__(
        self, space: tuple[int, Fills, NDArray[np.int64]], program: Program, code: Code, segments: int
    ) -> None:
        super().__init__(*space)
        self._logits = np.zeros((1, program.classes), np.float32)
        self.call[_TOLD] = 0, self._logits.ctypes.data, 1
        self._code, self._copy = code, self._logits.copy  # kept alive, like what they point to
        run = code["run"], self.arena.address, segments, self.call_address
        shape, short = (1, *program.shape), multiplications(program) < _SHORT
        self._fields = answer_fields(run, self._copy, shape, short=short)
        self.answer = builtin(code, self._fields)


@dataclass(frozen=True)
class Crew:
    """Threads that wait, without spinning, for work of one call at a time; other calls then run on their own thread."""

    process: int
    helpers: ThreadPoolExecutor
    lock: Lock


class ExecutionPlan:
    """A program compiled for one layout: run it on up to `together` images at a time, from any thread."""

    def __init__(
        self,
        program: Program,
        planner: Planner,
        calls: list[Call],
        code: Code,
        *,
        again: int = 0,
        room: list[Arena] | None = None,
    ) -> None:
        """Take calls in order; those from number `again` on are repeated for every further gradient of an image.

        room: idle memory for values, which plans share (if none of them reads padding).
        """
        layout = planner.layout
        self.together = layout.together
        self._kernels = len(calls) * layout.units
        self._scratch = planner.end, planner.scratch_bytes
        self._calls = calls
        self._code = code  # keeps the machine code alive
        add_kernels(code, (call.spec for call in calls))
        self._segments, self._tables = _segments(calls, code)
        self._segments_address = self._segments.ctypes.data
        self._again, self._tables_again = _segments(calls[again:], code)
        self._image, self._logits = 4 * math.prod(program.shape), 4 * program.classes
        fields = fields_of(
            {
                Run.IMAGE_BYTES: self._image,
                Run.LOGITS_BYTES: self._image if isinstance(planner, GradientPlanner) else self._logits,
                Run.LANES: layout.lanes if layout.tiles else 1,
                Run.OWN: planner.common_bytes,
                Run.UNIT_BYTES: planner.unit_bytes,
                Run.UPSTREAM_BYTES: self._logits,
            }
        )
        self._run = _RUN(code["run"])
        memory = planner.arena_bytes, planner.fills(), fields
        self._room, self._size = room, planner.arena_bytes
        self._workspace = partial(Workspace, *(memory if room is None else (0, [], fields)))
        self._single = partial(Single, memory, program, code, self._segments_address)
        self._idle: list[Workspace] = []

    def run(self, images: int, logits: int, count: int) -> None:
        """Read `count` images (contiguous float32) at an address, write their logits to another."""
        space = self._take()
        call, together = space.call, self.together
        while count > 0:
            call[_TOLD] = images, logits, min(count, together)
            self._run(space.arena.address, self._segments_address, space.call_address)
            images, logits, count = images + together * self._image, logits + together * self._logits, count - together
        self._give(space)

    def _take(self) -> Workspace:
        try:
            space = self._idle.pop()
        except IndexError:
            space = self._workspace()
        if self._room is not None:
            try:
                space.arena = self._room.pop()
            except IndexError:  # all are in use, the one that this space had before too
                space.arena = Arena(self._size)
            if space.arena.size < self._size:
                space.arena = Arena(self._size)
        return space

    def _give(self, space: Workspace) -> None:
        if self._room is not None:
            self._room.append(space.arena)
        self._idle.append(space)

    def run_shared(self, images: int, logits: int, count: int, helpers: ThreadPoolExecutor, threads: int) -> None:
        """Do the same, with every kernel shared by this thread and helpers, on which nothing else may run."""
        space = self._take()
        counters = _lines((1 + threads) * self._kernels)
        calls = [_lines(len(space.call)) for _ in range(threads)]
        for number, call in enumerate(calls):
            call[:] = space.call
            call[Run.PARTS], call[Run.THREAD], call[Run.COUNTERS] = threads, number, counters.ctypes.data
        where, size = self._scratch
        own = [Arena(size) for _ in calls[1:]]
        for call, scratch in zip(calls[1:], own, strict=True):
            call[Run.UNIT + Unit.SCRATCH] = scratch.address - space.arena.address - where
        run = [partial(self._run, space.arena.address, self._segments_address, call.ctypes.data) for call in calls]
        for start in range(0, count, self.together):
            counters[:] = 0
            for call in calls:
                call[Run.IMAGES], call[Run.LOGITS] = images + start * self._image, logits + start * self._logits
                call[Run.COUNT], call[Run.PASSED] = min(count - start, self.together), 0
            others = [helpers.submit(one) for one in run[1:]]
            run[0]()
            for other in others:
                if not other.cancel():  # one that has not begun has nothing left to do
                    other.result()
        self._give(space)

    @property
    def bytes_memory(self) -> int:
        """Return the bytes of tables and of memory for values."""
        tables = sum(table.nbytes for call in self._calls for table in (call.arguments, *call.tables))
        return tables + sum(space.arena.size for space in self._idle if self._room is None)

    def run_gradient(self, images: int, upstream: int, gradients: int, count: int, rows: int) -> None:
        """Read images and `rows` gradients of their logits each, write as many of the images (a GradientPlanner's).

        The forward pass of some images is run once for all their rows, while its values are in a cache.
        """
        space = self._take()
        call, together = space.call, self.together
        again = self._again.ctypes.data
        for start in range(0, count, together):
            call[Run.IMAGES], call[Run.COUNT] = images + start * self._image, min(count - start, together)
            for row in range(rows):
                at = row * count + start
                call[Run.LOGITS], call[Run.UPSTREAM] = gradients + at * self._image, upstream + at * self._logits
                self._run(space.arena.address, again if row else self._segments_address, space.call_address)
        self._give(space)

    @cached_property
    def single(self) -> Single:
        """Return the memory of a plan for one image."""
        return self._single()


def _lines(count: int) -> NDArray[np.int64]:
    """Return zeros in cache lines of their own, so that no thread waits for what another one writes beside them."""
    memory = np.zeros(count + 32, np.int64)
    start = -memory.ctypes.data % 128 // 8
    return memory[start : start + count]


def _segments(calls: list[Call], code: Code) -> tuple[NDArray[np.int64], list[NDArray[np.int64]]]:
    """Return the runner's segments: calls in order, with those per unit, those that run once and chains apart."""
    groups = [list(group) for _, group in groupby(calls, lambda call: (call.per_unit, call.chain))]
    tables = [
        np.array([[code[call.spec.name], call.arguments.ctypes.data] for call in group], np.int64) for group in groups
    ]
    rows = [
        (int(group[0].per_unit), len(group), table.ctypes.data, group[0].turns)
        for group, table in zip(groups, tables, strict=True)
    ]
    return np.array([len(rows), *(number for row in rows for number in row)], np.int64), tables


class Engine:
    """Run a program natively on batches of any size, with a plan for each layout of images."""

    def __init__(
        self,
        program: Program,
        *,
        lanes: int | None = None,
        threads: int = 1,
        code: Code | None = None,
        alone: bool = False,
        rows: list[Arena] | None = None,
    ) -> None:
        """Prepare a program; `lanes` floats make a vector (default: the host's); engines may share their code.

        alone: run large images one by one, so that their values stay in caches; the last bits of sums may then change.
        rows: images are rows of matrices; idle memory for their values, which engines share.
        Raise Unsupported for a program that has steps without a kernel.
        """
        self._program = program
        self._tasks = tasks_of(program)
        self._lanes = lanes or host_lanes()
        self._way = way_of_products() if self._lanes <= host_lanes() else "plain"  # no instructions of wider vectors
        self._lookup = lanes is None and permutes()
        self._threads = threads
        self._helping: Crew | None = None
        self._code = code or Code()
        add_runner(self._code)
        add_answer(self._code)
        self._address = reader(self._code) or _address
        self._making = Lock()  # what answers one image points to the memory of one plan, which must not be replaced
        self._plans: dict[Layout, ExecutionPlan] = {}
        self._split: tuple[int, list[tuple[ExecutionPlan, int, int, int]]] = 0, []
        self._gradient_plans: dict[Layout, ExecutionPlan] = {}
        self._image, self._logits = 4 * math.prod(program.shape), 4 * program.classes
        # Four tiles share a linear layer's weights if they fit into a near cache; a gradient needs all values twice.
        pairs, kept = (_convolved(program, tasks) for tasks in (self._tasks, tasks_of(program, whole=False)))
        self._linear = not pairs
        most = min(8, 64 // self._lanes) if self._linear else 4
        width = 1 if program.rounding else 4
        self._rows = rows
        self._alone = alone and width * self._lanes * max(pairs, default=0) > _FAR_CACHE
        self._units = most if width * self._lanes * max(pairs, default=0) <= _NEAR_CACHE else 1
        self._gradient_units = most if 8 * self._lanes * sum(kept) <= _NEAR_CACHE else 1

    @cached_property
    def answer(self) -> Callable[[object], Floats | None]:
        """Return a function that gives the logits of one image (1, *shape), and None for whatever else.

        It is for one thread at a time, and faster than `run`: a small network takes as long as a few Python calls.
        """
        if self._threads > 1 and self._shares(1):
            return no_answer
        plan = self.plan(Layout(False, self._lanes))
        with self._making:
            return plan.single.answer or no_answer

    def plan(self, layout: Layout) -> ExecutionPlan:
        """Return the plan for a layout, tuned and made at first use."""
        with self._making:
            if layout not in self._plans:
                planner = self._planner(layout)
                space = Workspace(planner.arena_bytes, [], fields_of({Run.UNIT + Unit.OWN: planner.common_bytes}))
                memory = space.arena.address, space.call_address + 8 * Run.UNIT
                choose = tuned(planner, self._code, memory, lanes=self._lanes)
                calls = planner.calls(choose)
                self._plans[layout] = ExecutionPlan(self._program, planner, calls, self._code, room=self._rows)
            return self._plans[layout]

    def _planner(self, layout: Layout) -> Planner:
        if self._program.rounding:
            return BytePlanner(self._program, layout, way=self._way, lookup=self._lookup)
        return Planner(self._program, self._tasks, layout, lookup=self._lookup)

    def run(self, x: Floats) -> Floats:
        """Return the logits of contiguous images (N, *shape)."""
        count = len(x)
        result = np.empty((count, self._logits // 4), np.float32)
        known, parts = self._split
        if known != count:
            parts = [
                (self.plan(layout), at * self._image, at * self._logits, n) for layout, at, n in self._parts(count)
            ]
            self._split = count, parts  # most batches have the same size
        source, target = self._address(x), self._address(result)

        def work(part: tuple[ExecutionPlan, int, int, int]) -> None:
            plan, images, logits, number = part
            plan.run(source + images, target + logits, number)

        if self._threads == 1 or not self._shares(count) or not self._crew.lock.acquire(blocking=False):
            for part in parts:
                work(part)
            return result
        helpers = self._crew.helpers
        try:
            if len(parts) >= self._threads:  # each computes its own images
                others = [helpers.submit(work, part) for part in parts[1:]]
                work(parts[0])
                for other in others:
                    other.result()
            else:
                for plan, images, logits, number in parts:
                    plan.run_shared(source + images, target + logits, number, helpers, self._threads)
        finally:
            self._crew.lock.release()
        return result

    def _shares(self, count: int) -> bool:
        """Return whether images are enough work for several threads."""
        return count * multiplications(self._program) >= _SHARED

    @property
    def _crew(self) -> Crew:
        """Return the helpers of this process: a fork has none of its parent's threads."""
        if self._helping is None or self._helping.process != os.getpid():
            self._helping = Crew(os.getpid(), ThreadPoolExecutor(self._threads - 1), Lock())
        return self._helping

    @property
    def bytes_memory(self) -> int:
        """Return the bytes of all plans made so far."""
        return sum(plan.bytes_memory for plan in (*self._plans.values(), *self._gradient_plans.values()))

    def gradient(self, x: Floats, upstream: Floats) -> Floats:
        """Return the gradients (R, N, *shape) of sum(upstream · logits) at contiguous images, for R rows of upstream.

        upstream: contiguous (R, N, classes). Raise Unsupported for the few networks without a backward pass in kernels.
        """
        result = np.empty((len(upstream), *x.shape), np.float32)
        if len(x):
            # Large values fill the caches; shorter vectors need less.
            lanes = self._lanes if self._gradient_units > 1 else min(8, self._lanes)
            units = min(self._gradient_units, -(-len(x) // lanes))
            plan = self._gradient_plan(self._tiles(lanes, units))
            images, given, gradients = (self._address(array) for array in (x, upstream, result))
            plan.run_gradient(images, given, gradients, len(x), len(upstream))
        return result

    def _gradient_plan(self, layout: Layout) -> ExecutionPlan:
        if layout not in self._gradient_plans:
            planner = GradientPlanner(self._program, layout)
            calls = planner.calls(lambda key: usual(layout.lanes))
            self._gradient_plans[layout] = ExecutionPlan(
                self._program, planner, calls, self._code, again=planner.forward_calls
            )
        return self._gradient_plans[layout]

    def _tiles(self, lanes: int, tiles: int) -> Layout:
        """Return the layout of some tiles: side by side in each pixel, if all layers are linear.

        If one tile fills the near caches, two with half of its images are faster, since shorter vectors are no slower.
        """
        if self._linear:
            return Layout(True, lanes * tiles, 1, tiles)
        return Layout(True, lanes // 2, 2) if lanes > 8 and tiles == 1 else Layout(True, lanes, tiles)

    def _parts(self, count: int) -> list[tuple[Layout, int, int]]:
        """Split a batch into (layout, first image, images): for each thread runs of some tiles, then the rest.

        The split depends only on the network and the batch size, since it determines how sums are rounded.
        """
        if self._alone:
            share = -(-count // self._threads) or 1
            return [(Layout(False, self._lanes), at, min(share, count - at)) for at in range(0, count, share)]
        most = self._units * self._lanes
        whole = count // most * most
        if self._rows is not None and whole and 0 < count - whole <= self._lanes:
            whole -= most  # a longer tile takes less time than two, or than one by one
        share = (-(-whole // (self._threads * most)) * most) or most
        layout = self._tiles(self._lanes, self._units)
        parts = [(layout, at, min(share, whole - at)) for at in range(0, whole, share)]
        rest = count - whole
        if rest > self._lanes // 2:
            parts.append((self._tiles(self._lanes, -(-rest // self._lanes)), whole, rest))
        elif rest:
            parts.append((Layout(False, self._lanes), whole, rest))
        return parts


def no_answer(image: object) -> None:
    """Return None: whatever an image is, another function has to run it."""


def _address(array: Floats) -> int:
    return array.ctypes.data


def _convolved(program: Program, tasks: list[Task]) -> list[int]:
    """Return the numbers of inputs and outputs of each convolution, for one image."""
    shapes = program.shapes
    layers = [task for task in tasks if isinstance(task, FusedLayer) and len(shapes[task.source]) == 3]
    return [math.prod(shapes[task.source]) + math.prod(shapes[task.result]) for task in layers]


@dataclass(frozen=True)
class _Tuning:
    """The number of the fastest choice for each layer's key, and the names of all kernels that were compiled for it."""

    winners: dict[str, int]
    kernels: list[str]


def tuned(planner: Planner, code: Code, memory: Memory, *, lanes: int) -> Callable[[str], Tiling | None]:
    """Return the fastest choice for each tuned layer's key, from an earlier tuning on this host if there was one.

    `memory` is for one run of the planner's layout; its content is overwritten.
    """
    choices = planner.choices
    layers = _worth_tuning(planner)
    if not layers:
        return lambda key: None
    path = _path(sorted(layers), choices)
    found = _remembered(path, layers, len(choices))
    if found is None:
        found = _measure(planner, layers, choices, code, memory)
        _remember(path, found)
    else:
        add_cached_kernels(code, found.kernels)  # they were compiled together with slower ones
    winners = found.winners
    return lambda key: choices[winners[key]] if key in winners else None


def _worth_tuning(planner: Planner) -> dict[str, FusedLayer]:
    """Return one layer for each key with enough of the work, if there is a choice."""
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
) -> _Tuning:
    calls: dict[str, dict[int, Call]] = {
        key: {n: planner.layer(layer, choice) for n, choice in enumerate(candidates) if planner.suits(layer, choice)}
        for key, layer in layers.items()
    }
    names = add_kernels(code, (call.spec for tried in calls.values() for call in tried.values()))
    for layer in layers.values():
        _write_zeros(planner, layer, memory[0])
    winners = {}
    for key, tried in calls.items():
        times = _shortest([_runner(call, code, memory) for call in tried.values()])
        winners[key] = list(tried)[int(np.argmin(times))]
    return _Tuning(winners, names)


def _write_zeros(planner: Planner, layer: FusedLayer, arena: int) -> None:
    """Write a layer's inputs: unwritten pages share one physical page, which would always be in the nearest cache."""
    buffer = planner.read_by(layer)
    own = buffer.origin < 0
    for unit in range(planner.layout.units if own else 1):
        place = planner.common_bytes + unit * planner.unit_bytes - 1 - buffer.origin if own else buffer.origin
        ctypes.memset(arena + place - buffer.before, 0, buffer.size)


def _runner(call: Call, code: Code, memory: Memory) -> Callable[[], None]:
    function, arguments = _RUN(code[call.spec.name]), call.arguments.ctypes.data
    return lambda: function(memory[0], arguments, memory[1])


def _shortest(runs: Sequence[Callable[[], None]]) -> list[float]:
    """Return the shortest time of each function over a few interleaved rounds, in seconds; short ones are repeated."""
    times = [float("inf")] * len(runs)
    repeats = 1
    for turn in range(_ROUNDS + 1):
        for number, run in enumerate(runs):
            start = time.thread_time()  # other work of the machine does not count
            for _ in range(repeats):
                run()
            times[number] = min(times[number], (time.thread_time() - start) / repeats)
        if turn == 0:  # the clock takes as long as a small layer
            repeats, times = max(1, math.ceil(_SHORTEST / min(times))), [float("inf")] * len(runs)
    return times


def _path(keys: list[str], candidates: list[Tiling]) -> Path | None:
    folder = cache_folder()
    identity = "\0".join((*keys, repr(candidates), host_identity(), sources()))
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
            return  # a full disk only costs time at the next start
