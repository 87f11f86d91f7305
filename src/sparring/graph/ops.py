"""Operations of a lowered network, and how each is evaluated."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import Unsupported

__all__ = [
    "Activation",
    "Add",
    "Affine",
    "AvgPool",
    "Conv2d",
    "Flatten",
    "Graph",
    "Input",
    "Linear",
    "MaxPool",
    "Node",
    "Op",
    "ReLU",
    "evaluate",
]


@dataclass(frozen=True, eq=False)
class Input:
    """The image, in [0, 1]."""


@dataclass(frozen=True, eq=False)
class Linear:
    """y = x Wᵀ + b, over the last axis; `name` is the module's path (parameters name + ".weight" and ".bias")."""

    name: str
    weight: Tensor
    bias: Tensor | None


@dataclass(frozen=True, eq=False)
class Conv2d:
    """A zero-padded two-dimensional convolution; pairs are (vertical, horizontal)."""

    name: str
    weight: Tensor
    bias: Tensor | None
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int


@dataclass(frozen=True, eq=False)
class Affine:
    """y = scale · x + shift per channel (axis 1): normalisation, batch norm in eval mode, constants.

    `name` is the batch norm's path, or "" where no parameters stand behind it.
    """

    name: str
    scale: Tensor
    shift: Tensor


@dataclass(frozen=True, eq=False)
class ReLU:
    """y = max(x, 0)."""


@dataclass(frozen=True, eq=False)
class MaxPool:
    """Maximum over windows; padding counts as minus infinity."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    ceil_mode: bool


@dataclass(frozen=True, eq=False)
class AvgPool:
    """Mean over windows without padding."""

    kernel: tuple[int, int]
    stride: tuple[int, int]


@dataclass(frozen=True, eq=False)
class Flatten:
    """(N, ...) to (N, features)."""


@dataclass(frozen=True, eq=False)
class Add:
    """The sum of two inputs of one shape (a residual connection)."""


@dataclass(frozen=True, eq=False)
class Activation:
    """An activation-sparsity module, kept as it is; `name` is its path."""

    name: str
    module: nn.Module


Op = Input | Linear | Conv2d | Affine | ReLU | MaxPool | AvgPool | Flatten | Add | Activation


@dataclass(frozen=True, eq=False)
class Node:
    """One operation: the indices of the nodes that feed it, and the shape of its output for one image."""

    op: Op
    inputs: tuple[int, ...]
    shape: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Graph:
    """A network as nodes in topological order; the first is the input, the last holds the logits."""

    nodes: tuple[Node, ...]

    def __call__(self, x: Tensor) -> Tensor:
        """Evaluate the graph on a batch (N, ...): a reference to test other evaluations against."""
        values: list[Tensor] = []
        for node in self.nodes:
            arguments = [values[i] for i in node.inputs]
            values.append(x if isinstance(node.op, Input) else evaluate(node.op, *arguments))
        return values[-1]


def evaluate(op: Op, *inputs: Tensor) -> Tensor:
    """Evaluate one operation on batches."""
    x = inputs[0]
    match op:
        case Linear():
            return F.linear(x, op.weight, op.bias)
        case Conv2d():
            return F.conv2d(x, op.weight, op.bias, op.stride, op.padding, op.dilation, op.groups)
        case Affine():
            return x * _per_channel(op.scale, x) + _per_channel(op.shift, x)
        case ReLU():
            return x.clamp_min(0)
        case MaxPool():
            return F.max_pool2d(x, op.kernel, op.stride, op.padding, op.dilation, op.ceil_mode)
        case AvgPool():
            return F.avg_pool2d(x, op.kernel, op.stride)
        case Flatten():
            return x.flatten(1)
        case Add():
            return x + inputs[1]
        case Activation():
            result: Tensor = op.module(x)
            return result
    raise Unsupported(f"an operation of type {type(op).__name__} cannot be evaluated")


def _per_channel(value: Tensor, x: Tensor) -> Tensor:
    return value.view(1, -1, *[1] * (x.dim() - 2))
