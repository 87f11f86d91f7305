"""Packed networks for callers: export, load, and an object that maps images to logits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, overload

import numpy as np
from scipy.sparse import csr_array
from torch import Tensor, from_numpy, nn

from ..errors import Unsupported, UserError
from ._artefact import read_program, round_program, write_program
from ._compile import compile_model
from ._dense import dense
from ._mixed import DENSITY, Mixed, Timed, is_dense, ways_of
from ._program import (
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
    Scale,
    Snap,
    Sparse,
)
from .kernels._engine import Engine
from .kernels._native import native_available

_FLOAT32 = np.dtype(np.float32)


class Packed:
    """A packed network: call it with images (N, *shape) in [0, 1] to get logits (N, classes)."""

    def __init__(self, program: Program, *, threads: int = 1, native: bool = True, timed: bool = False) -> None:
        """Take a program; `threads` share large batches; without `native` (or without llvmlite) numpy runs it.

        Operations without a sparse kernel, and layers that are too dense, run in torch: by a rule or, if `timed`, by
        speed.
        """
        if threads < 1:
            raise UserError(f"the number of threads must be at least 1, not {threads}")
        self.program = program
        self._engine = _engine(program, threads) if native and program.whole else None
        self._mixed = _mixed(program, threads, timed, self._engine) if native and native_available() else None
        # Small networks take as long as a few Python calls: single images have their own fast path.
        alone = self._engine if self._mixed is None else None
        self._run_one = self._run if alone is None else alone.run_one
        self._one = None if alone is None else (1, *program.shape)

    @overload
    def __call__(self, x: Tensor) -> Tensor: ...

    @overload
    def __call__(self, x: Floats) -> Floats: ...

    def __call__(self, x: Any) -> Any:
        """Return the logits of images, float32; numpy in, numpy out; torch in, torch out (no gradients).

        Raise UserError for images of another shape, and for whole numbers.
        """
        if type(x) is np.ndarray and x.dtype is _FLOAT32 and x.shape == self._one:
            try:
                return self._run_one(x)
            except (BufferError, ValueError):  # not contiguous: NumPy says so in two ways
                return self._run(x)
        if isinstance(x, Tensor):
            return from_numpy(self(x.detach().cpu().numpy()))
        return self._run(x)

    def _run(self, x: Any) -> Floats:
        if x.dtype.kind != "f":
            raise UserError(f"the network takes images as floats in [0, 1], not {x.dtype}; divide by 255")
        images: Floats = np.ascontiguousarray(x, np.float32)
        if images.shape[1:] != self.program.shape:
            raise UserError(f"the network takes images (N, {self.program.shape}), not {images.shape}")
        run = self._mixed or self._engine
        return run_reference(self.program, images) if run is None else run.run(images)

    def gradient(self, x: Tensor, upstream: Tensor) -> Tensor:
        """Return the gradient of sum(upstream · logits) at images x (N, *shape), for upstream (N, classes).

        For upstream (R, N, classes), return R gradients, (R, N, *shape), after one common forward pass. Raise
        Unsupported if `has_gradient` is false.
        """
        if self._engine is None:
            raise Unsupported("gradients need generated kernels; use deploy.PackedModule, which falls back to torch")
        images, given = (np.ascontiguousarray(t.detach().cpu().numpy(), np.float32) for t in (x, upstream))
        fits = given.ndim in (2, 3) and given.shape[-2:] == (len(images), self.program.classes)
        if images.shape[1:] != self.program.shape or not fits:
            raise UserError(f"images {images.shape} and gradients of logits {given.shape} do not match the network")
        found = self._engine.gradient(images, given if given.ndim == 3 else given[None])
        return from_numpy(found if given.ndim == 3 else found[0]).to(x)

    @cached_property
    def has_gradient(self) -> bool:
        """Return whether the kernels can compute gradients of this network."""
        if self._engine is None:
            return False
        try:
            self._engine.gradient(
                np.zeros((1, *self.program.shape), np.float32), np.zeros((1, 1, self.program.classes), np.float32)
            )
        except Unsupported:
            return False
        return True

    @property
    def bytes_memory(self) -> int | None:
        """Return the bytes of the network's tables and values in memory so far; None if NumPy runs it."""
        run = self._mixed or self._engine
        return None if run is None else run.bytes_memory

    @property
    def native(self) -> bool:
        """Return whether generated kernels run the network, rather than NumPy."""
        return (self._mixed or self._engine) is not None


