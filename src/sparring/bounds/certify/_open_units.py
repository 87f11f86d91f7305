"""Select the units that CROWN refines, and count the work."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache

import torch
from torch import Tensor

from ...graph import Constant, Conv2d, Graph, Linear, MaxPool, Op, ReLU, SparseActivation
from .._curves import Curve
from .._network import Product
from ._receptive_field import windows
from ._relaxations import Interval, rivals

NONLINEAR = (ReLU, MaxPool, SparseActivation, Curve, Product)
_HEAVY = 7e9  # multiplications per image from which shortcuts pay: when CROWN takes seconds


def refined(graph: Graph) -> list[int]:
    """Return the nodes before nonlinear ones with lines; outputs of ReLUs and curves have no tighter bounds."""
    nodes = graph.nodes
    before = {i for node in nodes if isinstance(node.op, NONLINEAR) for i in node.inputs}
    return sorted(i for i in before if not isinstance(nodes[i].op, Constant) and not _known_enough(graph, i))


def _known_enough(graph: Graph, index: int) -> bool:
    alone = not any(isinstance(op, SparseActivation) for _, op in _readers(graph, index))
    return alone and isinstance(graph.nodes[index].op, ReLU | Curve)


def _readers(graph: Graph, index: int) -> list[tuple[int, Op]]:
    return [(i, node.op) for i, node in enumerate(graph.nodes) if index in node.inputs]


def wanted(graph: Graph, index: int, known: Interval) -> Tensor:
    """Return for which neurons of a node better bounds may count, (N, ...).

    These are the neurons of unknown sign, or all if more than the sign matters. After a ReLU, more than the sign
    matters for positive values: before a maximum, if several may be the largest of their window.
    """
    if any(isinstance(op, NONLINEAR) and not isinstance(op, ReLU) for _, op in _readers(graph, index)):
        return torch.ones_like(known.lower, dtype=torch.bool)
    found = (known.lower < 0) & (known.upper > 0)
    positive = Interval(*(value.clamp_min(0) for value in known))
    for place in (i for i, op in _readers(graph, index) if isinstance(op, ReLU)):
        for _, op in _readers(graph, place):
            if isinstance(op, MaxPool):
                found = found | rivals(op, positive)
            elif isinstance(op, Curve | Product):
                found = found | (known.upper > 0)
    return found


@lru_cache(maxsize=4)
def heavy(graph: Graph) -> bool:
    """Return whether plain CROWN of one image takes so long that shortcuts pay."""
    return crown_work(graph) > _HEAVY


def crown_work(graph: Graph, units: Mapping[int, int] | None = None) -> float:
    """Return the multiplications of CROWN for one image, if of some nodes only so many units are refined."""
    first = next((i for i, node in enumerate(graph.nodes) if isinstance(node.op, Linear | Conv2d)), 0)
    rows = {i: math.prod(graph.nodes[i].shape) for i in refined(graph) if i > first}  # the first layer's are attained
    rows |= units or {}
    margins = graph.nodes[-1].shape[0] * row_work(graph, len(graph.nodes) - 1)
    return margins + sum(2 * count * row_work(graph, index) for index, count in rows.items())


def row_work(graph: Graph, index: int) -> float:
    """Return the multiplications of pulling one unit's coefficients back to the image: the same as the forward work."""
    seen = windows(graph, index)
    total, wanted_ = 0.0, {index}
    for place in range(index, 0, -1):
        if place not in wanted_:
            continue
        node = graph.nodes[place]
        wanted_ |= set(node.inputs)
        values = math.prod(node.shape) if seen is None else node.shape[0] * math.prod(seen.windows[place].size)
        each = node.op.weight[0].numel() if isinstance(node.op, Linear | Conv2d) else 1
        total += values * each * (place != index or seen is None)
    return total
