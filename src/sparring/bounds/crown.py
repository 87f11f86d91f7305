"""CROWN: linear bounds propagated backwards (Zhang et al. 2018; Xu et al. 2020 for general graphs)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..graph import Activation, Affine, AvgPool, Conv2d, Flatten, Graph, Linear, MaxPool, ReLU
from .intervals import Interval, first_layers, propagate
from .network import adjoint, offset
from .region import Region
from .relaxations import Relaxation, relax

__all__ = ["bound_nodes", "lower_bound"]

_LINEAR = (Linear, Conv2d, Affine, AvgPool, Flatten)
_NONLINEAR = (ReLU, MaxPool, Activation)
_CHUNK = 2**22  # coefficients held at once: 32 MB of float64


def lower_bound(
    graph: Graph,
    start: int,
    rows: Tensor,
    region: Region,
    relaxed: dict[int, Relaxation],
    *,
    alpha: dict[int, Tensor] | None = None,
    refine: bool = False,
) -> Tensor:
    """Bound rows·(output of node `start`) from below over a region: rows (N, K, *shape of the node) to (N, K).

    `relaxed` holds the linear bounds of the nonlinear nodes before `start`; `alpha` replaces, per row, the lower slopes
    of unstable ReLUs. The result is differentiable in `alpha`.
    """
    count, many = rows.shape[:2]
    total = rows.new_zeros(count, many)
    waiting = {start: rows}
    for index in range(start, 0, -1):
        if index not in waiting:
            continue
        a, node = waiting.pop(index), graph.nodes[index]
        if isinstance(node.op, _NONLINEAR):
            a, added = relaxed[index].pull(a, alpha[index] if alpha and index in alpha else None)
            total = total + added
        elif isinstance(node.op, _LINEAR):
            shape = graph.nodes[node.inputs[0]].shape
            if (constant := offset(node.op, shape)) is not None:
                total = total + a.flatten(2) @ constant
            a = adjoint(node.op, a.flatten(0, 1), shape).view(count, many, *shape)
        for source in node.inputs:
            waiting[source] = waiting[source] + a if source in waiting else a
    return total + region.minimum(waiting[0].flatten(2), refine=refine)


def bound_nodes(graph: Graph, region: Region, *, backward: bool) -> tuple[list[Interval], dict[int, Relaxation]]:
    """Bound every node's output over a region, and every nonlinear node by lines.

    With `backward` the inputs of nonlinear nodes are refined by CROWN; without, all bounds are interval arithmetic.
    """
    attained = first_layers(graph, region)
    feeds = {node.inputs[0] for node in graph.nodes if isinstance(node.op, _NONLINEAR)}
    bounds: list[Interval] = []
    relaxed: dict[int, Relaxation] = {}
    for index, node in enumerate(graph.nodes):
        if index in attained:
            bounds.append(attained[index])
            continue
        if isinstance(node.op, _NONLINEAR):
            relaxed[index] = relax(node.op, bounds[node.inputs[0]])
        here = propagate(node.op, *(bounds[i] for i in node.inputs))
        bounds.append(_refine(graph, index, here, region, relaxed) if backward and index in feeds else here)
    return bounds, relaxed


def _refine(graph: Graph, index: int, known: Interval, region: Region, relaxed: dict[int, Relaxation]) -> Interval:
    """Tighten the neurons whose sign is not known yet; the others gain nothing from it."""
    lower, upper = known.lower.flatten(1).clone(), known.upper.flatten(1).clone()
    pooled = any(isinstance(n.op, MaxPool | Activation) and index in n.inputs for n in graph.nodes)
    open_ = torch.ones_like(lower, dtype=torch.bool) if pooled else (lower < 0) & (upper > 0)
    count = int(open_.sum(1).max())
    if count == 0:
        return known
    # Each image has its own open neurons; shorter lists are filled up with neurons that are tightened for nothing.
    chosen = open_.byte().topk(count, dim=1).indices
    width = 2 * len(lower) * max(math.prod(node.shape) for node in graph.nodes[: index + 1])
    for part in torch.split(chosen, max(1, _CHUNK // width), dim=1):
        rows = lower.new_zeros(*part.shape, lower.shape[1]).scatter_(2, part[..., None], 1.0)
        rows = torch.cat([rows, -rows], 1).view(len(lower), -1, *graph.nodes[index].shape)
        found = lower_bound(graph, index, rows, region, relaxed)
        low, high = found[:, : part.shape[1]], -found[:, part.shape[1] :]
        lower.scatter_(1, part, torch.maximum(lower.gather(1, part), low))
        upper.scatter_(1, part, torch.minimum(upper.gather(1, part), high))
    shape = known.lower.shape
    return Interval(lower.view(shape), torch.maximum(upper, lower).view(shape))  # rounding may cross equal bounds
