"""The peak speed of one core: fused multiply-adds on registers only."""

from __future__ import annotations

import ctypes
import math
import time

from ..kernels._native import Code, host_lanes

_CHAINS = 12  # independent sums: enough to keep two units with a latency of five busy, fewer than 16 registers
_TURNS = 20_000
_ROUNDS = 200  # rounds of about 0.1 ms, so that many are not interrupted


def register_flops() -> float:
    """Return the floating-point operations per second of fused multiply-adds on registers, the best of many rounds."""
    code = Code()
    code.add(f"register peak 2, {host_lanes()} lanes", _module, ["peak"])
    peak = ctypes.CFUNCTYPE(ctypes.c_float, ctypes.c_int64)(code["peak"])
    best = math.inf
    for _ in range(_ROUNDS):
        start = time.perf_counter()
        peak(_TURNS)
        best = min(best, time.perf_counter() - start)
    return 2.0 * _CHAINS * host_lanes() * _TURNS / best


def _module() -> str:
    """Return LLVM IR: in each turn every sum s becomes s · s + s, which the compiler cannot optimise away."""
    kind = f"<{host_lanes()} x float>"
    chains = range(_CHAINS)
    phis = "\n".join(f"  %s{i} = phi {kind} [zeroinitializer, %entry], [%t{i}, %loop]" for i in chains)
    product = f"fmul contract {kind}"  # product and sum become one instruction if the host has one
    fused = "\n".join(f"  %p{i} = {product} %s{i}, %s{i}\n  %t{i} = fadd contract {kind} %p{i}, %s{i}" for i in chains)
    sums = "\n".join(f"  %u{i + 1} = fadd {kind} %u{i}, %t{i}" for i in chains)
    return f"""
define float @peak(i64 %turns) {{
entry:
  br label %loop
loop:
  %n = phi i64 [0, %entry], [%next, %loop]
{phis}
{fused}
  %next = add i64 %n, 1
  %more = icmp slt i64 %next, %turns
  br i1 %more, label %loop, label %done
done:
  %u0 = fadd {kind} zeroinitializer, zeroinitializer
{sums}
  %r = extractelement {kind} %u{_CHAINS}, i32 0
  ret float %r
}}
"""
