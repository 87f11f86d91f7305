"""From a model to a packed program: fold normalisation into weights, remove what cannot matter, keep the nonzeros."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from ... import graph
from ...errors import Unsupported
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

Doubles = NDArray[np.float64]


@dataclass
class _Layer:
    """A layer while it is rewritten: dense and in double precision, so that folding rounds once."""

    weight: Doubles  # (out, in, kernel height, kernel width)
    bias: Doubles
    geometry: dict[str, tuple[int, int]]

    @property
    def padded(self) -> bool:
        return self.geometry.get("padding", (0, 0)) != (0, 0)


@dataclass
class _Affine:
    scale: Doubles
    shift: Doubles


@dataclass
class _Step:
    op: _Layer | _Affine | Op
    inputs: list[int]
    channels: int
    positions: int


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
    lowered = graph.lower(model, shape, images=images)
    steps = [
        _Step(_convert(node.op, node), [i - 1 for i in node.inputs], node.shape[0], int(np.prod(node.shape[1:])))
        for node in lowered.nodes[1:]
    ]
    # Steps are numbered from 0 here and -1 is the image.
    _fold(steps)
    while _remove_dead(steps):
        pass
    finished = tuple(Step(_finish(step.op), tuple(i + 1 for i in step.inputs)) for step in steps)
    infer_shapes(shape, finished)
    return Program(shape, finished, class_names, provenance or {})


def _convert(op: graph.Op, node: graph.Node) -> _Layer | _Affine | Op:
    match op:
        case graph.Linear():
            if len(node.shape) != 1:
                raise Unsupported(f"layer '{op.name}' is applied to images that are not flattened; flatten them first")
            return _Layer(_numpy(op.weight)[:, :, None, None], _bias(op.weight, op.bias), {})
        case graph.Conv2d():
            geometry = {"stride": op.stride, "padding": op.padding, "dilation": op.dilation}
            return _Layer(_ungrouped(_numpy(op.weight), op.groups), _bias(op.weight, op.bias), geometry)
        case graph.Affine():
            return _Affine(_numpy(op.scale), _numpy(op.shift))
        case graph.ReLU():
            return ReLU()
        case graph.MaxPool():
            return Pool(False, op.kernel, op.stride, op.padding, op.dilation, op.ceil_mode)
        case graph.AvgPool():
            return Pool(True, op.kernel, op.stride)
        case graph.Flatten():
            return Flatten()
        case graph.Add():
            return Add()
        case graph.SparseActivation():
            return _activation(op, node.shape[0])
    way = "build it of linear, convolutional, pooling and batch norm layers and ReLU, or ship it by torch.onnx"
    raise graph.refusal(node, f"has no packed form; {way}")


def _activation(op: graph.SparseActivation, channels: int) -> PackedActivation | Snap:
    kind, module = getattr(op.module, "kind", ""), op.module
    if kind == "mean-sparse":
        both: Any = (module.mean, module.radius)  # of one entry before they are calibrated
        centre, radius = (_single(np.broadcast_to(_numpy(values), channels)) for values in both)
        return Snap(centre, radius)
    kind = "threshold" if kind == "percentile" else kind  # a threshold that was calibrated
    if kind not in ACTIVATION_KINDS:
        known = ", ".join((*ACTIVATION_KINDS, "percentile", "mean-sparse"))
        raise Unsupported(f"layer '{op.name}' ({type(module).__name__}) has no packed form; those of {known} have")
    number: Any = module.sparsity if kind == "top-k" else module.threshold
    return PackedActivation(kind, float(number))


def _numpy(tensor: Tensor) -> Doubles:
    return tensor.detach().cpu().double().numpy()


def _bias(weight: Tensor, bias: Tensor | None) -> Doubles:
    return np.zeros(weight.shape[0]) if bias is None else _numpy(bias)


def _ungrouped(weight: Doubles, groups: int) -> Doubles:
    """Spell a grouped convolution as a sparse full one: groups are just zeros."""
    out, channels, height, width = weight.shape
    full = np.zeros((out, channels * groups, height, width))
    for group in range(groups):
        rows = slice(group * out // groups, (group + 1) * out // groups)
        full[rows, group * channels : (group + 1) * channels] = weight[rows]
    return full


def _finish(op: _Layer | _Affine | Op) -> Op:
    match op:
        case _Layer():
            return sparse_from_dense(_single(op.weight), _single(op.bias), **op.geometry)
        case _Affine():
            return Scale(_single(op.scale), _single(op.shift))
    return op


def _single(array: Doubles) -> Floats:
    return array.astype(np.float32)


# -- folding ----------------------------------------------------------------------------------------------------------


def _fold(steps: list[_Step]) -> None:
    """Fold every affine step that can be folded exactly into a layer before or behind it."""
    index = 0
    while index < len(steps):
        if isinstance(steps[index].op, _Affine) and (_fold_back(steps, index) or _fold_forward(steps, index)):
            _drop(steps, index)
            index = 0
        elif isinstance(steps[index].op, _Affine) and _swap_flatten(steps, index):
            index = 0
        else:
            index += 1


def _readers(steps: list[_Step], index: int) -> list[int]:
    return [i for i, step in enumerate(steps) for source in step.inputs if source == index]


def _fold_back(steps: list[_Step], index: int) -> bool:
    affine, source = steps[index].op, steps[index].inputs[0]
    layer = steps[source].op if source >= 0 else None
    if not isinstance(layer, _Layer) or not isinstance(affine, _Affine) or len(_readers(steps, source)) > 1:
        return False
    layer.weight = layer.weight * affine.scale[:, None, None, None]
    layer.bias = layer.bias * affine.scale + affine.shift
    return True


def _fold_forward(steps: list[_Step], index: int) -> bool:
    affine = steps[index].op
    readers = [steps[i].op for i in _readers(steps, index)]
    layers = [op for op in readers if isinstance(op, _Layer)]
    if not isinstance(affine, _Affine) or not layers or len(layers) < len(readers):
        return False
    if affine.shift.any() and any(layer.padded for layer in layers):
        return False  # padding is zero behind the shift, not in front of it
    for layer in layers:
        layer.bias = layer.bias + np.einsum("ochw,c->o", layer.weight, affine.shift)
        layer.weight = layer.weight * affine.scale[None, :, None, None]
    return True


def _swap_flatten(steps: list[_Step], index: int) -> bool:
    """Turn affine-then-flatten into flatten-then-affine, from where it can be folded into a linear layer."""
    readers = _readers(steps, index)
    affine = steps[index].op
    if len(readers) != 1 or not isinstance(steps[readers[0]].op, Flatten) or not isinstance(affine, _Affine):
        return False
    if not any(isinstance(steps[i].op, _Layer) for i in _readers(steps, readers[0])):
        return False
    flatten, positions = steps[readers[0]], steps[index].positions
    wide = _Affine(np.repeat(affine.scale, positions), np.repeat(affine.shift, positions))
    features = steps[index].channels * positions
    steps[index] = _Step(flatten.op, steps[index].inputs, features, 1)
    steps[readers[0]] = _Step(wide, flatten.inputs, features, 1)
    return True


def _drop(steps: list[_Step], index: int) -> None:
    """Remove a step, whose readers then read what it read."""
    source = steps[index].inputs[0]
    del steps[index]
    for step in steps:
        step.inputs = [source if i == index else i - (i > index) for i in step.inputs]


# -- dead units -------------------------------------------------------------------------------------------------------


def _remove_dead(steps: list[_Step]) -> bool:
    """Remove units between one layer and the next that are constant or unread; tell whether anything changed."""
    changed = False
    for index, step in enumerate(steps):
        chain = _chain(steps, index) if isinstance(step.op, _Layer) else None
        if chain is not None:
            changed |= _shrink(steps, index, chain)
    return changed


def _chain(steps: list[_Step], index: int) -> list[int] | None:
    """Return the steps from a layer to the one layer that alone reads it, channel by channel; None if there is none."""
    chain: list[int] = []
    while True:
        readers = _readers(steps, chain[-1] if chain else index)
        if len(readers) != 1:
            return None
        chain.append(readers[0])
        op = steps[readers[0]].op
        if isinstance(op, _Layer):
            return chain
        if not isinstance(op, ReLU | Pool | Flatten):
            return None


def _shrink(steps: list[_Step], index: int, chain: list[int]) -> bool:
    first, last = steps[index].op, steps[chain[-1]].op
    assert isinstance(first, _Layer) and isinstance(last, _Layer)
    units = len(first.bias)
    spread = last.weight.shape[1] // units  # positions of one channel that a flattening has made columns
    by_unit = last.weight.reshape(last.weight.shape[0], units, -1)
    constant = first.bias.copy()
    if any(isinstance(steps[i].op, ReLU) for i in chain[:-1]):
        constant = np.maximum(constant, 0)
    fixed = ~first.weight.any(axis=(1, 2, 3)) & ((constant == 0) | (not last.padded))
    used = by_unit.any(axis=(0, 2)) & ~fixed
    if used.all() or (not used.any() and units == 1):
        return False
    if not used.any():
        used[0] = True  # a network keeps one unit, for a shape without a zero
    last.bias = last.bias + by_unit[:, ~used & fixed].sum(2) @ constant[~used & fixed]
    first.weight, first.bias = first.weight[used], first.bias[used]
    last.weight = last.weight[:, np.repeat(used, spread)]
    for i in (index, *chain[:-1]):
        steps[i] = replace(steps[i], channels=steps[i].channels // units * int(used.sum()))
    return True
