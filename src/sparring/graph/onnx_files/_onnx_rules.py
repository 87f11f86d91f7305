"""Rules for ONNX operations, one entry per rule.

A rule takes a node's inputs by position and its attributes by name; other attributes are refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .._ops import Add, AvgPool, Call, Conv2d, Linear, MaxPool, ReLU
from .._plain_stacks import batch_norm
from ._onnx_reader import TYPES, VALUES, Reader, Value, broadcast, tensor_of


def _gemm(
    r: Reader,
    x: Value,
    weight: Value,
    bias: Value | None = None,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    transA: int = 0,
    transB: int = 0,
) -> Value:
    matrix = r.constant(weight, "a second matrix")
    if transA or isinstance(x, Tensor) or len(r.shape(x)) != 1 or matrix.dim() != 2:
        raise r.refuse("is not a layer with weights on flat values")
    w = alpha * (matrix if transB else matrix.T).float().contiguous()
    b = None if bias is None else beta * r.spread(r.constant(bias, "a bias").float(), (len(w),)).contiguous()
    return r.emit(Linear("", w, b), x)


def _matmul(r: Reader, x: Value, weight: Value) -> Value:
    if isinstance(x, Tensor) and isinstance(weight, int) and r.shape(weight)[1:] == (1,):  # W·x for a column x
        flat = r.reshaped(weight, (r.shape(weight)[0],))
        return r.reshaped(r.emit(Linear("", x.float(), None), flat), (len(x), 1))
    matrix = r.constant(weight, "a second matrix")
    if isinstance(x, Tensor) or matrix.dim() != 2:
        raise r.refuse("is not a layer with weights")
    return r.emit(Linear("", matrix.T.float().contiguous(), None), x)


def _conv(
    r: Reader,
    x: int,
    weight: Value,
    bias: Value | None = None,
    *,
    auto_pad: str = "NOTSET",
    kernel_shape: Sequence[int] = (),
    strides: Sequence[int] = (1, 1),
    pads: Sequence[int] = (0, 0, 0, 0),
    dilations: Sequence[int] = (1, 1),
    group: int = 1,
) -> Value:
    filters = r.constant(weight, "filters").float()
    if filters.dim() != 4 or len(r.shape(x)) != 3:
        raise r.refuse("is not a two-dimensional convolution")
    added = None if bias is None else r.constant(bias, "a bias").float()
    padding = _padding(r, auto_pad, pads)
    return r.emit(Conv2d("", filters, added, _pair(r, strides), padding, _pair(r, dilations), group), x)


def _padding(r: Reader, auto_pad: str, pads: Sequence[int]) -> tuple[int, int]:
    if auto_pad not in ("NOTSET", "VALID") or len(pads) != 4 or tuple(pads[:2]) != tuple(pads[2:]) or min(pads) < 0:
        raise r.refuse(f"pads each side in its own way (auto_pad {auto_pad}, pads {list(pads)}); pad both sides alike")
    return (0, 0) if auto_pad == "VALID" else (pads[0], pads[1])


def _pair(r: Reader, sizes: Sequence[int]) -> tuple[int, int]:
    if len(sizes) != 2 or min(sizes) < 1:
        raise r.refuse(f"needs two sizes above 0, not {list(sizes)}")
    return sizes[0], sizes[1]


def _max_pool(
    r: Reader,
    x: int,
    *,
    auto_pad: str = "NOTSET",
    ceil_mode: int = 0,
    dilations: Sequence[int] = (1, 1),
    kernel_shape: Sequence[int] = (),
    pads: Sequence[int] = (0, 0, 0, 0),
    storage_order: int = 0,
    strides: Sequence[int] = (1, 1),
) -> Value:
    kernel, padding = _pair(r, kernel_shape), _padding(r, auto_pad, pads)
    if len(r.shape(x)) != 3:
        raise r.refuse("is not a two-dimensional pooling")
    return r.emit(MaxPool(kernel, _pair(r, strides), padding, _pair(r, dilations), bool(ceil_mode)), x)


def _average_pool(
    r: Reader,
    x: int,
    *,
    auto_pad: str = "NOTSET",
    ceil_mode: int = 0,
    count_include_pad: int = 0,
    kernel_shape: Sequence[int] = (),
    pads: Sequence[int] = (0, 0, 0, 0),
    strides: Sequence[int] = (1, 1),
) -> Value:
    if ceil_mode or _padding(r, auto_pad, pads) != (0, 0) or len(r.shape(x)) != 3:
        raise r.refuse("is not a two-dimensional pooling of whole windows without padding")
    return r.emit(AvgPool(_pair(r, kernel_shape), _pair(r, strides)), x)


def _global_average(r: Reader, x: int) -> Value:
    kernel = _pair(r, r.shape(x)[1:])
    return r.emit(AvgPool(kernel, kernel), x)


def _normalised(
    r: Reader,
    x: int,
    scale: Value,
    shift: Value,
    mean: Value,
    var: Value,
    *,
    epsilon: float = 1e-5,
    momentum: float = 0.9,
    training_mode: int = 0,
) -> Value:
    if training_mode:
        raise r.refuse("is in training mode; export the model in eval mode")
    found = batch_norm("", *(r.constant(v, "a statistic") for v in (mean, var, scale, shift)), eps=epsilon)
    return r.emit(found, x)


def _sum(r: Reader, x: Value, y: Value, sign: float) -> Value:
    """Return x + sign · y."""
    if isinstance(x, Tensor) and isinstance(y, Tensor):
        return _small(r, x, y, lambda: x + (y if sign > 0 else -y))
    if isinstance(x, Tensor):
        return r.affine(int(y), sign, x)
    if isinstance(y, Tensor):
        return r.affine(x, 1.0, y if sign > 0 else -y)
    if r.shape(x) != r.shape(y):
        raise r.refuse(f"adds values of shapes {r.shape(x)} and {r.shape(y)}; only equal shapes are supported")
    return r.emit(Add(), x, y if sign > 0 else r.affine(y, sign, 0.0))


def _product(r: Reader, x: Value, y: Value) -> Value:
    if isinstance(x, Tensor) and isinstance(y, Tensor):
        return _small(r, x, y, lambda: x * y)
    if isinstance(x, int) and isinstance(y, int):
        raise r.refuse("multiplies two values that are computed from the image")
    return r.affine(x, r.constant(y, "a factor"), 0.0) if isinstance(x, int) else r.affine(int(y), x, 0.0)


def _quotient(r: Reader, x: Value, y: Value) -> Value:
    divisor = r.constant(y, "a divisor")
    if not bool((divisor != 0).all()):
        raise r.refuse("divides by 0")
    if isinstance(x, Tensor):
        return _small(r, x, divisor, lambda: x / divisor if x.is_floating_point() else x // divisor)
    return r.affine(x, 1 / divisor.double(), 0.0)


def _small(r: Reader, x: Tensor, y: Tensor, compute: Callable[[], Tensor]) -> Tensor:
    if math.prod(broadcast(x.shape, y.shape)) > VALUES:
        raise r.refuse("makes a constant that is too large")
    return compute()


def _clip(
    r: Reader, x: int, low: Value | None = None, high: Value | None = None, *, min: Any = None, max: Any = None
) -> Value:
    """Return min(max(x, low), high) = low + relu(x − low) − relu(x − high)."""
    floor, ceiling = ((one if one is not None else other) for one, other in ((low, min), (high, max)))
    least, most = (None if v is None else float(v) for v in (floor, ceiling))
    if least is not None and most is not None and least > most:
        raise r.refuse(f"has limits in the wrong order, {least:g} and {most:g}")
    if most is None:
        return x if least is None else r.affine(_relu_above(r, x, least), 1.0, least)
    over = r.affine(_relu_above(r, x, most), -1.0, 0.0)
    return r.emit(Add(), x if least is None else r.affine(_relu_above(r, x, least), 1.0, least), over)


def _relu_above(r: Reader, x: int, level: float) -> int:
    return r.emit(ReLU(), r.affine(x, 1.0, -level) if level else x)


def _leaky(r: Reader, x: int, *, alpha: float = 0.01) -> Value:
    return r.emit(Add(), r.affine(x, alpha, 0.0), r.affine(r.emit(ReLU(), x), 1 - alpha, 0.0))


def _reshape(
    r: Reader, x: Value, target: Value | None = None, *, shape: Sequence[int] = (), allowzero: int = 0
) -> Value:
    sizes = r.numbers(shape or target, "a shape")
    have = (1, *r.shape(x)) if isinstance(x, int) else r.shape(x)
    if not allowzero:
        sizes = [have[place] if size == 0 else size for place, size in enumerate(sizes)]
    return r.resized(x, lambda v: v.reshape(sizes))


def _flatten(r: Reader, x: Value, *, axis: int = 1) -> Value:
    rank = len(r.shape(x)) + isinstance(x, int)
    front = axis % rank if axis != rank else rank
    return r.resized(x, lambda v: v.reshape(math.prod(v.shape[:front]), -1))


def _squeeze(r: Reader, x: Value, places: Value | None = None, *, axes: Sequence[int] = ()) -> Value:
    return r.resized(x, lambda v: v.squeeze(tuple(r.numbers(axes or places, "axes"))))


def _unsqueeze(r: Reader, x: Value, places: Value | None = None, *, axes: Sequence[int] = ()) -> Value:
    wanted = r.numbers(axes or places, "axes")
    rank = len(r.shape(x)) + isinstance(x, int) + len(wanted)
    if rank > 16:
        raise r.refuse(f"gives a value with {rank} axes")

    def change(v: Tensor) -> Tensor:
        for axis in sorted(a % rank for a in wanted):
            v = v.unsqueeze(axis)
        return v

    return r.resized(x, change)


def _transpose(r: Reader, x: Value, *, perm: Sequence[int] = ()) -> Value:
    if isinstance(x, Tensor):
        return x.permute(*(perm or reversed(range(x.dim())))).contiguous()
    sizes = (1, *r.shape(x))
    order = [axis for axis in perm if sizes[axis] > 1]
    if order == sorted(order) and perm:  # only axes of length 1 move
        return r.resized(x, lambda v: v.permute(*perm))
    if not perm or perm[0] != 0:
        raise r.refuse("moves the axis of the images; keep it first")
    return r.emit(Call("permute", torch.ops.aten.permute.default, ("self",), {"dims": list(perm)}), x)


def _concat(r: Reader, *parts: Value, axis: int) -> Value:
    if all(isinstance(part, Tensor) for part in parts):
        return torch.cat([r.constant(part, "a part") for part in parts], axis)
    nodes = [r.index(part[0] if isinstance(part, Tensor) else part) for part in parts]
    place = axis % (len(r.shape(nodes[0])) + 1)
    if place == 0:
        raise r.refuse("joins values along the axis of the images")
    return r.emit(Call("cat", torch.ops.aten.cat.default, (), {"dim": place}), *nodes)


def _gather(r: Reader, x: Value, places: Value, *, axis: int = 0) -> Value:
    values, at = r.constant(x, "a source"), r.constant(places, "places")
    if values.dim() != 1 or at.numel() > len(values):
        raise r.refuse("is supported only for the axes of shapes")
    return values[at]


def _constant(r: Reader, *, value: Any = None, value_float: Any = None, value_floats: Any = None,
              value_int: Any = None, value_ints: Any = None) -> Value:  # fmt: skip
    if value is not None:
        return tensor_of(value)
    found = next(one for one in (value_float, value_floats, value_int, value_ints) if one is not None)
    return torch.tensor(found)


def _dropout(r: Reader, x: Value, ratio: Value | None = None, training: Value | None = None, **options: Any) -> Value:
    if training is not None and bool(r.constant(training, "a mode").any()):
        raise r.refuse("draws at random; export the model in eval mode")
    return x


def _shape(r: Reader, x: Value) -> Value:
    return torch.tensor(r.shape(x) if isinstance(x, Tensor) else (1, *r.shape(x)))


def _cast(r: Reader, x: Value, *, to: int) -> Value:
    if to not in TYPES or (isinstance(x, int) and to not in (1, 11)):
        raise r.refuse(f"makes numbers of type {to}")
    return x if isinstance(x, int) else x.to(TYPES[to])


def _curve(name: str, function: Callable[[Tensor], Tensor]) -> Callable[..., Value]:
    def rule(r: Reader, x: int) -> Value:
        return r.emit(Call(name, function, ("input",)), x)

    return rule


RULES: dict[str, Callable[..., Value]] = {
    "Add": lambda r, x, y: _sum(r, x, y, 1.0),
    "AveragePool": _average_pool,
    "BatchNormalization": _normalised,
    "Cast": _cast,
    "Clip": _clip,
    "Concat": _concat,
    "Constant": _constant,
    "Conv": _conv,
    "Div": _quotient,
    "Dropout": _dropout,
    "Flatten": _flatten,
    "Gather": _gather,
    "Gemm": _gemm,
    "GlobalAveragePool": _global_average,
    "Identity": lambda r, x: x,
    "LeakyRelu": _leaky,
    "MatMul": _matmul,
    "MaxPool": _max_pool,
    "Mul": _product,
    "Relu": lambda r, x: r.emit(ReLU(), x),
    "Reshape": _reshape,
    "Shape": _shape,
    "Sigmoid": _curve("sigmoid", torch.sigmoid),
    "Squeeze": _squeeze,
    "Sub": lambda r, x, y: _sum(r, x, y, -1.0),
    "Tanh": _curve("tanh", torch.tanh),
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
}
