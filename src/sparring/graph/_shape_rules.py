"""Rules for pooling, and for what moves an image's values without changing them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ._image_wise import call, flat, refuse_images_axis
from ._layer_rules import affine, as_constant
from ._ops import AvgPool, Call, Flatten, MaxPool, Op, Reshape
from ._plain_stacks import pair
from ._torch_export import Arguments, At, Translator


def max_pool(t: Translator, a: Arguments) -> Any:
    x, kernel, stride = a.take("self"), pair(_many(a.take("kernel_size"))), _many(a.take("stride"))
    padding, dilation = pair(_many(a.take("padding"))), pair(_many(a.take("dilation")))
    op = MaxPool(kernel, pair(stride) if stride else kernel, padding, dilation, bool(a.take("ceil_mode")))
    if isinstance(t.now.meta["val"], Tensor):
        return t.emit(op, x)
    return [t.emit(op, x), None]


def _many(value: Any) -> Any:
    return value[0] if isinstance(value, list) and len(value) == 1 else value


def avg_pool(t: Translator, a: Arguments) -> Any:
    kernel, stride = pair(_many(a.given["kernel_size"])), _many(a.given.get("stride"))
    padded = any(flat([a.given.get("padding", 0)])) or a.given.get("ceil_mode")
    divisor = a.given.get("divisor_override")
    if padded:
        return call(t, t.name, t.now.target, a)
    for name in ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override"):
        a.take(name)
    result = t.emit(AvgPool(kernel, pair(stride) if stride else kernel), a.take("self"))
    return result if divisor is None else affine(t, result, kernel[0] * kernel[1] / divisor, 0)


def adaptive_pool(t: Translator, a: Arguments) -> Any:
    before, after = t.shape(a.given["self"]), t.image_shape(t.now.meta["val"])
    kernel = (before[1] // after[1], before[2] // after[2])
    if any(s != k * o for s, k, o in zip(before[1:], kernel, after[1:], strict=True)):
        return call(t, t.name, t.now.target, a)
    a.take("output_size")
    return t.emit(AvgPool(kernel, kernel), a.take("self"))


def mean(t: Translator, a: Arguments) -> Any:
    x = a.given["self"]
    axes = a.given.get("dim")
    refuse_images_axis(t, "mean", axes)
    shape = t.shape(x)
    if len(shape) != 3 or sorted(axis % 4 for axis in axes or ()) != [2, 3] or a.given.get("dtype"):
        return call(t, "mean", t.now.target, a)
    keep = a.take("keepdim")
    a.take("self"), a.take("dim")
    pooled = t.emit(AvgPool(shape[1:], shape[1:]), x, shape=(shape[0], 1, 1))
    return pooled if keep else t.emit(Flatten(), pooled)


def reshape(t: Translator, a: Arguments) -> Any:
    """Whatever keeps each image's values in their order."""
    x = a.take("self")
    a.given.clear()  # the shape that comes out says it all
    return _reshaped(t, x, t.image_shape(t.now.meta["val"]))


def _reshaped(t: Translator, x: At, shape: tuple[int, ...]) -> At:
    if t.shape(x) == shape:
        return x
    op: Op = Flatten() if len(shape) == 1 and t.shape(x) else Reshape(shape)
    return t.emit(op, x, shape=shape)


def expand(t: Translator, a: Arguments) -> Any:
    x = a.take("self")
    a.given.clear()
    shape = t.image_shape(t.now.meta["val"])
    if t.shape(x) == shape:
        return x
    if len(t.shape(x)) != len(shape):
        raise t.refuse(t.name, "moves the axis of the images", "keep images along the first axis")
    return t.emit(Call("expand", _expanded, ("x",), {"shape": shape}), x)


def _expanded(x: Tensor, shape: Sequence[int]) -> Tensor:
    return x.expand(len(x), *shape)


def repeat(t: Translator, a: Arguments) -> Any:
    times = a.given["repeats"]
    if len(times) != len(t.shape(a.given["self"])) + 1 or times[0] != 1:
        raise t.refuse(t.name, "repeats images", "keep one row an image")
    return call(t, t.name, t.now.target, a)


def split(t: Translator, a: Arguments) -> Any:
    """split, split_with_sizes, chunk, tensor_split and unbind: parts along one axis."""
    x = a.take("self")
    axis = a.take("dim")
    a.given.clear()
    refuse_images_axis(t, t.name, axis)
    values = t.now.meta["val"]
    axis %= len(t.shape(x)) + 1
    parts, start = [], 0
    for value in values:
        shape = t.image_shape(value)
        length = 1 if t.name.startswith("unbind") else shape[axis - 1]
        cut = Call("narrow", torch.ops.aten.narrow.default, ("self",), {"dim": axis, "start": start, "length": length})
        kept = shape if t.name != "unbind" else (*shape[: axis - 1], 1, *shape[axis - 1 :])
        parts.append(_reshaped(t, t.emit(cut, x, shape=kept), shape))
        start += length
    return parts


def index(t: Translator, a: Arguments) -> Any:
    """Rows chosen by constant indices along one axis of the image."""
    x, indices = a.take("self"), a.take("indices")
    axes = [axis for axis, index in enumerate(indices) if index is not None]
    if not isinstance(x, At) or len(axes) != 1 or axes[0] == 0 or not isinstance(indices[axes[0]], Tensor):
        raise t.refuse(t.name, "with indices along several axes, along the images, or that depend on them has no rule")
    index = indices[axes[0]]
    if index.dim() != 1 or index.dtype == torch.bool:
        raise t.refuse(t.name, "with indices of more than one axis has no rule")
    options = {"dim": axes[0], "index": index}
    return t.emit(Call("index_select", torch.ops.aten.index_select.default, ("self",), options), x)


def filled(t: Translator, a: Arguments) -> Any:
    """fill and copy: the source, spread over the shape of what is written to."""
    a.take("self"), a.take("non_blocking")
    source = a.take("src") if "src" in a.defaults else a.take("value")
    shape = t.image_shape(t.now.meta["val"])
    if isinstance(source, At):
        if len(t.shape(source)) != len(shape):
            raise t.refuse(t.name, "moves the axis of the images", "keep images along the first axis")
        return (
            source if t.shape(source) == shape else t.emit(Call("expand", _expanded, ("x",), {"shape": shape}), source)
        )
    return t.constant(as_constant(t, source).expand(1, *shape), len(shape))
