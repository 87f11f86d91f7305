"""A program whose values are rounded to bytes as tasks: every rounding is a task of its own or a layer's last step."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from ...errors import Unsupported
from .._program import Floats, Program, Rounding, Scale, Shape, Sparse
from .._spans import integer_spans, part_of
from ..kernels._fusion import Elementwise, FusedLayer, MaxPool, Move, Task, View, tasks_of

_MOST = 1 << 31
_OTHERS = "the network's activation scales are not those of the values that its layers read"


@dataclass(frozen=True, eq=False)
class Integers:
    """What a layer computes of bytes.

    result = round(pool(Σ weight · (input − zero) + bias) · factor + (residual − its zero) · other) + its zero, clamped
    to `low` and `high`. Without `result` these are floats, neither rounded nor moved nor clamped.

    Weights are whole numbers from -127 to 127, `bias` is int64, one for each output unit as `factor`, and products with
    `factor` and `other` are of float32.
    """

    weights: Sparse
    bias: NDArray[np.int64]
    factor: Floats
    source: Rounding
    result: Rounding | None
    residual: Rounding | None
    low: int
    high: int

    @property
    def other(self) -> np.float32:
        """Return the factor of the residual."""
        if self.residual is None or self.result is None:
            return np.float32(0)
        return np.float32(np.float64(self.residual.scale) / self.result.scale)

    @property
    def largest(self) -> NDArray[np.int64]:
        """Return what no sum's absolute value can exceed, for each output unit."""
        rows = np.repeat(np.arange(len(self.bias)), np.diff(self.weights.indptr))
        sums = np.bincount(rows, np.abs(self.weights.values), minlength=len(self.bias))
        found: NDArray[np.int64] = 2 * 255 * sums.astype(np.int64) + np.abs(self.bias)
        return found


@dataclass(frozen=True, eq=False)
class RoundedLayer(FusedLayer):
    """A layer that reads bytes."""

    integers: Integers | None = None


@dataclass(frozen=True, eq=False)
class Quantise(Move):
    """result is source in bytes: round(source · factor + shift), clamped; per channel, or one for all."""

    factor: Floats
    shift: Floats


@dataclass(frozen=True, eq=False)
class Dequantise(Move):
    """result is source in floats, (byte − zero) · scale."""

    rounding: Rounding


@dataclass(frozen=True, eq=False)
class RoundedPool(MaxPool):
    """result = max(max over windows of source, zero if `relu`), in bytes."""

    zero: int = 0


@dataclass(frozen=True, eq=False)
class FlatBytes(Move):
    """result is source, whose channels have several pixels, flattened, in bytes."""


@dataclass(frozen=True, eq=False)
class Rounded:
    """Tasks in order, the shapes of all values, and how those that are bytes were rounded."""

    tasks: list[Task]
    shapes: list[Shape]
    rounding: dict[int, Rounding]


def values_to_round(program: Program) -> list[int]:
    """Return the values that layers read, or rather those that pooling and flattening make them of."""
    tasks = tasks_of(program)
    producers = {task.result: task for task in tasks}
    found = set()
    for task in tasks:
        if isinstance(task, FusedLayer):
            read = [task.source] if task.residual is None else [task.source, task.residual]
            found |= {_root(value, producers) for value in read}
            if task.residual is not None and task.result < len(program.steps):
                found.add(task.result)
    return sorted(found)


def _root(value: int, producers: dict[int, Task]) -> int:
    """Return the layer's result that pooling and flattening make a value of, or else the value itself."""
    root = value
    while isinstance(task := producers.get(root), MaxPool | View):
        root = task.source
    return root if isinstance(producers.get(root), FusedLayer) else value


def rounded_values(program: Program) -> list[int]:
    """Return the values to round of a program that may have operations without a kernel."""
    if program.whole:
        return values_to_round(program)
    found = set()
    for span in integer_spans(program):
        own = values_to_round(part_of(program, span))
        found |= {span.start + value if value else span.source for value in own}
    return sorted(found)


def check_rounding(program: Program) -> None:
    """Raise Unsupported if a program with `rounding`, or a part of it, cannot be computed in integers."""
    if program.whole:
        rounded_tasks(program)
        return
    if set(rounded_values(program)) != set(program.rounding):
        raise Unsupported(_OTHERS)
    for span in integer_spans(program):
        rounded_tasks(part_of(program, span))


def rounded_tasks(program: Program) -> Rounded:
    """Return what a program with `rounding` computes; raise Unsupported if it cannot be computed in integers."""
    if set(values_to_round(program)) != set(program.rounding):
        raise Unsupported(_OTHERS)
    builder = _Builder(program)
    for task in tasks_of(program):
        builder.add(task)
    if len(program.steps) in builder.rounding:
        raise Unsupported("the network reads its logits again, which int8 kernels do not support")
    return Rounded(builder.tasks, builder.shapes, builder.rounding)


