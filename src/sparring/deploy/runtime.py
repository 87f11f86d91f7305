"""Packed networks for callers: export, load, and one object that maps images to logits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
from torch import Tensor, from_numpy, nn

from ..errors import UserError
from .artefact import read_program, round_program, write_program
from .folding import compile_model
from .program import Floats, Program
from .reference import run_reference

__all__ = ["Packed", "export", "load", "pack"]


class Packed:
    """A packed network: call it with images (N, *shape) in [0, 1] to get logits (N, classes)."""

    def __init__(self, program: Program) -> None:
        self.program = program

    @overload
    def __call__(self, x: Tensor) -> Tensor: ...

    @overload
    def __call__(self, x: Floats) -> Floats: ...

    def __call__(self, x: Any) -> Any:
        """Return the logits of images, float32; numpy in, numpy out; torch in, torch out (no gradients).

        Raise UserError for images of another shape.
        """
        if isinstance(x, Tensor):
            return from_numpy(self._run(x.detach().cpu().numpy()))
        return self._run(x)

    def _run(self, x: Any) -> Floats:
        images: Floats = np.ascontiguousarray(x, np.float32)
        if images.shape[1:] != self.program.shape:
            raise UserError(f"the network takes images (N, {self.program.shape}), not {images.shape}")
        return run_reference(self.program, images)


def pack(
    model: nn.Module,
    *,
    shape: tuple[int, ...],
    values: str = "fp32",
    class_names: Sequence[str] | None = None,
    provenance: dict[str, Any] | None = None,
) -> Packed:
    """Pack a classifier in memory, exactly as `export` then `load` would; `shape` is one image's."""
    names = None if class_names is None else tuple(class_names)
    program = compile_model(model, shape, class_names=names, provenance=provenance)
    if names is not None and len(names) != program.classes:
        raise UserError(f"{len(names)} class names for {program.classes} logits")
    return Packed(round_program(program, values))


def export(
    model: nn.Module,
    path: Path | str,
    *,
    shape: tuple[int, ...],
    values: str = "fp32",
    class_names: Sequence[str] | None = None,
    provenance: dict[str, Any] | None = None,
) -> Path:
    """Write a classifier for images of `shape` as one packed artefact and return its path.

    `values` is how weights are stored: "fp32" (exact), "fp16" or "int8" (a scale per output unit). `provenance` is
    any JSON object (study, cell, seed, hashes). Raise Unsupported for a network without a packed form, UserError for
    weights that are not finite, or that fp16 cannot hold.
    """
    packed = pack(model, shape=shape, values=values, class_names=class_names, provenance=provenance)
    return write_program(packed.program, path, values=values)


def load(path: Path | str) -> Packed:
    """Open an artefact, from whomever it comes; raise UserError, never more, if it is damaged or hostile."""
    return Packed(read_program(path))
