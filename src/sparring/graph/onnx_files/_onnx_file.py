"""Open an ONNX file: check its size, read its graph, and run it in ONNX Runtime."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import Unsupported, UserError, told
from .._ops import Graph
from ._onnx_reader import Reader
from ._onnx_rules import RULES

_BYTES, _NODES = 2**30, 20_000
_TOLERANCE = 1e-4  # of the largest logit
_IMAGES = 4


def from_onnx(path: Path | str) -> Graph:
    """Read a classifier with one float input (1 or N, ...) from an ONNX file as a float32 graph with the same logits.

    The graph takes images of the input's shape; if the input is flat, it takes any image with as many pixels. The graph
    is compared with ONNX Runtime if that is installed.

    Raise UserError if the package onnx is missing or the file is damaged. Raise Unsupported, naming the node and the
    operation, for anything without a rule, which includes data stored in other files.
    """
    data = read_onnx(path)
    graph = Reader(str(path), _parsed(data, path), RULES).read()
    try:
        run = onnx_runtime(data)
    except ImportError:
        return graph
    x = torch.rand(_IMAGES, *graph.nodes[0].shape, generator=torch.Generator().manual_seed(0))
    found, expected = graph(x), run(x)
    if found.shape != expected.shape or not bool(
        ((found - expected).abs() <= _TOLERANCE * expected.abs().amax()).all()  # also refuses NaN
    ):
        raise Unsupported(f"{path}: the logits of the graph differ from those of ONNX Runtime; please report this file")
    return graph


def read_onnx(path: Path | str) -> bytes:
    """Return the bytes of an ONNX file; raise UserError if it is missing or larger than 1 GiB."""
    if not Path(path).is_file():
        raise UserError(f"{path} does not exist")
    if Path(path).stat().st_size > _BYTES:
        raise UserError(f"{path} is larger than 1 GiB, the limit for ONNX files")
    return Path(path).read_bytes()


def onnx_runtime(data: bytes) -> Callable[[Tensor], Tensor]:
    """Run an ONNX file with ONNX Runtime: images (N, ...) to logits (N, classes), float32, one image at a time.

    Raise ImportError if ONNX Runtime is not installed, Unsupported if it refuses the file.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4
    try:
        session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # it has its own exception class for each status
        raise Unsupported(f"ONNX Runtime refuses the file: {told(error)}") from error
    (given,) = session.get_inputs()
    shape = [size if isinstance(size, int) else 1 for size in given.shape]

    def run(x: Tensor) -> Tensor:
        every = [session.run(None, {given.name: one.float().numpy().reshape(shape)})[0] for one in x.detach()]
        return torch.stack([torch.from_numpy(logits).flatten() for logits in every])

    return run


def _parsed(data: bytes, path: Path | str) -> Any:
    try:
        import onnx
    except ImportError as error:
        raise UserError("ONNX files need the package onnx: pip install 'sparring[onnx]'") from error
    try:
        model = onnx.load_model_from_string(data)
    except Exception as error:  # protobuf's own, which differ by its version
        raise UserError(f"{path} is not an ONNX file, or a damaged one: {told(error)}") from error
    if not model.graph.node:
        raise UserError(f"{path} is not an ONNX file, or an empty one: it has no nodes")
    if len(model.graph.node) > _NODES:
        raise UserError(f"{path} has {len(model.graph.node)} nodes; the limit is {_NODES}")
    return model
