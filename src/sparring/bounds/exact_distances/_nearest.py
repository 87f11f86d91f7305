"""Move points of a class closer, and find the nearest image of one class in networks with max pooling.

For the latter, minimising the linf distance directly is slow: it ties every pixel to one variable by two rows, and
gives no bound on margins. The question "does class k overtake anywhere in this ball?" puts the ball into the pixels'
bounds and maximises a margin. It is therefore solved for ever smaller balls, and the first one without a point proves
the distance.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...graph import Graph, MaxPool, ReLU
from ...threat import L2, LINF, distance
from .._region import region
from ..certify._crown import bound_nodes
from ..certify._relaxations import Interval, first_layers
from ..verification._budget import Budget
from ._milp import Expression, MixedIntegerProgram, Vector, encode, linf_distance_, tightened

_SHARE = 0.75  # share of the remaining budget for one question; the rest is for smaller balls, if it stays open
_TOUCHED = 1e-6  # share of its range within which a unit is at its kink
_MOVES = 10
_NEARER = 1e-4  # relative gain below which a point stays where it is
_CLEAR = 2e-5  # lead of class k that survives float32
_LONGEST, _ENOUGH = 5.0, 0.05  # seconds of one move, and the fewest with which one starts
_SLIDES, _SLIDE, _STRIDES = 100, 1e-6, (1.0, 0.5, 0.25, 0.1, 0.03, 0.01)  # steps of l2, their least gain and lengths
_MOST = 1000  # nodes of one move's program, where the budget is in nodes


@dataclass(frozen=True, eq=False)
class Question:
    """How far from one image x (1, ...) of class y does class k overtake?"""

    graph: Graph
    x: Tensor
    y: int
    k: int
    budget: Budget
    norm: float = LINF

    def lead(self, program: MixedIntegerProgram, values: list[Expression]) -> Expression:
        """Return g_k − g_y."""
        return program.total((1.0, values[-1][np.array([self.k])]), (-1.0, values[-1][np.array([self.y])]))

    def program(self, bounds: list[Interval], *, by: float = 0.0) -> tuple[MixedIntegerProgram, list[Expression]]:
        """Encode the network and the demand that class k is ahead, by so much."""
        program, values = encode(self.graph, bounds)
        program.rows_((1.0, self.lead(program, values)), low=by, high=math.inf)
        return program, values

    def ahead(self, points: Tensor) -> Tensor:
        """Return g_k − g_y at points (N, ...) float64."""
        logits = self.graph(points)
        return logits[:, self.k] - logits[:, self.y]


def nearest(
    asked: Question, cap: float, *, floor: float, start: Tensor | None, gap: float
) -> tuple[float, list[Tensor]]:
    """Find the distance to a point with g_k ≥ g_y, if it is below `cap`.

    `floor` is a lower bound known before; `start`, a point of class k within cap, is moved nearer first. Return a lower
    bound (cap or more where there is none below cap) and the points found, float64.
    """
    found: list[Tensor] = []
    if start is not None and (moved := polished(asked, start.double(), cap)):
        found, cap = [moved[0]], moved[1] * (1 - gap)
    low, eps = floor, cap
    while not asked.budget.over and asked.budget.seconds > _ENOUGH and low < cap:
        part = asked.budget.share(_SHARE)
        answer = _by_program(replace(asked, budget=part), eps)
        asked.budget.take_(part)
        if isinstance(answer, Tensor):
            point, reached = polished(asked, answer, eps) or (answer, eps)
            found.insert(0, point)
            cap = eps = reached * (1 - gap)
        elif answer:
            low, eps = eps, (eps + cap) / 2
        else:
            eps = (low + eps) / 2
    return low, found


def pools(graph: Graph) -> bool:
    """Return whether a network takes maxima over windows."""
    return any(isinstance(node.op, MaxPool) for node in graph.nodes)


def _by_program(asked: Question, eps: float) -> Tensor | bool:
    """Return a point of the ball with g_k ≥ g_y; True if there is provably none, False if that is open."""
    ball = region(asked.x, LINF, eps)
    with torch.no_grad():
        bounds, _ = bound_nodes(asked.graph, ball, backward=True)
        attained = first_layers(asked.graph, ball)
    program, values = asked.program(bounds)
    better = tightened(asked.graph, bounds, program, values, skip=attained, budget=asked.budget)
    if better is None:
        return True
    program, values = asked.program(better)
    solution = program.point(asked.lead(program, values), asked.budget)
    return solution.infeasible if solution.values is None else _image(program, asked.x, solution.values)


def polished(asked: Question, point: Tensor, cap: float) -> tuple[Tensor, float] | None:
    """Move a point with g_k ≥ g_y nearer to the image than cap; return it and its distance, None where that fails."""
    return (_moved if asked.norm == LINF else _slid)(asked, point, cap)


def _moved(asked: Question, point: Tensor, cap: float) -> tuple[Tensor, float] | None:
    """Move a point with g_k ≥ g_y nearer to the image than cap; return it and its distance, None where that fails.

    Open units keep their sign, but for those that are at their kinks: the way leads through one linear region to its
    walls, and on into the regions behind those.
    """
    result = None
    for _ in range(_MOVES):
        with torch.no_grad():
            bounds, _ = bound_nodes(asked.graph, region(asked.x, LINF, cap), backward=True)
        fixed, dead = _signs(asked.graph, bounds, point)
        program, values = asked.program(fixed, by=_CLEAR)
        for source, units in dead.items():
            program.rows_((1.0, values[source][units]), low=-math.inf, high=0.0)
        size = _distance_(program, values[0], asked.x, cap)
        solution = program.minimise(size, _of_a_move(asked.budget), gap=_NEARER)
        if solution.values is None or (reached := float(solution.values[size])) > cap * (1 - _NEARER):
            break
        point, cap = _image(program, asked.x, solution.values), reached
        result = point, cap
    return result


def _of_a_move(budget: Budget) -> Budget:
    """Return the budget of one move: little, in the unit that is limited."""
    limited = math.isfinite(budget.nodes)
    return Budget(_MOST, budget.deadline, budget.clock) if limited else budget.within(_LONGEST)


def _signs(graph: Graph, bounds: list[Interval], point: Tensor) -> tuple[list[Interval], dict[int, NDArray[np.intp]]]:
    """Return the bounds under which open units keep their sign at a point, and the units that must be negative."""
    values, result, dead = graph.values(point), list(bounds), {}
    for source in {node.inputs[0] for node in graph.nodes if isinstance(node.op, ReLU)}:
        z, (low, high) = values[source], bounds[source]
        fixed = (low < 0) & (high > 0) & (z.abs() > _TOUCHED * (high - low))
        result[source] = Interval(torch.where(fixed & (z > 0), 0, low), torch.where(fixed & (z <= 0), 0, high))
        dead[source] = np.flatnonzero((fixed & (z <= 0)).numpy())
    return result, dead


def _image(program: MixedIntegerProgram, x: Tensor, values: Vector) -> Tensor:
    """Return the pixels of a solution, (1, ...), float64; those that no row depends on do not move."""
    pixels = torch.from_numpy(values[: x.numel()]).view_as(x)
    return torch.where(_used(program, x.numel()).view_as(x), pixels, x.double()).clamp(0, 1)


def _distance_(program: MixedIntegerProgram, pixels: Expression, x: Tensor, cap: float) -> int:
    """Add the linf distance of the pixels that rows depend on, at most cap; return which variable it is."""
    used = np.flatnonzero(_used(program, x.numel()).numpy())
    return linf_distance_(program, pixels[used], x.double().flatten().numpy()[used], cap)


def _used(program: MixedIntegerProgram, pixels: int) -> Tensor:
    """Return which of the first variables, the pixels, any row depends on: the others need not move."""
    touched = np.zeros(len(program.lower), dtype=bool)
    for block in program.blocks:
        touched[block.indices[block.data != 0]] = True
    return torch.from_numpy(touched[:pixels])


def _slid(asked: Question, point: Tensor, cap: float) -> tuple[Tensor, float] | None:
    """Move a point with g_k ≥ g_y nearer to the image than cap in l2, along the boundary; else as `_moved`.

    Each step goes towards the nearest point of the boundary's tangent (Croce & Hein 2020), as far as the class allows.
    """
    origin, best, reached = asked.x.double(), point, float(distance(point - asked.x.double(), L2))
    for _ in range(_SLIDES):
        value, slope = _linearised(asked, best)
        wanted = float((slope * (best - origin)).sum()) - value + _CLEAR  # of slope · (the point − origin)
        toward = _nearest_on(origin, slope, wanted)
        for share in _STRIDES:
            tried = best + share * (toward - best)
            value, slope = _linearised(asked, tried)
            tried = (tried + (_CLEAR - value) / float((slope**2).sum().clamp_min(1e-30)) * slope).clamp(0, 1)
            far = float(distance(tried - origin, L2))
            if far < reached * (1 - _SLIDE) and float(asked.ahead(tried)) > 0:
                best, reached = tried, far
                break
        else:
            break
    return (best, reached) if reached < cap * (1 - _NEARER) else None


def _linearised(asked: Question, point: Tensor) -> tuple[float, Tensor]:
    """Return g_k − g_y and its gradient at a point."""
    with torch.enable_grad():
        at = point.detach().requires_grad_()
        value = asked.ahead(at)
        (slope,) = torch.autograd.grad(value.sum(), at)
    return float(value.detach()), slope


def _nearest_on(origin: Tensor, slope: Tensor, wanted: float) -> Tensor:
    """Return the point of [0, 1] nearest to the origin in l2 where slope · (point − origin) is `wanted`."""
    low, high = 0.0, 1e6
    for _ in range(80):
        middle = (low + high) / 2
        moved = (origin + middle * slope).clamp(0, 1) - origin
        low, high = (middle, high) if float((slope * moved).sum()) < wanted else (low, middle)
    return (origin + high * slope).clamp(0, 1)
