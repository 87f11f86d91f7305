"""Operations that are kept as they are: computed image by image, or refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ._ops import Call
from ._torch_export import Arguments, At, Translator

# On what surrounds a value in its own image.
WITHIN = frozenset(
    """conv1d conv3d conv_transpose1d conv_transpose2d conv_transpose3d layer_norm native_layer_norm group_norm
    instance_norm rms_norm max_pool1d max_pool3d avg_pool1d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool3d
    adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d pad constant_pad_nd reflection_pad2d replication_pad2d
    pixel_shuffle pixel_unshuffle channel_shuffle upsample_nearest2d upsample_bilinear2d upsample_bicubic2d im2col
    scaled_dot_product_attention""".split()  # noqa: SIM905
)


def call(t: Translator, name: str, target: Any, a: Arguments) -> Any:
    """Keep an operation as it is: tensors that depend on the image are its inputs, the rest are options."""
    if any(t.counts_images(argument) for argument in (*t.now.args, *t.now.kwargs.values())):
        raise t.refuse(name, "takes the number of images as an argument")
    for axis in ("dim", "dims", "dim0", "dim1", "source", "destination"):
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
    if any(isinstance(v, At) for v in flat(given)):
        raise t.refuse(name, "has no rule for weights that depend on the image")
    computed = [len(t.shape(v)) for v in operands.values() if isinstance(v, At)]
    if len(set(computed)) > 1 and name != "select_scatter":
        raise t.refuse(name, "broadcasts one value per image along another axis", "give both the same number of axes")
    rank = max(computed)
    inputs = [v if isinstance(v, At) else padded(t, v, rank) for v in operands.values()]
    values = t.now.meta["val"]
    if isinstance(values, Tensor):
        return t.emit(Call(name, target, names, given), *inputs)
    parts = []
    for place, value in enumerate(values):
        function = _part(target, place)
        floating = isinstance(value, Tensor) and value.is_floating_point() and value.dim() > 0
        shape = t.image_shape(value) if floating else None
        parts.append(t.emit(Call(name, function, names, given), *inputs, shape=shape) if floating else None)
    return parts


def _part(target: Any, place: int) -> Callable[..., Tensor]:
    def part(*args: Any, **options: Any) -> Tensor:
        result: Tensor = target(*args, **options)[place]
        return result

    return part


def _is_operand(name: str, key: str, value: Any) -> bool:
    """Return whether a constant takes the place of a computed value, and is no weight."""
    weights = name in WITHIN and name != "scaled_dot_product_attention"
    return isinstance(value, Tensor) and value.dim() > 0 and not weights and key not in ("index", "weight")


def flat(given: Any) -> list[Any]:
    if isinstance(given, dict):
        return [v for value in given.values() for v in flat(value)]
    if isinstance(given, list | tuple):
        return [v for value in given for v in flat(value)]
    return [given]


def padded(t: Translator, value: Tensor, rank: int) -> At:
    if value.dim() > rank + 1:
        raise t.refuse(t.name, f"with a constant of shape {tuple(value.shape)} has no rule")
    return t.constant(value, rank)


def refuse_images_axis(t: Translator, name: str, given: Any) -> None:
    """Refuse an axis argument that means the images, or all axes."""
    first = flat([t.now.args[0]])[0]
    rank = first.meta["val"].dim() + (name == "stack")
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
    if name in ("transpose", "permute", "movedim") and any(axis % rank == 0 for axis in axes):
        raise t.refuse(
            name,
            "moves the axis of the images",
            "keep it first (batch_first=True, F.scaled_dot_product_attention in place of "
            "nn.MultiheadAttention), or do without what needs a graph: attacks, pruning and studies do",
        )
    if axes is None or not len(axes) or any(axis % rank == 0 for axis in axes):
        raise t.refuse(name, "is over the axis of the images: an image's logits would depend on those beside it")
