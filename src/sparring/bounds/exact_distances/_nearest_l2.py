"""The l_2-nearest image at which one class overtakes another, by branch and bound over the units' signs."""

from __future__ import annotations

import heapq
import itertools
import math
import time

import highspy
import numpy as np
import torch
from torch import Tensor

from ...errors import Unsupported
from ...graph import Graph, MaxPool, ReLU
from ...threat import L2
from .._region import region
from ..certify._crown import bound_nodes
from ..certify._intervals import Interval
from ._highs import Vector
from ._nearest_linf import overtaking

_FLAT = 1e-7  # how far a unit of a solution may be from its ReLU
Split = tuple[int, int, bool]  # node whose output the unit reads, unit, active


def nearest_l2(
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
    """Minimise the l_2 distance from one image x (1, ...) to a point with g_k ≥ g_y, if it is below `cap`.

    Each node of the search fixes the signs of some units and relaxes the others to their triangles: a convex quadratic
    program. Return a lower bound on the distance (cap or more where there is none below cap) and the points found.
    Raise Unsupported for max pooling.
    """
    if any(isinstance(node.op, MaxPool) for node in graph.nodes):
        raise Unsupported("exact l2 distances have no branching rule for max pooling; exact linf distances do")
    with torch.no_grad():
        bounds, _ = bound_nodes(graph, region(x, L2, cap), backward=True)
    order = itertools.count()
    waiting: list[tuple[float, int, tuple[Split, ...]]] = [(0.0, next(order), ())]
    while waiting:
        known, _, splits = heapq.heappop(waiting)
        if time.perf_counter() > deadline:
            return known, []
        found = _relaxation(graph, bounds, x, y, k, splits, deadline, threads)
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
            return distance, [torch.from_numpy(point).view_as(x)]
        for active in (True, False):
            heapq.heappush(waiting, (distance, next(order), (*splits, (*worst, active))))
    return cap, []


def _relaxation(
    graph: Graph,
    bounds: list[Interval],
    x: Tensor,
    y: int,
    k: int,
    splits: tuple[Split, ...],
    deadline: float,
    threads: int,
) -> tuple[float | None, Vector, tuple[int, int] | None] | None:
    """Solve one node: the distance (None if not solved in time), its point, and the unit farthest from its ReLU.

    None where the node has no point at all.
    """
    program, values = overtaking(graph, _clamped(bounds, splits), y, k)
    for source, unit, active in splits:
        if not active:
            program.rows_((1.0, values[source][np.array([unit])]), low=-math.inf, high=0.0)
    origin, pixels = x.double().flatten().numpy(), x.numel()
    solver = program.highs(relaxed=True, threads=threads)
    solver.setOptionValue("time_limit", max(deadline - time.perf_counter(), 0.01))
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
    for index, node in enumerate(graph.nodes):
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
