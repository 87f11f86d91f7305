"""Packed networks for callers: export, load, and an object that maps images to logits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, overload

import numpy as np
from torch import Tensor, from_numpy, nn

from ..errors import Unsupported, UserError
from ..waiting import courteous
from ._artefact import read_program, round_program, write_program
from ._compile import compile_model
from ._mixed import DENSITY, Mixed, Timed, is_dense, ways_of
from ._program import Floats, Program, products
from ._reference import run_reference
from .kernels._engine import Engine, no_answer
from .kernels._native import native_available
from .rounding._calibrate import calibrate as calibrated
from .rounding._reference import run_rounded

_STEPS = 3  # of packing: compile the network, round it, and plan how it runs


class Packed:
    """A packed network: call it with images (N, *shape) in [0, 1] to get logits (N, classes)."""

    def __init__(
        self, program: Program, *, threads: int = 1, native: bool = True, timed: bool = False, dense: bool = False
    ) -> None:
        """Take a program; `threads` share large batches; without `native` (or without llvmlite) numpy runs it.

        Operations without a sparse kernel run in torch, and layers that are too dense do by speed if `timed`, or by a
        rule if `dense`.
        """
        if threads < 1:
            raise UserError(f"the number of threads must be at least 1, not {threads}")
        self.program = program
        kept, full = products(program)
        self.favours_torch = (timed or dense) and kept > DENSITY * full  # for gradients, if speed may decide
        # Gradients are those of the network whose weights alone are rounded.
        self._engine = _engine(replace(program, rounding={}), threads, timed) if native and program.whole else None
        self._mixed = _mixed(program, threads, timed, dense, self._engine) if native and native_available() else None
        self._runner = self._mixed or (None if program.rounding else self._engine)
        self._answer: Callable[[object], Floats | None] = no_answer  # of one image, after the first one

    @overload
    def __call__(self, x: Tensor) -> Tensor: ...

    @overload
    def __call__(self, x: Floats) -> Floats: ...

    def __call__(self, x: Any) -> Any:
        """Return the logits of images, float32; numpy in, numpy out; torch in, torch out (no gradients).

        Raise UserError for images of another shape, and for whole numbers.
        """
        answer = self._answer(x)
        if answer is not None:
            return answer
        if isinstance(x, Tensor):
            return from_numpy(self(x.detach().cpu().numpy()))
        return self._run(x)

    def _run(self, x: Any) -> Floats:
        if x.dtype.kind != "f":
            raise UserError(f"the network takes images as floats in [0, 1], not {x.dtype}; divide by 255")
        images: Floats = np.ascontiguousarray(x, np.float32)
        if images.shape[1:] != self.program.shape:
            raise UserError(f"the network takes images (N, {self.program.shape}), not {images.shape}")
        if self._runner is None:
            return (run_rounded if self.program.rounding else run_reference)(self.program, images)
        logits = self._runner.run(images)
        chosen = self._runner.single if isinstance(self._runner, Timed) else self._runner
        if isinstance(chosen, Engine) and len(images) == 1:
            self._answer = chosen.answer
        return logits

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
        return None if self._runner is None else self._runner.bytes_memory

    @property
    def native(self) -> bool:
        """Return whether generated kernels run the network, rather than NumPy."""
        return self._runner is not None


def _engine(program: Program, threads: int, timed: bool) -> Engine | None:
    if not native_available():
        return None
    try:
        return Engine(program, threads=threads, alone=timed)
    except Unsupported:
        return None


def _mixed(
    program: Program, threads: int, timed: bool, dense: bool, engine: Engine | None
) -> Mixed | Timed | Engine | None:
    """Return a runner of the program on bytes, or in parts if that may be necessary or faster."""
    if program.rounding:
        return _engine(program, threads, timed) if program.whole else Mixed(program, 1.0, threads=threads)
    if engine is not None and not ((timed or dense) and is_dense(program)):
        return None
    return Timed(ways_of(program, threads=threads, first=engine)) if timed else Mixed(program, DENSITY, threads=threads)


@courteous()
def pack(
    model: nn.Module,
    *,
    shape: tuple[int, ...],
    images: Tensor | None = None,
    values: str = "fp32",
    calibrate: Tensor | None = None,
    class_names: Sequence[str] | None = None,
    provenance: dict[str, Any] | None = None,
    dense: bool = False,
    progress: Callable[[int, int], None] = lambda *_: None,
) -> Packed:
    """Pack a classifier in memory, as `export` followed by `load`; arguments as there.

    How it runs depends on its weights only, not on timings, so that results are the same to the last bit. With `dense`,
    layers that are not sparse enough for kernels run in torch.
    """
    progress(0, _STEPS)
    names = None if class_names is None else tuple(class_names)
    program = compile_model(model, shape, images=images, class_names=names, provenance=provenance)
    if names is not None and len(names) != program.classes:
        raise UserError(f"{len(names)} class names for {program.classes} logits")
    if calibrate is not None and values != "int8":
        raise UserError(f"rounded activations need weights in int8 (values), not {values!r}")
    progress(1, _STEPS)
    rounded = round_program(program, values)
    if calibrate is not None:
        rounded = calibrated(rounded, calibrate)
    progress(2, _STEPS)
    return Packed(rounded, dense=dense)


def export(
    model: nn.Module,
    path: Path | str,
    *,
    shape: tuple[int, ...],
    images: Tensor | None = None,
    values: str = "fp32",
    calibrate: Tensor | None = None,
    class_names: Sequence[str] | None = None,
    provenance: dict[str, Any] | None = None,
    progress: Callable[[int, int], None] = lambda *_: None,
) -> Path:
    """Write a classifier for images of `shape` as one artefact and return its path.

    images (N, *shape) in [0, 1]: a few real images, on which the artefact is compared with the model. `values` is the
    number format of the weights: "fp32" (exact), "fp16" or "int8" (one scale per output unit). `provenance` is any JSON
    object (study, cell, seed, hashes). `calibrate`: validation images (N, *shape) whose activations determine scales,
    by which activations are rounded to 8 bits too (with int8 weights only). `progress` gets the number of finished
    steps and the total. Raises Unsupported for a network without a packed form, UserError for weights that are not
    finite, or too large for fp16, and for activations that cannot be rounded.
    """
    packed = pack(
        model, shape=shape, images=images, values=values, calibrate=calibrate, class_names=class_names,
        provenance=provenance, progress=progress,
    )  # fmt: skip
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
