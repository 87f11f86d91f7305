"""ONNX files become graphs of the same logits as ONNX Runtime's, which `from_onnx` itself compares, or are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from sparring.deploy import to_onnx
from sparring.errors import Unsupported, UserError
from sparring.graph import GraphModule, from_onnx, lower, onnx_runtime, read_onnx

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402

RANDOM = np.random.default_rng(0)


def weights(*shape: int) -> np.ndarray:
    return RANDOM.standard_normal(shape).astype(np.float32)


def written(path: Path, nodes: list, shape: tuple, constants: dict | None = None, output: str = "out") -> Path:
    initializers = [numpy_helper.from_array(np.asarray(value), name) for name, value in (constants or {}).items()]
    entry = helper.make_tensor_value_info("in", TensorProto.FLOAT, list(shape))
    made = helper.make_graph(nodes, "g", [entry], [helper.make_tensor_value_info(output, TensorProto.FLOAT, None)])
    made.initializer.extend(initializers)
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 13)])
    model.ir_version = 8
    path.write_bytes(model.SerializeToString())
    return path


def node(kind: str, inputs: str, output: str = "out", **attributes) -> object:
    return helper.make_node(kind, inputs.split(), [output], **attributes)


HEAD = {"w": weights(4, 3), "b": weights(3)}
IMAGE = (1, 2, 4, 4)
FLAT = (1, 4)
KINDS: dict[str, tuple[Any, Any, Any]] = {
    "gemm": ([node("Gemm", "in w b", alpha=0.5, beta=2.0)], FLAT, HEAD),
    "matmul and add": ([node("MatMul", "in w", "m"), node("Add", "b m")], FLAT, HEAD),
    "a matrix on the left": ([node("MatMul", "v in", "m"), node("Flatten", "m")], (1, 4, 1), {"v": weights(3, 4)}),
    "free batch": ([node("Gemm", "in w b")], ("N", 4), HEAD),
    "arithmetic": (
        [node("Sub", "in mean", "a"), node("Div", "a std", "d"), node("Sub", "one d", "s"), node("Mul", "s std", "p"),
         node("Sub", "p d", "q"), node("Gemm", "q w b")],
        FLAT, HEAD | {"mean": weights(4), "std": 1 + weights(1, 4) ** 2, "one": np.float32(1)},
    ),
    "a mean for each pixel": (
        [node("Sub", "in mean", "a"), node("Flatten", "a", "f"), node("MatMul", "f w")],
        IMAGE, {"mean": weights(1, 2, 4, 4), "w": weights(32, 3)},
    ),
    "a convolution": (
        [node("Conv", "in k c", "a", pads=[1, 0, 1, 0], strides=[2, 1], group=2, dilations=[1, 2]),
         node("BatchNormalization", "a g h m v", "n"), node("Relu", "n", "r"), node("Flatten", "r")],
        IMAGE, {"k": weights(4, 1, 3, 2), "c": weights(4), "g": weights(4), "h": weights(4), "m": weights(4),
                "v": 1 + weights(4) ** 2},
    ),
    "pooling": (
        [node("MaxPool", "in", "m", kernel_shape=[2, 2], pads=[1, 1, 1, 1]),
         node("AveragePool", "m", "a", kernel_shape=[2, 2], strides=[1, 1]), node("GlobalAveragePool", "a", "p"),
         node("Squeeze", "p axes", "s"), node("Mul", "s two")],
        IMAGE, {"axes": np.array([2, 3]), "two": np.float32(2)},
    ),
    "clip and leaky ReLU": (
        [node("Clip", "in low high", "a"), node("LeakyRelu", "a", "l", alpha=0.2), node("Clip", "l  high", "c"),
         node("Gemm", "c w b")],
        FLAT, HEAD | {"low": np.float32(0.25), "high": np.float32(0.5)},
    ),
    "curves": ([node("Sigmoid", "in", "s"), node("Tanh", "s", "t"), node("Gemm", "t w b")], FLAT, HEAD),
    "concatenation": ([node("Relu", "in", "r"), node("Concat", "in r", "c", axis=1), node("MatMul", "c w")], FLAT,
                      {"w": weights(8, 3)}),
    "a shape computed from the input": (
        [node("Shape", "in", "s"), node("Gather", "s zero", "n"), node("Unsqueeze", "n where", "u"),
         node("Constant", "", "rest", value_ints=[-1]), node("Concat", "u rest", "t", axis=0), node("Reshape", "in t")],
        IMAGE, {"zero": np.int64(0), "where": np.array([0])},
    ),
    "axes that move": ([node("Transpose", "in", "t", perm=[0, 2, 3, 1]), node("Flatten", "t")], IMAGE, {}),
    "dropout": ([node("Dropout", "in", "d"), node("Identity", "d", "i"), node("Gemm", "i w b")], FLAT, HEAD),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_the_graph_gives_the_logits_of_onnx_runtime(kind: str, tmp_path: Path) -> None:
    nodes, shape, constants = KINDS[kind]
    path = written(tmp_path / "m.onnx", nodes, shape, constants)
    graph = from_onnx(path)
    x = torch.randn(5, *(size for size in shape[1:]))
    expected = onnx_runtime(read_onnx(path))(x)
    torch.testing.assert_close(graph(x), expected, rtol=1e-4, atol=1e-5)
    module = GraphModule(graph)
    torch.testing.assert_close(module(x), expected, rtol=1e-4, atol=1e-5)
    assert lower(module, tuple(shape[1:])).nodes[-1].shape == expected.shape[1:]  # which compares the two


def test_what_sparring_writes_it_reads(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(27, 4)
    )
    path = to_onnx(model.eval(), tmp_path / "m.onnx", shape=(1, 8, 8))
    x = torch.rand(4, 1, 8, 8)
    torch.testing.assert_close(GraphModule(from_onnx(path))(x), model(x), rtol=1e-4, atol=1e-5)


def test_a_flat_input_takes_images_of_as_many_pixels(tmp_path: Path) -> None:
    module = GraphModule(from_onnx(written(tmp_path / "m.onnx", [node("Gemm", "in w b")], FLAT, HEAD)))
    x = torch.rand(3, 1, 2, 2)
    torch.testing.assert_close(module(x), module(x.flatten(1)))
    with pytest.raises(UserError, match=r"takes images of shape \(4,\), not \(1, 3, 3\)"):
        module(torch.rand(3, 1, 3, 3))


REFUSED: dict[str, tuple[Any, Any, Any, str]] = {
    "no rule": ([node("Erf", "in")], FLAT, {}, "operation 'Erf' has no rule"),
    "another's operation": ([node("Relu", "in", domain="mine")], FLAT, {}, "'Relu' of 'mine' has no rule"),
    "padding": ([node("Conv", "in k", pads=[0, 0, 1, 1])], IMAGE, {"k": weights(4, 2, 1, 1)}, "pad both sides"),
    "unknown attribute": ([node("Relu", "in", alpha=2.0)], FLAT, {}, "attribute 'alpha' without a rule"),
    "weights that are computed": ([node("MatMul", "in in")], (1, 4, 4), {}, "computed from the image"),
    "images that mix": ([node("Reshape", "in t")], FLAT, {"t": np.array([4, 1])}, "axis of the images"),
    "a product": ([node("Mul", "in in")], FLAT, {}, "multiplies two values"),
    "a missing value": ([node("Relu", "nothing")], FLAT, {}, "reads 'nothing'"),
    "numbers that are none": ([node("Gemm", "in w")], FLAT, {"w": np.float32(np.inf) * weights(4, 3)}, "not finite"),
    "a batch of two": ([node("Relu", "in")], (2, 4), {}, "not a batch of float32 images"),
    "a huge value": ([node("Conv", "in k", pads=[2**20] * 4)], IMAGE, {"k": weights(1, 2, 1, 1)}, "above the limit"),
    "a constant": ([node("Identity", "w")], FLAT, {"w": weights(1, 3)}, "does not depend on the input"),
    "training": ([node("Dropout", "in r t")], FLAT, {"r": np.float32(0.5), "t": np.array(True)}, "type 9|at random"),
    "limits in the wrong order": ([node("Clip", "in a b")], FLAT, {"a": np.float32(1), "b": np.float32(0)}, "order"),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_refusals_name_node_and_reason(kind: str, tmp_path: Path) -> None:
    nodes, shape, constants, reason = REFUSED[kind]
    with pytest.raises(Unsupported, match=reason):
        from_onnx(written(tmp_path / "m.onnx", nodes, shape, constants))


def test_data_in_other_files_are_refused(tmp_path: Path) -> None:
    path = written(tmp_path / "m.onnx", [node("Gemm", "in w b")], FLAT, HEAD)
    model = onnx.load(path)
    onnx.save_model(model, path, save_as_external_data=True, location="w.bin", size_threshold=0)
    with pytest.raises(Unsupported, match="is stored in another file"):
        from_onnx(path)


@pytest.mark.parametrize("content", [b"", b"\x00" * 64, b"no onnx at all", b"\xff" * 64])
def test_what_is_no_onnx_file_is_said(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(content)
    with pytest.raises(UserError, match=r"m\.onnx"):
        from_onnx(tmp_path / "m.onnx")
    with pytest.raises(UserError, match="does not exist"):
        from_onnx(tmp_path / "none.onnx")
