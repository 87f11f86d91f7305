"""Interval arithmetic through the operations of a network (Gowal et al. 2018)."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch
from torch import Tensor

from ...errors import Unsupported
from ...graph import Add, Affine, AvgPool, Conv2d, Flatten, Graph, Linear, MaxPool, Op, ReLU, SparseActivation, evaluate
from ...threat import L2, LINF
from .._region import Region
from ._activation_sparsity import activation_interval


class Interval(NamedTuple):
    """Elementwise bounds of a node's output, both of shape (N, ...)."""

    lower: Tensor
    upper: Tensor


def propagate(op: Op, *inputs: Interval) -> Interval:
    """Return bounds of an operation's output from bounds of its inputs."""
    lower, upper = inputs[0]
    match op:
        case Linear() | Conv2d():
            centre = evaluate(op, (upper + lower) / 2)
            half = evaluate(dataclasses.replace(op, weight=op.weight.abs(), bias=None), (upper - lower) / 2)
            return Interval(centre - half, centre + half)
        case Affine():
            one, two = evaluate(op, lower), evaluate(op, upper)
            return Interval(torch.minimum(one, two), torch.maximum(one, two))
        case ReLU() | MaxPool() | AvgPool() | Flatten():  # all monotone
            return Interval(evaluate(op, lower), evaluate(op, upper))
        case Add():
            return Interval(lower + inputs[1].lower, upper + inputs[1].upper)
        case SparseActivation():
            return Interval(*activation_interval(op, lower, upper))
    raise Unsupported(f"an operation of type {type(op).__name__} has no interval rule")


def first_layers(graph: Graph, region: Region) -> dict[int, Interval]:
    """Return the bounds of the nodes up to the first layer of weights, which are attained one neuron at a time.

    They use the ball itself and not only the box around it; l_1 has no such rule and gets only the input.
    """
    bounds = {0: Interval(region.lower, region.upper)}
    if region.norm not in (L2, LINF):
        return bounds
    single = {0}  # nodes whose values each come from one pixel
    squares, centres = {0: torch.ones_like(region.x[:1])}, {0: region.x}
    for index, node in enumerate(graph.nodes):
        op, source = node.op, node.inputs[0] if node.inputs else 0
        if not isinstance(op, Affine | Flatten | Linear | Conv2d) or source not in single:
            continue
        box = bounds[index] = propagate(op, bounds[source])
        if isinstance(op, Affine | Flatten):
            single.add(index)
        if region.norm == L2:
            squares[index], centres[index] = evaluate(_squared(op), squares[source]), evaluate(op, centres[source])
            half = region.eps.view(-1, *[1] * (centres[index].dim() - 1)) * squares[index].sqrt()
            low, high = centres[index] - half, centres[index] + half
            bounds[index] = Interval(torch.maximum(box.lower, low), torch.minimum(box.upper, high))
    return bounds


def _squared(op: Affine | Flatten | Linear | Conv2d) -> Op:
    """Return the operation that maps squared l_2 reaches, of inputs that share no pixel, to squared reaches."""
    match op:
        case Affine():
            return dataclasses.replace(op, scale=op.scale.square(), shift=torch.zeros_like(op.shift))
        case Flatten():
            return op
        case _:
            return dataclasses.replace(op, weight=op.weight.square(), bias=None)
