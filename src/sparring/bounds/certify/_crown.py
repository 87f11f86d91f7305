"""CROWN: linear bounds propagated backwards (Zhang et al. 2018; Xu et al. 2020 for general graphs)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import repeat

import torch
from torch import Tensor

from ...graph import Constant, Graph, Node, evaluate
from .._network import LinearOp, Moved, adjoint, moved_back, offset
from .._region import Region
from ._around import around, number_type
from ._open_units import NONLINEAR, refined, wanted
from ._receptive_field import Stem, Windows, stem_of, whole, windows
from ._relaxations import Interval, Relaxation, first_layers, propagate, relax

_STEM = 2**24  # coefficients of the first layers as linear functions
_CHUNK = 2**19  # coefficients of units that are refined at once: 4 MB of float64


def lower_bound(
    graph: Graph,
    start: int,
    rows: Tensor,
    region: Region,
    relaxed: Mapping[int, Relaxation],
    *,
    alpha: Mapping[int, Tensor] | None = None,
    beta: Mapping[int, Tensor] | None = None,
    refine: bool = False,
) -> Tensor:
    """Bound rows·(output of node `start`) from below over a region: rows (N, K, *shape of the node) to (N, K).

    `relaxed` holds the linear bounds of the nonlinear nodes before `start`; `alpha` replaces, per row, the lower slopes
    of unstable ReLUs; `beta` is added to the coefficients of a node's output, (N, K, ...), where that must not be
    positive. The result is differentiable in both.
    """
    a, total = linear_bound(graph, start, rows, relaxed, alpha=alpha, beta=beta)
    return total + region.minimum(a, refine=refine)


def linear_bound(
    graph: Graph,
    start: int,
    rows: Tensor,
    relaxed: Mapping[int, Relaxation],
    *,
    alpha: Mapping[int, Tensor] | None = None,
    beta: Mapping[int, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Return a (N, K, pixels) and b (N, K) so that a·x + b bounds rows·(output of node `start`) as in `lower_bound`."""
    total = rows.new_zeros(rows.shape[:2])
    waiting = {start: rows}
    for index in range(start, 0, -1):
        if index not in waiting:
            continue
        a, node = waiting.pop(index), graph.nodes[index]
        if beta is not None and index in beta:
            a = a + beta[index]
        parts, added = _through(graph, index, a, relaxed, alpha)
        if added is not None:
            total = total + added
        for source, part in zip(node.inputs, parts, strict=True):
            waiting[source] = waiting[source] + part if source in waiting else part
    return waiting[0].flatten(2), total


def _through(
    graph: Graph, index: int, a: Tensor, relaxed: Mapping[int, Relaxation], alpha: Mapping[int, Tensor] | None
) -> tuple[tuple[Tensor, ...], Tensor | None]:
    """Pull coefficients on a node's output, (N, K, ...), back to its inputs; return what that adds, too, (N, K)."""
    node = graph.nodes[index]
    shapes = [graph.nodes[i].shape for i in node.inputs]
    if index in relaxed:
        return relaxed[index].pull(a, alpha.get(index) if alpha else None)
    if isinstance(node.op, Constant):
        return (), flat(a, 2) @ node.op.value.double().flatten()
    if isinstance(node.op, Moved):
        zero = evaluate(node.op, *(a.new_zeros(1, *shape) for shape in shapes)).flatten()
        parts = moved_back(node.op, a.flatten(0, 1), shapes)
        return tuple(p.view(*a.shape[:2], *p.shape[1:]) for p in parts), flat(a, 2) @ zero
    if isinstance(node.op, LinearOp):
        constant = offset(node.op, shapes[0])
        return (_pull(node.op, a, shapes[0]),), None if constant is None else a.flatten(2) @ constant
    return (a,) * len(shapes), None


def _both_bounds(graph: Graph, start: int, rows: Tensor, region: Region, relaxed: Mapping[int, Relaxation]) -> Interval:
    """Bound rows·(output of node `start`) from below and from above over a region: two of (N, K).

    Does what `lower_bound` does for `rows` and for −`rows`. Instead of the latter's coefficients their sum with the
    former's is pulled back: it is zero wherever no sign is open, and so costs less.
    """
    low_total, high_total = rows.new_zeros(2, *rows.shape[:2], dtype=torch.float64)
    waiting: dict[int, tuple[Tensor, Tensor | None]] = {start: (rows, None)}
    for index in range(start, 0, -1):
        if index not in waiting:
            continue
        (a, both), node = waiting.pop(index), graph.nodes[index]
        if index in relaxed:
            parts, sums, low, high = _through_both(relaxed[index], a, both)
            low_total += low
            high_total += high
        else:
            parts, constant = _through(graph, index, a, {}, None)
            sums, more = (repeat(None), None) if both is None else _through(graph, index, both, {}, None)
            if constant is not None:
                low_total += constant
                high_total += _less(more, constant)
        for source, part, total in zip(node.inputs, parts, sums, strict=False):
            waiting[source] = _plus(waiting[source], (part, total)) if source in waiting else (part, total)
    a, both = waiting[0]
    low_total += region.minimum(a.flatten(2).double())
    high_total += region.minimum(_less(both, a).flatten(2).double())
    return Interval(low_total, -high_total)


