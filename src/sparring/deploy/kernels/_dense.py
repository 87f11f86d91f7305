"""Kernels of layers with few zeros: several rows share what they read; or a lane is a row, for outputs of few pixels.

Both add a row's products in the order of a Tile, so that a choice between them changes no bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from llvmlite import ir
from numpy.typing import NDArray

from .._program import Shape, Sparse
from ._abi import Table
from ._layout import Buffer, cover, offsets_of
from ._llvm_ir import FLOAT, INT32, INT64, Kernel, Spec, Value, vector
from ._matmul import Tile, aligned

_QUAD = 4  # floats that shuffles move fast on all processors


@dataclass(frozen=True)
class _Shared(Spec):
    """Base of kernels whose rows come in groups of `together`, which read the same places of the input.

    `chains` sums of each row take turns, as in a Tile that is unrolled.

    Arguments: input, output, residual, gate (offsets), tiles, groups of rows, of which only so many have weights, bytes
    from row to row in output, residual and gate, places, of which so many are in turns; the tiles' table (four offsets
    each), the rows of each group (int32), places (int32 bytes; one more than there are), weights (`together` floats of
    a place, group by group), biases (as many), mask (see Tile).
    """

    shares = True
    chains: int

    def emit(self, k: Kernel) -> None:
        b, together = k.b, self.together
        bases = [k.place() for _ in range(4)]
        tiles, groups, weighted, *row_bytes = k.integers(6)
        numbers = k.integers(2)
        table, rows, places, weights, biases, mask = (k.pointer() for _ in range(6))
        with k.shared(groups) as group:
            some = b.icmp_signed("<", group, weighted)
            count, turns = (b.select(some, number, k.number(0)) for number in numbers)
            own, first = b.mul(group, b.mul(numbers[0], k.number(4 * together))), b.mul(group, k.number(4 * together))
            line, chosen = k.at(weights, own), k.at(rows, first)
            with k.loop(tiles) as tile:
                offsets = [k.index(table, b.add(b.mul(tile, k.number(4)), k.number(i)), INT64) for i in range(4)]
                here, *outside = (k.at(base, offset) for base, offset in zip(bases, offsets, strict=True))
                add = self.adder(k, here, line, places)
                sums = self._sums(k, add, self.initial(k, k.at(biases, first)), count, turns)

                def lines(number: int, outside: list[Value] = outside, chosen: Value = chosen) -> list[Value]:
                    row = k.index(chosen, k.number(number), INT32)
                    return [k.at(place, b.mul(row, size)) for place, size in zip(outside, row_bytes, strict=True)]

                self.write(k, sums, lines, k.at(mask, offsets[1]))

    def _sums(
        self,
        k: Kernel,
        add: Callable[[Value, list[Value]], list[Value]],
        first: list[Value],
        count: Value,
        turns: Value,
    ) -> list[Value]:
        each = len(first)
        zeros = [ir.Constant(first[0].type, None)] * (each * (self.chains - 1))
        with k.carry(turns, [*first, *zeros], step=self.chains) as turn:
            parts = [turn.values[i : i + each] for i in range(0, len(turn.values), each)]
            added = [add(k.b.add(turn.number, k.number(i)), part) for i, part in enumerate(parts)]
            turn.values = [total for part in added for total in part]
        sums = turn.values[:each]
        for i in range(each, len(turn.values), each):
            sums = [k.b.fadd(*two) for two in zip(sums, turn.values[i : i + each], strict=True)]
        if self.chains > 1:
            with k.carry(count, sums, start=turns) as turn:
                turn.values = add(turn.number, turn.values)
            sums = turn.values
        return sums

    @property
    def together(self) -> int:
        """Return the rows of a group."""
        raise AssertionError(f"{type(self).__name__} does not say how many rows a group has")

    def initial(self, k: Kernel, biases: Value) -> list[Value]:
        """Return what the sums of a group begin with."""
        raise AssertionError(f"{type(self).__name__} does not say what its sums begin with")

    def adder(self, k: Kernel, here: Value, weights: Value, places: Value) -> Callable[..., list[Value]]:
        """Return a function that adds the products at a place, by its number, to the sums."""
        raise AssertionError(f"{type(self).__name__} does not say how it adds")

    def write(self, k: Kernel, sums: list[Value], lines: Callable[[int], list[Value]], bits: Value) -> None:
        """Store sums; lines: where a row of the group begins in output, residual and gate."""
        raise AssertionError(f"{type(self).__name__} does not say how it stores")


@dataclass(frozen=True)
class Block(_Shared):
    """A Tile of `height` rows at once: what is read of a place is multiplied with the weights of all of them."""

    tile: Tile
    height: int

    @property
    def together(self) -> int:
        return self.height

    def initial(self, k: Kernel, biases: Value) -> list[Value]:
        rows = [k.splat(k.load(k.at(biases, 4 * i), FLOAT), self.tile.lanes) for i in range(self.height)]
        return [row for row in rows for _ in self.tile.reads]

    def adder(self, k: Kernel, here: Value, weights: Value, places: Value) -> Callable[..., list[Value]]:
        lanes = self.tile.lanes

        def add(number: Value, sums: list[Value]) -> list[Value]:
            point = k.at(here, k.index(places, number, INT32))
            line = k.at(weights, k.b.mul(number, k.number(4 * self.height)))
            loaded = [k.load(k.at(point, read), vector(lanes)) for read in self.tile.reads]
            factors = [k.splat(k.load(k.at(line, 4 * i), FLOAT), lanes) for i in range(self.height)]
            both = [(factor, value) for factor in factors for value in loaded]
            return [k.multiply_add(*two, total) for two, total in zip(both, sums, strict=True)]

        return add

    def write(self, k: Kernel, sums: list[Value], lines: Callable[[int], list[Value]], bits: Value) -> None:
        count = len(self.tile.reads)
        for row in range(self.height):
            self.tile.finish(k, sums[row * count : (row + 1) * count], bits, *lines(row))


@dataclass(frozen=True)
class Columns(_Shared):
    """out[row] = min(relu(Σ weight · in + bias + residual), cap), `wide` vectors of rows at once, pixel by pixel.

    A lane is a row: pixels are read one by one at `reads`, written at `writes` and the residual is read at `others`,
    all in bytes.
    """

    lanes: int
    wide: int
    reads: tuple[int, ...]
    writes: tuple[int, ...]
    others: tuple[int, ...] = ()
    relu: bool = False
    cap: float | None = None

    @property
    def together(self) -> int:
        return self.lanes * self.wide

    def initial(self, k: Kernel, biases: Value) -> list[Value]:
        found = [k.load(k.at(biases, 4 * self.lanes * i), vector(self.lanes)) for i in range(self.wide)]
        return [value for value in found for _ in self.reads]

    def adder(self, k: Kernel, here: Value, weights: Value, places: Value) -> Callable[..., list[Value]]:
        def add(number: Value, sums: list[Value]) -> list[Value]:
            line = k.at(weights, k.b.mul(number, k.number(4 * self.together)))
            factors = [k.load(k.at(line, 4 * self.lanes * i), vector(self.lanes)) for i in range(self.wide)]
            point = k.at(here, k.index(places, number, INT32))
            loaded = [k.splat(k.load(k.at(point, read), FLOAT), self.lanes) for read in self.reads]
            both = [(factor, value) for factor in factors for value in loaded]
            return [k.multiply_add(*two, total) for two, total in zip(both, sums, strict=True)]

        return add

    def write(self, k: Kernel, sums: list[Value], lines: Callable[[int], list[Value]], bits: Value) -> None:
        for row in range(self.together):
            target, other, _ = lines(row)
            for at, value in self._pixels(k, sums, row):
                if self.others:
                    value = k.b.fadd(value, k.load(k.at(other, self.others[at]), value.type))
                value = k.capped(k.relu(value) if self.relu else value, self.cap)
                k.store(value, k.at(target, self.writes[at]))

    def _pixels(self, k: Kernel, sums: list[Value], row: int) -> list[tuple[int, Value]]:
        """Return the pixels of a row, where possible four neighbours as one vector, each with the first one's number.

        Shuffles that another row needs too are written twice: the compiler merges them.
        """
        count, (number, lane) = len(self.reads), divmod(row, self.lanes)
        pixels, found, at = sums[number * count : (number + 1) * count], [], 0
        while at < count:
            near = self.writes[at : at + _QUAD] == tuple(self.writes[at] + 4 * i for i in range(_QUAD))
            value = _quad(k, pixels[at : at + _QUAD], lane) if near else None
            found.append((at, k.b.extract_element(pixels[at], ir.Constant(INT32, lane)) if value is None else value))
            at += _QUAD if near else 1
        return found


def _quad(k: Kernel, pixels: list[Value], lane: int) -> Value:
    """Return a vector of what four vectors hold in one lane."""
    lanes, start = pixels[0].type.count, lane // _QUAD * _QUAD

    def pick(first: Value, second: Value, order: tuple[int, ...]) -> Value:
        every = [at % 4 + block + lanes * (at // 4) for block in range(0, lanes, _QUAD) for at in order]
        return k.shuffle(first, second, every)

    inner = (2, 6, 3, 7) if lane % 4 > 1 else (0, 4, 1, 5)
    pairs = [pick(pixels[i], pixels[i + 1], inner) for i in (0, 2)]
    mixed = pick(pairs[0], pairs[1], (2, 3, 6, 7) if lane % 2 else (0, 1, 4, 5))
    return k.shuffle(mixed, mixed, range(start, start + _QUAD))


def is_full(op: Sparse, share: float) -> bool:
    """Return whether at least a share of a layer's weights are not zero, or all of each row that has some."""
    kept, whole = np.diff(op.indptr), math.prod(op.shape[1:])
    return bool(op.nonzeros >= share * op.shape[0] * whole or ((kept == 0) | (kept == whole)).all())


