"""Linear bounds of nonlinear operations over given input intervals."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from functools import cached_property

import torch
from torch import Tensor

from ...errors import Unsupported
from ...graph import MaxPool, Op, ReLU, SparseActivation, evaluate
from ._activation_sparsity import activation_lines, relu_lines
from ._intervals import Interval


@dataclass(frozen=True, eq=False)
class Lines:
    """Elementwise low_slope·z + low_shift ≤ f(z) ≤ high_slope·z + high_shift; `free` marks unstable ReLUs.

    Below an unstable ReLU any slope in [0, 1] through the origin is valid: alpha optimisation chooses it.
    """

    low_slope: Tensor
    low_shift: Tensor
    high_slope: Tensor
    high_shift: Tensor
    free: Tensor

    def __getitem__(self, images: slice) -> Lines:
        """Return the bounds of some of the images."""
        return Lines(*(getattr(self, field.name)[images] for field in fields(self)))

    def pull(self, a: Tensor, alpha: Tensor | None) -> tuple[Tensor, Tensor]:
        """Bound a·f(z), a of shape (N, K, ...), from below by b·z + c: return b (N, K, ...) and c (N, K)."""
        slope = self.low_slope[:, None]
        if alpha is not None:
            slope = torch.where(self.free[:, None], alpha, slope)
        up, down = a.clamp_min(0), a.clamp_max(0)
        shift = (up * self.low_shift[:, None] + down * self.high_shift[:, None]).flatten(2).sum(2)
        return up * slope + down * self.high_slope[:, None], shift


@dataclass(frozen=True, eq=False)
class WindowLines:
    """Bounds of maxima over windows: `index` (out, k) points into the flat input, one past its end for padding.

    The maximum is at least the entry `best` (N, out) of its window and at most slopes·z + shift. `tile` is the window's
    (height, width) where windows cover the input and share nothing.
    """

    index: Tensor
    best: Tensor
    slopes: Tensor
    shift: Tensor
    shape: tuple[int, ...]
    tile: tuple[int, int] | None = None

    def __getitem__(self, images: slice) -> WindowLines:
        """Return the bounds of some of the images."""
        return replace(self, best=self.best[images], slopes=self.slopes[images], shift=self.shift[images])

    def pull(self, a: Tensor, alpha: Tensor | None) -> tuple[Tensor, Tensor]:
        """As for Lines; a maximum has no slope to optimise."""
        flat = a.flatten(2)
        up, down = flat.clamp_min(0), flat.clamp_max(0)
        shift = (down * self.shift[:, None]).sum(2)
        if self.tile is not None:
            return self._spread(up, down).view(*a.shape[:2], *self.shape), shift
        spread = down[..., None] * self.slopes[:, None]
        chosen = self.best[:, None, :, None].expand(*up.shape, 1)
        spread = spread.scatter_add(3, chosen, up[..., None])
        pixels = math.prod(self.shape)
        pulled = flat.new_zeros(*flat.shape[:2], pixels + 1)
        pulled = pulled.index_add(2, self.index.flatten(), spread.flatten(2))[..., :pixels]
        return pulled.reshape(*a.shape[:2], *self.shape), shift

    def _spread(self, up: Tensor, down: Tensor) -> Tensor:
        """Do what `pull` does for windows that share nothing: one entry of all windows after the other."""
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
        """Return, for each entry of a window, the slopes and 1 where it is the best: two of (N, 1, out)."""
        first = torch.zeros_like(self.slopes).scatter_(2, self.best[..., None], 1.0)
        return [
            (self.slopes[:, None, :, entry].contiguous(), first[:, None, :, entry].contiguous())
            for entry in range(self.slopes.shape[2])
        ]


Relaxation = Lines | WindowLines


def relax(op: Op, bounds: Interval) -> Relaxation:
    """Return linear bounds of a nonlinear operation whose input lies in the given interval."""
    match op:
        case ReLU():
            return _relu(bounds)
        case MaxPool():
            return _max_pool(op, bounds)
        case SparseActivation():
            return Lines(*activation_lines(op, *bounds), torch.zeros_like(bounds.lower, dtype=torch.bool))
    raise Unsupported(f"an operation of type {type(op).__name__} has no linear relaxation")


def _relu(bounds: Interval) -> Lines:
    unstable = (bounds.lower < 0) & (bounds.upper > 0)
    return Lines(*relu_lines(*bounds), unstable)


def _max_pool(op: MaxPool, bounds: Interval) -> WindowLines:
    shape = tuple(bounds.lower.shape[1:])
    index = pool_windows(op, shape).to(bounds.lower.device)
    lower, upper = (_gather(value, index) for value in bounds)
    floor, best = lower.max(2)
    ceiling = upper.amax(2)
    # For any level ≥ every lower bound: max z ≤ level + Σ relu(z_j − level), and a chord bounds each summand. The
    # level at which the slopes sum to one is the tightest on average; it is kept in [floor, ceiling].
    width = (upper - lower).clamp_min(1e-12)
    rivals = upper > floor[..., None]
    weight = torch.where(rivals, 1 / width, 0)
    level = ((weight * torch.where(rivals, upper, 0)).sum(2) - 1) / weight.sum(2).clamp_min(1e-12)
    level = torch.minimum(torch.maximum(level, floor), ceiling)
    slopes = torch.where(rivals, (upper - level[..., None]).clamp_min(0) / (upper - lower).clamp_min(1e-300), 0)
    shift = level - (slopes * torch.where(rivals, lower, 0)).sum(2)
    return WindowLines(index, best, slopes, shift, shape, tile_of(op, shape))


def tile_of(op: MaxPool, shape: tuple[int, ...]) -> tuple[int, int] | None:
    """Return the height and width of windows that tile an input of this shape; None where they do not."""
    alone = op.stride == op.kernel and op.padding == (0, 0) and op.dilation == (1, 1)
    covered = all(side % size == 0 for side, size in zip(shape[1:], op.kernel, strict=True))
    return op.kernel if alone and covered else None


def _gather(value: Tensor, index: Tensor) -> Tensor:
    padded = torch.cat([value.flatten(1), value.new_full((len(value), 1), -torch.inf)], 1)
    return padded[:, index]


def pool_windows(op: MaxPool, shape: tuple[int, ...]) -> Tensor:
    """Return what each maximum is of: indices (out, k) into the flat input, one past its end for padding."""
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
