"""The packed program as an ONNX graph: for engines that gain nothing from zeros, but from removed channels."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import Unsupported, UserError
from ..files import write_atomic
from ..modes import eval_mode
from ..outputs import opened
from ._compile import compile_model
from ._program import Add, Flatten, Floats, Op, PackedActivation, Pool, Program, ReLU, Scale, Shape, Snap, Sparse

_OPSET = 21  # the newest in which ONNX Runtime quantises


def to_onnx(model: nn.Module, path: Path | str, *, shape: tuple[int, ...], images: Tensor | None = None) -> Path:
    """Write a classifier for images of `shape` as ONNX: normalisation folded, dead units and channels gone.

    Input "images" (N, *shape) float32 in [0, 1], output "logits" (N, classes), N free. Raise UserError if the package
    onnx is missing, Unsupported for networks without a packed form. images: as in `export`.
    """
    return program_to_onnx(compile_model(model, shape, images=images), path)


def program_to_onnx(program: Program, path: Path | str) -> Path:
    """Write a program as ONNX; as `to_onnx`."""
    if not program.whole:
        raise Unsupported("parts of this network run in torch, and have no packed form in ONNX")
    try:
        import onnx
        from onnx import TensorProto, helper
    except ImportError as error:
        raise UserError("ONNX export needs the package onnx; install sparring[onnx]") from error
    graph = _Graph(helper)
    shapes = program.shapes
    names = ["images"]
    for number, step in enumerate(program.steps):
        last = number == len(program.steps) - 1
        name = "logits" if last else f"value{number + 1}"
        graph.add(step.op, [names[i] for i in step.inputs], name, shapes[step.inputs[0]])
        names.append(name)
    made = helper.make_graph(
        graph.nodes,
        "sparring",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["N", *program.shape])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", program.classes])],
        graph.constants,
    )
    opset = [helper.make_opsetid("", min(_OPSET, onnx.defs.onnx_opset_version()))]
    model = helper.make_model(made, opset_imports=opset, producer_name="sparring")
    model.ir_version = helper.find_min_ir_version_for(opset)  # so that older runtimes open the file if they can
    onnx.checker.check_model(model, full_check=True)
    return write_atomic(path, model.SerializeToString())


def onnx_error(path: Path | str, model: nn.Module, x: Tensor) -> float | None:
    """Run an ONNX file in ONNX Runtime; return the largest difference of logits from a model's over the largest logit.

    x: images (N, *shape) in [0, 1]. Return None where ONNX Runtime is not installed.
    """
    try:
        import onnxruntime
    except ImportError:
        return None
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    found = torch.from_numpy(session.run(None, {"images": x.numpy()})[0])
    with torch.no_grad(), eval_mode(model):
        expected = opened(model, x)(x)
    return float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-30))


class _Graph:
    """Collect nodes and constants."""

    def __init__(self, helper: Any) -> None:
        self.helper = helper
        self.nodes: list[Any] = []
        self.constants: list[Any] = []

    def add(self, op: Op, inputs: list[str], output: str, shape: Shape) -> None:
        match op:
            case Sparse() if len(shape) == 1:
                weight = self._constant(f"{output}.weight", op.dense().reshape(op.shape[:2]))
                self._node("Gemm", [*inputs, weight, self._constant(f"{output}.bias", op.bias)], output, transB=1)
            case Sparse():
                constants = [self._constant(f"{output}.weight", op.dense()), self._constant(f"{output}.bias", op.bias)]
                geometry = {"strides": op.stride, "pads": (*op.padding, *op.padding), "dilations": op.dilation}
                self._node("Conv", [*inputs, *constants], output, **geometry)
            case Scale():
                axes = (1, -1, *[1] * (len(shape) - 1))
                scaled = f"{output}.scaled"
                scale = self._constant(f"{output}.scale", op.scale.reshape(axes))
                self._node("Mul", [*inputs, scale], scaled)
                self._node("Add", [scaled, self._constant(f"{output}.shift", op.shift.reshape(axes))], output)
            case ReLU():
                self._node("Relu", inputs, output)
            case Flatten():
                self._node("Flatten", inputs, output)
            case Add():
                self._node("Add", inputs, output)
            case Pool(mean=True):
                self._node("AveragePool", inputs, output, kernel_shape=op.kernel, strides=op.stride)
            case Pool():
                geometry = {"strides": op.stride, "pads": (*op.padding, *op.padding), "dilations": op.dilation}
                self._node("MaxPool", inputs, output, kernel_shape=op.kernel, ceil_mode=int(op.ceil_mode), **geometry)
            case PackedActivation(kind="shifted-relu"):
                shifted = f"{output}.shifted"
                threshold = self._constant(f"{output}.threshold", np.array([op.number], np.float32))
                self._node("Sub", [*inputs, threshold], shifted)
                self._node("Relu", [shifted], output)
            case PackedActivation(kind="threshold"):
                self._node("ThresholdedRelu", inputs, output, alpha=float(op.number))
            case PackedActivation():
                self._largest(op.kept(math.prod(shape)), inputs, output, shape)
            case Snap():
                self._snap(op, inputs, output, (1, -1, *[1] * (len(shape) - 1)))

    def _largest(self, kept: int, inputs: list[str], output: str, shape: Shape) -> None:
        """Scatter an image's largest values into zeros."""
        flat, zeros, values, places, spread = (f"{output}.{part}" for part in ("flat", "zeros", "top", "at", "spread"))
        self._node("Flatten", inputs, f"{flat}.any")
        self._node("Relu", [f"{flat}.any"], flat)
        self._node("Shape", [flat], f"{flat}.shape")
        self._node("ConstantOfShape", [f"{flat}.shape"], zeros)
        count = self._integers(f"{output}.kept", [kept])
        self.nodes.append(self.helper.make_node("TopK", [flat, count], [values, places]))
        self._node("ScatterElements", [zeros, places, values], spread, axis=1)
        self._node("Reshape", [spread, self._integers(f"{output}.shape", [0, *shape])], output)

    def _snap(self, op: Snap, inputs: list[str], output: str, axes: tuple[int, ...]) -> None:
        """Put the channel's centre where a value lies within its radius, then cut at zero."""
        centre = self._constant(f"{output}.centre", op.centre.reshape(axes))
        radius = self._constant(f"{output}.radius", op.radius.reshape(axes))
        away, far, within, drawn = (f"{output}.{part}" for part in ("away", "far", "within", "drawn"))
        self._node("Sub", [*inputs, centre], away)
        self._node("Abs", [away], far)
        self._node("LessOrEqual", [far, radius], within)
        self._node("Where", [within, centre, *inputs], drawn)
        self._node("Relu", [drawn], output)

    def _node(self, kind: str, inputs: list[str], output: str, **attributes: Any) -> None:
        self.nodes.append(self.helper.make_node(kind, inputs, [output], **attributes))

    def _constant(self, name: str, array: Floats) -> str:
        raw = np.ascontiguousarray(array, "<f4").tobytes()
        self.constants.append(self.helper.make_tensor(name, 1, array.shape, raw, raw=True))  # 1: FLOAT
        return name

    def _integers(self, name: str, numbers: list[int]) -> str:
        self.constants.append(self.helper.make_tensor(name, 7, [len(numbers)], numbers))  # 7: INT64
        return name
