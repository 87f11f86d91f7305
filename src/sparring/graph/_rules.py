"""Rules for torch's operations: one entry per rule, or a name in one of the lists below.

A rule takes arguments by their names in the operation's schema. Arguments that it does not take must have their
defaults, or the operation is refused: no keyword is ever ignored.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import _layer_rules as layers
from ._layer_rules import affine, as_constant, call, refuse_images_axis
from ._moved import TURNS, batches_joined, batches_parted, by_channel, is_moved, is_over_images, moved, reshaped
from ._ops import ALONG, ELEMENTWISE, RECURRENT, RESAMPLED, WITHIN, AvgPool, Call, Flatten, MaxPool, Op, Reshape, flat
from ._plain_stacks import pair
from ._torch_export import Arguments, At, Translator

Rule = Callable[[Translator, Arguments], Any]
# Functions that are constant except for jumps, used in staircase activations.
_STEPS = frozenset(
    """floor ceil round trunc sign sgn heaviside floor_divide fmod remainder argmax argmin bucketize frac
    one_hot""".split()  # noqa: SIM905
)
# Identities in eval mode.
_COPIES = frozenset(
    """clone alias detach contiguous lift_fresh_copy lift_fresh dropout feature_dropout alpha_dropout
    feature_alpha_dropout native_dropout positive""".split()  # noqa: SIM905
)
# What is made of no values: torch says so itself.
_FACTORIES = frozenset("arange linspace eye full empty zeros ones rand randn randint rand_like randn_like".split())  # noqa: SIM905
_LIKE = frozenset(
    "zero zeros_like ones_like full_like empty_like new_zeros new_ones new_full new_empty".split()  # noqa: SIM905
)
# Operations that are described the same way with the images first, wherever torch has them.
_MOVABLE = (ELEMENTWISE | ALONG | set(TURNS)) - {"prelu", "_prelu_kernel", "rrelu"} | set(
    """add sub subtract rsub mul multiply div divide true_divide neg negative linear matmul mm bmm addmm baddbmm relu
    clamp clamp_min mean expand expand_as broadcast_to split split_with_sizes chunk tensor_split unbind index copy fill
    batch_norm _native_batch_norm_legit_no_training layer_norm native_layer_norm rms_norm
    scaled_dot_product_attention pad constant_pad_nd""".split()  # noqa: SIM905
)
_SPLITS = ["split", "split_with_sizes", "chunk", "tensor_split"]
# Of maps alone, each channel by itself.
_BY_CHANNEL = RESAMPLED | set(
    """max_pool2d max_pool2d_with_indices avg_pool2d adaptive_avg_pool2d _adaptive_avg_pool2d adaptive_max_pool2d
    upsample_bicubic2d""".split()  # noqa: SIM905
)
_RESHAPES = "view reshape _unsafe_view flatten squeeze unsqueeze unflatten"


def translate(t: Translator, name: str, target: Any, a: Arguments) -> Any:
    """Apply the rule for an operation: return the index of its value, a constant, or a list of these.

    Raise Unsupported if there is no rule.
    """
    value = t.now.meta["val"]
    inputs = [x for x in flat(a.given) if isinstance(x, At)]
    outputs = list(value) if isinstance(value, tuple | list) else [value]
    if name in _COPIES or name in _LIKE or name in RECURRENT or not is_moved(t, inputs, outputs):
        return _ruled(t, name, target, a)
    if name in _RESHAPES.split():
        a.given.clear()
        return reshaped(t, inputs[0], value)
    if name == "conv2d":
        rule = layers.conv2d_by_image if isinstance(a.given["weight"], At) else layers.conv2d_of_parts
        return rule(t, a)
    if name in _BY_CHANNEL:
        return by_channel(t, a, inputs[0], lambda: _ruled(t, name, target, a))
    if name == "cat" and is_over_images(t, a, inputs[0]) and not any(isinstance(v, Tensor) for v in a.given["tensors"]):
        return batches_joined(t, a, inputs)
    if (name in _SPLITS or name == "slice") and is_over_images(t, a, inputs[0]):
        start = t.now.args[2] if name == "slice" and len(t.now.args) > 2 else 0
        parts = batches_parted(
            t, a, inputs[0], outputs, t.images_in(getattr(start, "meta", {"val": start})["val"] or 0)
        )
        return parts if name in _SPLITS else parts[0]
    if name not in _MOVABLE:
        raise t.refuse(name, "mixes or moves the batch axis", "keep images along the first axis")
    return moved(t, a, inputs, outputs, lambda: _ruled(t, name, target, a))


def has_rule(name: str) -> bool:
    """Return whether an operation is read, or refused, as it is."""
    known = _COPIES | _LIKE | ELEMENTWISE | ALONG | WITHIN | _STEPS
    return name in _RULES or name in known or name in _FACTORIES


def _ruled(t: Translator, name: str, target: Any, a: Arguments) -> Any:
    if rule := _RULES.get(name):
        return rule(t, a)
    if name in _COPIES:
        return _copy(t, a)
    if name in _LIKE:
        return _constant_like(t, target, a)
    if name in ELEMENTWISE or name in ALONG or name in WITHIN:
        return call(t, name, target, a)
    if name.rstrip("_") in _STEPS:
        raise t.refuse(name, "has no rule: it jumps, so it has no finite Lipschitz constant")
    raise t.refuse(name, "has no rule")


def _copy(t: Translator, a: Arguments) -> Any:
    source = a.take("self") if "self" in a.defaults else a.take("input")
    for name in ("p", "train", "memory_format"):
        a.take(name)
    return [source, None] if t.name == "native_dropout" else source


def _cast(t: Translator, a: Arguments) -> Any:
    for name in ("memory_format", "copy", "non_blocking", "dtype", "layout", "device", "pin_memory", "other"):
        a.take(name)
    value = t.now.meta["val"]
    source = a.take("self")
    before: Any = t.now.args[0]
    if value.is_floating_point() and not before.meta["val"].is_floating_point():
        return t.emit(Call("to", torch.ops.aten._to_copy.default, ("self",), {"dtype": t.dtype}), source)
    if value.is_floating_point() and torch.finfo(value.dtype).eps > torch.finfo(t.kind).eps:
        raise t.refuse(t.name, f"to {value.dtype} has no rule: it rounds, and so jumps")
    if not value.is_floating_point():
        raise t.refuse(t.name, f"to {value.dtype} has no rule: it jumps, so it has no finite Lipschitz constant")
    return source


def _constant_like(t: Translator, target: Any, a: Arguments) -> Tensor:
    """Return a constant that takes only its shape from the image."""
    value = t.now.meta["val"]
    sizes = [t.size(s) for s in value.shape]
    kind = t.name.split("_")["new" in t.name]
    fill = {"ones": 1.0, "zeros": 0.0, "zero": 0.0, "empty": torch.nan}.get(kind, a.take("fill_value"))
    a.given.clear()
    result: Tensor = t.cast(torch.full(sizes, fill, dtype=value.dtype, device=value.device))
    return result


def _max_pool(t: Translator, a: Arguments) -> Any:
    x, kernel, stride = a.take("self"), pair(_many(a.take("kernel_size"))), _many(a.take("stride"))
    padding, dilation = pair(_many(a.take("padding"))), pair(_many(a.take("dilation")))
    op = MaxPool(kernel, pair(stride) if stride else kernel, padding, dilation, bool(a.take("ceil_mode")))
    if isinstance(t.now.meta["val"], Tensor):
        return _windowed(t, op, x)
    return [_windowed(t, op, x), None]


def _windowed(t: Translator, op: Op, x: At) -> At:
    """Emit a pooling; images of shape (H, W), which torch pools as if they were channels, get a channel."""
    value = t.now.meta["val"]
    shape, after = t.shape(x), t.image_shape(value if isinstance(value, Tensor) else value[0])
    if len(shape) == 3:
        return t.emit(op, x)
    given = t.emit(Reshape((1, *shape)), x, shape=(1, *shape))
    return t.emit(Reshape(after), t.emit(op, given, shape=(1, *after)))


def _many(value: Any) -> Any:
    return value[0] if isinstance(value, list) and len(value) == 1 else value


def _avg_pool(t: Translator, a: Arguments) -> Any:
    kernel, stride = pair(_many(a.given["kernel_size"])), _many(a.given.get("stride"))
    padded = any(flat([a.given.get("padding", 0)])) or a.given.get("ceil_mode")
    divisor = a.given.get("divisor_override")
    if padded:
        if len(t.shape(a.given["self"])) != 3:
            raise t.refuse(t.name, "with padding, on images without channels, has no rule")
        return call(t, t.name, t.now.target, a)
    for name in ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override"):
        a.take(name)
    result = _windowed(t, AvgPool(kernel, pair(stride) if stride else kernel), a.take("self"))
    return result if divisor is None else affine(t, result, kernel[0] * kernel[1] / divisor, 0)


def _adaptive_pool(t: Translator, a: Arguments) -> Any:
    value = t.now.meta["val"]
    single = isinstance(value, Tensor)  # max pooling also returns indices
    before, after = t.shape(a.given["self"]), t.image_shape(value if single else value[0])
    kernel = (before[-2] // after[-2], before[-1] // after[-1])
    if any(s != k * o for s, k, o in zip(before[-2:], kernel, after[-2:], strict=True)):
        if len(before) != 3:
            raise t.refuse(t.name, "with uneven windows, on images without channels, has no rule")
        return call(t, t.name, t.now.target, a)
    a.take("output_size")
    if "max" not in t.name:
        return _windowed(t, AvgPool(kernel, kernel), a.take("self"))
    return [_windowed(t, MaxPool(kernel, kernel, (0, 0), (1, 1), False), a.take("self")), None]


def _mean(t: Translator, a: Arguments) -> Any:
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


def _reshape(t: Translator, a: Arguments) -> Any:
    """Operations that keep the order of each image's values."""
    x = a.take("self")
    a.given.clear()  # the output's shape is sufficient
    return _reshaped(t, x, t.image_shape(t.now.meta["val"]))


