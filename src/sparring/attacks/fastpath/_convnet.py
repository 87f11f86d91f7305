"""Small convolutional networks without autograd: a convolution and its pooling are one product over patches.

Autograd spends most of such a network's time on the backward pass of the first convolution, whose product is too thin,
and on pooling. Here a patch is the receptive field of one pooling window, and the matrix holds the filters once for
each position in that window, shifted: one product gives all values that the window compares, and its transpose is the
backward pass. Images are the last axis, so that patches are copied, compared and added in whole rows.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ...errors import UserError
from ...graph import Conv2d, Flatten, Graph, MaxPool, ReLU, fold_affine, lower
from ._mlp import Dense, agree, dense_layers, is_hooked

# Shifted filters are padded with zeros: beyond this many times the products, a plain convolution is faster.
_WASTE = 1.5
# A network with one of these is of another kind, so its graph need not be computed.
_OTHERS = (nn.LayerNorm, nn.GroupNorm, nn.MultiheadAttention, nn.RNNBase)


class _Seen(NamedTuple):
    """What the backward pass needs of a layer: its input's shape, the values compared, and the largest of them."""

    shape: torch.Size
    values: Tensor
    largest: Tensor


@dataclass(frozen=True)
class ConvLayer:
    """An unpadded convolution, the maximum over each p × p of its outputs (p = 1: none), and a ReLU if `rectified`.

    weight: (p² · outputs, inputs · height · width of a patch); bias: (outputs,).
    """

    weight: Tensor
    bias: Tensor
    patch: tuple[int, int]
    stride: tuple[int, int]
    rectified: bool

    def forward(self, x: Tensor) -> tuple[Tensor, _Seen]:
        """Return outputs (outputs, rows, columns, N) for x (inputs, height, width, N), and what `backward` needs."""
        patches = x.unfold(1, self.patch[0], self.stride[0]).unfold(2, self.patch[1], self.stride[1])
        patches = patches.permute(0, 4, 5, 1, 2, 3)
        values = (self.weight @ patches.reshape(self.weight.shape[1], -1)).view(-1, len(self.bias), *patches.shape[3:])
        largest = values.amax(0) if len(values) > 1 else values[0]
        output = largest + self.bias.view(-1, 1, 1, 1)
        return (output.relu_() if self.rectified else output), _Seen(x.shape, values, largest)

    def backward(self, gradient: Tensor, seen: _Seen) -> Tensor:
        """Return the gradient (inputs, height, width, N) at the input for one at the outputs."""
        values, largest = seen.values, seen.largest
        if self.rectified:
            gradient = gradient * (largest + self.bias.view(-1, 1, 1, 1)).sign_().clamp_min_(0)
        spread = torch.empty_like(values)
        for place, value in enumerate(values):  # the first of equal values gets it, as in torch
            hit = torch.sub(value, largest, out=spread[place]).sign_().add_(1)
            gradient = gradient - hit.mul_(gradient)
        rows, columns, images = gradient.shape[1:]
        patches = (self.weight.T @ spread.view(len(self.weight), -1)).view(-1, *self.patch, rows, columns, images)
        back = gradient.new_zeros(seen.shape)
        down, across = self.stride
        for i in range(self.patch[0]):
            for j in range(self.patch[1]):
                back[:, i : i + down * rows : down, j : j + across * columns : across] += patches[:, i, j]
        return back


