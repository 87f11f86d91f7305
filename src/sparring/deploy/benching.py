"""Latency, throughput and bytes of one network in every engine that is installed, side by side on one core."""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ..errors import UserError
from .onnx_graph import to_onnx
from .program import Floats
from .runtime import Packed, export, load
from .timing import interleaved, multiplications, peak_flops

__all__ = ["BenchRow", "bench"]


@dataclass(frozen=True)
class BenchRow:
    """One engine at one batch size: milliseconds of a call (median, quartiles over rounds), and its bytes.

    `floor` is the milliseconds that the nonzero products alone would take at the measured peak. `joules` of a call and
    `bytes_memory` are None where nothing tells; `logit_error` is against torch, over the largest logit.
    """

    engine: str
    batch: int
    milliseconds: float
    low: float
    high: float
    images_per_second: float
    floor: float
    joules: float | None
    bytes_disk: int
    bytes_memory: int | None
    logit_error: float


@dataclass(frozen=True)
class _Engine:
    name: str
    run: Callable[[Floats], Any]
    bytes_disk: int
    bytes_memory: int | None = None


def bench(
    model: nn.Module,
    *,
    shape: tuple[int, ...],
    batches: Sequence[int] = (1, 64, 256),
    rounds: int = 30,
    small: nn.Module | None = None,
) -> list[BenchRow]:
    """Time a sparse classifier for images of `shape`, packed and in other engines, interleaved, on one thread.

    Engines: packed, torch, and where installed ONNX Runtime in fp32 and int8 and OpenVINO. `small` is a dense network
    of about equal accuracy, the honest alternative, timed in the same engines. Raise UserError for empty batches.
    """
    if not batches or min(batches) < 1 or rounds < 1:
        raise UserError("a benchmark needs batch sizes and rounds of at least 1")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory() as folder:
            packed, engines = _engines(model, shape, Path(folder), "")
            if small is not None:
                engines += _engines(small, shape, Path(folder), "small dense, ")[1]
            return [row for batch in batches for row in _rows(model, packed, engines, shape, batch, rounds)]
    finally:
        torch.set_num_threads(threads)


def _rows(
    model: nn.Module, packed: Packed, engines: list[_Engine], shape: tuple[int, ...], batch: int, rounds: int
) -> list[BenchRow]:
    x = np.random.default_rng(batch).random((batch, *shape), np.float32)
    with torch.no_grad():
        expected = model.eval()(torch.from_numpy(x)).numpy()
    floor = 2e3 * batch * multiplications(packed.program) / peak_flops()
    timings = interleaved([partial(engine.run, x) for engine in engines], rounds=rounds)
    return [
        BenchRow(
            engine.name,
            batch,
            timing.median * 1e3,
            timing.low * 1e3,
            timing.high * 1e3,
            batch / timing.median,
            floor,
            timing.joules,
            engine.bytes_disk,
            engine.bytes_memory,
            float(np.abs(np.asarray(engine.run(x)) - expected).max() / max(1e-30, np.abs(expected).max())),
        )
        for engine, timing in zip(engines, timings, strict=True)
    ]


def _engines(model: nn.Module, shape: tuple[int, ...], folder: Path, prefix: str) -> tuple[Packed, list[_Engine]]:
    """Return the packed network and all engines for it; files go to a folder."""
    stem = folder / (prefix or "net").replace(", ", "").replace(" ", "-")
    path = export(model, stem.with_suffix(".sparring"), shape=shape)
    packed = load(path)
    packed(np.zeros((1, *shape), np.float32))
    parameters = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    engines = [
        _Engine(f"{prefix}packed", packed, path.stat().st_size, packed.bytes_memory),
        _Engine(f"{prefix}torch", partial(_run_torch, model.eval()), parameters, parameters),
    ]
    if importlib.util.find_spec("onnx") is not None:
        onnx = to_onnx(model, stem.with_suffix(".onnx"), shape=shape)
        if importlib.util.find_spec("onnxruntime") is not None:
            engines += _onnxruntime(onnx, prefix)
        if importlib.util.find_spec("openvino") is not None:
            engines.append(_openvino(onnx, prefix))
    return packed, engines


def _run_torch(model: nn.Module, x: Floats) -> Floats:
    with torch.no_grad():
        result: Floats = model(torch.from_numpy(x)).numpy()
    return result


def _onnxruntime(path: Path, prefix: str) -> list[_Engine]:
    import onnxruntime
    from onnxruntime.quantization import quantize_dynamic

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    small = path.with_suffix(".int8.onnx")
    quantize_dynamic(path, small)
    engines = []
    for name, file in (("onnxruntime fp32", path), ("onnxruntime int8", small)):
        session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        engines.append(_Engine(f"{prefix}{name}", partial(_run_session, session), file.stat().st_size))
    return engines


def _run_session(session: Any, x: Floats) -> Any:
    return session.run(None, {"images": x})[0]


def _openvino(path: Path, prefix: str) -> _Engine:
    import openvino

    compiled = openvino.Core().compile_model(path, "CPU", {"INFERENCE_NUM_THREADS": 1})
    return _Engine(f"{prefix}openvino", lambda x: compiled(x)[0], path.stat().st_size)
