"""Values whose batch axis is not the first, or is merged with others, as in attention and windows.

In a graph the images always come first, and a node's shape is that of one image. If torch's value has them elsewhere,
its node keeps torch's axes, with one image's part of the images' axis in its place. Moving the images is then a reshape
of each, and every other operation is the same, one axis further to the right.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ._ops import Call

if TYPE_CHECKING:
    from ._torch_export import Arguments, At, Translator

Shape = tuple[int, ...]
AXES = ("dim", "dims", "dim0", "dim1", "dimension", "source", "destination")
TURNS = ("transpose", "permute")
_WAY = "keep images along the first axis"


@dataclass(frozen=True)
class Images:
    """The images' axis in torch's value: it has `outer` × images × `inner` entries, in that order."""

    axis: int = 0
    outer: int = 1
    inner: int = 1

    @property
    def count(self) -> int:
        """Return how many entries of the axis belong to one image."""
        return self.outer * self.inner


FIRST = Images()


def images_of(t: Translator, value: Any) -> tuple[int, int] | None:
    """Return the axis of torch's value that counts images, and its number of entries per image; None if unclear."""
    counts = [t.images_in(size) for size in value.shape] if isinstance(value, Tensor) else []
    axes = [axis for axis, count in enumerate(counts) if count]
    return (axes[0], counts[axes[0]]) if len(axes) == 1 else None


def is_moved(t: Translator, inputs: list[At], outputs: list[Any]) -> bool:
    """Return whether an operation has inputs or outputs whose images are not a first axis of their own."""
    return any(x.images for x in inputs) or any(images_of(t, value) not in (None, (0, 1)) for value in outputs)


def moved(t: Translator, a: Arguments, inputs: list[At], outputs: list[Any], rule: Callable[[], Any]) -> Any:
    """Translate an operation on values whose images were moved; `rule` is the rule for values with the images first.

    Raise Unsupported if the operation acts along the images, or if they are not the same axis of all values.
    """
    if t.name in TURNS:
        return _turned(t, a, inputs[0], _place(t, outputs[0], inputs))
    whole = [_whole(t, x) for x in inputs]
    if len({(x.images.outer, x.images.inner, len(t.shape(x)) - x.images.axis) for x in whole if x.images}) > 1:
        raise t.refuse(t.name, "joins values whose images lie along different axes", _WAY)
    _shift(t, a, whole[0])
    a.given = {key: _each(value, lambda x: _whole(t, x)) for key, value in a.given.items()}
    t.keeps_axes = True
    try:
        results = rule()
    finally:
        t.keeps_axes = False
    pairs = zip(_listed(results), outputs, strict=True)
    placed = [None if r is None else _placed(t, r, t.shape(r), _place(t, value, inputs)) for r, value in pairs]
    return placed if isinstance(results, list) else placed[0]


def by_channel(t: Translator, a: Arguments, x: At, rule: Callable[[], Any]) -> Any:
    """Translate what each channel does for itself, of several maps of each image, as of one map of all their channels.

    Raise Unsupported where the maps are not along the first axis, with the images.
    """
    images, (count, channels, *sides) = x.images, t.shape(x)
    if images is None or images.axis:
        raise t.refuse(t.name, "mixes or moves the batch axis", _WAY)
    a.given = {key: _each(value, lambda one: t.view(one, (count * channels, *sides))) for key, value in a.given.items()}
    t.joins_channels = True
    try:
        results = rule()
    finally:
        t.joins_channels = False
    parts = [r and t.view(r, (count, channels, *t.shape(r)[1:]), images) for r in _listed(results)]
    return parts if isinstance(results, list) else parts[0]


def is_over_images(t: Translator, a: Arguments, x: At) -> bool:
    """Return whether an operation's axis is that along which the images of its first input lie."""
    axis, images = a.given.get("dim", a.defaults.get("dim")), x.images or FIRST
    return type(axis) is int and axis % len(t.shape(_whole(t, x))) == images.axis


def batches_joined(t: Translator, a: Arguments, inputs: list[At]) -> At:
    """Translate `cat` of batches, one after another: each image has a part in each."""
    whole = [_whole(t, x) for x in inputs]
    images, count = whole[0].images or FIRST, sum((x.images or FIRST).outer for x in whole)
    a.given.clear()
    if len({(x.images or FIRST).axis for x in whole} | {(x.images or FIRST).inner for x in whole} - {images.inner}) > 1:
        raise t.refuse(t.name, "joins values whose images lie along different axes", _WAY)
    shape = list(t.shape(whole[0]))
    shape[images.axis] = count * images.inner
    call = Call("cat", torch.ops.aten.cat.default, (), {"dim": images.axis + 1})
    return _placed(t, t.emit(call, *whole, shape=tuple(shape)), tuple(shape), replace(images, outer=count))


