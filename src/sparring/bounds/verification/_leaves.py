"""Sub-problems of a search: a ball cut by the signs of some units, bounded by β-CROWN (Wang et al. 2021)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from ...graph import Graph, ReLU
from .._region import Region
from ..certify._certificates import _ROUNDING
from ..certify._crown import lower_bound
from ..certify._open_units import NONLINEAR
from ..certify._relaxations import Interval, Lines, Relaxation, relax

_FALL = 0.95  # of the rates of ascent, a step


@dataclass(frozen=True, eq=False)
class Leaves:
    """N sub-problems: `owner` (N,) gives their rows, `signs` (N, units) is 1 or −1 for units that are split.

    alpha, beta (N, K, units): lower slopes and multipliers of the signs; lower (N,): a bound on the largest of the K
    rows; score (N, units): what a split may gain. Units are those that are open in the whole ball.
    """

    owner: Tensor
    signs: Tensor
    alpha: Tensor
    beta: Tensor
    lower: Tensor
    score: Tensor

    def __len__(self) -> int:
        return len(self.owner)

    def __getitem__(self, some: Tensor | slice) -> Leaves:
        return Leaves(*(getattr(self, f.name)[some] for f in fields(self)))

    def split(self) -> Leaves:
        """Return both halves of each sub-problem, cut at the unit with the highest score."""
        twice = self[torch.arange(len(self)).repeat(2)]
        unit = twice.score.argmax(1, keepdim=True)
        active = torch.where(torch.arange(len(twice)) < len(self), 1, -1).to(torch.int8)
        twice.signs.scatter_(1, unit, active[:, None])
        return twice


def joined(parts: list[Leaves]) -> Leaves:
    """Return all sub-problems in a row."""
    return Leaves(*(torch.cat([getattr(part, f.name) for part in parts]) for f in fields(Leaves)))


class Bounder:
    """Bounds rows·(output of node `start`) − limits from below on sub-problems of one ball.

    rows (Q, K, *shape of the node) and limits (Q, K): of each set of K rows that of the largest bound counts. `bounds`
    are those of all nodes over the ball.
    """

    def __init__(
        self, graph: Graph, start: int, ball: Region, bounds: list[Interval], rows: Tensor, limits: Tensor
    ) -> None:
        self.graph, self.start, self.ball, self.bounds, self.rows, self.limits = (
            graph, start, ball, bounds, rows, limits,
        )  # fmt: skip
        self.slack = _ROUNDING * max(float(value.abs().max()) for pair in bounds for value in pair)
        self.fixed: dict[int, Relaxation] = {}
        self.open: dict[int, Tensor] = {}  # of each ReLU, which units are open
        for index, node in enumerate(graph.nodes[: start + 1]):
            if isinstance(node.op, NONLINEAR):
                self.fixed[index] = lines = relax(node.op, *(bounds[i] for i in node.inputs))
                if isinstance(node.op, ReLU) and isinstance(lines, Lines) and bool(lines.free.any()):
                    self.open[index] = lines.free[0].flatten().nonzero().squeeze(1)
        self.sizes = [len(units) for units in self.open.values()]

    def roots(self, owner: Tensor, steps: int) -> Leaves:
        """Bound the whole ball for some of the rows."""
        shape = (len(owner), sum(self.sizes))
        slopes = [_lines(self.fixed, index).low_slope[0].flatten()[units] for index, units in self.open.items()]
        begin = torch.cat([*slopes, torch.zeros(0, dtype=torch.float64)])
        alpha = begin.expand(len(owner), self.rows.shape[1], -1).clone()
        nothing = torch.full((len(owner),), -math.inf, dtype=torch.float64)
        signs = torch.zeros(shape, dtype=torch.int8)
        return self.bounded(Leaves(owner, signs, alpha, torch.zeros_like(alpha), nothing, alpha[:, 0]), steps)

    def bounded(
        self, leaves: Leaves, steps: int, *, rate: float = 0.1, rate_beta: float = 0.05, refine: bool = False
    ) -> Leaves:
        """Ascend on slopes and multipliers; every step is a valid bound, and none is below what was known.

        `refine` uses ball and box at once for l2, which takes several times as long.
        """
        lines = self._cut(leaves.signs)
        alpha, beta = leaves.alpha.clone().requires_grad_(), leaves.beta.clone().requires_grad_()
        optimiser = torch.optim.Adam([{"params": [alpha], "lr": rate}, {"params": [beta], "lr": rate_beta}])
        best = leaves.lower
        for _ in range(steps if self.open else 0):
            with torch.enable_grad():
                found = self._value(leaves, lines, alpha, beta, refine=refine)
                alpha.grad, beta.grad = torch.autograd.grad(-found.sum(), [alpha, beta])
            best = torch.maximum(best, found.detach().amax(1))
            optimiser.step()
            alpha.clamp_(0, 1)
            beta.clamp_min_(0)
            for group in optimiser.param_groups:
                group["lr"] *= _FALL
        alpha, beta = alpha.detach(), beta.detach()
        found, score = self._scored(leaves, lines, alpha, beta)
        return Leaves(leaves.owner, leaves.signs, alpha, beta, torch.maximum(best, found.amax(1)), score)

    def _value(
        self, leaves: Leaves, lines: Mapping[int, Relaxation], alpha: Tensor, beta: Tensor, *, refine: bool = False
    ) -> Tensor:
        """Return lower bounds of all rows, (N, K)."""
        rows, limits = self.rows[leaves.owner], self.limits[leaves.owner]
        ball = self.ball.repeated(len(leaves))
        slopes, multipliers = self._spread(alpha), dict[int, Tensor]()
        for index, value in self._spread(-beta * leaves.signs[:, None]).items():
            (source,) = self.graph.nodes[index].inputs
            multipliers[source] = multipliers[source] + value if source in multipliers else value
        found = lower_bound(self.graph, self.start, rows, ball, lines, alpha=slopes, beta=multipliers, refine=refine)
        return found - limits - self.slack

    def _scored(
        self, leaves: Leaves, lines: Mapping[int, Relaxation], alpha: Tensor, beta: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return lower bounds and what a split of each unit may gain: what its chord adds (Bunel et al. 2020)."""
        if not self.open:
            return self._value(leaves, lines, alpha, beta), leaves.score
        chords = {i: _lines(lines, i) for i in self.open}
        shifts = [line.high_shift.clone().requires_grad_() for line in chords.values()]
        tracked = {i: line._replace(high_shift=shift) for (i, line), shift in zip(chords.items(), shifts, strict=True)}
        with torch.enable_grad():
            found = self._value(leaves, {**lines, **tracked}, alpha, beta)
            slopes = torch.autograd.grad(found.sum(), shifts)
        gains = [-(g * s.detach()).flatten(1) for g, s in zip(slopes, shifts, strict=True)]
        score = torch.cat([gain[:, units] for gain, units in zip(gains, self.open.values(), strict=True)], 1)
        return found.detach(), score.masked_fill(leaves.signs != 0, 0)

    def _cut(self, signs: Tensor) -> dict[int, Relaxation]:
        """Return the lines of all nonlinear nodes where units have signs (N, units)."""
        found = dict(self.fixed)
        for (index, units), part in zip(self.open.items(), torch.split(signs, self.sizes, 1), strict=True):
            node, shape = self.graph.nodes[index], (len(signs), *self.graph.nodes[index].shape)
            low, high = (value.expand(shape).flatten(1).clone() for value in self.bounds[node.inputs[0]])
            low[:, units] = low[:, units].where(part <= 0, 0)
            high[:, units] = high[:, units].where(part >= 0, 0)
            found[index] = relax(node.op, Interval(low.view(shape), high.view(shape)))
        return found

    def _spread(self, values: Tensor) -> dict[int, Tensor]:
        """Return numbers of the open units (N, K, units) among those of all, for each ReLU."""
        parts = zip(self.open.items(), torch.split(values, self.sizes, 2), strict=True)
        result = {}
        for (index, units), part in parts:
            shape = self.graph.nodes[index].shape
            whole = part.new_zeros(*part.shape[:2], math.prod(shape)).index_copy(2, units, part)
            result[index] = whole.view(*part.shape[:2], *shape)
        return result


def _lines(relaxed: Mapping[int, Relaxation], index: int) -> Lines:
    """Return the lines of a ReLU."""
    found = relaxed[index]
    assert isinstance(found, Lines)
    return found
