"""Lower any classifier to a short list of plain operations, or refuse it.

Bounds, packing and channel removal all need to see a network as data: which operation feeds which, with which weights.
`lower` reads what torch computes, keeps the operations below, and compares the graph with the model before it returns
it; unknown operations are refused by name. A `Declared` module (activation sparsity) is kept whole, as
`SparseActivation`.
"""

from __future__ import annotations

from ._lower import lower
from ._ops import (
    CALLS,
    ELEMENTWISE,
    RECURRENT,
    RESAMPLED,
    Add,
    Affine,
    AvgPool,
    Call,
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
    Reshape,
    SparseActivation,
    called,
    evaluate,
    refusal,
    with_tensors,
)
from ._passes import drop_dead_units, fold_affine
from ._plain_stacks import Step, Stepwise
from ._quiet import quiet
from ._rewrites import spelled_out
from .onnx_files._as_module import GraphModule
from .onnx_files._onnx_file import from_onnx, onnx_runtime, read_onnx

__all__ = [
    "CALLS",
    "ELEMENTWISE",
    "RECURRENT",
    "RESAMPLED",
    "Add",
    "Affine",
    "AvgPool",
    "Call",
    "Constant",
    "Conv2d",
    "Flatten",
    "Graph",
    "GraphModule",
    "Input",
    "Linear",
    "MaxPool",
    "Node",
    "Op",
    "ReLU",
    "Reshape",
    "SparseActivation",
    "Step",
    "Stepwise",
    "called",
    "drop_dead_units",
    "evaluate",
    "fold_affine",
    "from_onnx",
    "lower",
    "onnx_runtime",
    "quiet",
    "read_onnx",
    "refusal",
    "spelled_out",
    "with_tensors",
]
