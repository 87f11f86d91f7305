"""The nearest image at which another class wins: a search of ever smaller balls for linf, branch and bound for l2.

To minimise the linf distance directly is slow: it ties every pixel to one variable by two rows, and says nothing about
margins. The question "does class k overtake anywhere in this ball?" has the ball in the pixels' bounds and a margin to
maximise. So it is asked of ever smaller balls: each point found is first moved as near as its own linear region and the
neighbours of that allow, and the first ball without a point proves the distance.
"""

from __future__ import annotations

import heapq
import itertools
import math
from dataclasses import dataclass, replace

import highspy
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...errors import Unsupported
from ...graph import Graph, MaxPool, ReLU
from ...threat import L2, LINF
from .._region import region
from ..certify._crown import bound_nodes
from ..certify._relaxations import Interval, first_layers
from ..verification import _question as verification
from ..verification._budget import Budget
from ..verification._question import in_float32
from ..verification._search import answered
from ._milp import Expression, MixedIntegerProgram, Vector, encode, tightened

_SHARE = 0.75  # of the budget left goes to one question; the rest to smaller balls, should it stay open
_TOUCHED = 1e-6  # share of its range within which a unit is at its kink
_MOVES = 10
_NEARER = 1e-4  # relative gain below which a point stays where it is
_CLEAR = 2e-5  # lead of class k that float32 does not lose
_LONGEST, _ENOUGH = 5.0, 0.05  # seconds: of one move, and below which nothing is begun
_MOST = 1000  # nodes of one move's program, where the budget is in nodes


@dataclass(frozen=True, eq=False)
class Question:
    """How far from one image x (1, ...) of class y does class k overtake?

    `threads` are the solver's.
    """

    graph: Graph
    x: Tensor
    y: int
    k: int
    budget: Budget
    threads: int

    def lead(self, program: MixedIntegerProgram, values: list[Expression]) -> Expression:
        """Return g_k − g_y."""
        return program.total((1.0, values[-1][np.array([self.k])]), (-1.0, values[-1][np.array([self.y])]))

    def program(self, bounds: list[Interval], *, by: float = 0.0) -> tuple[MixedIntegerProgram, list[Expression]]:
        """Encode the network and the demand that class k is ahead, by so much."""
        program, values = encode(self.graph, bounds)
        program.rows_((1.0, self.lead(program, values)), low=by, high=math.inf)
        return program, values


def nearest_linf(
    asked: Question, cap: float, *, floor: float, start: Tensor | None, gap: float
) -> tuple[float, list[Tensor]]:
    """Find the linf distance to a point with g_k ≥ g_y, if it is below `cap`.

    `floor` is a lower bound known before; `start`, a point of class k within cap, is moved nearer first. Return a lower
    bound (cap or more where there is none below cap) and the points found, float64.
    """
    found: list[Tensor] = []
    if start is not None and (moved := _moved(asked, start.double(), cap)):
        found, cap = [moved[0]], moved[1] * (1 - gap)
    low, eps = floor, cap
    while not asked.budget.over and asked.budget.seconds > _ENOUGH and low < cap:
        part = asked.budget.share(_SHARE)
        answer = _overtaken(replace(asked, budget=part), eps)
        asked.budget.take_(part)
        if isinstance(answer, Tensor):
            point, reached = _moved(asked, answer, eps) or (answer, eps)
            found.insert(0, point)
            cap = eps = reached * (1 - gap)
        elif answer:
            low, eps = eps, (eps + cap) / 2
        else:
            eps = (low + eps) / 2
    return low, found


def _overtaken(asked: Question, eps: float) -> Tensor | bool:
    """Return a point of the ball with g_k ≥ g_y; True where there is provably none, False where that stays open."""
    if any(isinstance(node.op, MaxPool) for node in asked.graph.nodes):  # the search splits only ReLUs
        return _by_program(asked, eps)
    ball = region(asked.x, LINF, eps)
    rows = torch.zeros(1, 1, *asked.graph.nodes[-1].shape, dtype=torch.float64)
    rows[0, 0, asked.y], rows[0, 0, asked.k] = 1.0, -1.0

    def replay(points: Tensor) -> Tensor | None:
        ahead = asked.graph(points.double()) @ rows[0, 0] <= 0
        return points[ahead][:1] if bool(ahead.any()) else None

    found = answered(
        verification.Question(asked.graph, ball, rows, rows.new_zeros(1, 1), in_float32(ball), replay, asked.budget)
    )
    return found.status == "verified" if found.point is None else found.point.double()


def _by_program(asked: Question, eps: float) -> Tensor | bool:
    """Return a point of the ball with g_k ≥ g_y; True where there is provably none, False where that stays open."""
    ball = region(asked.x, LINF, eps)
    with torch.no_grad():
        bounds, _ = bound_nodes(asked.graph, ball, backward=True)
        attained = first_layers(asked.graph, ball)
    program, values = asked.program(bounds)
    better = tightened(asked.graph, bounds, program, values, skip=attained, budget=asked.budget)
    if better is None:
        return True
    program, values = asked.program(better)
    solution = program.point(asked.lead(program, values), asked.budget, threads=asked.threads)
    return solution.infeasible if solution.values is None else _image(program, asked.x, solution.values)


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
        solution = program.minimise(size, _of_a_move(asked.budget), threads=1, gap=_NEARER)
        if solution.values is None or (reached := float(solution.values[size])) > cap * (1 - _NEARER):
            break
        point, cap = _image(program, asked.x, solution.values), reached
        result = point, cap
    return result