class _Builder:
    """Collect tasks, with a conversion where one needs bytes of what is in floats, or the other way."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.tasks: list[Task] = []
        self.shapes = list(program.shapes)
        self.rounding: dict[int, Rounding] = {}  # of values that are bytes
        self._bytes: dict[int, int] = {}  # of values in floats
        self._floats: dict[int, int] = {}  # of values in bytes

    def add(self, task: Task) -> None:
        match task:
            case FusedLayer():
                self._add_layer(task)
            case MaxPool() if task.source in self.rounding:
                self._share(task)
                zero = self.rounding[task.source].zero
                self.tasks.append(RoundedPool(task.op, task.source, task.result, task.relu, zero))
            case View() if task.source in self.rounding:
                self._share(task)
                several = math.prod(self.shapes[task.source][1:]) > 1
                self.tasks.append(FlatBytes(task.source, task.result) if several else task)
            case Elementwise() if task.other is not None:
                both = self.floats_of(task.source), self.floats_of(task.other)
                self.tasks.append(replace(task, source=both[0], other=both[1]))
            case _:
                self.tasks.append(replace(task, source=self.floats_of(task.source)))

    def _share(self, task: MaxPool | View) -> None:
        self.rounding[task.result] = self.rounding[task.source]

    def _new(self, like: int) -> int:
        self.shapes.append(self.shapes[like])
        return len(self.shapes) - 1

    def bytes_of(self, value: int) -> int:
        """Return the value in bytes."""
        if value in self.rounding:
            return value
        if value not in self._bytes:
            result = self._bytes[value] = self._new(value)
            rounding = self.rounding[result] = self.program.rounding[value]
            before, scale, source = self.tasks[-1] if self.tasks else None, None, value
            if isinstance(before, Elementwise) and before.result == value and self._only_scales(before):
                self.tasks.pop()
                scale, source = before.scale, before.source
            self.tasks.append(_quantise(source, result, scale, rounding))
        return self._bytes[value]

    def _only_scales(self, task: Elementwise) -> bool:
        """Return whether a task scales what one layer alone reads."""
        readers = sum(task.result in step.inputs for step in self.program.steps)
        return task.scale is not None and task.other is None and not task.relu and task.cap is None and readers == 1

    def floats_of(self, value: int) -> int:
        """Return the value in floats; what was rounded stays so."""
        if value not in self.rounding:
            if value in self.program.rounding:
                self.bytes_of(value)
                return self.floats_of(self._bytes[value])
            return value
        if value not in self._floats:
            self._floats[value] = self._new(value)
            self.tasks.append(Dequantise(value, self._floats[value], self.rounding[value]))
        return self._floats[value]

    def _add_layer(self, task: FusedLayer) -> None:
        source = self.bytes_of(task.source)
        residual = None if task.residual is None else self.bytes_of(task.residual)
        result = self.program.rounding.get(task.result)
        if residual is not None and result is None:
            raise Unsupported("the network's logits are a sum, which int8 kernels do not support")
        if result is not None:
            self.rounding[task.result] = result
        read = self.rounding[source], None if residual is None else self.rounding[residual]
        integers = integers_of(task, *read, result)
        self.tasks.append(
            RoundedLayer(task.op, source, task.result, task.pool, residual, task.relu, task.cap, integers)
        )


def _quantise(source: int, result: int, scale: Scale | None, rounding: Rounding) -> Quantise:
    """Return the task that rounds a value, scaled before if there is a scale."""
    factors = np.ones(1) if scale is None else scale.scale.astype(np.float64)
    shifts = np.zeros(1) if scale is None else scale.shift.astype(np.float64)
    factor, shift = factors / rounding.scale, shifts / rounding.scale + rounding.zero
    return Quantise(source, result, factor.astype(np.float32), shift.astype(np.float32))


def integers_of(task: FusedLayer, source: Rounding, residual: Rounding | None, result: Rounding | None) -> Integers:
    """Return what a layer computes; raise Unsupported if its sums may exceed 32 bits."""
    op = task.op
    lengths = np.diff(op.indptr)
    rows = np.repeat(np.arange(op.shape[0]), lengths)
    largest = np.zeros(op.shape[0], np.float32)
    np.maximum.at(largest, rows, np.abs(op.values))
    scale = np.where(largest > 0, largest.astype(np.float64) / 127, 1.0)
    weights = replace(op, values=np.rint(op.values / scale[rows]).astype(np.float32))
    unit = scale * source.scale
    with np.errstate(over="ignore", invalid="ignore"):
        bias = np.rint(op.bias / unit)
        factor = (unit / (1.0 if result is None else result.scale)).astype(np.float32)
    if not (np.isfinite(factor).all() and (np.abs(bias) < _MOST).all()):
        raise Unsupported("a layer's biases are too large for its weights: their sums do not fit in 32 bits")
    low, high = (0, 255) if result is None else _limits(task, result)
    found = Integers(weights, bias.astype(np.int64), factor, source, result, residual, low, high)
    if (found.largest >= _MOST).any():
        raise Unsupported("a layer's sums may exceed 32 bits; its activations cannot be rounded")
    return found


def _limits(task: FusedLayer, result: Rounding) -> tuple[int, int]:
    high = 255
    if task.cap is not None:
        high = int(min(255.0, np.rint(task.cap / result.scale) + result.zero))
    return (result.zero if task.relu else 0), high
