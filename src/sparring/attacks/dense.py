"""Fully connected networks by hand: logits and input gradients in two matrix products a layer, without autograd.

Autograd costs such a network more than the products do once batches are small, and normalisation costs two passes over
the images. Nothing is taken on trust: `read_dense` compares with the model before it answers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..errors import UserError
from ..graph import Affine, Flatten, Graph, Linear, ReLU, lower

__all__ = ["Dense", "read_dense"]


@dataclass(frozen=True)
class Dense:
    """Linear layers with a ReLU between each two of them, the normalisation folded into the first.

    weights[k] has shape (outputs, inputs); biases[k] shape (outputs,).
    """

    weights: tuple[Tensor, ...]
    biases: tuple[Tensor, ...]

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return the logits of x and the outputs of every ReLU, which `backward` wants back."""
        return self.from_first(self.first(x))

    def first(self, x: Tensor) -> Tensor:
        """Return the first layer's outputs (N, units), before any ReLU."""
        return functional.linear(x.flatten(1), self.weights[0], self.biases[0])

    def from_first(self, value: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return what `forward` does, from the first layer's outputs on."""
        hidden: list[Tensor] = []
        for weight, bias in zip(self.weights[1:], self.biases[1:], strict=True):
            hidden.append(value.relu())
            value = functional.linear(hidden[-1], weight, bias)
        return value, hidden

    def back_to_first(self, rows: Tensor, hidden: list[Tensor]) -> Tensor:
        """Return the gradients (..., N, units) at the first layer's output of sums of logits.

        rows: the weights of the sums, shape (..., N, classes).
        """
        value = rows
        for weight, output in zip(self.weights[:0:-1], hidden[::-1], strict=True):
            value = (value @ weight).mul_(output > 0)
        return value

    def backward(self, rows: Tensor, hidden: list[Tensor]) -> Tensor:
        """Return the input gradients (..., N, pixels) of such sums."""
        return self.back_to_first(rows, hidden) @ self.weights[0]


def read_dense(model: nn.Module, x: Tensor) -> Dense | None:
    """Return a model in eval mode as such a network, or None where it is anything else.

    x: a few images, at which both must give the same logits and gradients: a model that hides its gradients keeps them
    hidden, so that flags can tell. Models with hooks are refused, since a hook may change what flows.
    """
    if any(p.dim() > 2 for p in model.parameters()) or any(_is_hooked(module) for module in model.modules()):
        return None
    try:
        dense = _fold(lower(model, tuple(x.shape[1:])), x.device)
    except UserError:
        return None
    return dense if dense is not None and _agree(dense, model, x) else None


def _agree(dense: Dense, model: nn.Module, x: Tensor) -> bool:
    point = x.detach().requires_grad_()
    with torch.enable_grad():
        expected = model(point)
    logits, hidden = dense.forward(x)
    if not expected.requires_grad or not _close(logits, expected.detach()):
        return False
    weights = torch.linspace(-1, 1, logits.shape[1], dtype=x.dtype, device=x.device).expand_as(logits)
    (gradient,) = torch.autograd.grad(expected, point, weights, allow_unused=True, materialize_grads=True)
    return _close(dense.backward(weights, hidden).view_as(x), gradient)


def _close(value: Tensor, expected: Tensor) -> bool:
    return torch.allclose(value, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def _is_hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)


def _fold(graph: Graph, device: torch.device) -> Dense | None:
    """Return a chain of linear layers and ReLUs with every constant scale and shift folded in; None for others."""
    weights: list[Tensor] = []
    biases: list[Tensor] = []
    # What has been done to the pixels, or to the last ReLU's outputs, since: value · scale + shift.
    scale = torch.ones(graph.nodes[0].shape, device=device).flatten()
    shift = torch.zeros_like(scale)
    after_linear = False
    for place, node in enumerate(graph.nodes[1:]):
        if node.inputs != (place,):
            return None
        match node.op:
            case Flatten():
                pass
            case Affine(scale=times, shift=plus):
                times, plus = (_per_value(value, node.shape) for value in (times, plus))
                if after_linear:
                    weights[-1], biases[-1] = weights[-1] * times.unsqueeze(1), biases[-1] * times + plus
                else:
                    scale, shift = scale * times, shift * times + plus
            case Linear(weight=weight, bias=bias) if not after_linear and len(scale) == weight.shape[1]:
                offset = weight.detach() @ shift
                weights.append(weight.detach() * scale)
                biases.append(offset if bias is None else offset + bias.detach())
                after_linear = True
            case ReLU() if after_linear:
                scale, shift = torch.ones_like(biases[-1]), torch.zeros_like(biases[-1])
                after_linear = False
            case _:
                return None
    return Dense(tuple(weights), tuple(biases)) if after_linear else None


def _per_value(channels: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return one number per value for one per channel."""
    return channels.view(-1, *[1] * (len(shape) - 1)).expand(shape).flatten()
