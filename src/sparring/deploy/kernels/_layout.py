"""Memory layouts of values, and how the output of a layer is split into tiles of vectors."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .._program import Pair, Shape, Sparse

ALIGNED = 64  # bytes: a vector at a multiple is within one cache line


@dataclass(frozen=True)
class Buffer:
    """A value in the arena: channels of rows of pixels of `lanes` floats, with zeros around.

    `origin` is the offset in bytes of pixel (0, 0) of channel 0, or -1 - offset if it counts from the start of a unit's
    own memory. With a `step` the value's pixels are that far apart, with zeros between them that `shape` counts too: a
    strided convolution's gradient then has no stride. With `phases` each channel is split, one part for each
    remainder of row and column: a strided convolution then reads neighbours.
    """

    shape: tuple[int, int, int]
    pad: Pair
    lanes: int
    origin: int = 0
    step: Pair = (1, 1)
    phases: Pair = (1, 1)
    align: int = 4  # bytes: each channel starts at a multiple

    @property
    def pixel(self) -> int:
        """Return the bytes from pixel to pixel."""
        return 4 * self.lanes

    @property
    def inner(self) -> int:
        """Return the bytes from row to row; the zeros at a row's end are those before the next."""
        return (self.shape[2] + self.pad[1]) * self.pixel

    @property
    def outer(self) -> int:
        """Return the bytes from channel to channel."""
        return -(-(self.shape[1] + self.pad[0]) * self.inner // self.align) * self.align

    @property
    def strides(self) -> tuple[int, int, int]:
        """Return the bytes from channel to channel, and from row to row and column to column of the value itself."""
        return self.outer, self.inner * self.step[0], self.pixel * self.step[1]

    @property
    def before(self) -> int:
        """Return the bytes of zeros before the first pixel."""
        return self.pad[0] * self.inner + self.pad[1] * self.pixel

    @property
    def size(self) -> int:
        """Return the bytes it takes with the zeros around, and two vectors that may be read beyond its end."""
        end = self.before + self.shape[0] * self.outer + self.pad[0] * self.inner + self.pad[1] * self.pixel
        return -(-(end + 128) // 64) * 64

    @property
    def whole(self) -> bool:
        """Return whether its floats have no gaps, so that it can be read as one row."""
        return self.pad == (0, 0) and self.step == (1, 1) and self.outer == self.shape[1] * self.inner


def offsets_of(op: Sparse, source: Buffer, flat: bool) -> NDArray[np.int64]:
    """Return where each nonzero of a layer reads, in bytes from the input pixel of its output pixel."""
    columns = op.indices.astype(np.int64)
    if flat:
        channel, pixel = np.divmod(columns, source.shape[1] * source.shape[2])
        y, x = np.divmod(pixel, source.shape[2])
    else:
        channel, tap = np.divmod(columns, op.shape[2] * op.shape[3])
        y, x = np.divmod(tap, op.shape[3])
        y, phase_y = np.divmod(y * op.dilation[0] - op.padding[0], source.phases[0])
        x, phase_x = np.divmod(x * op.dilation[1] - op.padding[1], source.phases[1])
        channel = (channel * source.phases[0] + phase_y) * source.phases[1] + phase_x
    result: NDArray[np.int64] = channel * source.outer + y * source.inner + x * source.pixel
    return result


@dataclass(frozen=True)
class Cut:
    """A layer's output as tiles: the accumulators of one tile (row, column in input pixels), and where each starts.

    `groups` are the accumulators behind each stored vector, `stored` its place (row, column in output pixels);
    `starts` are the output pixels at which tiles begin. With `joined` all rows and the zeros between them are one.
    """

    lanes: int
    read: tuple[Pair, ...]
    groups: tuple[tuple[int, ...], ...]
    stored: tuple[Pair, ...]
    starts: tuple[Pair, ...]
    halve: bool = False
    joined: bool = False


def cover(length: int, part: int) -> list[int]:
    """Return starts of parts that cover a length which is at least as long as a part; the last two may overlap."""
    return [*range(0, length - part, part), length - part]


def _grids(height: int, width: int, most: int, apart: bool) -> Iterator[tuple[float, int, int]]:
    for rows in range(1, min(height, most) + 1):
        for columns in range(1, min(width, most // rows) + 1):
            if apart and (height % rows or width % columns):
                continue
            tiles = len(cover(height, rows)) * len(cover(width, columns))
            # A tile costs its pixels and a little more; then prefer square ones, which read fewer pixels around them.
            yield tiles * (rows * columns + 1.5) + 0.01 * abs(rows - columns), rows, columns


def cut_tiles(shape: Shape, stride: Pair, pool: int, lanes: int, most: int, *, apart: bool = False) -> Cut:
    """Cut an output (channels, height, width) whose pixels are vectors of images into tiles of `most` accumulators.

    Tiles may overlap, unless they must be `apart` because they add to existing values.
    """
    _, rows, columns = min(_grids(shape[1], shape[2], max(1, most // pool**2), apart))
    cells = [(r, c) for r in range(rows) for c in range(columns)]
    read = [(y * stride[0], x * stride[1]) for y in range(rows * pool) for x in range(columns * pool)]
    across = columns * pool
    groups = [tuple((r * pool + y) * across + c * pool + x for y in range(pool) for x in range(pool)) for r, c in cells]
    starts = [(y, x) for y in cover(shape[1], rows) for x in cover(shape[2], columns)]
    return Cut(lanes, tuple(read), tuple(groups), tuple(cells), tuple(starts))


def cut_planes(shape: Shape, stride: Pair, pool: int, lanes: int, most: int) -> Cut | None:
    """Cut an output whose vectors are neighbouring pixels; None if no row is as long as a vector.

    A stride of 2 computes every pixel of a row and stores every second; so does a pooling of 2.
    """
    step = stride[1] * pool
    width = shape[2] * step
    if step > 2 or width < lanes:
        return None
    across = cover(width, lanes)
    if len(across) * pool > most:
        across = [i * lanes for i in range(max(1, most // pool))]
    rows = max(1, min(shape[1], most // (len(across) * pool)))
    read = [(y * stride[0], x) for y in range(rows * pool) for x in across]
    groups = [
        tuple((r * pool + y) * len(across) + i for y in range(pool)) for r in range(rows) for i in range(len(across))
    ]
    stored = [(r, x // step) for r in range(rows) for x in across]
    span = across[-1] + lanes
    starts = [(y, x // step) for y in cover(shape[1], rows) for x in cover(width, span)]
    return Cut(lanes, tuple(read), tuple(groups), tuple(stored), tuple(starts), halve=step == 2)


def cut_joined(length: int, lanes: int, most: int) -> Cut:
    """Cut an output whose rows, with the zeros between them, are one, no shorter than a vector."""
    vectors = -(-length // lanes)
    across = -(-vectors // -(-vectors // most))
    read = cover(length, lanes) if across == vectors else [i * lanes for i in range(across)]
    starts = [0] if across == vectors else cover(length, across * lanes)
    places = tuple((0, x) for x in read)
    return Cut(lanes, places, tuple((i,) for i in range(across)), places, tuple((0, x) for x in starts), joined=True)


def split_of(op: Sparse, shape: Shape, computed: Pair, pitch: int) -> Buffer:
    """Return where a strided convolution reads its input, of `shape`, sorted by row and column modulo the stride.

    `computed`: rows and columns of its output. Rows are `pitch` pixels long, or longer if zeros between them need it.
    """
    sides, pads = [], []
    for axis in (0, 1):
        side, before = -(-shape[axis + 1] // op.stride[axis]), -(-op.padding[axis] // op.stride[axis])
        reach = op.dilation[axis] * (op.shape[axis + 2] - 1) - op.padding[axis]
        after = computed[axis] + reach // op.stride[axis] - side
        sides.append(side)
        pads.append(max(before, after, 0))
    pads[1] = max(pads[1], pitch - sides[1])
    channels = shape[0] * op.stride[0] * op.stride[1]
    return Buffer((channels, sides[0], sides[1]), (pads[0], pads[1]), 1, phases=op.stride, align=ALIGNED)


def phases_of(op: Sparse) -> tuple[Pair, ...]:
    """Return the remainders of row and column, by its stride, that a convolution reads."""
    rows, columns = (
        sorted({(i * op.dilation[a] - op.padding[a]) % op.stride[a] for i in range(op.shape[a + 2])}) for a in (0, 1)
    )
    return tuple((y, x) for y in rows for x in columns)
