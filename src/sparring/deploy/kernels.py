"""The kernels: each is made for one geometry, written as LLVM IR, and named by that geometry.

A vector holds `lanes` floats: neighbouring pixels of one image (the "planes" layout), or one pixel of as many images
(the "tiles" layout). A kernel does not know which: it knows byte offsets.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import llvmlite
from llvmlite import ir

from .emit import BYTE, FLOAT, INT32, INT64, POINTER, Kernel, vector
from .native import Code

__all__ = ["Lookup", "Pack", "Pointwise", "PoolMax", "Spec", "Tile", "Unpack", "add_kernels", "add_runner"]

Value = Any


class Spec:
    """What a kernel is made for: subclasses are frozen dataclasses, equal when their code would be."""

    @property
    def name(self) -> str:
        """Return the function's name, the same in every process."""
        return f"{type(self).__name__.lower()}_{hashlib.sha256(repr(self).encode()).hexdigest()[:24]}"

    def emit(self, k: Kernel) -> None:
        """Write the function's body."""
        raise AssertionError(f"{type(self).__name__} does not say how it is written")


def add_kernels(code: Code, specs: Iterable[Spec]) -> None:
    """Compile those of the kernels that the code lacks."""
    missing = {spec.name: spec for spec in specs if spec.name not in code}
    if missing:
        code.add("\0".join((*sorted(missing), _sources())), lambda: module_of(list(missing.values())), list(missing))


def add_runner(code: Code) -> None:
    """Compile the function "run", which executes a plan."""
    code.add(f"run\0{_sources()}", runner, ["run"])


@cache
def _sources() -> str:
    """Return a hash of how kernels are written, so that a cache never outlives the code that filled it."""
    folder = Path(__file__).parent
    content = b"".join((folder / name).read_bytes() for name in ("emit.py", "kernels.py"))
    return hashlib.sha256(content + llvmlite.__version__.encode()).hexdigest()


def module_of(specs: list[Spec]) -> str:
    """Return the LLVM IR of a module with these kernels."""
    module = ir.Module("sparring")
    for spec in specs:
        kernel = Kernel(module, spec.name)
        spec.emit(kernel)
        kernel.finish()
    return str(module)


