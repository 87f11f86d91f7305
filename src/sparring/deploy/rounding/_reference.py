"""What a rounded network computes, in plain NumPy integers: kernels must give the same logits to the last bit."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from .._program import Floats, Program, Scale
from .._reference import evaluate, pool, sparse
from .._spans import integer_spans, part_of
from ..kernels._fusion import Elementwise, MaxPool, Move, Sparsify, Task
from ._tasks import Dequantise, Integers, Quantise, RoundedLayer, RoundedPool, rounded_tasks

Values = Any  # floats, or bytes as int64
_FAR = np.float32(1 << 20)  # beyond every byte


def run_rounded(program: Program, x: Floats) -> Floats:
    """Return the logits (N, classes) of images x (N, *shape), float32, of a program with `rounding`."""
    values: dict[int, Values] = {0: x}
    if not program.whole:
        return _run_parts(program, values)
    rounded = rounded_tasks(program)
    for task in rounded.tasks:
        found = _evaluate(task, values)
        values[task.result] = found.reshape(len(x), *rounded.shapes[task.result])
    logits: Floats = values[len(program.steps)]
    return logits


def _run_parts(program: Program, values: dict[int, Values]) -> Floats:
    spans, at = {span.start: span for span in integer_spans(program)}, 0
    while at < len(program.steps):
        if span := spans.get(at):
            part, read = part_of(program, span), values[span.source]
            found, at = run_rounded(part, read.reshape(-1, *part.shape)), span.stop
        else:
            found, at = evaluate(program.steps[at].op, *(values[i] for i in program.steps[at].inputs)), at + 1
        values[at] = found.reshape(len(values[0]), *program.shapes[at])
    logits: Floats = values[at]
    return logits


def _evaluate(task: Task, values: dict[int, Values]) -> Values:
    x = values[task.source]
    match task:
        case Quantise():
            axes = (1, -1, *[1] * (x.ndim - 2))
            scaled = x * task.factor.reshape(axes) + task.shift.reshape(axes)
            return np.rint(np.clip(scaled, np.float32(0), np.float32(255))).astype(np.int64)
        case Dequantise():
            return (x - task.rounding.zero).astype(np.float32) * np.float32(task.rounding.scale)
        case RoundedLayer() if task.integers is not None:
            residual = None if task.residual is None else values[task.residual]
            return _layer(task, task.integers, x, residual)
        case RoundedPool():
            found = pool(task.op, x, least=0)
            return np.maximum(found, task.zero) if task.relu else found
        case MaxPool():
            found = pool(task.op, x)
        case Elementwise():
            found = evaluate(task.scale or Scale(np.ones(x.shape[1], np.float32), np.zeros(x.shape[1], np.float32)), x)
            found = found if task.other is None else found + values[task.other]
        case Sparsify():
            return evaluate(task.op, x)
        case Move():
            return x
    found = np.maximum(found, np.float32(0)) if task.relu else found
    cap = getattr(task, "cap", None)
    return found if cap is None else np.minimum(found, np.float32(cap))


def _layer(task: RoundedLayer, told: Integers, x: Values, residual: Values | None) -> Values:
    whole = replace(told.weights, values=told.weights.values.astype(np.int64), bias=told.bias)  # type: ignore[arg-type]
    sums = sparse(whole, x - told.source.zero)
    if task.pool:
        n, channels, height, width = sums.shape
        halves = sums[:, :, : height // 2 * 2, : width // 2 * 2].reshape(n, channels, height // 2, 2, width // 2, 2)
        sums = halves.max((3, 5))
    axes = (-1, *[1] * (sums.ndim - 2))
    scaled = sums.astype(np.float32) * told.factor.reshape(axes)
    if told.residual is not None and residual is not None:
        scaled = scaled + (residual - told.residual.zero).astype(np.float32) * told.other
    if told.result is not None:
        near = np.clip(np.rint(scaled), -_FAR, _FAR).astype(np.int64)
        return np.clip(near + told.result.zero, told.low, told.high)
    found = np.maximum(scaled, np.float32(0)) if task.relu else scaled
    return found if task.cap is None else np.minimum(found, np.float32(task.cap))
