"""The search for an answer: cheap bounds, attacks on the rest, tighter bounds, then branching and programs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from ...errors import Unsupported
from ...threat import LINF
from ..certify._crown import bound_nodes
from ..certify._relaxations import Interval
from ..exact_distances._maxima import without_maxima
from ._branching import decided, tightened
from ._budget import Budget, Limit
from ._leaves import Bounder, Leaves
from ._programs import by_linear_program
from ._question import Question, Status, climbed, folded

_STARTS, _CLIMBS, _FEW = 8, 40, 15
_ROUNDS = (0, 2, 8, 32, 128)  # of each unit's own search, before the margins' next
Progress = Callable[[float, int, int], None]  # the bound, open sub-problems, and those that were bounded


@dataclass(frozen=True, eq=False)
class Answer:
    """Whether there is a counter-example: "verified" (none), "falsified" (this point, (1, ...)) or "unknown".

    bound: a lower bound on the margin of all alternatives, positive where verified. limit: what ended an unknown one.
    """

    status: Status
    bound: float
    point: Tensor | None
    limit: Limit = ""


class _Found(Exception):
    """A counter-example was found during a search."""

    def __init__(self, point: Tensor) -> None:
        self.point = point


@torch.no_grad()
def answered(asked: Question, *, progress: Progress | None = None) -> Answer:
    """Search for an answer within the question's budget."""
    budget = asked.budget
    try:
        low = _proved(folded(asked), budget, progress or (lambda *_: None))
    except _Found as found:
        return Answer("falsified", -math.inf, found.point)
    return Answer("verified", low, None) if low > 0 else Answer("unknown", low, None, budget.limit)


def _attack(asked: Question, seed: int) -> None:
    if not len(asked.rows):
        return
    generator = torch.Generator().manual_seed(seed)
    some = torch.rand(_STARTS, *asked.ball.x.shape[1:], generator=generator, dtype=torch.float64)
    starts = torch.cat([asked.ball.x, asked.ball.lower + some * (asked.ball.upper - asked.ball.lower)])
    _raise_found(climbed(asked, starts, _CLIMBS))


def _raise_found(point: Tensor | None) -> None:
    if point is not None:
        raise _Found(point)


def _proved(asked: Question, budget: Budget, progress: Progress) -> float:
    """Return a lower bound on all margins; raise _Found for a counter-example."""
    graph, last = asked.graph, len(asked.graph.nodes) - 1
    bounds, _ = bound_nodes(graph, asked.ball, backward=True)
    low = torch.full((len(asked.rows),), -math.inf, dtype=torch.float64)

    def open_() -> Tensor:
        return (low <= 0).nonzero().squeeze(1)

    def bounded(bounder: Bounder, steps: int) -> None:
        if len(some := open_()):
            low[some] = torch.maximum(low[some], bounder.roots(some, steps).lower)

    bounder = Bounder(graph, last, asked.ball, bounds, asked.rows, asked.limits)
    bounded(bounder, 0)
    _attack(asked.of(open_()), 0)
    bounded(bounder, 20)
    if len(open_()) and (plain := without_maxima(graph, Interval(asked.ball.lower, asked.ball.upper))) is not graph:
        graph, last, asked = plain, len(plain.nodes) - 1, replace(asked, graph=plain)
        bounds, _ = bound_nodes(graph, asked.ball, backward=True)
    for level, rounds in enumerate(_ROUNDS):
        if not len(open_()) or budget.over:
            break
        before = budget.used
        bounds = tightened(graph, asked.ball, bounds, rounds, budget)
        bounder = Bounder(graph, last, asked.ball, bounds, asked.rows, asked.limits)
        bounded(bounder, 20)
        if not len(open_()) or budget.over:
            break
        _attack(asked.of(open_()), level + 1)
        part = budget.part(math.inf if rounds == _ROUNDS[-1] else (budget.used - before) // 2)
        told = partial(_tell, progress, float(low.amin()), budget.used)
        value = decided(bounder, open_(), part, stuck=partial(_by_program, asked, bounder), heard=told)
        budget.take_(part)
        low[open_()] = low[open_()].clamp_min(value)
    return float(low.amin()) if len(low) else math.inf


def _tell(progress: Progress, low: float, before: int, value: float, open_: int, used: int) -> None:
    progress(max(low, value), open_, before + used)


def _by_program(asked: Question, bounder: Bounder, leaf: Leaves) -> float:
    try:
        bound, point = by_linear_program(asked, bounder, leaf)
    except Unsupported:  # curves, and layers too large to write down
        return -math.inf
    if asked.ball.norm != LINF and bound <= 0:  # the program knows only the box
        polished, lowest = bounder.polished(leaf)
        bound, point = max(bound, polished), torch.cat([lowest, point])
    if bound <= 0:
        _raise_found(asked.replay(asked.inside(point)))
        _raise_found(climbed(asked.of(leaf.owner), point, _FEW))
    return bound
