"""A network around an image: deviations, lines of one slope, and float32 with a bound on its rounding."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...graph import Add, Affine, AvgPool, Conv2d, Graph, Linear, Node, evaluate, with_tensors
from .._network import mapped
from .._region import Region
from ._receptive_field import Windows, stem_of, windows
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


def around(seen: Windows, region: Region, relaxed: Mapping[int, Relaxation]) -> Around:
    """Return the network up to the last node of some windows around the centres of regions.

    Its sums are of small numbers, whose errors in float32 are small too (Higham 2002, section 3.1): pulling a unit's
    coefficients back through sums of at most n terms in all is wrong by at most n·2^−24/(1 − n·2^−24) times the unit's
    value if nothing in it cancelled, computed forward from absolute values.
    """
    plain = _plain()
    nodes = list(seen.graph.nodes[: seen.index + 1])
    values = Graph(tuple(nodes)).values(region.x)
    sizes = {0: torch.maximum(region.x - region.lower, region.upper - region.x)}
    lines: dict[int, Relaxation] = {}
    for index in sorted(seen.windows)[1:]:
        node = nodes[index]
        if index in relaxed:
            line = relaxed[index]
            assert isinstance(line, Lines | WindowLines)
            line = line.around(values[node.inputs[0]], values[index], parallel=index > stem_of(seen.graph))
            sizes[index] = line.size(sizes[node.inputs[0]]).view(values[index].shape)
            lines[index] = line if plain else line.rounded()
            continue
        op = mapped(node.op, lambda value: value)  # type: ignore[arg-type]  # without what it adds
        sizes[index] = evaluate(mapped(op, torch.abs), *(sizes[i] for i in node.inputs))
        nodes[index] = replace(node, op=op if plain else with_tensors(op, lambda value: value.float()))
    terms = 0 if plain else _terms(seen, lines)
    error = sizes[seen.index] * (terms * _UNIT / (1 - terms * _UNIT)) + _TINY
    zero, one, two = (value - region.x for value in (region.x, region.lower, region.upper))
    return Around(Graph(tuple(nodes)), replace(region, x=zero, lower=one, upper=two), lines, values[seen.index], error)


def number_type(graph: Graph) -> torch.dtype:
    """Return the type of a network's weights."""
    return next((node.op.weight.dtype for node in graph.nodes if isinstance(node.op, Conv2d | Linear)), torch.float64)


def _plain() -> bool:
    """Return whether float32 may be less than it says, so that float64 is used."""
    reduced = torch.get_float32_matmul_precision() != "highest" or torch.backends.mkldnn.fp32_precision not in _EXACT
    return reduced or torch.is_autocast_enabled("cpu")


def _terms(seen: Windows, relaxed: Mapping[int, Relaxation]) -> int:
    """Count the terms of all sums and products in float32, one after another, in a unit's coefficients."""
    stem = stem_of(seen.graph)
    first = windows(seen.graph, stem) if stem else None
    total = 0
    for index in seen.windows:
        node = seen.graph.nodes[index]
        inside = first if first is not None and index <= stem else seen
        size = node.shape[0] * math.prod(inside.windows[index].size)
        total += _per_sum(node) + (_per_line(relaxed[index], size) if index in relaxed else 0)
        total += 2 * size if index == stem else 0
    return total


def _per_sum(node: Node) -> int:
    match node.op:
        case Conv2d():
            return node.op.weight[:, 0].numel() + 2
        case AvgPool():
            return math.prod(node.op.kernel) + 2
        case Add() | Affine():
            return 4
    return 2


def _per_line(lines: Relaxation, size: int) -> int:
    parallel = isinstance(lines, Lines) and torch.equal(lines.low_slope, lines.high_slope)
    return 4 if parallel else 4 + 2 * size
