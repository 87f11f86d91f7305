"""A packed network as a torch module that attacks can differentiate: the gradient runs on the sparse kernels too."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .program import Activation, Add, Flatten, Op, Pool, Program, ReLU, Scale, Sparse
from .runtime import Packed

__all__ = ["PackedModule", "run_torch"]


class PackedModule(nn.Module):
    """What is shipped, as attacks want it: images (N, *shape) to logits, differentiable with respect to the images.

    For fp16 and int8 artefacts it computes with the values as they were rounded. Where there are no kernels, torch
    computes the same network from dense weights.
    """

    def __init__(self, packed: Packed) -> None:
        super().__init__()
        self.packed = packed
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (N, classes)."""
        if not (torch.is_grad_enabled() and x.requires_grad):
            return self.packed(x)
        if not self.packed.has_gradient:
            return run_torch(self.packed.program, x)
        return cast(Tensor, _Logits.apply(x, self.packed))  # type: ignore[no-untyped-call]


class _Logits(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, packed: Packed) -> Tensor:
        return packed(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0])
        ctx.packed = inputs[1]

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        try:
            given = upstream.detach().numpy()
        except RuntimeError:  # many vectors at once (`is_grads_batched`), which only torch's own operations know
            return _dense_gradient(ctx.packed.program, x, upstream), None
        return ctx.packed.gradient(x, torch.from_numpy(given)), None


def _dense_gradient(program: Program, x: Tensor, upstream: Tensor) -> Tensor:
    with torch.enable_grad():
        image = x.detach().requires_grad_()
        return torch.autograd.grad(run_torch(program, image), image, upstream)[0]


def run_torch(program: Program, x: Tensor) -> Tensor:
    """Return the logits of images by torch with dense weights: the same network, differentiable any number of times."""
    values = [x]
    for step in program.steps:
        values.append(_evaluate(step.op, *(values[i] for i in step.inputs)))
    return values[-1]


def _evaluate(op: Op, x: Tensor, *others: Tensor) -> Tensor:
    match op:
        case Sparse():
            weight, bias = torch.from_numpy(op.dense()).to(x), torch.from_numpy(op.bias).to(x)
            if x.dim() == 2:
                return F.linear(x, weight.flatten(1), bias)
            return F.conv2d(x, weight, bias, op.stride, op.padding, op.dilation)
        case Scale():
            channels = (1, -1, *[1] * (x.dim() - 2))
            scale, shift = torch.from_numpy(op.scale).to(x), torch.from_numpy(op.shift).to(x)
            return x * scale.view(channels) + shift.view(channels)
        case ReLU():
            return x.relu()
        case Pool(mean=True):
            return F.avg_pool2d(x, op.kernel, op.stride)
        case Pool():
            return F.max_pool2d(x, op.kernel, op.stride, op.padding, op.dilation, op.ceil_mode)
        case Flatten():
            return x.flatten(1)
        case Add():
            return x + others[0]
        case Activation():
            return _activate(op, x)


def _activate(op: Activation, x: Tensor) -> Tensor:
    if op.kind == "shifted-relu":
        return (x - op.number).clamp_min(0)
    if op.kind == "threshold":
        return x * (x > op.number)
    flat = x.flatten(1)
    best = flat.topk(op.kept(flat.shape[1]), dim=1).indices
    mask = torch.zeros_like(flat).scatter_(1, best, 1.0)
    return (flat.clamp_min(0) * mask).view_as(x)
