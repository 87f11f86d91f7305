"""Rules for arithmetic and layers with weights: affine per channel, linear, or convolution."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, fx

from ._moved import AXES, Images, images_of
from ._ops import RECURRENT, WITHIN, Add, Affine, Call, Conv2d, Linear, ReLU, flat
from ._plain_stacks import batch_norm, pair
from ._torch_export import Arguments, At, Translator


def add(t: Translator, a: Arguments) -> Any:
    return _sum(t, a.take("self"), a.take("other"), a.take("alpha"))


def subtract(t: Translator, a: Arguments) -> Any:
    return _sum(t, a.take("self"), a.take("other"), -a.take("alpha"))


def reverse_subtract(t: Translator, a: Arguments) -> Any:
    left, right = a.take("self"), a.take("other")
    return _sum(t, right, left, -a.take("alpha"))


def _sum(t: Translator, x: Any, y: Any, alpha: Any) -> Any:
    """Return x + alpha · y."""
    if isinstance(x, At) and isinstance(y, At):
        y = y if alpha == 1 else affine(t, y, alpha, 0, t.shape(y))
        if t.shape(x) == t.shape(y):
            return t.emit(Add(), x, y)
        return broadcast(t, "add", torch.ops.aten.add.Tensor, x, y)
    if isinstance(x, At):
        return affine(t, x, 1, y * alpha)
    return affine(t, y, alpha, x)


def multiply(t: Translator, a: Arguments) -> Any:
    x, y = a.take("self"), a.take("other")
    if isinstance(x, At) and isinstance(y, At):
        return broadcast(t, "mul", torch.ops.aten.mul.Tensor, x, y)
    return affine(t, x, y, 0) if isinstance(x, At) else affine(t, y, x, 0)


def divide(t: Translator, a: Arguments) -> Any:
    x, y = a.take("self"), a.take("other")
    if isinstance(y, At):
        return broadcast(t, "div", torch.ops.aten.div.Tensor, x, y)
    return affine(t, x, 1 / y, 0)


def negate(t: Translator, a: Arguments) -> Any:
    return affine(t, a.take("self"), -1, 0)


def broadcast(t: Translator, name: str, target: Any, x: Any, y: Any) -> At:
    computed = [len(t.shape(v)) for v in (x, y) if isinstance(v, At)]
    if len(set(computed)) > 1:
        raise t.refuse(name, "broadcasts one value per image along another axis", "give both the same number of axes")
    inputs = [v if isinstance(v, At) else padded(t, as_constant(t, v), computed[0]) for v in (x, y)]
    return t.emit(Call(name, target, ("self", "other")), *inputs)


def as_constant(t: Translator, value: Any) -> Tensor:
    if isinstance(value, Tensor):
        return value if value.is_floating_point() else value.to(t.dtype)
    return torch.tensor(value, dtype=t.dtype, device=t.now.meta["val"].device)


def affine(t: Translator, x: At, scale: Any, shift: Any, shape: tuple[int, ...] | None = None) -> At:
    """Return scale · x + shift for constants: per channel if their shapes say so."""
    shape = t.image_shape(t.now.meta["val"]) if shape is None else shape
    factors = [_per_channel(as_constant(t, v), t.shape(x)) for v in (scale, shift)] if shape == t.shape(x) else [None]
    if all(f is not None for f in factors):
        return t.emit(Affine("", *factors), x, shape=shape)
    ops = torch.ops.aten
    value = x
    if not (isinstance(scale, int | float) and scale == 1):
        factor = padded(t, as_constant(t, scale), len(t.shape(x)))
        value = t.emit(Call("mul", ops.mul.Tensor, ("self", "other")), x, factor, shape=shape)
    if isinstance(shift, Tensor) or shift:
        added = padded(t, as_constant(t, shift), len(shape))
        value = t.emit(Call("add", ops.add.Tensor, ("self", "other")), value, added, shape=shape)
    return value


def _per_channel(value: Tensor, shape: tuple[int, ...]) -> Tensor | None:
    """Return a constant as one number per channel, (C,), if it broadcasts so."""
    if not shape or value.dim() > len(shape) + 1:
        return None
    sizes = (*[1] * (len(shape) + 1 - value.dim()), *value.shape)
    if any(s != 1 for axis, s in enumerate(sizes) if axis != 1) or sizes[1] not in (1, shape[0]):
        return None
    return value.detach().reshape(-1).expand(shape[0])


def linear(t: Translator, a: Arguments) -> Any:
    x, weight, bias = a.take("input"), a.take("weight"), a.take("bias")
    t.refuse_computed(weight, bias)
    return t.emit(Linear(_name(t, weight, bias), weight, bias), x)


def _name(t: Translator, weight: Tensor, bias: Tensor | None) -> str:
    """Return the path of the module whose parameters are weight and bias, or "" if there is none."""
    candidates = [t.path, t.paths.get(id(weight), "").removesuffix("weight").removesuffix(".")]
    for path in candidates:
        try:
            module = t.model.get_submodule(path)
        except AttributeError:
            continue
        held = module._parameters.get("weight")
        own = held is not None and t.held.get(id(held)) is weight
        if own and (bias is None or t.held.get(id(module._parameters.get("bias"))) is bias):
            return path
    return ""


def recurrent(t: Translator, a: Arguments) -> Any:
    """lstm, gru and rnn over rows of one image, from a state that is the same for all; all outputs."""
    x, state, given = a.take("input"), a.take("hx"), {key: a.take(key) for key in list(a.given)}
    if x.images not in (None, Images(1)) or given.pop("batch_first", False) != (x.images is None):
        raise t.refuse(t.name, "runs over the batch axis", "give it batch_first=True")
    t.refuse_computed(state, given, what="states or weights")
    steps, width = (shape := t.shape(x))[0], shape[-1]
    options = {"hx": state if isinstance(state, list) else [state], **given}
    results = []
    for place, value in enumerate(t.now.meta["val"]):
        lengths = (steps, int(value.shape[-1])) if place == 0 else (int(value.shape[0]), int(value.shape[-1]))
        call = Call(t.name, RECURRENT[t.name], ("x",), {**options, "place": place})
        found = t.emit(call, t.view(x, (steps, width)), shape=lengths)
        moved = place > 0 or x.images is not None
        results.append(t.view(found, (lengths[0], 1, lengths[1]), Images(1)) if moved else found)
    return results


def matmul(t: Translator, a: Arguments) -> Any:
    x = a.take("self")
    y = a.take("other") if "other" in a.defaults else a.take("mat2")
    if isinstance(x, At) and isinstance(y, Tensor) and y.dim() == 2:
        return t.emit(Linear("", y.detach().T, None), x)
    if len(t.shape(x if isinstance(x, At) else y)) < 2 or (isinstance(y, Tensor) and y.dim() < 2):
        raise t.refuse(t.name, "of these shapes has no rule")
    return broadcast(t, "matmul", torch.ops.aten.matmul.default, x, y)


def batch_addmm(t: Translator, a: Arguments) -> Any:
    """beta · self + alpha · batch1 @ batch2."""
    bias, x, y = a.take("self"), a.take("batch1"), a.take("batch2")
    beta, alpha = a.take("beta"), a.take("alpha")
    product = broadcast(t, "matmul", torch.ops.aten.matmul.default, x, y)
    return _sum(t, affine(t, product, alpha, 0), bias, beta)


def addmm(t: Translator, a: Arguments) -> Any:
    bias, x, weight = a.take("self"), a.take("mat1"), a.take("mat2")
    beta, alpha = a.take("beta"), a.take("alpha")
    if not (isinstance(x, At) and isinstance(weight, Tensor) and isinstance(bias, Tensor) and bias.dim() == 1):
        raise t.refuse(t.name, "of these arguments has no rule")
    return t.emit(Linear("", alpha * weight.detach().T, beta * bias.detach()), x)


def conv2d(t: Translator, a: Arguments) -> Any:
    x, weight, bias = a.take("input"), a.take("weight"), a.take("bias")
    t.refuse_computed(weight, bias)
    stride, dilation, padding = pair(a.take("stride")), pair(a.take("dilation")), a.take("padding")
    if isinstance(padding, str):
        whole = [d * (k - 1) if padding == "same" else 0 for d, k in zip(dilation, weight.shape[2:], strict=True)]
        if any(p % 2 for p in whole):  # torch puts the odd one last
            pads = [whole[1] // 2, -(-whole[1] // 2), whole[0] // 2, -(-whole[0] // 2)]
            sides = tuple(s + p for s, p in zip(t.shape(x)[1:], whole, strict=True))
            pad = Call("constant_pad_nd", torch.ops.aten.constant_pad_nd.default, ("self",), {"pad": pads, "value": 0})
            x, whole = t.emit(pad, x, shape=(t.shape(x)[0], *sides)), [0, 0]
        padding = [p // 2 for p in whole]
    name = _name(t, weight, bias)
    return t.emit(Conv2d(name, weight, bias, stride, pair(padding), dilation, a.take("groups")), x)


def conv2d_by_image(t: Translator, a: Arguments) -> Any:
    """A convolution with filters that depend on the image: images as groups of channels, (1, N·C, ...), and filters."""
    x, weight, stride, padding = (a.take(name) for name in ("input", "weight", "stride", "padding"))
    dilation, many = pair(a.take("dilation")), (t.now.args[6:] or [a.take("groups")])[0]
    groups = t.images_in(many.meta["val"] if isinstance(many, fx.Node) else many)  # of one image
    a.take("groups")
    after = t.now.meta["val"]
    (channels, high, wide), (filters, few, *kernel) = t.shape(x)[-3:], t.shape(weight)
    places = (x.images, weight.images, images_of(t, after))
    if (
        not groups
        or isinstance(padding, str)
        or places != (Images(1, 1, channels), Images(0, 1, filters), (1, filters))
    ):
        raise t.refuse(t.name, "with filters that depend on the image has no rule; give it images as groups")
    options = {"kernel_size": kernel, "dilation": dilation, "padding": pair(padding), "stride": pair(stride)}
    unfold = Call("im2col", torch.ops.aten.im2col.default, ("self",), options)
    sides = [int(side) for side in after.shape[2:]]
    seen, spots = few * math.prod(kernel), math.prod(sides)
    parts = t.emit(unfold, t.view(x, (channels, high, wide)), shape=(channels * math.prod(kernel), spots))
    times = Call("matmul", torch.ops.aten.matmul.default, ("self", "other"))
    rows = t.view(weight, (groups, filters // groups, seen))
    found = t.emit(times, rows, t.view(parts, (groups, seen, spots)), shape=(groups, filters // groups, spots))
    return t.view(found, (1, filters, *sides), Images(1, 1, filters))


def conv2d_of_parts(t: Translator, a: Arguments) -> Any:
    """A convolution of several maps of each image, all in one batch: of three dimensions, with maps as the depth."""
    x, weight, bias, padding = (a.take(name) for name in ("input", "weight", "bias", "padding"))
    if x.images is None or x.images.axis or isinstance(padding, str):
        raise t.refuse(t.name, "mixes or moves the batch axis", "keep images along the first axis")
    sizes = {name: [1, *pair(a.take(name))] for name in ("stride", "dilation")} | {"padding": [0, *pair(padding)]}
    options = {"weight": weight.detach().unsqueeze(2), "bias": bias, "groups": a.take("groups"), **sizes}
    count, (filters, *sides) = t.shape(x)[0], (int(side) for side in t.now.meta["val"].shape[1:])
    call = Call("conv3d", torch.ops.aten.conv3d.default, ("input",), options)
    found = t.emit(call, t.turned(x, [1, 0, 2, 3]), shape=(filters, count, *sides))
    return t.view(t.turned(found, [1, 0, 2, 3]), (count, filters, *sides), x.images)


def norm_of_batch(t: Translator, a: Arguments) -> Any:
    first = "self" if "self" in a.defaults else "input"
    x, weight, bias, mean, var = (a.take(n) for n in (first, "weight", "bias", "running_mean", "running_var"))
    for ignored in ("momentum", "cudnn_enabled"):
        a.take(ignored)
    eps = a.take("epsilon") if "epsilon" in a.defaults else a.take("eps")
    if mean is None or var is None or a.take("training"):
        raise t.refuse(t.name, "normalises by the batch even in eval mode", "give it running statistics")
    t.refuse_computed(weight, bias, mean, var)
    name = (
        _name(t, weight, bias)
        if weight is not None
        else t.paths.get(id(mean), "").removesuffix("running_mean").removesuffix(".")
    )
    op = batch_norm(name, mean, var, weight, bias, eps=eps)
    axes = [1] * (len(t.shape(x)) - 2)
    # Channels are torch's second axis, which is one image's first only if the images come first.
    result = (
        affine(t, x, op.scale.view(-1, *axes), op.shift.view(-1, *axes), t.shape(x)) if t.keeps_axes else t.emit(op, x)
    )
    return result if isinstance(t.now.meta["val"], Tensor) else [result, None, None]


def by_the_batch(t: Translator, a: Arguments) -> Any:
    raise t.refuse(t.name, "normalises by the batch even in eval mode", "give it running statistics")


def relu(t: Translator, a: Arguments) -> Any:
    return t.emit(ReLU(), a.take("self"))


def clamp(t: Translator, a: Arguments) -> Any:
    low, high = a.given.get("min"), a.given.get("max")
    if high is None and isinstance(low, int | float) and low == 0:
        a.take("min"), a.take("max")
        return t.emit(ReLU(), a.take("self"))
    return call(t, t.name, t.now.target, a)


def call(t: Translator, name: str, target: Any, a: Arguments) -> Any:
    """Keep an operation as it is: tensors that depend on the image are its inputs, the rest are options."""
    if any(t.counts_images(argument) for argument in (*t.now.args, *t.now.kwargs.values())):
        raise t.refuse(name, "uses the number of images as an argument")
    for axis in AXES:
        if axis in a.defaults:
            refuse_images_axis(t, name, a.given.get(axis, a.defaults[axis]))
    listed = "tensors" if name in ("cat", "stack") else None
    given = {key: a.take(key) for key in list(a.given)}
    if name == "slice" and t.now.meta["val"].shape == t.now.args[0].meta["val"].shape:  # type: ignore[union-attr]
        return given["self"]
    if listed:
        operands = dict(enumerate(given.pop(listed)))
        names: tuple[str, ...] = ()
    else:
        operands = {key: v for key, v in given.items() if isinstance(v, At) or _is_operand(name, key, v)}
        names = tuple(str(key) for key in operands)
        given = {key: v for key, v in given.items() if key not in operands}
    t.refuse_computed(given)
    if isinstance(kind := given.get("dtype"), torch.dtype) and kind.is_floating_point:
        if torch.finfo(kind).eps > torch.finfo(t.kind).eps:
            raise t.refuse(name, f"to {kind} has no rule: it rounds, and so jumps")
        given["dtype"] = min(kind, t.dtype, key=lambda one: torch.finfo(one).eps)
    computed = [len(t.shape(v)) for v in operands.values() if isinstance(v, At)]
    if len(set(computed)) > 1 and name != "select_scatter":
        raise t.refuse(name, "broadcasts one value per image along another axis", "give both the same number of axes")
    values = t.now.meta["val"]
    less = {"src": 1} if name == "select_scatter" else {}  # axes than what it is written to has
    rank = len(t.image_shape(values)) if less else max(computed)
    inputs = [v if isinstance(v, At) else padded(t, v, rank - less.get(str(key), 0)) for key, v in operands.items()]
    if isinstance(values, Tensor):
        return t.emit(Call(name, target, names, given), *inputs)
    parts = []
    for place, value in enumerate(values):
        floating = isinstance(value, Tensor) and value.is_floating_point() and value.dim() > 0
        shape = t.image_shape(value) if floating else None
        parts.append(t.emit(Call(name, target, names, given, place), *inputs, shape=shape) if floating else None)
    return parts


def _is_operand(name: str, key: str, value: Any) -> bool:
    """Return whether a constant replaces a computed value, and is not a weight."""
    weights = name in WITHIN and not name.startswith(("scaled_dot_product_attention", "grid_sampler"))
    return isinstance(value, Tensor) and value.dim() > 0 and not weights and key not in ("index", "weight")


def padded(t: Translator, value: Tensor, rank: int) -> At:
    if value.dim() > rank + 1:
        raise t.refuse(t.name, f"with a constant of shape {tuple(value.shape)} has no rule")
    return t.constant(value, rank)


def refuse_images_axis(t: Translator, name: str, given: Any) -> None:
    """Refuse an axis argument that means the images, or all axes."""
    first = flat([t.now.args[0]])[0]
    rank = first.meta["val"].dim() + t.keeps_axes + (name == "stack")
    axes = [given] if isinstance(given, int) else given
    whole = name in ("slice", "select", "narrow", "slice_scatter") and given == 0
    if name == "slice" and whole and t.now.meta["val"].shape == first.meta["val"].shape:
        return
    if name in ("slice_scatter",) and whole:
        start, end = (t.now.args[i] if len(t.now.args) > i else None for i in (3, 4))
        if start in (None, 0) and (end is None or (isinstance(end, int) and end >= 2**62)):
            return
    if name == "permute" and axes and axes[0] % rank == 0:
        return
    if axes is None or not len(axes) or any(axis % rank == 0 for axis in axes):
        raise t.refuse(name, "is over the batch axis: the logits of an image would depend on other images")
