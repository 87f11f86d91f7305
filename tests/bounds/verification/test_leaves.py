"""Bounds of sub-problems against points in them, duals against linear programs; planted bugs must be caught."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.optimize import linprog

from sparring.bounds._network import margin_rows, prepare
from sparring.bounds._region import Region, region
from sparring.bounds.certify import _crown as crown
from sparring.bounds.exact_distances._milp import MixedIntegerProgram
from sparring.bounds.verification._branching import tightened
from sparring.bounds.verification._budget import Budget
from sparring.bounds.verification._leaves import Bounder, Leaves, slopes_of
from sparring.bounds.verification._programs import by_linear_program, dual_bound
from sparring.bounds.verification._question import Question
from sparring.graph import Graph

from ..random_networks import network

SEEDS = range(14)


def setting(seed: int, norm: float) -> tuple[Graph, Region, torch.Tensor, torch.Tensor]:
    """A lowered network, a ball, the margins' coefficients and many points of the ball, corners among them."""
    model, shape = network(seed)
    graph = prepare(model, shape)
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(1, *shape, generator=generator, dtype=torch.float64)
    x = x if norm == math.inf else torch.where(x < 0.5, 0, x)  # pixels that can move only one way
    ball = replace(region(x, norm, 0.3), sided=True)
    points = ball.lower + torch.rand(1000, *shape, generator=generator, dtype=torch.float64) * (ball.upper - ball.lower)
    points[::2] = torch.where(points[::2] > x, ball.upper, ball.lower)
    away = (points - x).flatten(1).norm(dim=1).view(-1, *[1] * len(shape))
    return graph, ball, x, points if norm == math.inf else x + (points - x) * (0.3 / away).clamp_max(1)


def violated(seed: int, norm: float) -> bool:
    """Say whether any point of a sub-problem is below its bound."""
    graph, ball, _, points = setting(seed, norm)
    with torch.no_grad():
        values = graph.values(points)
        rows = margin_rows(graph, values[-1][:1].argmax(1))[0][:, None]
        bounds, _ = crown.bound_nodes(graph, ball, backward=True)
        bounder = Bounder(graph, len(graph.nodes) - 1, ball, bounds, rows, rows.new_zeros(rows.shape[:2]))
        current = bounder.roots(torch.arange(len(rows)), 3)
        for _ in range(4):
            if _beaten(bounder, current, values):
                return True
            if not bool((current.score.sum(1) > 0).any()):
                break
            current = bounder.bounded(current[current.score.sum(1) > 0].split(), 5, rate=0.3, rate_beta=0.3)
        lower = torch.tensor([bounder.polished(current[:1])[0]], dtype=torch.float64)
        if _beaten(bounder, replace(current[:1], lower=lower), values):
            return True
        better = tightened(graph, ball, bounds, 3, Budget(500))
    outside = (((v < b.lower - 1e-9) | (v > b.upper + 1e-9)).any() for v, b in zip(values, better, strict=True))
    return any(map(bool, outside))


def _beaten(bounder: Bounder, found: Leaves, values: list[torch.Tensor]) -> bool:
    inside = torch.ones(len(found), len(values[0]), dtype=torch.bool)
    for (index, units), signs in zip(bounder.open.items(), torch.split(found.signs, bounder.sizes, 1), strict=True):
        z = values[bounder.graph.nodes[index].inputs[0]].flatten(1)[:, units]
        inside &= ((signs[:, None] * z[None]) >= 0).all(2)
    margins = torch.einsum("nkc,pc->npk", bounder.fine.rows[found.owner], values[-1]).amax(2)
    return bool((inside & (margins < found.lower[:, None] - 1e-9)).any())


@pytest.mark.parametrize("norm", [math.inf, 2.0])
def test_no_point_is_below_the_bound_of_its_sub_problem(norm: float) -> None:
    assert not [seed for seed in SEEDS if violated(seed, norm)]


def test_without_open_units_there_is_nothing_to_split() -> None:
    graph, ball, _, _ = setting(0, math.inf)
    with torch.no_grad():
        tiny = Region(ball.x, ball.norm, ball.eps * 0, ball.x, ball.x)
        bounds, _ = crown.bound_nodes(graph, tiny, backward=True)
        rows = margin_rows(graph, torch.tensor([0]))[0][:, None]
        bounder = Bounder(graph, len(graph.nodes) - 1, tiny, bounds, rows, rows.new_zeros(rows.shape[:2]))
        found = bounder.roots(torch.arange(len(rows)), 3)
    torch.testing.assert_close(found.lower, (rows[:, 0] @ graph(ball.x)[0]), rtol=0, atol=1e-6)