def _through_both(
    lines: Relaxation, a: Tensor, both: Tensor | None
) -> tuple[tuple[Tensor, ...], Iterable[Tensor | None], Tensor, Tensor]:
    """Pull a and `both` − a back through lines: the former, the sums of the two, and what each of them adds."""
    if both is None and (found := lines.pull_both(a)) is not None:
        part, total, low, high = found
        return (part,), (total,), low, high
    rows = a.shape[1]
    parts, added = lines.pull(torch.cat([a, _less(both, a)], 1), None)
    sums = [part[:, :rows] + part[:, rows:] for part in parts]
    return tuple(part[:, :rows] for part in parts), sums, added[:, :rows], added[:, rows:]


def _less(both: Tensor | None, a: Tensor) -> Tensor:
    return -a if both is None else both - a


def _plus(one: tuple[Tensor, Tensor | None], two: tuple[Tensor, Tensor | None]) -> tuple[Tensor, Tensor | None]:
    (a, first), (b, second) = one, two
    return a + b, second if first is None else first if second is None else first + second


def _pull(op: LinearOp, a: Tensor, shape: tuple[int, ...]) -> Tensor:
    return adjoint(op, a.flatten(0, 1), shape).view(*a.shape[:2], *shape)


def bound_nodes(
    graph: Graph, region: Region, *, backward: bool, known: Sequence[Interval] | None = None, roughly: bool = False
) -> tuple[list[Interval], dict[int, Relaxation]]:
    """Bound every node's output over a region, and every nonlinear node by lines.

    With `backward` the inputs of nonlinear nodes are refined by CROWN; without, all bounds are interval arithmetic.
    `known` are bounds over a region that contains this one. `roughly`: as in `around`, in a third of the time, and
    with lines of one slope where nothing is known.
    """
    attained = first_layers(graph, region)
    feeds = refined(graph) if backward else []
    bounds: list[Interval] = []
    relaxed: dict[int, Relaxation] = {}
    stems: list[Stem | None] = []
    for index, node in enumerate(graph.nodes):
        if isinstance(node.op, NONLINEAR):
            relaxed[index] = relax(node.op, *(bounds[i] for i in node.inputs))
        here = attained[index] if index in attained else _propagated(node, bounds, region)
        bounds.append(here if known is None else here.within(known[index]))
        if index in feeds and index not in attained:
            bounds[index] = _refine(
                graph, index, bounds[index], region, relaxed, stems, roughly, parallel=known is None
            )
    return bounds, relaxed


def _propagated(node: Node, bounds: list[Interval], region: Region) -> Interval:
    if isinstance(node.op, Constant):
        value = node.op.value.double().expand(len(region.x), *node.shape)
        return Interval(value, value)
    return propagate(node.op, *(bounds[i] for i in node.inputs))


def _refine(
    graph: Graph,
    index: int,
    known: Interval,
    region: Region,
    relaxed: Mapping[int, Relaxation],
    stems: list[Stem | None],
    roughly: bool,
    *,
    parallel: bool,
) -> Interval:
    """Tighten the neurons of a node for which it may count, from windows where neurons see little.

    `stems`, one an image, are added when they are first needed.
    """
    some, seen = wanted(graph, index, known), windows(graph, index)
    sizes = whole(graph, index) if seen is None else {i: window.size for i, window in seen.windows.items()}
    if not roughly or sizes is None:
        if seen is None:
            return _refined(graph, index, known, some, region, relaxed)
        return _in_windows(seen, known, some, region, relaxed, _stems(graph, index, relaxed, stems, len(region.x)))
    near = around(graph, index, sizes, region, relaxed, parallel=parallel and seen is not None)
    box = Interval(*(side - near.value for side in known))
    first = _stems(near.graph, index, near.relaxed, stems, len(region.x))
    if seen is None:
        found = _in_whole(near.graph, index, box, some, near.region, near.relaxed, first)
    else:
        found = _in_windows(replace(seen, graph=near.graph), box, some, near.region, near.relaxed, first)
    return Interval(found.lower + near.value - near.error, found.upper + near.value + near.error).within(known)


def _stems(
    graph: Graph, index: int, relaxed: Mapping[int, Relaxation], stems: list[Stem | None], images: int
) -> list[Stem | None]:
    """Return the stem of each image, computed once for all nodes behind it; None before, where nodes have no lines."""
    if index <= stem_of(graph):
        return [None] * images
    if not stems:
        pieces = [slice(i, i + 1) for i in range(images)]
        stems += [_stem(graph, {i: lines.of(piece) for i, lines in relaxed.items()}) for piece in pieces]
    return stems


