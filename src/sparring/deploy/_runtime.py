"""Packed networks for callers: export, load, and one object that maps images to logits."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, overload

import numpy as np
from torch import Tensor, from_numpy, nn

from ..errors import Unsupported, UserError
from ._numpy_reference import run_reference
from .format._artefact import read_program, round_program, write_program
from .format._compile import compile_model
from .format._program import Floats, Program
from .kernels._engine import Engine
from .kernels._native import native_available

_FLOAT32 = np.dtype(np.float32)


class Packed:
    """A packed network: call it with images (N, *shape) in [0, 1] to get logits (N, classes)."""

    def __init__(self, program: Program, *, threads: int = 1, native: bool = True) -> None:
        """Take a program; `threads` share large batches; without `native` (or without llvmlite) numpy runs it."""
        if threads < 1:
            raise UserError(f"a network runs on one thread or more, not on {threads}")
        self.program = program
        self._engine = _engine(program, threads) if native else None
        # Small networks take as long as a few Python calls: one image has a way of its own.
        self._run_one = self._run if self._engine is None else self._engine.run_one
        self._one = (1, *program.shape) if self._engine is not None else None

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
            except (BufferError, ValueError):  # not contiguous: numpy has said so in both ways
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
        return run_reference(self.program, images) if self._engine is None else self._engine.run(images)

    def gradient(self, x: Tensor, upstream: Tensor) -> Tensor:
        """Return the gradient of sum(upstream · logits) at images x (N, *shape), for upstream (N, classes).

        For upstream (R, N, classes) return R of them, (R, N, *shape), after one forward pass for all. Raise Unsupported
        where `has_gradient` is false.
        """
        if self._engine is None:
            raise Unsupported("gradients need generated kernels; use deploy.PackedModule, which falls back to torch")
        images, given = (np.ascontiguousarray(t.detach().cpu().numpy(), np.float32) for t in (x, upstream))
        fits = given.ndim in (2, 3) and given.shape[-2:] == (len(images), self.program.classes)
        if images.shape[1:] != self.program.shape or not fits:
            raise UserError(f"images {images.shape} and gradients of logits {given.shape} do not fit the network")
        found = self._engine.gradient(images, given if given.ndim == 3 else given[None])
        return from_numpy(found if given.ndim == 3 else found[0]).to(x)

    @cached_property
    def has_gradient(self) -> bool:
        """Tell whether the kernels can compute gradients of this network."""
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
        """Return the bytes that the network's tables and values take in memory so far; None where numpy runs it."""
        return None if self._engine is None else self._engine.bytes_memory

    @property
    def native(self) -> bool:
        """Tell whether generated kernels run it, rather than numpy."""
        return self._engine is not None


def _engine(program: Program, threads: int) -> Engine | None:
    if not native_available():
        return None
    try:
        return Engine(program, threads=threads)
    except Unsupported:
        return None


def pack(
    model: nn.Module,
    *,
    shape: tuple[int, ...],
    images: Tensor | None = None,
    values: str = "fp32",
    class_names: Sequence[str] | None = None,
    provenance: dict[str, Any] | None = None,
) -> Packed:
    """Pack a classifier in memory, exactly as `export` then `load` would; `shape` and `images` as there."""
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
    """Write a classifier for images of `shape` as one packed artefact and return its path.

    images (N, *shape) in [0, 1]: a few of those at hand, on which what is packed is compared with the model.
    `values` is how weights are stored: "fp32" (exact), "fp16" or "int8" (a scale per output unit). `provenance` is
    any JSON object (study, cell, seed, hashes). Raise Unsupported for a network without a packed form, UserError for
    weights that are not finite, or that fp16 cannot hold.
    """
    packed = pack(model, shape=shape, images=images, values=values, class_names=class_names, provenance=provenance)
    return write_program(packed.program, path, values=values)


def load(path: Path | str, *, threads: int = 1, native: bool = True) -> Packed:
    """Open an artefact, from whomever it comes; raise UserError, never more, if it is damaged or hostile.

    `threads` share large batches; without `native`, or where no kernels can be generated, numpy runs the network.
    """
    try:
        return Packed(read_program(path), threads=threads, native=native)
    except MemoryError as error:
        raise UserError(f"{path}: this network does not fit into memory") from error
