"""Kernels that move values, normalise, add, and pool: everything but sums over weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llvmlite import ir

from ._llvm_ir import FLOAT, POINTER, Kernel, Spec, vector

Value = Any


@dataclass(frozen=True)
class Pointwise(Spec):
    """out = relu(in · scale + shift + other), zero where the gate is not above zero; the input may be the image.

    Arguments: input, output, other, gate (offsets), channels, rows, columns, floats of a column, then for each of the
    four the bytes from channel to channel, row to row and column to column, scales, shifts (one per channel).
    """

    lanes: int
    image: bool = False
    scaled: bool = False
    added: bool = False
    relu: bool = False
    gated: bool = False

    def emit(self, k: Kernel) -> None:
        b = k.b
        bases = [k.argument_in_arena(i) for i in range(4)]
        if self.image:
            bases[0] = b.inttoptr(k.call_field(0), POINTER)
        channels, rows, columns, width = (k.argument(i) for i in range(4, 8))
        steps = [[k.argument(8 + 3 * i + j) for j in range(3)] for i in range(4)]
        scales, shifts = k.argument_pointer(20), k.argument_pointer(21)
        whole = b.mul(b.sdiv(width, k.number(self.lanes)), k.number(self.lanes))
        with k.loop(channels) as channel:
            factors = [k.load(b.gep(p, [channel], source_etype=FLOAT), FLOAT) for p in (scales, shifts) if self.scaled]
            with k.loop(rows) as row, k.loop(columns) as column:
                lines = bases
                for number, place in enumerate((channel, row, column)):
                    lines = [k.at(p, b.mul(place, step[number])) for p, step in zip(lines, steps, strict=True)]
                with k.loop(whole, self.lanes) as x:
                    self._one(k, lines, x, factors, self.lanes)
                if self.lanes > 1:
                    with k.loop(b.sub(width, whole)) as x:
                        self._one(k, lines, b.add(whole, x), factors, 1)

    def _one(self, k: Kernel, lines: list[Value], x: Value, factors: list[Value], lanes: int) -> None:
        source, target, other, gate = (k.at(line, k.b.mul(x, k.number(4))) for line in lines)
        value = k.load(source, vector(lanes))
        if self.scaled:
            value = k.multiply_add(value, k.splat(factors[0], lanes), k.splat(factors[1], lanes))
        if self.added:
            value = k.b.fadd(value, k.load(other, vector(lanes)))
        if self.gated:
            value = k.gated(value, k.load(gate, vector(lanes)))
        k.store(k.relu(value) if self.relu else value, target)


@dataclass(frozen=True)
class Pack(Spec):
    """Transpose as many images as there are lanes into tiles: out[place][lane] = image[lane][place] · scale + shift.

    Lanes without an image repeat the last one. `field` of the call says where the images are. Arguments: output
    (offset), channels, rows, floats in a row, bytes from channel to channel and row to row in the output, bytes of an
    image, scales, shifts.
    """

    lanes: int
    scaled: bool
    field: int = 0

    def emit(self, k: Kernel) -> None:
        b = k.b
        target = k.argument_in_arena(0)
        channels, rows, width, outer, inner, image_bytes = (k.argument(i) for i in range(1, 7))
        scales, shifts = k.argument_pointer(7), k.argument_pointer(8)
        first, last = b.inttoptr(k.call_field(self.field), POINTER), b.sub(k.call_field(2), k.number(1))
        images = []
        for lane in range(self.lanes):
            exists = b.icmp_signed("<", k.number(lane), last)
            images.append(k.at(first, b.mul(b.select(exists, k.number(lane), last), image_bytes)))
        whole = b.mul(b.sdiv(width, k.number(4)), k.number(4))
        with k.loop(channels) as channel:
            factors = [k.load(b.gep(p, [channel], source_etype=FLOAT), FLOAT) for p in (scales, shifts) if self.scaled]
            with k.loop(rows) as row:
                line = k.at(target, b.add(b.mul(channel, outer), b.mul(row, inner)))
                before = b.mul(b.add(b.mul(channel, rows), row), width)

                def write(
                    value: Value, x: Value, lane: int, line: Value = line, factors: list[Value] = factors
                ) -> None:
                    if self.scaled:
                        lanes = getattr(value.type, "count", 1)
                        value = k.multiply_add(value, *(k.splat(factor, lanes) for factor in factors))
                    k.store(value, k.at(line, b.add(b.mul(x, k.number(4 * self.lanes)), k.number(4 * lane))))

                with k.loop(whole, 4) as x:
                    place = b.mul(b.add(before, x), k.number(4))
                    for lane in range(0, self.lanes, 4):
                        four = [k.load(k.at(image, place), vector(4)) for image in images[lane : lane + 4]]
                        for i, value in enumerate(transpose(k, four)):
                            write(value, b.add(x, k.number(i)), lane)
                with k.loop(b.sub(width, whole)) as rest:
                    x = b.add(whole, rest)
                    place = b.mul(b.add(before, x), k.number(4))
                    for lane, image in enumerate(images):
                        write(k.load(k.at(image, place), FLOAT), x, lane)


def transpose(k: Kernel, rows: list[Value]) -> list[Value]:
    """Transpose as many vectors as they have lanes: interleave the two halves, again and again.

    Kernels do so by four: to move floats between the halves of longer vectors takes many processors long.
    """
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
                    offsets = (dy * self.dilation[0] - self.padding[0], dx * self.dilation[1] - self.padding[1])
                    row, inside_y = inside_of(k, y, offsets[0], self.stride[0], self.shape[0])
                    column, inside_x = inside_of(k, x, offsets[1], self.stride[1], self.shape[1])
                    pixel = k.at(image, b.add(b.mul(row, inner_in), b.mul(column, k.number(size))))
                    larger = k.maximum(k.load(pixel, vector(self.lanes)), value)
                    value = b.select(b.and_(inside_y, inside_x), larger, value)
            place = b.add(b.mul(channel, outer_out), b.add(b.mul(y, inner_out), b.mul(x, k.number(size))))
            k.store(k.relu(value) if self.relu else value, k.at(target, place))


@dataclass(frozen=True)
class PoolGradient(Spec):
    """The gradient of a maximum over windows: it goes to the first largest value of each window, as in torch.

    Windows that overlap (`add`) add to what is there; others overwrite it. Zero where the gate, the pooled value
    itself, is not above zero (`gated`; not with `add`). `shape` and the rest as for PoolMax.

    Arguments: value, gradient of the result, gradient of the value (offsets), channels, then for each of the three the
    bytes from channel to channel, row to row and column to column.
    """

    lanes: int
    shape: tuple[int, int, int, int]
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    add: bool
    gated: bool

    def emit(self, k: Kernel) -> None:
        b = k.b
        value, upstream, target = (k.argument_in_arena(i) for i in range(3))
        steps = [[k.argument(4 + 3 * i + j) for j in range(3)] for i in range(3)]

        def place(base: Value, step: list[Value], channel: Value, y: Value, x: Value) -> Value:
            return k.at(base, b.add(b.mul(channel, step[0]), b.add(b.mul(y, step[1]), b.mul(x, step[2]))))

        zero = ir.Constant(vector(self.lanes), None)
        with k.loop(k.argument(3)) as channel, k.loop(self.shape[2]) as y, k.loop(self.shape[3]) as x:
            given = k.load(place(upstream, steps[1], channel, y, x), vector(self.lanes))
            taps = [self._tap(k, y, x, dy, dx) for dy in range(self.kernel[0]) for dx in range(self.kernel[1])]
            lowest = k.splat(ir.Constant(FLOAT, float("-inf")), self.lanes)
            loaded, largest = [], lowest
            for row, column, inside in taps:
                pixel = k.load(place(value, steps[0], channel, row, column), vector(self.lanes))
                loaded.append(b.select(inside, pixel, lowest))
                largest = k.maximum(loaded[-1], largest)
            for (row, column, inside), pixel in zip(taps, loaded, strict=True):
                # What the first largest value takes is gone for those after it.
                taken = b.fcmp_ordered("==", pixel, largest)
                part = b.select(taken, given, zero)
                given = b.select(taken, zero, given)
                if self.gated:
                    part = k.gated(part, pixel)
                there = place(target, steps[2], channel, row, column)
                if self.add:
                    part = b.select(inside, part, zero)
                    part = b.fadd(part, k.load(there, vector(self.lanes)))
                k.store(part, there)

    def _tap(self, k: Kernel, y: Value, x: Value, dy: int, dx: int) -> tuple[Value, Value, Value]:
        row, inside_y = inside_of(k, y, dy * self.dilation[0] - self.padding[0], self.stride[0], self.shape[0])
        column, inside_x = inside_of(k, x, dx * self.dilation[1] - self.padding[1], self.stride[1], self.shape[1])
        return row, column, k.b.and_(inside_y, inside_x)


def inside_of(k: Kernel, position: Value, offset: int, stride: int, side: int) -> tuple[Value, Value]:
    """Return a tap's row or column, moved to 0 if it is outside, and whether it is inside."""
    place = k.b.add(k.b.mul(position, k.number(stride)), k.number(offset))
    inside = k.b.and_(k.b.icmp_signed(">=", place, k.number(0)), k.b.icmp_signed("<", place, k.number(side)))
    return k.b.select(inside, place, k.number(0)), inside


