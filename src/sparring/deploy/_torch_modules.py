"""A packed network as plain torch modules: what attacks, bounds and tracing can look into, rounded as it is shipped."""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
from torch import Tensor, nn

from .. import graph
from ..sparsity import MeanSparse, ShiftedReLU, Threshold, TopK
from ._program import Add, Flatten, Op, PackedActivation, Pool, Program, ReLU, Scale, Shape, Snap, Sparse
from ._runtime import Packed


class Equivalent(nn.Module):
    """The network of a program, computed by torch with dense weights as they were rounded; in eval mode.

    Activation sparsity is there as the modules of `sparsity`, so that attacks see what masks gradients. Parameters need
    no gradient.
    """

    def __init__(self, program: Program) -> None:
        super().__init__()
        shapes = program.shapes
        self.layers = nn.ModuleList(_module(step.op, shapes[step.inputs[0]]) for step in program.steps)
        self.inputs = tuple(step.inputs for step in program.steps)
        self.requires_grad_(False)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (N, classes) of images (N, *shape) in [0, 1]."""
        values = [x]
        for layer, inputs in zip(self.layers, self.inputs, strict=True):
            values.append(layer(*(values[i] for i in inputs)))
        return values[-1]

    def steps(self, dtype: torch.dtype) -> list[graph.Step]:
        """Say what forward() computes; see `graph.Stepwise`."""
        return [
            (graph.Add() if isinstance(layer, _Add) else layer, inputs)
            for layer, inputs in zip(self.layers, self.inputs, strict=True)
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


class _Add(nn.Module):
    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        return x + other


def _module(op: Op, shape: Shape) -> nn.Module:
    match op:
        case Sparse():
            return _layer(op, flat=len(shape) == 1)
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
        case PackedActivation():
            kinds = {"shifted-relu": ShiftedReLU, "threshold": Threshold, "top-k": TopK}
            return kinds[op.kind](op.number)
        case Snap():
            snap = MeanSparse(0.0)
            snap.mean, snap.radius = torch.from_numpy(op.centre), torch.from_numpy(op.radius)
            return snap


def _layer(op: Sparse, *, flat: bool) -> nn.Module:
    layer: nn.Linear | nn.Conv2d
    with torch.device("meta"):  # its own initialisation would take time and random numbers
        if flat:
            layer = nn.Linear(op.shape[1], op.shape[0])
        else:
            layer = nn.Conv2d(op.shape[1], op.shape[0], op.shape[2:], op.stride, op.padding, op.dilation)
    layer.weight, layer.bias = (
        nn.Parameter(torch.from_numpy(v).clone()) for v in (op.dense().reshape(layer.weight.shape), op.bias)
    )
    return layer


class PackedModule(nn.Module):
    """What is shipped, as attacks want it: images (N, *shape) to logits, differentiable with respect to the images.

    For fp16 and int8 artefacts it computes with the values as they were rounded. Logits are the kernels'. Gradients are
    theirs too, or where they have none those of `equivalent`: without llvmlite, of vectors that autograd batches, and
    through activation sparsity, whose modules an attack finds there and may switch to their straight-through pass.
    """

    def __init__(self, packed: Packed) -> None:
        super().__init__()
        self.packed = packed
        self.equivalent = Equivalent(packed.program)
        masked = any(isinstance(step.op, PackedActivation | Snap) for step in packed.program.steps)
        self._native = packed.has_gradient and not masked
        # What an attack that needs no graph calls by itself: (images, gradients of logits, one or several for each) to
        # gradients of images.
        self.input_gradient = packed.gradient if self._native else None
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (N, classes)."""
        if not (torch.is_grad_enabled() and x.requires_grad):
            return self.packed(x)
        if not self._native:
            return cast(Tensor, self.equivalent(x))
        return cast(Tensor, _Logits.apply(x, self))  # type: ignore[no-untyped-call]

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Module:
        """Return a copy to be changed, such as one without activation sparsity: torch alone can compute that."""
        return _Copy(copy.deepcopy(self.equivalent, memo))


class _Copy(nn.Module):
    """The equivalent under the name that it has in a packed module."""

    def __init__(self, equivalent: Equivalent) -> None:
        super().__init__()
        self.equivalent = equivalent
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.equivalent(x))


class _Logits(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, module: PackedModule) -> Tensor:
        return module.packed(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0])
        ctx.module = inputs[1]

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        try:
            given = upstream.detach().numpy()
        except RuntimeError:  # many vectors at once (`is_grads_batched`), which only torch's own operations know
            return _dense_gradient(ctx.module.equivalent, x, upstream), None
        return ctx.module.packed.gradient(x, torch.from_numpy(given)), None


def _dense_gradient(network: nn.Module, x: Tensor, upstream: Tensor) -> Tensor:
    with torch.enable_grad():
        image = x.detach().requires_grad_()
        return torch.autograd.grad(network(image), image, upstream)[0]
