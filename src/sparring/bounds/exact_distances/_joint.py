"""Search for the nearest image of any other class: the sub-problems of all classes, nearest first.

A cell is a class and the signs of some units. Its linear bound of the margin leaves a half-space, whose distance bounds
that of the cell. What the half-space leaves of the ball bounds the units in turn, and the less the nearer it is to the
ball's end. So ever larger balls are proved to hold no counter-example, until the nearest one known is reached.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor

from ...threat import LINF, distance
from ..verification._branching import Queue
from ..verification._budget import Budget
from ..verification._leaves import joined
from ._cells import Bounder, Cells
from ._settled import settled

_HALF, _LAST = 0.5, 0.05  # of what is missing, the next ball's part, and from which share of the goal on all of it
_FREE = 1e-6  # score up to which no chord of a cell costs anything
_LANDINGS, _CLEAR = 4, 1e-6  # steps of points to the boundary, and the margin there


class Best(Protocol):
    """The distance of the nearest counter-example known."""

    upper: float

    def offer_(self, point: Tensor, row: int) -> None:
        """Try to find a nearer one at a point (1, ...), float64, near where one of the rows is 0."""


def emptied(bounder: Bounder, best: Best, budget: Budget, *, floor: float, limit: float, gap: float) -> float:
    """Return a lower bound on the distance to the nearest counter-example, from `floor` to `limit`.

    The search ends within a relative gap of the nearest one known.
    """
    low, cells = floor, None
    while not budget.over and low < (goal := min(limit, best.upper * (1 - gap))):
        aim = min(goal, 4 * low + goal / 16)
        bounder.within_(goal if goal - low < _LAST * goal else low + _HALF * (aim - low))
        if cells is None:
            cells = bounder.roots(torch.arange(len(bounder.rows)))
        cells = _searched(bounder, cells, best, budget, gap)
        reached = float(cells.lower.amin())
        low = max(low, min(bounder.eps, reached))
        if reached < bounder.eps:
            break
    return low


def _searched(bounder: Bounder, cells: Cells, best: Best, budget: Budget, gap: float) -> Cells:
    """Split cells until all of them are at least as far away as the ball reaches, or as the budget allows."""
    queue: Queue[Cells] = Queue()
    done = [cells[:0]]
    size = bounder.batch
    waiting = [bounder.again(cells[i : i + size]) for i in range(0, len(cells), size)]
    while waiting or queue.heap:
        if budget.over or not budget.fits_(len(queue.heap) + sum(map(len, done)), cells.nbytes):
            return joined([*done, *waiting, *queue.take_(len(queue.heap))])
        current = waiting.pop() if waiting else joined(queue.take_(size // 2)).split()
        current, steps = bounder.bounded(current)
        budget.used += len(current)
        left = current.lower < bounder.eps
        free = (left & (current.score.sum(1) <= _FREE)).nonzero().squeeze(1)
        if len(free):
            better, steps[free] = settled(bounder, current[free], budget)
            current = current.replaced(free, better)
        if bool(left.any()):
            _land_(bounder, current[left], steps[left], best)
        bounder.eps = min(bounder.eps, best.upper * (1 - gap))  # what holds in a ball holds in smaller ones
        left = (current.lower < bounder.eps) & current.open.any(1)
        done.append(current[~left])
        queue.put_(current[left])
    return joined(done)


def _land_(bounder: Bounder, cells: Cells, steps: Tensor, best: Best) -> None:
    """Move points onto the boundary by Newton's steps, and offer the nearest one that gets there."""
    rows, room = bounder.rows[cells.owner], bounder.room
    for _ in range(_LANDINGS + 1):
        with torch.enable_grad():
            at = steps.detach().requires_grad_()
            margin = (bounder.graph((bounder.x + at).view(-1, *bounder.shape[1:])) * rows).sum(1)
            (slope,) = torch.autograd.grad(margin.sum(), at)
        at, margin = at.detach(), margin.detach()
        free = torch.where(slope > 0, at > room.low, at < room.high)
        away = torch.where(free, slope.sign() if bounder.norm == LINF else slope, 0)
        share = (margin + _CLEAR) / (slope * away).sum(1).clamp_min(1e-30)
        steps = (at - share[:, None] * away).clamp(room.low, room.high)
    far = torch.where(margin <= _CLEAR, distance(at, bounder.norm), math.inf)
    i = int(far.argmin())
    if float(far[i]) < best.upper:
        best.offer_(bounder.image(at[i]), int(cells.owner[i]))
