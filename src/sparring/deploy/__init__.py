"""Deployment: pack a sparse network into one small file, run it fast on a CPU, and attack what is shipped."""

from __future__ import annotations

from .benching import BenchRow, bench
from .differentiable import PackedModule
from .equivalent import Equivalent
from .onnx_graph import onnx_error, to_onnx
from .program import Program
from .runtime import Packed, export, load, pack
from .shipped import Shipped, compare_shipped
from .timing import Timing, interleaved, multiplications, peak_flops

__all__ = [
    "BenchRow",
    "Equivalent",
    "Packed",
    "PackedModule",
    "Program",
    "Shipped",
    "Timing",
    "bench",
    "compare_shipped",
    "export",
    "interleaved",
    "load",
    "multiplications",
    "onnx_error",
    "pack",
    "peak_flops",
    "to_onnx",
]
