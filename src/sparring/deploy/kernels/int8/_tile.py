"""Kernels of int8 layers: tiles of pixels or images, and linear layers for one image."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from llvmlite import ir

from .._llvm_ir import BYTE, FLOAT, INT32, Kernel, Spec, Value, vector
from .._matmul import AHEAD, Tile
from . import _arithmetic as integer

# Of a row: what its sum begins with, the factor of the sum, and that of the residual.
RECORD = np.dtype([("bias", np.int32), ("factor", np.float32), ("other", np.float32)])


@dataclass(frozen=True)
class Stored:
    """How sums are stored: as bytes, none below `low` or above `high`, with a zero point; or as floats.

    `far`: sums times their factor may leave 31 bits. `other_zero` is the zero point of the residual.
    """

    way: str
    bytes: bool = True
    zero: int = 0
    low: int = 0
    high: int = 255
    far: bool = False
    other_zero: int = 0

    def finished(self, k: Kernel, value: Value) -> Value:
        """Return scaled sums as integers, which `integer.pair` clamps to bytes."""
        value = integer.rounded(k, self.way, value, far=self.far)
        if self.zero:
            value = k.b.add(value, integer.constant(self.zero, integer.lanes_of(value)))
        return value if (self.low, self.high) == (0, 255) else integer.clamped(k, value, self.low, self.high)


@dataclass(frozen=True)
class QuadTile(Tile):
    """A Tile whose inputs and weights are bytes, four channels in a lane; each row's sum is a 32-bit integer.

    out = byte(round(pool(Σ weight · in + bias) · factor + (residual − its zero) · other) + zero), four rows at a time,
    which are stored side by side; or, as floats, row by row, pool(Σ weight · in + bias) · factor.

    Arguments: those of Tile, with rows of the output and the residual counted by fours where these are bytes, and
    a RECORD for each row in place of biases; it neither takes blocks nor gates, and threads always share its tiles.
    """

    stored: Stored = Stored(integer.PLAIN)

    def emit(self, k: Kernel) -> None:
        b, together = k.b, 4 if self.stored.bytes else 1
        bases = [k.place() for _ in range(4)]
        tiles, rows, *row_bytes = k.integers(5)
        k.integers(2)  # blocks and scratch
        table, starts, nonzeros, records, mask = (k.pointer() for _ in range(5))
        with k.shared(tiles) as tile:
            places = [k.index(table, b.add(b.mul(tile, k.number(4)), k.number(i)), ir.IntType(64)) for i in range(4)]
            here, *outside = (k.at(base, place) for base, place in zip(bases, places, strict=True))
            bits = k.at(mask, places[1])
            ahead = [self._nonzero(k, nonzeros, k.number(i)) for i in range(AHEAD)]
            with k.carry(b.sdiv(rows, k.number(together)), [k.number(0), *ahead]) as group:
                first, *ahead = group.values
                lines = [k.at(place, b.mul(group.number, size)) for place, size in zip(outside, row_bytes, strict=True)]
                done: list[list[Value]] = []
                for number in range(together):
                    row = b.add(b.mul(group.number, k.number(together)), k.number(number))
                    end = k.index(starts, b.add(row, k.number(1)), INT32)
                    record = k.at(records, b.mul(row, k.number(RECORD.itemsize)))
                    initial = [k.splat(k.load(record, INT32), self.lanes)] * len(self.reads)
                    sums, ahead = self._sum(k, here, nonzeros, first, end, initial, ahead)
                    done.append(self._scaled(k, sums, record, number, lines[1]))
                    if number % 2:  # at once, so that few values wait in registers
                        done[-2:] = [[self._pair(k, *two) for two in zip(*done[-2:], strict=True)]]
                    first = end
                self._write(k, done, bits, lines[0])
                group.values = [first, *ahead]

    def kind(self) -> object:
        return integer.quads(self.lanes)

    def weight(self, k: Kernel, bits: Value) -> Value:
        return k.splat(bits, self.lanes)

    def add_product(self, k: Kernel, weight: Value, value: Value, total: Value) -> Value:
        return integer.dot(k, self.stored.way, total, value, weight)

    def plus(self, k: Kernel, first: Value, second: Value) -> Value:
        return k.b.add(first, second)

    def _pair(self, k: Kernel, first: Value, second: Value) -> Value:
        return integer.pair(k, self.stored.way, first, second)

    def _scaled(self, k: Kernel, sums: list[Value], record: Value, byte: int, other: Value) -> list[Value]:
        """Return what is stored of one row: floats, or integers before they are packed."""
        factor, beside = (k.load(k.at(record, offset), FLOAT) for offset in (4, 8))
        result = []
        for number, group in enumerate(self.groups):
            value = sums[group[0]]
            for i in group[1:]:
                value = _larger(k, value, sums[i])
            if self.halve:
                even, odd = (k.shuffle(value, value, range(start, self.lanes, 2)) for start in (0, 1))
                value = _larger(k, even, odd) if self.pair else even
            lanes = integer.lanes_of(value)
            scaled = k.b.fmul(integer.floats(k, value), k.splat(factor, lanes))
            if self.others:
                found = integer.byte_of(k, k.load(k.at(other, self.others[number]), value.type), byte)
                if self.stored.other_zero:
                    found = k.b.sub(found, integer.constant(self.stored.other_zero, lanes))
                scaled = k.b.fadd(scaled, k.b.fmul(integer.floats(k, found), k.splat(beside, lanes)))
            if self.stored.bytes:
                result.append(integer.kept(k, self.stored.way, self.stored.finished(k, scaled)))
            else:
                result.append(k.capped(k.relu(scaled) if self.relu else scaled, self.cap))
        return result

    def _write(self, k: Kernel, done: list[list[Value]], bits: Value, target: Value) -> None:
        lanes = self.lanes // 2 if self.halve else self.lanes
        for number, write in enumerate(self.writes):
            parts = [row[number] for row in done]
            value = parts[0]
            if self.stored.bytes:
                value = integer.quad(k, self.stored.way, parts[0], parts[1], lanes)
            if self.masked:
                kept = k.load(k.at(bits, write), integer.quads(lanes))
                kind, none = value.type, self.stored.zero * 0x01010101 if self.stored.bytes else 0
                outside = k.b.and_(k.b.not_(kept), _signed(none, lanes))
                value = k.b.or_(k.b.and_(k.b.bitcast(value, kept.type), kept), outside)
                value = k.b.bitcast(value, kind)
            k.store(value, k.at(target, write))


def _signed(value: int, lanes: int) -> Value:
    return integer.constant(value - (1 << 32) if value >> 31 else value, lanes)


def _larger(k: Kernel, first: Value, second: Value) -> Value:
    return k.b.select(k.b.icmp_signed(">", first, second), first, second)


@dataclass(frozen=True)
class QuadLookup(Spec):
    """A linear layer on bytes for one image, sixteen rows at once: `Lookup` with four inputs in each place.

    Arguments: input, output (offsets), groups of rows, group starts (int32), slot starts (int32 bytes into the input),
    places (16 bytes a slot), weights (16 times four bytes a slot), biases (int32) and factors (padded to groups of 16).
    """

    stored: Stored
    relu: bool = False

    def emit(self, k: Kernel) -> None:
        b, sixteen = k.b, integer.quads(16)
        source, target, groups = k.place(), k.place(), k.integer()
        starts, windows, places, weights, biases, factors = (k.pointer() for _ in range(6))

        def add(number: Value, ahead: int, total: Value) -> Value:
            slot = b.add(number, k.number(ahead))
            window = k.at(source, k.index(windows, slot, INT32))
            place = b.load(k.at(places, b.mul(slot, k.number(16))), align=1, typ=ir.VectorType(BYTE, 16))
            halves = k.load(window, sixteen), k.load(k.at(window, 64), sixteen)
            order = b.zext(place, sixteen)
            found = integer.call(k, "llvm.x86.avx512.vpermi2var.d.512", sixteen, halves[0], order, halves[1])
            weight = k.load(k.at(weights, b.mul(slot, k.number(64))), sixteen)
            return integer.dot(k, self.stored.way, total, found, weight)

        with k.loop(groups) as group:
            start, end = k.index(starts, group, INT32), k.index(starts, b.add(group, k.number(1)), INT32)
            lines = b.mul(group, k.number(64))
            first, zero = k.load(k.at(biases, lines), sixteen), integer.constant(0, 16)
            with k.carry(b.sub(end, k.number(3)), [first, zero, zero, zero], step=4, start=start) as turn:
                turn.values = [add(turn.number, u, total) for u, total in enumerate(turn.values)]
            sums = turn.values
            with k.carry(end, [b.add(b.add(sums[0], sums[1]), b.add(sums[2], sums[3]))], start=turn.number) as turn:
                turn.values = [add(turn.number, 0, turn.values[0])]
            scaled = b.fmul(integer.floats(k, turn.values[0]), k.load(k.at(factors, lines), vector(16)))
            if self.stored.bytes:
                found = integer.clamped(k, self.stored.finished(k, scaled), 0, 255)
                packed = b.trunc(found, ir.VectorType(BYTE, 16))
                b.store(packed, k.at(target, b.mul(group, k.number(16))), align=1)
            else:
                k.store(k.relu(scaled) if self.relu else scaled, k.at(target, lines))
