"""Latency, throughput and bytes of one network in every engine that is installed, side by side on one core."""

from __future__ import annotations

import importlib.util
import logging
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ..errors import Unsupported, UserError
from ..modes import eval_mode
from ..outputs import opened
from ._onnx import to_onnx
from ._program import Floats, Program, Sparse
from ._runtime import export, load


@dataclass(frozen=True)
class BenchRow:
    """One engine at one batch size: milliseconds of a call (median, quartiles over rounds), and its bytes.

    `floor` is the milliseconds that the network's nonzero products alone would take at the measured peak. `joules` of a
    call and `bytes_memory` are None where nothing tells; `logit_error` is against the same network in torch, over the
    largest logit.
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


_Named = tuple[str, Callable[[Floats], Any], int, Callable[[], int | None]]


@dataclass(frozen=True)
class _Engine:
    name: str
    run: Callable[[Floats], Any]
    model: nn.Module
    products: int
    bytes_disk: int
    bytes_memory: Callable[[], int | None] = lambda: None


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
    with tempfile.TemporaryDirectory() as folder, _one_core(), eval_mode(model), eval_mode(small or model):
        engines = _engines(model, shape, Path(folder), "")
        if small is not None:
            engines += _engines(small, shape, Path(folder), "small dense, ")
        return [row for batch in batches for row in _rows(engines, shape, batch, rounds)]


@contextmanager
def _one_core() -> Iterator[None]:
    """Hold this process, and threads that start meanwhile, on one core where the system lets it."""
    threads, cores = torch.get_num_threads(), None
    if hasattr(os, "sched_setaffinity"):
        cores = os.sched_getaffinity(0)
        os.sched_setaffinity(0, {max(cores)})
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        if cores is not None:
            os.sched_setaffinity(0, cores)


def _rows(engines: list[_Engine], shape: tuple[int, ...], batch: int, rounds: int) -> list[BenchRow]:
    x = np.random.default_rng(batch).random((batch, *shape), np.float32)
    timings = interleaved([partial(engine.run, x) for engine in engines], rounds=rounds)
    rows = []
    for engine, timing in zip(engines, timings, strict=True):
        found, expected = np.asarray(engine.run(x)), _run_torch(engine.model, x)
        row = BenchRow(
            engine.name,
            batch,
            timing.median * 1e3,
            timing.low * 1e3,
            timing.high * 1e3,
            batch / timing.median,
            2e3 * batch * engine.products / peak_flops(),
            timing.joules,
            engine.bytes_disk,
            engine.bytes_memory(),
            float(np.abs(found - expected).max() / max(1e-30, np.abs(expected).max())),
        )
        rows.append(row)
    return rows


def _engines(model: nn.Module, shape: tuple[int, ...], folder: Path, prefix: str) -> list[_Engine]:
    """Return all engines for a network; files go to a folder."""
    stem = folder / (prefix or "net").replace(", ", "").replace(" ", "-")
    path = export(model, stem.with_suffix(".sparring"), shape=shape)
    packed = load(path)
    products, answer = multiplications(packed.program), opened(model, torch.rand(2, *shape))
    parameters = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    runs: list[_Named] = [
        ("packed", packed, path.stat().st_size, lambda: packed.bytes_memory),
        ("torch", partial(_run_torch, answer), parameters, lambda: parameters),
    ]
    if importlib.util.find_spec("onnx") is not None:
        runs += _open_engines(model, shape, stem)
    return [_Engine(prefix + name, run, answer, products, size, memory) for name, run, size, memory in runs]


def _open_engines(model: nn.Module, shape: tuple[int, ...], stem: Path) -> Iterator[_Named]:
    """Yield name, function, bytes on disk and in memory of engines for ONNX; none for a network that it cannot hold."""
    try:
        onnx = to_onnx(model, stem.with_suffix(".onnx"), shape=shape)
    except Unsupported:
        return
    if importlib.util.find_spec("onnxruntime") is not None:
        yield from ((name, run, size, lambda: None) for name, run, size in _onnxruntime(onnx))
    if importlib.util.find_spec("openvino") is not None:
        yield "openvino", _openvino(onnx), onnx.stat().st_size, lambda: None


def _run_torch(model: nn.Module, x: Floats) -> Floats:
    with torch.no_grad():
        result: Floats = model(torch.from_numpy(x)).numpy()
    return result


def _onnxruntime(path: Path) -> Iterator[tuple[str, Callable[[Floats], Any], int]]:
    """Yield name, function and bytes on disk of ONNX Runtime in fp32 and with weights in int8."""
    import onnxruntime
    from onnxruntime.quantization import quantize_dynamic

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    small = path.with_suffix(".int8.onnx")
    logging.disable(logging.WARNING)  # it advises to prepare the graph, which is as small as it gets
    try:
        quantize_dynamic(path, small)
    finally:
        logging.disable(logging.NOTSET)
    for name, file in (("onnxruntime fp32", path), ("onnxruntime int8", small)):
        session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        yield name, partial(_run_session, session), file.stat().st_size


def _run_session(session: Any, x: Floats) -> Any:
    return session.run(None, {"images": x})[0]


def _openvino(path: Path) -> Callable[[Floats], Any]:
    import openvino

    compiled = openvino.Core().compile_model(path, "CPU", {"INFERENCE_NUM_THREADS": 1})
    return lambda x: compiled(x)[0]


_SHORTEST = 1e-3  # seconds of a round: what is shorter is repeated
_ENERGY = Path("/sys/class/powercap")


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: median and quartiles over rounds; joules of one call, None where nothing counts them."""

    median: float
    low: float
    high: float
    joules: float | None = None


