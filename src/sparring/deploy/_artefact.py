"""The artefact: one file with a packed program. docs/format.md describes its format.

Nothing in a file is executed, every number in it is checked before it is used, and a damaged file ends in a UserError.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, from_numpy

from ..errors import UserError
from ..files import canonical_json, read_bounded, write_atomic
from ._dense import function_of
from ._program import (
    ACTIVATION_KINDS,
    MOST_ELEMENTS,
    Add,
    Constant,
    Dense,
    Flatten,
    Floats,
    Op,
    PackedActivation,
    Pool,
    Program,
    ReLU,
    Rounding,
    Scale,
    Shape,
    Snap,
    Sparse,
    Step,
    infer_shapes,
    sparse_from_dense,
)
from .rounding._tasks import check_rounding

FORMAT = 3  # 2: without rounded activations; 1: without dense operations, constants and rows either
MAGIC = b"\x93sparring\r\n\x1a\n\0\0\0"  # 16 bytes; the line ends reveal a transfer in text mode
_ALIGN = 64
_DIGEST = 32
_MOST_BYTES = 1 << 30
_MOST_STEPS = 10_000
_MOST_INPUTS = 1_000
_MOST_SIDE = 1 << 16
_LEAST_SCALE = 1e-30
_MOST_WEIGHTS = 1 << 28  # of all layers together, so that many layers cannot share one blob


# -- writing ----------------------------------------------------------------------------------------------------------


def round_program(program: Program, values: str) -> Program:
    """Return the program with weights rounded to `values` ("fp32", "fp16" or "int8"); biases stay fp32."""
    if values not in VALUES:
        raise UserError(f"values must be one of {', '.join(VALUES)}, not {values!r}")
    return replace(program, steps=tuple(Step(_rounded(step.op, values), step.inputs) for step in program.steps))


def _rounded(op: Op, values: str) -> Op:
    if isinstance(op, Scale) and not (np.isfinite(op.scale).all() and np.isfinite(op.shift).all()):
        raise UserError("the model normalises by values that are NaN or infinite; it cannot be exported")
    if isinstance(op, Snap) and not (np.isfinite(op.centre).all() and np.isfinite(op.radius).all()):
        raise UserError("the model's activation sparsity has centres or radii that are NaN or infinite")
    if isinstance(op, Constant) and not np.isfinite(op.value).all():
        raise UserError("the model has constants that are NaN or infinite; it cannot be exported")
    if not isinstance(op, Sparse):
        return op
    if not np.isfinite(op.bias).all():
        raise UserError("the model has biases that are NaN or infinite; it cannot be exported")
    weight = round_values(op.dense(), values)
    return sparse_from_dense(weight, op.bias, stride=op.stride, padding=op.padding, dilation=op.dilation, rows=op.rows)


class _Blobs:
    """Collect byte strings at aligned places."""

    def __init__(self) -> None:
        self.data = bytearray()

    def add(self, data: bytes) -> list[int]:
        self.data += bytes(-len(self.data) % _ALIGN)
        self.data += data
        return [len(self.data) - len(data), len(data)]


def write_program(program: Program, path: Path | str, *, values: str) -> Path:
    """Write a program that `round_program` has rounded to `values` as an artefact, atomically."""
    blobs = _Blobs()
    header = {
        "format": FORMAT if program.rounding else 1 if program.whole else 2,
        "shape": list(program.shape),
        "values": values,
        "class_names": list(program.class_names) if program.class_names is not None else None,
        "provenance": program.provenance,
        "steps": [{"inputs": list(s.inputs)} | _describe(s.op, values, blobs) for s in program.steps],
    }
    if program.rounding:
        header["activations"] = [[value, told.scale, told.zero] for value, told in sorted(program.rounding.items())]
    text = canonical_json(header).encode()
    start = len(MAGIC) + 8 + len(text)
    body = MAGIC + len(text).to_bytes(8, "little") + text + bytes(-start % _ALIGN) + blobs.data
    return write_atomic(path, body + hashlib.sha256(body).digest())


def _describe(op: Op, values: str, blobs: _Blobs) -> dict[str, Any]:
    match op:
        case Sparse():
            return _describe_sparse(op, values, blobs)
        case Scale():
            both = np.concatenate([op.scale, op.shift]).astype("<f4").tobytes()
            return {"op": "scale", "channels": len(op.scale), "numbers": blobs.add(both)}
        case Snap():
            both = np.concatenate([op.centre, op.radius]).astype("<f4").tobytes()
            return {"op": "snap", "channels": len(op.centre), "numbers": blobs.add(both)}
        case Pool():
            fields = ("mean", "kernel", "stride", "padding", "dilation", "ceil_mode")
            return {"op": "pool"} | {name: getattr(op, name) for name in fields}
        case PackedActivation():
            return {"op": "activation", "kind": op.kind, "number": op.number}
        case Constant():
            return {"op": "constant", "value": _describe_option(from_numpy(op.value), blobs)}
        case Dense():
            options = {name: _describe_option(value, blobs) for name, value in op.options.items()}
            return {"op": "dense", "name": op.name, "names": list(op.names), "options": options, "place": op.place}
    return {"op": type(op).__name__.lower()}


def _describe_option(value: Any, blobs: _Blobs) -> Any:
    """Return an option of a dense operation as JSON; a dictionary encodes what JSON cannot express."""
    if isinstance(value, list | tuple):
        return [_describe_option(v, blobs) for v in value]
    if isinstance(value, torch.dtype):
        return {"type": str(value).removeprefix("torch.")}
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(value)}
    if not isinstance(value, Tensor):
        return value
    if not value.is_floating_point():
        whole = value.to(torch.int64).numpy().astype("<i8").tobytes()
        return {"integers": list(value.shape), "numbers": blobs.add(whole)}
    flat = value.numpy().ravel()
    positions = np.flatnonzero(flat)
    coding, index = encode_positions(positions, max(1, flat.size))
    kept = blobs.add(flat[positions].astype("<f4").tobytes())
    told = {"nonzeros": len(positions), "coding": coding, "index": blobs.add(index), "kept": kept}
    return {"floats": list(value.shape)} | told


def _describe_sparse(op: Sparse, values: str, blobs: _Blobs) -> dict[str, Any]:
    width = math.prod(op.shape[1:])
    rows = np.repeat(np.arange(op.shape[0]), np.diff(op.indptr))
    coding, index = encode_positions(rows * width + op.indices, op.shape[0] * width)
    return {
        "op": "sparse",
        "weight": list(op.shape),
        "stride": op.stride,
        "padding": op.padding,
        "dilation": op.dilation,
        **({"rows": True} if op.rows else {}),
        "nonzeros": op.nonzeros,
        "coding": coding,
        "index": blobs.add(index),
        "kept": blobs.add(encode_values(op.dense(), rows, op.values, values)),
        "bias": blobs.add(op.bias.astype("<f4").tobytes()),
    }


# -- reading ----------------------------------------------------------------------------------------------------------


def read_program(path: Path | str) -> Program:
    """Read an artefact; raise UserError, naming the file, if it is missing, damaged, hostile or of a newer format."""
    data = read_bounded(path, limit=_MOST_BYTES)
    try:
        return _parse(data)
    except UserError as error:
        raise UserError(f"{path}: {error}; export or download it again") from error


def _parse(data: bytes) -> Program:
    fixed = len(MAGIC) + 8
    if not data.startswith(MAGIC):
        raise UserError("this is not a sparring artefact")
    if len(data) < fixed + _DIGEST or hashlib.sha256(data[:-_DIGEST]).digest() != data[-_DIGEST:]:
        raise UserError("the artefact is damaged or truncated: its checksum is wrong")
    length = int.from_bytes(data[len(MAGIC) : fixed], "little")
    if length > len(data) - fixed - _DIGEST:
        raise UserError("the artefact is damaged: its header is longer than the file")
    try:
        header = json.loads(data[fixed : fixed + length], parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise UserError(f"the artefact's header is not JSON ({error})") from error
    start = fixed + length + -(fixed + length) % _ALIGN
    return _Reader(header, np.frombuffer(data, np.uint8)[start:-_DIGEST]).program()


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


class _Reader:
    """Read a header field by field, each with its type and range."""

    def __init__(self, header: Any, blobs: Bytes) -> None:
        self.header = header
        self.blobs = blobs
        self.weights = 0  # of the layers read so far, zeros counted

    def program(self) -> Program:
        header = self.header
        version = _field(header, "format", int)
        if not 1 <= version <= FORMAT:
            raise UserError(f"the artefact has format {version}, this version of sparring reads 1 to {FORMAT}")
        values = _field(header, "values", str)
        if values not in VALUES:
            raise UserError("the artefact has values of an unknown type")
        shape = self._sides(header, "shape", (1, 2, 3), 1)
        described = _field(header, "steps", list)
        if not 1 <= len(described) <= _MOST_STEPS:
            raise UserError(f"the artefact has {len(described)} steps")
        steps = tuple(Step(self._op(item, values), _inputs(item)) for item in described)
        shapes = infer_shapes(shape, steps)
        if sum(map(math.prod, shapes)) > MOST_ELEMENTS:
            raise UserError("the artefact's values for one image would not fit into memory")
        classes = shapes[-1][0]
        names = header.get("class_names")
        if names is not None and not (
            isinstance(names, list) and len(names) == classes and all(isinstance(n, str) for n in names)
        ):
            raise UserError("the artefact's class names do not match its logits")
        names = None if names is None else tuple(names)
        program = Program(shape, steps, names, _field(header, "provenance", dict))
        return program if version < FORMAT else self._rounded(program, values)

    def _rounded(self, program: Program, values: str) -> Program:
        """Return the program with the scales of its activations."""
        listed = _field(self.header, "activations", list)
        if values != "int8" or not 1 <= len(listed) <= len(program.steps):
            raise UserError("the artefact has no valid scales of activations")
        rounding = {}
        for item in listed:
            kinds = [type(part) for part in item] if isinstance(item, list) else []
            if kinds != [int, float, int] or not (_LEAST_SCALE <= item[1] <= 1 / _LEAST_SCALE and 0 <= item[2] < 256):
                raise UserError(f"the artefact has an activation scale of {str(item)[:40]}")
            rounding[item[0]] = Rounding(float(np.float32(item[1])), item[2])
        result = replace(program, rounding=rounding)
        check_rounding(result)  # refuses scales of other values than those that are rounded
        return result

    def _op(self, item: Any, values: str) -> Op:
        kind = _field(item, "op", str)
        plain: dict[str, Callable[[], Op]] = {"relu": ReLU, "flatten": Flatten, "add": Add}
        if kind in plain:
            return plain[kind]()
        if kind == "sparse":
            return self._sparse(item, values)
        if kind in ("scale", "snap"):
            channels = _field(item, "channels", int)
            if not 1 <= channels <= MOST_ELEMENTS:
                raise UserError(f"the artefact has a {kind} of {channels} channels")
            both = self._floats(item, "numbers", 2 * channels)
            return (Scale if kind == "scale" else Snap)(both[:channels], both[channels:])
        if kind == "pool":
            geometry = {name: self._pair(item, name, least) for name, least in _POOL_FIELDS}
            return Pool(_field(item, "mean", bool), ceil_mode=_field(item, "ceil_mode", bool), **geometry)
        if kind == "activation":
            which, number = _field(item, "kind", str), _field(item, "number", float)
            if which not in ACTIVATION_KINDS or not 0 <= number < (1 if which == "top-k" else math.inf):
                raise UserError(f"the artefact has an activation {which[:20]!r} with {number}")
            return PackedActivation(which, number)
        if kind == "constant":
            return Constant(self._constant(item))
        if kind == "dense":
            return self._dense(item)
        raise UserError(f"the artefact has an operation {kind[:20]!r} that this version does not know")

    def _sparse(self, item: Any, values: str) -> Sparse:
        out, channels, height, width = self._sides(item, "weight", (4,), 1)
        row = channels * height * width
        if out * row > MOST_ELEMENTS:
            raise UserError(f"the artefact has a layer of {out * row} weights, above the limit")
        bias = self._floats(item, "bias", out)  # first, so that `out` is no larger than the file
        count = _field(item, "nonzeros", int)
        flat = decode_positions(_field(item, "coding", str), self._blob(item, "index"), count, out * row)
        rows, indices = np.divmod(flat, row)
        indptr = np.zeros(out + 1, np.int32)
        np.cumsum(np.bincount(rows, minlength=out), out=indptr[1:])
        kept = decode_values(self._blob(item, "kept"), rows, out, values)
        stride, padding, dilation = (self._pair(item, name, least) for name, least in _LAYER_FIELDS)
        shape, over = (out, channels, height, width), item.get("rows", False) is True
        op = Sparse(shape, indptr, indices.astype(np.int32), kept, bias, stride, padding, dilation, over)
        self.weights += out * row // (1 if height == width == 1 else op.groups)  # what torch holds of it, if it runs it
        if self.weights > _MOST_WEIGHTS:
            raise UserError(f"the artefact has layers of {self.weights} weights, above the limit")
        return op

    def _constant(self, item: Any) -> Floats:
        value = self._option(item.get("value"))
        if not isinstance(value, Tensor) or not value.is_floating_point() or not value.dim():
            raise UserError("the artefact has an invalid constant")
        result: Floats = value.numpy()
        return result

    def _dense(self, item: Any) -> Dense:
        name, names, options = _field(item, "name", str), _field(item, "names", list), _field(item, "options", dict)
        place = item.get("place")
        if not all(isinstance(n, str) for n in names) or not (place is None or (type(place) is int and 0 <= place < 8)):
            raise UserError(f"the artefact has an operation {name[:20]!r} with invalid names of its inputs")
        function_of(name)  # it must be a known one
        return Dense(name, tuple(names), {key: self._option(value) for key, value in options.items()}, place)

    def _option(self, value: Any) -> Any:
        """Return an option of a dense operation; dictionaries are checked."""
        if isinstance(value, list) and len(value) <= _MOST_OPTIONS:
            return [self._option(v) for v in value]
        if not isinstance(value, dict | list):
            return value
        if isinstance(value, dict) and value.get("type") in _TYPES:
            return _TYPES[value["type"]]
        if isinstance(value, dict) and value.get("float") in ("inf", "-inf"):
            return float(value["float"])
        if not isinstance(value, dict) or not {"floats", "integers"} & set(value):
            raise UserError("the artefact has an operation with an invalid option")
        shape = self._sides(value, "floats" if "floats" in value else "integers", range(9), 0)
        count = math.prod(shape)
        self.weights += count
        if count > MOST_ELEMENTS or self.weights > _MOST_WEIGHTS:
            raise UserError(f"the artefact has a tensor of {count} numbers, above the limit")
        if "integers" in value:
            data = self._blob(value, "numbers")
            if len(data) != 8 * count:
                raise UserError("the artefact has integers of the wrong length")
            return from_numpy(data.view("<i8").astype(np.int64)).reshape(shape)
        found, numbers = _field(value, "nonzeros", int), np.zeros(max(1, count), np.float32)
        where = decode_positions(_field(value, "coding", str), self._blob(value, "index"), found, max(1, count))
        numbers[where] = self._floats(value, "kept", found)
        return from_numpy(numbers[:count]).reshape(shape)

    def _sides(self, item: Any, name: str, lengths: Sequence[int], least: int, most: int = MOST_ELEMENTS) -> Shape:
        sides = _field(item, name, list)
        if len(sides) not in lengths or not all(type(s) is int and least <= s <= most for s in sides):
            raise UserError(f"the artefact has a {name} of {str(sides)[:40]}")
        return tuple(sides)

    def _pair(self, item: Any, name: str, least: int) -> tuple[int, int]:
        first, second = self._sides(item, name, (2,), least)
        if max(first, second) > _MOST_SIDE:
            raise UserError(f"the artefact has a {name} of {first} × {second}")
        return first, second

    def _blob(self, item: Any, name: str) -> Bytes:
        start, length = self._sides(item, name, (2,), 0, _MOST_BYTES)
        if start + length > len(self.blobs):
            raise UserError("the artefact is damaged: a blob lies outside of the file")
        return self.blobs[start : start + length]

    def _floats(self, item: Any, name: str, count: int) -> Floats:
        data = self._blob(item, name)
        if len(data) != 4 * count:
            raise UserError(f"the artefact has a {name} of the wrong length")
        result = data.view("<f4").astype(np.float32)
        if not np.isfinite(result).all():
            raise UserError(f"the artefact has a {name} with NaN or infinite values")
        return result


_MOST_OPTIONS = 10_000
_TYPES = {"float32": torch.float32, "bool": torch.bool, "int64": torch.int64}
_LAYER_FIELDS = (("stride", 1), ("padding", 0), ("dilation", 1))
_POOL_FIELDS = (("kernel", 1), *_LAYER_FIELDS)


def _inputs(item: Any) -> tuple[int, ...]:
    inputs = _field(item, "inputs", list)
    if not 1 <= len(inputs) <= _MOST_INPUTS or not all(type(i) is int for i in inputs):
        raise UserError("the artefact has a step with invalid inputs")
    return tuple(inputs)


def _field(item: Any, name: str, kind: type) -> Any:
    if not isinstance(item, dict) or type(item.get(name)) is not kind:
        raise UserError(f"the artefact's header has no valid '{name}'")
    return item[name]


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
    """Return `count` ascending positions below `size`; raise UserError if the bytes encode anything else."""
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
        raise UserError(f"the artefact uses an unknown index coding {name[:20]!r}")
    if len(positions) != count or (count and not 0 <= positions[0] <= positions[-1] < size):
        raise UserError("the artefact is damaged: a layer's index does not match its shape")
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
        raise UserError("the artefact is damaged: an index is truncated")
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
    """Return a dense weight (out, ...) rounded to `values`: "fp32" exactly, "fp16", or "int8" with a scale per row.

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
    # Up to 16 bits, so that 127 · scale is exact: what is written and read again has the same scales.
    short: Floats = ((scale.view(np.int32) + 0xFF) & ~0xFF).view(np.float32)
    return np.where(short > 0, short, np.float32(1))


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
    """Return the kept values as float32; raise UserError if their number is wrong or one is not finite."""
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
