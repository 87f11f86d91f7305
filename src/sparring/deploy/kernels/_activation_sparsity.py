"""Kernels of activation sparsity: a threshold, values drawn to their channel's centre, the largest of an image."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from llvmlite import ir

from ._llvm_ir import FLOAT, INT32, INT64, Kernel, Spec, vector

Value = Any
_BITS = 31  # of a float that is not negative: as integers such floats have the order they have as numbers


@dataclass(frozen=True)
class _Rows(Spec):
    """Walk over a value's rows. Arguments: input, output (offsets), channels, rows, floats in a row, then for each of
    the two the bytes from channel to channel and row to row; a subclass's own arguments start at 9.
    """

    lanes: int

    def _bases(self, k: Kernel) -> tuple[Value, Value]:
        return k.argument_in_arena(0), k.argument_in_arena(1)

    def _line(self, k: Kernel, bases: tuple[Value, Value], channel: Value, row: Value) -> tuple[Value, Value]:
        b = k.b
        steps = ((k.argument(5), k.argument(6)), (k.argument(7), k.argument(8)))
        source, target = (
            k.at(base, b.add(b.mul(channel, outer), b.mul(row, inner)))
            for base, (outer, inner) in zip(bases, steps, strict=True)
        )
        return source, target

    def _whole(self, k: Kernel) -> Value:
        width = k.argument(4)
        return k.b.mul(k.b.sdiv(width, k.number(self.lanes)), k.number(self.lanes))


@dataclass(frozen=True)
class Narrow(_Rows):
    """out = x where x > threshold, else 0; with `snap`, max(x, 0) where x is the channel's centre if within its radius.

    Further arguments: thresholds or centres, radii (one per channel each).
    """

    snap: bool

    def emit(self, k: Kernel) -> None:
        b, bases, whole = k.b, self._bases(k), self._whole(k)
        tables = k.argument_pointer(9), k.argument_pointer(10)
        with k.loop(k.argument(2)) as channel:
            numbers = [k.load(b.gep(p, [channel], source_etype=FLOAT), FLOAT) for p in tables]
            with k.loop(k.argument(3)) as row:
                line = self._line(k, bases, channel, row)
                with k.loop(whole, self.lanes) as x:
                    self._one(k, line, x, numbers, self.lanes)
                with k.loop(b.sub(k.argument(4), whole)) as rest:
                    self._one(k, line, b.add(whole, rest), numbers, 1)

    def _one(self, k: Kernel, line: tuple[Value, Value], x: Value, numbers: list[Value], lanes: int) -> None:
        b, (source, target) = k.b, (k.at(pointer, k.b.mul(x, k.number(4))) for pointer in line)
        value, (first, second) = k.load(source, vector(lanes)), (k.splat(number, lanes) for number in numbers)
        if self.snap:
            away = b.fsub(value, first)
            within = b.fcmp_ordered("<=", k.maximum(away, b.fneg(away)), second)
            result = k.relu(b.select(within, first, value))
        else:
            result = b.select(b.fcmp_ordered(">", value, first), value, ir.Constant(vector(lanes), None))
        k.store(result, target)


@dataclass(frozen=True)
class Largest(_Rows):
    """out = max(x, 0) for the largest values of each image, of equal ones the first, and 0 for the others.

    The smallest value that stays is found bit by bit, from the highest: a bit is set if enough values reach what it
    makes. With `tiles` each lane is an image, else the lanes are values of one. Further argument: how many stay.
    """

    tiles: bool

    def emit(self, k: Kernel) -> None:
        b, bases = k.b, self._bases(k)
        lanes = self.lanes if self.tiles else 1
        kept = _spread(k, b.trunc(k.argument(9), INT32), lanes)
        least = _spread(k, ir.Constant(INT32, 0), lanes)
        one = ir.Constant(INT32, 1)
        with _carried(k, _BITS, [least]) as (turn, (least,), results):
            bit = b.shl(one, b.sub(ir.Constant(INT32, _BITS - 1), b.trunc(turn, INT32)))
            wanted = b.or_(least, _spread(k, bit, lanes))
            reached = self._count(k, bases, wanted)
            results.append(b.select(b.icmp_signed(">=", reached, kept), wanted, least))
        (least,) = results
        larger = self._count(k, bases, b.add(least, _spread(k, one, lanes)))
        self._write(k, bases, least, b.sub(kept, larger))

    def _load(self, k: Kernel, line: Value, x: Value, lanes: int) -> tuple[Value, Value]:
        """Return max(x, 0) and its bits."""
        value = k.relu(k.load(k.at(line, k.b.mul(x, k.number(4))), vector(lanes)))
        return value, k.b.bitcast(value, _integers(lanes))

    def _count(self, k: Kernel, bases: tuple[Value, Value], least: Value) -> Value:
        """Return how many values, as bits, are at least `least`: for each lane, or for the one image."""
        b, whole = k.b, self._whole(k)
        wide = least if self.tiles else _spread(k, least, self.lanes)
        nothing = [ir.Constant(_integers(self.lanes), None), ir.Constant(INT32, 0)]

        def more(line: Value, x: Value, least: Value, lanes: int, count: Value) -> Value:
            reached = b.icmp_signed(">=", self._load(k, line, x, lanes)[1], least)
            return b.add(count, b.zext(reached, _integers(lanes)))

        with _carried(k, k.argument(2), nothing) as (channel, counts, after_channel):
            with _carried(k, k.argument(3), counts) as (row, counts, after_row):
                line = self._line(k, bases, channel, row)[0]
                with _carried(k, whole, counts[:1], self.lanes) as (x, (count,), after):
                    after.append(more(line, x, wide, self.lanes, count))
                if self.tiles:
                    after.append(counts[1])
                else:
                    rest = b.sub(k.argument(4), whole)
                    with _carried(k, rest, counts[1:]) as (x, (count,), single):
                        single.append(more(line, b.add(whole, x), least, 1, count))
                    after += single
                after_row += after
            after_channel += after_row
        vectors, single = after_channel
        if self.tiles:
            return vectors
        for lane in range(self.lanes):
            single = b.add(single, b.extract_element(vectors, ir.Constant(INT32, lane)))
        return single

    def _write(self, k: Kernel, bases: tuple[Value, Value], least: Value, equals: Value) -> None:
        """Store what is above `least`, and the first `equals` values that are equal to it."""
        b, lanes = k.b, self.lanes if self.tiles else 1
        zero = ir.Constant(_integers(lanes), None)
        with _carried(k, k.argument(2), [zero]) as (channel, seen, after_channel):
            with _carried(k, k.argument(3), seen) as (row, seen, after_row):
                source, target = self._line(k, bases, channel, row)
                with _carried(k, k.argument(4), seen, lanes) as (x, (count,), after):
                    value, bits = self._load(k, source, x, lanes)
                    equal = b.icmp_signed("==", bits, least)
                    taken = b.and_(equal, b.icmp_signed("<", count, equals))
                    stays = b.or_(b.icmp_signed(">", bits, least), taken)
                    result = b.select(stays, value, ir.Constant(vector(lanes), None))
                    k.store(result, k.at(target, b.mul(x, k.number(4))))
                    after.append(b.add(count, b.zext(equal, _integers(lanes))))
                after_row += after
            after_channel += after_row


def _integers(lanes: int) -> Any:
    return INT32 if lanes == 1 else ir.VectorType(INT32, lanes)


def _spread(k: Kernel, value: Value, lanes: int) -> Value:
    """Return a vector whose lanes all hold an integer."""
    if lanes == 1:
        return value
    first = k.b.insert_element(ir.Constant(_integers(lanes), ir.Undefined), value, ir.Constant(INT32, 0))
    return k.shuffle(first, first, [0] * lanes)


@contextmanager
def _carried(
    k: Kernel, count: Value | int, start: Sequence[Value], step: int = 1
) -> Iterator[tuple[Value, list[Value], list[Value]]]:
    """Run the body for 0, step, ... below count with values that go from turn to turn.

    The body gets its number, the values so far and an empty list for the next ones; after the loop the list holds what
    came out of it.
    """
    b, limit = k.b, k.number(count)
    before = b.block
    body, done = k.function.append_basic_block("turn"), k.function.append_basic_block("turned")
    b.cbranch(b.icmp_signed("<", k.number(0), limit), body, done)
    b.position_at_end(body)
    number, values = b.phi(INT64), [b.phi(value.type) for value in start]
    results: list[Value] = []
    yield number, values, results
    last, following = b.block, b.add(number, k.number(step))
    b.cbranch(b.icmp_signed("<", following, limit), body, done)
    number.add_incoming(k.number(0), before)
    number.add_incoming(following, last)
    b.position_at_end(done)
    ends = [b.phi(value.type) for value in start]
    for phi, end, first, result in zip(values, ends, start, results, strict=True):
        for merged in (phi, end):
            merged.add_incoming(first, before)
            merged.add_incoming(result, last)
    results[:] = ends
