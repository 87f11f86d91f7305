"""A graph as a torch module, so that a network from a file is a model like any other."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ...errors import UserError
from .._ops import Constant, Conv2d, Flatten, Graph, Linear, Op, Reshape, evaluate, with_tensors
from .._plain_stacks import Step


class GraphModule(nn.Module):
    """Run a graph as a module; its layers with weights are torch's own layers.

    If the graph's input is not an image (channels, height, width), it takes images of any shape with as many values.
    """

    def __init__(self, graph: Graph) -> None:
        super().__init__()
        self.shape = graph.nodes[0].shape
        entry: list[Step] = []
        flat = all(isinstance(node.op, Flatten) for node in graph.nodes if 0 in node.inputs)
        if len(self.shape) != 3 and not flat:
            entry = [(Flatten(), (0,))]
            entry += [(Reshape(self.shape), (1,))] if len(self.shape) > 1 else []
        parts = [_as_layer(node.op) for node in graph.nodes[1:]]
        self.layers = nn.ModuleList(part for part in parts if isinstance(part, nn.Module))
        shifted = (tuple(i + len(entry) for i in node.inputs) for node in graph.nodes[1:])
        self.parts: list[Step] = [*entry, *zip(parts, shifted, strict=True)]

    def steps(self, dtype: torch.dtype) -> Sequence[Step]:
        """Describe the computation; see `Stepwise`."""
        return [(p if isinstance(p, nn.Module) else with_tensors(p, lambda v: v.to(dtype)), i) for p, i in self.parts]

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (N, classes) of images (N, ...); raise UserError for images of another size."""
        if math.prod(x.shape[1:]) != math.prod(self.shape) or len(self.shape) == 3 != x[0].dim():
            raise UserError(f"the network takes images of shape {self.shape}, not {tuple(x.shape[1:])}")
        values = [x]
        for part, inputs in self.parts:
            given = [values[i] for i in inputs]
            if isinstance(part, nn.Module):
                values.append(part(*given))
            elif isinstance(part, Constant):
                values.append(part.value.to(x).expand(len(x), *part.value.shape))
            else:
                values.append(evaluate(with_tensors(part, lambda v: v.to(x)), *given))
        return values[-1]


def _as_layer(op: Op) -> nn.Module | Op:
    """Return a torch layer with an operation's weights; other operations unchanged."""
    match op:
        case Linear(weight=weight, bias=bias):
            layer: nn.Module = nn.Linear(weight.shape[1], len(weight), bias=bias is not None, device="meta")
        case Conv2d(weight=weight, bias=bias):
            channels, kernel = weight.shape[1] * op.groups, (weight.shape[2], weight.shape[3])
            geometry = (op.stride, op.padding, op.dilation, op.groups)
            layer = nn.Conv2d(channels, len(weight), kernel, *geometry, bias=bias is not None, device="meta")
        case _:
            return op
    layer.load_state_dict({"weight": weight} | ({} if bias is None else {"bias": bias}), assign=True)
    return layer
