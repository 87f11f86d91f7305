"""A packed network as data: a few plain operations on NumPy arrays, in topological order.

An artefact contains this, and every runtime executes it. Only `Dense` operations need torch. Value 0 is the
image; step i makes value i + 1; the last value holds the logits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import UserError

Floats = NDArray[np.float32]
Integers = NDArray[np.int32]
Shape = tuple[int, ...]
Pair = tuple[int, int]

MOST_ELEMENTS = 1 << 27  # of one weight tensor, or of one value for one image: 512 MiB of float32


@dataclass(frozen=True, eq=False)
class Sparse:
    """A zero-padded convolution, or a linear layer over a flat input, or over the last axis (`rows`), by its nonzeros.

    `shape` is (out, in, kernel height, kernel width), with a 1 × 1 kernel for a linear layer. Row o of the compressed
    rows holds weights `values[indptr[o]:indptr[o + 1]]` at the columns `indices` (ascending) of weight[o].ravel().
    """

    shape: tuple[int, int, int, int]
    indptr: Integers
    indices: Integers
    values: Floats
    bias: Floats
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    rows: bool = False

    @property
    def nonzeros(self) -> int:
        """Return the number of kept weights."""
        return len(self.values)

    def dense(self) -> Floats:
        """Return the weights as one dense array (out, in, kernel height, kernel width)."""
        weight = np.zeros((self.shape[0], math.prod(self.shape[1:])), np.float32)
        weight[np.repeat(np.arange(self.shape[0]), np.diff(self.indptr)), self.indices] = self.values
        return weight.reshape(self.shape)

    @cached_property
    def groups(self) -> int:
        """Return the number of independent groups of channels of the layer."""
        out, channels, *kernel = self.shape
        rows = np.repeat(np.arange(out), np.diff(self.indptr))
        columns = self.indices // math.prod(kernel)
        most = math.gcd(out, channels)
        ways = (n for n in range(most, 1, -1) if most % n == 0)
        return next((n for n in ways if (rows // (out // n) == columns // (channels // n)).all()), 1)

    def grouped(self) -> Floats:
        """Return the weights as one dense array (out, in / groups, kernel height, kernel width)."""
        out, channels, *kernel = self.shape
        width = channels // self.groups * math.prod(kernel)
        rows = np.repeat(np.arange(out), np.diff(self.indptr))
        weight = np.zeros((out, width), np.float32)
        weight[rows, self.indices - rows // (out // self.groups) * width] = self.values
        return weight.reshape(out, channels // self.groups, *kernel)


def sparse_from_dense(
    weight: Floats,
    bias: Floats,
    *,
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    dilation: Pair = (1, 1),
    groups: int = 1,
    rows: bool = False,
) -> Sparse:
    """Return the layer with the nonzeros of a dense weight (out, in / groups, kernel height, kernel width)."""
    out, few, height, width = weight.shape
    places, indices = np.nonzero(weight.reshape(out, -1))
    indptr = np.zeros(out + 1, np.int32)
    np.cumsum(np.bincount(places, minlength=out), out=indptr[1:])
    values = weight.reshape(out, -1)[places, indices].astype(np.float32)
    indices = indices + places // (out // groups) * (few * height * width)  # groups are just zeros
    shape, biases = (out, few * groups, height, width), bias.astype(np.float32)
    return Sparse(shape, indptr, indices.astype(np.int32), values, biases, stride, padding, dilation, rows)


@dataclass(frozen=True, eq=False)
class Scale:
    """y = scale · x + shift per channel."""

    scale: Floats
    shift: Floats


@dataclass(frozen=True)
class ReLU:
    """y = max(x, 0)."""


@dataclass(frozen=True)
class Pool:
    """The maximum over windows (padding counts as minus infinity) or, with `mean`, their mean (no padding)."""

    mean: bool
    kernel: Pair
    stride: Pair
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    ceil_mode: bool = False


@dataclass(frozen=True)
class Flatten:
    """(channels, height, width) to (features,)."""


@dataclass(frozen=True)
class Add:
    """The sum of two values of one shape."""


@dataclass(frozen=True)
class PackedActivation:
    """An activation-sparsity module by its kind and its one number; flat is a value's features of one image.

    "shifted-relu": max(x − number, 0). "threshold": x where x > number, else 0. "top-k": max(x, 0) for the largest
    of the flat features, the first of equal ones; the fraction `number` becomes zero.
    """

    kind: str
    number: float

    def kept(self, features: int) -> int:
        """Return how many features top-k keeps."""
        return max(1, features - round(self.number * features))


ACTIVATION_KINDS = ("shifted-relu", "threshold", "top-k")


@dataclass(frozen=True, eq=False)
class Snap:
    """max(x, 0), where a channel's centre replaces every x within its radius (MeanSparse); a radius may be < 0."""

    centre: Floats
    radius: Floats


@dataclass(frozen=True, eq=False)
class Constant:
    """The same values for every image; its one input gives the number of images."""

    value: Floats


@dataclass(frozen=True, eq=False)
class Dense:
    """An operation without a sparse kernel, by torch's own name, such as "softmax.int"; see `_dense`.

    `names` are those of its inputs (none: it takes one list of them) and `options` all other arguments: numbers,
    strings, torch's types and tensors, and lists of these. Of several results, it returns the one at `place`.
    """

    name: str
    names: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    place: int | None = None


Op = Sparse | Scale | ReLU | Pool | Flatten | Add | PackedActivation | Snap | Constant | Dense


@dataclass(frozen=True)
class Step:
    """One operation and the values that feed it."""

    op: Op
    inputs: tuple[int, ...]


@dataclass(frozen=True)
class Rounding:
    """A value as bytes: scale · (byte − zero) stands for what is nearest to it."""

    scale: float
    zero: int


