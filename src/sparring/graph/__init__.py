"""Lower any traceable classifier to a short list of plain operations.

Bounds, packing and channel removal all need to see a network as data: which operation feeds which, with which weights.
`lower` traces an `nn.Module` in eval mode and keeps only operations of a dozen kinds; whatever it does not know is
refused by name. A module with a `straight_through` attribute (activation sparsity) is kept whole, as `Activation`.
"""

from __future__ import annotations

from .ops import (
    Activation,
    Add,
    Affine,
    AvgPool,
    Conv2d,
    Flatten,
    Graph,
    Input,
    Linear,
    MaxPool,
    Node,
    Op,
    ReLU,
    evaluate,
)
from .trace import lower

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
    "lower",
]
