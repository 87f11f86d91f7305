"""A program as plain torch modules with its rounded weights, for attacks, bounds and tracing."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import graph
from ..sparsity import MeanSparse, ShiftedReLU, Threshold, TopK
from ._dense import call_of, dense
from ._program import (
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
    Shape,
    Snap,
    Sparse,
)


class Equivalent(nn.Module):
    """The network of a program in torch with dense, rounded weights, in eval mode.

    Sparse activations are modules of `sparsity`, so that attacks recognise what masks gradients. Parameters need no
    gradient.
    """

    def __init__(self, program: Program) -> None:
        super().__init__()
        shapes = program.shapes
        self.layers = nn.ModuleList(module_of(step.op, shapes[step.inputs[0]]) for step in program.steps)
        self.inputs = tuple(step.inputs for step in program.steps)
        self.requires_grad_(False)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (N, classes) of images (N, *shape) in [0, 1]."""
        return self.values(x)[-1]

    def values(self, x: Tensor) -> list[Tensor]:
        """Return all values of the program for images (N, *shape)."""
        values = [x]
        for layer, inputs in zip(self.layers, self.inputs, strict=True):
            values.append(layer(*(values[i] for i in inputs)))
        return values

    def steps(self, dtype: torch.dtype) -> list[graph.Step]:
        """Describe what forward() computes; see `graph.Stepwise`."""
        pairs = zip(self.layers, self.inputs, strict=True)
        return [
            layer.step(dtype, inputs) if isinstance(layer, _Operation) else (layer, inputs) for layer, inputs in pairs
        ]


class _Scale(nn.Module):
    """y = scale · x + shift per channel."""

    scale: Tensor
    shift: Tensor

    def __init__(self, op: Scale, shape: Shape) -> None:
        super().__init__()
        axes = (1, -1, *[1] * (len(shape) - 1))
        self.register_buffer("scale", torch.from_numpy(op.scale).view(axes))
        self.register_buffer("shift", torch.from_numpy(op.shift).view(axes))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale + self.shift

    def steps(self, dtype: torch.dtype) -> list[graph.Step]:
        scale, shift = self.scale.to(dtype).flatten(), self.shift.to(dtype).flatten()
        return [
            (graph.Affine("", scale, torch.zeros_like(scale)), (0,)),
            (graph.Affine("", torch.ones_like(shift), shift), (1,)),
        ]


class _Operation(nn.Module):
    """An operation without a layer in torch."""

    def step(self, dtype: torch.dtype, inputs: tuple[int, ...]) -> graph.Step:
        """Describe what forward() computes; see `graph.Stepwise`."""
        raise NotImplementedError


class _Add(_Operation):
    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        return x + other

    def step(self, dtype: torch.dtype, inputs: tuple[int, ...]) -> graph.Step:
        return graph.Add(), inputs


class _Constant(_Operation):
    value: Tensor

    def __init__(self, value: Floats) -> None:
        super().__init__()
        self.register_buffer("value", torch.from_numpy(value))

    def forward(self, x: Tensor) -> Tensor:
        return self.value.expand(len(x), *self.value.shape)

    def step(self, dtype: torch.dtype, inputs: tuple[int, ...]) -> graph.Step:
        return graph.Constant(self.value.to(dtype)), ()


class _Dense(_Operation):
    def __init__(self, op: Dense) -> None:
        super().__init__()
        self.op, self._call = op, call_of(op)

    def forward(self, *inputs: Tensor) -> Tensor:
        return dense(self._call, *inputs)

    def step(self, dtype: torch.dtype, inputs: tuple[int, ...]) -> graph.Step:
        return call_of(self.op, dtype), inputs


def module_of(op: Op, shape: Shape) -> nn.Module:
    match op:
        case Sparse():
            return _layer(op, flat=len(shape) == 1 or op.rows)
        case Scale():
            return _Scale(op, shape)
        case ReLU():
            return nn.ReLU()
        case Pool(mean=True):
            return nn.AvgPool2d(op.kernel, op.stride)
        case Pool():
            return nn.MaxPool2d(op.kernel, op.stride, op.padding, op.dilation, ceil_mode=op.ceil_mode)
        case Flatten():
            return nn.Flatten()
        case Add():
            return _Add()
        case Constant():
            return _Constant(op.value)
        case Dense():
            return _Dense(op)
        case PackedActivation():
            kinds = {"shifted-relu": ShiftedReLU, "threshold": Threshold, "top-k": TopK}
            return kinds[op.kind](op.number)
        case Snap():
            snap = MeanSparse(0.0)
            snap.mean, snap.radius = torch.from_numpy(op.centre), torch.from_numpy(op.radius)
            return snap


def _layer(op: Sparse, *, flat: bool) -> nn.Module:
    layer: nn.Linear | nn.Conv2d
    with torch.device("meta"):  # its own initialisation would use time and random numbers
        if flat:
            layer = nn.Linear(op.shape[1], op.shape[0])
        else:
            geometry = (op.stride, op.padding, op.dilation, op.groups)
            layer = nn.Conv2d(op.shape[1], op.shape[0], op.shape[2:], *geometry)
    weight = op.dense() if flat else op.grouped()
    layer.weight, layer.bias = (
        nn.Parameter(torch.from_numpy(v).clone()) for v in (weight.reshape(layer.weight.shape), op.bias)
    )
    return layer
