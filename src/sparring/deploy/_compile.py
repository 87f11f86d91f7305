"""Compile a model to a packed program: fold normalisation, remove units without effect, keep the nonzeros."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .. import graph
from ..errors import Unsupported, UserError
from ._dense import name_of
from ._program import (
    ACTIVATION_KINDS,
    Add,
    Constant,
    Dense,
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

    Normalisation is folded into weights where that is exact (not in front of zero padding), unread units are removed,
    and units without inputs become constants of the next layer's bias. images: a few on which the graph is compared
    with the model, beside random ones. Raise Unsupported for operations without a rule.
    """
    lowered = _simplest(graph.lower(model, shape, images=images))
    doubled = replace(lowered, nodes=tuple(replace(node, op=_doubled(node.op)) for node in lowered.nodes))
    nodes = graph.drop_dead_units(graph.fold_affine(doubled)).nodes
    # A constant reads the image only for the number of images.
    steps = tuple(Step(_packed(node), node.inputs or (0,)) for node in nodes[1:])
    try:
        infer_shapes(shape, steps)
    except UserError as error:
        raise Unsupported(f"{type(model).__name__} has no packed form ({error}); {_WAY}") from error
    return Program(shape, steps, class_names, provenance or {})


_WAY = "build it from operations with float results, or export it to ONNX (a file that ends in .onnx)"
_MOST_SPELLED = 2  # times as many nodes, up to which sparse kernels for the whole network pay


def _simplest(lowered: graph.Graph) -> graph.Graph:
    """Return a rewritten graph if sparse kernels then support all of it, else the original: parts of it run dense."""
    spelled = graph.spelled_out(lowered, torch.float32)
    calls = any(isinstance(n.op, graph.Call | graph.Reshape | graph.Constant) for n in spelled.nodes)
    return lowered if calls or len(spelled.nodes) > _MOST_SPELLED * len(lowered.nodes) else spelled


_UNGROUPED = 1 << 22  # weights up to which groups are written as zeros, so that dead parts of them can be removed


def _doubled(op: graph.Op) -> graph.Op:
    """Return an operation in double precision, so that folding rounds once, and without groups if it is small."""
    match op:
        case graph.Conv2d():
            few = op.groups * op.weight.numel() <= _UNGROUPED
            weight = _ungrouped(op.weight.double(), op.groups) if few else op.weight.double()
            return replace(op, weight=weight, bias=_double(op.bias), groups=1 if few else op.groups)
        case graph.Linear():
            return replace(op, weight=op.weight.double(), bias=_double(op.bias))
        case graph.Affine():
            return replace(op, scale=op.scale.double(), shift=op.shift.double())
    return op


def _double(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.double()


def _ungrouped(weight: Tensor, groups: int) -> Tensor:
    """Write a grouped convolution as a sparse full one: groups are just zeros."""
    out, channels, *kernel = weight.shape
    full = weight.new_zeros(groups, out // groups, groups, channels, *kernel)
    for group, part in enumerate(weight.view(groups, -1, channels, *kernel)):
        full[group, :, group] = part
    return full.view(out, groups * channels, *kernel)


def _packed(node: graph.Node) -> Op:
    match node.op:
        case graph.Linear() as op:
            return sparse_from_dense(_single(op.weight)[:, :, None, None], _bias(op), rows=len(node.shape) != 1)
        case graph.Conv2d() as op:
            return sparse_from_dense(
                _single(op.weight),
                _bias(op),
                stride=op.stride,
                padding=op.padding,
                dilation=op.dilation,
                groups=op.groups,
            )
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
        case graph.Constant() as op:
            return Constant(_single(op.value))
        case graph.Reshape() as op:
            return Dense("reshape.default", ("self",), {"shape": [-1, *op.shape]})
        case graph.Call() as op if op.name in (*graph.CALLS, *graph.RECURRENT):
            return Dense(name_of(op), op.names, {key: _plain(value) for key, value in op.options.items()}, op.place)
    raise graph.refusal(node, f"has no packed form; {_WAY}")


def _activation(op: graph.SparseActivation, channels: int) -> PackedActivation | Snap:
    kind, module = op.module.kind, op.module
    if kind == "mean-sparse":
        both: Any = (module.mean, module.radius)  # a single entry before calibration
        centre, radius = (np.broadcast_to(_single(values), channels).copy() for values in both)
        return Snap(centre, radius)
    kind = "threshold" if kind == "percentile" else kind  # a calibrated threshold
    if kind not in ACTIVATION_KINDS:
        known = ", ".join((*ACTIVATION_KINDS, "percentile", "mean-sparse"))
        raise Unsupported(f"layer '{op.name}' ({type(module).__name__}) has no packed form; only {known} have one")
    number: Any = module.sparsity if kind == "top-k" else module.threshold
    return PackedActivation(kind, float(number))


def _single(tensor: Tensor) -> Floats:
    return tensor.detach().cpu().float().numpy()


def _plain(value: Any) -> Any:
    """Return an option of an operation with tensors in their stored form: floats in single precision."""
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, torch.dtype) and value.is_floating_point:
        return torch.float32
    if isinstance(value, Tensor):
        return value.detach().cpu().float() if value.is_floating_point() else value.cpu()
    return value


def _bias(op: graph.Linear | graph.Conv2d) -> Floats:
    return np.zeros(len(op.weight), np.float32) if op.bias is None else _single(op.bias)