def _of_a_move(budget: Budget) -> Budget:
    """Return what a move may use: little, of the kind that is limited."""
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
    """Return the pixels of a solution, (1, ...), float64; those that no row depends on stay where they are."""
    pixels = torch.from_numpy(values[: x.numel()]).view_as(x)
    return torch.where(_used(program, x.numel()).view_as(x), pixels, x.double()).clamp(0, 1)


def _distance_(program: MixedIntegerProgram, pixels: Expression, x: Tensor, cap: float) -> int:
    """Add the linf distance of the pixels that rows depend on, at most cap; return which variable it is."""
    used = np.flatnonzero(_used(program, x.numel()).numpy())
    moving, origin = pixels[used], x.double().flatten().numpy()[used]
    size = program.variables_(np.zeros(1), np.array([cap]))[np.zeros(len(used), dtype=np.intp)]
    program.rows_((1.0, moving), (-1.0, size), low=-math.inf, high=origin)
    program.rows_((1.0, moving), (1.0, size), low=origin, high=math.inf)
    return len(program.lower) - 1


def _used(program: MixedIntegerProgram, pixels: int) -> Tensor:
    """Tell which of the first variables, the pixels, any row depends on: the others need not move."""
    touched = np.zeros(len(program.lower), dtype=bool)
    for block in program.blocks:
        touched[block.indices[block.data != 0]] = True
    return torch.from_numpy(touched[:pixels])


_FLAT = 1e-7  # how far a unit of a solution may be from its ReLU
Split = tuple[int, int, bool]  # node whose output the unit reads, unit, active


def nearest_l2(
    asked: Question, cap: float, *, floor: float, start: Tensor | None, gap: float
) -> tuple[float, list[Tensor]]:
    """Minimise the l2 distance to a point with g_k ≥ g_y, if it is below `cap`.

    Each node of the search fixes the signs of some units and relaxes the others to their triangles: a convex quadratic
    program. Return a lower bound on the distance (cap or more where there is none below cap) and the points found.
    Raise Unsupported for max pooling.
    """
    if any(isinstance(node.op, MaxPool) for node in asked.graph.nodes):
        raise Unsupported("exact l2 distances do not support max pooling; exact linf distances do")
    with torch.no_grad():
        bounds, _ = bound_nodes(asked.graph, region(asked.x, L2, cap), backward=True)
    order = itertools.count()
    waiting: list[tuple[float, int, tuple[Split, ...]]] = [(0.0, next(order), ())]
    while waiting:
        known, _, splits = heapq.heappop(waiting)
        if asked.budget.over or not asked.budget.fits_(len(waiting), 0):
            return known, []
        asked.budget.used += 1
        found = _relaxation(asked, bounds, splits)
        if found is None:
            continue
        distance, point, worst = found
        if distance is None:
            return known, []
        distance = max(distance, known)
        if distance >= cap:
            continue
        if worst is None:
            # Best first: no open node can hold anything nearer.
            return distance, [torch.from_numpy(point).view_as(asked.x)]
        for active in (True, False):
            heapq.heappush(waiting, (distance, next(order), (*splits, (*worst, active))))
    return cap, []


def _relaxation(
    asked: Question, bounds: list[Interval], splits: tuple[Split, ...]
) -> tuple[float | None, Vector, tuple[int, int] | None] | None:
    """Solve one node: the distance (None if not solved in time), its point, and the unit farthest from its ReLU.

    None where the node has no point at all.
    """
    program, values = asked.program(_clamped(bounds, splits))
    for source, unit, active in splits:
        if not active:
            program.rows_((1.0, values[source][np.array([unit])]), low=-math.inf, high=0.0)
    origin, pixels = asked.x.double().flatten().numpy(), asked.x.numel()
    solver = program.highs(relaxed=True, threads=asked.threads)
    solver.setOptionValue("time_limit", max(asked.budget.seconds, 0.01))
    columns = np.arange(pixels, dtype=np.int32)
    solver.changeColsCost(pixels, columns, -2 * origin)
    hessian = highspy.HighsHessian()
    hessian.dim_, hessian.format_ = len(program.lower), highspy.HessianFormat.kTriangular
    hessian.start_ = np.append(columns, np.full(len(program.lower) - pixels + 1, pixels, dtype=np.int32))
    hessian.index_, hessian.value_ = columns, np.full(pixels, 2.0)
    solver.passHessian(hessian)
    solver.run()
    status = solver.getModelStatus()
    if status == highspy.HighsModelStatus.kInfeasible:
        return None
    solution = np.array(solver.getSolution().col_value)
    if status != highspy.HighsModelStatus.kOptimal:
        return None, solution, None
    distance = math.sqrt(max(float(((solution[:pixels] - origin) ** 2).sum()), 0.0))
    worst, size = None, _FLAT
    for index, node in enumerate(asked.graph.nodes):
        if isinstance(node.op, ReLU):
            before, after = (
                values[i].matrix @ solution[: values[i].matrix.shape[1]] + values[i].constant
                for i in (node.inputs[0], index)
            )
            away = np.abs(after - np.maximum(before, 0))
            if len(away) and away.max() > size:
                worst, size = (node.inputs[0], int(away.argmax())), float(away.max())
    return distance, solution[:pixels], worst


def _clamped(bounds: list[Interval], splits: tuple[Split, ...]) -> list[Interval]:
    result = list(bounds)
    for source, unit, active in splits:
        lower, upper = (value.clone() for value in result[source])
        (lower if active else upper).view(-1)[unit] = 0.0
        result[source] = Interval(lower, upper)
    return result
