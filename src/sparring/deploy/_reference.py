"""Reference implementation of programs in plain NumPy: slow, with each operation as it is defined."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
from scipy.sparse import csr_array
from torch import from_numpy

from ._dense import call_of, dense
from ._program import (
    Add,
    Constant,
    Dense,
    Flatten,
    Floats,
    Op,
    PackedActivation,
    Pool,
    Program,
    ReLU,
    Scale,
    Snap,
    Sparse,
)


def run_reference(program: Program, x: Floats) -> Floats:
    """Return the logits (N, classes) of images x (N, *shape), float32."""
    values = [x]
    for step in program.steps:
        values.append(evaluate(step.op, *(values[i] for i in step.inputs)))
    return values[-1]


def evaluate(op: Op, x: Floats, *others: Floats) -> Floats:
    """Return an operation's result for batches of its inputs."""
    match op:
        case Sparse(rows=True):
            return sparse(replace(op, rows=False), x.reshape(-1, x.shape[-1])).reshape(*x.shape[:-1], -1)
        case Sparse():
            return sparse(op, x)
        case Constant():
            return np.repeat(op.value[None], len(x), axis=0)
        case Dense():
            return dense(call_of(op), *(from_numpy(np.ascontiguousarray(value)) for value in (x, *others))).numpy()
        case Scale():
            channels = (1, -1, *[1] * (x.ndim - 2))
            return x * op.scale.reshape(channels) + op.shift.reshape(channels)
        case ReLU():
            return np.maximum(x, np.float32(0))
        case Pool():
            return pool(op, x)
        case Flatten():
            return x.reshape(len(x), math.prod(x.shape[1:]))
        case Add():
            return x + others[0]
        case PackedActivation():
            return _activate(op, x)
        case Snap():
            centre, radius = (values.reshape(1, -1, *[1] * (x.ndim - 2)) for values in (op.centre, op.radius))
            return np.maximum(np.where(np.abs(x - centre) <= radius, centre, x), np.float32(0))


def _activate(op: PackedActivation, x: Floats) -> Floats:
    if op.kind == "shifted-relu":
        shifted: Floats = np.maximum(x - np.float32(op.number), np.float32(0))
        return shifted
    if op.kind == "threshold":
        return np.where(x > np.float32(op.number), x, np.float32(0))
    flat = x.reshape(len(x), -1)
    keep = op.kept(flat.shape[1])
    best = np.argsort(-flat, axis=1, kind="stable")[:, :keep]
    result = np.zeros_like(flat)
    np.put_along_axis(result, best, np.take_along_axis(np.maximum(flat, 0), best, axis=1), axis=1)
    return result.reshape(x.shape)


def sparse(op: Sparse, x: Any) -> Floats:
    """Return what a layer makes of inputs (N, ...), in the numbers of its weights."""
    out, width = op.shape[0], math.prod(op.shape[1:])
    weight = csr_array((op.values, op.indices, op.indptr), shape=(out, width))
    if x.ndim == 2:
        result: Floats = np.ascontiguousarray((weight @ np.ascontiguousarray(x.T)).T) + op.bias
        return result
    padded = np.pad(x, ((0, 0), (0, 0), *((p, p) for p in op.padding)))
    windows = _windows(padded, (op.shape[2], op.shape[3]), op.stride, op.dilation)  # (N, C, h, w, kh, kw)
    columns = windows.transpose(1, 4, 5, 0, 2, 3).reshape(width, -1)
    n, _, height, side = windows.shape[:4]
    product = (weight @ columns).reshape(out, n, height, side).transpose(1, 0, 2, 3)
    return np.ascontiguousarray(product) + op.bias[:, None, None]


def pool(op: Pool, x: Any, *, least: float = -np.inf) -> Floats:
    """Return the maxima or means of windows; `least` is what padding counts as for maxima."""
    (bottom, right) = (_overhang(op, x.shape[axis + 2], axis) for axis in (0, 1))
    (top, left) = op.padding
    padded = np.pad(x, ((0, 0), (0, 0), (top, bottom), (left, right)), constant_values=x.dtype.type(least))
    windows = _windows(padded, op.kernel, op.stride, op.dilation)
    result: Floats = windows.mean(axis=(4, 5), dtype=np.float32) if op.mean else windows.max(axis=(4, 5))
    return result


def _overhang(op: Pool, side: int, axis: int) -> int:
    """Return how much padding follows the image, so that exactly the windows that count fit."""
    span = op.dilation[axis] * (op.kernel[axis] - 1) + 1
    padding, stride = op.padding[axis], op.stride[axis]
    if not op.ceil_mode:
        return padding
    count = -(-(side + 2 * padding - span) // stride) + 1
    count -= (count - 1) * stride >= side + padding
    return max(0, (count - 1) * stride + span - side - padding)


def _windows(x: Floats, kernel: tuple[int, int], stride: tuple[int, int], dilation: tuple[int, int]) -> Floats:
    """View x (N, C, H, W) as windows (N, C, h, w, kernel height, kernel width)."""
    span = (dilation[0] * (kernel[0] - 1) + 1, dilation[1] * (kernel[1] - 1) + 1)
    view = np.lib.stride_tricks.sliding_window_view(x, span, axis=(2, 3))
    result: Floats = view[:, :, :: stride[0], :: stride[1], :: dilation[0], :: dilation[1]]
    return result
