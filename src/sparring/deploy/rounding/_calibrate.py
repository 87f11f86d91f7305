"""Choose how values are rounded to bytes, from their smallest and largest numbers on calibration images."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from ...errors import Unsupported, UserError
from .._equivalent import Equivalent
from .._program import Flatten, Program, Rounding, Scale
from ._tasks import check_rounding, rounded_values

CALIBRATING = 64  # images, from which scales follow where nobody says how many
_TOGETHER = 64  # images


def calibrate(program: Program, images: Tensor) -> Program:
    """Return a program whose layers read bytes, with scales from images (N, *shape) in [0, 1].

    Values that only normalise the image cover all of [0, 1]. Raise UserError for images of another shape or none,
    Unsupported for a network that cannot be computed so.
    """
    if images.shape[1:] != program.shape or not len(images):
        raise UserError(f"calibration takes images (N, {program.shape}), at least one, not {tuple(images.shape)}")
    wanted = rounded_values(program)
    if not wanted:
        raise Unsupported("the network has no layer with int8 kernels; export it with activations in float32")
    inputs = {0}
    for number, step in enumerate(program.steps):
        if isinstance(step.op, Scale | Flatten) and step.inputs[0] in inputs:
            inputs.add(number + 1)
    corners = torch.stack([torch.zeros(program.shape), torch.ones(program.shape)])
    seen, extremes = _ranges(program, wanted, images), _ranges(program, [v for v in wanted if v in inputs], corners)
    result = replace(program, rounding={v: _rounding(*(extremes.get(v) or seen[v])) for v in wanted})
    check_rounding(result)
    return result


def _ranges(program: Program, wanted: list[int], images: Tensor) -> dict[int, tuple[float, float]]:
    """Return the smallest and the largest number of each value wanted, zero among them; raise UserError for NaN."""
    network, found = Equivalent(program), dict.fromkeys(wanted, (0.0, 0.0))
    for part in torch.split(images, _TOGETHER):
        values = network.values(part)
        for value in wanted:
            low, high = (float(v) for v in torch.aminmax(values[value]))
            if not np.isfinite(high - low):
                raise UserError("activations on the calibration images are NaN or infinite; check images and weights")
            found[value] = min(found[value][0], low), max(found[value][1], high)
    return found


def _rounding(low: float, high: float) -> Rounding:
    """Return the rounding by which 0 stays exact and the range fills a byte."""
    scale = float(np.float32((high - low) / 255)) or 1.0
    return Rounding(scale, int(np.rint(-low / scale)))