def _engine(program: Program, threads: int) -> Engine | None:
    if not native_available():
        return None
    try:
        return Engine(program, threads=threads)
    except Unsupported:
        return None


def _mixed(program: Program, threads: int, timed: bool, engine: Engine | None) -> Mixed | Timed | None:
    """Return a runner of the program in parts, if that may be necessary or faster."""
    if engine is not None and not (timed and is_dense(program)):
        return None
    return Timed(ways_of(program, threads=threads, first=engine)) if timed else Mixed(program, DENSITY, threads=threads)


def pack(
    model: nn.Module,
    *,
    shape: tuple[int, ...],
    images: Tensor | None = None,
    values: str = "fp32",
    class_names: Sequence[str] | None = None,
    provenance: dict[str, Any] | None = None,
) -> Packed:
    """Pack a classifier in memory, as `export` followed by `load`; `shape` and `images` as there.

    How it runs depends on its weights only, not on timings, so that results are the same to the last bit.
    """
    names = None if class_names is None else tuple(class_names)
    program = compile_model(model, shape, images=images, class_names=names, provenance=provenance)
    if names is not None and len(names) != program.classes:
        raise UserError(f"{len(names)} class names for {program.classes} logits")
    return Packed(round_program(program, values))


def export(
    model: nn.Module,
    path: Path | str,
    *,
    shape: tuple[int, ...],
    images: Tensor | None = None,
    values: str = "fp32",
    class_names: Sequence[str] | None = None,
    provenance: dict[str, Any] | None = None,
) -> Path:
    """Write a classifier for images of `shape` as one artefact and return its path.

    images (N, *shape) in [0, 1]: a few real images, on which the artefact is compared with the model. `values` is the
    number format of the weights: "fp32" (exact), "fp16" or "int8" (one scale per output unit). `provenance` is any JSON
    object (study, cell, seed, hashes). Raises Unsupported for a network without a packed form, UserError for weights
    that are not finite, or too large for fp16.
    """
    packed = pack(model, shape=shape, images=images, values=values, class_names=class_names, provenance=provenance)
    return write_program(packed.program, path, values=values)


def load(path: Path | str, *, threads: int = 1, native: bool = True) -> Packed:
    """Load an artefact; it is untrusted, and a damaged or malicious one raises UserError.

    `threads` share large batches. Without `native`, or if no kernels can be generated, NumPy runs the network. Layers
    that are not sparse enough run dense in torch if this is faster; the first images of a batch size are timed.
    """
    try:
        return Packed(read_program(path), threads=threads, native=native, timed=True)
    except MemoryError as error:
        raise UserError(f"{path}: this network does not fit in memory") from error


def run_reference(program: Program, x: Floats) -> Floats:
    """Return the logits (N, classes) of images x (N, *shape), float32."""
    values = [x]
    for step in program.steps:
        values.append(_evaluate(step.op, *(values[i] for i in step.inputs)))
    return values[-1]


