"""Sub-problems of a search: a ball cut by the signs of some units, bounded by β-CROWN (Wang et al. 2021)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Self, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...graph import Add, Affine, Conv2d, Flatten, Graph, Input, Linear, ReLU, Reshape, with_tensors
from ...threat import LINF
from .._region import Region
from ..certify._certificates import _ROUNDING
from ..certify._crown import linear_bound
from ..certify._open_units import NONLINEAR
from ..certify._relaxations import Interval, Lines, Relaxation, relax

_FALL = 0.95  # of the rates of ascent, a step
_POLISH = 100  # steps of L-BFGS-B
_PLAIN = (
    Add,
    Affine,
    Conv2d,
    Flatten,
    Input,
    Linear,
    ReLU,
    Reshape,
)  # may be bounded in float32


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

    def __getitem__(self, some: Tensor | slice) -> Self:
        return type(self)(*(getattr(self, f.name)[some] for f in fields(self)))

    @property
    def nbytes(self) -> int:
        """The bytes of one sub-problem's numbers."""
        return sum(value[0].numel() * value.element_size() for f in fields(self) if len(value := getattr(self, f.name)))

    def split(self) -> Self:
        """Return both halves of each sub-problem, cut at the unit with the highest score."""
        twice = self[torch.arange(len(self)).repeat(2)]
        unit = twice.score.argmax(1, keepdim=True)
        active = torch.where(torch.arange(len(twice)) < len(self), 1, -1).to(torch.int8)
        twice.signs.scatter_(1, unit, active[:, None])
        return twice


Some = TypeVar("Some", bound=Leaves)


def joined(parts: list[Some]) -> Some:
    """Return all sub-problems in a row."""
    made = type(parts[0])
    return made(*(torch.cat([getattr(part, f.name) for part in parts]) for f in fields(made)))


@dataclass(frozen=True, eq=False)
class _Setting:
    """What is bounded, in one precision: see `Bounder`."""

    graph: Graph
    ball: Region
    rows: Tensor
    limits: Tensor

    def coarse(self) -> _Setting:
        """Return the same in float32."""
        nodes = (replace(node, op=with_tensors(node.op, Tensor.float)) for node in self.graph.nodes)
        x, eps, lower, upper = (v.float() for v in (self.ball.x, self.ball.eps, self.ball.lower, self.ball.upper))
        ball = Region(x, self.ball.norm, eps, lower, upper, self.ball.sided)
        return _Setting(replace(self.graph, nodes=tuple(nodes)), ball, self.rows.float(), self.limits.float())