def _reshaped(t: Translator, x: At, shape: tuple[int, ...]) -> At:
    if t.shape(x) == shape:
        return x
    op: Op = Flatten() if len(shape) == 1 and t.shape(x) else Reshape(shape)
    return t.emit(op, x, shape=shape)


def _expand(t: Translator, a: Arguments) -> Any:
    x = a.take("self")
    a.given.clear()
    return _spread(t, x)


def _spread(t: Translator, x: At) -> At:
    """Return a value broadcast to the output's shape."""
    shape = t.image_shape(t.now.meta["val"])
    if t.shape(x) == shape:
        return x
    if len(t.shape(x)) != len(shape):
        raise t.refuse(t.name, "moves the batch axis", "keep images along the first axis")
    return t.emit(Call("expand", torch.ops.aten.expand.default, ("self",), {"size": [-1, *shape]}), x)


def _repeat(t: Translator, a: Arguments) -> Any:
    times = a.given["repeats"]
    if len(times) != len(t.shape(a.given["self"])) + 1 or times[0] != 1:
        raise t.refuse(t.name, "repeats images", "keep one row per image")
    return call(t, t.name, t.now.target, a)


def _split(t: Translator, a: Arguments) -> Any:
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


def _index(t: Translator, a: Arguments) -> Any:
    """Values chosen by constant whole numbers along axes of the image that follow one another."""
    x, indices = a.take("self"), a.take("indices")
    axes = [axis for axis, index in enumerate(indices) if index is not None]
    chosen = [index for index in indices if isinstance(index, Tensor) and index.dtype == torch.int64]
    if not isinstance(x, At) or axes[0] == 0 or axes != list(range(axes[0], axes[0] + len(chosen))):
        raise t.refuse(t.name, "along axes apart, along the images, by a mask or by computed indices has no rule")
    shape, first, last = t.shape(x), axes[0] - 1, axes[-1]
    place = torch.zeros((), dtype=torch.int64)  # in the axes as one
    for size, index in zip(shape[first:last], chosen, strict=True):
        place = place.to(index) * size + index % size
    whole = _reshaped(t, x, (*shape[:first], math.prod(shape[first:last]), *shape[last:]))
    options = {"dim": axes[0], "index": place.flatten()}
    select = Call("index_select", torch.ops.aten.index_select.default, ("self",), options)
    picked = t.emit(select, whole, shape=(*shape[:first], place.numel(), *shape[last:]))
    return _reshaped(t, picked, t.image_shape(t.now.meta["val"]))