def interleaved(functions: Sequence[Callable[[], object]], *, rounds: int = 60) -> list[Timing]:
    """Time functions in turns, so that what else the machine does falls on all of them."""
    repeats = [_repeats(function) for function in functions]
    seconds = np.zeros((len(functions), rounds))
    joules = np.full((len(functions), rounds), np.nan)
    for turn in range(rounds):
        for number, (function, repeat) in enumerate(zip(functions, repeats, strict=True)):
            energy, start = _energy(), time.perf_counter()
            for _ in range(repeat):
                function()
            seconds[number, turn] = (time.perf_counter() - start) / repeat
            after = _energy()
            if energy is not None and after is not None and after > energy:
                joules[number, turn] = (after - energy) / repeat
    spent = [float(np.nanmedian(row)) if np.isfinite(row).any() else None for row in joules]
    low, median, high = np.quantile(seconds, [0.25, 0.5, 0.75], axis=1)
    return [Timing(float(m), float(a), float(b), j) for m, a, b, j in zip(median, low, high, spent, strict=True)]


def _repeats(function: Callable[[], object]) -> int:
    function()
    start = time.perf_counter()
    function()
    return max(1, math.ceil(_SHORTEST / max(1e-7, time.perf_counter() - start)))


def _energy() -> float | None:
    """Return the joules that the processor's packages have counted, or None where the machine does not tell."""
    try:
        counters = _ENERGY.glob("intel-rapl:[0-9]")
        values = [int((counter / "energy_uj").read_text()) for counter in counters]
    except (OSError, ValueError):
        return None
    return sum(values) / 1e6 if values else None


def multiplications(program: Program) -> int:
    """Return how many products of a nonzero weight and an input one image needs."""
    shapes = program.shapes
    layers = [(step.op, shapes[number + 1]) for number, step in enumerate(program.steps)]
    return sum(op.nonzeros * math.prod(shape) // op.shape[0] for op, shape in layers if isinstance(op, Sparse))


@cache
def peak_flops() -> float:
    """Measure the floating-point operations per second of one core at its best: a product of two matrices."""
    side, best = 384, math.inf
    a = np.ones((side, side), np.float32)
    for _ in range(100):  # short, so that some rounds are not interrupted
        start = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - start)
    return 2 * side**3 / best
