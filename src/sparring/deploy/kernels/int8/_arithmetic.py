"""Integer arithmetic of kernels: products of four bytes, rounding, and packing four rows into bytes."""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from .._llvm_ir import BYTE, FLOAT, INT32, Kernel, Value

# How four products are summed: "vnni" by one instruction, "maddubs" by two, the first of which saturates at 16 bits (so
# `split` keeps sums below that), "plain" by shifts, on any processor.
VNNI, MADDUBS, PLAIN = "vnni", "maddubs", "plain"
_HALF = ir.IntType(16)
_MAGIC, _MAGIC_BITS = 12582912.0, 0x4B400000  # 1.5 · 2^23: added to a float below 2^22, it leaves its nearest integer
_FAR = float(1 << 20)  # to which floats are clamped: beyond every byte, and within what `_MAGIC` rounds


def quads(lanes: int) -> Any:
    """Return the type of `lanes` 32-bit integers, of four bytes each; one is a plain integer."""
    return INT32 if lanes == 1 else ir.VectorType(INT32, lanes)


def lanes_of(value: Value) -> int:
    return int(getattr(value.type, "count", 1))


def constant(value: int, lanes: int) -> Value:
    """Return an integer in every lane."""
    return ir.Constant(INT32, value) if lanes == 1 else ir.Constant(quads(lanes), [value] * lanes)


def call(k: Kernel, name: str, result: Any, *arguments: Value) -> Value:
    """Call one of LLVM's intrinsics."""
    module, kind = k.function.module, ir.FunctionType(result, [a.type for a in arguments])
    function = module.globals.get(name) or ir.Function(module, kind, name)
    return k.b.call(function, arguments)


def dot(k: Kernel, way: str, total: Value, value: Value, weight: Value) -> Value:
    """Return total + the sum of four products in each lane: of unsigned bytes of `value`, signed ones of `weight`."""
    lanes, b = lanes_of(total), k.b
    if lanes == 1 and way != PLAIN:
        wide = [b.insert_element(ir.Constant(quads(4), None), v, ir.Constant(INT32, 0)) for v in (total, value, weight)]
        return b.extract_element(dot(k, way, *wide), ir.Constant(INT32, 0))
    if way == VNNI:
        return call(k, f"llvm.x86.avx512.vpdpbusd.{32 * lanes}", total.type, total, value, weight)
    if way == MADDUBS:
        first, second = {
            16: ("llvm.x86.avx512.pmaddubs.w.512", "llvm.x86.avx512.pmaddw.d.512"),
            8: ("llvm.x86.avx2.pmadd.ub.sw", "llvm.x86.avx2.pmadd.wd"),
            4: ("llvm.x86.ssse3.pmadd.ub.sw.128", "llvm.x86.sse2.pmadd.wd"),
        }[lanes]
        bytes_, halves = ir.VectorType(BYTE, 4 * lanes), ir.VectorType(_HALF, 2 * lanes)
        sums = call(k, first, halves, b.bitcast(value, bytes_), b.bitcast(weight, bytes_))
        return b.add(total, call(k, second, total.type, sums, ir.Constant(halves, [1] * (2 * lanes))))
    for byte in range(4):
        signed = b.ashr(b.shl(weight, constant(24 - 8 * byte, lanes)), constant(24, lanes))
        total = b.add(total, b.mul(byte_of(k, value, byte), signed))
    return total


def byte_of(k: Kernel, value: Value, byte: int) -> Value:
    """Return one of the four bytes in each lane, unsigned."""
    lanes = lanes_of(value)
    return k.b.and_(k.b.lshr(value, constant(8 * byte, lanes)), constant(255, lanes))


def clamped(k: Kernel, value: Value, low: int, high: int) -> Value:
    """Return integers, none below `low` or above `high`."""
    for sign, limit in ((">", low), ("<", high)):
        bound = constant(limit, lanes_of(value))
        value = k.b.select(k.b.icmp_signed(sign, value, bound), value, bound)
    return value


def floats(k: Kernel, value: Value) -> Value:
    """Return signed integers as floats."""
    return k.b.sitofp(value, FLOAT if lanes_of(value) == 1 else ir.VectorType(FLOAT, lanes_of(value)))


def rounded(k: Kernel, way: str, value: Value, *, far: bool) -> Value:
    """Return floats as the nearest integers, of two the even one; `far`: they may be beyond 31 bits, and are clamped.

    What lies beyond a byte may come out as any integer beyond it on the same side.
    """
    lanes, b = lanes_of(value), k.b
    packs = packed_lanes(way, lanes)
    if far or not packs:
        for sign, limit in (("<", _FAR), (">", -_FAR)):
            bound = k.splat(ir.Constant(FLOAT, limit), lanes)
            value = b.select(b.fcmp_ordered(sign, value, bound), value, bound)
    if not packs:
        moved = b.fadd(value, k.splat(ir.Constant(FLOAT, _MAGIC), lanes))
        return b.sub(b.bitcast(moved, quads(lanes)), constant(_MAGIC_BITS, lanes))
    if lanes == 16:
        name, mask = "llvm.x86.avx512.mask.cvtps2dq.512", ir.Constant(_HALF, -1)
        return call(k, name, quads(16), value, ir.Constant(quads(16), None), mask, ir.Constant(INT32, 4))
    return call(k, {8: "llvm.x86.avx.cvt.ps2dq.256", 4: "llvm.x86.sse2.cvtps2dq"}[lanes], quads(lanes), value)


def kept(k: Kernel, way: str, value: Value) -> Value:
    """Return a vector as it is, computed here: LLVM would put it off to where it is used, and keep more registers."""
    if not packed_lanes(way, lanes_of(value)):
        return value
    same = ir.FunctionType(value.type, [value.type])
    return k.b.asm(same, "", "=x,0" if lanes_of(value) < 16 else "=v,0", [value], side_effect=True)


def packed_lanes(way: str, lanes: int) -> bool:
    """Return whether the processor rounds and packs vectors of so many lanes by instructions of its own."""
    return way != PLAIN and lanes in (4, 8, 16)


def pair(k: Kernel, way: str, first: Value, second: Value) -> Value:
    """Return the integers of two rows, clamped to 16 bits (or to bytes), in the form that `quad` takes."""
    lanes = lanes_of(first)
    if packed_lanes(way, lanes):
        name = {16: "avx512.packssdw.512", 8: "avx2.packssdw", 4: "sse2.packssdw.128"}[lanes]
        return call(k, f"llvm.x86.{name}", ir.VectorType(_HALF, 2 * lanes), first, second)
    low, high = (clamped(k, value, 0, 255) for value in (first, second))
    return k.b.or_(low, k.b.shl(high, constant(8, lanes)))


def quad(k: Kernel, way: str, first: Value, second: Value, lanes: int) -> Value:
    """Return two pairs of rows, clamped to bytes, side by side in each lane."""
    if not packed_lanes(way, lanes):
        return k.b.or_(first, k.b.shl(second, constant(16, lanes)))
    name = {16: "avx512.packuswb.512", 8: "avx2.packuswb", 4: "sse2.packuswb.128"}[lanes]
    rows = call(k, f"llvm.x86.{name}", ir.VectorType(BYTE, 4 * lanes), first, second)
    # In each 128 bits lie four lanes of the first row, then of the second, third and fourth.
    order = [16 * part + 4 * row + lane for part in range(lanes // 4) for lane in range(4) for row in range(4)]
    return k.b.bitcast(k.shuffle(rows, rows, order), quads(lanes))
