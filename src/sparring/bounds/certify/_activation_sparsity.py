"""Bounds of activation-sparsity modules, by their `kind`; those without a sound rule are refused with the reason."""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import Unsupported
from ...graph import SparseActivation

Lines = tuple[Tensor, Tensor, Tensor, Tensor]


def activation_interval(op: SparseActivation, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
    """Return the bounds of an activation-sparsity module's output from those of its input.

    Raise Unsupported for kinds without a sound rule (random ones, and those this package does not know).
    """
    if getattr(op.module, "nondecreasing", False):
        return op.module(lower), op.module(upper)
    if _kind(op) == "top-k":  # each unit is 0 or its ReLU; which of them depends on all the others
        return torch.zeros_like(lower), upper.clamp_min(0)
    raise Unsupported(f"activation '{op.name}' of kind '{_kind(op)}' is random or unknown: it has no sound bound")


def activation_lines(op: SparseActivation, lower: Tensor, upper: Tensor) -> Lines:
    """Return low slope, low shift, high slope and high shift of an activation-sparsity module over an interval."""
    kind = _kind(op)
    if kind == "shifted-relu":
        return _shifted(relu_lines(lower - _threshold(op), upper - _threshold(op)), -_threshold(op))
    if kind in ("threshold", "percentile"):
        return _jump(lower, upper, _threshold(op))
    if kind == "top-k":
        _, _, slope, shift = relu_lines(lower, upper)
        return torch.zeros_like(slope), torch.zeros_like(slope), slope, shift
    if kind == "mean-sparse":  # |x − μ| ≤ r becomes μ: the input moves by at most r, then ReLU
        radius = torch.as_tensor(op.module.radius).clamp_min(0).view(1, -1, *[1] * (lower.dim() - 2))
        low_slope, low_shift, _, _ = _shifted(relu_lines(lower - radius, upper - radius), -radius)
        _, _, high_slope, high_shift = _shifted(relu_lines(lower + radius, upper + radius), radius)
        return low_slope, low_shift, high_slope, high_shift
    low, high = activation_interval(op, lower, upper)
    return torch.zeros_like(low), low, torch.zeros_like(high), high


def kink_of(op: SparseActivation) -> float:
    """Return where a continuous module leaves zero, with slope 0 before and 1 after; refuse all discontinuous ones."""
    if _kind(op) == "shifted-relu":
        return float(_threshold(op))
    raise Unsupported(
        f"activation '{op.name}' of kind '{_kind(op)}' is discontinuous or unknown: it has no finite Lipschitz constant"
    )


def relu_lines(lower: Tensor, upper: Tensor) -> Lines:
    """Return the chord above a ReLU and, below, the line through the origin that leaves the smaller area.

    Zhang et al. 2018, table 2.
    """
    unstable = (lower < 0) & (upper > 0)
    chord = torch.where(unstable, upper / (upper - lower).clamp_min(1e-300), (lower >= 0).double())
    low = torch.where(unstable, (upper > -lower).double(), chord)
    return low, torch.zeros_like(low), chord, torch.where(unstable, -lower * chord, 0)


def _shifted(lines: Lines, by: Tensor) -> Lines:
    """Return lines in x from lines in x + by."""
    low_slope, low_shift, high_slope, high_shift = lines
    return low_slope, low_shift + low_slope * by, high_slope, high_shift + high_slope * by


def _jump(lower: Tensor, upper: Tensor, at: Tensor) -> Lines:
    """Bound x·1(x > at), at ≥ 0."""
    zero, one = torch.zeros_like(lower), torch.ones_like(lower)
    dead, alive = upper <= at, lower > at
    chord = upper / (upper - lower).clamp_min(1e-300)
    high_slope = torch.where(lower >= 0, one, chord)
    high_shift = torch.where(lower >= 0, zero, -lower * chord)
    steep = upper / (upper - at).clamp_min(1e-300)  # through (at, 0) and (upper, upper)
    steep = torch.where(upper - at > at - lower, steep, zero)
    low_slope = torch.where(alive, one, torch.where(dead, zero, steep))
    low_shift = torch.where(alive | dead, zero, -steep * at)
    high_slope = torch.where(alive, one, torch.where(dead, zero, high_slope))
    high_shift = torch.where(alive | dead, zero, high_shift)
    return low_slope, low_shift, high_slope, high_shift


def _threshold(op: SparseActivation) -> Tensor:
    return torch.as_tensor(op.module.threshold, dtype=torch.float64)


def _kind(op: SparseActivation) -> str:
    return str(getattr(op.module, "kind", type(op.module).__name__))
