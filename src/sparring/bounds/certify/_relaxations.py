"""Relaxations of single operations: intervals (Gowal et al. 2018), and lines for nonlinear ones over an interval.

Activation-sparsity modules have rules by their `kind`; those without a sound one are refused with the reason.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ...errors import Unsupported
from ...graph import (
    Add,
    Affine,
    AvgPool,
    Conv2d,
    Flatten,
    Graph,
    Linear,
    MaxPool,
    Op,
    ReLU,
    Reshape,
    SparseActivation,
    evaluate,
)
from ...threat import L2, LINF
from .._curves import Curve, between, extremes
from .._network import LinearOp, Moved, Product, mapped
from .._region import Region


class Interval(NamedTuple):
    """Elementwise bounds of a node's output, both of shape (N, ...)."""

    lower: Tensor
    upper: Tensor

    def within(self, other: Interval) -> Interval:
        """Return the intersection; rounding may cross equal bounds."""
        lower = torch.maximum(self.lower, other.lower)
        return Interval(lower, torch.maximum(torch.minimum(self.upper, other.upper), lower))


def propagate(op: Op, *inputs: Interval) -> Interval:
    """Return bounds of an operation's output from bounds of its inputs."""
    lower, upper = inputs[0]
    match op:
        case Linear() | Conv2d():
            centre = evaluate(op, (upper + lower) / 2)
            half = evaluate(mapped(op, torch.abs), (upper - lower) / 2)
            return Interval(centre - half, centre + half)
        case Affine():
            one, two = evaluate(op, lower), evaluate(op, upper)
            return Interval(torch.minimum(one, two), torch.maximum(one, two))
        case ReLU() | MaxPool() | AvgPool() | Flatten() | Reshape():  # all monotone
            return Interval(evaluate(op, lower), evaluate(op, upper))
        case Add():
            return Interval(lower + inputs[1].lower, upper + inputs[1].upper)
        case SparseActivation():
            return Interval(*_activation_interval(op, lower, upper))
        case Curve():
            return Interval(*extremes(op, lower, upper)[:2])
        case Product():
            corners = torch.stack([one * two for one in inputs[0] for two in inputs[1]])
            return Interval(corners.amin(0), corners.amax(0))
        case Moved():
            return _moved(op, inputs)
    raise Unsupported(f"an operation of type {type(op).__name__} has no interval rule")


def _moved(op: Moved, inputs: Sequence[Interval]) -> Interval:
    centre = evaluate(op, *((box.upper + box.lower) / 2 for box in inputs))
    positive = replace(op, options={k: v.abs() if k == "weight" else v for k, v in op.options.items()})
    halves = [(box.upper - box.lower) / 2 for box in inputs]
    half = evaluate(positive, *halves) - evaluate(positive, *(torch.zeros_like(one) for one in halves))
    return Interval(centre - half, centre + half)


def first_layers(graph: Graph, region: Region) -> dict[int, Interval]:
    """Return the bounds of the nodes up to the first layer of weights, which are attained one neuron at a time.

    They use the ball itself and not only its bounding box; l1 has no such rule and gets only the input.
    """
    bounds = {0: Interval(region.lower, region.upper)}
    if region.norm not in (L2, LINF):
        return bounds
    single = {0}  # nodes whose values each come from one pixel
    squares, centres = {0: torch.ones_like(region.x[:1])}, {0: region.x}
    for index, node in enumerate(graph.nodes):
        op, source = node.op, node.inputs[0] if node.inputs else 0
        if not isinstance(op, Affine | Flatten | Linear | Conv2d) or source not in single:
            continue
        box = bounds[index] = propagate(op, bounds[source])
        if isinstance(op, Affine | Flatten):
            single.add(index)
        if region.norm == L2:
            squares[index], centres[index] = evaluate(_squared(op), squares[source]), evaluate(op, centres[source])
            half = region.eps.view(-1, *[1] * (centres[index].dim() - 1)) * squares[index].sqrt()
            low, high = centres[index] - half, centres[index] + half
            bounds[index] = Interval(torch.maximum(box.lower, low), torch.minimum(box.upper, high))
    return bounds


def _squared(op: LinearOp) -> LinearOp:
    """Return the operation that maps squared l2 reaches, of inputs that share no pixel, to squared reaches."""
    return mapped(op, torch.square)


Pulled = tuple[tuple[Tensor, ...], Tensor]  # coefficients (N, K, ...) on every input, and what is added, (N, K)
# Coefficients on one input for a, the sum of those for a and −a or None for zero, and what both add.
PulledBoth = tuple[Tensor, Tensor | None, Tensor, Tensor]


