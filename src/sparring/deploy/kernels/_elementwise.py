"""Kernels that move values, normalise, add, pool and apply activations: all except sums over weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from llvmlite import ir

from .._program import Pool
from ._layout import cover
from ._llvm_ir import FLOAT, INT32, Kernel, Spec, Turn, Unit, Value, vector

_BITS = 31  # of a non-negative float: as integers such floats are ordered as they are as numbers


@dataclass(frozen=True)
class Pointwise(Spec):
    """out = min(relu(in · scale + shift + other), cap), zero where the gate is not above zero; in may be the image.

    Arguments: input, output, other, gate (offsets), channels, rows, columns, floats of a column, then for each of the
    four the bytes from channel to channel, row to row and column to column, scales, shifts (one per channel).
    """

    shares = True
    lanes: int
    image: bool = False
    scaled: bool = False
    added: bool = False
    relu: bool = False
    gated: bool = False
    cap: float | None = None

    def emit(self, k: Kernel) -> None:
        bases = [k.place() for _ in range(4)]
        if self.image:
            bases[0] = k.address(Unit.IMAGES)
        channels, rows, columns, width = k.integers(4)
        steps = [k.integers(3) for _ in range(4)]
        tables = k.pointer(), k.pointer()
        with k.shared(channels) as channel:
            factors = [k.entry(table, channel) for table in tables if self.scaled]
            with k.loop(rows) as row, k.loop(columns) as column:
                lines = bases
                for number, place in enumerate((channel, row, column)):
                    lines = [k.at(p, k.b.mul(place, step[number])) for p, step in zip(lines, steps, strict=True)]

                def one(x: Value, lanes: int, lines: list[Value] = lines, factors: list[Value] = factors) -> None:
                    self._one(k, lines, x, factors, lanes)

                k.along(width, (self.lanes,), one)

    def _one(self, k: Kernel, lines: list[Value], x: Value, factors: list[Value], lanes: int) -> None:
        source, target, other, gate = (k.at(line, k.b.mul(x, k.number(4))) for line in lines)
        value = k.load(source, vector(lanes))
        if self.scaled:
            value = k.multiply_add(value, *(k.splat(factor, lanes) for factor in factors))
        if self.added:
            value = k.b.fadd(value, k.load(other, vector(lanes)))
        if self.gated:
            value = k.gated(value, k.load(gate, vector(lanes)))
        k.store(k.capped(k.relu(value) if self.relu else value, self.cap), target)


@dataclass(frozen=True)
class Pack(Spec):
    """Transpose as many images as there are lanes into tiles: out[place][lane] = image[lane][place] · scale + shift.

    Lanes without an image repeat the last one. `field` of the call says where the images are, `side` how many of them
    are transposed at once. Arguments: output (offset), channels, rows, floats in a row, bytes from channel to channel
    and row to row in the output, bytes of an image, scales, shifts.
    """

    shares = True
    lanes: int
    scaled: bool
    side: int = 4
    field: Unit = Unit.IMAGES

    def emit(self, k: Kernel) -> None:
        b, target = k.b, k.place()
        channels, rows, width, outer, inner, image_bytes = k.integers(6)
        tables = k.pointer(), k.pointer()
        images = k.images(self.lanes, image_bytes, self.field)
        with k.shared(channels) as channel:
            factors = [k.entry(table, channel) for table in tables if self.scaled]
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

                def move(x: Value, pixels: int, before: Value = before, write: Any = write) -> None:
                    place = b.mul(b.add(before, x), k.number(4))
                    for lane in range(0, self.lanes, pixels):
                        found = [k.load(k.at(image, place), vector(pixels)) for image in images[lane : lane + pixels]]
                        for i, value in enumerate(transpose(k, found)):
                            write(value, b.add(x, k.number(i)), lane)

                k.along(width, (self.side, 4), move)


def transpose(k: Kernel, rows: list[Value]) -> list[Value]:
    """Transpose as many vectors as they have lanes: interleave the two halves, again and again.

    Kernels use vectors of four, or of 16 on AVX-512: processors with vectors of eight may be slow at moving floats
    between halves.
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
    """Write logits to the call's output. Arguments: input (offset), classes. `side`: see Pack."""

    lanes: int
    side: int = 4

    def emit(self, k: Kernel) -> None:
        b, source, classes = k.b, k.place(), k.integer()
        target, count = k.address(Unit.LOGITS), k.field(Unit.COUNT)

        def move(image: Value, logit: Value, side: int) -> None:
            """Move a square of images and logits: moving them one by one would take many times as long."""
            logits = [b.add(logit, k.number(i)) for i in range(side)]
            read = [b.mul(b.add(b.mul(number, k.number(self.lanes)), image), k.number(4)) for number in logits]
            found = transpose(k, [k.load(k.at(source, place), vector(side)) for place in read])
            for i, value in enumerate(found):
                start = b.add(b.mul(b.add(image, k.number(i)), classes), logit)
                k.store(value, k.at(target, b.mul(start, k.number(4))))

        images, logits = k.number(0), k.number(0)  # what larger squares have covered
        for side in sorted({self.side, 4, 1} if self.lanes > 1 else {1}, reverse=True):
            most, whole = (b.and_(n, k.number(-side)) for n in (count, classes))
            with k.loop(most, side) as image:
                first = b.select(b.icmp_signed("<", image, images), logits, k.number(0))
                with k.carry(whole, start=first, step=side) as turn:
                    move(image, turn.number, side)
            images, logits = most, whole


