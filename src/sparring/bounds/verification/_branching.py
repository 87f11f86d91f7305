"""Branch and bound over the signs of ReLUs, many sub-problems at a time (Bunel et al. 2020; Wang et al. 2021)."""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Callable
from typing import Generic

import torch
from torch import Tensor

from ...graph import Graph, ReLU
from .._region import Region
from ..certify._crown import bound_nodes
from ..certify._relaxations import Interval, first_layers
from ._budget import Budget
from ._leaves import Bounder, Leaves, Some, joined

_ROOT_STEPS, _STEPS = 20, 4  # steps of ascent, for a ball and for each half of a sub-problem
_WIDE = 2**18  # coefficients of a batch of sub-problems in the widest layer: 2 MB of float64
_GAIN = 0.02  # share of a sub-problem's gap below which a split's gain is negligible


class Queue(Generic[Some]):
    """Open sub-problems, the one with the lowest bound first."""

    def __init__(self) -> None:
        self.heap: list[tuple[float, int, Some]] = []
        self.order = itertools.count()

    def put_(self, leaves: Some) -> None:
        for i, lower in enumerate(leaves.lower.tolist()):
            one = leaves[torch.tensor([i])]  # a copy: a view would keep its whole batch
            heapq.heappush(self.heap, (lower, next(self.order), one))

    def take_(self, count: int) -> list[Some]:
        return [heapq.heappop(self.heap)[2] for _ in range(min(count, len(self.heap)))]

    @property
    def lowest(self) -> float:
        return self.heap[0][0] if self.heap else math.inf


def batch_size(graph: Graph) -> int:
    """Return how many sub-problems are bounded at once."""
    return max(2, _WIDE // max(math.prod(node.shape) for node in graph.nodes))


def tightened(graph: Graph, ball: Region, bounds: list[Interval], rounds: int, budget: Budget) -> list[Interval]:
    """Bound the inputs of open ReLUs, layer by layer, each by its own search of several rounds."""
    attained = first_layers(graph, ball)
    for index in sorted({node.inputs[0] for node in graph.nodes if isinstance(node.op, ReLU)} - set(attained)):
        lower, upper = (value.flatten() for value in bounds[index])
        units = ((lower < 0) & (upper > 0)).nonzero().squeeze(1)
        if not len(units) or budget.over:
            continue
        parts = [
            _both_sides(graph, index, ball, bounds, some, rounds, budget)
            for some in torch.split(units, batch_size(graph))
        ]
        found = torch.cat(parts)
        low, high = lower.index_copy(0, units, found[:, 0]), upper.index_copy(0, units, -found[:, 1])
        shape, known = bounds[index].lower.shape, list(bounds)
        known[index] = Interval(low.view(shape), high.view(shape)).within(bounds[index])
        bounds, _ = bound_nodes(graph, ball, backward=True, known=known)
    return bounds


def _both_sides(
    graph: Graph, index: int, ball: Region, bounds: list[Interval], units: Tensor, rounds: int, budget: Budget
) -> Tensor:
    """Bound units of a node, and their negatives, from below: (units, 2)."""
    shape, count = graph.nodes[index].shape, len(units)
    rows = torch.zeros(2 * count, 1, math.prod(shape), dtype=torch.float64)
    rows[torch.arange(count), 0, units], rows[torch.arange(count) + count, 0, units] = 1.0, -1.0
    bounder = Bounder(graph, index, ball, bounds, rows.view(2 * count, 1, *shape), rows.new_zeros(2 * count, 1))
    leaves = bounder.roots(torch.arange(2 * count), _ROOT_STEPS)
    budget.used += len(leaves)
    queues: list[Queue[Leaves]] = [Queue() for _ in range(2 * count)]
    settled = torch.full((2 * count,), math.inf, dtype=torch.float64)  # the lowest bound of what is no longer split
    for number in range(rounds + 1):
        ended = (leaves.lower > 0) | (leaves.score.sum(1) <= -_GAIN * leaves.lower)
        settled.scatter_reduce_(0, leaves.owner[ended], leaves.lower[ended], "amin")
        for q, i in zip(leaves.owner[~ended].tolist(), (~ended).nonzero().flatten().tolist(), strict=True):
            queues[q].put_(leaves[i : i + 1])
        worst = [queue for q, queue in enumerate(queues) if queue.lowest < float(settled[q])]
        fits = budget.fits_(sum(len(queue.heap) for queue in queues), leaves.nbytes)
        if number == rounds or not worst or budget.over or not fits:
            break
        leaves = bounder.bounded(joined([part for queue in worst for part in queue.take_(1)]).split(), _STEPS)
        budget.used += len(leaves)
    lowest = torch.tensor([queue.lowest for queue in queues], dtype=torch.float64)
    return torch.minimum(lowest, settled).view(2, count).T


def decided(
    bounder: Bounder,
    owner: Tensor,
    budget: Budget,
    *,
    stuck: Callable[[Leaves], float],
    heard: Callable[[float, int, int], None],
) -> float:
    """Bound all rows of some owners: return a lower bound, positive once all are proved.

    `stuck` bounds a sub-problem without a chord; if that does not close it, any unit is split, and it ends
    when all are. `heard` gets the bound, and the numbers of open and of bounded sub-problems.
    """
    queue: Queue[Leaves] = Queue()
    closed: float = math.inf
    leaves = bounder.roots(owner, _ROOT_STEPS)
    size = batch_size(bounder.graph)
    while True:
        budget.used += len(leaves)
        dead = (leaves.lower <= 0) & (leaves.score.sum(1) <= -_GAIN * leaves.lower)
        for i in dead.nonzero().flatten().tolist():
            leaves.lower[i] = max(float(leaves.lower[i]), stuck(leaves[i : i + 1]))
            leaves.score[i] = (leaves.signs[i] == 0).double()
        dead &= leaves.score.sum(1) == 0
        closed = min(closed, math.inf, *leaves.lower[dead | (leaves.lower > 0)].tolist())
        queue.put_(leaves[~dead & (leaves.lower <= 0)])
        heard(min(closed, queue.lowest), len(queue.heap), budget.used)
        if not queue.heap or closed <= 0 or budget.over or not budget.fits_(len(queue.heap), leaves.nbytes):
            return min(closed, queue.lowest)
        leaves = bounder.bounded(joined(queue.take_(size // 2)).split(), _STEPS)
