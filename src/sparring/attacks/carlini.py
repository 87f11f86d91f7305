"""The l_2 attack of Carlini & Wagner 2017, faithful to the paper."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..errors import Unsupported
from ..threat import L2, distance
from .derivatives import logits_and_gradient
from .losses import Objective, is_past, margin
from .steps import column, keep_within, select

__all__ = ["cw"]

_BETAS = (0.9, 0.999)
# Keeps arctanh finite for pixels that lie on the box.
_SHRINK = 1 - 1e-6


def cw(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    norm: float = L2,
    eps: float | None = None,
    targets: Tensor | None = None,
    generator: torch.Generator | None = None,
    confidence: float = 0.0,
    steps: int = 1000,
    searches: int = 9,
    learning_rate: float = 0.01,
    start_constant: float = 1e-3,
) -> Tensor:
    """Minimise squared distance plus c times the margin shortfall over tanh variables (sections V and VI-A).

    Adam for `steps` iterations, `searches` rounds of binary search on c (the paper's code: 9 and 10000), starting
    each round afresh; a round of an image ends early when a tenth of the steps brought no progress, as in the authors'
    code. l_2 only. Returns the nearest point with margin above `confidence`, x where there was none or none within a
    given eps. The generator is not used. Raises Unsupported for other norms.
    """
    if norm != L2:
        raise Unsupported("C&W is an l_2 attack here; for other norms use nearest or fab")
    nearest = x.clone()
    smallest = torch.full((len(x),), torch.inf, dtype=x.dtype, device=x.device)
    low = torch.zeros_like(smallest)
    high = torch.full_like(smallest, 1e10)
    constant = torch.full_like(smallest, start_constant)
    for _ in range(searches):
        point, moved = _minimise(model, x, y, targets, constant, confidence, steps, learning_rate)
        better = moved < smallest
        smallest = torch.where(better, moved, smallest)
        nearest = torch.where(column(better, x), point, nearest)
        won = torch.isfinite(moved)
        high = torch.where(won, torch.minimum(high, constant), high)
        low = torch.where(won, low, torch.maximum(low, constant))
        constant = torch.where(high < 1e9, (low + high) / 2, constant * 10)
    return keep_within(x, nearest, L2, eps)


def _minimise(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    targets: Tensor | None,
    constant: Tensor,
    confidence: float,
    steps: int,
    learning_rate: float,
) -> tuple[Tensor, Tensor]:
    """Return the nearest adversarial point for fixed constants and its distance, inf where there was none.

    Written out by hand: the gradient of the distance and of tanh needs no graph, and Adam works in place.
    """
    nearest = x.clone()
    smallest = torch.full((len(x),), torch.inf, dtype=x.dtype, device=x.device)
    active = torch.arange(len(x), device=x.device)
    w = torch.atanh((2 * x - 1) * _SHRINK)
    mean, square = torch.zeros_like(w), torch.zeros_like(w)
    checked = torch.full_like(smallest, torch.inf)
    for step in range(1, steps + 1):
        squashed = torch.tanh(w)
        point = squashed.add(1).mul_(0.5)
        logits, gradient = logits_and_gradient(model, point, _shortfall(constant, confidence), y, targets)
        gap = margin(logits, y, targets)
        delta = point - x
        moved = distance(delta, L2)
        better = is_past(logits, y, targets, confidence=confidence) & (moved < smallest[active])
        if bool(better.any()):
            nearest[active[better]] = point[better]
            smallest[active[better]] = moved[better]
        # The chain rule through (tanh(w) + 1)/2: half the gradient times 1 − tanh².
        gradient.mul_(0.5).add_(delta)
        gradient.addcmul_(gradient.clone(), squashed.square_(), value=-1)
        mean.lerp_(gradient, 1 - _BETAS[0])
        square.mul_(_BETAS[1]).addcmul_(gradient, gradient, value=1 - _BETAS[1])
        # Adam's bias corrections, applied to the step's length and to epsilon instead of to whole tensors.
        late = math.sqrt(1 - _BETAS[1] ** step)
        w.addcdiv_(mean, square.sqrt().add_(1e-8 * late), value=-learning_rate * late / (1 - _BETAS[0] ** step))
        if step % max(steps // 10, 1) == 0:
            loss = moved.square() + constant * (confidence - gap).clamp_min(0)
            keep = loss <= 0.9999 * checked
            checked = loss[keep]
            if not bool(keep.all()):
                active, x, y, constant = active[keep], x[keep], y[keep], constant[keep]
                w, mean, square = w[keep], mean[keep], square[keep]
                targets = select(targets, keep)
            if len(active) == 0:
                break
    return nearest, smallest


def _shortfall(constant: Tensor, confidence: float) -> Objective:
    """Return the paper's c·f_6: c times what the margin still lacks."""

    def objective(logits: Tensor, y: Tensor, targets: Tensor | None) -> Tensor:
        return constant * (confidence - margin(logits, y, targets)).clamp_min(0)

    return objective
