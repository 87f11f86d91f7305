"""Certified margins that a network can be trained on: differentiable in its own weights."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ...errors import Unsupported
from ...graph import Affine, Conv2d, Graph, Linear, Op, ReLU
from ...threat import LINF
from .._network import margin_rows
from .._region import Region
from ._certificates import interval_margins
from ._crown import bound_nodes, lower_bound
from ._relaxations import Interval


@dataclass(frozen=True)
class TrainingBounds:
    """Lower bounds of all margins g_y − g_k over the ball, (N, classes − 1), and the intervals before each ReLU."""

    margins: Tensor
    before_relu: list[Interval]


def training_bounds(
    model: nn.Module, graph: Graph, x: Tensor, y: Tensor, *, eps: float, crown: float = 0.0
) -> TrainingBounds:
    """Bound the margins of images x (N, ...) in [0, 1] over the linf ball, differentiably in the model's parameters.

    Interval arithmetic with the last layer merged into the margins (IBP, Gowal et al. 2018); of `crown`, a share in
    [0, 1], linear bounds through the last layers on those intervals (CROWN-IBP, Zhang et al. 2020, eq. 8). `graph` is
    the model's, lowered once. Batch normalisation uses its running statistics. The bounds have the model's own type and
    are not rounded down: use them for training, not as certificates. Raise Unsupported for computed weights.
    """
    live = replace(graph, nodes=tuple(replace(node, op=_live(node.op, model)) for node in graph.nodes))
    low, high = (x - eps).clamp_min(0), (x + eps).clamp_max(1)
    region = Region(x, LINF, x.new_full((len(x),), eps), low, high)
    rows = margin_rows(live, y).to(x.dtype)
    bounds, relaxed = bound_nodes(live, region, backward=False)
    margins = interval_margins(live, rows, bounds) if crown < 1 else rows.new_zeros(rows.shape[:2])
    if crown > 0:
        tighter = lower_bound(live, len(live.nodes) - 1, rows, region, relaxed)
        margins = crown * tighter + (1 - crown) * margins
    return TrainingBounds(margins, [bounds[n.inputs[0]] for n in live.nodes if isinstance(n.op, ReLU)])


def _live(op: Op, model: nn.Module) -> Op:
    """Return an operation with the model's own parameters instead of copies."""
    match op:
        case Linear() | Conv2d():
            if not op.name:
                raise Unsupported("certified training needs weights that are parameters; remove weight norms first")
            bias = None if op.bias is None else model.get_parameter(f"{op.name}.bias")
            return replace(op, weight=model.get_parameter(f"{op.name}.weight"), bias=bias)
        case Affine(name=name) if name:
            norm = model.get_submodule(name)
            if not isinstance(norm, nn.modules.batchnorm._BatchNorm) or norm.running_var is None:
                raise Unsupported(f"certified training has no rule for {name}, a {type(norm).__name__}")
            assert norm.running_mean is not None
            scale = (norm.running_var + norm.eps).rsqrt() * (1 if norm.weight is None else norm.weight)
            return Affine(name, scale, (0 if norm.bias is None else norm.bias) - norm.running_mean * scale)
    return op


@torch.no_grad()
def ibp_initialise_(model: nn.Module, *, generator: torch.Generator) -> None:
    """Draw new weights of linear and convolutional layers, so that intervals keep their width over layers.

    A normal with deviation √(2π) / fan-in (Shi et al. 2021, section 3.1); biases become zero.
    """
    for layer in model.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            fan_in = layer.weight[0].numel()
            drawn = torch.randn(layer.weight.shape, generator=generator) * (math.sqrt(2 * math.pi) / fan_in)
            layer.weight.copy_(drawn)
            if layer.bias is not None:
                layer.bias.zero_()
