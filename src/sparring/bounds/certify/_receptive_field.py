"""Bounds of convolutions within the receptive field of each neuron.

The neurons at one position share a window. Restricted to it, the network is small, and its bounds are the same. Windows
may reach beyond the image into padding, which is ignored.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ...graph import Add, Affine, AvgPool, Conv2d, Graph, Input, MaxPool, Node, Op, ReLU
from .._curves import Curve
from .._network import LinearOp
from .._region import Region
from ._relaxations import Lines, Pulled, PulledBoth, Relaxation, WindowLines, pool_windows, tile_of

_WORTH = 0.5  # share of the network's values in a window up to which cutting pays
_ELEMENTWISE = (Affine, ReLU, Add, Curve)
Pair = tuple[int, int]


class Window(NamedTuple):
    """The part of a node's map that the first place of another needs; the next place's lies `stride` farther.

    All are (vertical, horizontal); where there is padding, it starts before 0.
    """

    start: Pair
    size: Pair
    stride: Pair

    def joined(self, other: Window | None) -> Window | None:
        """Return the smallest window that contains both, or None if they do not move together."""
        if other is None or other == self:
            return self
        if other.stride != self.stride:
            return None
        top, left = map(min, self.start, other.start)
        bottom, right = map(max, self.ends, other.ends)
        return Window((top, left), (bottom - top, right - left), self.stride)

    @property
    def ends(self) -> Pair:
        """Return the first row below it, and the first column to the right of it."""
        return self.start[0] + self.size[0], self.start[1] + self.size[1]


@dataclass(frozen=True, eq=False)
class Seen:
    """The part of a node's window that a reader sees, without anything beyond the image.

    inside: 1 within the image, (places, 1, height, width) of the part; pad: how far the window extends further, as for
    F.pad.
    """

    inside: Tensor
    pad: tuple[int, int, int, int]

    def of(self, images: slice) -> Seen:
        """Return the part seen from some of the places."""
        return replace(self, inside=self.inside[images])

    def pull(self, a: Tensor, alpha: Tensor | None) -> Pulled:
        """Return the coefficients on the whole window; nothing is added."""
        return (F.pad(a * self.inside[:, None].to(a.dtype), self.pad),), a.new_zeros(a.shape[:2])

    def pull_both(self, a: Tensor) -> PulledBoth | None:
        """Do the same for a and −a at once."""
        (part,), zero = self.pull(a, None)
        return part, None, zero, zero


@dataclass(frozen=True, eq=False)
class View:
    """A node restricted to the part that one reader sees."""


@dataclass(frozen=True, eq=False)
class Windows:
    """The part of every node that the places of the last one need, and which of these places are used: flat numbers."""

    graph: Graph
    index: int
    windows: Mapping[int, Window]
    places: Pair

    @property
    def padded(self) -> bool:
        """Return whether a window reaches beyond the image."""
        return any(self._beyond(index) for index in self.windows)

    def network(
        self, chosen: Tensor, relaxed: Mapping[int, Relaxation], stem: Stem | None = None
    ) -> tuple[Graph, dict[int, Relaxation]]:
        """Return the network up to the last node, for the windows of chosen places of one image, and its bounds."""
        nodes: list[Node] = []
        lines: dict[int, Relaxation] = {}
        at: dict[int, int] = {}
        last = stem.index if stem is not None and stem.index in self.windows else 0
        for index in sorted(i for i in self.windows if i == 0 or i >= last):
            node, sources = self.graph.nodes[index], []
            if stem is not None and index == last > 0:
                lines[1] = stem.seen(self.windows[index], *self._at(chosen), self.places)
                nodes.append(Node(View(), (0,), (node.shape[0], *self.windows[index].size)))  # type: ignore[arg-type]
                at[index] = 1
                continue
            for source in node.inputs:
                sources.append(at[source])
                if (seen := self._seen(source, index, chosen)) is not None:
                    shape = (self.graph.nodes[source].shape[0], *seen.inside.shape[2:])
                    nodes.append(Node(View(), (at[source],), shape))  # type: ignore[arg-type]
                    lines[len(nodes) - 1] = seen
                    sources[-1] = len(nodes) - 1
            at[index] = len(nodes)
            if index in relaxed:
                lines[at[index]] = self._relaxation(relaxed[index], index, chosen)
            nodes.append(Node(_unpadded(node.op), tuple(sources), (node.shape[0], *self.windows[index].size)))
        return Graph(tuple(nodes)), lines

    def region(self, region: Region, chosen: Tensor) -> Region:
        """Return the region of the windows of chosen places: one image to len(chosen)."""
        x, lower, upper = (self._cut(value, 0, chosen) for value in (region.x, region.lower, region.upper))
        return Region(x, region.norm, region.eps.repeat_interleave(len(chosen)), lower, upper)

    def by_place(self, value: Tensor) -> Tensor:
        """Return the last node's values with every place by itself: (1, C, H, W) to (H · W, C, 1, 1)."""
        return value.permute(0, 2, 3, 1).reshape(-1, value.shape[1], 1, 1)

    def whole(self, value: Tensor) -> Tensor:
        """Undo `by_place`."""
        return value.view(-1, *self.places, value.shape[1]).permute(0, 3, 1, 2).contiguous()

    def _relaxation(self, lines: Relaxation, index: int, chosen: Tensor) -> Relaxation:
        """Return the linear bounds of a nonlinear node within the windows; those beyond the image are zero."""
        if isinstance(lines, Lines):
            return Lines(*(self._cut(value, index, chosen) for value in lines))
        op = _unpadded(self.graph.nodes[index].op)
        part = _needed(op, self.windows[index])
        assert isinstance(op, MaxPool) and isinstance(lines, WindowLines) and part is not None
        shape = (lines.shape[0], *part.size)
        best, slopes, shift, floor = (
            None
            if value is None
            else self._cut(value.view(len(value), *self.graph.nodes[index].shape, -1), index, chosen).flatten(1, 3)
            for value in (lines.best, lines.slopes, lines.shift, lines.floor)
        )
        assert best is not None and slopes is not None and shift is not None
        floor = None if floor is None else floor[..., 0]
        tile = tile_of(op, shape)
        return WindowLines(pool_windows(op, shape), best[..., 0], slopes, shift[..., 0], shape, tile, floor)

    def _seen(self, source: int, reader: int, chosen: Tensor) -> Seen | None:
        """Return the part of a node that a reader sees; None if that is its whole window and lies within the image."""
        op, whole = self.graph.nodes[reader].op, self.windows[source]
        part = _needed(op, self.windows[reader])
        assert part is not None
        plain = (
            not isinstance(op, Conv2d) or op.padding == (0, 0) or isinstance(self.graph.nodes[source].op, ReLU | Curve)
        )
        if part == whole and (plain or not self._beyond(source)):
            return None
        top, left = (a - b for a, b in zip(part.start, whole.start, strict=True))
        pad = (left, whole.size[1] - part.size[1] - left, top, whole.size[0] - part.size[0] - top)
        _, *sides = self.graph.nodes[source].shape
        rows, columns = (
            start + places[:, None] * stride + torch.arange(size)
            for start, places, stride, size in zip(part.start, self._at(chosen), part.stride, part.size, strict=True)
        )
        inside = ((rows >= 0) & (rows < sides[0]))[:, None, :, None] & ((columns >= 0) & (columns < sides[1]))[
            :, None, None
        ]
        return Seen(inside, pad)

    def _at(self, chosen: Tensor) -> tuple[Tensor, Tensor]:
        return chosen // self.places[1], chosen % self.places[1]

    def _beyond(self, index: int) -> bool:
        return any(before or after for before, after in self._margins(index))

    def _margins(self, index: int) -> tuple[Pair, Pair]:
        """Return how far the windows of a node reach beyond its map: (above, below) and (left, right)."""
        _, *sides = self.graph.nodes[index].shape
        down, across = (
            (max(0, -start), max(0, start + (count - 1) * stride + size - side))
            for start, size, stride, count, side in zip(*self.windows[index], self.places, sides, strict=True)
        )
        return down, across

    def _cut(self, value: Tensor, index: int, chosen: Tensor) -> Tensor:
        """Return windows of a node's values for one image: (1, C, H, W, ...) to (places, C, h, w, ...)."""
        start, size, stride = self.windows[index]
        if self._beyond(index):
            down, across = self._margins(index)
            value = F.pad(value, (0, 0) * (value.dim() - 4) + (*across, *down))
        seen = value[0, :, max(0, start[0]) :, max(0, start[1]) :].unfold(1, size[0], stride[0])
        rows, columns = self._at(chosen)
        seen = seen.unfold(2, size[1], stride[1])[:, rows, columns]
        return seen.movedim((-2, -1), (2, 3)).movedim(1, 0).contiguous()


