"""From a model to a packed program: fold normalisation into weights, remove what cannot matter, keep the nonzeros."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .. import graph
from ..errors import Unsupported
from ._program import (
    ACTIVATION_KINDS,
    Add,
    Flatten,
    Floats,
    Op,
    PackedActivation,
    Pool,
    Program,
    ReLU,
    Scale,
    Snap,
    Step,
    infer_shapes,
    sparse_from_dense,
)


def compile_model(
    model: nn.Module,
    shape: tuple[int, ...],
    *,
    images: Tensor | None = None,
    class_names: tuple[str, ...] | None = None,
    provenance: dict[str, Any] | None = None,
) -> Program:
    """Compile a classifier for images of `shape` into a Program that gives the same logits.

    Normalisation is folded into weights where that is exact (not in front of zero padding), units that nothing reads
    are removed, and units without inputs become constants of the next layer's bias. images: a few on which the graph
    is compared with the model, beside random ones. Raise Unsupported for operations without a rule.
    """
    lowered = graph.spelled_out(graph.lower(model, shape, images=images), torch.float32)
    doubled = replace(lowered, nodes=tuple(replace(node, op=_doubled(node.op)) for node in lowered.nodes))
    nodes = graph.drop_dead_units(graph.fold_affine(doubled)).nodes
    steps = tuple(Step(_packed(node), node.inputs) for node in nodes[1:])
    infer_shapes(shape, steps)
    return Program(shape, steps, class_names, provenance or {})


def _doubled(op: graph.Op) -> graph.Op:
    """Return an operation in double precision, so that folding rounds once, and without groups."""
    match op:
        case graph.Conv2d():
            return replace(op, weight=_ungrouped(op.weight.double(), op.groups), bias=_double(op.bias), groups=1)
        case graph.Linear():
            return replace(op, weight=op.weight.double(), bias=_double(op.bias))
        case graph.Affine():
            return replace(op, scale=op.scale.double(), shift=op.shift.double())
    return op


def _double(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.double()


def _ungrouped(weight: Tensor, groups: int) -> Tensor:
    """Spell a grouped convolution as a sparse full one: groups are just zeros."""
    out, channels, *kernel = weight.shape
    full = weight.new_zeros(groups, out // groups, groups, channels, *kernel)
    for group, part in enumerate(weight.view(groups, -1, channels, *kernel)):
        full[group, :, group] = part
    return full.view(out, groups * channels, *kernel)


def _packed(node: graph.Node) -> Op:
    match node.op:
        case graph.Linear() as op:
            if len(node.shape) != 1:
                raise Unsupported(f"layer '{op.name}' is applied to images that are not flattened; flatten them first")
            return sparse_from_dense(_single(op.weight)[:, :, None, None], _bias(op))
        case graph.Conv2d() as op:
            geometry = {"stride": op.stride, "padding": op.padding, "dilation": op.dilation}
            return sparse_from_dense(_single(op.weight), _bias(op), **geometry)
        case graph.Affine() as op:
            return Scale(_single(op.scale), _single(op.shift))
        case graph.ReLU():
            return ReLU()
        case graph.MaxPool() as op:
            return Pool(False, op.kernel, op.stride, op.padding, op.dilation, op.ceil_mode)
        case graph.AvgPool() as op:
            return Pool(True, op.kernel, op.stride)
        case graph.Flatten():
            return Flatten()
        case graph.Add():
            return Add()
        case graph.SparseActivation() as op:
            return _activation(op, node.shape[0])
    way = "build it of linear, convolutional, pooling and batch norm layers and ReLU, or ship it by torch.onnx"
    raise graph.refusal(node, f"has no packed form; {way}")


def _activation(op: graph.SparseActivation, channels: int) -> PackedActivation | Snap:
    kind, module = op.module.kind, op.module
    if kind == "mean-sparse":
        both: Any = (module.mean, module.radius)  # of one entry before they are calibrated
        centre, radius = (np.broadcast_to(_single(values), channels).copy() for values in both)
        return Snap(centre, radius)
    kind = "threshold" if kind == "percentile" else kind  # a threshold that was calibrated
    if kind not in ACTIVATION_KINDS:
        known = ", ".join((*ACTIVATION_KINDS, "percentile", "mean-sparse"))
        raise Unsupported(f"layer '{op.name}' ({type(module).__name__}) has no packed form; those of {known} have")
    number: Any = module.sparsity if kind == "top-k" else module.threshold
    return PackedActivation(kind, float(number))


def _single(tensor: Tensor) -> Floats:
    return tensor.detach().cpu().float().numpy()


def _bias(op: graph.Linear | graph.Conv2d) -> Floats:
    return np.zeros(len(op.weight), np.float32) if op.bias is None else _single(op.bias)
