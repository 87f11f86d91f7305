"""Kernels that convert values to bytes and back, flatten them, and pool them.

A byte is round(x · factor + shift), clamped to 0 … 255; factors and shifts are one per channel, or one for all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from llvmlite import ir

from .._elementwise import PoolMax, transpose
from .._llvm_ir import BYTE, FLOAT, INT32, INT64, Kernel, Spec, Unit, Value, vector
from . import _arithmetic as integer


def _byte(k: Kernel, way: str, value: Value, factor: Value, shift: Value) -> Value:
    """Return floats as integers from 0 to 255."""
    b, lanes = k.b, integer.lanes_of(value)
    value = b.fadd(b.fmul(value, k.splat(factor, lanes)), k.splat(shift, lanes))
    most = k.splat(ir.Constant(FLOAT, 255.0), lanes)
    value = b.select(b.fcmp_ordered("<", value, most), value, most)
    whole, zero = integer.rounded(k, way, value, far=False), integer.constant(0, lanes)
    return b.select(b.icmp_signed(">", whole, zero), whole, zero)


def _joined(k: Kernel, parts: list[Value]) -> Value:
    """Return up to four bytes side by side in each lane."""
    value = parts[0]
    for number, part in enumerate(parts[1:], 1):
        value = k.b.or_(value, k.b.shl(part, integer.constant(8 * number, integer.lanes_of(part))))
    return value


def _fours(k: Kernel, channels: int, body: Callable[[Value, int], None]) -> None:
    """Run body(number, 4) for each whole group of four channels, then body(number, rest) for those that are left."""
    with k.loop(channels // 4) as number:
        body(number, 4)
    if channels % 4:
        body(k.number(channels // 4), channels % 4)


@dataclass(frozen=True)
class Quantise(Spec):
    """Bring the rows of `channels` channels into bytes, four channels in a lane; the input may be the image.

    Arguments: input, output (offsets), rows, floats in a row, then for each of the two the bytes from channel (of the
    output: from four channels) to the next and from row to row, factors, shifts.
    """

    lanes: int
    way: str
    channels: int
    image: bool = False

    def emit(self, k: Kernel) -> None:
        b, (source, target) = k.b, (k.place(), k.place())
        source = k.address(Unit.IMAGES) if self.image else source
        rows, width = k.integers(2)
        steps, tables = (k.integers(2), k.integers(2)), (k.pointer(), k.pointer())

        def four(number: Value, count: int) -> None:
            channels = [b.add(b.mul(number, k.number(4)), k.number(j)) for j in range(count)]
            numbers = [[k.entry(table, channel) for table in tables] for channel in channels]
            with k.loop(rows) as row:
                lines = [k.at(source, b.add(b.mul(c, steps[0][0]), b.mul(row, steps[0][1]))) for c in channels]
                written = k.at(target, b.add(b.mul(number, steps[1][0]), b.mul(row, steps[1][1])))

                def one(x: Value, lanes: int) -> None:
                    at = b.mul(x, k.number(4))
                    loaded = [k.load(k.at(line, at), vector(lanes)) for line in lines]
                    parts = [_byte(k, self.way, value, *two) for value, two in zip(loaded, numbers, strict=True)]
                    k.store(_joined(k, parts), k.at(written, at))

                k.along(width, (self.lanes,), one)

        _fours(k, self.channels, four)


@dataclass(frozen=True)
class QuantiseFlat(Spec):
    """Bring neighbouring floats into neighbouring bytes; the input may be the image.

    Arguments: input, output (offsets), floats, factor, shift (tables of one).
    """

    lanes: int
    way: str
    image: bool = False

    def emit(self, k: Kernel) -> None:
        b, (source, target) = k.b, (k.place(), k.place())
        source = k.address(Unit.IMAGES) if self.image else source
        width = k.integer()
        numbers = [k.load(k.pointer(), FLOAT) for _ in range(2)]

        def one(x: Value, lanes: int) -> None:
            value = _byte(k, self.way, k.load(k.at(source, b.mul(x, k.number(4))), vector(lanes)), *numbers)
            narrow = b.trunc(value, BYTE if lanes == 1 else ir.VectorType(BYTE, lanes))
            b.store(narrow, k.at(target, x), align=1)

        k.along(width, (self.lanes,), one)


@dataclass(frozen=True)
class QuantiseTiles(Spec):
    """Bring as many images as there are lanes into bytes, one image in each lane; `flat`: neighbours side by side.

    Lanes without an image repeat the last one. Unless `flat`, a lane has four channels of a pixel. `channels`: those of
    an image, floats of a flat one. `wide`: floats that are rounded at once. Arguments: output (offset), rows, floats in
    a row, bytes from four channels to the next and from row to row in the output, bytes of an image, factors, shifts.
    """

    lanes: int
    wide: int
    way: str
    channels: int
    flat: bool = False

    def emit(self, k: Kernel) -> None:
        b, target = k.b, k.place()
        rows, width, outer, inner, image_bytes = k.integers(5)
        tables = k.pointer(), k.pointer()
        images = k.images(self.lanes, image_bytes)
        if self.flat:
            self._flat(k, images, target, [k.load(table, FLOAT) for table in tables])
            return

        def four(number: Value, count: int) -> None:
            channels = [b.add(b.mul(number, k.number(4)), k.number(j)) for j in range(count)]
            numbers = [[k.entry(table, channel) for table in tables] for channel in channels]
            with k.loop(rows) as row:
                lines = [b.mul(b.add(b.mul(channel, rows), row), width) for channel in channels]
                written = k.at(target, b.add(b.mul(number, outer), b.mul(row, inner)))

                def some(x: Value, side: int) -> None:
                    self._pixels(k, images, written, x, lines, numbers, side)

                k.along(width, (self.wide, 4), some)

        _fours(k, self.channels, four)

    def _pixels(
        self,
        k: Kernel,
        images: list[Value],
        target: Value,
        x: Value,
        lines: list[Value],
        numbers: list[list[Value]],
        count: int,
    ) -> None:
        """Move `count` pixels from x on of up to four channels, which begin at `lines` of an image's floats."""
        b = k.b
        places = [b.mul(b.add(line, x), k.number(4)) for line in lines]

        def of(image: Value) -> Value:
            loaded = [k.load(k.at(image, place), vector(count)) for place in places]
            return _joined(k, [_byte(k, self.way, v, *two) for v, two in zip(loaded, numbers, strict=True)])

        self._spread(k, images, of, k.at(target, b.mul(x, k.number(4 * self.lanes))), count)

    def _spread(self, k: Kernel, images: list[Value], of: Callable[[Value], Value], target: Value, count: int) -> None:
        """Store `count` lanes of each image as lanes of as many vectors of images."""
        side = min(count, 4)
        for lane in range(0, self.lanes, side):
            values = [of(image) for image in images[lane : lane + side]]
            for part in range(0, count, side):
                order = range(part, part + side)
                parts = values if count == side else [k.shuffle(value, value, order) for value in values]
                for number, value in enumerate(transpose(k, parts), part):
                    k.store(value, k.at(target, 4 * (number * self.lanes + lane)))

    def _flat(self, k: Kernel, images: list[Value], target: Value, numbers: list[Value]) -> None:
        b, wide = k.b, self.wide
        whole = self.channels // wide * wide

        def packed(image: Value, x: Value, lanes: int) -> Value:
            """Return neighbours as integers of four bytes each."""
            bytes_ = _byte(k, self.way, k.load(k.at(image, b.mul(x, k.number(4))), vector(lanes)), *numbers)
            kind = ir.VectorType(INT32, lanes // 4) if lanes > 4 else INT32
            return b.bitcast(b.trunc(bytes_, ir.VectorType(BYTE, lanes)), kind)

        with k.loop(whole, wide) as x:
            there = k.at(target, b.mul(x, k.number(self.lanes)))
            self._spread(k, images, lambda image: packed(image, x, wide), there, wide // 4)
        with k.carry(self.channels // 4 * 4, step=4, start=whole) as turn:
            self._spread(
                k, images, lambda image: packed(image, turn.number, 4),
                k.at(target, b.mul(turn.number, k.number(self.lanes))), 1,
            )  # fmt: skip
        for number in range(self.channels // 4 * 4, self.channels):
            for lane, image in enumerate(images):
                value = b.trunc(_byte(k, self.way, k.load(k.at(image, 4 * number), FLOAT), *numbers), BYTE)
                place = number // 4 * 4 * self.lanes + 4 * lane + number % 4
                b.store(value, k.at(target, place), align=1)


@dataclass(frozen=True)
class Dequantise(Spec):
    """Bring bytes back into floats, (byte − zero) · scale, a row for each of `channels` channels.

    Arguments: input, output (offsets), rows, floats in a row, then for each of the two the bytes from channel (of the
    input: from four channels) to the next and from row to row, scale (a table of one).
    """

    lanes: int
    channels: int
    zero: int

    def emit(self, k: Kernel) -> None:
        b, (source, target) = k.b, (k.place(), k.place())
        rows, width = k.integers(2)
        steps, scale = (k.integers(2), k.integers(2)), k.load(k.pointer(), FLOAT)

        def four(number: Value, count: int) -> None:
            with k.loop(rows) as row:
                read = k.at(source, b.add(b.mul(number, steps[0][0]), b.mul(row, steps[0][1])))
                channels = [b.add(b.mul(number, k.number(4)), k.number(j)) for j in range(count)]
                lines = [k.at(target, b.add(b.mul(c, steps[1][0]), b.mul(row, steps[1][1]))) for c in channels]

                def one(x: Value, lanes: int) -> None:
                    at = b.mul(x, k.number(4))
                    found = k.load(k.at(read, at), integer.quads(lanes))
                    for byte, line in enumerate(lines):
                        whole = b.sub(integer.byte_of(k, found, byte), integer.constant(self.zero, lanes))
                        k.store(b.fmul(integer.floats(k, whole), k.splat(scale, lanes)), k.at(line, at))

                k.along(width, (self.lanes,), one)

        _fours(k, self.channels, four)


@dataclass(frozen=True)
class Flat(Spec):
    """Flatten bytes: four features in a lane, each from a place of its own.

    Arguments: input, output (offsets), lanes of the output (each of `lanes` images), places of the features: their
    lane's offset and the bits before them, int64 each.
    """

    lanes: int

    def emit(self, k: Kernel) -> None:
        b, source, target = k.b, k.place(), k.place()
        count, table = k.integer(), k.pointer()
        with k.loop(count) as number:
            parts = []
            for byte in range(4):
                place = b.add(b.mul(number, k.number(8)), k.number(2 * byte))
                value = k.load(k.at(source, k.index(table, place, INT64)), integer.quads(self.lanes))
                bits = b.trunc(k.index(table, b.add(place, k.number(1)), INT64), INT32)
                shifted = b.lshr(value, k.splat(bits, self.lanes))
                parts.append(b.and_(shifted, integer.constant(255, self.lanes)))
            k.store(_joined(k, parts), k.at(target, b.mul(number, k.number(4 * self.lanes))))


@dataclass(frozen=True)
class FlatRows(Spec):
    """Flatten the bytes of one image: those of a channel's pixels side by side.

    Arguments: input, output (offsets), rows, pixels in a row, bytes from four channels to the next and from row to row
    of the input.
    """

    channels: int

    def emit(self, k: Kernel) -> None:
        b, source, target = k.b, k.place(), k.place()
        rows, width, outer, inner = k.integers(4)
        plane = b.mul(rows, width)

        def four(number: Value, count: int) -> None:
            first = k.at(target, b.mul(number, b.mul(plane, k.number(4))))
            lines = [k.at(first, b.mul(plane, k.number(j))) for j in range(count)]
            with k.loop(rows) as row:
                read = k.at(source, b.add(b.mul(number, outer), b.mul(row, inner)))

                def move(x: Value, pixels: int) -> None:
                    found = k.load(k.at(read, b.mul(x, k.number(4))), ir.VectorType(BYTE, 4 * pixels))
                    for channel, line in enumerate(lines):
                        part = k.shuffle(found, found, range(channel, 4 * pixels, 4))
                        b.store(part, k.at(line, b.add(b.mul(row, width), x)), align=1)

                k.along(width, (4,), move)

        _fours(k, self.channels, four)


@dataclass(frozen=True)
class QuadPool(PoolMax):
    """The maximum of bytes over windows; `zero` is their zero point."""

    zero: int = 0

    def kind(self, lanes: int) -> object:
        return integer.quads(lanes)

    def least(self, k: Kernel) -> Value:
        return integer.constant(0, self.lanes)

    def larger(self, k: Kernel, first: Value, second: Value) -> Value:
        kind = ir.VectorType(BYTE, 4 * integer.lanes_of(first))
        one, other = k.b.bitcast(first, kind), k.b.bitcast(second, kind)
        return k.b.bitcast(k.b.select(k.b.icmp_unsigned(">", one, other), one, other), first.type)

    def rectified(self, k: Kernel, value: Value) -> Value:
        bits = self.zero * 0x01010101
        least = integer.constant(bits - (1 << 32) if bits >> 31 else bits, integer.lanes_of(value))
        return self.larger(k, value, least)
