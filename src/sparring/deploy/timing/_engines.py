"""The engines that a network can run in: sparring's own, PyTorch, ONNX Runtime and OpenVINO, each on one thread.

All engines run in their best configuration: ONNX Runtime with all of its optimisations and with static int8 (QDQ, per
channel, calibrated on images), OpenVINO in float32, bfloat16 and int8, torch.compile.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...devices import CPU, Place
from ...errors import UserError
from ...graph import quiet
from .._onnx import run_session, takes_any_number, to_onnx
from .._program import Floats
from .._runtime import export, load
from ..kernels._native import way_of_products


class Unavailable(UserError):
    """An engine is not installed, or does not support this network; the message says which."""


@dataclass(frozen=True)
class Opened:
    """A network in an engine, ready to be called; `exact` is false if its numbers are rounded below float32."""

    run: Callable[[Floats], Any]
    settings: str
    bytes_disk: int
    exact: bool = True
    memory: Callable[[], int | None] = lambda: None


@dataclass(frozen=True)
class Network:
    """A network to open, a folder for its files, images (N, *shape) in [0, 1] to calibrate int8 on, torch's place."""

    model: nn.Module
    shape: tuple[int, ...]
    folder: Path
    images: Tensor
    place: Place

    @cached_property
    def reference(self) -> Callable[[Tensor], Tensor]:
        """The network as images to logits, on the CPU and in its own dtype."""
        return CPU.answers(self.model, self.images)

    @cached_property
    def answer(self) -> Callable[[Tensor], Tensor]:
        """The same at the requested place, from images to logits on the CPU."""
        return self.place.answers(self.model, self.images)

    @property
    def settings(self) -> str:
        """Description of the place of torch's engines, if it is not one core."""
        return "" if self.place == CPU else f", {self.place}"

    @property
    def exact(self) -> bool:
        """Whether torch's engines compute in single precision at least."""
        return self.place.dtype not in (torch.float16, torch.bfloat16)

    @cached_property
    def packed(self) -> Path:
        """The packed artefact."""
        return export(self.model, self.folder / "net.sparring", shape=self.shape)

    @cached_property
    def packed_int8(self) -> Path:
        """The artefact with weights and activations in int8. Raise Unavailable where they cannot be rounded."""
        path = self.folder / "net.int8.sparring"
        try:
            return export(self.model, path, shape=self.shape, values="int8", calibrate=self.images)
        except UserError as error:
            raise Unavailable(str(error)) from error

    @cached_property
    def onnx(self) -> Path:
        """The ONNX file. Raise Unavailable if the package is missing or the network cannot be exported."""
        _require("onnxscript")
        try:
            return to_onnx(self.model, self.folder / "net.onnx", shape=self.shape)
        except UserError as error:
            raise Unavailable(str(error)) from error

    @cached_property
    def quantised(self) -> Path:
        """The ONNX file in static int8: weights and activations, QDQ, weights per channel."""
        _require("onnxruntime")
        from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

        images = iter(self.images.numpy())

        class Images(CalibrationDataReader):  # type: ignore[misc]
            def get_next(self) -> dict[str, Floats] | None:
                image = next(images, None)
                return None if image is None else {"images": image[None]}

        path = self.folder / "net.int8.onnx"
        logging.disable(logging.WARNING)  # it advises preparing the graph, which torch's exporter has done
        try:
            # Of the types of activations the unsigned one is up to three times as fast, where there are residual sums.
            quantize_static(
                self.onnx, path, Images(), quant_format=QuantFormat.QDQ, per_channel=True,
                activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
                reduce_range=way_of_products() == "maddubs",  # whose sums of two products saturate at 16 bits
            )  # fmt: skip
        finally:
            logging.disable(logging.NOTSET)
        return path


def _require(package: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise Unavailable(f"the package {package} is not installed")


def _packed(network: Network) -> Opened:
    packed = load(network.packed)
    return Opened(packed, "sparse kernels", network.packed.stat().st_size, memory=lambda: packed.bytes_memory)


def _packed_int8(network: Network) -> Opened:
    packed, size = load(network.packed_int8), network.packed_int8.stat().st_size
    settings = f"sparse kernels on int8 weights and activations, {len(network.images)} images"
    return Opened(packed, settings, size, exact=False, memory=lambda: packed.bytes_memory)


def _torch(network: Network) -> Opened:
    held = _bytes(network.model)
    run = partial(run_torch, network.answer)
    return Opened(run, f"eager{network.settings}", held, network.exact, memory=lambda: held)


def _compiled(network: Network) -> Opened:
    run = partial(run_torch, torch.compile(network.answer))
    return Opened(run, f"Inductor, default mode{network.settings}", _bytes(network.model), network.exact)


def _bytes(model: nn.Module) -> int:
    return sum(t.numel() * t.element_size() for t in model.state_dict().values() if isinstance(t, Tensor))


def run_torch(model: Callable[[Tensor], Tensor], x: Floats) -> Floats:
    """Return a model's logits on images, both as numpy arrays."""
    with torch.no_grad():
        result: Floats = model(torch.from_numpy(x)).numpy()
    return result


def _onnxruntime(network: Network) -> Opened:
    _require("onnxruntime")
    return Opened(_session(network.onnx), "all optimisations", network.onnx.stat().st_size)


def _onnxruntime_int8(network: Network) -> Opened:
    path, weights = network.quantised, "int8 in 7 bits" if way_of_products() == "maddubs" else "int8"
    settings = f"static, QDQ, uint8 × {weights} per channel, {len(network.images)} images"
    return Opened(_session(path), settings, path.stat().st_size, exact=False)


def _session(path: Path) -> Callable[[Floats], Any]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return partial(run_session, session)


def _openvino(network: Network, *, precision: str) -> Opened:
    _require("openvino")
    import openvino

    path = network.quantised if precision == "int8" else network.onnx
    if not takes_any_number(path):
        raise Unavailable("torch exports this network for one image at a time")
    hint = "f32" if precision == "int8" else precision
    core = openvino.Core()
    if precision == "bf16" and "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        raise Unavailable("this processor has no bfloat16 instructions")
    given = {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": hint, "PERFORMANCE_HINT": "LATENCY"}
    compiled = core.compile_model(path, "CPU", given)
    settings = "the QDQ file of ONNX Runtime" if precision == "int8" else f"precision hint {precision}"
    return Opened(lambda x: compiled(x)[0], settings, path.stat().st_size, exact=precision == "f32")


ENGINES: Mapping[str, Callable[[Network], Opened]] = {
    "packed": _packed,
    "packed int8": _packed_int8,
    "torch": _torch,
    "torch.compile": _compiled,
    "onnxruntime": _onnxruntime,
    "onnxruntime int8": _onnxruntime_int8,
    "openvino": partial(_openvino, precision="f32"),
    "openvino bf16": partial(_openvino, precision="bf16"),
    "openvino int8": partial(_openvino, precision="int8"),
}


def open_engines(network: Network, names: tuple[str, ...]) -> Iterator[tuple[str, Opened | Unavailable]]:
    """Yield each engine by name with the network opened in it and run on one image, or why it is unavailable."""
    for name in names:
        try:
            found = ENGINES[name](network)
            with quiet():  # a compiler's warnings
                found.run(np.ascontiguousarray(network.images[:1].numpy()))
        except UserError as error:
            yield name, Unavailable(str(error))
        except Exception as error:  # another library's compiler, which can raise anything
            if name in ("packed", "torch"):
                raise
            yield name, Unavailable(f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:160]}")
        else:
            yield name, found
