"""Read an ONNX graph as a graph of plain operations, or refuse it by node and operation.

All shapes in the file are computed again, without memory, before anything is run.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...errors import Unsupported, UserError, told
from .._ops import Affine, Constant, Flatten, Graph, Input, Node, Op, Reshape, evaluate, with_tensors
from .._passes import needed

_LARGEST = 2**28  # numbers in one tensor
VALUES = 2**26  # numbers in an operation's result for one image
TYPES = {1: torch.float32, 6: torch.int32, 7: torch.int64, 11: torch.float64}  # by ONNX's numbers

Value = int | Tensor  # a node of the graph, or a constant


class Reader:
    """Read the nodes of an ONNX model one after another, by rules that take this reader and the node's inputs."""

    def __init__(self, path: str, model: Any, rules: Mapping[str, Callable[..., Value]]) -> None:
        self.path, self.graph, self.rules = path, model.graph, rules
        self.nodes: list[Node] = []
        self.values: dict[str, Value] = {}
        self.name = ""  # of the current node

    def read(self) -> Graph:
        """Return the graph; raise Unsupported, naming node and operation, for operations without a rule."""
        for tensor in self.graph.initializer:
            self.values[tensor.name] = self.guarded(f"tensor '{tensor.name}'", partial(tensor_of, tensor))
        inputs = [one for one in self.graph.input if one.name not in self.values]
        if len(inputs) != 1 or len(self.graph.output) != 1:
            what = f"{len(inputs)} inputs and {len(self.graph.output)} outputs"
            raise Unsupported(f"{self.path} has {what}; a classifier has one of each")
        self.values[inputs[0].name] = self.entered(inputs[0])
        for node in self.graph.node:
            self.name = f"operation '{node.op_type}'" + (f" (node '{node.name}')" if node.name else "")
            result = self.guarded(self.name, partial(self.translate, node))
            self.values[node.output[0]] = result
        last = self.values.get(self.graph.output[0].name)
        if not isinstance(last, int) or last == 0:
            raise Unsupported(f"{self.path}: the output does not depend on the input")
        last = self.reshaped(last, (math.prod(self.nodes[last].shape),))
        return Graph(needed(self.nodes, last))

    def guarded(self, what: str, work: Callable[[], Any]) -> Any:
        """Do some work on the untrusted file; name the place where it fails."""
        try:
            return work()
        except UserError:
            raise
        except Exception as error:
            raise Unsupported(f"{self.path}: {what} cannot be read: {told(error)}") from error

    def entered(self, given: Any) -> int:
        """Append the input: with an image's shape, or flat."""
        kind = given.type.tensor_type
        sizes = [one.dim_value or -1 for one in kind.shape.dim]
        if kind.elem_type != 1 or len(sizes) < 2 or sizes[0] not in (-1, 1) or min(sizes[1:]) < 1:
            raise Unsupported(
                f"{self.path}: the input '{given.name}' is not a batch of float32 images: type {kind.elem_type}, shape "
                f"{['?' if size < 0 else size for size in sizes]}; the first axis counts images, the others are fixed"
            )
        if math.prod(sizes[1:]) > VALUES:
            raise Unsupported(f"{self.path}: an image of {math.prod(sizes[1:])} numbers is above the limit")
        self.nodes.append(Node(Input(), (), tuple(sizes[1:])))
        return 0

    def translate(self, node: Any) -> Value:
        """Return the value that a node computes."""
        if node.domain not in ("", "ai.onnx") or (rule := self.rules.get(node.op_type)) is None:
            domain = "" if node.domain in ("", "ai.onnx") else f" of '{node.domain}'"
            raise self.refuse(f"{domain.strip()} has no rule".strip())
        if any(node.output[1:]):
            raise self.refuse("has several outputs")
        given = {one.name: _attribute(one) for one in node.attribute}
        taken = inspect.signature(rule).parameters
        for name in given:
            if name not in taken or taken[name].kind != inspect.Parameter.KEYWORD_ONLY:
                raise self.refuse(f"has an attribute '{name}' without a rule")
        for name in node.input:
            if name and name not in self.values:
                raise self.refuse(f"reads '{name}', which nothing before it computes")
        result: Value = rule(self, *(self.values[name] if name else None for name in node.input), **given)
        return result

    def refuse(self, reason: str) -> Unsupported:
        """Return the error of a rule: the file, the node, and the reason."""
        return Unsupported(f"{self.path}: {self.name} {reason}")

    def shape(self, value: Value) -> tuple[int, ...]:
        """Return a value's shape for one image."""
        return tuple(value.shape) if isinstance(value, Tensor) else self.nodes[value].shape

    def constant(self, value: Value | None, what: str) -> Tensor:
        """Return a constant; raise Unsupported for a computed value."""
        if not isinstance(value, Tensor):
            raise self.refuse(f"has {what} that is computed from the image" if value is not None else f"has no {what}")
        return value

    def numbers(self, value: Any, what: str) -> list[int]:
        """Return integers from an attribute or a constant tensor."""
        found = self.constant(value, what).flatten().tolist() if isinstance(value, Value) else value
        return [int(number) for number in found]

    def index(self, value: Value) -> int:
        """Return the node of a value; create one for a constant."""
        return value if isinstance(value, int) else self.emit(Constant(value.float()))

    def emit(self, op: Op, *inputs: Value) -> int:
        """Append an operation, whose shape is computed without its values."""
        sources = tuple(self.index(value) for value in inputs)
        if isinstance(op, Constant):
            shape = tuple(op.value.shape)
        else:
            nothing = [torch.empty(1, *self.nodes[i].shape, device="meta") for i in sources]
            shape = tuple(evaluate(with_tensors(op, lambda value: value.to("meta")), *nothing).shape)
            if len(shape) < 2 or shape[0] != 1:
                raise self.refuse("mixes or moves the axis of the images; keep it first")
            shape = shape[1:]
        if not shape or not 0 < math.prod(shape) <= VALUES:
            raise self.refuse(f"gives a value of shape {shape} for each image, which is empty or above the limit")
        self.nodes.append(Node(op, sources, shape, self.name))
        return len(self.nodes) - 1

    def reshaped(self, source: int, shape: tuple[int, ...]) -> int:
        """Return the same numbers in another shape; several reshapes in a row are one."""
        while isinstance(self.nodes[source].op, Flatten | Reshape):
            (source,) = self.nodes[source].inputs
        if shape == self.nodes[source].shape:
            return source
        return self.emit(Flatten() if len(shape) == 1 else Reshape(shape), source)

    def resized(self, x: Value, target: Callable[[Tensor], Tensor]) -> Value:
        """Apply a torch function that does not move numbers."""
        if isinstance(x, Tensor):
            return target(x)
        after = target(torch.empty(1, *self.shape(x), device="meta")).shape
        if len(after) < 2 or after[0] != 1:
            raise self.refuse("mixes or moves the axis of the images; keep it first")
        return self.reshaped(x, tuple(after[1:]))

    def affine(self, x: int, scale: Tensor | float, shift: Tensor | float) -> int:
        """Return scale · x + shift, for each channel or, on the flat image, each number."""
        shape = self.shape(x)
        factors = [self.spread(torch.as_tensor(value, dtype=torch.float32), shape) for value in (scale, shift)]
        by_channel = [value.reshape(shape[0], -1) for value in factors]
        if all(bool((value == value[:, :1]).all()) for value in by_channel):
            return self.emit(Affine("", *(value[:, 0].contiguous() for value in by_channel)), x)
        flat = self.emit(Affine("", *(value.flatten() for value in factors)), self.reshaped(x, (math.prod(shape),)))
        return self.reshaped(flat, shape)

    def spread(self, value: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Return a constant with a number for each value of an image."""
        if value.dim() == len(shape) + 1 and len(value) == 1:
            value = value[0]
        if value.dim() > len(shape) or broadcast(value.shape, shape) != shape:
            raise self.refuse(f"combines a constant of shape {tuple(value.shape)} with a value of shape {shape}")
        return value.expand(shape)


def tensor_of(tensor: Any) -> Tensor:
    """Return a tensor stored in the file."""
    from onnx import numpy_helper

    if tensor.data_location == 1 or tensor.external_data:
        raise Unsupported(f"the tensor '{tensor.name}' is stored in another file; save the model with its data inside")
    if tensor.data_type not in TYPES:
        raise Unsupported(f"the tensor '{tensor.name}' is of type {tensor.data_type}; use float32 or integers")
    if math.prod(tensor.dims) > _LARGEST or min(tensor.dims, default=0) < 0:
        raise Unsupported(f"the tensor '{tensor.name}' has the shape {list(tensor.dims)}, which is out of range")
    value = torch.from_numpy(numpy_helper.to_array(tensor).copy())
    if not bool(value.isfinite().all()):
        raise Unsupported(f"the tensor '{tensor.name}' holds numbers that are not finite")
    return value


def _attribute(attribute: Any) -> Any:
    from onnx import helper

    value = helper.get_attribute_value(attribute)
    return value.decode() if isinstance(value, bytes) else value


def broadcast(*shapes: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of values that are computed together."""
    found: torch.Size = torch.broadcast_shapes(*shapes)  # type: ignore[no-untyped-call]
    return tuple(found)