@dataclass(frozen=True)
class Tile(Spec):
    """out[row] = relu(pool(Σ weight · in + bias + residual)) for each row (output channel), tile by tile of pixels.

    An accumulator is a vector; it sums over a row's nonzeros, read at `reads` (bytes) plus the nonzero's own offset.
    `groups` are the accumulators whose maximum is stored at the same number of `writes`; with `halve` every second
    lane is stored (a stride of 2), with `halve` and `pair` the maxima of neighbouring lanes (a pooling of 2).
    The residual is read at `others`. `unroll` nonzeros have accumulators of their own. With `blocked` the rows are cut
    into blocks of input channels, so that a tile of the input stays in the nearest cache while all rows pass over it.

    Arguments: input, output, residual (offsets), tiles, their table (three offsets each), rows, row starts (int32),
    nonzeros (int32 offset, float32 weight), biases, bytes from row to row in output and residual, blocks, scratch.
    """

    lanes: int
    reads: tuple[int, ...]
    groups: tuple[tuple[int, ...], ...]
    writes: tuple[int, ...]
    others: tuple[int, ...] = ()
    halve: bool = False
    pair: bool = False
    relu: bool = False
    blocked: bool = False
    unroll: int = 1

    def emit(self, k: Kernel) -> None:
        b = k.b
        source, target, other = (k.argument_in_arena(i) for i in range(3))
        tiles, table, rows = k.argument(3), k.argument_pointer(4), k.argument(5)
        starts, nonzeros, biases = (k.argument_pointer(i) for i in (6, 7, 8))
        row_bytes, other_bytes = k.argument(9), k.argument(10)
        blocks, scratch = k.argument(11), k.argument_in_arena(12)
        size = 4 * self.lanes
        with k.loop(tiles) as tile:
            places = [k.index(table, b.add(b.mul(tile, k.number(3)), k.number(i)), INT64) for i in range(3)]
            here, there, beside = (k.at(p, place) for p, place in zip((source, target, other), places, strict=True))
            with k.loop(blocks if self.blocked else 1) as block, k.loop(rows) as row:
                kept = k.at(scratch, b.mul(row, k.number(size * len(self.reads))))
                number = b.add(b.mul(block, rows), row) if self.blocked else row
                start = k.index(starts, number, INT32)
                end = k.index(starts, b.add(number, k.number(1)), INT32)
                sums = self._sum(k, here, nonzeros, start, end, self._initial(k, biases, row, block, kept))
                target_row = k.at(there, b.mul(row, row_bytes))
                other_row = k.at(beside, b.mul(row, other_bytes))
                if not self.blocked:
                    self._finish(k, sums, target_row, other_row)
                else:
                    with b.if_else(b.icmp_signed("==", block, b.sub(blocks, k.number(1)))) as (then, otherwise):
                        with then:
                            self._finish(k, sums, target_row, other_row)
                        with otherwise:
                            for i, value in enumerate(sums):
                                k.store(value, k.at(kept, i * size))

    def _initial(self, k: Kernel, biases: Value, row: Value, block: Value, kept: Value) -> list[Value]:
        def from_bias() -> list[Value]:
            bias = k.load(k.b.gep(biases, [row], source_etype=FLOAT), FLOAT)
            return [k.splat(bias, self.lanes)] * len(self.reads)

        def from_scratch() -> list[Value]:
            return [k.load(k.at(kept, i * 4 * self.lanes), vector(self.lanes)) for i in range(len(self.reads))]

        if not self.blocked:
            return from_bias()
        return k.choose(k.b.icmp_signed("==", block, k.number(0)), from_bias, from_scratch)

    def _sum(
        self, k: Kernel, here: Value, nonzeros: Value, start: Value, end: Value, initial: list[Value]
    ) -> list[Value]:
        b, count = k.b, len(self.reads)

        def add(number: Value, ahead: int, sums: list[Value]) -> list[Value]:
            entry = k.at(nonzeros, b.mul(b.add(number, k.number(ahead)), k.number(8)))
            point = k.at(here, b.sext(k.load(entry, INT32), INT64))
            weight = k.splat(k.load(k.at(entry, 4), FLOAT), self.lanes)
            loaded = [k.load(k.at(point, read), vector(self.lanes)) for read in self.reads]
            return [k.multiply_add(weight, value, total) for value, total in zip(loaded, sums, strict=True)]

        def add_all(number: Value, carried: list[Value]) -> list[Value]:
            parts = [add(number, u, carried[u * count : (u + 1) * count]) for u in range(self.unroll)]
            return [value for part in parts for value in part]

        zero = ir.Constant(vector(self.lanes), None)
        sums = initial + [zero] * (count * (self.unroll - 1))
        start, sums = k.accumulate(start, end, self.unroll, sums, add_all)
        for u in range(1, self.unroll):
            sums[:count] = [b.fadd(a, c) for a, c in zip(sums[:count], sums[u * count : (u + 1) * count], strict=True)]
        if self.unroll > 1:
            _, sums = k.accumulate(start, end, 1, sums[:count], lambda number, carried: add(number, 0, carried))
        return sums[:count]

    def _finish(self, k: Kernel, sums: list[Value], target: Value, other: Value) -> None:
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
            k.store(k.relu(value) if self.relu else value, k.at(target, write))