def _index_put(t: Translator, a: Arguments) -> Any:
    """Values written where a mask says, one for all, or at constant places along one axis of the image."""
    x, indices, values = a.take("self"), a.take("indices"), a.take("values")
    axes = [axis for axis, index in enumerate(indices) if index is not None]
    index, shape = indices[axes[0]], t.image_shape(t.now.meta["val"])
    if isinstance(index, At) and t.shape(index) == shape and isinstance(values, Tensor) and values.numel() == 1:
        where = Call("where", torch.ops.aten.where.self, ("condition", "self", "other"))
        inputs = (index, t.constant(values, len(shape)), x if isinstance(x, At) else t.constant(x, len(shape)))
        return t.emit(where, *inputs, shape=shape)
    if len(axes) > 1 or axes[0] == 0 or not isinstance(index, Tensor) or index.dtype != torch.int64 or index.dim() > 1:
        raise t.refuse(t.name, "along several axes, along the images, or at computed places has no rule")
    axis, count = axes[0], index.numel()
    part = (*shape[: axis - 1], count, *shape[axis:])
    given = values if isinstance(values, At) else t.constant(values.expand(1, *part), len(part))
    if t.shape(given) != part:
        raise t.refuse(t.name, "of values that broadcast has no rule")
    place = torch.arange(shape[axis - 1])  # in what was there and what comes, side by side
    place[index] = shape[axis - 1] + torch.arange(count)
    joined = Call("cat", torch.ops.aten.cat.default, (), {"dim": axis})
    both = t.emit(joined, x, given, shape=(*shape[: axis - 1], shape[axis - 1] + count, *shape[axis:]))
    options = {"dim": axis, "index": place}
    return t.emit(Call("index_select", torch.ops.aten.index_select.default, ("self",), options), both, shape=shape)