def _evaluate(op: Op, x: Floats, *others: Floats) -> Floats:
    match op:
        case Sparse(rows=True):
            return _sparse(replace(op, rows=False), x.reshape(-1, x.shape[-1])).reshape(*x.shape[:-1], -1)
        case Sparse():
            return _sparse(op, x)
        case Constant():
            return np.repeat(op.value[None], len(x), axis=0)
        case Dense():
            return dense(op, *(from_numpy(np.ascontiguousarray(value)) for value in (x, *others))).numpy()
        case Scale():
            channels = (1, -1, *[1] * (x.ndim - 2))
            return x * op.scale.reshape(channels) + op.shift.reshape(channels)
        case ReLU():
            return np.maximum(x, np.float32(0))
        case Pool():
            return _pool(op, x)
        case Flatten():
            return x.reshape(len(x), math.prod(x.shape[1:]))
        case Add():
            return x + others[0]
        case PackedActivation():
            return _activate(op, x)
        case Snap():
            centre, radius = (values.reshape(1, -1, *[1] * (x.ndim - 2)) for values in (op.centre, op.radius))
            return np.maximum(np.where(np.abs(x - centre) <= radius, centre, x), np.float32(0))


def _activate(op: PackedActivation, x: Floats) -> Floats:
    if op.kind == "shifted-relu":
        shifted: Floats = np.maximum(x - np.float32(op.number), np.float32(0))
        return shifted
    if op.kind == "threshold":
        return np.where(x > np.float32(op.number), x, np.float32(0))
    flat = x.reshape(len(x), -1)
    keep = op.kept(flat.shape[1])
    best = np.argsort(-flat, axis=1, kind="stable")[:, :keep]
    result = np.zeros_like(flat)
    np.put_along_axis(result, best, np.take_along_axis(np.maximum(flat, 0), best, axis=1), axis=1)
    return result.reshape(x.shape)


def _sparse(op: Sparse, x: Floats) -> Floats:
    out, width = op.shape[0], math.prod(op.shape[1:])
    weight = csr_array((op.values, op.indices, op.indptr), shape=(out, width))
    if x.ndim == 2:
        result: Floats = np.ascontiguousarray((weight @ np.ascontiguousarray(x.T)).T) + op.bias
        return result
    padded = np.pad(x, ((0, 0), (0, 0), *((p, p) for p in op.padding)))
    windows = _windows(padded, (op.shape[2], op.shape[3]), op.stride, op.dilation)  # (N, C, h, w, kh, kw)
    columns = windows.transpose(1, 4, 5, 0, 2, 3).reshape(width, -1)
    n, _, height, side = windows.shape[:4]
    product = (weight @ columns).reshape(out, n, height, side).transpose(1, 0, 2, 3)
    return np.ascontiguousarray(product) + op.bias[:, None, None]


def _pool(op: Pool, x: Floats) -> Floats:
    (bottom, right) = (_overhang(op, x.shape[axis + 2], axis) for axis in (0, 1))
    (top, left) = op.padding
    padded = np.pad(x, ((0, 0), (0, 0), (top, bottom), (left, right)), constant_values=np.float32(-np.inf))
    windows = _windows(padded, op.kernel, op.stride, op.dilation)
    result: Floats = windows.mean(axis=(4, 5), dtype=np.float32) if op.mean else windows.max(axis=(4, 5))
    return result


def _overhang(op: Pool, side: int, axis: int) -> int:
    """Return the padding after the image with which exactly the counted windows fit."""
    span = op.dilation[axis] * (op.kernel[axis] - 1) + 1
    padding, stride = op.padding[axis], op.stride[axis]
    if not op.ceil_mode:
        return padding
    count = -(-(side + 2 * padding - span) // stride) + 1
    count -= (count - 1) * stride >= side + padding
    return max(0, (count - 1) * stride + span - side - padding)


def _windows(x: Floats, kernel: tuple[int, int], stride: tuple[int, int], dilation: tuple[int, int]) -> Floats:
    """View x (N, C, H, W) as windows (N, C, h, w, kernel height, kernel width)."""
    span = (dilation[0] * (kernel[0] - 1) + 1, dilation[1] * (kernel[1] - 1) + 1)
    view = np.lib.stride_tricks.sliding_window_view(x, span, axis=(2, 3))
    result: Floats = view[:, :, :: stride[0], :: stride[1], :: dilation[0], :: dilation[1]]
    return result