@dataclass(frozen=True, eq=False)
class StemLines:
    """Bounds of a stem's outputs by linear functions of the pixels, as in `Stem`, for windows at some places.

    functions: (rows, columns, 2, height, width, pixels + 1, C) of windows at all places.
    """

    functions: Tensor
    rows: Tensor
    columns: Tensor
    kernel: Pair
    stride: Pair

    def of(self, images: slice) -> StemLines:
        """Return the bounds at some of the places."""
        return replace(self, rows=self.rows[images], columns=self.columns[images])

    def pull(self, a: Tensor, alpha: Tensor | None) -> Pulled:
        """As for Lines, but down to the pixels."""
        pixels, added = self._pixels(a)
        return (pixels[:, 0] - pixels[:, 1],), added[:, 0] - added[:, 1]

    def pull_both(self, a: Tensor) -> PulledBoth | None:
        """Do the same for a and −a at once."""
        pixels, added = self._pixels(a)
        spread, open_ = pixels[:, 1], added[:, 1]
        return pixels[:, 0] - spread, -2 * spread, added[:, 0] - open_, -added[:, 0] - open_

    def _pixels(self, a: Tensor) -> tuple[Tensor, Tensor]:
        """Multiply a with the mean of both functions, and |a| with half their difference; add up what each pixel gets.

        Coefficients (N, K, C, height, width) to (N, 2, K, *pixels), and to what is added, (N, 2, K).
        """
        here = a.permute(0, 3, 4, 2, 1).contiguous()  # units last: they are moved many at once
        at = zip(self.rows.tolist(), self.columns.tolist(), strict=True)
        found = torch.stack([self.functions[place] for place in at]) @ torch.stack([here, here.abs()], 1)
        parts = (
            found[..., :-1, :].view(*found.shape[:4], -1, *self.kernel, found.shape[-1]).permute(0, 1, 4, 5, 6, 2, 3, 7)
        )
        sides = [(n - 1) * step + 1 for n, step in zip(a.shape[3:], self.stride, strict=True)]
        whole = [n + size - 1 for n, size in zip(sides, self.kernel, strict=True)]
        pixels = found.new_zeros(*parts.shape[:3], *whole, parts.shape[-1])
        for row, column in itertools.product(*map(range, self.kernel)):
            below, right = (slice(at, at + n, by) for at, n, by in zip((row, column), sides, self.stride, strict=True))
            pixels[:, :, :, below, right].add_(parts[:, :, :, row, column])  # `+=` would write it a second time
        return pixels.movedim(-1, 2), found[..., -1, :].sum((2, 3), dtype=torch.float64)