@dataclass(frozen=True)
class Lookup(Spec):
    """A linear layer for one image, sixteen rows at once: a lane is a row, and reads by itself from 32 inputs.

    A slot holds one nonzero (or zero) of each row among 32 neighbouring inputs: where they start, each lane's place
    among them (bytes), and the weights.

    Arguments: input, output (offsets), groups of rows, group starts (int32), slot starts (int32 bytes into the
    input), places (16 bytes a slot), weights (16 floats a slot), biases (padded to groups of 16).
    """

    relu: bool

    def emit(self, k: Kernel) -> None:
        b, sixteen = k.b, vector(16)
        source, target, groups = k.argument_in_arena(0), k.argument_in_arena(1), k.argument(2)
        starts, windows, places, weights, biases = (k.argument_pointer(i) for i in range(3, 8))
        lookup = _intrinsic(k, "llvm.x86.avx512.vpermi2var.ps.512", sixteen, ir.VectorType(INT32, 16), sixteen)
        zero = ir.Constant(sixteen, None)

        def add(number: Value, ahead: int, total: Value) -> Value:
            slot = b.add(number, k.number(ahead))
            window = k.at(source, k.index(windows, slot, INT32))
            place = b.load(k.at(places, b.mul(slot, k.number(16))), align=1, typ=ir.VectorType(BYTE, 16))
            found = b.call(
                lookup,
                [k.load(window, sixteen), b.zext(place, ir.VectorType(INT32, 16)), k.load(k.at(window, 64), sixteen)],
            )
            return k.multiply_add(k.load(k.at(weights, b.mul(slot, k.number(64))), sixteen), found, total)

        with k.loop(groups) as group:
            start, end = k.index(starts, group, INT32), k.index(starts, b.add(group, k.number(1)), INT32)
            first = k.load(k.at(biases, b.mul(group, k.number(64))), sixteen)
            sums = [first, zero, zero, zero]
            start, sums = k.accumulate(start, end, 4, sums, lambda i, c: [add(i, u, c[u]) for u in range(4)])
            total = b.fadd(b.fadd(sums[0], sums[1]), b.fadd(sums[2], sums[3]))
            _, (total,) = k.accumulate(start, end, 1, [total], lambda i, c: [add(i, 0, c[0])])
            k.store(k.relu(total) if self.relu else total, k.at(target, b.mul(group, k.number(64))))


def _intrinsic(k: Kernel, name: str, result: Any, *arguments: Any) -> Any:
    module = k.function.module
    if name in module.globals:
        return module.globals[name]
    return ir.Function(module, ir.FunctionType(result, [result, *arguments]), name)


@dataclass(frozen=True)
class Pointwise(Spec):
    """out = relu(in · scale + shift + other), row by row of one channel; the input may be the call's image.

    Arguments: input, output, other (offsets), channels, rows, floats in a row, then for input, output and other the
    bytes from channel to channel and from row to row (six), scales, shifts (one per channel).
    """

    lanes: int
    image: bool = False
    scaled: bool = False
    added: bool = False
    relu: bool = False

    def emit(self, k: Kernel) -> None:
        b = k.b
        bases = [k.argument_in_arena(i) for i in range(3)]
        if self.image:
            bases[0] = b.inttoptr(k.call_field(0), POINTER)
        channels, rows, width = (k.argument(i) for i in range(3, 6))
        steps = [(k.argument(6 + 2 * i), k.argument(7 + 2 * i)) for i in range(3)]
        scales, shifts = k.argument_pointer(12), k.argument_pointer(13)
        whole = b.mul(b.sdiv(width, k.number(self.lanes)), k.number(self.lanes))
        with k.loop(channels) as channel:
            factors = [k.load(b.gep(p, [channel], source_etype=FLOAT), FLOAT) for p in (scales, shifts) if self.scaled]
            with k.loop(rows) as row:
                lines = [
                    k.at(base, b.add(b.mul(channel, outer), b.mul(row, inner)))
                    for base, (outer, inner) in zip(bases, steps, strict=True)
                ]
                with k.loop(whole, self.lanes) as x:
                    self._one(k, lines, x, factors, self.lanes)
                if self.lanes > 1:
                    with k.loop(b.sub(width, whole)) as x:
                        self._one(k, lines, b.add(whole, x), factors, 1)

    def _one(self, k: Kernel, lines: list[Value], x: Value, factors: list[Value], lanes: int) -> None:
        source, target, other = (k.at(line, k.b.mul(x, k.number(4))) for line in lines)
        value = k.load(source, vector(lanes))
        if self.scaled:
            value = k.multiply_add(value, k.splat(factors[0], lanes), k.splat(factors[1], lanes))
        if self.added:
            value = k.b.fadd(value, k.load(other, vector(lanes)))
        k.store(k.relu(value) if self.relu else value, target)