def shared_tables(
    op: Sparse, source: Buffer, shape: Shape, together: int, chains: int
) -> tuple[list[int], tuple[Table, ...]]:
    """Return a kernel's numbers and tables: groups, those with weights, places, and turns; then rows to biases.

    shape: of the output. Weights that multiply only the zeros around the input are left out. Rows without weights come
    last; the last two groups may share rows.
    """
    columns, turned = _columns(op, _reads(op, source, shape), chains)
    kept = np.diff(op.indptr) > 0
    order = np.argsort(~kept, kind="stable")
    groups = np.array(cover(op.shape[0], together))[:, None] + np.arange(together)  # of numbers in that order
    weighted = int((groups[:, 0] < kept.sum()).sum())
    dense = np.zeros((groups[weighted - 1, -1] + 1 if weighted else 0, math.prod(op.shape[1:])), np.float32)
    dense[np.repeat(np.argsort(order), np.diff(op.indptr)), op.indices] = op.values
    weights = aligned((max(1, weighted * len(columns)), together))
    found = np.where(columns < 0, np.float32(0), dense[:, columns])[groups[:weighted]]
    weights[: weighted * len(columns)] = found.transpose(0, 2, 1).reshape(-1, together)
    rows = order[groups]
    places = np.where(columns < 0, 0, offsets_of(replace(op, indices=columns.astype(np.int32)), source, False))
    tables = (rows.astype(np.int32), np.append(places, 0).astype(np.int32), weights, op.bias[rows])
    return [len(rows), weighted, len(columns), turned], tables