@dataclass(frozen=True)
class _Windows(Spec):
    """Base of kernels over windows, of any geometry. `sides`: input rows and columns, output rows and columns."""

    lanes: int
    sides: tuple[int, int, int, int]
    op: Pool

    def taps(self, k: Kernel, y: Value, x: Value) -> list[tuple[Value, Value, Value]]:
        """Return row and column of each tap of a window, moved to 0 where it is outside, and whether it is inside."""
        taps = []
        for dy in range(self.op.kernel[0]):
            for dx in range(self.op.kernel[1]):
                row, inside_y = self._inside(k, y, dy, 0)
                column, inside_x = self._inside(k, x, dx, 1)
                taps.append((row, column, k.b.and_(inside_y, inside_x)))
        return taps

    def _inside(self, k: Kernel, position: Value, tap: int, axis: int) -> tuple[Value, Value]:
        offset = tap * self.op.dilation[axis] - self.op.padding[axis]
        place = k.b.add(k.b.mul(position, k.number(self.op.stride[axis])), k.number(offset))
        inside = k.b.and_(
            k.b.icmp_signed(">=", place, k.number(0)), k.b.icmp_signed("<", place, k.number(self.sides[axis]))
        )
        return k.b.select(inside, place, k.number(0)), inside


def _pixel(k: Kernel, base: Value, steps: list[Value], *places: Value) -> Value:
    """Return the address of a pixel at (channel, row, column)."""
    channel, row, column = (k.b.mul(place, step) for place, step in zip(places, steps, strict=True))
    return k.at(base, k.b.add(channel, k.b.add(row, column)))


