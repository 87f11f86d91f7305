"""Operations of a lowered network, and how each is evaluated."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from ..declared import Declared
from ..errors import Unsupported

# Each value by itself, of one input or of several that broadcast.
ELEMENTWISE = frozenset(
    """abs acos asin asinh atan celu clamp clamp_max clamp_min cos cosh elu erf exp expm1 gelu hardshrink hardsigmoid
    hardswish hardtanh leaky_relu rrelu log log10 log1p log2 log_sigmoid logit mish pow prelu _prelu_kernel
    reciprocal relu6 rsqrt selu sigmoid silu sin sinh softplus softshrink sqrt square tan tanh threshold xlogy atan2
    hypot maximum minimum fmax fmin lerp addcmul addcdiv where masked_fill logaddexp gt lt ge le eq ne logical_and
    logical_or logical_not bitwise_and bitwise_or bitwise_not isnan isinf nan_to_num copysign""".split()  # noqa: SIM905
)


@dataclass(frozen=True, eq=False)
class Input:
    """The image, in [0, 1]."""


@dataclass(frozen=True, eq=False)
class Linear:
    """y = x Wᵀ + b, over the last axis.

    `name` is the path behind which the parameters stand (name + ".weight" and ".bias"), or "" where the weights are
    computed, as under weight normalisation.
    """

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
class SparseActivation:
    """An activation-sparsity module, kept as it is; `name` is its path."""

    name: str
    module: Declared


@dataclass(frozen=True, eq=False)
class Reshape:
    """(N, ...) to (N, *shape), each image's values in the order in which they were."""

    shape: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Constant:
    """The same values for every image: a tensor of one image's shape."""

    value: Tensor


@dataclass(frozen=True, eq=False)
class Call:
    """Any other operation that torch computes image by image; `name` is torch's own, such as "sigmoid".

    `function` is called with the inputs under `names` (or with one list of them all, if there are none) and `options`.
    """

    name: str
    function: Callable[..., Tensor]
    names: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)


Op = (
    Input
    | Linear
    | Conv2d
    | Affine
    | ReLU
    | MaxPool
    | AvgPool
    | Flatten
    | Add
    | SparseActivation
    | Reshape
    | Constant
    | Call
)


@dataclass(frozen=True, eq=False)
class Node:
    """One operation: the indices of the nodes that feed it, and the shape of its output for one image.

    path: the module that computes it; line: where the user's code asks for it, "file:line: code"; "" if unknown.
    """

    op: Op
    inputs: tuple[int, ...]
    shape: tuple[int, ...]
    path: str = ""
    line: str = ""

    @property
    def title(self) -> str:
        """Name the operation, its layer and its line, as a refusal does."""
        name = self.op.name if isinstance(self.op, Call) else type(self.op).__name__
        if isinstance(self.op, Constant):
            name = f"arithmetic with a constant of shape {self.shape}"
        return title(name, self.path, self.line)


def title(name: str, path: str, line: str) -> str:
    """Name an operation, its layer and its line."""
    parts = [part for part in (f"layer '{path}'" if path else "", line) if part]
    return f"operation '{name}'" + (f" ({', '.join(parts)})" if parts else "")


def refusal(node: Node, reason: str) -> Unsupported:
    """Return the error of someone who has no rule for a node: operation, layer, line, and the reason."""
    return Unsupported(f"{node.title} {reason}")


@dataclass(frozen=True, eq=False)
class Graph:
    """A network as nodes in topological order; the first is the input, the last holds the logits.

    rounding: how far the model's own logits were seen apart from these, where that is more than float32 commonly is.
    """

    nodes: tuple[Node, ...]
    rounding: float = 0.0

    def __call__(self, x: Tensor) -> Tensor:
        """Evaluate the graph on a batch (N, ...): a reference to test other evaluations against."""
        return self.values(x)[-1]

    def values(self, x: Tensor) -> list[Tensor]:
        """Return every node's output on a batch (N, ...)."""
        values: list[Tensor] = []
        for node in self.nodes:
            match node.op:
                case Input():
                    values.append(x)
                case Constant(value=value):
                    values.append(value.expand(len(x), *value.shape))
                case _:
                    values.append(evaluate(node.op, *(values[i] for i in node.inputs)))
        return values


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
        case SparseActivation():
            result: Tensor = op.module.forward(x)  # without its hooks, which are operations of their own
            return result
        case Reshape():
            return x.reshape(len(x), *op.shape)
        case Call():
            if not op.names:
                return op.function(list(inputs), **op.options)
            return op.function(**dict(zip(op.names, inputs, strict=True)), **op.options)
    raise Unsupported(f"an operation of type {type(op).__name__} cannot be evaluated")


def _per_channel(value: Tensor, x: Tensor) -> Tensor:
    return value.view(1, -1, *[1] * (x.dim() - 2))
