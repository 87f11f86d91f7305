"""Fuse pooling, residual sums and ReLU of a program into the layers before them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from .._program import Add, Flatten, Op, PackedActivation, Pool, Program, ReLU, Scale, Shape, Snap, Sparse


@dataclass(frozen=True, eq=False)
class FusedLayer:
    """result = min(relu(pool(op(source)) + residual), cap), where the later parts are optional."""

    op: Sparse
    source: int
    result: int
    pool: bool = False  # by 2 × 2
    residual: int | None = None
    relu: bool = False
    cap: float | None = None


@dataclass(frozen=True, eq=False)
class Elementwise:
    """result = min(relu(source · scale + shift + other), cap), where the parts are optional."""

    source: int
    result: int
    scale: Scale | None = None
    other: int | None = None
    relu: bool = False
    cap: float | None = None


@dataclass(frozen=True, eq=False)
class MaxPool:
    """result = relu(max over windows of source)."""

    op: Pool
    source: int
    result: int
    relu: bool = False


@dataclass(frozen=True, eq=False)
class Move:
    """result is source in another form."""

    source: int
    result: int


@dataclass(frozen=True, eq=False)
class View(Move):
    """result is source, flattened."""


@dataclass(frozen=True, eq=False)
class Sparsify:
    """result is source after activation sparsity; `relu`: its slope is 1 where it is above zero, else 0."""

    op: PackedActivation | Snap
    source: int
    result: int

    @property
    def relu(self) -> bool:
        return isinstance(self.op, PackedActivation)


Task = FusedLayer | Elementwise | MaxPool | Sparsify | Move


@dataclass(frozen=True)
class _Capped:
    """min(max(x, 0), cap)."""

    cap: float


def tasks_of(program: Program, *, whole: bool = True) -> list[Task]:
    """Return the program as tasks in order.

    Unless `whole`, the values that a gradient needs are kept: pooling is not fused, and capped ReLUs stay in parts.
    """
    shapes = program.shapes
    steps: list[tuple[Op | _Capped, tuple[int, ...]]] = [(step.op, step.inputs) for step in program.steps]
    readers, fused = _readers(program), set[int]()
    for number, (source, cap, spelled) in (_caps(program, readers) if whole else {}).items():
        steps[number] = _Capped(cap), (source,)
        fused |= spelled
        readers[source] = [*(reader for reader in readers[source] if reader not in spelled), number]
    tasks: list[Task] = []
    for number, (op, inputs) in enumerate(steps):
        if number in fused:
            continue
        task = _task(op, inputs, number + 1, shapes)
        while True:
            following = readers.get(task.result, [])
            wider = None
            if len(following) == 1:
                after, read = steps[following[0]]
                others = [i for i in read if i != task.result]
                if whole or not isinstance(after, Pool):
                    wider = _absorb(task, after, following[0] + 1, others, number, shapes)
            if wider is None:
                break
            fused.add(following[0])
            task = wider
        tasks.append(task)
    return tasks


def _readers(program: Program) -> dict[int, list[int]]:
    """Return the numbers of the steps that read each value."""
    readers: dict[int, list[int]] = {}
    for number, step in enumerate(program.steps):
        for source in step.inputs:
            readers.setdefault(source, []).append(number)
    return readers


def _caps(program: Program, readers: dict[int, list[int]]) -> dict[int, tuple[int, float, set[int]]]:
    """Find capped ReLUs, written as relu(x) - relu(x - cap): for the step of each sum x, the cap and earlier steps."""
    found = {}
    for number, step in enumerate(program.steps):
        if isinstance(step.op, Add):
            relu, minus = (i - 1 for i in sorted(step.inputs))
            over, less = (_before(program, minus, count) for count in (1, 2))
            chain = {relu: number, minus: number, over: minus, less: over}  # and the only reader of each
            if min(chain) >= 0 and all(readers[i + 1] == [reader] for i, reader in chain.items()):
                ops = [program.steps[i].op for i in (relu, minus, over, less)]
                source, cap = program.steps[relu].inputs[0], _cap(*ops)
                if cap is not None and program.steps[less].inputs == (source,):
                    found[number] = source, cap, set(chain)
    return found


def _before(program: Program, number: int, count: int) -> int:
    """Return the step `count` before one, along first inputs; -1 where there is none."""
    for _ in range(count):
        number = program.steps[number].inputs[0] - 1 if number >= 0 else -1
    return number


def _cap(relu: Op, minus: Op, over: Op, less: Op) -> float | None:
    """Return the number at which relu(x) + minus(over(less(x))) caps x, or None if they compute something else."""
    match relu, minus, over, less:
        case ReLU(), Scale() as last, ReLU(), Scale() as first:
            negates = (last.scale == -1).all() and not last.shift.any()
            shifts = (first.scale == 1).all() and first.shift[0] < 0 and (first.shift == first.shift[0]).all()
            return float(-first.shift[0]) if negates and shifts else None
    return None


def _task(op: Op | _Capped, inputs: tuple[int, ...], result: int, shapes: list[Shape]) -> Task:
    match op:
        case _Capped():
            return Elementwise(inputs[0], result, relu=True, cap=op.cap)
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
    """Write a mean over windows as a sparse convolution, so that it needs no kernel of its own."""
    window = op.kernel[0] * op.kernel[1]
    indices = np.arange(channels * window, dtype=np.int32)
    values = np.full(channels * window, 1 / window, np.float32)
    starts = np.arange(channels + 1, dtype=np.int32) * window
    shape = (channels, channels, *op.kernel)
    return Sparse(shape, starts, indices, values, np.zeros(channels, np.float32), stride=op.stride)


def _absorb(
    task: Task, op: Op | _Capped, result: int, others: list[int], number: int, shapes: list[Shape]
) -> Task | None:
    """Return the task merged with the step that alone reads its result, or None if they cannot be merged."""
    match op:
        case ReLU() if not isinstance(task, Move | Sparsify) and not task.relu:
            return replace(task, result=result, relu=True)
        case _Capped() if isinstance(task, FusedLayer | Elementwise) and not task.relu:
            return replace(task, result=result, relu=True, cap=op.cap)
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