class Lines(NamedTuple):
    """Elementwise low_slope·z + low_shift ≤ f(z) ≤ high_slope·z + high_shift; `free` marks unstable ReLUs.

    Below an unstable ReLU any slope in [0, 1] through the origin is valid: alpha optimisation chooses it.
    """

    low_slope: Tensor
    low_shift: Tensor
    high_slope: Tensor
    high_shift: Tensor
    free: Tensor

    def of(self, images: slice) -> Lines:
        """Return the bounds of some of the images."""
        return Lines(*(value[images] for value in self))

    def rounded(self) -> Lines:
        """Return the lines in float32, which need not be valid."""
        low, high = (self.low_slope.float(), self.low_shift.float()), (self.high_slope.float(), self.high_shift.float())
        return Lines(*low, *high, self.free)

    def around(self, z: Tensor, value: Tensor, *, parallel: bool) -> Lines:
        """Return lines between deviations from z and from f(z); `parallel` ones where any slope below is valid."""
        low = torch.where(self.free & parallel, self.high_slope, self.low_slope)
        low_shift, high_shift = (torch.addcmul(t - value, s, z) for s, t in ((low, self.low_shift), self[2:4]))
        return Lines(low, low_shift, self.high_slope, high_shift, self.free)

    def size(self, z: Tensor) -> Tensor:
        """Return the largest size of a line where those of inputs are at most z."""
        slope, shift = (torch.maximum(one.abs(), two.abs()) for one, two in (self[0:3:2], self[1:4:2]))
        return slope * z + shift

    def pull_both(self, a: Tensor) -> PulledBoth | None:
        """Do what `pull` does for a and −a; None if slopes differ."""
        if not torch.equal(self.low_slope, self.high_slope):
            return None
        low, high = self.low_shift.flatten(1), self.high_shift.flatten(1)
        moved = ((low != 0) | (high != 0)).any(0).nonzero().squeeze(1)  # few: of a ReLU, those of open sign
        low, high = (shift[:, None, moved].double() for shift in (low, high))
        some = a.flatten(2)[:, :, moved].double()
        known, open_ = (some * ((high + low) / 2)).sum(2), (some.abs() * ((high - low) / 2)).sum(2)
        return a * self.high_slope[:, None], None, known - open_, -known - open_

    def pull(self, a: Tensor, alpha: Tensor | None) -> Pulled:
        """Bound a·f(z), a of shape (N, K, ...), from below by b·z + c: return b (N, K, ...) and c (N, K)."""
        slope = self.low_slope[:, None]
        if alpha is not None:
            slope = torch.where(self.free[:, None], alpha, slope)
        up, down = a.clamp_min(0), a.clamp_max(0)
        shift = down * self.high_shift[:, None]
        if bool(self.low_shift.any()):  # a ReLU has none
            shift = up * self.low_shift[:, None] + shift
        return (torch.addcmul(up * slope, down, self.high_slope[:, None]),), _total(shift)


def _total(value: Tensor) -> Tensor:
    """Sum (N, K, ...) to (N, K) in float64, the places of a map before that: rounding is counted by their number."""
    return (
        (value.flatten(3).sum(3) if value.dtype == torch.float32 and value.dim() > 3 else value)
        .flatten(2)
        .sum(2, dtype=torch.float64)
    )


