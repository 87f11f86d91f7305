"""Sub-problems of the search for the nearest image of another class, and bounds on their distances."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...graph import Graph, ReLU
from ...threat import L2
from .._network import compacted
from .._region import region
from ..certify._certificates import _ROUNDING
from ..certify._crown import bound_nodes, linear_bound
from ..certify._open_units import NONLINEAR
from ..certify._relaxations import Interval, Lines, Relaxation, relax
from ..verification._leaves import Leaves, joined, slopes_of
from ._half_spaces import Plane, Room

_FALL, _RATE, _RATE_BETA = 0.95, 0.1, 0.2  # of ascent
_STEPS, _MORE = 4, 3  # of ascent, before and after the units are bounded
_MOST = 512  # units of a layer that are bounded again, those whose chords cost most
_WORK = 2**24  # units times pixels of the cells that are bounded at once
_FALLBACK = 1e-9  # of a unit's range, to its score
_ABNORMAL, _INSIDE = 2, 1e-3  # no step is found, at a kink; from a little further inside there often is one
_FEW = 2**17  # coefficients of units that are bounded at once: 1 MB of float64


@dataclass(frozen=True, eq=False)
class Cells(Leaves):
    """Sub-problems as in `Leaves`, with K = 1 and `lower` of the distance; units are those of all ReLUs.

    low, high (N, units): bounds on the units' inputs at the points of each cell that are in the ball.
    """

    low: Tensor
    high: Tensor

    @property
    def open(self) -> Tensor:
        """Which units may have either sign, (N, units)."""
        return (self.low < 0) & (self.high > 0)

    @property
    def known(self) -> Tensor:
        """The signs of units that are split or bounded in the whole cell, (N, units): 1, −1 or 0."""
        return torch.where(self.open, 0, torch.where(self.low >= 0, 1, -1)).to(torch.int8)

    def bounded_by(self, lower: Tensor) -> Cells:
        """Return the cells where better bounds are known, (N,)."""
        return replace(self, lower=torch.maximum(self.lower, lower))

    def replaced(self, where: Tensor, new: Cells) -> Cells:
        """Return the cells with others in some places."""
        pairs = ((getattr(self, f.name), getattr(new, f.name)) for f in fields(self))
        return Cells(*(old.index_copy(0, where, value) for old, value in pairs))


class Bounder:
    """Bounds the distance from one image x (1, ...) to where any of rows·f(x) ≤ 0: rows (Q, classes).

    All bounds hold for points up to `eps` away, so that no distance is proved beyond it.
    """

    def __init__(self, graph: Graph, x: Tensor, rows: Tensor, norm: float) -> None:
        place = torch.arange(x.numel(), dtype=torch.float64).view_as(x)
        self.graph, (origin, used) = compacted(graph, torch.cat([x.double(), place]))
        self.whole, self.used, self.rows, self.norm = x.double(), used.flatten().long(), rows, norm
        self.x, self.shape = origin.flatten(), (1, *origin.shape)
        self.room = Room(norm, -self.x, 1 - self.x)
        self.relus = {i: node.inputs[0] for i, node in enumerate(self.graph.nodes) if isinstance(node.op, ReLU)}
        self.sizes = [math.prod(self.graph.nodes[i].shape) for i in self.relus]

    @property
    def batch(self) -> int:
        """How many cells to bound at once: an even number, few of large networks."""
        return 2 * max(1, min(16, _WORK // (2 * max(1, sum(self.sizes)) * len(self.x))))

    def image(self, step: Tensor) -> Tensor:
        """Return the whole image, (1, ...), at a step of the pixels that the network reads."""
        return self.whole.flatten().index_copy(0, self.used, self.x + step).view_as(self.whole).clamp(0, 1)

    def within_(self, eps: float) -> None:
        """Bound all nodes in a ball."""
        ball = replace(region(self.x.view(self.shape), self.norm, eps), sided=self.norm == L2)
        self.eps = eps
        self.bounds, self.fixed = bound_nodes(self.graph, ball, backward=True)
        self.slack = _ROUNDING * max(float(value.abs().max()) for pair in self.bounds for value in pair)

    def roots(self, owner: Tensor) -> Cells:
        """Return the whole ball for some rows (N,), not bounded yet."""
        nothing = torch.zeros(1, 0, dtype=torch.float64)
        boxes = [self.bounds[source] for source in self.relus.values()]
        low, high = (torch.cat([nothing, *(box[side].flatten(1) for box in boxes)], 1) for side in (0, 1))
        low, high = low.expand(len(owner), -1), high.expand(len(owner), -1)
        alpha, zero = (high > -low).double()[:, None], torch.zeros_like(low)
        return Cells(owner, zero.to(torch.int8), alpha, zero[:, None], zero.new_zeros(len(owner)), zero, low, high)

    def again(self, cells: Cells) -> Cells:
        """Return cells of another ball, not bounded in this one yet."""
        fresh = self.roots(cells.owner)
        return replace(cells, low=fresh.low, high=fresh.high)

    def bounded(self, cells: Cells) -> tuple[Cells, Tensor]:
        """Bound cells, and return the steps to the nearest points that their linear bounds allow, (N, pixels), too.

        What the half-space of a cell leaves of the ball bounds the units, and these a better half-space.
        """
        low = torch.where(cells.signs > 0, cells.low.clamp_min(0), cells.low)
        high = torch.where(cells.signs < 0, cells.high.clamp_max(0), cells.high)
        cells = self.ascended(replace(cells, low=low, high=high), _STEPS)
        left = (cells.lower < self.eps).nonzero().squeeze(1)
        if len(left):
            cells = cells.replaced(left, self.ascended(self._narrowed(cells[left]), _MORE))
        return self.scored(cells)

    def ascended(self, cells: Cells, steps: int) -> Cells:
        """Ascend on the slopes and multipliers of cells, from which every bound is valid."""
        lines = self._lines(cells)
        alpha, beta = cells.alpha.clone().requires_grad_(), cells.beta.clone().requires_grad_()
        optimiser = torch.optim.Adam([{"params": [alpha], "lr": _RATE}, {"params": [beta], "lr": _RATE_BETA}])
        for _ in range(steps if alpha.numel() else 0):
            with torch.enable_grad():
                value, _ = self._value(self._plane(cells, lines, alpha, beta))
                alpha.grad, beta.grad = slopes_of(-value.clamp_max(2 * self.eps).sum(), [alpha, beta])
            optimiser.step()
            alpha.clamp_(0, 1)
            beta.clamp_min_(0)
            for group in optimiser.param_groups:
                group["lr"] *= _FALL
        alpha, beta = alpha.detach(), beta.detach()
        value, _ = self._value(self._plane(cells, lines, alpha, beta))
        return replace(cells, alpha=alpha, beta=beta, lower=torch.maximum(cells.lower, value.clamp_max(self.eps)))

    def _value(self, plane: Plane) -> tuple[Tensor, Tensor]:
        """Bound the distance of half-spaces, or return by how much the image is in them, below 0; and the steps."""
        found, step = self.room.away(plane)
        return torch.where(plane.gap > 0, found, plane.gap), step

    def _plane(self, cells: Cells, lines: Mapping[int, Relaxation], alpha: Tensor, beta: Tensor) -> Plane:
        """Return half-spaces that contain all points of cells in the ball that have another class."""
        multipliers: dict[int, Tensor] = {}
        for index, value in self.by_relu(-beta * cells.signs[:, None]).items():
            source = self.relus[index]
            multipliers[source] = multipliers[source] + value if source in multipliers else value
        rows, slopes = self.rows[cells.owner][:, None], self.by_relu(alpha)
        a, shift = linear_bound(self.graph, len(self.graph.nodes) - 1, rows, lines, alpha=slopes, beta=multipliers)
        return Plane(a[:, 0], shift[:, 0] + a[:, 0] @ self.x - self.slack)

    def by_relu(self, values: Tensor) -> dict[int, Tensor]:
        """Return numbers of the units (..., units) by their ReLUs."""
        parts = zip(self.relus, torch.split(values, self.sizes, -1), strict=True)
        return {index: part.view(*part.shape[:-1], *self.graph.nodes[index].shape) for index, part in parts}

    def _lines(self, cells: Cells) -> dict[int, Relaxation]:
        low, high = self.by_relu(cells.low), self.by_relu(cells.high)
        return {
            index: relax(node.op, Interval(low[index], high[index])) if index in self.relus else self.fixed[index]
            for index, node in enumerate(self.graph.nodes)
            if isinstance(node.op, NONLINEAR)
        }

    def _narrowed(self, cells: Cells) -> Cells:
        """Bound the units of cells in what their half-spaces leave of the ball, a few cells at a time."""
        plane = self._plane(cells, self._lines(cells), cells.alpha, cells.beta)
        size = max(1, _FEW // (2 * max(self.sizes, default=1) * len(self.x)))
        parts = [slice(i, i + size) for i in range(0, len(cells), size)]
        return joined([self._narrowed_by(cells[part], Plane(plane.a[part], plane.gap[part])) for part in parts])

    def _narrowed_by(self, cells: Cells, plane: Plane) -> Cells:
        low, high, start = cells.low.clone(), cells.high.clone(), 0
        for source, size in zip(self.relus.values(), self.sizes, strict=True):
            open_ = ((low < 0) & (high > 0)).any(0)[start : start + size].nonzero().squeeze(1)
            open_ = open_[cells.score[:, start + open_].sum(0).topk(min(len(open_), _MOST)).indices]
            if count := len(open_):
                found = self._units(replace(cells, low=low, high=high), source, open_, plane)
                units = start + open_
                low[:, units] = torch.maximum(low[:, units], found[:, :count])
                high[:, units] = torch.minimum(high[:, units], -found[:, count:])
            start += size
        lower = torch.where((low > high).any(1), self.eps, cells.lower)  # no point has such units
        return replace(cells, low=low, high=torch.maximum(low, high), lower=lower)

    def _units(self, cells: Cells, source: int, units: Tensor, plane: Plane) -> Tensor:
        """Bound units of a node, and their negatives, from below: (N, 2·units)."""
        shape, count = self.graph.nodes[source].shape, len(units)
        rows = torch.zeros(2 * count, math.prod(shape), dtype=torch.float64)
        rows[torch.arange(count), units], rows[torch.arange(count) + count, units] = 1.0, -1.0
        rows = rows.view(1, 2 * count, *shape).expand(len(cells), -1, *shape)
        a, shift = linear_bound(self.graph, source, rows, self._lines(cells))
        found: Tensor = self.room.reach(a, plane, self.eps) + shift + a @ self.x - self.slack
        return found

    def polished(self, cell: Cells, steps: int) -> tuple[Cells, Tensor]:
        """Bound one cell with the slopes and multipliers that L-BFGS-B ends at, of all known signs; return its step."""
        from scipy.optimize import minimize  # here, as importing it takes a third of a second

        lines, count, shape = self._lines(cell), cell.alpha.numel(), cell.alpha.shape
        held = replace(cell, signs=cell.known)

        def found(both: Tensor) -> tuple[Tensor, Tensor]:
            return self._value(self._plane(held, lines, both[:count].view(shape), both[count:].view(shape)))

        def negative(values: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
            both = torch.from_numpy(values).requires_grad_()
            with torch.enable_grad():
                value = -found(both)[0].sum()
                (slope,) = slopes_of(value, [both])
            return float(value.detach()), slope.numpy()

        box = [(0.0, 1.0)] * count + [(0.0, None if known else 0.0) for known in held.signs[0].tolist()]
        best = torch.cat([cell.alpha.flatten(), cell.beta.flatten()])
        for shift in (0.0, _INSIDE) if count else ():
            start = best.numpy() + shift
            result = minimize(negative, start, jac=True, method="L-BFGS-B", bounds=box, options={"maxiter": steps})
            best = torch.from_numpy(np.asarray(result.x))
            if result.status != _ABNORMAL:
                break
        value, step = found(best)
        return cell.bounded_by(value.clamp_max(self.eps)), step[0]

    def scored(self, cells: Cells) -> tuple[Cells, Tensor]:
        """Return cells with what a split of each unit may gain, what its chord costs (Bunel et al. 2020); and steps."""
        lines = self._lines(cells)
        chords = {index: line for index in self.relus if isinstance(line := lines[index], Lines)}
        shifts = [line.high_shift.clone().requires_grad_() for line in chords.values()]
        tracked = {i: line._replace(high_shift=shift) for (i, line), shift in zip(chords.items(), shifts, strict=True)}
        with torch.enable_grad():
            value, step = self._value(self._plane(cells, {**lines, **tracked}, cells.alpha, cells.beta))
            slopes = slopes_of(value.sum(), shifts)
        gains = [-(slope * shift.detach()).flatten(1) for slope, shift in zip(slopes, shifts, strict=True)]
        wide = torch.minimum(-cells.low, cells.high).clamp_min(0)  # decides where no chord costs anything
        score = torch.cat([cells.score[:, :0], *gains], 1).clamp_min(0) + _FALLBACK * wide
        return replace(cells, score=torch.where(cells.open, score, 0)), step
