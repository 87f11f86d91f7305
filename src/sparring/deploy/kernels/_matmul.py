"""Kernels of layers, and the tables that the kernels for one image read.

A vector holds `lanes` floats: neighbouring pixels of one image (the "planes" layout), or one pixel of as many images
(the "tiles" layout). A kernel is independent of the layout: it uses byte offsets.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from llvmlite import ir
from numpy.typing import NDArray

from .._program import Sparse
from ._abi import Call, Table, kernel_call
from ._fusion import FusedLayer
from ._layout import ALIGNED, Buffer, offsets_of
from ._llvm_ir import BYTE, FLOAT, INT32, INT64, Kernel, Spec, Turn, Unit, Value, vector

MOST_PLACES = 1 << 16  # what sixteen bits can address
AHEAD = 4  # nonzeros after the last one that a kernel may read


@dataclass(frozen=True)
class Tile(Spec):
    """out[row] = relu(pool(Σ weight · in + bias + residual)) for each row (output channel), tile by tile of pixels.

    No more than `cap`, if there is one.

    An accumulator is a vector; it sums over a row's nonzeros, read at `reads` (bytes) plus the nonzero's own offset.
    `groups` are the accumulators whose maximum is stored at the same number of `writes`; with `halve` every second
    lane is stored (a stride of 2), with `halve` and `pair` the maxima of neighbouring lanes (a pooling of 2).
    The residual is read at `others`; where what is read at `gates` is not above zero, zero is stored, as where a mask
    of the output's row has no bits (`masked`). `unroll` nonzeros have accumulators of their own. With `blocked` the
    rows are cut into blocks of input channels, so that a tile of the input stays in the nearest cache while all rows
    pass over it. Threads share the rows, or the tiles (`by_tiles`): then each reads mostly what it wrote itself.

    Arguments: input, output, residual, gate (offsets), tiles, rows, bytes from row to row in output, residual and gate,
    blocks, scratch, the tiles' table (four offsets each), row starts (int32), nonzeros (int32 offset, float32 weight;
    AHEAD more than there are), biases, mask.
    """

    shares = True
    lanes: int
    reads: tuple[int, ...]
    groups: tuple[tuple[int, ...], ...]
    writes: tuple[int, ...]
    others: tuple[int, ...] = ()
    gates: tuple[int, ...] = ()
    halve: bool = False
    pair: bool = False
    relu: bool = False
    cap: float | None = None
    blocked: bool = False
    masked: bool = False
    by_tiles: bool = False
    unroll: int = 1

    def emit(self, k: Kernel) -> None:
        b = k.b
        bases = [k.place() for _ in range(4)]
        tiles, rows, *row_bytes = k.integers(5)
        blocks, scratch = k.integer(), k.at(k.place(), k.field(Unit.SCRATCH))
        table, starts, nonzeros, biases, mask = (k.pointer() for _ in range(5))
        begin, stop = (k.number(0), rows) if self.by_tiles else k.share(rows)
        with k.shared(tiles) if self.by_tiles else k.loop(tiles) as tile:
            places = [k.index(table, b.add(b.mul(tile, k.number(4)), k.number(i)), INT64) for i in range(4)]
            here, *outside = (k.at(base, place) for base, place in zip(bases, places, strict=True))
            bits = k.at(mask, places[1])
            with k.loop(blocks if self.blocked else 1) as block:
                start = k.index(starts, b.add(b.mul(block, rows), begin), INT32)
                ahead = [self._nonzero(k, nonzeros, b.add(start, k.number(i))) for i in range(AHEAD)]
                with k.carry(stop, [start, *ahead], start=begin) as inner:
                    row, (first, *ahead) = inner.number, inner.values
                    kept = k.at(scratch, b.mul(row, k.number(4 * self.lanes * len(self.reads))))
                    number = b.add(b.mul(block, rows), row) if self.blocked else row
                    end = k.index(starts, b.add(number, k.number(1)), INT32)
                    initial = self._initial(k, biases, row, block, kept)
                    sums, ahead = self._sum(k, here, nonzeros, first, end, initial, ahead)
                    lines = [k.at(place, b.mul(row, size)) for place, size in zip(outside, row_bytes, strict=True)]
                    if not self.blocked:
                        self.finish(k, sums, bits, *lines)
                    else:
                        with b.if_else(b.icmp_signed("==", block, b.sub(blocks, k.number(1)))) as (then, otherwise):
                            with then:
                                self.finish(k, sums, bits, *lines)
                            with otherwise:
                                for i, value in enumerate(sums):
                                    k.store(value, k.at(kept, i * 4 * self.lanes))
                    inner.values = [end, *ahead]

    def kind(self) -> Any:
        """Return the type of an accumulator."""
        return vector(self.lanes)

    def weight(self, k: Kernel, bits: Value) -> Value:
        """Return the weight of a nonzero, as 32 bits, in every lane."""
        return k.splat(k.b.bitcast(bits, FLOAT), self.lanes)

    def add_product(self, k: Kernel, weight: Value, value: Value, total: Value) -> Value:
        """Return total + weight · value."""
        return k.multiply_add(weight, value, total)

    def plus(self, k: Kernel, first: Value, second: Value) -> Value:
        """Return the sum of two accumulators."""
        return k.b.fadd(first, second)

    def _initial(self, k: Kernel, biases: Value, row: Value, block: Value, kept: Value) -> list[Value]:
        def from_bias() -> list[Value]:
            return [k.splat(k.entry(biases, row), self.lanes)] * len(self.reads)

        def from_scratch() -> list[Value]:
            return [k.load(k.at(kept, i * 4 * self.lanes), vector(self.lanes)) for i in range(len(self.reads))]

        if not self.blocked:
            return from_bias()
        return k.choose(k.b.icmp_signed("==", block, k.number(0)), from_bias, from_scratch)

    @staticmethod
    def _nonzero(k: Kernel, nonzeros: Value, number: Value) -> Value:
        """Load offset and weight as one number: loads are the bottleneck, not separating the two."""
        return k.load(k.at(nonzeros, k.b.mul(number, k.number(8))), INT64)

    def _sum(
        self,
        k: Kernel,
        here: Value,
        nonzeros: Value,
        start: Value,
        end: Value,
        initial: list[Value],
        ahead: list[Value],
    ) -> tuple[list[Value], list[Value]]:
        """Return a row's sums, and the nonzeros after it.

        They are loaded a few ahead: loads that wait for their address would block the queue for others.
        """
        b, count = k.b, len(self.reads)

        def add(nonzero: Value, sums: list[Value]) -> list[Value]:
            point = k.at(here, b.sext(b.trunc(nonzero, INT32), INT64))
            weight = self.weight(k, b.trunc(b.lshr(nonzero, k.number(32)), INT32))
            loaded = [k.load(k.at(point, read), self.kind()) for read in self.reads]
            return [self.add_product(k, weight, value, total) for value, total in zip(loaded, sums, strict=True)]

        def add_some(turn: Turn) -> None:
            """Take as many nonzeros as there are groups of sums."""
            sums, taken = turn.values[:-AHEAD], turn.values[-AHEAD:]
            groups = [sums[i : i + count] for i in range(0, len(sums), count)]
            numbers = [b.add(turn.number, k.number(u + AHEAD)) for u in range(len(groups))]
            added = [add(*two) for two in zip(taken[: len(groups)], groups, strict=True)]
            following = [self._nonzero(k, nonzeros, n) for n in numbers]
            turn.values = [*(total for group in added for total in group), *taken[len(groups) :], *following]

        zero = ir.Constant(self.kind(), None)
        carried = [*initial, *[zero] * (count * (self.unroll - 1)), *ahead]
        with k.carry(b.sub(end, k.number(self.unroll - 1)), carried, step=self.unroll, start=start) as turn:
            add_some(turn)
        sums, ahead = turn.values[:-AHEAD], turn.values[-AHEAD:]
        for u in range(1, self.unroll):
            more = sums[u * count : (u + 1) * count]
            sums[:count] = [self.plus(k, *two) for two in zip(sums[:count], more, strict=True)]
        if self.unroll > 1:
            with k.carry(end, [*sums[:count], *ahead], start=turn.number) as turn:
                add_some(turn)
        return turn.values[:count], turn.values[-AHEAD:]

    def finish(self, k: Kernel, sums: list[Value], bits: Value, target: Value, other: Value, gate: Value) -> None:
        """Store the sums of one row."""
        for number, (group, write) in enumerate(zip(self.groups, self.writes, strict=True)):
            value = sums[group[0]]
            for i in group[1:]:
                value = k.maximum(value, sums[i])
            if self.halve:
                even = k.shuffle(value, value, range(0, self.lanes, 2))
                odd = k.shuffle(value, value, range(1, self.lanes, 2))
                value = k.maximum(even, odd) if self.pair else even
            if self.others:
                value = k.b.fadd(value, k.load(k.at(other, self.others[number]), value.type))
            if self.gates:
                value = k.gated(value, k.load(k.at(gate, self.gates[number]), value.type))
            value = k.capped(k.relu(value) if self.relu else value, self.cap)
            if self.masked:
                kind = ir.VectorType(INT32, self.lanes)
                kept = k.b.and_(k.b.bitcast(value, kind), k.load(k.at(bits, write), kind))
                value = k.b.bitcast(kept, value.type)
            k.store(value, k.at(target, write))


@dataclass(frozen=True)
class Rows(Spec):
    """A linear layer for one image, eight rows at once: a lane is a row, and its inputs are gathered one by one.

    A slot holds one nonzero (or zero) of each of eight rows. Rows of about equal length are grouped, so that few
    slots are padded and few branches at the ends of loops are mispredicted.

    Arguments: input, output (offsets), groups of rows, group starts (int32), places (8 uint16 a slot, in floats; a slot
    more than there are), weights (8 floats a slot), biases (in groups' order), where each row is stored (int32 bytes).
    """

    shares = True
    relu: bool

    def emit(self, k: Kernel) -> None:
        b, four = k.b, vector(4)
        source, target, groups = k.place(), k.place(), k.integer()
        starts, places, weights, biases, stored = (k.pointer() for _ in range(5))

        def quads(slot: Value) -> list[Value]:
            place = k.at(places, b.mul(slot, k.number(16)))
            return [k.load(place, INT64), k.load(k.at(place, 8), INT64)]

        def gathered(quad: Value) -> Value:
            value = ir.Constant(four, ir.Undefined)
            for lane in range(4):
                index = b.and_(b.lshr(quad, k.number(16 * lane)), k.number(0xFFFF))
                loaded = k.load(b.gep(source, [index], source_etype=FLOAT), FLOAT)
                value = b.insert_element(value, loaded, ir.Constant(INT32, lane))
            return value

        def add(slot: Value, carried: list[Value]) -> list[Value]:
            sums, current = carried[:2], carried[2:]
            following = quads(b.add(slot, k.number(1)))  # early, as in Tile
            factors = [k.load(k.at(weights, b.add(b.mul(slot, k.number(32)), k.number(16 * i))), four) for i in (0, 1)]
            three = zip(factors, current, sums, strict=True)
            return [*(k.multiply_add(weight, gathered(quad), total) for weight, quad, total in three), *following]

        head, stop = k.share(groups)
        start = k.index(starts, head, INT32)
        with k.carry(stop, [start, *quads(start)], start=head) as outer:
            begin, *current = outer.values
            end = k.index(starts, b.add(outer.number, k.number(1)), INT32)
            row = b.mul(outer.number, k.number(32))
            first = [k.load(k.at(biases, b.add(row, k.number(16 * i))), four) for i in (0, 1)]
            with k.carry(end, [*first, *current], start=begin) as inner:
                inner.values = add(inner.number, inner.values)
            *sums, low, high = inner.values
            for i, value in enumerate(k.relu(total) if self.relu else total for total in sums):
                for lane in range(4):
                    place = k.load(k.at(stored, b.add(row, k.number(16 * i + 4 * lane))), INT32)
                    k.store(b.extract_element(value, ir.Constant(INT32, lane)), k.at(target, b.sext(place, INT64)))
            outer.values = [end, low, high]


@dataclass(frozen=True)
class Lookup(Spec):
    """A linear layer for one image, 16 · `wide` rows at once: a lane is a row, and reads by itself from 32 inputs.

    A slot holds one nonzero (or zero) of each row among 32 inputs, two cache lines: where they start, each lane's
    position among them (bytes), and the weights. Loads are the bottleneck, so that two vectors of rows share them.

    Arguments: input, output (offsets), groups of rows, group starts (int32), slot starts (int32 bytes into the
    input), places (16 · `wide` bytes a slot), weights (as many floats), biases (padded to whole groups).
    """

    shares = True
    relu: bool
    wide: int = 1

    def emit(self, k: Kernel) -> None:
        b, sixteen, wide = k.b, vector(16), self.wide
        source, target, groups = k.place(), k.place(), k.integer()
        starts, windows, places, weights, biases = (k.pointer() for _ in range(5))
        lookup = _intrinsic(k, "llvm.x86.avx512.vpermi2var.ps.512", sixteen, ir.VectorType(INT32, 16), sixteen)

        def add(slot: Value, totals: list[Value]) -> list[Value]:
            window = k.at(source, k.index(windows, slot, INT32))
            halves = k.load(window, sixteen), k.load(k.at(window, 64), sixteen)
            sums = []
            for number, total in enumerate(totals):
                line = b.add(b.mul(slot, k.number(wide)), k.number(number))
                place = b.load(k.at(places, b.mul(line, k.number(16))), align=1, typ=ir.VectorType(BYTE, 16))
                found = b.call(lookup, [halves[0], b.zext(place, ir.VectorType(INT32, 16)), halves[1]])
                sums.append(k.multiply_add(k.load(k.at(weights, b.mul(line, k.number(64))), sixteen), found, total))
            return sums

        with k.shared(groups) as group:
            start, end = k.index(starts, group, INT32), k.index(starts, b.add(group, k.number(1)), INT32)
            rows = [b.mul(b.add(b.mul(group, k.number(wide)), k.number(i)), k.number(64)) for i in range(wide)]
            first = [k.load(k.at(biases, row), sixteen) for row in rows]
            zeros = [ir.Constant(sixteen, None)] * (3 * wide)
            with k.carry(b.sub(end, k.number(3)), [*first, *zeros], step=4, start=start) as turn:
                four = [turn.values[u * wide : (u + 1) * wide] for u in range(4)]
                added = [add(b.add(turn.number, k.number(u)), totals) for u, totals in enumerate(four)]
                turn.values = [total for totals in added for total in totals]
            four = [turn.values[i::wide] for i in range(wide)]
            sums = [b.fadd(b.fadd(one, two), b.fadd(three, last)) for one, two, three, last in four]
            with k.carry(end, sums, start=turn.number) as turn:
                turn.values = add(turn.number, turn.values)
            for row, total in zip(rows, turn.values, strict=True):
                k.store(k.relu(total) if self.relu else total, k.at(target, row))


def _intrinsic(k: Kernel, name: str, result: Any, *arguments: Any) -> Any:
    module = k.function.module
    if name in module.globals:
        return module.globals[name]
    return ir.Function(module, ir.FunctionType(result, [result, *arguments]), name)


def rows_call(task: FusedLayer, source: Buffer, target: Buffer) -> Call:
    """Return the call of the kernel that computes eight rows of a linear layer at once."""
    op = task.op
    lengths = np.diff(op.indptr)
    groups = -(-op.shape[0] // 8)
    order = np.argsort(-lengths, kind="stable")
    starts = np.zeros(groups + 1, np.int32)
    np.cumsum(lengths[order[::8]], out=starts[1:])  # the first of a group is its longest
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    row = np.repeat(rank, lengths)
    slot = starts[row // 8] + np.arange(op.nonzeros) - np.repeat(op.indptr[:-1], lengths)
    places = np.zeros((starts[-1] + 1, 8), np.uint16)
    places[slot, row % 8] = offsets_of(op, source, True) // 4
    weights = aligned((max(1, int(starts[-1])), 8))
    weights[slot, row % 8] = op.values
    biases = np.zeros(8 * groups, np.float32)
    biases[: len(order)] = op.bias[order]
    stored = np.full(8 * groups, 4 * len(order), np.int32)  # lanes without a row write after the last one
    stored[: len(order)] = 4 * order
    return kernel_call(
        Rows(task.relu), [source.origin, target.origin, groups], (starts, places, weights, biases, stored)
    )


def lookup_call(task: FusedLayer, source: Buffer, target: Buffer) -> Call:
    """Return the call of the kernel that computes 16 or 32 rows at once from windows of 32 inputs."""
    wide = 2 if task.op.shape[0] > 16 else 1
    tables = lookup_tables(task.op, source, 16 * wide)
    groups = len(tables[0]) - 1
    biases = np.zeros(16 * wide * groups, np.float32)
    biases[: len(task.op.bias)] = task.op.bias
    return kernel_call(Lookup(task.relu, wide), [source.origin, target.origin, groups], (*tables, biases))


def lookup_tables(op: Sparse, source: Buffer, rows: int) -> tuple[Table, Table, Table, Table]:
    """Return where the slots of each group of `rows` start, their windows, and their lanes' places and weights."""
    groups, count = -(-op.shape[0] // rows), op.shape[0]
    offsets = np.append(offsets_of(op, source, True), np.iinfo(np.int32).max).astype(np.int64)
    heads, ends = np.zeros((2, groups * rows), np.int64)
    heads[:count], ends[:count] = op.indptr[:-1], op.indptr[1:]
    heads, ends = heads.reshape(groups, rows), ends.reshape(groups, rows)
    firsts: list[NDArray[np.int64]] = []  # by turn and group: where a window begins
    taken: list[NDArray[np.bool_]] = []  # and the lanes, (groups, rows), whose next nonzero is in it
    while (left := heads < ends).any():
        reach = np.where(left, offsets[heads], offsets[-1])
        firsts.append(reach.min(1) // ALIGNED * ALIGNED)  # a load across two cache lines takes twice the time
        taken.append(left & (reach < firsts[-1][:, None] + 128))
        heads += taken[-1]
    turns = np.array(taken, bool).reshape(-1, groups, rows)
    open_ = turns.any(2)
    starts = np.concatenate([[0], np.cumsum(open_.sum(0))]).astype(np.int32)
    base = np.array(firsts, np.int32).reshape(-1, groups).T[open_.T]
    group, lane, turn = turns.transpose(1, 2, 0).nonzero()  # in the order of the nonzeros: row by row
    slot = starts[group] + turn
    places = np.zeros((len(base), rows), np.uint8)
    weights = aligned((len(base), rows))
    places[slot, lane] = (offsets[:-1] - base[slot]) // 4
    weights[slot, lane] = op.values
    return starts, base, places, weights


def aligned(shape: tuple[int, int]) -> NDArray[np.float32]:
    """Return zeros that start at a multiple of 64 bytes."""
    size = 4 * shape[0] * shape[1]
    memory = np.zeros(size + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + size].view(np.float32).reshape(shape)
