"""Rewrite operations that linear layers, ReLU and Add can express exactly.

Concatenation and the choice of channels are convolutions of ones and zeros; activations of a few linear
pieces are sums of ReLUs. Anything else stays a Call, for which its reader has a rule or which it refuses.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ._ops import Add, Affine, Call, Conv2d, Flatten, Graph, Linear, Node, Op, ReLU, Reshape
from ._passes import needed


def spelled_out(graph: Graph, dtype: torch.dtype) -> Graph:
    """Return an equal graph with as few Calls as possible; `dtype` is the type of its weights."""
    writer = _Writer(graph.nodes, dtype)
    for place, node in enumerate(graph.nodes):
        writer.places.append(writer.written(place, node))
    return replace(graph, nodes=needed(writer.nodes, writer.places[-1]))


class _Writer:
    """Rewrite a graph: `places` maps each old node to the new node with its value."""

    def __init__(self, old: tuple[Node, ...], dtype: torch.dtype) -> None:
        self.old, self.dtype = old, dtype
        self.nodes: list[Node] = []
        self.places: list[int] = []
        self.now = old[0]

    def written(self, place: int, node: Node) -> int:
        self.now, found = node, None
        if isinstance(node.op, Call) and (rule := _RULES.get(node.op.name)):
            found = rule(self, node, node.op.options)
        elif isinstance(node.op, Reshape):
            found = _shuffled(self, node)
        elif isinstance(node.op, Flatten):
            found = _pooled(self, node)
        if found is None:
            self.nodes.append(replace(node, inputs=tuple(self.places[i] for i in node.inputs)))
            found = len(self.nodes) - 1
        return found

    def say(self, op: Op, *inputs: int, shape: tuple[int, ...]) -> int:
        """Replace the current node by an operation; return its index."""
        self.nodes.append(Node(op, inputs, shape, self.now.path, self.now.line))
        return len(self.nodes) - 1

    def scaled(self, source: int, scale: float, shift: float) -> int:
        """Return scale · x + shift for numbers."""
        shape = self.nodes[source].shape
        factors = (torch.full((shape[0],), value, dtype=self.dtype) for value in (scale, shift))
        return source if (scale, shift) == (1, 0) else self.say(Affine("", *factors), source, shape=shape)

    def hinge(self, source: int, *, at: float = 0.0, slope: float = 1.0) -> int:
        """Return |slope| · max(±(x − at), 0), on the side of the slope's sign, times that sign."""
        shape, side = self.nodes[source].shape, 1.0 if slope > 0 else -1.0
        found = self.say(ReLU(), self.scaled(source, side, -side * at), shape=shape)
        return self.scaled(found, slope, 0.0)

    def total(self, *parts: int) -> int:
        first, *others = parts
        for other in others:
            first = self.say(Add(), first, other, shape=self.nodes[first].shape)
        return first

    def mixed(self, source: int, weight: Tensor) -> int | None:
        """Return channels mixed by a weight (out, in); None for values that are neither flat nor feature maps."""
        sides = self.nodes[source].shape[1:]
        if len(sides) not in (0, 2):
            return None
        weight = weight.to(self.dtype)
        op: Op = Linear("", weight, None)
        if sides:
            op = Conv2d("", weight[:, :, None, None], None, (1, 1), (0, 0), (1, 1), 1)
        return self.say(op, source, shape=(len(weight), *sides))


Rule = Callable[[_Writer, Node, Any], int | None]


def _clamped(w: _Writer, node: Node, options: Any) -> int | None:
    low, high = {"relu6": (0.0, 6.0), "hardtanh": (-1.0, 1.0)}.get(_name(node), (None, None))
    low = options.get("min", options.get("min_val", low))
    high = options.get("max", options.get("max_val", high))
    return _between(w, w.places[node.inputs[0]], low, high) if len(node.inputs) == 1 and node.shape else None