@dataclass(frozen=True)
class UnpackImages(Spec):
    """Transpose a tile back into images: output[lane][place] = in[place][lane] · scale.

    Lanes without an image go to scratch. Arguments: input (offset), scratch for one image (offset), channels, rows,
    floats in a row, bytes from channel to channel and row to row in the input, bytes of an image, scales.
    """

    lanes: int

    def emit(self, k: Kernel) -> None:
        b = k.b
        source, scratch = k.argument_in_arena(0), k.argument_in_arena(1)
        channels, rows, width, outer, inner, image_bytes = (k.argument(i) for i in range(2, 8))
        scales = k.argument_pointer(8)
        first, count = b.inttoptr(k.call_field(1), POINTER), k.call_field(2)
        images = []
        for lane in range(self.lanes):
            exists = b.icmp_signed("<", k.number(lane), count)
            images.append(b.select(exists, k.at(first, b.mul(k.number(lane), image_bytes)), scratch))
        whole = b.mul(b.sdiv(width, k.number(4)), k.number(4))
        with k.loop(channels) as channel:
            scale = k.load(b.gep(scales, [channel], source_etype=FLOAT), FLOAT)
            with k.loop(rows) as row:
                line = k.at(source, b.add(b.mul(channel, outer), b.mul(row, inner)))
                before = b.mul(b.add(b.mul(channel, rows), row), width)

                def pixel(x: Value, lane: int, lanes: int, line: Value = line, scale: Value = scale) -> Value:
                    place = b.add(b.mul(x, k.number(4 * self.lanes)), k.number(4 * lane))
                    return b.fmul(k.load(k.at(line, place), vector(lanes)), k.splat(scale, lanes))

                with k.loop(whole, 4) as x:
                    place = b.mul(b.add(before, x), k.number(4))
                    for lane in range(0, self.lanes, 4):
                        four = transpose(k, [pixel(b.add(x, k.number(i)), lane, 4) for i in range(4)])
                        for value, image in zip(four, images[lane : lane + 4], strict=True):
                            k.store(value, k.at(image, place))
                with k.loop(b.sub(width, whole)) as rest:
                    x = b.add(whole, rest)
                    place = b.mul(b.add(before, x), k.number(4))
                    for lane, image in enumerate(images):
                        k.store(pixel(x, lane, 1), k.at(image, place))