@dataclass(frozen=True, eq=False)
class WindowLines:
    """Bounds of maxima over windows: `index` (out, k) points into the flat input, one past its end for padding.

    The maximum is at least the entry `best` (N, out) of its window plus `floor` and at most slopes·z + shift. `tile` is
    the window's (height, width) if windows tile the input without overlap.
    """

    index: Tensor
    best: Tensor
    slopes: Tensor
    shift: Tensor
    shape: tuple[int, ...]
    tile: tuple[int, int] | None = None
    floor: Tensor | None = None

    def of(self, images: slice) -> WindowLines:
        """Return the bounds of some of the images."""
        floor = None if self.floor is None else self.floor[images]
        return replace(self, best=self.best[images], slopes=self.slopes[images], shift=self.shift[images], floor=floor)

    def around(self, z: Tensor, value: Tensor, *, parallel: bool) -> WindowLines:
        """Return bounds between deviations from z and from its maxima."""
        entries = in_windows(z, self.index, empty=0.0)
        floor = entries.gather(2, self.best[..., None]).squeeze(2) - value.flatten(1)
        shift = self.shift + (self.slopes * entries).sum(2) - value.flatten(1)
        return replace(self, floor=floor, shift=shift)

    def size(self, z: Tensor) -> Tensor:
        """Return the largest size of a bound where those of inputs are at most z, (N, out)."""
        entries = in_windows(z, self.index, empty=0.0)
        best = entries.gather(2, self.best[..., None]).squeeze(2)
        floor = best if self.floor is None else best + self.floor.abs()
        return torch.maximum(floor, (self.slopes * entries).sum(2) + self.shift.abs())

    def rounded(self) -> WindowLines:
        """Return the bounds in float32, which need not be valid."""
        floor = None if self.floor is None else self.floor.float()
        return replace(self, slopes=self.slopes.float(), shift=self.shift.float(), floor=floor)

    def pull_both(self, a: Tensor) -> PulledBoth | None:
        """Slopes differ."""
        return None

    def pull(self, a: Tensor, alpha: Tensor | None) -> Pulled:
        """As for Lines; a maximum has no slope to optimise."""
        flat = a.flatten(2)
        up, down = flat.clamp_min(0), flat.clamp_max(0)
        shift = _total(down * self.shift[:, None])
        if self.floor is not None:
            shift = shift + _total(up * self.floor[:, None])
        if self.tile is not None:
            return (self._spread(up, down).view(*a.shape[:2], *self.shape),), shift
        spread = down[..., None] * self.slopes[:, None]
        chosen = self.best[:, None, :, None].expand(*up.shape, 1)
        spread = spread.scatter_add(3, chosen, up[..., None])
        return (self.added_up(spread),), shift

    def added_up(self, value: Tensor) -> Tensor:
        """Sum the entries of each input over windows: (N, K, out, k) to (N, K, *shape)."""
        total = value.new_zeros(*value.shape[:2], math.prod(self.shape) + 1)
        total = total.index_add(2, self.index.flatten(), value.flatten(2))[..., :-1]
        return total.reshape(*value.shape[:2], *self.shape)

    def _spread(self, up: Tensor, down: Tensor) -> Tensor:
        """Do the same as `pull` for windows without overlap: one entry of all windows after another."""
        assert self.tile is not None
        (height, width), (channels, tall, wide) = self.tile, self.shape
        rows, columns = tall // height, wide // width
        found = up.new_empty(*up.shape[:2], channels, rows, height, columns, width)
        for entry, (slope, first) in enumerate(self._entries):
            value = torch.addcmul(down * slope, up, first)
            found[:, :, :, :, entry // width, :, entry % width] = value.view(*up.shape[:2], channels, rows, columns)
        return found

    @cached_property
    def _entries(self) -> list[tuple[Tensor, Tensor]]:
        """Return, for each entry of a window, its slopes, and 1 where it is the best: two tensors (N, 1, out)."""
        first = torch.zeros_like(self.slopes).scatter_(2, self.best[..., None], 1.0)
        return [
            (self.slopes[:, None, :, entry].contiguous(), first[:, None, :, entry].contiguous())
            for entry in range(self.slopes.shape[2])
        ]


@dataclass(frozen=True, eq=False)
class ProductLines:
    """Bounds of a product: to first order around the centres of both factors, ± the product of their half widths."""

    one: Tensor
    two: Tensor
    half: Tensor

    def of(self, images: slice) -> ProductLines:
        """Return the bounds of some of the images."""
        return ProductLines(self.one[images], self.two[images], self.half[images])

    def pull(self, a: Tensor, alpha: Tensor | None) -> Pulled:
        """As for Lines, for both factors."""
        shift = (a * (self.one * self.two)[:, None] + a.abs() * self.half[:, None]).flatten(2).sum(2)
        parts = (_added_up(a * b[:, None], c) for b, c in ((self.two, self.one), (self.one, self.two)))
        return tuple(parts), -shift

    def pull_both(self, a: Tensor) -> PulledBoth | None:
        """Slopes differ."""
        return None


def _added_up(a: Tensor, like: Tensor) -> Tensor:
    """Add up coefficients (N, K, ...) along the axes over which a value (N, ...) was spread."""
    spread = [i + 1 for i, (have, side) in enumerate(zip(a.shape[1:], like.shape, strict=True)) if i and have != side]
    return a.sum(spread, keepdim=True) if spread else a


class Relaxation(Protocol):
    """Linear bounds of one node over the regions of images."""

    def of(self, images: slice) -> Relaxation:
        """Return those of some of the images."""

    def pull(self, a: Tensor, alpha: Tensor | None) -> Pulled:
        """Bound a·f(z), a of shape (N, K, ...), from below by b·z + c: b (N, K, ...) for each input, and c (N, K)."""

    def pull_both(self, a: Tensor) -> PulledBoth | None:
        """Do what `pull` does for a and −a at once; None if that spares nothing."""


def relax(op: Op, *inputs: Interval) -> Relaxation:
    """Return linear bounds of a nonlinear operation whose inputs lie in the given intervals."""
    bounds = inputs[0]
    match op:
        case ReLU():
            return _relu(bounds)
        case MaxPool():
            return _max_pool(op, bounds)
        case SparseActivation():
            return Lines(*_activation_lines(op, *bounds), torch.zeros_like(bounds.lower, dtype=torch.bool))
        case Curve():
            return Lines(*between(op, *bounds), torch.zeros_like(bounds.lower, dtype=torch.bool))
        case Product():
            (one, two), half = (
                ((box.upper + box.lower) / 2 for box in inputs),
                [(b.upper - b.lower) / 2 for b in inputs],
            )
            return ProductLines(one, two, half[0] * half[1])
    raise Unsupported(f"an operation of type {type(op).__name__} has no linear relaxation")


def _relu(bounds: Interval) -> Lines:
    return Lines(*_relu_lines(*bounds), free=(bounds.lower < 0) & (bounds.upper > 0))


def _max_pool(op: MaxPool, bounds: Interval) -> WindowLines:
    shape = tuple(bounds.lower.shape[1:])
    index = pool_windows(op, shape).to(bounds.lower.device)
    lower, upper = (in_windows(value, index) for value in bounds)
    floor, best = lower.max(2)
    ceiling = upper.amax(2)
    # For any level ≥ every lower bound: max z ≤ level + Σ relu(z_j − level), and a chord bounds each summand. The
    # level at which the slopes sum to one is the tightest on average; it is kept in [floor, ceiling].
    rivals = upper > floor[..., None]
    width = torch.where(rivals, upper - lower, 1)  # never zero, so that gradients stay finite
    weight = torch.where(rivals, 1 / width.clamp_min(1e-12), 0)
    level = ((weight * torch.where(rivals, upper, 0)).sum(2) - 1) / weight.sum(2).clamp_min(1e-12)
    level = torch.minimum(torch.maximum(level, floor), ceiling)
    slopes = torch.where(rivals, (upper - level[..., None]).clamp_min(0) / width, 0)
    shift = level - (slopes * torch.where(rivals, lower, 0)).sum(2)
    return WindowLines(index, best, slopes, shift, shape, tile_of(op, shape))


def rivals(op: MaxPool, bounds: Interval) -> Tensor:
    """Return which inputs (N, ...) may be the largest of a window, if several may."""
    index = pool_windows(op, tuple(bounds.lower.shape[1:])).to(bounds.lower.device)
    lower, upper = (in_windows(value, index) for value in bounds)
    able = upper > lower.amax(2, keepdim=True)
    several = (able & (able.sum(2, keepdim=True) > 1)).flatten(1)
    found = several.new_zeros(len(several), bounds.lower[0].numel() + 1, dtype=torch.int64)
    return found.index_add(1, index.flatten(), several.long())[:, :-1].view(bounds.lower.shape) > 0


def tile_of(op: MaxPool, shape: tuple[int, ...]) -> tuple[int, int] | None:
    """Return the height and width of windows that tile an input of this shape; None if they do not."""
    alone = op.stride == op.kernel and op.padding == (0, 0) and op.dilation == (1, 1)
    covered = all(side % size == 0 for side, size in zip(shape[1:], op.kernel, strict=True))
    return op.kernel if alone and covered else None


def in_windows(value: Tensor, index: Tensor, *, empty: float = -torch.inf) -> Tensor:
    """Return the values (N, ...) in each window, (N, out, k), with minus infinity for padding."""
    padded = torch.cat([value.flatten(1), value.new_full((len(value), 1), empty)], 1)
    return padded[:, index]


def pool_windows(op: MaxPool, shape: tuple[int, ...]) -> Tensor:
    """Return the inputs of each maximum: indices (out, k) into the flat input, one past its end for padding."""
    channels, height, width = shape
    out_height, out_width = evaluate(op, torch.zeros(1, 1, height, width)).shape[2:]

    def positions(axis: int, count: int, size: int) -> Tensor:
        start = torch.arange(count)[:, None] * op.stride[axis] - op.padding[axis]
        at = start + torch.arange(op.kernel[axis]) * op.dilation[axis]
        return torch.where((at >= 0) & (at < size), at, -1)

    rows = positions(0, out_height, height)[:, None, :, None]
    columns = positions(1, out_width, width)[None, :, None, :]
    pixel = torch.where((rows < 0) | (columns < 0), -1, rows * width + columns).reshape(out_height * out_width, -1)
    every = torch.arange(channels)[:, None, None] * height * width + pixel
    return torch.where(pixel < 0, channels * height * width, every).flatten(0, 1)


_Four = tuple[Tensor, Tensor, Tensor, Tensor]  # low slope, low shift, high slope and high shift


def _activation_interval(op: SparseActivation, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
    """Return the bounds of an activation-sparsity module's output from those of its input.

    Raise Unsupported for kinds without a sound rule (random ones, and those this package does not know).
    """
    if op.module.nondecreasing:
        return op.module(lower), op.module(upper)
    if _kind(op) == "top-k":  # each unit is 0 or its ReLU; which one depends on all other units
        return torch.zeros_like(lower), upper.clamp_min(0)
    raise Unsupported(f"activation '{op.name}' of kind '{_kind(op)}' is random or unknown: it has no sound bound")


def _activation_lines(op: SparseActivation, lower: Tensor, upper: Tensor) -> _Four:
    """Return low slope, low shift, high slope and high shift of an activation-sparsity module over an interval."""
    kind = _kind(op)
    if kind == "shifted-relu":
        return _shifted(_relu_lines(lower - _threshold(op), upper - _threshold(op)), -_threshold(op))
    if kind in ("threshold", "percentile"):
        return _jump(lower, upper, _threshold(op))
    if kind == "top-k":
        _, _, slope, shift = _relu_lines(lower, upper)
        return torch.zeros_like(slope), torch.zeros_like(slope), slope, shift
    if kind == "mean-sparse":  # |x − μ| ≤ r becomes μ: the input moves by at most r, then ReLU
        radius = torch.as_tensor(op.module.radius).clamp_min(0).view(1, -1, *[1] * (lower.dim() - 2))
        low_slope, low_shift, _, _ = _shifted(_relu_lines(lower - radius, upper - radius), -radius)
        _, _, high_slope, high_shift = _shifted(_relu_lines(lower + radius, upper + radius), radius)
        return low_slope, low_shift, high_slope, high_shift
    low, high = _activation_interval(op, lower, upper)
    return torch.zeros_like(low), low, torch.zeros_like(high), high


def kink_of(op: SparseActivation) -> float:
    """Return where a continuous module leaves zero, with slope 0 before and 1 after; refuse all discontinuous ones."""
    if _kind(op) == "shifted-relu":
        return float(_threshold(op))
    raise Unsupported(
        f"activation '{op.name}' of kind '{_kind(op)}' is discontinuous or unknown: it has no finite Lipschitz constant"
    )


def _relu_lines(lower: Tensor, upper: Tensor) -> _Four:
    """Return the chord above a ReLU and, below, the line through the origin that leaves the smaller area.

    Zhang et al. 2018, table 2.
    """
    unstable = (lower < 0) & (upper > 0)
    width = torch.where(unstable, upper - lower, 1)  # never zero, so that gradients stay finite
    chord = torch.where(unstable, upper / width, (lower >= 0).to(upper.dtype))
    low = torch.where(unstable, (upper > -lower).to(upper.dtype), chord)
    return low, torch.zeros_like(low), chord, torch.where(unstable, -lower * chord, 0)


def _shifted(lines: _Four, by: Tensor) -> _Four:
    """Return lines in x from lines in x + by."""
    low_slope, low_shift, high_slope, high_shift = lines
    return low_slope, low_shift + low_slope * by, high_slope, high_shift + high_slope * by


def _jump(lower: Tensor, upper: Tensor, at: Tensor) -> _Four:
    """Bound x·1(x > at), at ≥ 0."""
    zero, one = torch.zeros_like(lower), torch.ones_like(lower)
    dead, alive = upper <= at, lower > at
    chord = upper / (upper - lower).clamp_min(1e-300)
    high_slope = torch.where(lower >= 0, one, chord)
    high_shift = torch.where(lower >= 0, zero, -lower * chord)
    steep = upper / (upper - at).clamp_min(1e-300)  # through (at, 0) and (upper, upper)
    steep = torch.where(upper - at > at - lower, steep, zero)
    low_slope = torch.where(alive, one, torch.where(dead, zero, steep))
    low_shift = torch.where(alive | dead, zero, -steep * at)
    high_slope = torch.where(alive, one, torch.where(dead, zero, high_slope))
    high_shift = torch.where(alive | dead, zero, high_shift)
    return low_slope, low_shift, high_slope, high_shift


def _threshold(op: SparseActivation) -> Tensor:
    return torch.as_tensor(op.module.threshold, dtype=torch.float64)


def _kind(op: SparseActivation) -> str:
    return op.module.kind or type(op.module).__name__
