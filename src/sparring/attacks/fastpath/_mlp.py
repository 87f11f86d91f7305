"""Fully connected networks without autograd: logits and input gradients in two matrix products per layer.

Autograd costs such a network more than the products do once batches are small, and normalisation costs two passes over
the images. `read_dense` compares the result with the model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from ...errors import UserError
from ...graph import Flatten, Graph, Linear, ReLU, fold_affine, lower


class ByHand(Protocol):
    """A network that computes its own gradients: `forward` returns logits and the values that `backward` needs."""

    def forward(self, x: Tensor) -> tuple[Tensor, Any]:
        """Return the logits of x (N, ...), and what was kept."""
        ...

    def backward(self, rows: Tensor, hidden: Any) -> Tensor:
        """Return the input gradients (..., N, pixels) of sums of logits with weights `rows` (..., N, classes)."""
        ...


@dataclass(frozen=True)
class Dense:
    """Linear layers with a ReLU between each two of them, the normalisation folded into the first.

    weights[k] has shape (outputs, inputs); biases[k] shape (outputs,).
    """

    weights: tuple[Tensor, ...]
    biases: tuple[Tensor, ...]

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return the logits of x and the outputs of every ReLU, which `backward` needs."""
        return self.from_first(self.first(x))

    def first(self, x: Tensor) -> Tensor:
        """Return the first layer's outputs (N, units), before any ReLU."""
        return functional.linear(x.flatten(1), self.weights[0], self.biases[0])

    def from_first(self, value: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return the result of `forward`, from the first layer's outputs on."""
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
            value = (value @ weight).mul_(output.sign())  # the sign of a ReLU's output: 0 or 1
        return value

    def backward(self, rows: Tensor, hidden: list[Tensor]) -> Tensor:
        """Return the input gradients (..., N, pixels) of such sums."""
        return self.back_to_first(rows, hidden) @ self.weights[0]


def read_dense(model: nn.Module, x: Tensor) -> Dense | None:
    """Return a model in eval mode as such a network, or None if it is of another kind.

    x: a few images, at which both must give the same logits and gradients: masked gradients stay masked, so that flags
    are raised. Models with hooks are refused, since a hook may change values or gradients.
    """
    layers = [module for module in model.modules() if module._parameters]
    if is_hooked(model) or not all(isinstance(layer, nn.Linear | nn.BatchNorm1d) for layer in layers):
        return None  # without a graph, which takes seconds if the model is not a plain stack
    try:
        dense = dense_layers(fold_affine(lower(model, tuple(x.shape[1:]), images=x)), 0)
    except UserError:
        return None
    return dense if dense is not None and agree(dense, model, x) else None


def agree(network: ByHand, model: nn.Module, x: Tensor) -> bool:
    """Return whether a network by hand gives the model's logits and gradients at x."""
    point = x.detach().requires_grad_()
    with torch.enable_grad():
        expected = model(point)
    logits, hidden = network.forward(x)
    if not expected.requires_grad or not _close(logits, expected.detach()):
        return False
    weights = torch.linspace(-1, 1, logits.shape[1], dtype=x.dtype, device=x.device).expand_as(logits)
    return _close(network.backward(weights, hidden).view_as(x), pulled(expected, point, weights))


def pulled(logits: Tensor, point: Tensor, weights: Tensor) -> Tensor:
    """Return the gradient of a weighted sum of logits at a point; zeros where they do not depend on it."""
    with torch.enable_grad():  # of a sum: with weights, torch imports SymPy, which takes half a second
        total = (logits * weights).sum()
    return torch.autograd.grad(total, point, allow_unused=True, materialize_grads=True)[0]


def _close(value: Tensor, expected: Tensor) -> bool:
    return torch.allclose(value, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def is_hooked(model: nn.Module) -> bool:
    """Return whether a hook may change values or gradients in the model."""
    return any(
        m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks for m in model.modules()
    )


def dense_layers(graph: Graph, start: int) -> Dense | None:
    """Return the linear layers, ReLUs between them, behind the node `start` of a folded graph; None for others."""
    layers: list[Linear] = []
    ready = True  # for a linear layer
    for place, node in enumerate(graph.nodes[start + 1 :], start):
        if node.inputs != (place,):
            return None
        match node.op:
            case Flatten():
                continue
            case Linear() as op if ready and len(node.shape) == 1:
                layers.append(op)
            case ReLU() if not ready:
                pass
            case _:
                return None
        ready = not ready
    weights = tuple(op.weight.detach() for op in layers)
    biases = (
        w.new_zeros(len(w)) if op.bias is None else op.bias.detach() for op, w in zip(layers, weights, strict=True)
    )
    return None if ready else Dense(weights, tuple(biases))