@dataclass(frozen=True)
class PoolMax(_Windows):
    """The maximum over windows, `wide` neighbours at once where their windows are inside.

    Arguments: input, output (offsets), channels, then for each of the two the bytes from channel to channel, row to row
    and column to column.
    """

    shares = True
    relu: bool = False
    wide: int = 1

    def emit(self, k: Kernel) -> None:
        source, target, channels = k.place(), k.place(), k.integer()
        steps = [k.integers(3) for _ in range(2)]
        first, whole = self.inside
        with k.shared(channels) as channel, k.loop(self.sides[2]) as y:

            def store(value: Value, x: Value, channel: Value = channel, y: Value = y) -> None:
                k.store(self.rectified(k, value) if self.relu else value, _pixel(k, target, steps[1], channel, y, x))

            def one(x: Value, channel: Value = channel, y: Value = y, store: Any = store) -> None:
                value = self.least(k)
                for row, column, inside in self.taps(k, y, x):
                    pixel = k.load(_pixel(k, source, steps[0], channel, row, column), self.kind(self.lanes))
                    value = k.b.select(inside, self.larger(k, pixel, value), value)
                store(value, x)

            with k.loop(first) as x:
                one(x)
            if whole:
                with k.loop(whole, self.wide) as near:
                    x = k.b.add(near, k.number(first))
                    store(self._several(k, source, steps[0], channel, y, x), x)
            with k.loop(self.sides[3] - first - whole) as near:
                one(k.b.add(near, k.number(first + whole)))

    def kind(self, lanes: int) -> Any:
        """Return the type of a vector."""
        return vector(lanes)

    def least(self, k: Kernel) -> Value:
        """Return what no value is below."""
        return k.splat(ir.Constant(FLOAT, float("-inf")), self.lanes)

    def larger(self, k: Kernel, first: Value, second: Value) -> Value:
        """Return the maximum of two vectors."""
        return k.maximum(first, second)

    def rectified(self, k: Kernel, value: Value) -> Value:
        """Return the maximum of a vector and zero."""
        return k.relu(value)

    @property
    def inside(self) -> tuple[int, int]:
        """Return the first window of a row that is inside, and how many from there on form whole vectors."""
        stride, (_, side, _, results) = self.op.stride[1], self.sides
        if self.wide == 1 or stride > 2 or self.op.dilation != (1, 1):
            return results, 0
        first = -(-self.op.padding[1] // stride)
        last = min(results - 1, (side - self.op.kernel[1] + self.op.padding[1]) // stride)
        return min(first, results), max(0, last + 1 - first) // self.wide * self.wide

    def _several(self, k: Kernel, source: Value, steps: list[Value], channel: Value, y: Value, x: Value) -> Value:
        """Return the maxima of `wide` windows from x on; rows outside are replaced by the nearest one inside."""
        b, stride, found = k.b, self.op.stride, None
        even = list(range(0, self.wide * stride[1], stride[1]))
        for dy in range(self.op.kernel[0]):
            row = b.add(b.mul(y, k.number(stride[0])), k.number(dy - self.op.padding[0]))
            row = b.select(b.icmp_signed("<", row, k.number(0)), k.number(0), row)
            row = b.select(b.icmp_signed("<", row, k.number(self.sides[0])), row, k.number(self.sides[0] - 1))
            for dx in range(self.op.kernel[1]):
                column = b.add(b.mul(x, k.number(stride[1])), k.number(dx - self.op.padding[1]))
                place = _pixel(k, source, steps, channel, row, column)
                value = k.load(place, self.kind(self.wide))
                if stride[1] == 2:
                    value = k.shuffle(value, k.load(k.at(place, 4 * self.wide), self.kind(self.wide)), even)
                found = value if found is None else self.larger(k, value, found)
        return found


@dataclass(frozen=True)
class Spread(Spec):
    """Sort the pixels of each channel by row and column modulo a stride.

    Arguments: input, output (offsets), channels, then for each of the two the bytes from channel to channel and from
    row to row. `sides`: rows and columns of the input; `phases`: the remainders that are needed.
    """

    shares = True
    lanes: int
    sides: tuple[int, int]
    stride: tuple[int, int]
    phases: tuple[tuple[int, int], ...]

    def emit(self, k: Kernel) -> None:
        b, source, target, channels = k.b, k.place(), k.place(), k.integer()
        (outer, inner), (wide, narrow) = k.integers(2), k.integers(2)
        down, across = self.stride
        with k.shared(channels) as channel:
            for phase in sorted({y for y, _ in self.phases}):
                columns = [x for y, x in self.phases if y == phase]
                with k.loop(-(-(self.sides[0] - phase) // down)) as y:
                    row = b.add(b.mul(y, k.number(down)), k.number(phase))
                    read = k.at(source, b.add(b.mul(channel, outer), b.mul(row, inner)))
                    number = b.add(b.mul(channel, k.number(down * across)), k.number(phase * across))
                    write = [
                        k.at(target, b.add(b.mul(b.add(number, k.number(x)), wide), b.mul(y, narrow))) for x in columns
                    ]
                    self._row(k, read, columns, write)

    def _row(self, k: Kernel, read: Value, columns: list[int], write: list[Value]) -> None:
        across, count = self.stride[1], self.sides[1] // self.stride[1]
        lanes = next((n for n in (self.lanes, 8, 4) if n <= min(self.lanes, count)), 0) if across <= 2 else 0
        for x in cover(count, lanes) if lanes else ():
            loaded = [k.load(k.at(read, 4 * (x * across + lanes * i)), vector(lanes)) for i in range(across)]
            for column, line in zip(columns, write, strict=True):
                order = range(column, across * lanes, across)
                k.store(loaded[0] if across == 1 else k.shuffle(loaded[0], loaded[1], order), k.at(line, 4 * x))
        for column, line in zip(columns, write, strict=True):
            with k.carry(-(-(self.sides[1] - column) // across), start=count if lanes else 0) as turn:
                place = k.b.add(k.b.mul(turn.number, k.number(4 * across)), k.number(4 * column))
                k.store(k.load(k.at(read, place), FLOAT), k.at(line, k.b.mul(turn.number, k.number(4))))


@dataclass(frozen=True)
class PoolGradient(_Windows):
    """The gradient of a maximum over windows: it goes to the first largest value of each window, as in torch.

    Windows that overlap (`add`) add to what is there; others overwrite it. Zero where the gate, the pooled value
    itself, is not above zero (`gated`; not with `add`).

    Arguments: value, gradient of the result, gradient of the value (offsets), channels, then for each of the three the
    bytes from channel to channel, row to row and column to column.
    """

    add: bool
    gated: bool

    def emit(self, k: Kernel) -> None:
        b = k.b
        value, upstream, target = (k.place() for _ in range(3))
        channels = k.integer()
        steps = [k.integers(3) for _ in range(3)]
        zero = ir.Constant(vector(self.lanes), None)
        with k.loop(channels) as channel, k.loop(self.sides[2]) as y, k.loop(self.sides[3]) as x:
            given = k.load(_pixel(k, upstream, steps[1], channel, y, x), vector(self.lanes))
            taps = self.taps(k, y, x)
            largest = lowest = k.splat(ir.Constant(FLOAT, float("-inf")), self.lanes)
            loaded = []
            for row, column, inside in taps:
                pixel = k.load(_pixel(k, value, steps[0], channel, row, column), vector(self.lanes))
                loaded.append(b.select(inside, pixel, lowest))
                largest = k.maximum(loaded[-1], largest)
            for (row, column, inside), pixel in zip(taps, loaded, strict=True):
                # The first largest value takes the gradient; later ones get none.
                taken = b.fcmp_ordered("==", pixel, largest)
                part = b.select(taken, given, zero)
                given = b.select(taken, zero, given)
                if self.gated:
                    part = k.gated(part, pixel)
                there = _pixel(k, target, steps[2], channel, row, column)
                if self.add:
                    part = b.select(inside, part, zero)
                    part = b.fadd(part, k.load(there, vector(self.lanes)))
                k.store(part, there)


@dataclass(frozen=True)
class UnpackImages(Spec):
    """Transpose a tile back into images: output[lane][place] = in[place][lane] · scale.

    Lanes without an image go to scratch. Arguments: input (offset), scratch for one image (offset), channels, rows,
    floats in a row, bytes from channel to channel and row to row in the input, bytes of an image, scales.
    """

    lanes: int

    def emit(self, k: Kernel) -> None:
        b, source, scratch = k.b, k.place(), k.place()
        channels, rows, width, outer, inner, image_bytes = k.integers(6)
        scales, first, count = k.pointer(), k.address(Unit.LOGITS), k.field(Unit.COUNT)
        images = []
        for lane in range(self.lanes):
            exists = b.icmp_signed("<", k.number(lane), count)
            images.append(b.select(exists, k.at(first, b.mul(k.number(lane), image_bytes)), scratch))
        with k.loop(channels) as channel:
            scale = k.entry(scales, channel)
            with k.loop(rows) as row:
                line = k.at(source, b.add(b.mul(channel, outer), b.mul(row, inner)))
                before = b.mul(b.add(b.mul(channel, rows), row), width)

                def pixel(x: Value, lane: int, lanes: int, line: Value = line, scale: Value = scale) -> Value:
                    place = b.add(b.mul(x, k.number(4 * self.lanes)), k.number(4 * lane))
                    return b.fmul(k.load(k.at(line, place), vector(lanes)), k.splat(scale, lanes))

                def move(x: Value, pixels: int, before: Value = before, pixel: Any = pixel) -> None:
                    place = b.mul(b.add(before, x), k.number(4))
                    for lane in range(0, self.lanes, pixels):
                        found = transpose(k, [pixel(b.add(x, k.number(i)), lane, pixels) for i in range(pixels)])
                        for value, image in zip(found, images[lane : lane + pixels], strict=True):
                            k.store(value, k.at(image, place))

                k.along(width, (4,), move)


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
        """Pass over all rows with values that are carried from row to row: yield a row's lines and its turn."""
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

                k.along(walk.width, (self.lanes,), one)

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
    """out = max(x, 0) for the largest values of each image, the first of equal ones, and 0 for the others.

    The smallest kept value is found bit by bit, from the highest: a bit is set if enough values reach the result. With
    `tiles` each lane is an image, else the lanes are values of one. Arguments: those of a walk, then the number of
    kept values.
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
        """Store values above `least`, and the first `equals` values that are equal to it."""
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