class Bounder:
    """Bounds rows·(output of node `start`) − limits from below on sub-problems of one ball.

    rows (Q, K, *shape of the node) and limits (Q, K): of each set of K rows the one with the largest bound counts.
    `bounds` are those of all nodes over the ball. Slopes and multipliers ascend in float32 if all operations are plain;
    the bound itself is computed in float64.
    """

    def __init__(
        self, graph: Graph, start: int, ball: Region, bounds: list[Interval], rows: Tensor, limits: Tensor
    ) -> None:
        self.graph, self.start, self.bounds, self.fine = graph, start, bounds, _Setting(graph, ball, rows, limits)
        plain = all(isinstance(node.op, _PLAIN) for node in graph.nodes)
        self.coarse = self.fine.coarse() if plain and ball.norm == LINF else self.fine
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
        kind = self.coarse.rows.dtype
        slopes = [_lines(self.fixed, index).low_slope[0].flatten()[units] for index, units in self.open.items()]
        begin = torch.cat([*slopes, torch.zeros(0)]).to(kind)
        alpha = begin.expand(len(owner), self.fine.rows.shape[1], -1).clone()
        nothing = torch.full((len(owner),), -math.inf, dtype=torch.float64)
        signs = torch.zeros(len(owner), sum(self.sizes), dtype=torch.int8)
        return self.bounded(Leaves(owner, signs, alpha, torch.zeros_like(alpha), nothing, alpha[:, 0]), steps)

    def bounded(
        self, leaves: Leaves, steps: int, *, rate: float = 0.1, rate_beta: float = 0.2, refine: bool = False
    ) -> Leaves:
        """Ascend on slopes and multipliers, from which every bound is valid; none is below the known one.

        `refine` uses ball and box at once for l2, which takes several times as long.
        """
        lines = self._cut(leaves.signs)
        rough = lines if self.coarse is self.fine else {i: _lines(lines, i).rounded() for i in lines}
        alpha, beta = leaves.alpha.clone().requires_grad_(), leaves.beta.clone().requires_grad_()
        optimiser = torch.optim.Adam([{"params": [alpha], "lr": rate}, {"params": [beta], "lr": rate_beta}])
        for _ in range(steps if self.open else 0):
            with torch.enable_grad():
                found = self._value(self.coarse, leaves, rough, alpha, beta, refine=refine)
                alpha.grad, beta.grad = slopes_of(-found.sum(), [alpha, beta])
            optimiser.step()
            alpha.clamp_(0, 1)
            beta.clamp_min_(0)
            for group in optimiser.param_groups:
                group["lr"] *= _FALL
        alpha, beta = alpha.detach(), beta.detach()  # not the best so far: children continue from here
        lower, score = self._scored(leaves, lines, alpha, beta, refine=refine)
        return Leaves(leaves.owner, leaves.signs, alpha, beta, torch.maximum(leaves.lower, lower), score)

    def polished(self, leaf: Leaves) -> tuple[float, Tensor]:
        """Bound one sub-problem with the slopes and multipliers that L-BFGS-B ends at; ball and box count at once.

        Return the bound and where the linear bounds of its rows are least in an l2 ball, (K, ...): what remains of a
        sub-problem in which all units are split is convex, so that these points tend to its solution.
        """
        from scipy.optimize import minimize  # here, as importing it takes a third of a second

        lines, shape, count = self._cut(leaf.signs), leaf.alpha.shape, leaf.alpha.numel()

        def parts(both: Tensor) -> tuple[Tensor, Tensor]:
            return both[:count].view(shape), both[count:].view(shape)

        def negative(values: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
            both = torch.from_numpy(values).requires_grad_()
            with torch.enable_grad():
                found = -self._value(self.fine, leaf, lines, *parts(both), refine=True).amax()
                (slope,) = slopes_of(found, [both])
            return float(found.detach()), slope.numpy()

        start = torch.cat([leaf.alpha.flatten(), leaf.beta.flatten()]).double().numpy()
        split = (leaf.signs != 0).expand(shape[1:]).flatten().tolist()
        box = [(0.0, 1.0)] * count + [(0.0, None if one else 0.0) for one in split]
        if count:
            found = minimize(negative, start, jac=True, method="L-BFGS-B", bounds=box, options={"maxiter": _POLISH})
            start = np.asarray(found.x)
        a, _ = self._linear(self.fine, leaf, lines, *parts(torch.from_numpy(start)))
        lowest = self.fine.ball.minimiser(a)[0].view(-1, *self.fine.ball.x.shape[1:])
        return max(float(leaf.lower), -negative(start)[0]) if count else float(leaf.lower), lowest

    def _value(
        self,
        where: _Setting,
        leaves: Leaves,
        lines: Mapping[int, Relaxation],
        alpha: Tensor,
        beta: Tensor,
        *,
        refine: bool = False,
    ) -> Tensor:
        """Return lower bounds of all rows, (N, K)."""
        a, shift = self._linear(where, leaves, lines, alpha, beta)
        found = shift + where.ball.repeated(len(leaves)).minimum(a, refine=refine)
        return found - where.limits[leaves.owner] - self.slack

    def _linear(
        self, where: _Setting, leaves: Leaves, lines: Mapping[int, Relaxation], alpha: Tensor, beta: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return linear lower bounds of all rows in the pixels: coefficients (N, K, pixels) and shifts (N, K)."""
        slopes, multipliers = self._spread(alpha), dict[int, Tensor]()
        for index, value in self._spread(-beta * leaves.signs[:, None]).items():
            (source,) = self.graph.nodes[index].inputs
            multipliers[source] = multipliers[source] + value if source in multipliers else value
        rows = where.rows[leaves.owner]
        return linear_bound(where.graph, self.start, rows, lines, alpha=slopes, beta=multipliers)

    def _scored(
        self, leaves: Leaves, lines: Mapping[int, Relaxation], alpha: Tensor, beta: Tensor, *, refine: bool
    ) -> tuple[Tensor, Tensor]:
        """Return lower bounds and the possible gain of splitting each unit: its chord's part (Bunel et al. 2020)."""
        alpha, beta = alpha.double(), beta.double()
        chords = {i: _lines(lines, i) for i in self.open}
        shifts = [line.high_shift.clone().requires_grad_() for line in chords.values()]
        tracked = {i: line._replace(high_shift=shift) for (i, line), shift in zip(chords.items(), shifts, strict=True)}
        with torch.enable_grad():
            found = self._value(self.fine, leaves, {**lines, **tracked}, alpha, beta, refine=refine)
            slopes = slopes_of(found.sum(), shifts)
        gains = [-(g * s.detach()).flatten(1) for g, s in zip(slopes, shifts, strict=True)]
        parts = [gain[:, units] for gain, units in zip(gains, self.open.values(), strict=True)]
        score = torch.cat([*parts, found.new_zeros(len(leaves), 0)], 1)
        return found.detach().amax(1), score.masked_fill(leaves.signs != 0, 0)

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


def slopes_of(value: Tensor, of: Sequence[Tensor]) -> list[Tensor]:
    """Return the gradients of a value; zero if it does not depend on them, as for units that the rows do not see."""
    if not value.requires_grad or not of:
        return [torch.zeros_like(one) for one in of]
    return list(torch.autograd.grad(value, list(of), allow_unused=True, materialize_grads=True))
