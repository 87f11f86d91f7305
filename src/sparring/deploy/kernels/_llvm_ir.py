"""Building blocks of LLVM IR: loops, addresses, vectors."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, ClassVar

from llvmlite import ir

Value = Any

BYTE, INT32, INT64, FLOAT = ir.IntType(8), ir.IntType(32), ir.IntType(64), ir.FloatType()
POINTER = ir.PointerType()
_FUSED = ("contract",)  # allows a product and a sum to become one fused multiply-add, if the host has it


def vector(lanes: int) -> Any:
    """Return the type of `lanes` floats; one float is a plain float."""
    return FLOAT if lanes == 1 else ir.VectorType(FLOAT, lanes)


WHOLE_BITS = 16
WHOLE = 1 << WHOLE_BITS  # of a kernel's work


class Unit(IntEnum):
    """A kernel's arguments for one call: int64s about its unit of images."""

    IMAGES = 0  # their address
    LOGITS = 1  # where the logits go, or the gradients of the images
    COUNT = 2  # images of this unit
    UPSTREAM = 3  # address of the gradients of the logits
    OWN = 4  # offset in the arena of the unit's own memory
    FIRST = 5  # the share of the work, from FIRST / WHOLE up to LAST / WHOLE: threads may divide a kernel's rows
    LAST = 6
    SCRATCH = 7  # bytes from the scratch of the first thread to that of this one


@dataclass
class Turn:
    """A turn of a loop: its number, and the values that the body passes to the next turn.

    After the loop: the first number that was not run, and the values that came out.
    """

    number: Value
    values: list[Value]


