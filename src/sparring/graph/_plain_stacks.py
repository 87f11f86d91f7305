"""Fast lowering of plain stacks of torch's own layers, without torch.export.

Only exact types are read, without hooks, replaced forward methods or parametrisations, and only if nothing that is
written in place is read twice. Module classes of this package describe their computation in a method `steps`; see
`Stepwise`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from ..declared import Declared
from ._ops import (
    Affine,
    AvgPool,
    Constant,
    Conv2d,
    Flatten,
    Graph,
    Input,
    Linear,
    MaxPool,
    Node,
    Op,
    ReLU,
    SparseActivation,
    evaluate,
)

Step = tuple["nn.Module | Op", tuple[int, ...]]
_IDENTITIES = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)
_FORWARD_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_GLOBAL_HOOKS = (
    "_global_forward_hooks",
    "_global_forward_pre_hooks",
    "_global_backward_hooks",
    "_global_backward_pre_hooks",
)


@runtime_checkable
class Stepwise(Protocol):
    """A module that declares its computation: each step applies a module or an operation to earlier values.

    Value 0 is the module's input, value k is the result of step k, and the last value is the module's output. Constants
    are computed in `dtype`. Like every graph, this one is compared with forward().
    """

    def steps(self, dtype: torch.dtype) -> Sequence[Step]: ...


class _Other(Exception):
    """The model is not a plain stack."""


def read_plain(
    model: nn.Module, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, *, shared: bool
) -> Graph | None:
    """Return a plain stack as a graph with tensors of `dtype`, or None for any other model; see `lower`."""
    if any(getattr(torch_module, name, None) for name in _GLOBAL_HOOKS):
        return None
    reader = _Reader(model, dtype, device, shape, shared)
    try:
        with torch.no_grad():
            last = reader.module(model, 0)
    except (_Other, RuntimeError, IndexError):  # the general path has a better message for what torch cannot compute
        return None
    nodes = reader.nodes
    read = [i for node in nodes for i in node.inputs]
    if last != len(nodes) - 1 or (reader.writes and len(read) != len(set(read))):
        return None
    return Graph(tuple(nodes))


class _Reader:
    def __init__(
        self, model: nn.Module, dtype: torch.dtype, device: torch.device, shape: tuple[int, ...], shared: bool
    ) -> None:
        self.dtype, self.device, self.shared = dtype, device, shared
        self.nodes = [Node(Input(), (), shape)]
        self.paths = {id(module): path for path, module in model.named_modules()}
        self.writes = False

    def module(self, module: nn.Module, source: int) -> int:
        """Append a module's computation on a node's output, and return the index of its own output."""
        path = self.paths[id(module)]
        if any(getattr(module, name) for name in _FORWARD_HOOKS) or "forward" in vars(module):
            raise _Other
        if isinstance(module, Declared):
            return self.append(SparseActivation(path, module), (source,), path, self.nodes[source].shape)
        if type(module) is nn.Sequential:
            for child in module:
                source = self.module(child, source)
            return source
        if "steps" in vars(type(module)) and isinstance(module, Stepwise):
            return self.stepwise(path, module, source)
        if type(module) in _IDENTITIES:
            return source
        if type(module) is nn.Flatten and len(self.nodes[source].shape) == 1:
            return source
        self.writes |= bool(getattr(module, "inplace", False))
        return self.append(self.operation(path, module, self.nodes[source].shape), (source,), path)

    def stepwise(self, path: str, module: Any, source: int) -> int:
        values = [source]
        for part, inputs in module.steps(self.dtype):
            sources = tuple(values[i] for i in inputs)
            if isinstance(part, nn.Module):
                values.append(self.module(part, sources[0]))
            else:
                values.append(self.append(part, sources, path))
        return values[-1]

    def append(self, op: Op, inputs: tuple[int, ...], path: str, shape: tuple[int, ...] | None = None) -> int:
        if shape is None and isinstance(op, Constant):
            shape = tuple(op.value.shape)
        if shape is None:
            some = [torch.zeros(2, *self.nodes[i].shape, dtype=self.dtype, device=self.device) for i in inputs]
            shape = tuple(evaluate(op, *some).shape[1:])
        self.nodes.append(Node(op, inputs, shape, path))
        return len(self.nodes) - 1

    def tensor(self, value: Tensor) -> Tensor:
        return value if self.shared and value.dtype == self.dtype else value.detach().to(self.dtype)

    def operation(self, path: str, module: nn.Module, shape: tuple[int, ...]) -> Op:
        kind: Any = type(module)
        some: Any = module
        if kind is nn.ReLU:
            return ReLU()
        if kind is nn.Flatten and (some.start_dim, some.end_dim) == (1, -1):
            return Flatten()
        if kind is nn.Linear:
            return Linear(path, self.tensor(some.weight), None if some.bias is None else self.tensor(some.bias))
        if kind is nn.Conv2d and some.padding_mode == "zeros" and not isinstance(some.padding, str):
            bias = None if some.bias is None else self.tensor(some.bias)
            stride, padding, dilation = pair(some.stride), pair(some.padding), pair(some.dilation)
            return Conv2d(path, self.tensor(some.weight), bias, stride, padding, dilation, some.groups)
        if kind in (nn.BatchNorm1d, nn.BatchNorm2d) and some.running_mean is not None:
            given = (some.running_mean, some.running_var, some.weight, some.bias)
            return batch_norm(path, *(None if v is None else self.tensor(v) for v in given), eps=some.eps)
        if kind is nn.MaxPool2d and not some.return_indices:
            kernel, padding, dilation = pair(some.kernel_size), pair(some.padding), pair(some.dilation)
            return MaxPool(kernel, pair(some.stride), padding, dilation, some.ceil_mode)
        if kind is nn.AvgPool2d and pair(some.padding) == (0, 0) and not some.ceil_mode and not some.divisor_override:
            return AvgPool(pair(some.kernel_size), pair(some.stride))
        if kind is nn.AdaptiveAvgPool2d and len(shape) == 3:
            after = tuple(s if o is None else o for s, o in zip(shape[1:], pair(some.output_size), strict=True))
            kernel = (shape[1] // after[0], shape[2] // after[1])
            if all(s == k * o for s, k, o in zip(shape[1:], kernel, after, strict=True)):
                return AvgPool(kernel, kernel)
        raise _Other


def pair(value: Any) -> tuple[Any, Any]:
    """Return one number for both axes, or the given two."""
    return (value, value) if isinstance(value, int) or value is None else (value[0], value[-1])


def batch_norm(
    name: str, mean: Tensor | None, var: Tensor | None, weight: Tensor | None, bias: Tensor | None, *, eps: float
) -> Affine:
    """Return batch normalisation with running statistics as an Affine."""
    assert mean is not None and var is not None
    scale = (var + eps).rsqrt()
    scale = scale if weight is None else scale * weight
    shift = -mean * scale
    return Affine(name, scale.detach(), (shift if bias is None else shift + bias).detach())
