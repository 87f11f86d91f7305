"""A network over a region as a mixed-integer linear program (Tjeng, Xiao & Tedrake 2019)."""

from __future__ import annotations

import math
from collections.abc import Container
from dataclasses import dataclass, field

import highspy
import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from torch import Tensor
from torch.nn import functional as F

from ...errors import Unsupported
from ...graph import Add, Affine, AvgPool, Conv2d, Flatten, Graph, Linear, MaxPool, ReLU, Reshape, evaluate, refusal
from .._network import LinearOp, offset
from ..certify._relaxations import Interval, WindowLines, relax
from ..verification._budget import Budget

_LARGEST = 2**26  # entries of an operation's dense matrix
_MOST_NODES = 2**19  # of one program's search: about 2 GB at 4 kB each


def encode(graph: Graph, bounds: list[Interval]) -> tuple[MixedIntegerProgram, list[Expression]]:
    """Write a network over one image's region as a program: return it and the value of every node in its variables.

    `bounds` (of one image, batch axis 1) determine which units are dead, which are always active, and the ranges of the
    others; only the last need integers.
    Raise Unsupported for an operation that is not piecewise linear, or too large to write down.
    """
    program = MixedIntegerProgram()
    values = [program.variables_(_flat(bounds[0].lower), _flat(bounds[0].upper))]
    for node in graph.nodes[1:]:
        source, box = values[node.inputs[0]], bounds[node.inputs[0]]
        shape = graph.nodes[node.inputs[0]].shape
        match node.op:
            case Linear() | Conv2d() | Affine() | AvgPool() | Flatten() | Reshape():
                values.append(source.times(*_matrix(node.op, shape)))
            case Add():
                one, two = source, values[node.inputs[1]]
                values.append(program.total((1.0, one), (1.0, two)))
            case ReLU():
                low, high = _flat(box.lower), _flat(box.upper)
                values.append(_relu(program, source, low, high))
            case MaxPool():
                values.append(_max_pool(program, node.op, source, box))
            case _:
                raise refusal(node, "cannot be solved exactly; use certified radii instead")
    return program, values


def _flat(value: Tensor) -> Vector:
    result: Vector = value.flatten().numpy()
    return result


def _matrix(op: LinearOp, shape: tuple[int, ...]) -> tuple[sparse.csr_matrix, Vector]:
    """Return a linear operation as a sparse matrix and what it adds."""
    size = math.prod(shape)
    added = offset(op, shape)
    if isinstance(op, Flatten | Reshape):
        return sparse.eye_array(size, format="csr"), np.zeros(size)
    if isinstance(op, Linear) and len(shape) == 1:
        matrix = sparse.csr_matrix(op.weight.numpy())
    elif isinstance(op, Conv2d):
        matrix = _of_convolution(op, shape)
    else:
        if size * math.prod(evaluate(op, torch.zeros(1, *shape, dtype=torch.float64)).shape) > _LARGEST:
            raise _too_large()
        columns = evaluate(op, torch.eye(size, dtype=torch.float64).view(size, *shape)).flatten(1)
        matrix = sparse.csr_matrix((columns - (0 if added is None else added)).numpy().T)
    return matrix, np.zeros(matrix.shape[0]) if added is None else added.numpy()


def _of_convolution(op: Conv2d, shape: tuple[int, ...]) -> sparse.csr_matrix:
    numbers = torch.arange(1.0, math.prod(shape) + 1, dtype=torch.float64).view(1, *shape)
    windows = F.unfold(numbers, op.weight.shape[2:], op.dilation, op.padding, op.stride)  # 0 for padding
    if op.weight.numel() * windows.shape[2] > _LARGEST:
        raise _too_large()
    columns = windows.view(op.groups, 1, -1, windows.shape[2]).long() - 1
    weight = op.weight.reshape(op.groups, -1, columns.shape[2], 1)
    rows = torch.arange(len(op.weight) * columns.shape[3]).view(op.groups, -1, 1, columns.shape[3])
    kept = (weight != 0) & (columns >= 0)
    values, at, of = (value.expand_as(kept)[kept].numpy() for value in (weight, rows, columns))
    return sparse.csr_matrix((values, (at, of)), (rows.numel(), math.prod(shape)))


