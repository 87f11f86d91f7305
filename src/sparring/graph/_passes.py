"""Passes over a graph: fold scales and shifts into layers, remove units without effect."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ._ops import Affine, AvgPool, Conv2d, Flatten, Graph, Linear, MaxPool, Node, ReLU

Layer = Linear | Conv2d


def needed(nodes: Sequence[Node], last: int) -> tuple[Node, ...]:
    """Return the nodes that one depends on, and the input."""
    wanted = {0, last}
    for place in range(last, 0, -1):
        wanted |= set(nodes[place].inputs) if place in wanted else set()
    places = {old: new for new, old in enumerate(sorted(wanted))}
    return tuple(replace(nodes[old], inputs=tuple(places[i] for i in nodes[old].inputs)) for old in places)


@torch.no_grad()
def fold_affine(graph: Graph) -> Graph:
    """Return an equal graph in which each Affine is merged into the layer before it or those after it, where possible.

    An Affine is moved through Flatten and merged with other Affines. A shift is not moved past zero padding, because
    the padding would have to be shifted too. Linear layers with flat inputs and convolutions take it; a convolution
    with groups takes only an Affine that follows it. Products are rounded to the precision of the graph.
    """
    nodes = list(graph.nodes)
    while any(_fold_(nodes, index) for index in range(1, len(nodes))):
        pass
    return replace(graph, nodes=tuple(nodes))


def _fold_(nodes: list[Node], index: int) -> bool:
    """Fold the Affine at an index, or move it one step towards a layer; return whether anything changed."""
    node = nodes[index]
    if not isinstance(node.op, Affine):
        return False
    (source,), readers = node.inputs, _readers(nodes, index)
    alone = _readers(nodes, source) == [index]
    if alone and (_is_layer(nodes[source]) or isinstance(nodes[source].op, Conv2d)):
        nodes[source] = _followed(nodes[source], node.op)
    elif not _reaches_layers(nodes, index, shifted=bool(node.op.shift.any())):
        return False
    elif isinstance(nodes[readers[0]].op, Flatten):
        shape = nodes[readers[0]].shape
        wide = Affine("", _per_value(node.op.scale, node.shape), _per_value(node.op.shift, node.shape))
        nodes[index], nodes[readers[0]] = replace(nodes[readers[0]], inputs=(source,)), Node(wide, (index,), shape)
        return True
    else:
        for reader in readers:
            nodes[reader] = _preceded(nodes[reader], node.op)
    del nodes[index]
    for place, other in enumerate(nodes):
        nodes[place] = replace(other, inputs=tuple(source if i == index else i - (i > index) for i in other.inputs))
    return True


def _readers(nodes: list[Node], index: int) -> list[int]:
    return [place for place, node in enumerate(nodes) for source in node.inputs if source == index]


def _is_layer(node: Node) -> bool:
    if isinstance(node.op, Linear):
        return len(node.shape) == 1
    return isinstance(node.op, Conv2d) and node.op.groups == 1


def _reaches_layers(nodes: list[Node], index: int, *, shifted: bool) -> bool:
    """Return whether only layers that can take the scale, and the shift if there is one, read a node."""
    readers = _readers(nodes, index)
    if len(readers) == 1 and isinstance(op := nodes[readers[0]].op, Affine | Flatten):
        shifted |= isinstance(op, Affine) and bool(op.shift.any())
        return _reaches_layers(nodes, readers[0], shifted=shifted)
    return bool(readers) and all(_is_layer(nodes[i]) and not (shifted and _padded(nodes[i])) for i in readers)


def _padded(node: Node) -> bool:
    return isinstance(node.op, Conv2d) and node.op.padding != (0, 0)


def _followed(node: Node, affine: Affine) -> Node:
    """Return a layer merged with the Affine after it."""
    op = node.op
    assert isinstance(op, Layer)
    weight = op.weight * affine.scale.view(-1, *[1] * (op.weight.dim() - 1))
    return replace(
        node, op=_with(op, weight, affine.shift if op.bias is None else op.bias * affine.scale + affine.shift)
    )


def _preceded(node: Node, affine: Affine) -> Node:
    """Return a layer, or an Affine, merged with the Affine before it."""
    scale, shift = affine.scale, affine.shift
    match node.op:
        case Affine() as op:
            return replace(node, op=Affine("", scale * op.scale, shift * op.scale + op.shift))
        case Linear() as op:
            added, weight = op.weight @ shift, op.weight * scale
        case Conv2d() as op:
            added, weight = (op.weight * shift.view(-1, 1, 1)).sum((1, 2, 3)), op.weight * scale.view(-1, 1, 1)
        case _:
            raise AssertionError(f"an {node.title} takes no scale")
    return replace(node, op=_with(op, weight, added if op.bias is None else added + op.bias))


def _with(op: Layer, weight: Tensor, bias: Tensor) -> Layer:
    """Return a layer with other values; a subclass that was made for the old ones becomes plain."""
    return Linear(op.name, weight, bias) if isinstance(op, Linear) else replace(op, weight=weight, bias=bias)


def _per_value(channels: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return one number per value for one per channel."""
    return channels.view(-1, *[1] * (len(shape) - 1)).expand(shape).flatten().contiguous()


