"""Mixed-integer linear programs over affine expressions, solved by HiGHS."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import highspy
import numpy as np
from numpy.typing import NDArray
from scipy import sparse

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
    """What HiGHS found: a bound no solution can beat, and a point or None; `infeasible` where there is none."""

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
        return _combine(len(self.lower), *terms)

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

    def highs(self, *, relaxed: bool = False, threads: int = 1) -> highspy.Highs:
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
        solver.setOptionValue("threads", threads)
        for name in ("primal_feasibility_tolerance", "dual_feasibility_tolerance", "mip_feasibility_tolerance"):
            solver.setOptionValue(name, 1e-9)
        solver.passModel(lp)
        return solver

    def minimise(self, variable: int, *, seconds: float, threads: int, gap: float) -> Solution:
        """Minimise one variable within a time limit, to a relative gap."""
        solver = self.highs(threads=threads)
        solver.changeColCost(variable, 1.0)
        solver.setOptionValue("mip_rel_gap", gap)
        return self._solved(solver, seconds)

    def point(self, objective: Expression, *, seconds: float, threads: int) -> Solution:
        """Find any point, looking where one objective (1 row) is large, within a time limit."""
        solver = self.highs(threads=threads)
        columns = objective.matrix.indices.astype(np.int32)
        solver.changeColsCost(len(columns), columns, -objective.matrix.data)
        solver.setOptionValue("mip_max_improving_sols", 1)
        return self._solved(solver, seconds)

    def _solved(self, solver: highspy.Highs, seconds: float) -> Solution:
        solver.setOptionValue("time_limit", max(seconds, 0.01))
        solver.run()
        status, info = solver.getModelStatus(), solver.getInfo()
        if status == highspy.HighsModelStatus.kInfeasible:
            return Solution(math.inf, None, True)
        found = info.primal_solution_status == highspy.SolutionStatus.kSolutionStatusFeasible
        values = np.array(solver.getSolution().col_value) if found else None
        if any(self.integer):
            bound = info.mip_dual_bound if math.isfinite(info.mip_dual_bound) else -math.inf
        else:
            bound = info.objective_function_value if status == highspy.HighsModelStatus.kOptimal else -math.inf
        return Solution(bound, values, False)


def _combine(columns: int, *terms: tuple[float | Vector, Expression]) -> Expression:
    """Return Σ factor·expression over `columns` variables; a factor is a number or one per row."""
    rows = len(terms[0][1].constant)
    matrix = sparse.csr_matrix((rows, columns))
    constant = np.zeros(rows)
    for factor, expression in terms:
        scale = sparse.diags_array(np.broadcast_to(np.asarray(factor, dtype=float), rows))
        matrix = matrix + scale @ _widened(expression.matrix, columns)
        constant = constant + factor * expression.constant
    return Expression(sparse.csr_matrix(matrix), constant)


def _widened(matrix: sparse.csr_matrix, columns: int) -> sparse.csr_matrix:
    result = sparse.csr_matrix(matrix)
    return sparse.csr_matrix((result.data, result.indices, result.indptr), shape=(result.shape[0], columns))
