"""Operations of a lowered network, and how each is evaluated."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..declared import Declared
from ..errors import Unsupported

# Elementwise, of one input or of several that broadcast.
ELEMENTWISE = frozenset(
    """abs acos asin asinh atan celu clamp clamp_max clamp_min cos cosh elu erf exp expm1 gelu hardshrink hardsigmoid
    hardswish hardtanh leaky_relu rrelu log log10 log1p log2 log_sigmoid logit mish pow prelu _prelu_kernel
    reciprocal relu6 rsqrt selu sigmoid silu sin sinh softplus softshrink sqrt square tan tanh threshold xlogy atan2
    hypot maximum minimum fmax fmin lerp addcmul addcdiv where masked_fill logaddexp gt lt ge le eq ne logical_and
    logical_or logical_not bitwise_and bitwise_or bitwise_not isnan isinf nan_to_num copysign""".split()  # noqa: SIM905
)
# Along axes given by dim or dims, which must not be the images' axis.
ALONG = frozenset(
    """softmax log_softmax _softmax _log_softmax logsumexp mean sum amax amin prod cumsum cumprod var std norm
    linalg_vector_norm glu permute transpose select slice narrow flip index_select movedim select_scatter slice_scatter
    sort topk max min median kthvalue any all cat stack roll unfold""".split()  # noqa: SIM905
)
# What fills a map of another size with copies of values, or means of those around.
RESAMPLED = frozenset(
    """reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d replication_pad2d replication_pad3d
    upsample_nearest1d upsample_nearest2d upsample_nearest3d _upsample_nearest_exact1d _upsample_nearest_exact2d
    _upsample_nearest_exact3d upsample_linear1d upsample_bilinear2d upsample_trilinear3d
    _upsample_bilinear2d_aa""".split()  # noqa: SIM905
)
# On the neighbourhood of a value in its own image.
WITHIN = RESAMPLED | frozenset(
    """conv1d conv3d conv_transpose1d conv_transpose2d conv_transpose3d layer_norm native_layer_norm group_norm
    instance_norm rms_norm max_pool1d max_pool3d avg_pool1d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool3d
    adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d pad constant_pad_nd pixel_shuffle pixel_unshuffle
    channel_shuffle upsample_bicubic2d _upsample_bicubic2d_aa im2col col2im grid_sampler grid_sampler_2d grid_sampler_3d
    scaled_dot_product_attention""".split()  # noqa: SIM905
)
# All operations that a Call may contain, by torch's name, besides recurrent layers.
CALLS = (
    ELEMENTWISE
    | ALONG
    | WITHIN
    | set(
        "add mul div matmul reshape expand repeat _to_copy avg_pool2d _adaptive_avg_pool2d adaptive_avg_pool2d".split()  # noqa: SIM905
    )
)


def _recur(kind: str, x: Tensor, *, hx: list[Tensor], params: list[Tensor], place: int, **options: Any) -> Tensor:
    """Run a recurrent layer of torch over (N, steps, width): the output of each step, or (N, layers, width) states."""
    begin = [state.expand(-1, len(x), -1).contiguous() for state in hx]
    run: Any = getattr(torch.ops.aten, kind).input
    results = run(x, begin if kind == "lstm" else begin[0], params, batch_first=True, **options)
    result: Tensor = results[place] if place == 0 else results[place].transpose(0, 1)
    return result


RECURRENT = {kind: partial(_recur, kind) for kind in ("lstm", "gru", "rnn_tanh", "rnn_relu")}


@dataclass(frozen=True, eq=False)
class Input:
    """The image, in [0, 1]."""


@dataclass(frozen=True, eq=False)
class Linear:
    """Compute y = x Wᵀ + b over the last axis.

    `name` is the path of the parameters (name + ".weight" and ".bias"), or "" if the weights are computed, for example
    by weight normalisation.
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
    """Compute y = scale · x + shift per channel (axis 1): normalisation, batch norm in eval mode, constants.

    `name` is the path of the batch norm, or "" if the values are not parameters of a module.
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
    """Reshape (N, ...) to (N, features)."""


@dataclass(frozen=True, eq=False)
class Add:
    """The sum of two inputs of one shape (a residual connection)."""


@dataclass(frozen=True, eq=False)
class SparseActivation:
    """An activation sparsity module, kept whole; `name` is its path."""

    name: str
    module: Declared


@dataclass(frozen=True, eq=False)
class Reshape:
    """Reshape (N, ...) to (N, *shape), keeping the order of each image's values."""

    shape: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Constant:
    """The same values for every image: a tensor of the shape of one image."""

    value: Tensor


@dataclass(frozen=True, eq=False)
class Call:
    """Any other operation that torch computes image by image; `name` is torch's own name, such as "sigmoid".

    `function` is called with `options` and with the inputs under `names`, or with one list of all inputs if `names` is
    empty. If it returns several results, `place` selects one.
    """

    name: str
    function: Callable[..., Any]
    names: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    place: int | None = None


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
    """One operation: the indices of its input nodes, and the shape of its output for one image.

    path: the module that computes it. line: where the user's code calls it, as "file:line: code", or "" if unknown.
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
    """Return the error for a node without a rule: its operation, layer and line, and the reason."""
    return Unsupported(f"{node.title} {reason}")


@dataclass(frozen=True, eq=False)
class Graph:
    """A network as nodes in topological order; the first is the input, and the last holds the logits.

    rounding: the largest difference seen between the model's own logits and these, if it exceeds float32's usual error.
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
            result: Tensor = op.module.forward(x)  # without its hooks, which are separate operations
            return result
        case Reshape():
            return x.reshape(len(x), *op.shape)
        case Call():
            return called(op, *inputs)
    raise Unsupported(f"an operation of type {type(op).__name__} cannot be evaluated")


def with_tensors(op: Op, change: Callable[[Tensor], Tensor]) -> Op:
    """Return an operation with changed tensors, for example in another precision."""
    changed: Any = {f.name: change(v) for f in fields(op) if isinstance(v := getattr(op, f.name), Tensor)}
    return replace(op, **changed)


def called(op: Call, *inputs: Tensor) -> Tensor:
    """Evaluate a Call on batches."""
    named = dict(zip(op.names, inputs, strict=True)) if op.names else {}
    result = op.function(**named, **op.options) if named else op.function(list(inputs), **op.options)
    value: Tensor = result if op.place is None else result[op.place]
    return value


def _per_channel(value: Tensor, x: Tensor) -> Tensor:
    return value.view(1, -1, *[1] * (x.dim() - 2))


def flat(given: Any) -> list[Any]:
    """Return the items of nested lists, tuples and dictionaries in one list."""
    if isinstance(given, dict | list | tuple):
        return [v for value in (given.values() if isinstance(given, dict) else given) for v in flat(value)]
    return [given]
