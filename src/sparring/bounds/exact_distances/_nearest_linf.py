"""The l_inf-nearest image at which one class overtakes another, by mixed-integer linear programs.

To minimise the distance directly is slow: it ties every pixel to one variable by two rows, and says nothing about
margins. The question "does class k overtake anywhere in this ball?" has the ball in the pixels' bounds and a margin to
maximise. So it is asked of ever smaller balls: each point found is first moved as near as its own linear region and the
neighbours of that allow, and the first ball without a point proves the distance.
"""

from __future__ import annotations

import math
import time

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...graph import Graph, ReLU, evaluate
from ...threat import LINF
from .._region import region
from ..certify._crown import bound_nodes
from ..certify._intervals import Interval, first_layers
from ._highs import Expression, MixedIntegerProgram, Vector
from ._milp import encode, tightened

_SHARE = 0.75  # of the time left goes to one question; the rest to smaller balls, should it stay open
_TOUCHED = 1e-6  # share of its range within which a unit is at its kink
_MOVES = 10
_NEARER = 1e-4  # relative gain below which a point stays where it is
_CLEAR = 2e-5  # lead of class k that float32 does not lose
_LONGEST, _ENOUGH = 5.0, 0.05  # seconds: of one move, and below which nothing is begun


def nearest_linf(
    graph: Graph,
    x: Tensor,
    y: int,
    k: int,
    cap: float,
    *,
    floor: float,
    start: Tensor | None,
    gap: float,
    deadline: float,
    threads: int,
) -> tuple[float, list[Tensor]]:
    """Find the l_inf distance from one image x (1, ...) to a point with g_k ≥ g_y, if it is below `cap`.

    `floor` is a lower bound known before; `start`, a point of class k within cap, is moved nearer first. Return a lower
    bound (cap or more where there is none below cap) and the points found, float64.
    """
    found: list[Tensor] = []
    if start is not None and (moved := _moved(graph, x, y, k, start.double(), cap, deadline)):
        found, cap = [moved[0]], moved[1] * (1 - gap)
    low, eps = floor, cap
    while (left := deadline - time.perf_counter()) > _ENOUGH and low < cap:
        answer = _overtaken(graph, x, y, k, eps, seconds=_SHARE * left, threads=threads)
        if isinstance(answer, Tensor):
            point, reached = _moved(graph, x, y, k, answer, eps, deadline) or (answer, eps)
            found.insert(0, point)
            cap = eps = reached * (1 - gap)
        elif answer:
            low, eps = eps, (eps + cap) / 2
        else:
            eps = (low + eps) / 2
    return low, found


def _overtaken(graph: Graph, x: Tensor, y: int, k: int, eps: float, *, seconds: float, threads: int) -> Tensor | bool:
    """Return a point of the ball with g_k ≥ g_y; True where there is provably none, False where time ran out."""
    until = time.perf_counter() + seconds
    ball = region(x, LINF, eps)
    with torch.no_grad():
        bounds, _ = bound_nodes(graph, ball, backward=True)
        attained = first_layers(graph, ball)
    program, values = overtaking(graph, bounds, y, k)
    better = tightened(graph, bounds, program, values, skip=attained, deadline=until)
    if better is None:
        return True
    program, values = overtaking(graph, better, y, k)
    lead = program.total((1.0, values[-1][np.array([k])]), (-1.0, values[-1][np.array([y])]))
    solution = program.point(lead, seconds=until - time.perf_counter(), threads=threads)
    return solution.infeasible if solution.values is None else _image(program, x, solution.values)


def _moved(
    graph: Graph, x: Tensor, y: int, k: int, point: Tensor, cap: float, deadline: float
) -> tuple[Tensor, float] | None:
    """Move a point with g_k ≥ g_y nearer to x than cap; return it and its distance, None where that fails.

    Open units keep their sign, but for those that are at their kinks: the way leads through one linear region to its
    walls, and on into the regions behind those.
    """
    result = None
    for _ in range(_MOVES):
        with torch.no_grad():
            bounds, _ = bound_nodes(graph, region(x, LINF, cap), backward=True)
        fixed, dead = _signs(graph, bounds, point)
        program, values = overtaking(graph, fixed, y, k, by=_CLEAR)
        for source, units in dead.items():
            program.rows_((1.0, values[source][units]), low=-math.inf, high=0.0)
        size = _distance_(program, values[0], x, cap)
        seconds = min(_LONGEST, deadline - time.perf_counter())
        solution = program.minimise(size, seconds=seconds, threads=1, gap=_NEARER)
        if solution.values is None or (reached := float(solution.values[size])) > cap * (1 - _NEARER):
            break
        point, cap = _image(program, x, solution.values), reached
        result = point, cap
    return result


def _signs(graph: Graph, bounds: list[Interval], point: Tensor) -> tuple[list[Interval], dict[int, NDArray[np.intp]]]:
    """Return the bounds under which open units keep their sign at a point, and the units that must be negative."""
    values: list[Tensor] = []
    for node in graph.nodes:
        values.append(evaluate(node.op, *(values[i] for i in node.inputs)) if node.inputs else point)
    result, dead = list(bounds), {}
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
    """Add the l_inf distance of the pixels that rows depend on, at most cap; return which variable it is."""
    used = np.flatnonzero(_used(program, x.numel()).numpy())
    moving, origin = pixels[used], x.double().flatten().numpy()[used]
    size = program.variables_(np.zeros(1), np.array([cap]))[np.zeros(len(used), dtype=np.intp)]
    program.rows_((1.0, moving), (-1.0, size), low=-math.inf, high=origin)
    program.rows_((1.0, moving), (1.0, size), low=origin, high=math.inf)
    return len(program.lower) - 1


def overtaking(
    graph: Graph, bounds: list[Interval], y: int, k: int, *, by: float = 0.0
) -> tuple[MixedIntegerProgram, list[Expression]]:
    """Encode a network and the demand that logit k is ahead of logit y, by so much."""
    program, values = encode(graph, bounds)
    logits = values[-1]
    program.rows_((1.0, logits[np.array([k])]), (-1.0, logits[np.array([y])]), low=by, high=math.inf)
    return program, values


def _used(program: MixedIntegerProgram, pixels: int) -> Tensor:
    """Tell which of the first variables, the pixels, any row depends on: the others need not move."""
    touched = np.zeros(len(program.lower), dtype=bool)
    for block in program.blocks:
        touched[block.indices[block.data != 0]] = True
    return torch.from_numpy(touched[:pixels])