def _too_large() -> Unsupported:
    return Unsupported("a layer is too large for exact distances; use certified radii instead")


def _relu(program: MixedIntegerProgram, z: Expression, low: Vector, high: Vector) -> Expression:
    alive = np.flatnonzero(high > 0)
    unstable = np.flatnonzero((low < 0) & (high > 0))
    y = program.variables_(np.maximum(low, 0)[alive], high[alive])
    result = program.scattered(y, alive, len(low))
    active = np.setdiff1d(alive, unstable)
    program.rows_((1.0, result[active]), (-1.0, z[active]), low=0.0, high=0.0)
    # z = y − s with y, s ≥ 0, and the switch a lets only one of them be positive.
    deep, top = -low[unstable], high[unstable]
    s = program.variables_(np.zeros(len(unstable)), deep)
    a = program.variables_(np.zeros(len(unstable)), np.ones(len(unstable)), integer=True)
    program.rows_((1.0, result[unstable]), (-1.0, s), (-1.0, z[unstable]), low=0.0, high=0.0)
    program.rows_((1.0, result[unstable]), (-top, a), low=-math.inf, high=0.0)
    program.rows_((1.0, s), (deep, a), low=-math.inf, high=deep)
    return result


def _max_pool(program: MixedIntegerProgram, op: MaxPool, z: Expression, box: Interval) -> Expression:
    lines = relax(op, box)
    assert isinstance(lines, WindowLines)
    low = np.append(_flat(box.lower), -math.inf)
    high = np.append(_flat(box.upper), -math.inf)
    index = lines.index.numpy()
    floor, ceiling = low[index].max(1), high[index].max(1)
    y = program.variables_(floor, ceiling)
    window, place = np.nonzero(high[index] > floor[:, None])
    entry = index[window, place]
    a = program.variables_(np.zeros(len(window)), np.ones(len(window)), integer=True)
    slack = ceiling[window] - low[entry]
    program.rows_((1.0, y[window]), (-1.0, z[entry]), low=0.0, high=math.inf)
    program.rows_((1.0, y[window]), (-1.0, z[entry]), (slack, a), low=-math.inf, high=slack)
    chosen = sparse.csr_matrix((np.ones(len(window)), (window, np.arange(len(window)))), (len(index), len(window)))
    program.rows_((1.0, a.times(chosen, np.zeros(len(index)))), low=1.0, high=1.0)
    return y


def linf_distance_(program: MixedIntegerProgram, pixels: Expression, origin: Vector, cap: float) -> int:
    """Add the linf distance of some pixels from an origin, at most cap; return which variable it is."""
    size = program.variables_(np.zeros(1), np.array([cap]))[np.zeros(len(origin), dtype=np.intp)]
    program.rows_((1.0, pixels), (-1.0, size), low=-math.inf, high=origin)
    program.rows_((1.0, pixels), (1.0, size), low=origin, high=math.inf)
    return len(program.lower) - 1