class Kernel:
    """One function `void name(arena, arguments, call)` under construction.

    `arena` is the base of all values; `arguments` points to int64s that never change (offsets into the arena, counts,
    addresses of tables), which are read one after the other; `call` points to the int64s of one call (see `Unit`).
    """

    def __init__(self, module: ir.Module, name: str) -> None:
        kind = ir.FunctionType(ir.VoidType(), [POINTER, POINTER, POINTER])
        self.function = ir.Function(module, kind, name)
        self.arena, self.arguments, self.call = self.function.args
        self.b = ir.IRBuilder(self.function.append_basic_block("entry"))
        self._read = 0  # arguments

    def integer(self) -> Value:
        """Load the next argument."""
        self._read += 1
        return self.load(self.at(self.arguments, 8 * (self._read - 1)), INT64)

    def integers(self, count: int) -> list[Value]:
        """Load the next arguments."""
        return [self.integer() for _ in range(count)]

    def pointer(self) -> Value:
        """Load the next argument, an address."""
        return self.b.inttoptr(self.integer(), POINTER)

    def place(self) -> Value:
        """Load the next argument, a place in the arena: an offset, or -1 - offset into the unit's own memory."""
        place, b = self.integer(), self.b
        own = b.add(b.not_(place), self.field(Unit.OWN))
        return self.at(self.arena, b.select(b.icmp_signed("<", place, self.number(0)), own, place))

    def field(self, number: int) -> Value:
        """Load a field of this call."""
        return self.load(self.at(self.call, 8 * number), INT64)

    def address(self, number: int) -> Value:
        """Load a field of this call that is an address."""
        return self.b.inttoptr(self.field(number), POINTER)

    def at(self, pointer: Value, offset: Value | int) -> Value:
        """Return pointer + offset bytes."""
        return self.b.gep(pointer, [self.number(offset)], source_etype=BYTE)

    def images(self, lanes: int, size: Value, field: int = Unit.IMAGES) -> list[Value]:
        """Return the address of each lane's image of `size` bytes; lanes without one repeat the last."""
        first, last = self.address(field), self.b.sub(self.field(Unit.COUNT), self.number(1))
        found = []
        for lane in range(lanes):
            exists = self.b.icmp_signed("<", self.number(lane), last)
            found.append(self.at(first, self.b.mul(self.b.select(exists, self.number(lane), last), size)))
        return found

    def number(self, value: Value | int) -> Value:
        """Return an int64, from a Python number if it is one."""
        return ir.Constant(INT64, value) if isinstance(value, int) else value

    def index(self, pointer: Value, number: Value, kind: Any) -> Value:
        """Load entry `number` of an array of integers, as int64."""
        loaded = self.b.load(self.b.gep(pointer, [number], source_etype=kind), typ=kind)
        return loaded if kind is INT64 else self.b.sext(loaded, INT64)

    def load(self, pointer: Value, kind: Any) -> Value:
        """Load a value that is aligned to four bytes only."""
        return self.b.load(pointer, align=4, typ=kind)

    def entry(self, floats: Value, number: Value) -> Value:
        """Load entry `number` of an array of floats."""
        return self.load(self.b.gep(floats, [number], source_etype=FLOAT), FLOAT)

    def store(self, value: Value, pointer: Value) -> None:
        """Store a value aligned to four bytes only."""
        self.b.store(value, pointer, align=4)

    def splat(self, value: Value, lanes: int) -> Value:
        """Return a vector whose lanes all hold a number."""
        if lanes == 1:
            return value
        kind = ir.VectorType(value.type, lanes)
        first = self.b.insert_element(ir.Constant(kind, ir.Undefined), value, ir.Constant(INT32, 0))
        return self.shuffle(first, first, [0] * lanes)

    def shuffle(self, left: Value, right: Value, order: Sequence[int]) -> Value:
        """Pick lanes from the concatenation of two vectors."""
        mask = ir.Constant(ir.VectorType(INT32, len(order)), [ir.Constant(INT32, i) for i in order])
        return self.b.shuffle_vector(left, right, mask)

    def multiply_add(self, a: Value, b: Value, c: Value) -> Value:
        """Return a · b + c, rounded once if the host can."""
        return self.b.fadd(self.b.fmul(a, b, flags=_FUSED), c, flags=_FUSED)

    def maximum(self, a: Value, b: Value) -> Value:
        """Return the larger of two values, lane by lane."""
        return self.b.select(self.b.fcmp_ordered(">", a, b), a, b)

    def relu(self, value: Value) -> Value:
        """Return max(value, 0)."""
        return self.maximum(value, ir.Constant(value.type, None))

    def capped(self, value: Value, cap: float | None) -> Value:
        """Return min(value, cap), the value itself if there is no cap."""
        if cap is None:
            return value
        most = self.splat(ir.Constant(FLOAT, cap), getattr(value.type, "count", 1))
        return self.b.select(self.b.fcmp_ordered(">", value, most), most, value)

    def gated(self, value: Value, gate: Value) -> Value:
        """Return the value where the gate is above zero, else zero."""
        zero = ir.Constant(value.type, None)
        return self.b.select(self.b.fcmp_ordered(">", gate, zero), value, zero)

    @contextmanager
    def loop(self, count: Value | int, step: int = 1) -> Iterator[Value]:
        """Run the body for 0, step, 2 · step, ... below count."""
        with self.carry(count, step=step) as turn:
            yield turn.number

    def share(self, count: Value) -> tuple[Value, Value]:
        """Return where this call's share of some rows begins and ends."""
        bits = self.number(WHOLE_BITS)
        first, last = (self.b.lshr(self.b.mul(count, self.field(f)), bits) for f in (Unit.FIRST, Unit.LAST))
        return first, last

    @contextmanager
    def shared(self, count: Value) -> Iterator[Value]:
        """Run the body for each number below count that is in this call's share."""
        first, last = self.share(count)
        with self.carry(last, start=first) as turn:
            yield turn.number

    def alone(self) -> None:
        """Return at once, unless the call's share is the first one."""
        with self.b.if_then(self.b.icmp_signed("!=", self.field(Unit.FIRST), self.number(0))):
            self.b.ret_void()

    @contextmanager
    def carry(
        self, end: Value | int, values: Sequence[Value] = (), *, step: int = 1, start: Value | int = 0
    ) -> Iterator[Turn]:
        """Run the body for start, start + step, ... below end, with values that are carried from turn to turn."""
        b, limit, first = self.b, self.number(end), [self.number(start), *values]
        before = b.block
        body, done = self.function.append_basic_block("body"), self.function.append_basic_block("done")
        b.cbranch(b.icmp_signed("<", first[0], limit), body, done)
        b.position_at_end(body)
        inside = [b.phi(value.type) for value in first]
        turn = Turn(inside[0], inside[1:])
        yield turn
        last, results = b.block, [b.add(inside[0], self.number(step)), *turn.values]
        b.cbranch(b.icmp_signed("<", results[0], limit), body, done)
        b.position_at_end(done)
        ends = [b.phi(value.type) for value in first]
        for phis in (inside, ends):
            for phi, value, result in zip(phis, first, results, strict=True):
                phi.add_incoming(value, before)
                phi.add_incoming(result, last)
        turn.number, turn.values = ends[0], ends[1:]

    def along(self, width: Value, sizes: Sequence[int], body: Callable[[Value, int], None]) -> None:
        """Run body(x, size) along a row of `width` floats: for the largest vectors that fit, then for shorter ones."""
        start = self.number(0)
        for size in sorted({*sizes, 1}, reverse=True):
            with self.carry(self.b.sub(width, self.number(size - 1)), step=size, start=start) as turn:
                body(turn.number, size)
            start = turn.number

    def choose(self, condition: Value, one: Any, other: Any) -> list[Value]:
        """Return the values of one() if the condition holds, else those of other(), running only that."""
        b = self.b
        blocks = [self.function.append_basic_block(name) for name in ("then", "else", "chosen")]
        b.cbranch(condition, blocks[0], blocks[1])
        ends = []
        for block, make in zip(blocks, (one, other), strict=False):
            b.position_at_end(block)
            values = make()
            ends.append((values, b.block))
            b.branch(blocks[2])
        b.position_at_end(blocks[2])
        phis = [b.phi(value.type) for value in ends[0][0]]
        for values, block in ends:
            for phi, value in zip(phis, values, strict=True):
                phi.add_incoming(value, block)
        return phis

    def finish(self) -> None:
        """Close the function."""
        self.b.ret_void()


class Spec:
    """Specification of a kernel: subclasses are frozen dataclasses, equal if their code would be.

    `shares`: each call computes its share of the rows; all others run once, as the first share.
    """

    shares: ClassVar[bool] = False

    @property
    def name(self) -> str:
        """Return the function's name, the same in every process."""
        return f"{type(self).__name__.lower()}_{hashlib.sha256(repr(self).encode()).hexdigest()[:24]}"

    def emit(self, k: Kernel) -> None:
        """Write the function's body."""
        raise AssertionError(f"{type(self).__name__} does not say how it is written")
