"""Sub-problems in which no chord loosens the bound: linear programs for linf, and L-BFGS-B on multipliers for l2."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from ...threat import LINF
from ..certify._relaxations import Interval
from ..verification._budget import Budget
from ..verification._programs import dual_bound
from ._cells import Bounder, Cells
from ._milp import encode, linf_distance_

_STEPS, _POLISH = 50, 100  # of ascent, and of L-BFGS-B


def settled(bounder: Bounder, cells: Cells, budget: Budget) -> tuple[Cells, Tensor]:
    """Bound cells in which no chord costs anything as well as possible; return steps to their likely minima.

    For l2 all of them ascend, and L-BFGS-B follows for the nearest one, which may be the nearest counter-example, and
    for those without open units, which cannot be split.
    """
    if bounder.norm == LINF:
        found = [_by_program(bounder, cells[i : i + 1], budget) for i in range(len(cells))]
        lower = torch.tensor([bound for bound, _ in found], dtype=torch.float64).clamp_max(bounder.eps)
        return cells.bounded_by(lower), torch.stack([step for _, step in found])
    cells, steps = bounder.scored(bounder.ascended(cells, _STEPS))
    last = ~cells.open.any(1)
    last[cells.lower.argmin()] = True
    for i in (last & (cells.lower < bounder.eps)).nonzero():
        better, steps[i] = bounder.polished(cells[i], _POLISH)
        cells = cells.replaced(i, better)
    return cells, steps


def _by_program(bounder: Bounder, cell: Cells, budget: Budget) -> tuple[float, Tensor]:
    """Minimise the linf distance over one cell; what is believed is the bound that the solver's multipliers give."""
    bounds = [Interval(*(side[:1] for side in box)) for box in bounder.bounds]
    low, high = bounder.by_relu(cell.low), bounder.by_relu(cell.high)
    for index, source in bounder.relus.items():
        bounds[source] = Interval(low[index], high[index])
    program, values = encode(bounder.graph, bounds)
    for index, source in bounder.relus.items():
        dead = np.flatnonzero((high[index].flatten() <= 0).numpy())
        program.rows_((1.0, values[source][dead]), low=-math.inf, high=0.0)
    row = bounder.rows[int(cell.owner[0])].numpy()
    program.rows_((1.0, values[-1].times(row[None], np.zeros(1))), low=-math.inf, high=0.0)
    size = linf_distance_(program, values[0], bounder.x.numpy(), bounder.eps)
    cost = np.zeros(len(program.lower))
    cost[size] = 1.0
    solver = program.highs(relaxed=True)
    solver.changeColCost(size, 1.0)
    solver.setOptionValue("time_limit", max(budget.seconds, 0.01))
    solver.run()
    solution = solver.getSolution()
    bound = dual_bound(program, cost, np.array(solution.row_dual)) if solution.dual_valid else -math.inf
    _, ray, multipliers = solver.getDualRay()
    if ray and dual_bound(program, 0 * cost, np.array(multipliers)) > 0:
        bound = bounder.eps  # no point is in the cell
    step = torch.from_numpy(np.array(solution.col_value)[: len(bounder.x)]) - bounder.x
    return bound, step