def batches_parted(t: Translator, a: Arguments, x: At, outputs: list[Any], start: int) -> list[At]:
    """Translate what takes batches apart again that were joined, from a place counted in parts of an image."""
    x, parts = _whole(t, x), []
    images = x.images or FIRST
    a.given.clear()
    for value in outputs:
        axis, length = images_of(t, value) or (None, 0)
        if axis != images.axis or length % images.inner or start % images.inner:
            raise t.refuse(t.name, "is over the batch axis: the logits of an image would depend on other images", _WAY)
        shape = tuple(length if i == axis else side for i, side in enumerate(t.shape(x)))
        options = {"dim": axis + 1, "start": start, "length": length}
        cut = t.emit(Call("narrow", torch.ops.aten.narrow.default, ("self",), options), x, shape=shape)
        parts.append(_placed(t, cut, shape, replace(images, outer=length // images.inner)))
        start += length
    return parts


def reshaped(t: Translator, x: At, after: Tensor) -> At:
    """Return a value reshaped: the order of images, and of each image's values, does not change."""
    x, found = _whole(t, x), images_of(t, after)
    if found is None or x.images is None:
        raise t.refuse(t.name, "mixes or moves the batch axis", _WAY)
    (axis, count), stride = found, x.images.inner * math.prod(t.shape(x)[x.images.axis + 1 :])
    inner, left = divmod(stride, math.prod(int(s) for s in after.shape[axis + 1 :]))
    if left or not inner or count % inner:
        raise t.refuse(t.name, "mixes the images with other axes", _WAY)
    shape = tuple(count if i == axis else int(s) for i, s in enumerate(after.shape))
    return _placed(t, x, shape, Images(axis, count // inner, inner))


def _place(t: Translator, value: Any, inputs: list[At]) -> Images:
    """Return the place of the images in an operation's output, whose inputs have them in one order."""
    found, before = images_of(t, value), inputs[0].images or FIRST
    if found is None or found[1] != before.count:
        raise t.refuse(t.name, "mixes or moves the batch axis", _WAY)
    return Images(found[0], before.outer, before.inner)


def _turned(t: Translator, a: Arguments, x: At, images: Images) -> At:
    """Return a value with its axes in another order; the images' axis does not matter for one image."""
    x, given = _whole(t, x), {key: a.take(key) for key in list(a.given)}
    shape, before = t.shape(x), x.images or FIRST
    order = list(range(len(shape)))
    if "dims" in given:
        order = [axis % len(shape) for axis in given["dims"]]
    else:
        one, other = given["dim0"] % len(shape), given["dim1"] % len(shape)
        order[one], order[other] = order[other], order[one]
    kept = [axis for axis in range(len(shape)) if axis != before.axis or before.count > 1]
    value, wanted = t.view(x, tuple(shape[axis] for axis in kept)), [kept.index(axis) for axis in order if axis in kept]
    if (long := [i for i in wanted if shape[kept[i]] > 1]) != sorted(long):
        value = t.turned(value, wanted)
    return _placed(t, value, tuple(shape[axis] for axis in order), images)


def _shift(t: Translator, a: Arguments, x: At) -> None:
    """Return an operation's axes for a value that has the images before torch's axes."""
    rank, images = len(t.shape(x)) + (t.name == "stack"), x.images or FIRST
    for name in set(AXES) & set(a.defaults):
        axes = a.given.get(name, a.defaults[name])
        if axes is None:
            continue
        several = [axis % rank for axis in ([axes] if type(axes) is int else axes)]
        if t.name != "stack" and images.axis in several:
            raise t.refuse(t.name, "is over the batch axis: the logits of an image would depend on other images")
        a.given[name] = several[0] + 1 if type(axes) is int else [axis + 1 for axis in several]
    if "indices" in a.given:
        a.given["indices"] = [None, *a.given["indices"]]


def _whole(t: Translator, x: At) -> At:
    """Return a value with all of torch's axes, even if the images are a first axis of their own."""
    return x if x.images else t.view(x, (1, *t.shape(x)), FIRST)


def _placed(t: Translator, x: At, shape: Shape, images: Images) -> At:
    """Return a value in the `shape` that follows from its images' place, with all of torch's axes."""
    return t.view(x, shape[1:]) if images == FIRST else t.view(x, shape, images)


def _listed(results: Any) -> list[Any]:
    return results if isinstance(results, list) else [results]


def _each(value: Any, change: Callable[[At], At]) -> Any:
    from ._torch_export import At

    if isinstance(value, list):
        return [_each(v, change) for v in value]
    return change(value) if isinstance(value, At) else value
