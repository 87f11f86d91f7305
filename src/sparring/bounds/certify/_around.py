"""A network around an image: deviations, lines of one slope, and float32 with a bound on its rounding."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...graph import AvgPool, Conv2d, Graph, Linear, MaxPool, Node, ReLU, evaluate, with_tensors
from .._curves import Curve
from .._network import mapped
from .._region import Region
from ._receptive_field import stem_of, windows
from ._relaxations import Lines, Relaxation, WindowLines

_UNIT = 2.0**-24  # the relative error of one operation in float32
_EXACT = ("none", "ieee")
_TINY = 1e-30  # more than what underflow can add


@dataclass(frozen=True, eq=False)
class Around:
    """The nodes that one node needs, as deviations from their values at the region's images.

    graph: layers without constants; region: of deviations; relaxed: lines between deviations, of one slope below and
    above where that is valid; value: of the node, (N, ...); error: the largest error of its bounds by rounding.
    """

    graph: Graph
    region: Region
    relaxed: dict[int, Relaxation]
    value: Tensor
    error: Tensor


def around(
    graph: Graph,
    index: int,
    sizes: Mapping[int, tuple[int, ...]],
    region: Region,
    relaxed: Mapping[int, Relaxation],
    *,
    parallel: bool,
) -> Around:
    """Return the network up to a node around the centres of regions; sizes: of the parts of all nodes that it needs.

    Its sums are of small numbers, whose errors in float32 are small too (Higham 2002, section 3.1): pulling a unit's
    coefficients back through sums of at most n terms in all is wrong by at most n·2^−24/(1 − n·2^−24) times the unit's
    value if nothing in it cancelled, computed forward from absolute values.
    """
    plain = _plain()
    nodes = list(graph.nodes[: index + 1])
    values = Graph(tuple(nodes)).values(region.x)
    reach = {0: torch.maximum(region.x - region.lower, region.upper - region.x)}
    lines: dict[int, Relaxation] = {}
    for at in sorted(sizes)[1:]:
        node = nodes[at]
        if at in relaxed:
            line = relaxed[at]
            assert isinstance(line, Lines | WindowLines)
            line = line.around(values[node.inputs[0]], values[at], parallel=parallel and at > stem_of(graph))
            reach[at] = line.size(reach[node.inputs[0]]).view(values[at].shape)
            lines[at] = line if plain else line.rounded()
            continue
        op = mapped(node.op, lambda value: value)  # type: ignore[arg-type]  # without what it adds
        reach[at] = evaluate(mapped(op, torch.abs), *(reach[i] for i in node.inputs))
        nodes[at] = replace(node, op=op if plain else with_tensors(op, lambda value: value.float()))
    terms = 0 if plain else _terms(graph, index, sizes)
    error = reach[index] * (terms * _UNIT / (1 - terms * _UNIT)) + _TINY
    zero, one, two = (value - region.x for value in (region.x, region.lower, region.upper))
    return Around(Graph(tuple(nodes)), replace(region, x=zero, lower=one, upper=two), lines, values[index], error)


def number_type(graph: Graph) -> torch.dtype:
    """Return the type of a network's weights."""
    return next((node.op.weight.dtype for node in graph.nodes if isinstance(node.op, Conv2d | Linear)), torch.float64)


def _plain() -> bool:
    """Return whether float32 may be less than it says, so that float64 is used."""
    reduced = torch.get_float32_matmul_precision() != "highest" or torch.backends.mkldnn.fp32_precision not in _EXACT
    return reduced or torch.is_autocast_enabled("cpu")


def _terms(graph: Graph, index: int, sizes: Mapping[int, tuple[int, ...]]) -> int:
    """Count the terms of all sums and products in float32, one after another, in a unit's coefficients."""
    stem = stem_of(graph)
    first = windows(graph, stem) if stem else None
    alone = max((at for at in sizes if at < stem and isinstance(graph.nodes[at].op, Conv2d)), default=0)
    total = 0
    for at in sizes:
        node, inside = graph.nodes[at], first is not None and at <= stem
        size = first.windows[at].size if first is not None and inside else sizes[at]
        total += 2 if at == index else _per_sum(node, size, alone=inside and at == alone)
        if at == stem and first is not None:
            overlaps = (
                -(-one // step) for one, step in zip(first.windows[0].size, first.windows[0].stride, strict=True)
            )
            total += 2 * node.shape[0] * math.prod(overlaps) + 4
    return total


def _per_sum(node: Node, size: tuple[int, ...], *, alone: bool) -> int:
    """Count the terms of one node; `alone`: of a single output channel, the others' are zero."""
    match node.op:
        case Conv2d():
            return node.op.weight[0 if alone else slice(None), 0].numel() + 2
        case Linear():
            return len(node.op.weight) + 2
        case AvgPool():
            return math.prod(node.op.kernel) + 2
        case MaxPool():
            return 4 + 2 * math.prod(node.op.kernel)
        case ReLU() | Curve():
            return 6 + math.prod(size)
    return 4