def _filled(t: Translator, a: Arguments) -> Any:
    """fill and copy: the source, broadcast to the shape of the target."""
    a.take("self"), a.take("non_blocking")
    source = a.take("src") if "src" in a.defaults else a.take("value")
    if isinstance(source, At):
        return _spread(t, source)
    shape = t.image_shape(t.now.meta["val"])
    return t.constant(as_constant(t, source).expand(1, *shape), len(shape))


_TABLE: dict[Rule, str] = {
    layers.add: "add",
    layers.subtract: "sub subtract",
    layers.reverse_subtract: "rsub",
    layers.multiply: "mul multiply",
    layers.divide: "div divide true_divide",
    layers.negate: "neg negative",
    layers.linear: "linear",
    layers.matmul: "matmul mm bmm",
    layers.addmm: "addmm",
    layers.batch_addmm: "baddbmm",
    layers.recurrent: " ".join(RECURRENT),
    layers.conv2d: "conv2d",
    layers.norm_of_batch: "_native_batch_norm_legit_no_training batch_norm native_batch_norm",
    layers.by_the_batch: "_native_batch_norm_legit _native_batch_norm_legit_functional",
    layers.relu: "relu",
    layers.clamp: "clamp clamp_min",
    _max_pool: "max_pool2d max_pool2d_with_indices",
    _avg_pool: "avg_pool2d",
    _adaptive_pool: "adaptive_avg_pool2d _adaptive_avg_pool2d adaptive_max_pool2d",
    _mean: "mean",
    _reshape: _RESHAPES,
    _expand: "expand expand_as broadcast_to",
    _repeat: "repeat",
    _split: " ".join((*_SPLITS, "unbind")),
    _index: "index",
    _index_put: "index_put",
    _filled: "copy fill",
    _cast: "_to_copy to type_as",
}
_RULES = {name: rule for rule, names in _TABLE.items() for name in names.split()}
