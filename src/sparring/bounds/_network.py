"""A lowered network in float64, and the adjoints of its linear operations."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from scipy.sparse import csr_array
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn import grad

from ..errors import Unsupported
from ..graph import (
    RESAMPLED,
    Affine,
    AvgPool,
    Call,
    Constant,
    Conv2d,
    Flatten,
    Graph,
    Input,
    Linear,
    Node,
    Op,
    Reshape,
    SparseActivation,
    drop_dead_units,
    evaluate,
    fold_affine,
    lower,
    refusal,
    spelled_out,
)
from ._curves import Curve, bend_of

LinearOp = Linear | Conv2d | Affine | AvgPool | Flatten | Reshape
_SPARSE = 0.2  # density up to which products that skip zeros are faster than dense ones, 3 times at 0.1
_ALIVE = 0.9  # share of units with coefficients up to which dense products are faster without the others


@dataclass(frozen=True, eq=False)
class SparseLinear(Linear):
    """A Linear with few nonzero weights, whose adjoint multiplies only those."""

    @cached_property
    def transposed(self) -> csr_array:
        """Return the weight (out, in) as a compressed matrix (in, out)."""
        return csr_array(self.weight.numpy().T)


@dataclass(frozen=True, eq=False)
class Product(Call):
    """The product of two values that broadcast, such as a map and a gate for each channel."""


@dataclass(frozen=True, eq=False)
class Moved(Call):
    """A linear operation that torch computes, of one value or several; its weights, if any, are among its options."""


_QUOTIENT = "divides by a value that depends on the image, so no useful linear bound exists; attacks do not need one"
_REASONS = dict.fromkeys(
    """softmax _softmax log_softmax layer_norm native_layer_norm group_norm instance_norm rms_norm div
    scaled_dot_product_attention""".split(),  # noqa: SIM905
    _QUOTIENT,
)
# Linear with coefficients that are not negative, or with the option "weight".
_MOVED = RESAMPLED | frozenset(
    """add permute transpose movedim narrow slice select index_select slice_scatter select_scatter cat stack expand
    repeat mean sum roll flip unfold pad constant_pad_nd pixel_shuffle pixel_unshuffle channel_shuffle avg_pool1d
    avg_pool2d adaptive_avg_pool1d adaptive_avg_pool2d im2col col2im conv1d conv_transpose1d conv_transpose2d""".split()  # noqa: SIM905
)


def prepare(
    model: nn.Module,
    shape: tuple[int, ...],
    *,
    images: Tensor | None = None,
    sparse: bool = True,
    certified: bool = False,
) -> Graph:
    """Lower a model for images of `shape` in float64, in which every bound is computed, compared on `images` too.

    Layers with few nonzero weights become SparseLinear, unless `sparse` is False. `certified` lets those operations
    pass, too, for which certificates alone have a rule. Raise Unsupported, naming the layer and the line, for others.
    """
    seen = images if images is not None and len(images) else None
    graph = spelled_out(lower(model, shape, images=seen, dtype=torch.float64), torch.float64)
    return replace(graph, nodes=tuple(replace(node, op=_bounded(node, sparse, certified)) for node in graph.nodes))


def _bounded(node: Node, sparse: bool, certified: bool) -> Op:
    match node.op:
        case SparseActivation(name=name, module=module):
            return SparseActivation(name, copy.deepcopy(module).double())
        case Linear() as op if sparse:
            return as_sparse(op)
        case Call(name=name, function=function, names=names, options=options):
            known = Curve if bend_of(node.op) else Product if name == "mul" else Moved if name in _MOVED else None
            if known is None or not math.prod(node.shape):
                raise refusal(node, _REASONS.get(name, "has no rule for bounds; attacks do not need one"))
            if not certified:
                why = "is not piecewise linear" if known is Curve else "has no rule here"
                raise refusal(node, f"{why}; certificates support it")
            return known(name, function, names, _in_double(options))
        case Reshape() | Constant() if not certified:
            raise refusal(node, "has no rule here; certificates support it")
    return node.op


def _in_double(options: Mapping[str, Any]) -> dict[str, Any]:
    return {key: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for key, v in options.items()}


def as_sparse(op: Linear) -> Linear:
    """Return a layer as a SparseLinear if that is faster."""
    few = op.weight.device.type == "cpu" and int(op.weight.count_nonzero()) <= _SPARSE * op.weight.numel()
    return SparseLinear(op.name, op.weight, op.bias) if few else op


def compacted(graph: Graph, x: Tensor) -> tuple[Graph, Tensor]:
    """Return an equal network of fewer units on fewer pixels, and the images' pixels that it reads: (N, pixels).

    Both are returned as they are unless the network begins with a Linear (after normalisation and Flatten, which are
    multiplied into it): there a pixel may have no effect. Balls around the remaining pixels give the same logits
    as balls around all.
    """
    nodes = drop_dead_units(fold_affine(graph)).nodes
    start = 1 + isinstance(nodes[1].op, Flatten)
    first, alone = nodes[start].op, all(sum(i in node.inputs for node in nodes) == 1 for i in range(start))
    if not (isinstance(first, Linear) and alone and len(nodes[start].shape) == 1):
        return graph, x
    used = (first.weight != 0).any(0)
    used[0] |= not bool(used.any())  # one pixel at least
    made = [Node(Input(), (), (int(used.sum()),))]
    for node in (replace(nodes[start], op=Linear(first.name, first.weight[:, used], first.bias)), *nodes[start + 1 :]):
        op = as_sparse(node.op) if isinstance(node.op, Linear) else node.op
        made.append(replace(node, op=op, inputs=tuple(i - start + 1 for i in node.inputs)))
    return replace(graph, nodes=tuple(made)), x.flatten(1)[:, used]


def adjoint(op: LinearOp, a: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Pull coefficients on an operation's output (M, *out) back to its input (M, *shape): aᵀ(Wx) = (Wᵀa)ᵀx."""
    match op:
        case SparseLinear():
            product: Tensor = _SparseProduct.apply(a, op.transposed)  # type: ignore[no-untyped-call]
            return product
        case Linear():
            return _times(a, op.weight)
        case Conv2d():
            return _transposed(op, a, shape)
        case Affine():
            return a * op.scale.view(1, -1, *[1] * (a.dim() - 2))
        case AvgPool():
            return _spread_out(op, a, shape)
        case Flatten() | Reshape():
            return a.reshape(len(a), *shape)
    raise Unsupported(f"an operation of type {type(op).__name__} is not linear")