def _columns(op: Sparse, reads: NDArray[np.bool_], chains: int) -> tuple[NDArray[np.int64], int]:
    """Return the columns of the weights in the order of their products (-1: none), and how many are in turns.

    Those that are not read are left out, except where a turn would then miss one.
    """
    every = np.arange(len(reads))
    whole = len(every) // chains * chains
    turns = [every[i:whole:chains][reads[i:whole:chains]] for i in range(chains)]
    most = max(len(turn) for turn in turns)
    columns = np.full((most, chains), -1)
    for i, turn in enumerate(turns):
        columns[: len(turn), i] = turn
    return np.append(columns, every[whole:][reads[whole:]]), most * chains


def _reads(op: Sparse, source: Buffer, shape: Shape) -> NDArray[np.bool_]:
    """Return which columns of the weights multiply at least one pixel of the input."""
    found: list[NDArray[np.bool_]] = []
    for axis in (0, 1):
        taps, places = np.arange(op.shape[2 + axis])[:, None], np.arange(shape[1 + axis])
        at = places * op.stride[axis] + taps * op.dilation[axis] - op.padding[axis]
        inside: NDArray[np.bool_] = (at >= 0) & (at < source.shape[1 + axis] * source.phases[axis])
        found.append(np.logical_or.reduce(inside, 1))
    return np.tile((found[0][:, None] & found[1]).ravel(), op.shape[1])
