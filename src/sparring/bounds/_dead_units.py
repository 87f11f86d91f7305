"""A network without what its zeros make idle: pixels and units that nothing reads, and units that never vary."""

from __future__ import annotations

import torch
from torch import Tensor

from ..graph import Affine, Flatten, Graph, Input, Linear, Node, ReLU, evaluate
from ._network import adjoint, as_sparse


def compacted(graph: Graph, x: Tensor) -> tuple[Graph, Tensor]:
    """Return an equal network of fewer units on fewer pixels, and the images' pixels that it reads: (N, pixels).

    Both are returned as they are unless the network begins with a Linear (after normalisation and Flatten, which are
    multiplied into it): there a pixel may count for nothing. From there on, hidden layers lose their idle units for as
    long as Linear follows ReLU follows Linear. Balls around the fewer pixels hold the same logits as those around all.
    """
    start = _first_linear(graph)
    if start is None:
        return graph, x
    layers, rest = [_from_pixels(graph, start)], start + 1
    while rest + 1 < len(graph.nodes) and _is_hidden(graph, rest):
        after = graph.nodes[rest + 1].op
        assert isinstance(after, Linear)
        layers.append(after)
        rest += 2
    before = 0
    while before != (before := sum(len(layer.weight) for layer in layers)):  # a unit that goes may leave others idle
        for i in range(len(layers) - 1):
            layers[i : i + 2] = _without_idle_units(*layers[i : i + 2])
    used = _some((layers[0].weight != 0).any(0))
    layers[0] = Linear(layers[0].name, layers[0].weight[:, used], layers[0].bias)
    made = [Node(Input(), (), (int(used.sum()),))]
    for layer in layers:
        if len(made) > 1:
            made.append(Node(ReLU(), (len(made) - 1,), made[-1].shape))
        made.append(Node(as_sparse(layer), (len(made) - 1,), (len(layer.weight),)))
    moved = len(made) - rest
    made += [Node(n.op, tuple(i + moved for i in n.inputs), n.shape) for n in graph.nodes[rest:]]
    return Graph(tuple(made), graph.rounding), x.flatten(1)[:, used]


def _readers(graph: Graph, index: int) -> list[int]:
    return [i for i, node in enumerate(graph.nodes) if index in node.inputs]


def _first_linear(graph: Graph) -> int | None:
    """Return the index of the Linear that alone reads the image, by way of normalisation and Flatten, or None."""
    index = 0
    while len(readers := _readers(graph, index)) == 1 and readers[0] == index + 1:
        index += 1
        op = graph.nodes[index].op
        if isinstance(op, Linear):
            return index if len(graph.nodes[index - 1].shape) == 1 else None
        if not isinstance(op, Affine | Flatten):
            return None
    return None


def _from_pixels(graph: Graph, index: int) -> Linear:
    """Return the Linear at an index with all that comes before it multiplied in."""
    nodes, op = graph.nodes, graph.nodes[index].op
    assert isinstance(op, Linear)
    weight, shift = op.weight, torch.zeros(1, *nodes[0].shape, dtype=op.weight.dtype, device=op.weight.device)
    for node in nodes[1:index]:
        shift = evaluate(node.op, shift)
    for i in range(index - 1, 0, -1):
        before = nodes[i].op
        assert isinstance(before, Affine | Flatten)
        weight = adjoint(before, weight, nodes[i - 1].shape)
    return Linear(op.name, weight.flatten(1), evaluate(op, shift)[0])


def _is_hidden(graph: Graph, index: int) -> bool:
    """Tell whether node index − 1 is read by a ReLU alone, and that by a Linear alone, next to each other."""
    relu, linear = graph.nodes[index].op, graph.nodes[index + 1].op
    alone = _readers(graph, index - 1) == [index] and _readers(graph, index) == [index + 1]
    return isinstance(relu, ReLU) and isinstance(linear, Linear) and alone


def _without_idle_units(before: Linear, after: Linear) -> tuple[Linear, Linear]:
    """Drop the units between two layers that nothing reads, and those without inputs, which only add a constant."""
    assert before.bias is not None  # whatever the model had, what was multiplied in added something
    keep = _some((after.weight != 0).any(0) & (before.weight != 0).any(1))
    constant = after.weight[:, ~keep] @ before.bias[~keep].clamp_min(0)
    return (
        Linear(before.name, before.weight[keep], before.bias[keep]),
        Linear(after.name, after.weight[:, keep], constant if after.bias is None else after.bias + constant),
    )


def _some(keep: Tensor) -> Tensor:
    """Return which of many to keep: one of them at least."""
    return keep if bool(keep.any()) else torch.arange(len(keep), device=keep.device) == 0
