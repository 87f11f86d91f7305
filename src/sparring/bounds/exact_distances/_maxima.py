"""Maxima over windows as convolutions and ReLUs, so that searches that split ReLUs split maxima, too.

max(a, b) = b + relu(a − b), and larger windows are trees of such pairs. b itself passes through a ReLU that is always
active, so that a chain of layers stays one.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ...graph import (
    Constant,
    Conv2d,
    Flatten,
    Graph,
    Linear,
    MaxPool,
    Node,
    Op,
    ReLU,
    Reshape,
    drop_dead_units,
    fold_affine,
)
from .._network import as_sparse
from ..certify._relaxations import Interval, pool_windows, propagate

_CLEAR = 1e-9  # distance of a ReLU that is always active from its kink, relative


def without_maxima(graph: Graph, box: Interval) -> Graph:
    """Return a graph without maxima that is equal in a box of images, (1, ...)."""
    if not any(isinstance(node.op, MaxPool) for node in graph.nodes):
        return graph
    written, place = _Written(box), [0]
    nodes = _before_relus(drop_dead_units(fold_affine(graph))).nodes
    written.nodes = [nodes[0]]
    for node in nodes[1:]:
        inputs = tuple(place[i] for i in node.inputs)
        if isinstance(node.op, MaxPool):
            written.largest_(node.op, inputs[0], node.shape)
        else:
            written.put_(node.op, inputs, node.shape)
        place.append(len(written.nodes) - 1)
    return replace(graph, nodes=tuple(written.nodes))


def _before_relus(graph: Graph) -> Graph:
    """Take maxima before ReLUs that nothing else reads, which is the same and leaves fewer ReLUs."""
    nodes = list(graph.nodes)
    for index, node in enumerate(nodes):
        source = node.inputs[0] if node.inputs else 0
        alone = sum(source in other.inputs for other in nodes) == 1
        if isinstance(node.op, MaxPool) and isinstance(nodes[source].op, ReLU) and alone:
            nodes[source] = replace(nodes[source], op=node.op, shape=node.shape)
            nodes[index] = replace(node, op=ReLU())
    return replace(graph, nodes=tuple(nodes))


class _Written:
    """The nodes of a graph that is being written, and their bounds in the box."""

    def __init__(self, box: Interval) -> None:
        self.nodes: list[Node] = []
        self.bounds = [box]

    def put_(self, op: Op, inputs: tuple[int, ...], shape: tuple[int, ...]) -> None:
        """Write a node; the last one is its only input if none is named."""
        if isinstance(op, Constant):
            self.nodes.append(Node(op, (), shape))
            self.bounds.append(Interval(op.value.double()[None], op.value.double()[None]))
            return
        inputs = inputs or (len(self.nodes) - 1,)
        self.nodes.append(Node(op, inputs, shape))
        self.bounds.append(propagate(op, *(self.bounds[i] for i in inputs)))

    def largest_(self, op: MaxPool, source: int, shape: tuple[int, ...]) -> None:
        """Write the maxima over windows as a tree of pairs."""
        kernel, stride = op.kernel, op.stride
        if not self._plain(op, source, shape):
            self._gathered_(op, source, shape)
            source, kernel, stride = len(self.nodes) - 1, (1, 1), (1, 1)
        entries = torch.eye(op.kernel[0] * op.kernel[1], dtype=torch.float64)  # of the units that are written last
        added = torch.zeros(shape[0], len(entries), dtype=torch.float64)
        step = Conv2d("", entries, None, stride, (0, 0), op.dilation if kernel == op.kernel else (1, 1), shape[0])
        while (count := len(entries)) > 1:
            half = (count + 1) // 2  # of an odd number, the middle one is in both halves
            one, two = entries[:half], entries[-half:]
            rows = torch.cat([one - two, two])
            layer = self._conv(step, rows, kernel)
            least = propagate(layer, self.bounds[source]).lower.view(shape[0], 2, half, -1)[:, 1].amin(2)
            least = least - _CLEAR * (1 + least.abs())
            bias = torch.cat([added[:, :half] - added[:, -half:], -least], 1)
            sides = (shape[0] * 2 * half, *shape[1:])
            self.put_(replace(layer, bias=bias.flatten()), (source,), sides)
            self.put_(ReLU(), (), sides)
            entries, added = torch.eye(half, dtype=torch.float64).repeat(1, 2), added[:, -half:] + least
            source, kernel = len(self.nodes) - 1, (1, 1)
            step = replace(step, stride=(1, 1), dilation=(1, 1))
        self.put_(replace(self._conv(step, entries, kernel), bias=added.flatten()), (source,), shape)

    def _conv(self, step: Conv2d, rows: Tensor, kernel: tuple[int, int]) -> Conv2d:
        """Return the layer that computes rows of the entries of each channel's windows."""
        return replace(step, weight=rows.view(len(rows), -1, *kernel).repeat(step.groups, 1, 1, 1))

    def _plain(self, op: MaxPool, source: int, shape: tuple[int, ...]) -> bool:
        """Return whether all windows lie inside the input."""
        sides = zip(self.nodes[source].shape[1:], shape[1:], op.kernel, op.stride, op.dilation, strict=True)
        inside = all((out - 1) * step + gap * (size - 1) < side for side, out, size, step, gap in sides)
        return op.padding == (0, 0) and inside

    def _gathered_(self, op: MaxPool, source: int, shape: tuple[int, ...]) -> None:
        """Write a copy of each window's entries as channels; a repeated entry replaces padding."""
        size = self.nodes[source].shape
        total = size[0] * size[1] * size[2]
        index = pool_windows(op, size)
        index = torch.where(index < total, index, index.amin(1, keepdim=True))
        index = index.view(shape[0], -1, index.shape[1]).transpose(1, 2).flatten()
        self.put_(Flatten(), (source,), (total,))
        self.put_(as_sparse(Linear("", torch.eye(total, dtype=torch.float64)[index], None)), (), (len(index),))
        sides = (shape[0] * op.kernel[0] * op.kernel[1], *shape[1:])
        self.put_(Reshape(sides), (), sides)