def tightened(
    graph: Graph,
    bounds: list[Interval],
    program: MixedIntegerProgram,
    values: list[Expression],
    *,
    skip: Container[int],
    budget: Budget,
) -> list[Interval] | None:
    """Bound the inputs of unstable ReLUs by two linear programs each, all rows of the program counted.

    Nodes in `skip` have bounds that rarely improve. Returns None if the program without integrality is infeasible. Each
    program uses a node of the budget; one that is not solved within it changes nothing.
    """
    solver = program.highs(relaxed=True)
    solver.run()
    if solver.getModelStatus() == highspy.HighsModelStatus.kInfeasible:
        return None
    result = list(bounds)
    for node in graph.nodes:
        if not isinstance(node.op, ReLU) or node.inputs[0] in skip:
            continue
        z, box = values[node.inputs[0]], bounds[node.inputs[0]]
        low, high = _flat(box.lower).copy(), _flat(box.upper).copy()
        for unit in np.flatnonzero((low < 0) & (high > 0)):
            if budget.over:
                break
            budget.used += 2
            row = z[np.array([unit])]
            columns = row.matrix.indices.astype(np.int32)
            solver.changeColsCost(len(columns), columns, row.matrix.data)
            for sense in (highspy.ObjSense.kMinimize, highspy.ObjSense.kMaximize):
                solver.changeObjectiveSense(sense)
                solver.run()
                if solver.getModelStatus() == highspy.HighsModelStatus.kOptimal:
                    found = solver.getInfo().objective_function_value + row.constant[0]
                    slack = 1e-7 * (1 + abs(found))  # the solver's tolerances
                    if sense == highspy.ObjSense.kMinimize:
                        low[unit] = max(low[unit], found - slack)
                    else:
                        high[unit] = min(high[unit], found + slack)
            solver.changeColsCost(len(columns), columns, np.zeros(len(columns)))
        shape = box.lower.shape
        result[node.inputs[0]] = Interval(torch.from_numpy(low).view(shape), torch.from_numpy(high).view(shape))
    return result


Vector = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Expression:
    """Affine functions of a program's variables: matrix (n, variables) and constant (n,)."""

    matrix: sparse.csr_matrix
    constant: Vector

    def __getitem__(self, index: NDArray[np.intp]) -> Expression:
        return Expression(self.matrix[index], self.constant[index])

    def times(self, matrix: sparse.csr_matrix, added: Vector) -> Expression:
        """Return matrix · expression + added."""
        return Expression(sparse.csr_matrix(matrix @ self.matrix), matrix @ self.constant + added)


@dataclass(frozen=True)
class Solution:
    """The result of HiGHS: a bound on all solutions, and a point or None; `infeasible` if there is none."""

    bound: float
    values: Vector | None
    infeasible: bool


