"""Plan kernel calls: memory of values, kernels for the shapes, and the tables they read."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from ...errors import Unsupported
from .._program import Pair, Program, Scale, Shape, Snap, Sparse
from ._abi import Call, Layout, Table, Tiling, kernel_call
from ._dense import Block, Columns, is_full, shared_tables
from ._elementwise import Largest, Narrow, Pack, Pointwise, PoolMax, Spread, Unpack
from ._fusion import Elementwise, FusedLayer, MaxPool, Sparsify, Task, View
from ._layout import ALIGNED, Buffer, Cut, cut_joined, cut_planes, cut_tiles, offsets_of, phases_of, split_of
from ._matmul import AHEAD, MOST_PLACES, Tile, lookup_call, rows_call
from ._native import host_registers

_LINEAR_BYTES, _LINEAR_READS = 1 << 16, 16  # of a linear layer's block, as measured
MOST_ACCUMULATORS = 24  # accumulators in 32 registers, beside a weight and spilled addresses

_SMALL = 4  # pixels, up to which an output's sums have several accumulators
_ROUNDED = 1 / 3  # of a row, which zeros may take so that it ends with a cache line, as fewer loads then cross lines
_FULL = 0.5  # of the weights, from which on zeros among them are multiplied too
_MANY_TILES = 12  # of a layer: threads can share them evenly
_CHAINED = 256 * 1024  # bytes of values that stay in a near cache while a chain of kernels passes over them
_NEAR = 24 * 1024  # bytes of input that fit into the nearest cache beside weights and sums


def candidates(lanes: int, tiles: bool) -> list[Tiling]:
    """Return the choices that are tried; the first is used for layers that are not worth tuning."""
    few, many, half = host_registers() // 2, host_registers() * 3 // 4, max(4, lanes // 2)
    first, all_at_once = Tiling(many, lanes, _NEAR), Tiling(many, lanes)
    full = [Tiling(n, lanes, height=many // n) for n in (many // 4, many // 8) if n > 1]
    if tiles:
        return [first, Tiling(few, lanes, _NEAR), all_at_once, Tiling(few, lanes), *full]
    return [
        first,
        all_at_once,
        Tiling(many, half),
        Tiling(many, half, _NEAR),
        *(Tiling(n, lanes, _NEAR) for n in (8, 4)),
        *full,
        Tiling(host_registers() - 4, lanes, across=True),
    ]


def usual(lanes: int) -> Tiling:
    """Return a choice that is good for most layers."""
    return candidates(lanes, True)[0]


class Planner:
    """Assign memory to a program's values and make its kernel calls."""

    def __init__(
        self,
        program: Program,
        tasks: list[Task],
        layout: Layout,
        *,
        keep: bool = False,
        lookup: bool = False,
        shapes: list[Shape] | None = None,
    ) -> None:
        """Place all values; `keep`: each in its own place, so that all can be read after a run.

        lookup: the host supports the kernel `Lookup`. shapes: of all values, if tasks have more than the program.
        """
        self.program = program
        self.tasks = tasks
        self.layout = layout
        self.lookup = lookup
        self.shapes = shapes or program.shapes
        self.choices = candidates(layout.lanes, layout.tiles)
        self.end = 0  # bytes of the memory that all units use in turn
        self.unit_bytes = 0  # bytes of each unit's own memory
        self.buffers: dict[int, Buffer] = {}
        self._views: dict[int, int] = {t.result: t.source for t in tasks if isinstance(t, View)}
        self._place_all(keep)
        self._split: dict[int, Buffer] = {}
        self._spreads: dict[int, list[FusedLayer]] = {}  # by the first of the layers that read one sorted copy
        self._place_splits()

    # -- places -------------------------------------------------------------------------------------------------------

    def buffer(self, value: int) -> Buffer:
        """Return the place of a value; a flattened one shares the place of the value that it views."""
        base = self.buffers[self.base(value)]
        if value in self._views and base.whole:
            return replace(base, shape=self.shape3(value))
        return base

    def fill(self, value: int) -> int:
        """Return the byte that lies around a value: that of zero."""
        return 0

    def fills(self) -> list[tuple[int, int, int]]:
        """Return (where, bytes, byte) in the arena of what is around values, where that is not zero."""
        return []

    def copies(self) -> list[tuple[int, Buffer]]:
        """Return sorted copies, each with the value that it is one of."""
        return [(task.source, self._split[number]) for number, tasks in self._spreads.items() for task in tasks]

    def read_by(self, task: FusedLayer) -> Buffer:
        """Return where a layer reads its input, which for a strided one may be a copy that is sorted for it."""
        return self._split.get(task.result) or self.buffer(task.source)

    def _splits(self, task: Task) -> bool:
        """Return whether a layer reads a sorted copy: if neighbours share a vector and a stride separates them."""
        strided = isinstance(task, FusedLayer) and task.op.stride != (1, 1) and len(self.shapes[task.source]) == 3
        return strided and not self.layout.tiles and math.prod(self.shapes[task.result][1:]) > _SMALL

    def _place_splits(self) -> None:
        """Assign places to the sorted copies: one for all layers that read one value with one stride."""
        groups: dict[tuple[int, Pair, int], list[FusedLayer]] = {}
        for task in self.tasks:
            if isinstance(task, FusedLayer) and self._splits(task):
                pitch = self.buffer(task.result).inner // 4
                groups.setdefault((task.source, task.op.stride, pitch), []).append(task)
        for (_, _, pitch), group in groups.items():
            every = [self._sorted(task, pitch) for task in group]
            pad = max(b.pad[0] for b in every), max(b.pad[1] for b in every)
            buffer = self.reserve(replace(every[0], pad=pad))
            self._split |= {task.result: buffer for task in group}
            self._spreads[group[0].result] = group

    def _sorted(self, task: FusedLayer, pitch: int) -> Buffer:
        _, height, width = self.shapes[task.result]
        computed = (height * (1 + task.pool), width * (1 + task.pool))
        return split_of(task.op, self.shape3(task.source), computed, pitch)

    def _place_all(self, keep: bool) -> None:
        """Give every value a place; values of one geometry share places when their lives do not overlap."""
        pads = self._pads()
        last = {self.base(source): number for number, task in enumerate(self.tasks) for source in sources_of(task)}
        last[self.base(len(self.program.steps))] = len(self.tasks)
        # Up to the first linear layer units run one after another, so that each finds its inputs in the caches.
        together = [number for number, task in enumerate(self.tasks) if self._joins_units(task)]
        inner = set() if keep else {v for v, end in last.items() if end < min(together, default=len(self.tasks))}
        free: dict[tuple[Shape, Pair, bool, bool, int], list[Buffer]] = {}
        lanes, viewed = self.layout.lanes if self.layout.tiles else 1, set(self._views.values())
        for number, value in enumerate((0, *(task.result for task in self.tasks)), -1):
            if value not in self._views:
                shape, pad, own = self.shape3(value), pads.get(value, (0, 0)), value not in inner
                places = free.get((shape, pad, own, value in viewed, self.fill(value)))
                whole = self.layout.tiles or value in viewed or len(self.shapes[value]) == 1
                align = 4 if whole else ALIGNED
                new = Buffer(shape, pad, lanes, align=align)
                self.buffers[value] = places.pop() if places else self.reserve(new, own=own)
            for ended in [] if keep else [v for v, end in last.items() if end == number and v in self.buffers]:
                buffer = self.buffers[ended]
                kind = (buffer.shape, buffer.pad, ended not in inner, ended in viewed, self.fill(ended))
                free.setdefault(kind, []).append(buffer)

    def shape3(self, value: int) -> tuple[int, int, int]:
        """Return a value's shape as channels, rows and columns."""
        channels, *sides = self.shapes[value]
        height, width = (*sides, 1, 1)[:2]
        return channels, height, width

    def _joins_units(self, task: Task) -> bool:
        """Return whether a task takes all units at once, as linear layers of tiles do."""
        return isinstance(task, FusedLayer) and len(self.shapes[task.source]) == 1 and self.layout.tiles

    def plain(self, value: int) -> Buffer:
        """Return the place of a value if its layout is that of its shape, unlike a view of a padded value."""
        buffer = self.buffer(value)
        if buffer.shape[0] != self.shapes[value][0]:
            raise Unsupported("a flattened padded value is read by a layer that is not linear")
        return buffer

    def base(self, value: int) -> int:
        while value in self._views:
            value = self._views[value]
        return value

    def _pads(self) -> dict[int, Pair]:
        pads: dict[int, Pair] = {}
        for task in self.tasks:
            if isinstance(task, FusedLayer):
                old = pads.get(base := self.base(task.source), (0, 0))
                pads[base] = max(old[0], task.op.padding[0]), max(old[1], task.op.padding[1])
        return pads if self.layout.tiles else self._even(pads)

    def _even(self, pads: dict[int, Pair]) -> dict[int, Pair]:
        """Return pads by which values of one size have rows of one length, except those that are flattened.

        Rows that no layer takes as one end with a cache line.
        """
        most: dict[Shape, int] = {}
        for task in (None, *self.tasks):
            value = 0 if task is None else task.result
            needed = pads.get(value, (0, 0))[1]
            if isinstance(task, FusedLayer) and self._splits(task):
                pitch = self._sorted(task, 0).inner // 4
                needed = max(needed, pitch - self.shapes[value][2])
            most[self.shapes[value][1:]] = max(most.get(self.shapes[value][1:], 0), needed)
        layers = [task for task in self.tasks if isinstance(task, FusedLayer)]
        joined = {self.shapes[t.result][1:] for t in layers if not t.pool and t.op.stride == (1, 1)}
        for shape in [s for s in most.keys() - joined - {self.program.shape[1:]} if len(s) == 2]:
            rest = -(shape[-1] + most[shape]) % (ALIGNED // 4)
            most[shape] += rest if rest <= _ROUNDED * shape[-1] else 0
        viewed = set(self._views.values())
        values = [v for v in (0, *(task.result for task in self.tasks)) if len(self.shapes[v]) == 3 and v not in viewed]
        return pads | {value: (pads.get(value, (0, 0))[0], most[self.shapes[value][1:]]) for value in values}

    def reserve(self, buffer: Buffer, *, own: bool = True) -> Buffer:
        """Return the buffer with its own place, in each unit's own memory or in shared memory."""
        # Start pixel (0, 0) at a vector's boundary, so that most loads are aligned.
        lead = -buffer.before % 64
        size = -(-(lead + buffer.size) // 64) * 64
        if own:
            self.unit_bytes += size
            return replace(buffer, origin=-1 - (self.unit_bytes - size + lead + buffer.before))
        self.end += size
        return replace(buffer, origin=self.end - size + lead + buffer.before)

    # -- calls --------------------------------------------------------------------------------------------------------

    def calls(self, choose: Callable[[str], Tiling | None]) -> list[Call]:
        """Return all kernel calls; `choose` gives the tuned choice for a layer's key, None for the usual one."""
        first, tasks = self.pack_images()
        calls, before = [first], 0  # calls of the task before
        for number, task in enumerate(tasks):
            made = self._calls_of(task, choose)
            if number and made and self._follows(task, tasks[number - 1], calls[-1]):
                calls[-before:] = self._chained(task, calls[-before:])
                made = [_chain(call, calls[-1].chain, calls[-1].turns) for call in made]
            calls, before = [*calls, *made], len(made)
        logits = self.plain(len(self.program.steps))
        lanes = self.layout.lanes if self.layout.tiles else 1
        return [*calls, kernel_call(Unpack(lanes, self.layout.side), [logits.origin, self.program.classes])]

    def _calls_of(self, task: Task, choose: Callable[[str], Tiling | None]) -> list[Call]:
        match task:
            case FusedLayer():
                return [*self._spread(task), self.layer(task, choose(self.key(task)) or self.usual(task))]
            case Elementwise():
                return [self._elementwise(task)]
            case MaxPool():
                return [self.max_pool(task)]
            case Sparsify():
                return [self._sparsify(task)]
        return self.moves(task)

    def _follows(self, task: Task, before: Task, call: Call) -> bool:
        """Return whether each channel of a task's result needs only that channel of the task before, made by a call."""
        if self.layout.units > 1:  # they run one after another from kernel to kernel, in the same memory
            return False
        if task.source != before.result or not isinstance(before, FusedLayer) or type(call.spec) is not Tile:
            return False
        target = self.buffers[self.base(task.result)].origin
        if call.chain or target in {self.buffers[self.base(source)].origin for source in sources_of(before)}:
            return False
        return isinstance(task, MaxPool) or (isinstance(task, FusedLayer) and _is_depthwise(task.op))

    def _chained(self, task: Task, calls: list[Call]) -> list[Call]:
        """Return the calls of the task before as part of a chain with a task that follows it channel by channel.

        Then some channels at a time stay in a near cache between the two.
        """
        buffers = [self.buffers[self.base(task.source)], self.buffers[self.base(task.result)]]
        buffers += [self._split[task.result]] if task.result in self._split else []
        rows, size = buffers[0].shape[0], sum(b.shape[0] * b.outer for b in buffers)
        turns = max(1, min(rows, -(-size // _CHAINED)))
        return [*calls[:-1], _chain(calls[-1], task.result, turns)] if turns > 1 else calls

    def moves(self, task: Task) -> list[Call]:
        """Return the calls for a task that only moves values: none for a view."""
        return []

    def pack_images(self) -> tuple[Call, list[Task]]:
        """Return the call that brings images in, normalised if the first task does that, and the remaining tasks."""
        first, scale, result, rest = self.tasks[0], None, 0, self.tasks
        alone = sum(0 in sources_of(task) for task in self.tasks) == 1
        if isinstance(first, Elementwise) and first.scale is not None and alone and not first.relu:
            scale, result, rest = first.scale, first.result, self.tasks[1:]
        target = self.buffer(result)
        channels, rows, width = target.shape
        if scale is None and target.whole:
            channels, rows, width = 1, 1, channels * rows * width
        image = 4 * target.shape[1] * target.shape[2]
        both = factors(scale)
        if self.layout.tiles:
            arguments = [target.origin, channels, rows, width, target.outer, target.inner, image * target.shape[0]]
            return kernel_call(Pack(self.layout.lanes, scale is not None, self.layout.side), arguments, both), rest
        strides = [image, 4 * target.shape[2], 0, *target.strides, *[0] * 6]
        arguments = [0, target.origin, 0, 0, channels, rows, 1, width, *strides]
        return kernel_call(Pointwise(self.layout.lanes, image=True, scaled=scale is not None), arguments, both), rest

    def _elementwise(self, task: Elementwise) -> Call:
        source, target = self.plain(task.source), self.plain(task.result)
        other = None if task.other is None else self.plain(task.other)
        return self.pointwise(source, target, target.shape, other=other, scale=task.scale, relu=task.relu, cap=task.cap)

    def pointwise(
        self,
        source: Buffer,
        target: Buffer,
        shape: tuple[int, int, int],
        *,
        other: Buffer | None = None,
        gate: Buffer | None = None,
        scale: Scale | None = None,
        relu: bool = False,
        cap: float | None = None,
    ) -> Call:
        """Return the call for target = min(relu(source · scale + shift + other), cap), gated by the sign of a value."""
        four = [source, target, other or target, gate or target]
        (channels, rows, columns), width = shape, source.lanes
        if all(b.step == (1, 1) for b in four):
            columns, width = 1, columns * width
        strides = [number for b in four for number in b.strides]
        arguments = [*(b.origin for b in four), channels, rows, columns, width, *strides]
        parts = {"scaled": scale is not None, "added": other is not None, "relu": relu, "gated": gate is not None}
        spec = Pointwise(self.layout.lanes, **parts, cap=cap)
        return kernel_call(spec, arguments, factors(scale))

    def max_pool(self, task: MaxPool) -> Call:
        source, target, op = self.buffer(task.source), self.buffer(task.result), task.op
        wide = [1] if self.layout.tiles else [n for n in (self.layout.lanes, 8, 4, 1) if n <= self.layout.lanes]
        tried = [PoolMax(target.lanes, (*source.shape[1:], *target.shape[1:]), op, task.relu, n) for n in wide]
        spec = next((spec for spec in tried if spec.inside[1]), tried[-1])
        strides = [*source.strides, *target.strides]
        return kernel_call(spec, [source.origin, target.origin, target.shape[0], *strides])

    def _sparsify(self, task: Sparsify) -> Call:
        source, target, op = self.plain(task.source), self.plain(task.result), task.op
        channels, rows, width = source.shape
        if source.whole and target.whole and not isinstance(op, Snap):
            channels, rows, width = 1, 1, channels * rows * width
        sizes = [source.origin, target.origin, channels, rows, width * source.lanes]
        arguments = [*sizes, source.outer, source.inner, target.outer, target.inner]
        if isinstance(op, Snap):
            return kernel_call(Narrow(self.layout.lanes, snap=True), arguments, (op.centre, op.radius))
        if op.kind == "threshold":
            threshold = np.full(channels, op.number, np.float32)
            return kernel_call(Narrow(self.layout.lanes, snap=False), arguments, (threshold, threshold))
        kept = op.kept(math.prod(self.shapes[task.source]))
        return kernel_call(Largest(self.layout.lanes, tiles=self.layout.tiles), [*arguments, kept])

    def _spread(self, task: FusedLayer) -> list[Call]:
        """Return the call that sorts the input of a strided layer, if it is the first to read the sorted copy."""
        if task.result not in self._spreads:
            return []
        source, target = self.buffer(task.source), self._split[task.result]
        phases = tuple(sorted({phase for layer in self._spreads[task.result] for phase in phases_of(layer.op)}))
        spec = Spread(self.layout.lanes, (source.shape[1], source.shape[2]), task.op.stride, phases)
        strides = [source.outer, source.inner, target.outer, target.inner]
        return [kernel_call(spec, [source.origin, target.origin, source.shape[0], *strides])]

    def layer(self, task: FusedLayer, choice: Tiling) -> Call:
        """Return the call for one layer."""
        choice = choice if self.suits(task, choice) else self.choices[0]
        source, target = self.read_by(task), self.buffer(task.result)
        flat = len(self.shapes[task.source]) == 1
        if flat and not self.layout.tiles and task.residual is None and task.cap is None:
            if self.lookup:
                return lookup_call(task, source, target)
            if source.size < 4 * MOST_PLACES:
                return rows_call(task, source, target)
        other = None if task.residual is None else self.buffer(task.residual)
        shape = self.shapes[task.result]
        return self.sums(task, source, target, choice, shape=shape, other=other, gate=None)

    def suits(self, task: FusedLayer, choice: Tiling) -> bool:
        """Return whether a choice is one for this layer."""
        if choice.height == 1 and not choice.across:
            return True
        # The sums of few pixels are dealt out in turns, so that other rows must have the same nonzeros.
        few = math.prod(self.shapes[task.result][1:]) <= _SMALL
        full = len(self.shapes[task.source]) == 3 and is_full(task.op, 1.0 if few else _FULL)
        if choice.across:
            return full and not self.layout.tiles and not task.pool and task.op.shape[0] >= choice.lanes
        return full and task.op.shape[0] >= choice.height

    def usual(self, task: FusedLayer) -> Tiling:
        """Return the choice for a layer that is not worth tuning."""
        shared = [choice for choice in self.choices if choice.height > 1 or choice.across]
        fitting = [choice for choice in shared if self.suits(task, choice)] if is_full(task.op, 1.0) else []
        return fitting[-1] if fitting else self.choices[0]

    def sums(
        self,
        task: FusedLayer,
        source: Buffer,
        target: Buffer,
        choice: Tiling,
        *,
        shape: Shape,
        other: Buffer | None,
        gate: Buffer | None,
    ) -> Call:
        """Return the call that computes a layer of result `shape` from one buffer into another, in tiles as chosen."""
        flat, (height, width) = len(shape) == 1, (*shape[1:], 1, 1)[:2]
        adds = other is not None and other.origin == target.origin
        four = (source, target, other or target, gate or target)
        cut, usual = (
            self._cut(task, (shape[0], height, width), four, one, flat=flat, apart=adds)
            for one in (choice, self.choices[0])
        )
        # Small outputs leave few accumulators, which would wait for one another. This does not depend on tuning, so
        # that the order of every sum, and its last bit, stay the same.
        chains = 4 if height * width <= _SMALL and len(usual.read) < 4 else 1
        if choice.across:
            return self._columns(task, four, choice, shape, chains, others=other is not None)
        unit = 0
        if flat and self.layout.tiles:
            unit = self.unit_bytes if self.layout.units > 1 else 4 * self.layout.lanes // self.layout.vectors
        spec, table = _tile(task, cut, four, unit, chains)
        spec = replace(
            spec, others=spec.others if other is not None else (), gates=spec.gates if gate is not None else ()
        )
        spec, rows = self.kind_of(task, spec)
        mask = _mask(cut, target, shape)
        spec = replace(spec, masked=len(mask) > 1)
        origins, row_bytes = [b.origin for b in four], [b.outer for b in four[1:]]
        if choice.height > 1:
            (groups, weighted, *counts), tables = shared_tables(task.op, source, shape, choice.height, spec.unroll)
            numbers = [len(cut.starts), groups, weighted, *row_bytes, *counts]
            return kernel_call(Block(spec.unroll, spec, choice.height), [*origins, *numbers], (table, *tables, mask))
        per_block = self.per_block(task.op, choice, cut, source, spec, flat=flat)
        blocks = -(-task.op.shape[1] // per_block)
        starts, nonzeros = _nonzeros(task.op, offsets_of(task.op, source, flat), per_block, blocks)
        numbers = [len(cut.starts), task.op.shape[0], *row_bytes, blocks, self.end]
        tables = (table, starts, nonzeros, rows, mask)
        once = flat and self.layout.tiles
        by_tiles = not self.layout.tiles and len(cut.starts) >= _MANY_TILES
        spec = replace(spec, blocked=blocks > 1, by_tiles=by_tiles)
        return kernel_call(spec, [*origins, *numbers], tables, per_unit=not once)

    def _columns(
        self,
        task: FusedLayer,
        buffers: tuple[Buffer, Buffer, Buffer, Buffer],
        choice: Tiling,
        shape: Shape,
        chains: int,
        *,
        others: bool,
    ) -> Call:
        """Return the call that computes a layer with a row in each lane."""
        op, pixels = task.op, math.prod(shape[1:])
        together = min(pixels, choice.accumulators // chains)
        wide = min(4, choice.accumulators // (together * chains), op.shape[0] // choice.lanes)
        cut = cut_tiles((shape[0], shape[1], shape[2]), _stride(op, buffers[0]), 1, 1, together)
        tile, table = _tile(task, cut, buffers, 0, chains)
        (groups, weighted, *counts), tables = shared_tables(op, buffers[0], shape, wide * choice.lanes, chains)
        reads = (tile.reads, tile.writes, tile.others if others else ())
        spec = Columns(chains, choice.lanes, wide, *reads, relu=task.relu, cap=task.cap)
        numbers = [len(cut.starts), groups, weighted, *(b.outer for b in buffers[1:]), *counts]
        mask = np.full(1, -1, np.int32)
        return kernel_call(spec, [*(b.origin for b in buffers), *numbers], (table, *tables, mask))

    def kind_of(self, task: FusedLayer, spec: Tile) -> tuple[Tile, Table]:
        """Return the kernel of a layer, and the table with an entry for each of its rows."""
        return spec, task.op.bias

    def per_block(self, op: Sparse, choice: Tiling, cut: Cut, source: Buffer, spec: Tile, *, flat: bool) -> int:
        """Return how many input channels a layer takes at once."""
        return _channels_per_block(choice, cut, op, source, flat, spec)

    @property
    def scratch_bytes(self) -> int:
        """Return the bytes of a thread's scratch: for the sums of the layer with most rows."""
        rows = max((max(task.op.shape[:2]) for task in self.tasks if isinstance(task, FusedLayer)), default=0)
        sums = self.layout.lanes * (MOST_ACCUMULATORS if self.layout.vectors == 1 else 1)  # of a row in one tile
        return 4 * max(rows * sums, math.prod(self.program.shape))

    @property
    def common_bytes(self) -> int:
        """Return the bytes that all units use in turn: values, then scratch."""
        return -(-(self.end + self.scratch_bytes) // 64) * 64

    @property
    def arena_bytes(self) -> int:
        """Return the bytes of the arena: the memory that all units use in turn, then each unit's own."""
        return self.common_bytes + self.unit_bytes * self.layout.units

    def key(self, task: FusedLayer) -> str:
        """Return the geometry of a layer and roughly its density: layers of one key are tuned as one."""
        source = self.read_by(task)
        density = task.op.nonzeros / max(1, int(np.prod(task.op.shape)))
        fields = (self.layout, task.op.shape, task.op.stride, task.op.dilation, source.shape, source.pad, task.pool)
        return repr((*fields, task.relu, task.residual is not None, round(np.log2(density + 1e-6))))

    def _cut(
        self,
        task: FusedLayer,
        shape: tuple[int, int, int],
        buffers: tuple[Buffer, Buffer, Buffer, Buffer],
        choice: Tiling,
        *,
        flat: bool,
        apart: bool,
    ) -> Cut:
        pool, stride = 2 if task.pool else 1, _stride(task.op, buffers[0])
        if flat and self.layout.tiles:
            units = tuple((unit, 0) for unit in range(self.layout.units * self.layout.vectors))
            lanes = self.layout.lanes // self.layout.vectors
            return Cut(lanes, units, tuple((i,) for i in range(len(units))), units, ((0, 0),))
        if self.layout.tiles:
            return cut_tiles(shape, stride, pool, self.layout.lanes, choice.accumulators, apart=apart)
        row = buffers[1].inner // 4
        length, pixels = (shape[1] - 1) * row + shape[2], shape[1] * shape[2]
        joins = stride == (1, 1) and pool == 1 and pixels > _SMALL and len({b.inner for b in buffers}) == 1
        for lanes in [lanes for lanes in (choice.lanes, 8, 4) if lanes <= choice.lanes]:
            if joins and length >= lanes and (self.layout.lanes > 8 or shape[2] % lanes):  # as measured
                return cut_joined(length, lanes, choice.accumulators)
            cut = cut_planes(shape, stride, pool, lanes, choice.accumulators)
            if cut is not None:
                return cut
        return cut_tiles(shape, stride, pool, 1, 1 if flat else 8)  # pixel by pixel


def _mask(cut: Cut, target: Buffer, shape: Shape) -> NDArray[np.int32]:
    """Return the bits to keep of each pixel of joined rows, none of the zeros between them; else one entry."""
    row = target.inner // 4
    if not cut.joined or row == shape[2]:
        return np.full(1, -1, np.int32)
    return np.where(np.arange(shape[1] * row) % row < shape[2], -1, 0).astype(np.int32)


def _is_depthwise(op: Sparse) -> bool:
    """Return whether each row of a convolution reads the channel of its own number only."""
    rows = np.repeat(np.arange(op.shape[0]), np.diff(op.indptr))
    return op.shape[0] == op.shape[1] and bool((op.indices // math.prod(op.shape[2:]) == rows).all())


def _stride(op: Sparse, source: Buffer) -> Pair:
    """Return the stride of a layer on the buffer that it reads; sorting already accounts for it."""
    return (1, 1) if source.phases != (1, 1) else op.stride


def sources_of(task: Task) -> list[int]:
    match task:
        case FusedLayer():
            return [task.source] if task.residual is None else [task.source, task.residual]
        case Elementwise():
            return [task.source] if task.other is None else [task.source, task.other]
    return [task.source]


def factors(scale: Scale | None) -> tuple[Table, ...]:
    """Return scales and shifts, one of each where there are none."""
    return (np.ones(1, np.float32), np.zeros(1, np.float32)) if scale is None else (scale.scale, scale.shift)


def _chain(call: Call, chain: int, turns: int) -> Call:
    """Return a call as part of a chain (0: none), whose turns are shares of rows."""
    spec = replace(call.spec, by_tiles=False) if chain and isinstance(call.spec, Tile) else call.spec
    return replace(call, spec=spec, chain=chain, turns=turns)


def _tile(
    task: FusedLayer, cut: Cut, buffers: tuple[Buffer, Buffer, Buffer, Buffer], unit: int, chains: int
) -> tuple[Tile, NDArray[np.int64]]:
    """Return the kernel for a cut, and the table of its tiles: an offset for each buffer.

    The buffers are input, output, residual and gate.
    """
    source = buffers[0]

    def outside(places: tuple[tuple[int, int], ...], buffer: Buffer) -> tuple[int, ...]:
        _, row, column = buffer.strides
        return tuple(y * (unit or row) + x * column for y, x in places)

    def inside(places: tuple[tuple[int, int], ...]) -> tuple[int, ...]:
        row, column = unit or source.inner, source.pixel
        return tuple(y * row + x * column for y, x in places)

    down, across = _stride(task.op, source)
    stride = (down * (1 + task.pool), across * (1 + task.pool))
    inputs = inside(tuple((y * stride[0], x * stride[1]) for y, x in cut.starts))
    table = np.stack([inputs, *(outside(cut.starts, buffer) for buffer in buffers[1:])], axis=1)
    writes, others, gates = (outside(cut.stored, buffer) for buffer in buffers[1:])
    spec = Tile(
        cut.lanes,
        inside(cut.read),
        cut.groups,
        writes,
        others,
        gates,
        halve=cut.halve,
        pair=cut.halve and task.pool,
        relu=task.relu,
        cap=task.cap,
        unroll=chains,
    )
    return spec, np.ascontiguousarray(table, np.int64)


def _channels_per_block(choice: Tiling, cut: Cut, op: Sparse, source: Buffer, flat: bool, spec: Tile) -> int:
    """Return how many input channels to take at once, so that what a tile reads of them is `block_bytes`.

    All of them if a row's sum has several accumulators: adding those up block by block would round differently, and
    tuning must not change a bit.
    """
    if spec.unroll > 1:
        return op.shape[1]
    if flat:  # worth it if a row reads so much of a block that storing its sums takes little in comparison
        inputs = max(1, _LINEAR_BYTES // (4 * spec.lanes * len(spec.reads)))
        return inputs if op.nonzeros * inputs >= _LINEAR_READS * op.shape[0] * op.shape[1] else op.shape[1]
    if not choice.block_bytes:
        return op.shape[1]
    reach = [op.dilation[i] * (op.shape[2 + i] - 1) // source.phases[i] for i in (0, 1)]
    rows, columns = max(y for y, _ in cut.read) + 1 + reach[0], max(x for _, x in cut.read) + 1 + reach[1]
    beyond = 0 if source.lanes > 1 else 4 * spec.lanes
    touched = rows * (columns * source.pixel + beyond)
    if cut.joined:
        touched = reach[0] * source.inner + columns * source.pixel + beyond
    inputs = max(1, min(op.shape[1], choice.block_bytes // (touched * math.prod(source.phases))))
    return inputs if op.nonzeros * inputs >= op.shape[0] * op.shape[1] else op.shape[1]  # a nonzero of each row or more


def _nonzeros(op: Sparse, offsets: NDArray[np.int64], per_block: int, blocks: int) -> tuple[Table, Table]:
    """Return the starts of rows, block by block, and the nonzeros as pairs (offset, weight) in that order."""
    rows = np.repeat(np.arange(op.shape[0]), np.diff(op.indptr))
    block = op.indices // (op.shape[2] * op.shape[3] * per_block)
    place = block * op.shape[0] + rows
    order = np.argsort(place, kind="stable")
    starts = np.zeros(blocks * op.shape[0] + 1, np.int32)
    np.cumsum(np.bincount(place, minlength=len(starts) - 1), out=starts[1:])
    pairs = np.zeros(op.nonzeros + AHEAD, [("offset", np.int32), ("weight", np.float32)])
    pairs["offset"][: op.nonzeros], pairs["weight"][: op.nonzeros] = offsets[order], op.values[order]
    return starts, pairs