def _between(w: _Writer, x: int, low: Any, high: Any) -> int | None:
    """Return x limited to [low, high] for numbers, of which one may be None."""
    if not all(value is None or isinstance(value, int | float) for value in (low, high)):
        return None
    if low is None:
        return x if high is None else w.scaled(w.hinge(x, at=high, slope=-1.0), 1.0, high)
    above = w.hinge(x, at=low)
    found = above if high is None else w.total(above, w.scaled(w.hinge(x, at=high), -1.0, 0.0))
    return w.scaled(found, 1.0, low)


def _leaky(w: _Writer, node: Node, options: Any) -> int | None:
    x, slope = w.places[node.inputs[0]], options.get("negative_slope", 0.01)
    return w.total(w.hinge(x), w.hinge(x, slope=-slope)) if slope > 0 and node.shape else None


def _absolute(w: _Writer, node: Node, _: Any) -> int | None:
    x = w.places[node.inputs[0]]
    return w.total(w.hinge(x), w.scaled(w.hinge(x, slope=-1.0), -1.0, 0.0)) if node.shape else None


def _hard_sigmoid(w: _Writer, node: Node, _: Any) -> int | None:
    if not node.shape:
        return None
    found = _between(w, w.scaled(w.places[node.inputs[0]], 1.0, 3.0), 0.0, 6.0)
    return None if found is None else w.scaled(found, 1 / 6, 0.0)


def _larger(w: _Writer, node: Node, _: Any) -> int | None:
    """maximum(x, y) = x + relu(y − x), and minimum(x, y) = x − relu(x − y)."""
    x, y = (w.places[i] for i in node.inputs)
    if not node.shape or {w.nodes[i].shape for i in (x, y)} != {node.shape}:
        return None
    side = 1.0 if _name(node) == "maximum" else -1.0
    apart = w.total(w.scaled(y, side, 0.0), w.scaled(x, -side, 0.0))
    return w.total(x, w.scaled(w.hinge(apart), side, 0.0))


def _joined(w: _Writer, node: Node, options: Any) -> int | None:
    """Concatenation of channels: each part is moved to its place and padded with zeros."""
    if options.get("dim", 0) % (len(node.shape) + 1) != 1 or len(node.shape) not in (1, 3):
        return None
    eye, parts, start = torch.eye(node.shape[0]), [], 0
    for source in (w.places[i] for i in node.inputs):
        count = w.nodes[source].shape[0]
        parts.append(w.mixed(source, eye[:, start : start + count]))
        start += count
    return w.total(*(part for part in parts if part is not None))


def _chosen(w: _Writer, node: Node, options: Any) -> int | None:
    """Channels chosen by narrow, slice or index_select."""
    source = w.places[node.inputs[0]]
    count = w.nodes[source].shape[0] if w.nodes[source].shape else 0
    if options.get("dim", 0) % (len(node.shape) + 1) != 1 or len(w.nodes[source].shape) != len(node.shape):
        return None
    every = torch.arange(count)
    if "index" in options:
        rows = every[options["index"].cpu()]
    elif "length" in options:
        rows = every[options["start"] :][: options["length"]]
    else:
        rows = every[options.get("start") : options.get("end") : options.get("step", 1)]
    return w.mixed(source, torch.eye(count)[rows])


def _shuffle(w: _Writer, node: Node, options: Any) -> int | None:
    return _interleaved(w, w.places[node.inputs[0]], options["groups"])


def _shuffled(w: _Writer, node: Node) -> int | None:
    """ShuffleNet's channel shuffle: a reshape to groups, their transposition, and the reshape back."""
    turn = w.old[node.inputs[0]]
    if not isinstance(turn.op, Call) or turn.op.name not in ("transpose", "permute") or len(turn.shape) != 4:
        return None
    grouped, options = w.old[turn.inputs[0]], turn.op.options
    axes = [options["dim0"], options["dim1"]] if turn.op.name == "transpose" else options["dims"]
    if sorted(a % 5 for a in axes) != ([1, 2] if len(axes) == 2 else [0, 1, 2, 3, 4]) or list(axes)[:1] in ([3], [4]):
        return None
    if turn.shape != (*grouped.shape[1::-1], *grouped.shape[2:]) or not isinstance(grouped.op, Reshape):
        return None
    before = w.old[grouped.inputs[0]]
    same = before.shape == node.shape and (grouped.shape[0] * grouped.shape[1], *grouped.shape[2:]) == node.shape
    return _interleaved(w, w.places[grouped.inputs[0]], grouped.shape[0]) if same else None


