"""Convolutions without padding look through windows: what a neuron may be depends on its own window of the image.

The neurons of one place share a window. Cut down to it, the network is small, and its bounds are the same.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from ...graph import Affine, AvgPool, Conv2d, Graph, Input, MaxPool, Node, ReLU
from .._region import Region
from ._relaxations import Interval, Lines, Relaxation, WindowLines, pool_windows, tile_of

_WORTH = 0.5  # share of the network's values in a window up to which cutting pays


@dataclass(frozen=True)
class Windows:
    """What each node must hold for one place of the last: size and stride of its windows, (vertical, horizontal)."""

    graph: Graph
    sizes: tuple[tuple[int, int], ...]
    strides: tuple[tuple[int, int], ...]
    places: tuple[int, int]

    def network(self) -> Graph:
        """Return the network up to the last node, for the window of one place."""
        return Graph(
            tuple(
                Node(node.op, node.inputs, (node.shape[0], *size))
                for node, size in zip(self.graph.nodes, self.sizes, strict=False)
            )
        )

    def region(self, region: Region) -> Region:
        """Return the region of every window, those of one image together: N images to N · places."""
        x, lower, upper = (self._cut(value, 0) for value in (region.x, region.lower, region.upper))
        return Region(x, region.norm, region.eps.repeat_interleave(math.prod(self.places)), lower, upper)

    def relaxation(self, lines: Relaxation, index: int) -> Relaxation:
        """Return the linear bounds of a nonlinear node within every window."""
        if isinstance(lines, Lines):
            return Lines(*(self._cut(value, index) for value in lines))
        op, shape = self.graph.nodes[index].op, (lines.shape[0], *self.sizes[index - 1])
        assert isinstance(op, MaxPool)
        best, slopes, shift = (
            self._cut(value.view(len(value), *self.graph.nodes[index].shape, -1), index).flatten(1, 3)
            for value in (lines.best, lines.slopes, lines.shift)
        )
        return WindowLines(pool_windows(op, shape), best[..., 0], slopes, shift[..., 0], shape, tile_of(op, shape))

    def interval(self, known: Interval) -> Interval:
        """Return the last node's bounds with every place by itself: (N, C, H, W) to (N · H · W, C, 1, 1)."""
        return Interval(*(value.permute(0, 2, 3, 1).reshape(-1, value.shape[1], 1, 1) for value in known))

    def whole(self, found: Interval) -> Interval:
        """Undo `interval`."""
        return Interval(
            *(value.view(-1, *self.places, value.shape[1]).permute(0, 3, 1, 2).contiguous() for value in found)
        )

    def _cut(self, value: Tensor, index: int) -> Tensor:
        """Return the windows of a node's values: (N, C, H, W, ...) to (N · places, C, height, width, ...)."""
        (height, width), (down, across), (rows, columns) = self.sizes[index], self.strides[index], self.places
        seen = value.unfold(2, height, down)[:, :, :rows].unfold(3, width, across)[:, :, :, :columns]
        seen = seen.movedim((-2, -1), (4, 5)).movedim(1, 3)
        return seen.reshape(-1, *seen.shape[3:])


def windows(graph: Graph, index: int) -> Windows | None:
    """Return what the places of a node see of all nodes before it; None where they see most of it, or have padding."""
    nodes = graph.nodes[: index + 1]
    if len(nodes[-1].shape) != 3 or any(node.inputs != (place,) for place, node in enumerate(nodes[1:])):
        return None
    size, stride = (1, 1), (1, 1)
    sizes, strides = [size], [stride]
    for node in reversed(nodes[1:]):
        seen = _seen(node, size, stride)
        if seen is None:
            return None
        size, stride = seen
        sizes.append(size)
        strides.append(stride)
    kept = sum(node.shape[0] * math.prod(size) for node, size in zip(nodes, reversed(sizes), strict=True))
    if kept > _WORTH * sum(math.prod(node.shape) for node in nodes):
        return None
    _, *places = nodes[-1].shape
    return Windows(graph, tuple(reversed(sizes)), tuple(reversed(strides)), (places[0], places[1]))


def _seen(node: Node, size: tuple[int, int], stride: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]] | None:
    """Return size and stride of what a window of a node sees of the node before it."""
    match node.op:
        case Conv2d(padding=(0, 0), dilation=dilation, stride=step):
            kernel = node.op.weight.shape[2:]
        case MaxPool(padding=(0, 0), dilation=dilation, stride=step, kernel=kernel, ceil_mode=False):
            pass
        case AvgPool(stride=step, kernel=kernel):
            dilation = (1, 1)
        case Affine() | ReLU() | Input():
            return size, stride
        case _:
            return None
    wide = [(s - 1) * t + (k - 1) * d + 1 for s, t, k, d in zip(size, step, kernel, dilation, strict=True)]
    return (wide[0], wide[1]), (stride[0] * step[0], stride[1] * step[1])