@dataclass(frozen=True, eq=False)
class Stem:
    """The first layers of a network, up to node `index`, as two linear functions of the pixels for each output.

    window: the pixels seen by the first place; functions: (H, W, 2, pixels of a window + 1, C), the mean of the
    functions below and above an output, then half their difference, of one image, constants last. CROWN through such
    layers is the same as through these functions: every unit of theirs reaches one output alone, with a weight that is
    not negative.
    """

    index: int
    window: Window
    functions: Tensor

    def before(
        self, graph: Graph, region: Region, relaxed: Mapping[int, Relaxation]
    ) -> tuple[Graph, Region, dict[int, Relaxation]]:
        """Return a network of one image whose first layers are these functions, its region with padding, and bounds."""
        shape, drop, (start, size, stride) = graph.nodes[self.index].shape, self.index - 1, self.window
        pad: list[int] = []
        for at, n, step, one, side in zip(start, shape[1:], stride, size, graph.nodes[0].shape[1:], strict=True):
            pad = [-at, at + (n - 1) * step + one - side, *pad]
        x, lower, upper = (F.pad(value, pad) for value in (region.x, region.lower, region.upper))
        pixels = Node(Input(), (), tuple(x.shape[1:]))
        first = Node(View(), (0,), shape)  # type: ignore[arg-type]
        rest = (replace(node, inputs=tuple(i - drop for i in node.inputs)) for node in graph.nodes[self.index + 1 :])
        zero = torch.zeros(1, dtype=torch.int64)
        functions = self.seen(Window((0, 0), (shape[1], shape[2]), (1, 1)), zero, zero, (1, 1))
        functions = replace(functions, functions=functions.functions.contiguous())  # many products read them
        lines = {1: functions} | {i - drop: value for i, value in relaxed.items() if i > self.index}
        return Graph((pixels, first, *rest)), replace(region, x=x, lower=lower, upper=upper), lines

    def seen(self, window: Window, rows: Tensor, columns: Tensor, places: Pair) -> StemLines:
        """Return the functions within windows at some of all places; those beyond the image are zero."""
        functions = _unfolded(self.functions, window, places).movedim((-2, -1), (3, 4))
        return StemLines(functions, rows, columns, self.window.size, self.window.stride)


