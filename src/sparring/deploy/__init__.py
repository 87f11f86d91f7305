"""Deployment: export a sparse network to one small file, run it fast on a CPU, and attack it again.

Examples:
    >>> import torch
    >>> from sparring import deploy
    >>> net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 2)).eval()
    >>> packed, x = deploy.pack(net, shape=(1, 2, 2)), torch.rand(3, 1, 2, 2)
    >>> bool(torch.allclose(packed(x), net(x), atol=1e-5))
    True
"""

from __future__ import annotations

from ._artefact import write_program
from ._equivalent import Equivalent
from ._onnx import onnx_error, takes_any_number, to_onnx
from ._program import Program, multiplications, products
from ._runtime import Packed, export, load, pack
from ._ship import Shipped, ship_report
from ._torch_modules import PackedModule
from .rounding._calibrate import CALIBRATING
from .timing._bench import Bench, BenchRow, bench, over_dense, what_to_ship
from .timing._clock import Timing, interleaved, peak_flops

__all__ = [
    "CALIBRATING",
    "Bench",
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
    "over_dense",
    "pack",
    "peak_flops",
    "products",
    "ship_report",
    "takes_any_number",
    "to_onnx",
    "what_to_ship",
    "write_program",
]
