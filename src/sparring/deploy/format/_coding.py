"""Codings of an artefact's numbers: where the nonzeros are, and what they are. Every decoder distrusts its input."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ...errors import UserError
from ._program import Floats

VALUES = ("fp32", "fp16", "int8")
_MOST_RICE_BITS = 30
Bytes = NDArray[np.uint8]
Positions = NDArray[np.int64]


# -- positions: ascending flat indices below `size` -----------------------------------------------------------------


def encode_positions(positions: Positions, size: int) -> tuple[str, bytes]:
    """Return the name and the bytes of the shortest coding of ascending positions below `size`."""
    gaps = np.diff(positions, prepend=-1) - 1
    candidates = {"all": b""} if len(positions) == size else {"bitmask": _bitmask(positions, size)}
    candidates["deltas"] = _deltas(gaps)
    mean = float(gaps.mean()) if len(gaps) else 0.0
    best = max(0, round(np.log2(0.69 * mean + 0.01)))
    for bits in {max(0, best - 1), best, best + 1}:
        candidates[f"rice-{bits}"] = _rice(gaps, bits)
    name = min(candidates, key=lambda key: len(candidates[key]))
    return name, candidates[name]


def decode_positions(name: str, data: Bytes, count: int, size: int) -> Positions:
    """Return `count` ascending positions below `size`; raise UserError where the bytes do not say that."""
    if not 0 <= count <= size:
        raise UserError(f"the artefact is damaged: {count} nonzeros among {size} weights")
    if name == "all":
        positions = np.arange(size, dtype=np.int64)
    elif name == "bitmask":
        if len(data) != (size + 7) // 8:
            raise UserError("the artefact is damaged: a bitmask has the wrong length")
        positions = np.flatnonzero(np.unpackbits(data, count=size, bitorder="little"))
    elif name == "deltas":
        positions = np.cumsum(_read_deltas(data) + 1) - 1
    elif name.startswith("rice-") and name[5:].isdecimal() and int(name[5:]) <= _MOST_RICE_BITS:
        positions = np.cumsum(_read_rice(data, int(name[5:]), count) + 1) - 1
    else:
        raise UserError(f"the artefact uses an index coding {name[:20]!r} that this version does not know")
    if len(positions) != count or (count and not 0 <= positions[0] <= positions[-1] < size):
        raise UserError("the artefact is damaged: a layer's index does not fit its shape")
    return positions.astype(np.int64, copy=False)


def _bitmask(positions: Positions, size: int) -> bytes:
    mask = np.zeros(size, bool)
    mask[positions] = True
    return np.packbits(mask, bitorder="little").tobytes()


def _deltas(gaps: Positions) -> bytes:
    """Code each gap as one byte; 255 means: skip 255 and read on."""
    skips = gaps // 255
    out = np.full(int(skips.sum()) + len(gaps), 255, np.uint8)
    out[np.cumsum(skips + 1) - 1] = gaps % 255
    return out.tobytes()


def _read_deltas(data: Bytes) -> Positions:
    if len(data) and data[-1] == 255:
        raise UserError("the artefact is damaged: an index ends inside a number")
    ends = np.flatnonzero(data != 255)
    skips = np.diff(ends, prepend=-1) - 1
    return skips * 255 + data[ends].astype(np.int64)


def _rice(gaps: Positions, bits: int) -> bytes:
    """Code gaps by Golomb and Rice: the low bits of all, then the quotients in unary, each closed by a one."""
    low = ((gaps[:, None] >> np.arange(bits)) & 1).astype(np.uint8).ravel()
    quotients = gaps >> bits
    unary = np.zeros(int(quotients.sum()) + len(gaps), np.uint8)
    unary[np.cumsum(quotients + 1) - 1] = 1
    return np.packbits(low, bitorder="little").tobytes() + np.packbits(unary, bitorder="little").tobytes()


def _read_rice(data: Bytes, bits: int, count: int) -> Positions:
    split = (count * bits + 7) // 8
    if len(data) < split:
        raise UserError("the artefact is damaged: an index is cut short")
    low = np.unpackbits(data[:split], count=count * bits, bitorder="little").reshape(count, bits)
    ends = np.flatnonzero(np.unpackbits(data[split:], bitorder="little"))
    if len(ends) != count:
        raise UserError("the artefact is damaged: an index has the wrong number of entries")
    result = (np.diff(ends, prepend=-1) - 1).astype(np.int64) << bits
    for bit in range(bits):
        result |= low[:, bit].astype(np.int64) << bit
    return result


# -- values -----------------------------------------------------------------------------------------------------------


def round_values(weight: Floats, values: str) -> Floats:
    """Return a dense weight (out, ...) as `values` can hold it: "fp32" exactly, "fp16", or "int8" with a scale per row.

    Raise UserError for weights that are not finite or that fp16 cannot hold.
    """
    if not np.isfinite(weight).all():
        raise UserError("the model has weights that are NaN or infinite; it cannot be exported")
    if values == "fp32":
        return weight
    if values == "fp16":
        if np.abs(weight).max(initial=0) > np.finfo(np.float16).max:
            raise UserError("the model has weights above 65504, which fp16 cannot hold; export it as fp32")
        return weight.astype(np.float16).astype(np.float32)
    scale = _scales(weight)
    result: Floats = np.rint(weight / scale).astype(np.float32) * scale
    return result


def _scales(weight: Floats) -> Floats:
    axes = tuple(range(1, weight.ndim))
    scale = (np.abs(weight).max(axis=axes, keepdims=True, initial=0) / 127).astype(np.float32)
    result: Floats = np.where(scale > 0, scale, np.float32(1))
    return result


def encode_values(weight: Floats, rows: NDArray[np.int64], kept: Floats, values: str) -> bytes:
    """Return the bytes of the kept values (row by row) of a weight that `round_values` has rounded."""
    if values == "fp32":
        return kept.astype("<f4").tobytes()
    if values == "fp16":
        return kept.astype("<f2").tobytes()
    scale = _scales(weight).reshape(-1)
    quotients: Floats = np.rint(kept / scale[rows])
    return scale.astype("<f4").tobytes() + quotients.astype(np.int8).tobytes()


def decode_values(data: Bytes, rows: NDArray[np.int64], row_count: int, values: str) -> Floats:
    """Return the kept values as float32; raise UserError where their number is wrong or one is not finite."""
    size = {"fp32": 4 * len(rows), "fp16": 2 * len(rows), "int8": 4 * row_count + len(rows)}[values]
    if len(data) != size:
        raise UserError("the artefact is damaged: a layer has the wrong number of values")
    result: Floats
    if values == "int8":
        scale = data[: 4 * row_count].view("<f4")
        result = data[4 * row_count :].view(np.int8).astype(np.float32) * scale[rows]
    else:
        result = data.view("<f4" if values == "fp32" else "<f2").astype(np.float32)
    if not np.isfinite(result).all():
        raise UserError("the artefact holds weights that are NaN or infinite")
    return result