_value, _cut, _split, _free = Bounder._value, Bounder._cut, Leaves.split, Region._free


def _wrong_multipliers(self, where, found, lines, alpha, beta, **options):
    return _value(self, where, found, lines, alpha, -beta, **options)


def _wrong_slopes(self, where, found, lines, alpha, beta, **options):
    return _value(self, where, found, lines, 1.5 * alpha + 0.5, beta, **options)


def _signs_swapped(self, signs):
    return _cut(self, -signs)


def _free_of_what_moves(self, a):
    return a - _free(self, a)


def _one_half_twice(self):
    found = _split(self)
    found.signs[len(self) :] = found.signs[: len(self)]
    return found


BUGS = {
    "multipliers of the wrong sign": (Bounder, "_value", _wrong_multipliers),
    "slopes above 1": (Bounder, "_value", _wrong_slopes),
    "signs swapped": (Bounder, "_cut", _signs_swapped),
    "pixels that move left out": (Region, "_free", _free_of_what_moves),
}


@pytest.mark.parametrize("bug", BUGS)
def test_planted_bugs_are_caught(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, name, broken = BUGS[bug]
    monkeypatch.setattr(owner, name, broken)
    assert any(violated(seed, norm) for seed in SEEDS for norm in ((2.0,) if owner is Region else (math.inf,)))


def test_a_search_that_forgets_one_half_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Leaves, "split", _one_half_twice)
    assert any(violated(seed, math.inf) for seed in SEEDS)


@pytest.mark.parametrize("seed", range(20))
def test_any_multipliers_bound_a_linear_program_and_the_best_ones_attain_it(seed: int) -> None:
    random = np.random.default_rng(seed)
    matrix, cost = random.standard_normal((4, 6)), random.standard_normal(6)
    inside = random.random(6)
    low, high = matrix @ inside - random.random(4), matrix @ inside + random.random(4)
    low[seed % 4], high[(seed + 1) % 4] = -math.inf, math.inf
    program = MixedIntegerProgram()
    variables = program.variables_(np.zeros(6), np.ones(6))
    for i in range(4):
        program.rows_((1.0, variables.times(matrix[i : i + 1], np.zeros(1))), low=low[i], high=high[i])
    finite = [
        (sign * matrix[i], sign * b)
        for sign, side in ((1, high), (-1, low))
        for i, b in enumerate(side)
        if np.isfinite(b)
    ]
    best = linprog(cost, np.array([a for a, _ in finite]), [b for _, b in finite], bounds=[(0, 1)] * 6).fun
    solver = program.highs(relaxed=True)
    for i, c in enumerate(cost):
        solver.changeColCost(i, c)
    solver.run()
    assert all(dual_bound(program, cost, random.standard_normal(4)) <= best for _ in range(20))
    assert dual_bound(program, cost, np.array(solver.getSolution().row_dual)) == pytest.approx(best, abs=1e-7)


def test_a_linear_program_of_a_sub_problem_is_no_weaker_than_its_multipliers_and_no_point_is_below_it() -> None:
    for seed in (0, 1, 7, 8):
        graph, ball, _, points = setting(seed, math.inf)
        with torch.no_grad():
            values = graph.values(points)
            rows = margin_rows(graph, values[-1][:1].argmax(1))[0][:, None]
            bounds, _ = crown.bound_nodes(graph, ball, backward=True)
            limits = rows.new_zeros(rows.shape[:2])
            bounder = Bounder(graph, len(graph.nodes) - 1, ball, bounds, rows, limits)
            found = bounder.roots(torch.arange(len(rows)), 20)
            asked = Question(graph, ball, rows, limits, bounds[0], lambda points: None, Budget())
            for i in range(len(found)):
                bound, _ = by_linear_program(asked, bounder, found[i : i + 1])
                assert float(found.lower[i]) - 1e-6 <= bound
                assert bound <= float((values[-1] @ rows[i, 0]).amin()) + 1e-9


def test_what_a_bound_does_not_depend_on_has_a_slope_of_zero() -> None:
    one, two = torch.ones(3, requires_grad=True), torch.ones(2, requires_grad=True)
    assert [s.tolist() for s in slopes_of((2 * one).sum(), [one, two])] == [[2.0] * 3, [0.0] * 2]
    assert [s.tolist() for s in slopes_of(torch.zeros(()), [two])] == [[0.0] * 2]
    assert slopes_of(torch.zeros(()), []) == []
