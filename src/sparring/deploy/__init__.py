"""Deployment: pack a sparse network into one small file, run it fast on a CPU, and attack what is shipped."""

from __future__ import annotations

from ._bench import BenchRow, Timing, bench, interleaved, multiplications, peak_flops
from ._equivalent import Equivalent
from ._onnx import onnx_error, to_onnx
from ._program import Program
from ._runtime import Packed, export, load, pack
from ._ship import Shipped, ship_report
from ._torch_modules import PackedModule

__all__ = [
    "BenchRow",
    "Equivalent",
    "Packed",
    "PackedModule",
    "Program",
    "Shipped",
    "Timing",
    "bench",
    "export",
    "interleaved",
    "load",
    "multiplications",
    "onnx_error",
    "pack",
    "peak_flops",
    "ship_report",
    "to_onnx",
]
