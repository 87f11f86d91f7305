"""Deployment: pack a sparse network into one small file, run it fast on a CPU, and attack what is shipped."""

from __future__ import annotations

from .differentiable import PackedModule, run_torch
from .onnx_graph import to_onnx
from .program import Program
from .runtime import Packed, export, load, pack
from .timing import Timing, interleaved, multiplications, peak_flops

__all__ = [
    "Packed",
    "PackedModule",
    "Program",
    "Timing",
    "export",
    "interleaved",
    "load",
    "multiplications",
    "pack",
    "peak_flops",
    "run_torch",
    "to_onnx",
]
