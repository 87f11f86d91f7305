"""Fuse pooling, residual sums and ReLU of a program into the layers before them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from .._program import Add, Flatten, Op, PackedActivation, Pool, Program, ReLU, Scale, Shape, Snap, Sparse


@dataclass(frozen=True, eq=False)
class FusedLayer:
    """result = relu(pool(op(source)) + residual), where the later parts are optional."""

    op: Sparse
    source: int
    result: int
    pool: bool = False  # by 2 × 2
    residual: int | None = None
    relu: bool = False


@dataclass(frozen=True, eq=False)
class Elementwise:
    """result = relu(source · scale + shift + other), where the parts are optional."""

    source: int
    result: int
    scale: Scale | None = None
    other: int | None = None
    relu: bool = False


@dataclass(frozen=True, eq=False)
class MaxPool:
    """result = relu(max over windows of source)."""

    op: Pool
    source: int
    result: int
    relu: bool = False


@dataclass(frozen=True, eq=False)
class View:
    """result is source, flattened."""

    source: int
    result: int


@dataclass(frozen=True, eq=False)
class Sparsify:
    """result is what activation sparsity leaves of source; `relu`: its slope is 1 where it is above zero, else 0."""

    op: PackedActivation | Snap
    source: int
    result: int

    @property
    def relu(self) -> bool:
        return isinstance(self.op, PackedActivation)


Task = FusedLayer | Elementwise | MaxPool | Sparsify | View


def tasks_of(program: Program, *, pools: bool = True) -> list[Task]:
    """Return the program as tasks in order.

    Without `pools`, pooling stays apart from layers, so that what it pools is kept.
    """
    shapes = program.shapes
    readers: dict[int, list[int]] = {}
    for number, step in enumerate(program.steps):
        for source in step.inputs:
            readers.setdefault(source, []).append(number)
    tasks: list[Task] = []
    fused: set[int] = set()
    for number, step in enumerate(program.steps):
        if number in fused:
            continue
        task = _task(step.op, step.inputs, number + 1, shapes)
        while True:
            following = readers.get(task.result, [])
            wider = None
            if len(following) == 1:
                reader = program.steps[following[0]]
                others = [i for i in reader.inputs if i != task.result]
                pooled = isinstance(reader.op, Pool)
                wider = (
                    None if pooled and not pools else _absorb(task, reader.op, following[0] + 1, others, number, shapes)
                )
            if wider is None:
                break
            fused.add(following[0])
            task = wider
        tasks.append(task)
    return tasks


def _task(op: Op, inputs: tuple[int, ...], result: int, shapes: list[Shape]) -> Task:
    match op:
        case Sparse():
            return FusedLayer(op, inputs[0], result)
        case Pool(mean=True):
            return FusedLayer(_mean_as_layer(op, shapes[inputs[0]][0]), inputs[0], result)
        case Pool():
            return MaxPool(op, inputs[0], result)
        case Flatten():
            return View(inputs[0], result)
        case Scale():
            return Elementwise(inputs[0], result, scale=op)
        case Add():
            return Elementwise(inputs[0], result, other=inputs[1])
        case Snap():
            return Sparsify(op, inputs[0], result)
        case PackedActivation() if op.kind != "shifted-relu":
            return Sparsify(op, inputs[0], result)
        case PackedActivation():  # max(x − threshold, 0)
            channels = shapes[inputs[0]][0]
            shift = Scale(np.ones(channels, np.float32), np.full(channels, -op.number, np.float32))
            return Elementwise(inputs[0], result, scale=shift, relu=True)
    return Elementwise(inputs[0], result, relu=True)


def _mean_as_layer(op: Pool, channels: int) -> Sparse:
    """Spell a mean over windows as a sparse convolution: it then needs no kernel of its own."""
    window = op.kernel[0] * op.kernel[1]
    indices = np.arange(channels * window, dtype=np.int32)
    values = np.full(channels * window, 1 / window, np.float32)
    starts = np.arange(channels + 1, dtype=np.int32) * window
    shape = (channels, channels, *op.kernel)
    return Sparse(shape, starts, indices, values, np.zeros(channels, np.float32), stride=op.stride)


def _absorb(task: Task, op: Op, result: int, others: list[int], number: int, shapes: list[Shape]) -> Task | None:
    """Return the task that also does the step which alone reads its result, or None if it cannot."""
    match op:
        case ReLU() if not isinstance(task, View | Sparsify) and not task.relu:
            return replace(task, result=result, relu=True)
        case Add() if isinstance(task, FusedLayer) and len(others) == 1 and others[0] <= number:
            if not (task.relu or task.pool or task.residual is not None):
                return replace(task, result=result, residual=others[0])
        case Pool() if isinstance(task, FusedLayer) and task.residual is None and not task.pool:
            if _halves(op, shapes[task.result]):
                return replace(task, result=result, pool=True)
    return None


def _halves(op: Pool, shape: Shape) -> bool:
    plain = op.padding == (0, 0) and op.dilation == (1, 1) and not op.mean
    whole = not op.ceil_mode or (shape[1] % 2 == 0 and shape[2] % 2 == 0)
    return plain and whole and op.kernel == op.stride == (2, 2)
