"""Kernels of activation sparsity: a threshold, values drawn to their channel's centre, the largest of an image."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from llvmlite import ir

from ._llvm_ir import INT32, Kernel, Spec, Turn, vector

Value = Any
_BITS = 31  # of a float that is not negative: as integers such floats have the order they have as numbers


class _Walk:
    """The rows of a value, by a kernel's first arguments.

    These are input, output (offsets), channels, rows, floats in a row, then for each of the two the bytes from channel
    to channel and row to row.
    """

    def __init__(self, k: Kernel) -> None:
        self.k, self.bases = k, (k.place(), k.place())
        self.channels, self.rows, self.width = k.integers(3)
        self.steps = k.integers(2), k.integers(2)

    def lines(self, channel: Value, row: Value) -> list[Value]:
        """Return where a row begins in input and output."""
        b = self.k.b
        return [
            self.k.at(base, b.add(b.mul(channel, outer), b.mul(row, inner)))
            for base, (outer, inner) in zip(self.bases, self.steps, strict=True)
        ]

    @contextmanager
    def carry(self, values: Sequence[Value]) -> Iterator[tuple[list[Value], Turn]]:
        """Pass over all rows with values that go from row to row: yield a row's lines and its turn."""
        with self.k.carry(self.channels, values) as outer:
            with self.k.carry(self.rows, outer.values) as inner:
                yield self.lines(outer.number, inner.number), inner
            outer.values = inner.values
        inner.values = outer.values


@dataclass(frozen=True)
class Narrow(Spec):
    """out = x where x > threshold, else 0; with `snap`, max(x, 0) where x is the channel's centre if within its radius.

    Arguments: those of a walk, then thresholds or centres, radii (one per channel each).
    """

    lanes: int
    snap: bool

    def emit(self, k: Kernel) -> None:
        walk, tables = _Walk(k), (k.pointer(), k.pointer())
        with k.loop(walk.channels) as channel:
            numbers = [k.entry(table, channel) for table in tables]
            with k.loop(walk.rows) as row:
                lines = walk.lines(channel, row)

                def one(x: Value, lanes: int, lines: list[Value] = lines, numbers: list[Value] = numbers) -> None:
                    self._one(k, lines, x, numbers, lanes)

                k.along(walk.width, self.lanes, one)

    def _one(self, k: Kernel, lines: list[Value], x: Value, numbers: list[Value], lanes: int) -> None:
        b, (source, target) = k.b, (k.at(pointer, k.b.mul(x, k.number(4))) for pointer in lines)
        value, (first, second) = k.load(source, vector(lanes)), (k.splat(number, lanes) for number in numbers)
        if self.snap:
            away = b.fsub(value, first)
            within = b.fcmp_ordered("<=", k.maximum(away, b.fneg(away)), second)
            result = k.relu(b.select(within, first, value))
        else:
            result = b.select(b.fcmp_ordered(">", value, first), value, ir.Constant(vector(lanes), None))
        k.store(result, target)


@dataclass(frozen=True)
class Largest(Spec):
    """out = max(x, 0) for the largest values of each image, of equal ones the first, and 0 for the others.

    The smallest value that stays is found bit by bit, from the highest: a bit is set if enough values reach what it
    makes. With `tiles` each lane is an image, else the lanes are values of one. Arguments: those of a walk, then how
    many stay.
    """

    lanes: int
    tiles: bool

    def emit(self, k: Kernel) -> None:
        b, walk = k.b, _Walk(k)
        lanes = self.lanes if self.tiles else 1
        kept = k.splat(b.trunc(k.integer(), INT32), lanes)
        one = ir.Constant(INT32, 1)
        with k.carry(_BITS, [k.splat(ir.Constant(INT32, 0), lanes)]) as turn:
            bit = b.shl(one, b.sub(ir.Constant(INT32, _BITS - 1), b.trunc(turn.number, INT32)))
            wanted = b.or_(turn.values[0], k.splat(bit, lanes))
            reached = self._count(k, walk, wanted)
            turn.values = [b.select(b.icmp_signed(">=", reached, kept), wanted, turn.values[0])]
        (least,) = turn.values
        larger = self._count(k, walk, b.add(least, k.splat(one, lanes)))
        self._write(k, walk, least, b.sub(kept, larger))

    def _load(self, k: Kernel, line: Value, x: Value, lanes: int) -> tuple[Value, Value]:
        """Return max(x, 0) and its bits."""
        value = k.relu(k.load(k.at(line, k.b.mul(x, k.number(4))), vector(lanes)))
        return value, k.b.bitcast(value, _integers(lanes))

    def _whole(self, k: Kernel, walk: _Walk) -> Value:
        """Return how many floats of a row fill vectors."""
        return k.b.mul(k.b.sdiv(walk.width, k.number(self.lanes)), k.number(self.lanes))

    def _count(self, k: Kernel, walk: _Walk, least: Value) -> Value:
        """Return how many values, as bits, are at least `least`: for each lane, or for the one image."""
        b, whole = k.b, self._whole(k, walk)
        wide = least if self.tiles else k.splat(least, self.lanes)

        def more(line: Value, x: Value, least: Value, lanes: int, count: Value) -> Value:
            reached = b.icmp_signed(">=", self._load(k, line, x, lanes)[1], least)
            return b.add(count, b.zext(reached, _integers(lanes)))

        with walk.carry([ir.Constant(_integers(self.lanes), None), ir.Constant(INT32, 0)]) as ((line, _), turn):
            vectors, single = turn.values
            with k.carry(whole, [vectors], step=self.lanes) as inside:
                inside.values = [more(line, inside.number, wide, self.lanes, inside.values[0])]
            turn.values = [*inside.values, single]
            if not self.tiles:
                with k.carry(b.sub(walk.width, whole), [single]) as rest:
                    rest.values = [more(line, b.add(whole, rest.number), least, 1, rest.values[0])]
                turn.values = [*inside.values, *rest.values]
        vectors, single = turn.values
        if self.tiles:
            return vectors
        for lane in range(self.lanes):
            single = b.add(single, b.extract_element(vectors, ir.Constant(INT32, lane)))
        return single

    def _write(self, k: Kernel, walk: _Walk, least: Value, equals: Value) -> None:
        """Store what is above `least`, and the first `equals` values that are equal to it."""
        b, lanes = k.b, self.lanes if self.tiles else 1
        with walk.carry([ir.Constant(_integers(lanes), None)]) as ((source, target), turn):
            with k.carry(walk.width, turn.values, step=lanes) as inside:
                (count,) = inside.values
                value, bits = self._load(k, source, inside.number, lanes)
                equal = b.icmp_signed("==", bits, least)
                taken = b.and_(equal, b.icmp_signed("<", count, equals))
                stays = b.or_(b.icmp_signed(">", bits, least), taken)
                result = b.select(stays, value, ir.Constant(vector(lanes), None))
                k.store(result, k.at(target, b.mul(inside.number, k.number(4))))
                inside.values = [b.add(count, b.zext(equal, _integers(lanes)))]
            turn.values = inside.values


def _integers(lanes: int) -> Any:
    return INT32 if lanes == 1 else ir.VectorType(INT32, lanes)