def moved_back(op: Moved, a: Tensor, shapes: Sequence[tuple[int, ...]]) -> tuple[Tensor, ...]:
    """Do what `adjoint` does, for every input: coefficients (M, *out) to (M, *shape) for each shape."""
    with torch.enable_grad():
        inputs = [a.new_zeros(len(a), *shape, requires_grad=True) for shape in shapes]
        return torch.autograd.grad(evaluate(op, *inputs), inputs, a, create_graph=a.requires_grad)


def mapped(op: LinearOp, change: Callable[[Tensor], Tensor]) -> LinearOp:
    """Return a linear operation with other coefficients, such as their absolute values, that adds nothing."""
    match op:
        case Linear() | Conv2d():
            return replace(op, weight=change(op.weight), bias=None)
        case Affine():
            return replace(op, scale=change(op.scale), shift=torch.zeros_like(op.shift))
    return op


class _SparseProduct(torch.autograd.Function):
    """a·W from the compressed transpose of W; the gradient is for a alone."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, transposed: csr_array) -> Tensor:
        ctx.transposed = transposed
        return _sparse_product(transposed, a)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor, None]:
        return _sparse_product(ctx.transposed.T, slopes[0]), None


def _sparse_product(left: csr_array, a: Tensor) -> Tensor:
    # The result stays transposed in memory, as the product returns it: later operations can read it so.
    flat = a.reshape(-1, a.shape[-1])
    return torch.from_numpy(left @ flat.T.contiguous().numpy()).T.view(*a.shape[:-1], left.shape[0])


def _spread_out(op: AvgPool, a: Tensor, shape: tuple[int, ...]) -> Tensor:
    channels, (height, width) = shape[0], op.kernel
    if op.stride != op.kernel:
        weight = a.new_full((channels, 1, height, width), 1 / (height * width))
        return _transposed(Conv2d("", weight, None, op.stride, (0, 0), (1, 1), channels), a, shape)
    share = a * (1 / (height * width))  # windows that share nothing
    down, across = (torch.arange(n).repeat_interleave(k) for n, k in zip(a.shape[2:], op.kernel, strict=True))
    index = (down[:, None] * a.shape[3] + across).flatten()
    wide = share.flatten(2).index_select(2, index).view(len(a), channels, len(down), len(across))
    rest = (0, shape[2] - wide.shape[3], 0, shape[1] - wide.shape[2])
    return F.pad(wide, rest) if any(rest) else wide


def _transposed(op: Conv2d, a: Tensor, shape: tuple[int, ...]) -> Tensor:
    size = (len(a), *shape)
    if shape == op.weight.shape[1:] and op.padding == (0, 0):  # one place: its filters are a matrix
        return _times(a.flatten(1), op.weight.flatten(1)).view(size)
    result: Tensor = grad.conv2d_input(  # type: ignore[no-untyped-call]
        size, op.weight, a, op.stride, op.padding, op.dilation, op.groups
    )
    return result


def _times(a: Tensor, weight: Tensor) -> Tensor:
    # Coefficients of dead units are zero for every row, so those units cost nothing.
    flat = a.flatten(0, -2)
    index = flat.abs().amax(0).nonzero().squeeze(1)
    if len(index) < _ALIVE * len(weight):
        return (flat.index_select(1, index) @ weight.index_select(0, index)).view(*a.shape[:-1], weight.shape[1])
    return a @ weight


def offset(op: LinearOp, shape: tuple[int, ...]) -> Tensor | None:
    """Return what a linear operation adds, its value at zero, flat (out,); None if that is zero."""
    if isinstance(op, AvgPool | Flatten | Reshape) or (isinstance(op, Linear | Conv2d) and op.bias is None):
        return None
    if isinstance(op, Linear) and len(shape) == 1:
        return op.bias
    if isinstance(op, Conv2d) and op.bias is not None:
        places = math.prod(_after(op, shape))
        return op.bias.repeat_interleave(places)
    some = op.shift if isinstance(op, Affine) else op.weight
    return evaluate(op, torch.zeros(1, *shape, dtype=some.dtype, device=some.device)).flatten()


def _after(op: Conv2d, shape: tuple[int, ...]) -> tuple[int, ...]:
    sizes = zip(shape[1:], op.weight.shape[2:], op.stride, op.padding, op.dilation, strict=True)
    return tuple((side + 2 * p - d * (k - 1) - 1) // step + 1 for side, k, step, p, d in sizes)


def others(y: Tensor, classes: int) -> Tensor:
    """Return, for each label, the other classes in ascending order: (N,) to (N, classes − 1)."""
    rest = torch.arange(classes - 1, device=y.device).expand(len(y), -1)
    return rest + (rest >= y[:, None])


def margin_rows(graph: Graph, y: Tensor) -> Tensor:
    """Return the coefficients of all margins g_y − g_k on the logits: (N, classes − 1, classes), float64."""
    (classes,) = graph.nodes[-1].shape
    eye = torch.eye(classes, dtype=torch.float64, device=y.device)
    return eye[y][:, None] - eye[others(y, classes)]
