"""Upper values of the norms of linear operations, over all units or over those that can be active.

Power iteration approaches a spectral norm from below, so none is used: matrices go through a full singular value
decomposition, convolutions through the torus that contains them, and the Schur test holds for everything.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from ...graph import Affine, Conv2d, Flatten, Linear, MaxPool, evaluate
from ...threat import LINF
from .._network import LinearOp, adjoint

_ROUNDING = 1 + 1e-10  # what a backward-stable decomposition in float64 may be short of the true value


def operator_norm(op: LinearOp, shape: tuple[int, ...], norm: float, columns: Tensor, rows: Tensor) -> Tensor:
    """Bound ‖D W D'‖ for p = 2 or infinity and each image: (N,), float64.

    columns (N, *shape) and rows (N, *out) are 0/1 masks of the inputs and outputs that count.
    """
    if isinstance(op, Flatten):
        return columns.new_ones(len(columns))
    forward = evaluate(_positive(op), columns) * rows
    largest_row: Tensor = forward.flatten(1).amax(1)
    if norm == LINF:
        return largest_row
    backward = adjoint(_positive(op), rows, shape) * columns
    schur = (largest_row * backward.flatten(1).amax(1)).sqrt()
    match op:
        case Linear():
            return torch.minimum(schur, _spectral(op.weight, columns, rows)) * _ROUNDING
        case Conv2d():
            return schur.clamp_max(_on_a_torus(op, shape)) * _ROUNDING
    return schur * _ROUNDING


def _positive(op: LinearOp) -> LinearOp:
    match op:
        case Linear() | Conv2d():
            return dataclasses.replace(op, weight=op.weight.abs(), bias=None)
        case Affine():
            return dataclasses.replace(op, scale=op.scale.abs(), shift=torch.zeros_like(op.shift))
    return op


def _spectral(weight: Tensor, columns: Tensor, rows: Tensor) -> Tensor:
    """Return the largest singular value of each image's submatrix, computed once for images that share their masks."""
    if columns.dim() != 2:
        return torch.full((len(columns),), float(torch.linalg.matrix_norm(weight, 2)), dtype=weight.dtype)
    masks, which = torch.unique(torch.cat([columns, rows], 1), dim=0, return_inverse=True)
    values = []
    for mask in masks > 0:
        part = weight[mask[columns.shape[1] :]][:, mask[: columns.shape[1]]]
        values.append(torch.linalg.matrix_norm(part, 2) if part.numel() else weight.new_zeros(()))
    return torch.stack(values)[which]


def _on_a_torus(op: Conv2d, shape: tuple[int, ...]) -> float:
    """Bound a zero-padded convolution by the circular one on a torus that is large enough never to wrap around.

    The circular one is block-diagonal in the Fourier basis (Sedghi et al. 2019); padding and stride only leave out
    rows and columns.
    """
    extent = [(k - 1) * d + 1 for k, d in zip(op.weight.shape[2:], op.dilation, strict=True)]
    size = [n + e - 1 for n, e in zip(shape[1:], extent, strict=True)]
    kernel = op.weight.new_zeros(*op.weight.shape[:2], *extent)
    kernel[:, :, :: op.dilation[0], :: op.dilation[1]] = op.weight
    spectrum = torch.fft.rfft2(kernel, s=size).flatten(2)
    outputs = op.weight.shape[0] // op.groups
    blocks = spectrum.view(op.groups, outputs, op.weight.shape[1], -1).permute(0, 3, 1, 2)
    return float(torch.linalg.matrix_norm(blocks, 2).max())


def max_pool_norm(op: MaxPool, norm: float) -> float:
    """Return the Lipschitz constant of max pooling: the root of how many windows share a pixel for p = 2, else 1."""
    if norm == LINF:
        return 1.0
    shared = 1
    for k, s, d in zip(op.kernel, op.stride, op.dilation, strict=True):
        shared *= min(k, math.ceil(((k - 1) * d + 1) / s))
    return math.sqrt(shared)