@dataclass(eq=False)
class MixedIntegerProgram:
    """Variables with bounds, and rows low ≤ a·v ≤ high."""

    lower: list[float] = field(default_factory=list)
    upper: list[float] = field(default_factory=list)
    integer: list[bool] = field(default_factory=list)
    blocks: list[sparse.csr_matrix] = field(default_factory=list)
    row_lower: list[float] = field(default_factory=list)
    row_upper: list[float] = field(default_factory=list)

    def variables_(self, lower: Vector, upper: Vector, *, integer: bool = False) -> Expression:
        """Add variables and return them as expressions."""
        start = len(self.lower)
        self.lower += lower.tolist()
        self.upper += upper.tolist()
        self.integer += [integer] * len(lower)
        matrix = sparse.eye_array(len(lower), len(self.lower), k=start, format="csr")
        return Expression(matrix, np.zeros(len(lower)))

    def total(self, *terms: tuple[float | Vector, Expression]) -> Expression:
        """Return Σ factor·expression; a factor is a number or one per row."""
        columns, rows = len(self.lower), len(terms[0][1].constant)
        matrix, constant = sparse.csr_matrix((rows, columns)), np.zeros(rows)
        for factor, expression in terms:
            scale = sparse.diags_array(np.broadcast_to(np.asarray(factor, dtype=float), rows))
            matrix = matrix + scale @ _widened(expression.matrix, columns)
            constant = constant + factor * expression.constant
        return Expression(sparse.csr_matrix(matrix), constant)

    def scattered(self, values: Expression, index: NDArray[np.intp], size: int) -> Expression:
        """Return `size` expressions, those at `index` being `values` and the others zero."""
        place = sparse.csr_matrix((np.ones(len(index)), (index, np.arange(len(index)))), (size, len(index)))
        return values.times(place, np.zeros(size))

    def rows_(self, *terms: tuple[float | Vector, Expression], low: float | Vector, high: float | Vector) -> None:
        """Add rows low ≤ Σ factor·expression ≤ high."""
        total = self.total(*terms)
        if total.matrix.shape[0] == 0:
            return
        self.blocks.append(total.matrix)
        self.row_lower += (low - total.constant).tolist()
        self.row_upper += (high - total.constant).tolist()

    def highs(self, *, relaxed: bool = False) -> highspy.Highs:
        """Build the solver; `relaxed` drops integrality."""
        columns = len(self.lower)
        matrix = sparse.vstack([_widened(block, columns) for block in self.blocks], format="csr")
        lp = highspy.HighsLp()
        lp.num_col_, lp.num_row_ = columns, matrix.shape[0]
        lp.col_cost_ = np.zeros(columns)
        lp.col_lower_, lp.col_upper_ = np.array(self.lower), np.array(self.upper)
        lp.row_lower_, lp.row_upper_ = np.array(self.row_lower), np.array(self.row_upper)
        lp.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
        lp.a_matrix_.start_, lp.a_matrix_.index_, lp.a_matrix_.value_ = matrix.indptr, matrix.indices, matrix.data
        if not relaxed:
            kinds = (highspy.HighsVarType.kContinuous, highspy.HighsVarType.kInteger)
            lp.integrality_ = [kinds[i] for i in self.integer]
        solver = highspy.Highs()
        solver.setOptionValue("output_flag", False)
        solver.setOptionValue("threads", 1)
        for name in ("primal_feasibility_tolerance", "dual_feasibility_tolerance", "mip_feasibility_tolerance"):
            solver.setOptionValue(name, 1e-9)
        solver.passModel(lp)
        return solver

    def minimise(self, variable: int, budget: Budget, *, gap: float) -> Solution:
        """Minimise one variable within a budget, to a relative gap."""
        solver = self.highs()
        solver.changeColCost(variable, 1.0)
        solver.setOptionValue("mip_rel_gap", gap)
        return self._solved(solver, budget)

    def point(self, objective: Expression, budget: Budget) -> Solution:
        """Find any point, looking where one objective (1 row) is large, within a budget."""
        solver = self.highs()
        columns = objective.matrix.indices.astype(np.int32)
        solver.changeColsCost(len(columns), columns, -objective.matrix.data)
        solver.setOptionValue("mip_max_improving_sols", 1)
        return self._solved(solver, budget)

    def _solved(self, solver: highspy.Highs, budget: Budget) -> Solution:
        solver.setOptionValue("time_limit", max(budget.seconds, 0.01))
        solver.setOptionValue("mip_max_nodes", int(min(max(1, budget.nodes - budget.used), _MOST_NODES)))
        solver.run()
        status, info = solver.getModelStatus(), solver.getInfo()
        budget.used += max(1, int(info.mip_node_count))
        budget.full |= info.mip_node_count >= _MOST_NODES
        if status == highspy.HighsModelStatus.kInfeasible:
            return Solution(math.inf, None, True)
        found = info.primal_solution_status == highspy.SolutionStatus.kSolutionStatusFeasible
        values = np.array(solver.getSolution().col_value) if found else None
        if any(self.integer):
            bound = info.mip_dual_bound if math.isfinite(info.mip_dual_bound) else -math.inf
        else:
            bound = info.objective_function_value if status == highspy.HighsModelStatus.kOptimal else -math.inf
        return Solution(bound, values, False)


def _widened(matrix: sparse.csr_matrix, columns: int) -> sparse.csr_matrix:
    result = sparse.csr_matrix(matrix)
    return sparse.csr_matrix((result.data, result.indices, result.indptr), shape=(result.shape[0], columns))
