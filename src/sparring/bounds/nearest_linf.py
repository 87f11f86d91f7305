"""The l_inf-nearest image at which one class overtakes another, as a mixed-integer linear program."""

from __future__ import annotations

import math
import time

import numpy as np
import torch
from torch import Tensor

from ..graph import Graph
from ..threat import LINF
from .crown import bound_nodes
from .encoding import encode, tightened
from .intervals import Interval
from .program import Expression, Program
from .region import region

__all__ = ["nearest_linf", "overtaking"]


def nearest_linf(
    graph: Graph, x: Tensor, y: int, k: int, cap: float, *, gap: float, deadline: float, threads: int
) -> tuple[float, list[Tensor]]:
    """Minimise the l_inf distance from one image x (1, ...) to a point with g_k ≥ g_y, if it is below `cap`.

    Return a lower bound on it (cap or more where there is none below cap) and the points found, float64.
    """
    with torch.no_grad():
        bounds, _ = bound_nodes(graph, region(x, LINF, cap), backward=True)
    program, values, _ = _distance_program(graph, bounds, x, y, k, cap)
    better = tightened(graph, bounds, program, values, deadline=deadline)
    if better is None:
        return cap, []
    program, values, size = _distance_program(graph, better, x, y, k, cap)
    left = deadline - time.perf_counter()
    solution = program.minimise(size, seconds=left, threads=threads, gap=gap)
    if solution.infeasible:
        return cap, []
    if solution.values is None:
        return solution.bound, []
    pixels = torch.from_numpy(solution.values[: x.numel()]).view_as(x)
    return solution.bound, [torch.where(_used(program, x.numel()).view_as(x), pixels, x.double())]


def _distance_program(
    graph: Graph, bounds: list[Interval], x: Tensor, y: int, k: int, cap: float
) -> tuple[Program, list[Expression], int]:
    """Return the program, the values of all nodes, and which variable is the distance."""
    program, values = overtaking(graph, bounds, y, k)
    used = np.flatnonzero(_used(program, x.numel()).numpy())
    pixels, origin = values[0][used], x.double().flatten().numpy()[used]
    size = program.variables_(np.zeros(1), np.array([cap]))[np.zeros(len(used), dtype=np.intp)]
    program.rows_((1.0, pixels), (-1.0, size), low=-math.inf, high=origin)
    program.rows_((1.0, pixels), (1.0, size), low=origin, high=math.inf)
    return program, values, len(program.lower) - 1


def overtaking(graph: Graph, bounds: list[Interval], y: int, k: int) -> tuple[Program, list[Expression]]:
    """Encode a network and the demand that logit k is at least logit y."""
    program, values = encode(graph, bounds)
    logits = values[-1]
    program.rows_((1.0, logits[np.array([k])]), (-1.0, logits[np.array([y])]), low=0.0, high=math.inf)
    return program, values


def _used(program: Program, pixels: int) -> Tensor:
    """Tell which of the first variables, the pixels, any row depends on: the others need not move."""
    touched = np.zeros(len(program.lower), dtype=bool)
    for block in program.blocks:
        touched[block.indices[block.data != 0]] = True
    return torch.from_numpy(touched[:pixels])
