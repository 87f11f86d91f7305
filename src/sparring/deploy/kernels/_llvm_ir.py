"""A few words of LLVM IR: loops, addresses, vectors. Kernels are written in them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from llvmlite import ir

Value = Any

BYTE, INT32, INT64, FLOAT = ir.IntType(8), ir.IntType(32), ir.IntType(64), ir.FloatType()
POINTER = ir.PointerType()
_FUSED = ("contract",)  # lets a product and a sum become one fused multiply-add, where the host has one


def vector(lanes: int) -> Any:
    """Return the type of `lanes` floats; one float is a plain float."""
    return FLOAT if lanes == 1 else ir.VectorType(FLOAT, lanes)


class Kernel:
    """One function `void name(arena, arguments, call)` under construction.

    `arena` is the base of all values; `arguments` points to int64s that never change (offsets into the arena, counts,
    addresses of tables); `call` points to the int64s of one call (see `runner`).
    """

    def __init__(self, module: ir.Module, name: str) -> None:
        kind = ir.FunctionType(ir.VoidType(), [POINTER, POINTER, POINTER])
        self.function = ir.Function(module, kind, name)
        self.arena, self.arguments, self.call = self.function.args
        self.b = ir.IRBuilder(self.function.append_basic_block("entry"))

    def argument(self, number: int) -> Value:
        """Load an argument."""
        return self.load(self.at(self.arguments, 8 * number), INT64)

    def argument_pointer(self, number: int) -> Value:
        """Load an argument that is an address."""
        return self.b.inttoptr(self.argument(number), POINTER)

    def argument_in_arena(self, number: int) -> Value:
        """Load an argument that is a place in the arena: an offset, or -1 - offset into the unit's own memory."""
        place, b = self.argument(number), self.b
        own = b.add(b.not_(place), self.call_field(4))
        return self.at(self.arena, b.select(b.icmp_signed("<", place, self.number(0)), own, place))

    def call_field(self, number: int) -> Value:
        """Load a field of this call."""
        return self.load(self.at(self.call, 8 * number), INT64)

    def at(self, pointer: Value, offset: Value | int) -> Value:
        """Return pointer + offset bytes."""
        return self.b.gep(pointer, [self.number(offset)], source_etype=BYTE)

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

    def store(self, value: Value, pointer: Value) -> None:
        """Store a value aligned to four bytes only."""
        self.b.store(value, pointer, align=4)

    def splat(self, value: Value, lanes: int) -> Value:
        """Return a vector whose lanes all hold a float."""
        if lanes == 1:
            return value
        first = self.b.insert_element(ir.Constant(vector(lanes), ir.Undefined), value, ir.Constant(INT32, 0))
        return self.shuffle(first, first, [0] * lanes)

    def shuffle(self, left: Value, right: Value, order: Sequence[int]) -> Value:
        """Pick lanes from the concatenation of two vectors."""
        mask = ir.Constant(ir.VectorType(INT32, len(order)), [ir.Constant(INT32, i) for i in order])
        return self.b.shuffle_vector(left, right, mask)

    def multiply_add(self, a: Value, b: Value, c: Value) -> Value:
        """Return a · b + c, rounded once where the host can."""
        return self.b.fadd(self.b.fmul(a, b, flags=_FUSED), c, flags=_FUSED)

    def maximum(self, a: Value, b: Value) -> Value:
        """Return the larger of two values, lane by lane."""
        return self.b.select(self.b.fcmp_ordered(">", a, b), a, b)

    def relu(self, value: Value) -> Value:
        """Return max(value, 0)."""
        return self.maximum(value, ir.Constant(value.type, None))

    def gated(self, value: Value, gate: Value) -> Value:
        """Return the value where the gate is above zero, else zero."""
        zero = ir.Constant(value.type, None)
        return self.b.select(self.b.fcmp_ordered(">", gate, zero), value, zero)

    @contextmanager
    def loop(self, count: Value | int, step: int = 1) -> Iterator[Value]:
        """Run the body for 0, step, 2 · step, ... below count."""
        b, limit = self.b, self.number(count)
        before = b.block
        body, done = self.function.append_basic_block("body"), self.function.append_basic_block("done")
        b.cbranch(b.icmp_signed("<", self.number(0), limit), body, done)
        b.position_at_end(body)
        number = b.phi(INT64)
        number.add_incoming(self.number(0), before)
        yield number
        following = b.add(number, self.number(step))
        number.add_incoming(following, b.block)
        b.cbranch(b.icmp_signed("<", following, limit), body, done)
        b.position_at_end(done)

    def accumulate(
        self, start: Value, end: Value, step: int, carried: Sequence[Value], body: Any
    ) -> tuple[Value, list[Value]]:
        """Run `carried = body(i, carried)` for i = start, start + step, ... while i + step <= end.

        Return the first i that was not run, and what is carried.
        """
        b, limit = self.b, self.b.sub(end, self.number(step - 1))
        before = b.block
        inside, done = self.function.append_basic_block("sum"), self.function.append_basic_block("summed")
        b.cbranch(b.icmp_signed("<", start, limit), inside, done)
        b.position_at_end(inside)
        number = b.phi(INT64)
        number.add_incoming(start, before)
        phis = [b.phi(value.type) for value in carried]
        results = body(number, phis)
        following = b.add(number, self.number(step))
        number.add_incoming(following, b.block)
        for phi, value, result in zip(phis, carried, results, strict=True):
            phi.add_incoming(value, before)
            phi.add_incoming(result, b.block)
        last = b.block
        b.cbranch(b.icmp_signed("<", following, limit), inside, done)
        b.position_at_end(done)
        reached = [b.phi(value.type) for value in (start, *carried)]
        for phi, value, result in zip(reached, (start, *carried), (following, *results), strict=True):
            phi.add_incoming(value, before)
            phi.add_incoming(result, last)
        return reached[0], reached[1:]

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
    """What a kernel is made for: subclasses are frozen dataclasses, equal when their code would be."""

    @property
    def name(self) -> str:
        """Return the function's name, the same in every process."""
        return f"{type(self).__name__.lower()}_{hashlib.sha256(repr(self).encode()).hexdigest()[:24]}"

    def emit(self, k: Kernel) -> None:
        """Write the function's body."""
        raise AssertionError(f"{type(self).__name__} does not say how it is written")