@dataclass(frozen=True)
class Convolved:
    """Convolutional layers and the fully connected network that reads their last outputs."""

    layers: tuple[ConvLayer, ...]
    head: Dense

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[list[_Seen], list[Tensor]]]:
        """Return the logits of x (N, C, H, W), and what `backward` needs."""
        value, seen = x.permute(1, 2, 3, 0).contiguous(), []
        for layer in self.layers:
            value, noted = layer.forward(value)
            seen.append(noted)
        logits, hidden = self.head.forward(value.flatten(0, 2).T)
        return logits, (seen, hidden)

    def backward(self, rows: Tensor, kept: tuple[list[_Seen], list[Tensor]]) -> Tensor:
        """Return the input gradients (..., N, pixels) of sums of logits with weights `rows` (..., N, classes)."""
        seen, hidden = kept
        features = self.head.backward(rows, hidden)
        found = [self._to_input(part, seen) for part in features.reshape(-1, *features.shape[-2:])]
        return torch.stack(found).view(*rows.shape[:-1], -1)

    def _to_input(self, features: Tensor, seen: list[_Seen]) -> Tensor:
        gradient = features.T.reshape(*seen[-1].largest.shape)
        for layer, noted in zip(self.layers[::-1], seen[::-1], strict=True):
            gradient = layer.backward(gradient, noted)
        return gradient.permute(3, 0, 1, 2).flatten(1)


def read_convolved(model: nn.Module, x: Tensor) -> Convolved | None:
    """Return a model in eval mode as such a network, or None if it is of another kind.

    x: a few images (N, C, H, W), near which both must give the same logits and gradients: on flat images many maxima
    are ties.
    """
    kernels = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    if not kernels or any(kernel.padding != (0, 0) for kernel in kernels) or is_hooked(model):
        return None
    if any(isinstance(module, _OTHERS) for module in model.modules()):
        return None
    try:
        found = _read(fold_affine(lower(model, tuple(x.shape[1:]), images=x)))
    except UserError:
        return None
    noise = torch.rand(x.shape, generator=torch.Generator().manual_seed(0), dtype=x.dtype).to(x.device)
    return found if found is not None and agree(found, model, x + 0.1 * (noise - x)) else None


@dataclass(frozen=True)
class _Draft:
    """A layer that is still being read: weight (outputs, inputs, height, width), bias (outputs,)."""

    weight: Tensor
    bias: Tensor
    stride: tuple[int, int]
    pool: int = 1
    rectified: bool = False

    def finish(self) -> ConvLayer | None:
        """Return the layer, or None if too much of its matrix would be zeros."""
        outputs, inputs, height, width = self.weight.shape
        down, across = self.stride
        patch = height + down * (self.pool - 1), width + across * (self.pool - 1)
        if patch[0] * patch[1] > _WASTE * height * width:
            return None
        shifted = self.weight.new_zeros(self.pool, self.pool, outputs, inputs, *patch)
        for i in range(self.pool):
            for j in range(self.pool):
                shifted[i, j, ..., i * down : i * down + height, j * across : j * across + width] = self.weight
        matrix = shifted.view(self.pool**2 * outputs, -1)
        stride = down * self.pool, across * self.pool
        return ConvLayer(matrix, self.bias, patch, stride, self.rectified)


def _read(graph: Graph) -> Convolved | None:
    """Return the convolutions, ReLUs, poolings and linear layers in a row of a folded graph; None for others."""
    drafts: list[_Draft] = []
    for place, node in enumerate(graph.nodes[1:]):
        if node.inputs != (place,):
            return None
        match node.op:
            case Conv2d(groups=1, dilation=(1, 1), padding=(0, 0), weight=weight, bias=bias, stride=stride):
                bias = weight.new_zeros(len(weight)) if bias is None else bias.detach()
                drafts.append(_Draft(weight.detach(), bias, stride))
            case ReLU() if drafts:
                drafts[-1] = replace(drafts[-1], rectified=True)
            case MaxPool() as pool if drafts and drafts[-1].pool == 1 and _is_plain(pool):
                drafts[-1] = replace(drafts[-1], pool=pool.kernel[0])
            case Flatten() if drafts:
                head = dense_layers(graph, place + 1)
                layers = [layer for layer in (draft.finish() for draft in drafts) if layer is not None]
                return Convolved(tuple(layers), head) if head is not None and len(layers) == len(drafts) else None
            case _:
                return None
    return None


def _is_plain(pool: MaxPool) -> bool:
    """Return whether the windows are squares side by side."""
    square = pool.kernel == pool.stride and pool.kernel[0] == pool.kernel[1]
    return square and pool.padding == (0, 0) and pool.dilation == (1, 1) and not pool.ceil_mode