@dataclass(frozen=True)
class Pack(Spec):
    """Transpose as many images as there are lanes into tiles: out[place][lane] = image[lane][place] · scale + shift.

    Lanes without an image repeat the last one. Arguments: output (offset), channels, rows, floats in a row, bytes from
    channel to channel and row to row in the output, bytes of an image, scales, shifts.
    """

    lanes: int
    scaled: bool

    def emit(self, k: Kernel) -> None:
        b = k.b
        target = k.argument_in_arena(0)
        channels, rows, width, outer, inner, image_bytes = (k.argument(i) for i in range(1, 7))
        scales, shifts = k.argument_pointer(7), k.argument_pointer(8)
        first, last = b.inttoptr(k.call_field(0), POINTER), b.sub(k.call_field(2), k.number(1))
        images = []
        for lane in range(self.lanes):
            exists = b.icmp_signed("<", k.number(lane), last)
            images.append(k.at(first, b.mul(b.select(exists, k.number(lane), last), image_bytes)))
        whole = b.mul(b.sdiv(width, k.number(self.lanes)), k.number(self.lanes))
        with k.loop(channels) as channel:
            factors = [
                k.splat(k.load(b.gep(p, [channel], source_etype=FLOAT), FLOAT), self.lanes)
                for p in (scales, shifts)
                if self.scaled
            ]
            with k.loop(rows) as row:
                line = k.at(target, b.add(b.mul(channel, outer), b.mul(row, inner)))
                before = b.mul(b.add(b.mul(channel, rows), row), width)
                with k.loop(whole, self.lanes) as x:
                    place = b.mul(b.add(before, x), k.number(4))
                    block = _transpose(k, [k.load(k.at(image, place), vector(self.lanes)) for image in images])
                    self._write(k, block, line, x, factors)
                with k.loop(b.sub(width, whole)) as rest:
                    x = b.add(whole, rest)
                    place = b.mul(b.add(before, x), k.number(4))
                    value = ir.Constant(vector(self.lanes), ir.Undefined)
                    for lane, image in enumerate(images):
                        value = b.insert_element(value, k.load(k.at(image, place), FLOAT), ir.Constant(INT32, lane))
                    self._write(k, [value], line, x, factors)

    def _write(self, k: Kernel, values: list[Value], line: Value, x: Value, factors: list[Value]) -> None:
        for i, value in enumerate(values):
            result = k.multiply_add(value, factors[0], factors[1]) if self.scaled else value
            place = k.b.mul(k.b.add(x, k.number(i)), k.number(4 * self.lanes))
            k.store(result, k.at(line, place))