@dataclass(frozen=True, eq=False)
class Program:
    """A network for images of `shape` (channels, height, width), float32 in [0, 1]; see the module's docstring.

    `rounding` says which values are rounded to bytes, and how; layers that read them compute in integers.
    """

    shape: Shape
    steps: tuple[Step, ...]
    class_names: tuple[str, ...] | None = None
    provenance: dict[str, Any] = field(default_factory=dict)
    rounding: Mapping[int, Rounding] = field(default_factory=dict)

    @cached_property
    def shapes(self) -> list[Shape]:
        """Return the shape, for one image, of every value."""
        return infer_shapes(self.shape, self.steps)

    @property
    def whole(self) -> bool:
        """Return whether every step has a sparse kernel."""
        return not any(isinstance(step.op, Dense | Constant) or rows_of(step.op) for step in self.steps)

    @property
    def classes(self) -> int:
        """Return the number of logits."""
        return self.shapes[-1][0]

    @property
    def nonzeros(self) -> int:
        """Return the number of nonzero weights, without biases."""
        return sum(step.op.nonzeros for step in self.steps if isinstance(step.op, Sparse))


def products(program: Program) -> tuple[int, int]:
    """Return the multiplications of one image that sparse kernels can run: (with nonzero weights, with all weights)."""
    shapes = program.shapes
    layers = [(step.op, shapes[number + 1]) for number, step in enumerate(program.steps)]
    kept = [(op, math.prod(shape) // op.shape[0]) for op, shape in layers if isinstance(op, Sparse)]
    return sum(op.nonzeros * n for op, n in kept), sum(math.prod(op.shape) // op.groups * n for op, n in kept)


def multiplications(program: Program) -> int:
    """Return the number of products of a nonzero weight and an input for one image."""
    return products(program)[0]


def rows_of(op: Op) -> bool:
    """Return whether an operation is a linear layer over the last axis."""
    return isinstance(op, Sparse) and op.rows


def infer_shapes(shape: Shape, steps: Sequence[Step]) -> list[Shape]:
    """Return the shape, for one image, of every value; raise UserError if the steps do not fit together."""
    shapes = [shape]
    for number, step in enumerate(steps):
        if any(not 0 <= i <= number for i in step.inputs):
            raise UserError(f"step {number} reads a value that is not computed before it")
        try:
            result = infer_shape(step.op, [shapes[i] for i in step.inputs])
        except Misfit as error:
            raise UserError(f"step {number} ({type(step.op).__name__}): {error}") from error
        if min(result) < 1 or math.prod(result) > MOST_ELEMENTS:
            raise UserError(f"step {number} makes a value of shape {result}, which is empty or too large")
        shapes.append(result)
    if len(shapes[-1]) != 1:
        raise UserError(f"the network ends in a value of shape {shapes[-1]}, not in logits")
    return shapes


class Misfit(Exception):
    """The reason why an operation does not fit its inputs."""


def infer_shape(op: Op, inputs: Sequence[Shape]) -> Shape:
    """Return the shape of an operation's result for one image."""
    if isinstance(op, Dense):
        from ._dense import dense_shape

        return dense_shape(op, inputs)
    if len(inputs) != (2 if isinstance(op, Add) else 1):
        raise Misfit(f"it has {len(inputs)} inputs")
    shape = inputs[0]
    match op:
        case Constant():
            return op.value.shape
        case Sparse():
            return _sparse_shape(op, shape)
        case Scale() if op.scale.shape != (shape[0],) or op.shift.shape != (shape[0],):
            raise Misfit(f"{op.scale.size} scales and {op.shift.size} shifts for {shape[0]} channels")
        case Snap() if op.centre.shape != (shape[0],) or op.radius.shape != (shape[0],):
            raise Misfit(f"{op.centre.size} centres and {op.radius.size} radii for {shape[0]} channels")
        case Pool():
            if len(shape) != 3:
                raise Misfit(f"pooling of a value of shape {shape}")
            return shape[0], *(_pooled(op, shape[axis + 1], axis) for axis in (0, 1))
        case Flatten():
            return (math.prod(shape),)
        case Add() if inputs[1] != shape:
            raise Misfit(f"a sum of shapes {shape} and {inputs[1]}")
    return shape


def _sparse_shape(op: Sparse, shape: Shape) -> Shape:
    out, channels, *kernel = op.shape
    if op.rows:
        if channels != shape[-1] or op.shape[2:] != (1, 1) or op.padding != (0, 0):
            raise Misfit(f"{channels} inputs for the last axis of a value of shape {shape}")
        return *shape[:-1], out
    if channels != shape[0] or len(shape) not in (1, 3):
        raise Misfit(f"{channels} input channels for a value of shape {shape}")
    if len(shape) == 1:
        if op.shape[2:] != (1, 1) or op.padding != (0, 0):
            raise Misfit("a linear layer with a kernel or padding")
        return (out,)
    sides = (
        (shape[i + 1] + 2 * op.padding[i] - op.dilation[i] * (kernel[i] - 1) - 1) // op.stride[i] + 1 for i in (0, 1)
    )
    return out, *sides


def _pooled(op: Pool, side: int, axis: int) -> int:
    kernel, stride, padding = op.kernel[axis], op.stride[axis], op.padding[axis]
    if 2 * padding > kernel:
        raise Misfit("padding of more than half the window")
    span = side + 2 * padding - op.dilation[axis] * (kernel - 1) - 1
    result = (span + (stride - 1 if op.ceil_mode else 0)) // stride + 1
    # torch: the last window must start inside the image or its left padding.
    return result - 1 if op.ceil_mode and (result - 1) * stride >= side + padding else result