def stem_of(graph: Graph) -> int:
    """Return the last node of a chain as in `Stem`, 0 if there is none."""
    last = 0
    for index, node in enumerate(graph.nodes):
        if index == 0:
            continue
        if node.inputs != (index - 1,) or sum(index - 1 in other.inputs for other in graph.nodes) > 1:
            break
        before = isinstance(node.op, Affine | Conv2d) and last == 0
        tiled = isinstance(node.op, MaxPool) and tile_of(node.op, graph.nodes[index - 1].shape) is not None
        if isinstance(node.op, ReLU) or tiled:
            last = index
        elif not before:
            break
    return last


def _unfolded(value: Tensor, window: Window, places: Pair) -> Tensor:
    """Return the windows (rows, columns, ..., height, width) of a value (H, W, ...), a view if it is not padded."""
    start, size, stride = window
    for axis in (0, 1):
        end = start[axis] + (places[axis] - 1) * stride[axis] + size[axis]
        before, after = max(0, -start[axis]), max(0, end - value.shape[axis])
        value = F.pad(value, (0, 0) * (value.dim() - 1 - axis) + (before, after))
        value = value.narrow(axis, max(0, start[axis]), end - start[axis]).unfold(axis, size[axis], stride[axis])
    return value


def windows(graph: Graph, index: int) -> Windows | None:
    """Return the windows of all nodes before a node that its places see; None if they see most of it."""
    nodes = graph.nodes
    if len(nodes[index].shape) != 3:
        return None
    found = {index: Window((0, 0), (1, 1), (1, 1))}
    for reader in range(index, 0, -1):
        if reader not in found:
            continue
        needed = _needed(nodes[reader].op, found[reader])
        for source in nodes[reader].inputs:
            joined = None if needed is None else needed.joined(found.get(source))
            if joined is None:
                return None
            found[source] = joined
    kept = sum(nodes[i].shape[0] * math.prod(window.size) for i, window in found.items())
    if kept > _WORTH * sum(math.prod(nodes[i].shape) for i in found):
        return None
    _, *places = nodes[index].shape
    return Windows(graph, index, found, (places[0], places[1]))


def whole(graph: Graph, index: int) -> dict[int, tuple[int, ...]] | None:
    """Return the sizes of the maps of all nodes before a node and of itself; None if one moves or multiplies values."""
    found = {index: graph.nodes[index].shape[1:]}
    for reader in range(index, 0, -1):
        if reader not in found:
            continue
        node = graph.nodes[reader]
        if not isinstance(node.op, LinearOp | Add | ReLU | MaxPool | Curve):
            return None
        found |= {source: graph.nodes[source].shape[1:] for source in node.inputs}
    return found


def _needed(op: Op, window: Window) -> Window | None:
    """Return the window of an operation's input that a window of its output needs; None if it is not a window."""
    padding, dilation = (0, 0), (1, 1)
    match op:
        case Conv2d(padding=padding, dilation=dilation, stride=step):
            kernel = (op.weight.shape[2], op.weight.shape[3])
        case MaxPool(padding=padding, dilation=dilation, stride=step, kernel=kernel):
            pass
        case AvgPool(stride=step, kernel=kernel):
            pass
        case _:
            return window if isinstance(op, _ELEMENTWISE) else None
    one, other = (
        (first * t - p, (s - 1) * t + (k - 1) * d + 1, far * t)
        for first, s, far, t, p, k, d in zip(*window, step, padding, kernel, dilation, strict=True)
    )
    return Window(*zip(one, other, strict=True))


def _unpadded(op: Op) -> Op:
    """Return an operation on a window that already contains its padding."""
    match op:
        case Conv2d():
            return replace(op, padding=(0, 0))
        case MaxPool():
            return replace(op, padding=(0, 0), ceil_mode=False)
    return op
