"""Linear and mixed-integer programs for sub-problems that splitting does not make easier."""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from torch import Tensor

from ..certify._relaxations import Interval
from ..exact_distances._milp import Expression, MixedIntegerProgram, Vector, encode
from ._leaves import Bounder, Leaves
from ._question import Question

_ROUNDING = 1e-11  # error of the sums of a dual bound, relative to their terms


def by_linear_program(asked: Question, bounder: Bounder, leaf: Leaves) -> tuple[float, Tensor]:
    """Bound the margin of one sub-problem by its linear program; return the program's point, too, (1, ...)."""
    known, bounds = bounder.bounds, list(bounder.bounds)
    dead: dict[int, NDArray[np.intp]] = {}
    for (index, units), part in zip(bounder.open.items(), torch.split(leaf.signs[0], bounder.sizes), strict=True):
        (source,) = bounder.graph.nodes[index].inputs
        low, high = (value.flatten().clone() for value in known[source])
        low[units] = low[units].where(part <= 0, low[units].clamp_min(0))
        high[units] = high[units].where(part >= 0, high[units].clamp_max(0))
        shape = known[source].lower.shape
        bounds[source] = Interval(low.view(shape), high.view(shape))
        dead[source] = units[part < 0].numpy()
    program, values, worst = _program(asked, bounds, int(leaf.owner[0]))
    for source, places in dead.items():
        program.rows_((1.0, values[source][places]), low=-math.inf, high=0.0)
    solver = program.highs(relaxed=True)
    solver.changeColCost(worst, 1.0)
    solver.setOptionValue("time_limit", max(asked.budget.seconds, 0.01))
    solver.run()
    solution = solver.getSolution()
    cost = np.zeros(len(program.lower))
    cost[worst] = 1.0
    bound = dual_bound(program, cost, np.array(solution.row_dual))
    pixels = torch.from_numpy(np.array(solution.col_value)[: asked.ball.x.numel()])
    return bound, pixels.view_as(asked.ball.x).clamp(asked.ball.lower, asked.ball.upper)


def _program(
    asked: Question, bounds: list[Interval], alternative: int
) -> tuple[MixedIntegerProgram, list[Expression], int]:
    """Encode the network and one alternative: the last variable is at least all of its constraints."""
    program, values = encode(asked.graph, bounds)
    rows, limits = asked.rows[alternative], asked.limits[alternative]
    kept = limits.isfinite().numpy()
    margins = values[-1].times(sparse.csr_matrix(rows.numpy()[kept]), -limits.numpy()[kept])
    size = 1 + float(max(bounds[-1].lower.abs().max(), bounds[-1].upper.abs().max()))
    reach = np.full(1, size * float(rows.abs().sum(1).max()) + float(limits.where(limits.isfinite(), 0).abs().max()))
    worst = program.variables_(-reach, reach)[np.zeros(int(kept.sum()), dtype=np.intp)]
    program.rows_((1.0, worst), (-1.0, margins), low=0.0, high=math.inf)
    return program, values, len(program.lower) - 1


def dual_bound(program: MixedIntegerProgram, cost: Vector, dual: Vector) -> float:
    """Bound cost·v from below over a program's relaxation, from any multipliers of its rows, rounded down.

    All variables are bounded, so the reduced costs are bounded too: the bound does not rely on the solver's status.
    Source: Neumaier & Shcherbina 2004, section 3.
    """
    columns = len(program.lower)
    blocks = [sparse.csr_matrix((b.data, b.indices, b.indptr), (b.shape[0], columns)) for b in program.blocks]
    matrix = sparse.vstack(blocks, format="csr")
    sides = np.where(dual > 0, program.row_lower, program.row_upper)
    dual = np.where(np.isfinite(sides), dual, 0.0)
    sides = np.where(np.isfinite(sides), sides, 0.0)
    rest, floor, ceiling = cost - matrix.T @ dual, np.array(program.lower), np.array(program.upper)
    bound = dual @ sides + np.minimum(rest * floor, rest * ceiling).sum()
    added = abs(dual) @ abs(sides) + (abs(cost) + abs(matrix).T @ abs(dual)) @ np.maximum(abs(floor), abs(ceiling))
    return float(bound - _ROUNDING * added)