def _in_whole(
    graph: Graph,
    index: int,
    known: Interval,
    some: Tensor,
    region: Region,
    relaxed: Mapping[int, Relaxation],
    stems: list[Stem | None],
) -> Interval:
    parts = []
    for start, stem in enumerate(stems):
        image = slice(start, start + 1)
        network, ball, lines = graph, region[image], {i: r.of(image) for i, r in relaxed.items()}
        if stem is not None:
            network, ball, lines = stem.before(graph, ball, lines)
        box = Interval(*(side[image] for side in known))
        parts.append(_refined(network, len(network.nodes) - 1, box, some[image], ball, lines))
    return _joined(parts)


def _in_windows(
    seen: Windows,
    known: Interval,
    some: Tensor,
    region: Region,
    relaxed: Mapping[int, Relaxation],
    stems: list[Stem | None],
) -> Interval:
    parts = []
    for image in (slice(start, start + 1) for start in range(len(known.lower))):  # there are many windows per image
        open_, *here = (seen.by_place(value[image]) for value in (some, *known))
        chosen = _places(open_) if seen.padded else torch.arange(len(open_))
        network, lines = seen.network(chosen, {i: r.of(image) for i, r in relaxed.items()}, stems[image.start])
        box, reach = Interval(*(value[chosen] for value in here)), seen.region(region[image], chosen)
        found = _refined(network, len(network.nodes) - 1, box, open_[chosen], reach, lines)
        both = (seen.whole(old.index_copy(0, chosen, new)) for old, new in zip(here, found, strict=True))
        parts.append(Interval(*both))
    return _joined(parts)


def _joined(parts: Sequence[Interval]) -> Interval:
    return Interval(*(torch.cat(sides) for sides in zip(*parts, strict=True)))


def _stem(graph: Graph, relaxed: Mapping[int, Relaxation]) -> Stem | None:
    """Return the first layers of a network for one image as linear functions; None if they have none or take much."""
    index = stem_of(graph)
    seen = windows(graph, index) if index else None
    if seen is None:
        return None
    channels, *places = graph.nodes[index].shape
    if 2 * channels * math.prod(places) * math.prod(seen.windows[0].size) * graph.nodes[0].shape[0] > _STEM:
        return None
    network, lines = seen.network(torch.arange(math.prod(places)), relaxed)
    rows = torch.eye(channels, dtype=number_type(network)).view(1, channels, channels, 1, 1)
    rows = rows.expand(math.prod(places), -1, -1, -1, -1)
    (low, below), (high, above) = (
        linear_bound(network, len(network.nodes) - 1, sign * rows, lines) for sign in (1, -1)
    )
    both = (torch.cat([v, t[..., None].to(v.dtype)], 2) for v, t in ((low, below), (-high, -above)))
    least, most = (value.transpose(1, 2) for value in both)  # (places, pixels + 1, C)
    functions = torch.stack([most + least, most - least], 1) / 2
    return Stem(index, seen.windows[0], functions.view(*places, *functions.shape[1:]))


def flat(value: Tensor, batch: int = 1) -> Tensor:
    """Return a tensor with one axis after its batch axes, even for single numbers."""
    return value.flatten(batch) if value.dim() > batch else value.unsqueeze(-1)


def _places(some: Tensor) -> Tensor:
    """Return the places (places, C, 1, 1) with any wanted neuron, sorted by how many, so that similar ones meet."""
    counts = some.flatten(1).sum(1)
    return counts.argsort(descending=True, stable=True)[: int((counts > 0).sum())]


def _refined(
    graph: Graph, index: int, known: Interval, some: Tensor, region: Region, relaxed: Mapping[int, Relaxation]
) -> Interval:
    lower, upper = (flat(b).clone() for b in known)
    width = 2 * max(math.prod(node.shape) for node in graph.nodes[: index + 1])
    for images, units in _groups(flat(some), max(1, _CHUNK // width)):
        here = region[images]
        rows = lower.new_zeros(*units.shape, lower.shape[1], dtype=number_type(graph))
        rows.scatter_(2, units[..., None], 1.0)
        lines = {i: r.of(images) for i, r in relaxed.items()}
        low, high = _both_bounds(graph, index, rows.view(*units.shape, *known.lower.shape[1:]), here, lines)
        lower[images] = lower[images].scatter(1, units, torch.maximum(lower[images].gather(1, units), low))
        upper[images] = upper[images].scatter(1, units, torch.minimum(upper[images].gather(1, units), high))
    shape = known.lower.shape
    return Interval(lower.view(shape), torch.maximum(upper, lower).view(shape))  # rounding may cross equal bounds


def _groups(open_: Tensor, rows: int) -> Iterator[tuple[slice, Tensor]]:
    """Split open units (N, units) into images and, for each of them, about `rows` units together: (images, count).

    With few images together, few units are active in any of them. Each image has its own open units; shorter lists are
    padded with units whose refinement is not used.
    """
    counts = open_.sum(1).tolist()
    start = 0
    while start < len(counts):
        stop = start + 1
        while stop < len(counts) and max(counts[start : stop + 1]) * (stop + 1 - start) <= rows:
            stop += 1
        if most := max(counts[start:stop]):
            chosen = open_[start:stop].byte().topk(most, dim=1).indices
            for units in torch.split(chosen, max(1, rows // (stop - start)), dim=1):
                yield slice(start, stop), units
        start = stop