@torch.no_grad()
def drop_dead_units(graph: Graph) -> Graph:
    """Return an equal graph without hidden units that no layer reads or that are constant.

    The output of a constant unit is added to the bias of the layer that reads it, except where that layer pads with
    zeros. Units are followed through ReLU, pooling and Flatten. If all units could be removed, one is kept. "Layers"
    are those of `fold_affine`.
    """
    nodes = list(graph.nodes)
    while sum(_shrink_(nodes, index) for index in range(1, len(nodes))):  # removing one may make others dead
        pass
    return replace(graph, nodes=tuple(nodes))


def _shrink_(nodes: list[Node], index: int) -> bool:
    """Drop the dead units of the layer at an index; return whether there were any."""
    chain = _chain(nodes, index)
    if not chain:
        return False
    first, last = nodes[index].op, nodes[chain[-1]].op
    assert isinstance(first, Layer) and isinstance(last, Layer)
    bias = first.weight.new_zeros(len(first.weight)) if first.bias is None else first.bias
    units = len(bias)
    by_unit = last.weight.reshape(len(last.weight), units, -1)  # flattening turns a channel into several columns
    constant = bias.clamp_min(0) if any(isinstance(nodes[i].op, ReLU) for i in chain) else bias
    fixed = ~(first.weight != 0).flatten(1).any(1)
    if _padded(nodes[chain[-1]]):
        fixed &= constant == 0
    used = (by_unit != 0).any(2).any(0) & ~fixed
    if bool(used.all()) or units == 1:
        return False
    used[0] |= not bool(used.any())
    gone = fixed & ~used
    added = by_unit[:, gone].sum(2) @ constant[gone]
    kept = _per_value(used, (units, by_unit.shape[2]))
    weight = last.weight[:, kept if isinstance(last, Linear) else used]
    nodes[index] = replace(nodes[index], op=_with(first, first.weight[used], bias[used]))
    nodes[chain[-1]] = replace(
        nodes[chain[-1]], op=_with(last, weight, added if last.bias is None else last.bias + added)
    )
    for i in (index, *chain[:-1]):
        sides = nodes[i].shape
        nodes[i] = replace(nodes[i], shape=(sides[0] // units * int(used.sum()), *sides[1:]))
    return True


def _chain(nodes: list[Node], index: int) -> list[int]:
    """Return the nodes from a layer to the only layer that reads it, channel by channel; none if there is none."""
    chain: list[int] = []
    while _is_layer(nodes[index]):
        readers = _readers(nodes, chain[-1] if chain else index)
        if len(readers) != 1:
            return []
        chain += readers
        if _is_layer(nodes[readers[0]]):
            return chain
        if not isinstance(nodes[readers[0]].op, ReLU | MaxPool | AvgPool | Flatten):
            return []
    return []
