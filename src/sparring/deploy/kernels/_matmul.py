"""The kernels of layers, and the runner that calls kernels; `movement` has those that only move values.


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

from ._llvm_ir import BYTE, FLOAT, INT32, INT64, POINTER, Kernel, Spec, vector
from ._native import Code

Value = Any

AHEAD = 4  # nonzeros behind the last one that a kernel may read


def add_kernels(code: Code, specs: Iterable[Spec]) -> list[str]:
    """Compile those of the kernels that the code lacks, and return their names."""
    missing = {spec.name: spec for spec in specs if spec.name not in code}
    if missing:
        code.add(_identity(list(missing)), lambda: module_of(list(missing.values())), list(missing))
    return list(missing)


def add_cached_kernels(code: Code, names: list[str]) -> None:
    """Load what `add_kernels` once compiled together, if the cache still holds it."""
    code.add_cached(_identity(names), names)


def _identity(names: list[str]) -> str:
    return "\0".join((*sorted(names), _sources()))


def add_runner(code: Code) -> None:
    """Compile the function "run", which executes a plan."""
    code.add(f"run\0{_sources()}", runner, ["run"])


@cache
def _sources() -> str:
    """Return a hash of how kernels are written, so that a cache never outlives the code that filled it."""
    content = b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py")))
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
    The residual is read at `others`; where what is read at `gates` is not above zero, zero is stored. `unroll`
    nonzeros have accumulators of their own. With `blocked` the rows are cut into blocks of input channels, so that a
    tile of the input stays in the nearest cache while all rows pass over it.

    Arguments: input, output, residual, gate (offsets), tiles, their table (four offsets each), rows, row starts
    (int32), nonzeros (int32 offset, float32 weight; AHEAD more than there are), biases, bytes from row to row in
    output, residual and gate, blocks, scratch.
    """

    lanes: int
    reads: tuple[int, ...]
    groups: tuple[tuple[int, ...], ...]
    writes: tuple[int, ...]
    others: tuple[int, ...] = ()
    gates: tuple[int, ...] = ()
    halve: bool = False
    pair: bool = False
    relu: bool = False
    blocked: bool = False
    unroll: int = 1

    def emit(self, k: Kernel) -> None:
        b = k.b
        bases = [k.argument_in_arena(i) for i in range(4)]
        tiles, table, rows = k.argument(4), k.argument_pointer(5), k.argument(6)
        starts, nonzeros, biases = (k.argument_pointer(i) for i in (7, 8, 9))
        row_bytes = [k.argument(i) for i in (10, 11, 12)]
        blocks, scratch = k.argument(13), k.argument_in_arena(14)
        with k.loop(tiles) as tile:
            places = [k.index(table, b.add(b.mul(tile, k.number(4)), k.number(i)), INT64) for i in range(4)]
            here, *outside = (k.at(base, place) for base, place in zip(bases, places, strict=True))

            def one_row(block: Value, row: Value, carried: list[Value]) -> list[Value]:
                first, *ahead = carried
                kept = k.at(scratch, b.mul(row, k.number(4 * self.lanes * len(self.reads))))
                number = b.add(b.mul(block, rows), row) if self.blocked else row
                end = k.index(starts, b.add(number, k.number(1)), INT32)
                initial = self._initial(k, biases, row, block, kept)
                sums, ahead = self._sum(k, here, nonzeros, first, end, initial, ahead)
                lines = [k.at(place, b.mul(row, size)) for place, size in zip(outside, row_bytes, strict=True)]
                if not self.blocked:
                    self._finish(k, sums, *lines)
                else:
                    with b.if_else(b.icmp_signed("==", block, b.sub(blocks, k.number(1)))) as (then, otherwise):
                        with then:
                            self._finish(k, sums, *lines)
                        with otherwise:
                            for i, value in enumerate(sums):
                                k.store(value, k.at(kept, i * 4 * self.lanes))
                return [end, *ahead]

            def one_block(block: Value, carried: list[Value]) -> list[Value]:
                return k.accumulate(k.number(0), rows, 1, carried, lambda row, c: one_row(block, row, c))[1]

            ahead = [self._nonzero(k, nonzeros, k.number(i)) for i in range(AHEAD)]
            k.accumulate(k.number(0), blocks if self.blocked else k.number(1), 1, [k.number(0), *ahead], one_block)

    def _initial(self, k: Kernel, biases: Value, row: Value, block: Value, kept: Value) -> list[Value]:
        def from_bias() -> list[Value]:
            bias = k.load(k.b.gep(biases, [row], source_etype=FLOAT), FLOAT)
            return [k.splat(bias, self.lanes)] * len(self.reads)

        def from_scratch() -> list[Value]:
            return [k.load(k.at(kept, i * 4 * self.lanes), vector(self.lanes)) for i in range(len(self.reads))]

        if not self.blocked:
            return from_bias()
        return k.choose(k.b.icmp_signed("==", block, k.number(0)), from_bias, from_scratch)

    @staticmethod
    def _nonzero(k: Kernel, nonzeros: Value, number: Value) -> Value:
        """Load offset and weight as one number: what is short are loads, not what takes the two apart."""
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

        They are loaded a few ahead: loads that wait for their address fill the queue of those that do not.
        """
        b, count = k.b, len(self.reads)

        def add(nonzero: Value, sums: list[Value]) -> list[Value]:
            point = k.at(here, b.sext(b.trunc(nonzero, INT32), INT64))
            bits = b.trunc(b.lshr(nonzero, k.number(32)), INT32)
            weight = k.splat(b.bitcast(bits, FLOAT), self.lanes)
            loaded = [k.load(k.at(point, read), vector(self.lanes)) for read in self.reads]
            return [k.multiply_add(weight, value, total) for value, total in zip(loaded, sums, strict=True)]

        def add_some(number: Value, carried: list[Value]) -> list[Value]:
            """Take as many nonzeros as there are groups of sums."""
            sums, taken = carried[:-AHEAD], carried[-AHEAD:]
            groups = [sums[i : i + count] for i in range(0, len(sums), count)]
            numbers = [b.add(number, k.number(u + AHEAD)) for u in range(len(groups))]
            added = [add(*two) for two in zip(taken[: len(groups)], groups, strict=True)]
            following = [self._nonzero(k, nonzeros, n) for n in numbers]
            return [*(total for group in added for total in group), *taken[len(groups) :], *following]

        zero = ir.Constant(vector(self.lanes), None)
        carried = [*initial, *[zero] * (count * (self.unroll - 1)), *ahead]
        start, carried = k.accumulate(start, end, self.unroll, carried, add_some)
        sums, ahead = carried[:-AHEAD], carried[-AHEAD:]
        for u in range(1, self.unroll):
            sums[:count] = [b.fadd(a, c) for a, c in zip(sums[:count], sums[u * count : (u + 1) * count], strict=True)]
        if self.unroll > 1:
            _, carried = k.accumulate(start, end, 1, [*sums[:count], *ahead], add_some)
        return carried[:count], carried[-AHEAD:]

    def _finish(self, k: Kernel, sums: list[Value], target: Value, other: Value, gate: Value) -> None:
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
            k.store(k.relu(value) if self.relu else value, k.at(target, write))


@dataclass(frozen=True)
class Rows(Spec):
    """A linear layer for one image, eight rows at once: a lane is a row, and its inputs are gathered one by one.

    A slot holds one nonzero (or zero) of each of eight rows. Rows of about equal length stand together, so that few
    slots are filled up, and few loops end otherwise than the branch predictor expects.

    Arguments: input, output (offsets), groups of rows, group starts (int32), places (8 uint16 a slot, in floats; a slot
    more than there are), weights (8 floats a slot), biases (in groups' order), where each row is stored (int32 bytes).
    """

    relu: bool

    def emit(self, k: Kernel) -> None:
        b, four = k.b, vector(4)
        source, target, groups = k.argument_in_arena(0), k.argument_in_arena(1), k.argument(2)
        starts, places, weights, biases, stored = (k.argument_pointer(i) for i in range(3, 8))

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

        def one_group(group: Value, carried: list[Value]) -> list[Value]:
            end = k.index(starts, b.add(group, k.number(1)), INT32)
            row = b.mul(group, k.number(32))
            first = [k.load(k.at(biases, b.add(row, k.number(16 * i))), four) for i in (0, 1)]
            _, (*sums, low, high) = k.accumulate(carried[0], end, 1, [*first, *carried[1:]], add)
            for i, value in enumerate(k.relu(total) if self.relu else total for total in sums):
                for lane in range(4):
                    place = k.load(k.at(stored, b.add(row, k.number(16 * i + 4 * lane))), INT32)
                    k.store(b.extract_element(value, ir.Constant(INT32, lane)), k.at(target, b.sext(place, INT64)))
            return [end, low, high]

        k.accumulate(k.number(0), groups, 1, [k.number(0), *quads(k.number(0))], one_group)


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


def runner() -> str:
    """Return the LLVM IR of `void run(arena, segments, call)`, which executes a plan in one call.

    segments: a count, then for each (1 to run it once for every unit of images that is in use, else 0; operations;
    address of their table), a table holding a kernel's address and its arguments' address each. call: image address,
    logits address, images, bytes of an image, bytes of its logits, images of a unit, offset in the arena of the first
    unit's own memory, bytes from unit to unit, address of the logits' gradients and their bytes, then five fields that
    `run` fills for the kernels: the unit's image address, logits address, images, gradients' address, offset of its own
    memory. A gradient of the images takes the place of the logits.
    """
    module = ir.Module("runner")
    k = Kernel(module, "run")
    b = k.b
    segments = k.load(k.arguments, INT64)
    image, logits, images, image_bytes, logits_bytes, lanes, own, unit_bytes = (k.call_field(i) for i in range(8))
    upstream, upstream_bytes = k.call_field(8), k.call_field(9)
    inner = k.at(k.call, 8 * 10)
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
            k.store(b.add(upstream, b.mul(before, upstream_bytes)), k.at(inner, 24))
            k.store(b.add(own, b.mul(unit, unit_bytes)), k.at(inner, 32))
            with k.loop(count) as entry:
                pair = k.at(table, b.mul(entry, k.number(16)))
                function = b.inttoptr(k.load(pair, INT64), kind.as_pointer())
                arguments = b.inttoptr(k.load(k.at(pair, 8), INT64), POINTER)
                b.call(function, [k.arena, arguments, inner])
    k.finish()
    return str(module)