def _transpose(k: Kernel, rows: list[Value]) -> list[Value]:
    """Transpose as many vectors as they have lanes: interleave the two halves, again and again."""
    lanes = len(rows)
    low = [i // 2 + lanes * (i % 2) for i in range(lanes)]
    high = [i + lanes // 2 for i in low]
    for _ in range(lanes.bit_length() - 1):
        pairs = [(rows[i], rows[i + lanes // 2]) for i in range(lanes // 2)]
        rows = [k.shuffle(a, c, order) for a, c in pairs for order in (low, high)]
    return rows


@dataclass(frozen=True)
class Unpack(Spec):
    """Write logits to the call's output. Arguments: input (offset), classes."""

    lanes: int

    def emit(self, k: Kernel) -> None:
        b, source, classes = k.b, k.argument_in_arena(0), k.argument(1)
        target = b.inttoptr(k.call_field(1), POINTER)
        with k.loop(k.call_field(2)) as image, k.loop(classes) as logit:
            read = b.mul(b.add(b.mul(logit, k.number(self.lanes)), image), k.number(4))
            write = b.mul(b.add(b.mul(image, classes), logit), k.number(4))
            k.store(k.load(k.at(source, read), FLOAT), k.at(target, write))


@dataclass(frozen=True)
class PoolMax(Spec):
    """The maximum over windows, of any geometry. `shape`: input rows and columns, output rows and columns.

    Arguments: input, output (offsets), channels, bytes from channel to channel and row to row in input and output.
    """

    lanes: int
    shape: tuple[int, int, int, int]
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    relu: bool = False

    def emit(self, k: Kernel) -> None:
        b, size = k.b, 4 * self.lanes
        source, target, channels = k.argument_in_arena(0), k.argument_in_arena(1), k.argument(2)
        outer_in, inner_in, outer_out, inner_out = (k.argument(i) for i in range(3, 7))
        lowest = k.splat(ir.Constant(FLOAT, float("-inf")), self.lanes)
        with k.loop(channels) as channel, k.loop(self.shape[2]) as y, k.loop(self.shape[3]) as x:
            image = k.at(source, b.mul(channel, outer_in))
            value = lowest
            for dy in range(self.kernel[0]):
                for dx in range(self.kernel[1]):
                    row, inside_y = self._place(k, y, dy, 0)
                    column, inside_x = self._place(k, x, dx, 1)
                    pixel = k.at(image, b.add(b.mul(row, inner_in), b.mul(column, k.number(size))))
                    larger = k.maximum(k.load(pixel, vector(self.lanes)), value)
                    value = b.select(b.and_(inside_y, inside_x), larger, value)
            place = b.add(b.mul(channel, outer_out), b.add(b.mul(y, inner_out), b.mul(x, k.number(size))))
            k.store(k.relu(value) if self.relu else value, k.at(target, place))

    def _place(self, k: Kernel, position: Value, tap: int, axis: int) -> tuple[Value, Value]:
        """Return a tap's row or column, pushed inside, and whether it was inside."""
        b = k.b
        offset = tap * self.dilation[axis] - self.padding[axis]
        place = b.add(b.mul(position, k.number(self.stride[axis])), k.number(offset))
        inside = b.and_(b.icmp_signed(">=", place, k.number(0)), b.icmp_signed("<", place, k.number(self.shape[axis])))
        return b.select(inside, place, k.number(0)), inside


def runner() -> str:
    """Return the LLVM IR of `void run(arena, segments, call)`, which executes a plan in one call.

    segments: a count, then for each (1 to run it once for every unit of images that is in use, else 0; operations;
    address of their table), a table holding a kernel's address and its arguments' address each. call: image address,
    logits address, images, bytes of an image, bytes of its logits, images of a unit, bytes of a unit's arena, then
    three fields that `run` fills for the kernels: the unit's image address, logits address and images.
    """
    module = ir.Module("runner")
    k = Kernel(module, "run")
    b = k.b
    segments = k.load(k.arguments, INT64)
    image, logits, images, image_bytes, logits_bytes, lanes, unit_bytes = (k.call_field(i) for i in range(7))
    inner = k.at(k.call, 8 * 7)
    used = b.sdiv(b.add(images, b.sub(lanes, k.number(1))), lanes)
    kind = ir.FunctionType(ir.VoidType(), [POINTER, POINTER, POINTER])
    with k.loop(segments) as number:
        segment = k.at(k.arguments, b.add(b.mul(number, k.number(24)), k.number(8)))
        each, count = k.load(segment, INT64), k.load(k.at(segment, 8), INT64)
        table = b.inttoptr(k.load(k.at(segment, 16), INT64), POINTER)
        with k.loop(b.select(b.icmp_signed("!=", each, k.number(0)), used, k.number(1))) as unit:
            before = b.mul(unit, lanes)
            left = b.sub(images, before)
            here = b.select(b.icmp_signed("<", left, lanes), left, lanes)
            k.store(b.add(image, b.mul(before, image_bytes)), inner)
            k.store(b.add(logits, b.mul(before, logits_bytes)), k.at(inner, 8))
            k.store(here, k.at(inner, 16))
            arena = k.at(k.arena, b.mul(unit, unit_bytes))
            with k.loop(count) as entry:
                pair = k.at(table, b.mul(entry, k.number(16)))
                function = b.inttoptr(k.load(pair, INT64), kind.as_pointer())
                arguments = b.inttoptr(k.load(k.at(pair, 8), INT64), POINTER)
                b.call(function, [arena, arguments, inner])
    k.finish()
    return str(module)
