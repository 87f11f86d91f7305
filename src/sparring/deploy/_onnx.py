"""Write networks as ONNX files with torch's exporter, for other engines."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from .. import graph
from ..errors import Unsupported, UserError, told
from ..files import write_atomic
from ..memory import answers
from ..modes import eval_mode
from ..outputs import logits_of, opened
from ..waiting import courteous
from ._compile import compile_model
from ._equivalent import Equivalent
from ._program import Floats

_FOLDED = 1 << 40  # bytes of a constant that is folded at export: any
_STEPS = 3  # of an export: remove what is not read, let torch write the graph, and fold its constants


@courteous()
def to_onnx(
    model: nn.Module,
    path: Path | str,
    *,
    shape: tuple[int, ...],
    images: Tensor | None = None,
    progress: Callable[[int, int], None] = lambda *_: None,
) -> Path:
    """Write a classifier for images of `shape` as ONNX, by torch.onnx: masks and normalisation folded.

    Input "images" (N, *shape) float32 in [0, 1], output "logits" (N, classes). N is free, or 1 if torch can export
    the network for a given number of images only. Unread units and constant channels are removed if sparse kernels run
    the whole network. images, progress: as in `export`. Raise UserError if the package onnxscript is missing,
    Unsupported if torch.onnx.export fails.
    """
    try:
        import onnxscript
    except ImportError as error:
        raise UserError("ONNX export needs the package onnxscript: pip install 'sparring[onnx]'") from error
    progress(0, _STEPS)
    first = next(model.parameters(), torch.zeros(()))
    network, example = _slim(model, shape, images), torch.rand(2, *shape, device=first.device)
    with eval_mode(network), graph.quiet():
        progress(1, _STEPS)
        opened(network, example)  # torch prints the error in a sentence
        program = _exported(_Logits(network).eval(), example)
        progress(2, _STEPS)
        onnxscript.optimizer.optimize_ir(program.model, input_size_limit=_FOLDED, output_size_limit=_FOLDED)
    written = program.model_proto
    for entry in (*written.graph.node, *written.graph.value_info, written.graph):
        entry.ClearField("metadata_props")  # the source lines of each node
    return write_atomic(path, written.SerializeToString())


def _slim(model: nn.Module, shape: tuple[int, ...], images: Tensor | None) -> nn.Module:
    """Return the network that sparse kernels run, without dead parts, or the model in float32 if they cannot."""
    try:
        program = compile_model(model, shape, images=images)
    except Unsupported:
        program = None
    if program is not None and program.whole:
        return Equivalent(program)
    kinds = {value.dtype for value in model.parameters() if value.is_floating_point()}
    return copy.deepcopy(model).float() if kinds - {torch.float32} else model


class _Logits(nn.Module):
    """A model that returns its logits alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return logits_of(self.model(x.clone())).float()


def _exported(network: nn.Module, x: Tensor) -> Any:
    """Return torch's ONNX program for any number of images like x (2, *shape), else for one.

    Attention is decomposed if torch.onnx does not accept the fused one, whose strides it gets wrong.
    """
    free = ({0: torch.export.Dim("N")},)
    for written_out, (example, sizes), strict in product((False, True), ((x, free), (x[:1], None)), (False, True)):
        try:
            with sdpa_kernel(SDPBackend.MATH) if written_out else nullcontext():
                program = torch.export.export(network, (example,), dynamic_shapes=sizes, strict=strict)
                return torch.onnx.export(
                    program, (example,), input_names=["images"], output_names=["logits"], verbose=False
                )
        except Exception as error:  # torch runs the user's forward(), which can raise anything
            refused = error
    raise Unsupported(f"torch.onnx cannot export this network: {told(refused.__cause__ or refused)}") from refused


def takes_any_number(path: Path | str) -> bool:
    """Return whether an ONNX file accepts any number of images at once."""
    import onnx

    return not onnx.load(path).graph.input[0].type.tensor_type.shape.dim[0].dim_value


def run_session(session: Any, x: Floats) -> Floats:
    """Return the logits of images x in ONNX Runtime, one by one if the file requires it."""
    parts = np.split(x, len(x)) if session.get_inputs()[0].shape[0] == 1 else [x]
    return np.concatenate([session.run(None, {"images": part})[0] for part in parts])


@courteous()
def onnx_error(path: Path | str, model: nn.Module, x: Tensor) -> float | None:
    """Run an ONNX file in ONNX Runtime; return the largest difference of logits from a model's over the largest logit.

    x: images (N, *shape) in [0, 1], evaluated as many at a time as memory allows, and the first alone; the model may be
    on another device. Returns None if ONNX Runtime is not installed.
    """
    try:
        import onnxruntime
    except ImportError:
        return None
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # which is slow on a busy machine
    engine = _Engine(onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"]))
    place = next((p.device for p in model.parameters()), x.device)
    with eval_mode(model):
        found, expected = (
            torch.cat([answers(opened(one, own[:2]), part) for part in (own, own[:1])]).cpu()
            for one, own in ((engine, x), (model, x.to(place)))
        )
    return float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-30))


class _Engine(nn.Module):
    """A session of ONNX Runtime as a model, so that masked classes are treated as for any other model."""

    def __init__(self, session: Any) -> None:
        super().__init__()
        self.session = session

    def forward(self, x: Tensor) -> Tensor:
        return torch.from_numpy(run_session(self.session, x.numpy()))
