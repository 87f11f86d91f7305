"""Plan kernel calls of an int8 network: where a lane holds four channels, float kernels are used unchanged."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from ..._program import Program, Sparse
from ...rounding._tasks import (
    Dequantise,
    FlatBytes,
    Integers,
    Quantise,
    RoundedLayer,
    RoundedPool,
    rounded_tasks,
)
from .._abi import Call, Layout, Table, Tiling, kernel_call
from .._fusion import FusedLayer, MaxPool, Task, View
from .._layout import Buffer, Cut
from .._matmul import Tile, lookup_tables
from .._native import host_lanes
from .._plan import Planner, sources_of
from . import _moves as moves
from ._arithmetic import MADDUBS
from ._tile import RECORD, QuadLookup, QuadTile, Stored

_WIDE = 1 << 30  # beyond which what is rounded may leave 31 bits
_SAFE = 128  # two weights of one sign up to whose sum their products with bytes stay within 16 bits


class BytePlanner(Planner):
    """Lay out a program with `rounding` and make its kernel calls."""

    def __init__(self, program: Program, layout: Layout, *, way: str, lookup: bool) -> None:
        """Place all values; `way`: how four products are summed, see `_arithmetic`."""
        self._way = way
        found = rounded_tasks(program)
        self._rounding, self._integers = found.rounding, {}
        tasks: list[Task] = []
        for task in found.tasks:
            if isinstance(task, RoundedLayer) and task.integers is not None:
                self._integers[task.result] = task.integers
                task = replace(task, op=quads_of(task.integers, split=way == MADDUBS))
            tasks.append(task)
        super().__init__(program, tasks, layout, lookup=lookup, shapes=found.shapes)
        self.choices = _choices(layout)

    def shape3(self, value: int) -> tuple[int, int, int]:
        channels, height, width = super().shape3(value)
        return (-(-channels // 4) if value in self._rounding else channels), height, width

    def plain(self, value: int) -> Buffer:
        return self.buffer(value) if value in self._rounding else super().plain(value)

    def fill(self, value: int) -> int:
        return self._rounding[value].zero if value in self._rounding else 0

    def fills(self) -> list[tuple[int, int, int]]:
        """Return (where, bytes, byte) of what is not zero around values, in the arena."""
        found = []
        for value, buffer in [*self.buffers.items(), *self.copies()]:
            if byte := self.fill(value):
                own = buffer.origin < 0
                for unit in range(self.layout.units if own else 1):
                    place = self.common_bytes + unit * self.unit_bytes - 1 - buffer.origin if own else buffer.origin
                    found.append((place - buffer.before, buffer.size, byte))
        return found

    def pack_images(self) -> tuple[Call, list[Task]]:
        """Return the call that brings images into bytes, or else as they are, and the remaining tasks."""
        at = next((i for i, task in enumerate(self.tasks) if not isinstance(task, View)), -1)
        task, images = self.tasks[at], {0, *(view.result for view in self.tasks[:at])}
        again = any(images & set(sources_of(after)) for after in self.tasks[at + 1 :])
        if not isinstance(task, Quantise) or task.source not in images or again:
            return super().pack_images()
        return self._quantise_images(task), self.tasks[at + 1 :]

    def _quantise_images(self, task: Quantise) -> Call:
        target, shape = self.buffer(task.result), self.shapes[task.source]
        tables, count = (task.factor, task.shift), math.prod(self.program.shape)
        flat = len(shape) == 1
        if not self.layout.tiles and flat:
            return kernel_call(
                moves.QuantiseFlat(self.layout.lanes, self._way, image=True), [0, target.origin, count], tables
            )
        channels, height, width = (count, 1, 1) if flat else Planner.shape3(self, task.source)
        factors = tables if flat else tuple(_spread(table, channels) for table in tables)
        if target.whole:
            height, width = 1, height * width
        if self.layout.tiles:
            sizes = [target.origin, height, width, target.outer, target.inner, 4 * count]
            return kernel_call(
                moves.QuantiseTiles(self.layout.lanes, host_lanes(), self._way, channels, flat), sizes, factors
            )
        sizes = [height, width, 4 * height * width, 4 * width, target.outer, target.inner]
        return kernel_call(
            moves.Quantise(self.layout.lanes, self._way, channels, image=True), [0, target.origin, *sizes], factors
        )

    def moves(self, task: Task) -> list[Call]:
        match task:
            case Quantise():
                return [self._quantise(task)]
            case Dequantise():
                return [self._dequantise(task)]
            case FlatBytes():
                return [self._flatten(task)]
        return []

    def _rows(self, value: int, source: Buffer, target: Buffer) -> list[int]:
        """Return places, rows and floats in a row, and both strides, of a value that is brought into another form."""
        _, height, width = Planner.shape3(self, value)
        strides = [source.outer, source.inner, target.outer, target.inner]
        return [source.origin, target.origin, height, width * source.lanes, *strides]

    def _quantise(self, task: Quantise) -> Call:
        source, target = Planner.plain(self, task.source), self.buffer(task.result)
        channels = self.shapes[task.source][0]
        factors = tuple(_spread(table, channels) for table in (task.factor, task.shift))
        spec = moves.Quantise(self.layout.lanes, self._way, channels)
        if target.lanes == 1 and target.inner == 4 and len(task.factor) == 1:
            tables = (task.factor, task.shift)
            return kernel_call(
                moves.QuantiseFlat(self.layout.lanes, self._way), [source.origin, target.origin, channels], tables
            )
        return kernel_call(spec, self._rows(task.source, source, target), factors)

    def _dequantise(self, task: Dequantise) -> Call:
        source, target = self.buffer(task.source), self.buffer(task.result)
        spec = moves.Dequantise(self.layout.lanes, self.shapes[task.source][0], task.rounding.zero)
        scale = np.full(1, task.rounding.scale, np.float32)
        return kernel_call(spec, self._rows(task.source, source, target), (scale,))

    def _flatten(self, task: FlatBytes) -> Call:
        source, target = self.buffer(task.source), self.buffer(task.result)
        shape = self.shapes[task.source]
        if not self.layout.tiles:
            sizes = [shape[1], shape[2], source.outer, source.inner]
            return kernel_call(moves.FlatRows(shape[0]), [source.origin, target.origin, *sizes])
        channel, y, x = np.indices(shape).reshape(3, -1)
        count = -(-len(channel) // 4)
        places = np.zeros((4 * count, 2), np.int64)
        places[: len(channel), 0] = channel // 4 * source.outer + y * source.inner + x * source.pixel
        places[: len(channel), 1] = channel % 4 * 8
        return kernel_call(moves.Flat(source.lanes), [source.origin, target.origin, count], (places,))

    def max_pool(self, task: MaxPool) -> Call:
        call = super().max_pool(task)
        if isinstance(task, RoundedPool):
            return replace(call, spec=moves.QuadPool(**vars(call.spec), zero=task.zero))
        return call

    def layer(self, task: FusedLayer, choice: Tiling) -> Call:
        source, target = self.read_by(task), self.buffer(task.result)
        flat = len(self.shapes[task.source]) == 1
        if flat and not self.layout.tiles and task.residual is None and task.cap is None and self.lookup:
            told = self._integers[task.result]
            tables = lookup_tables(task.op, source, 16)
            groups = len(tables[0]) - 1
            records = np.zeros(16 * groups, RECORD)
            records[: len(told.bias)] = _records(told)
            both = np.ascontiguousarray(records["bias"]), np.ascontiguousarray(records["factor"])
            spec = QuadLookup(_stored(told, self._way), task.relu)
            return kernel_call(spec, [source.origin, target.origin, groups], (*tables, *both))
        other = None if task.residual is None else self.buffer(task.residual)
        shape = self.shapes[task.result]
        return self.sums(task, source, target, choice, shape=shape, other=other, gate=None)

    def kind_of(self, task: FusedLayer, spec: Tile) -> tuple[Tile, Table]:
        told = self._integers[task.result]
        records = np.zeros(task.op.shape[0], RECORD)
        records[: len(told.bias)] = _records(told)
        return QuadTile(**vars(spec), stored=_stored(told, self._way)), records

    def per_block(self, op: Sparse, choice: Tiling, cut: Cut, source: Buffer, spec: Tile, *, flat: bool) -> int:
        return op.shape[1]


def _choices(layout: Layout) -> list[Tiling]:
    counts = (8, 6, 12, 16) if layout.tiles else (8, 4, 16, 24)
    return [Tiling(n, layout.lanes) for n in counts]


def _spread(table: NDArray[np.float32], channels: int) -> NDArray[np.float32]:
    """Return one number for each channel."""
    return np.ascontiguousarray(np.broadcast_to(table, channels))


def _stored(told: Integers, way: str) -> Stored:
    if told.result is None:
        return Stored(way, bytes=False)
    reach = told.largest * told.factor.astype(np.float64) + 255 * float(told.other)
    zero = 0 if told.residual is None else told.residual.zero
    return Stored(way, True, told.result.zero, told.low, told.high, bool((reach >= _WIDE).any()), zero)


def _records(told: Integers) -> NDArray[np.void]:
    """Return what kernels read of each row: zero of the input is part of the bias."""
    rows = np.repeat(np.arange(len(told.bias)), np.diff(told.weights.indptr))
    sums = np.bincount(rows, told.weights.values, minlength=len(told.bias)).astype(np.int64)
    records = np.zeros(len(told.bias), RECORD)
    records["bias"] = told.bias - told.source.zero * sums
    records["factor"], records["other"] = told.factor, told.other
    return records


def quads_of(told: Integers, *, split: bool) -> Sparse:
    """Return a layer's weights by fours of input channels: four signed bytes, as the bits of one float, at each place.

    Rows are filled up to a multiple of four if the layer makes bytes. `split`: no two weights that are added first,
    the first two of a place or the last two, may with bytes leave 16 bits; such a place is there twice.
    """
    op = told.weights
    out, channels, *kernel = op.shape
    taps = math.prod(kernel)
    channel, tap = np.divmod(op.indices.astype(np.int64), taps)
    across = -(-channels // 4)
    rows = np.repeat(np.arange(out), np.diff(op.indptr))
    places, inverse = np.unique((rows * across + channel // 4) * taps + tap, return_inverse=True)
    weights = np.zeros((len(places), 4), np.int8)
    weights[inverse, channel % 4] = op.values
    if split:
        places, weights = _split(places, weights)
    whole = out if told.result is None else -(-out // 4) * 4
    row, indices = np.divmod(places, across * taps)
    indptr = np.zeros(whole + 1, np.int32)
    np.cumsum(np.bincount(row, minlength=whole), out=indptr[1:])
    values = np.ascontiguousarray(weights).view(np.float32).reshape(-1)
    shape, biases = (whole, across, kernel[0], kernel[1]), np.zeros(whole, np.float32)
    return replace(op, shape=shape, indptr=indptr, indices=indices.astype(np.int32), values=values, bias=biases)


def _split(places: NDArray[np.int64], weights: NDArray[np.int8]) -> tuple[NDArray[np.int64], NDArray[np.int8]]:
    pairs = weights.astype(np.int64).reshape(-1, 2, 2)
    unsafe = (np.abs(pairs.sum(2)) > _SAFE).any(1)
    second = weights[unsafe].copy()
    second[:, ::2] = 0
    first = weights.copy()
    first[unsafe, 1::2] = 0
    order = np.argsort(np.concatenate([places, places[unsafe]]), kind="stable")
    return np.concatenate([places, places[unsafe]])[order], np.concatenate([first, second])[order]