def _interleaved(w: _Writer, source: int, groups: int) -> int | None:
    count = w.nodes[source].shape[0]
    return w.mixed(source, torch.eye(count)[torch.arange(count).view(groups, -1).T.flatten()])


def _averaged(w: _Writer, node: Node, options: Any) -> int | None:
    """Means over zero-padded windows of one size: a depthwise convolution."""
    pads = _pair(options.get("padding", 0))
    even = options.get("count_include_pad", True) or pads == (0, 0)
    if options.get("ceil_mode") or not even or len(node.shape) != 3:
        return None
    kernel = _pair(options["kernel_size"])
    value = 1 / (options.get("divisor_override") or kernel[0] * kernel[1])
    weight = torch.full((node.shape[0], 1, *kernel), value, dtype=w.dtype)
    stride = _pair(options.get("stride") or kernel)
    op = Conv2d("", weight, None, stride, pads, (1, 1), node.shape[0])
    return w.say(op, w.places[node.inputs[0]], shape=node.shape)


def _pair(value: Any) -> tuple[int, int]:
    many = (value,) if isinstance(value, int) else tuple(value)
    return many * 2 if len(many) == 1 else (many[0], many[1])


def _padded(w: _Writer, node: Node, options: Any) -> int | None:
    """Zeros around a map: a depthwise convolution with a single one in its kernel."""
    pads = list(options.get("pad", ()))
    zeros = not options.get("value") and options.get("mode", "constant") == "constant"
    if not zeros or len(node.shape) != 3 or len(pads) != 4 or min(pads) < 0:
        return None
    left, right, top, bottom = pads
    wide, high = max(left, right), max(top, bottom)
    weight = torch.zeros(node.shape[0], 1, abs(top - bottom) + 1, abs(left - right) + 1, dtype=w.dtype)
    weight[:, :, high - top, wide - left] = 1
    op = Conv2d("", weight, None, (1, 1), (high, wide), (1, 1), node.shape[0])
    return w.say(op, w.places[node.inputs[0]], shape=node.shape)


def _pooled(w: _Writer, node: Node) -> int | None:
    """Adaptive means over windows of several sizes, then flat: a Linear, since the windows are known."""
    pool = w.old[node.inputs[0]]
    if not isinstance(pool.op, Call) or not pool.op.name.strip("_").startswith("adaptive_avg_pool2d"):
        return None
    source = w.places[pool.inputs[0]]
    channels, *sides = w.nodes[source].shape
    count = sides[0] * sides[1]
    spots = torch.eye(count, dtype=w.dtype).view(count, 1, *sides)
    means = torch.nn.functional.adaptive_avg_pool2d(spots, (pool.shape[1], pool.shape[2])).flatten(1).T
    flat = w.say(Flatten(), source, shape=(channels * count,))
    eye = torch.eye(channels, dtype=w.dtype)
    weight = (eye[:, None, :, None] * means[:, None, :]).reshape(channels * len(means), channels * count)
    return w.say(Linear("", weight, None), flat, shape=(len(weight),))


def _name(node: Node) -> str:
    return node.op.name if isinstance(node.op, Call) else ""


_RULES: dict[str, Rule] = {
    **dict.fromkeys(("relu6", "hardtanh", "clamp", "clamp_min", "clamp_max"), _clamped),
    "leaky_relu": _leaky,
    "abs": _absolute,
    "hardsigmoid": _hard_sigmoid,
    **dict.fromkeys(("maximum", "minimum"), _larger),
    "cat": _joined,
    **dict.fromkeys(("narrow", "slice", "index_select"), _chosen),
    "channel_shuffle": _shuffle,
    "avg_pool2d": _averaged,
    **dict.fromkeys(("constant_pad_nd", "pad"), _padded),
}
