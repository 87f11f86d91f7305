"""A packed network as a module for attacks: logits and gradients of the shipped kernels."""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
from torch import Tensor, nn

from ._equivalent import Equivalent
from ._program import PackedActivation, Snap
from ._runtime import Packed


class PackedModule(nn.Module):
    """An artefact as a module for attacks: images (N, *shape) to logits, differentiable with respect to the images.

    fp16 and int8 artefacts use their rounded weights. Logits are computed by the kernels. Gradients are too, or by
    `equivalent`: without llvmlite, for vectors that autograd batches, through sparse activations, and for dense
    networks where speed may decide. Attacks find these modules there and can use their straight-through backward pass.
    """

    def __init__(self, packed: Packed) -> None:
        super().__init__()
        self.packed = packed
        self.equivalent = Equivalent(packed.program)
        masked = any(isinstance(step.op, PackedActivation | Snap) for step in packed.program.steps)
        self._native = not masked and not packed.favours_torch and packed.has_gradient
        # Called directly by attacks that need no graph: (images, gradients of logits, one or several for each) to
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
        """Return a copy that can be changed, such as to remove activation sparsity: only torch can compute it."""
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
