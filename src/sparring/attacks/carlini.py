"""The l_2 attack of Carlini & Wagner 2017; its search of c begins where the linearised margin says, or as theirs."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..errors import Unsupported
from ..threat import L2, distance
from .derivatives import logits_and_gradient, logits_and_pull
from .losses import is_clear, margin
from .steps import keep_within, select

__all__ = ["cw", "lacking"]

_BETAS = (0.9, 0.999)
# Keeps arctanh finite for pixels that lie on the box.
_SHRINK = 1 - 1e-6
# How far beyond the constant of the linearised margin the search begins: nearly every image then succeeds at once.
_AHEAD = 2.0


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
    start_constant: float | None = 1e-3,
    precision: float = 0.0,
) -> Tensor:
    """Minimise squared distance plus c times the margin shortfall over tanh variables (sections V and VI-A).

    Adam for `steps` iterations, at most `searches` rounds of binary search on c (the paper's code: 10000 and 9),
    starting each round afresh; a round of an image ends early when a tenth of the steps brought no progress, as in the
    authors' code. As there, every image's search begins at `start_constant`, goes up in tens, and makes all rounds.
    start_constant=None begins at twice the c at which the image's linearised margin would reach the boundary, and a
    `precision` ends its search when c is known to that share of itself: with 0.5 a quarter of the steps. l_2 only.
    Returns the nearest point with margin above `confidence`, x where there was none or none within a given eps. The
    generator is not used. Raises Unsupported for other norms.
    """
    if norm != L2:
        raise Unsupported("C&W is an l_2 attack here; for other norms use nearest or fab")
    nearest = x.clone()
    smallest = torch.full((len(x),), torch.inf, dtype=x.dtype, device=x.device)
    low, high = torch.zeros_like(smallest), torch.full_like(smallest, torch.inf)
    if start_constant is None:
        constant, growth = _AHEAD * _linearised(model, x, y, targets, confidence), 2.0
    else:
        constant, growth = torch.full_like(smallest, start_constant), 10.0
    rows = torch.arange(len(x), device=x.device)
    for _ in range(searches):
        if len(rows) == 0:
            break
        part = x[rows], y[rows], select(targets, rows), constant[rows]
        point, moved = _minimise(model, *part, confidence, steps, learning_rate)
        better = moved < smallest[rows]
        nearest[rows[better]], smallest[rows[better]] = point[better], moved[better]
        won = torch.isfinite(moved)
        high[rows] = torch.where(won, constant[rows], high[rows])
        low[rows] = torch.where(won, low[rows], constant[rows])
        constant = torch.where(torch.isfinite(high), (low + high) / 2, low * growth)
        rows = (torch.isinf(high) | (high - low > precision * high)).nonzero().squeeze(1)
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

    def slope(logits: Tensor) -> Tensor:
        return lacking(logits, y, targets, constant, confidence)

    for step in range(1, steps + 1):
        point = torch.sigmoid(2 * w)
        logits, gradient = logits_and_pull(model, point, slope)
        gap = margin(logits, y, targets)
        delta = point - x
        moved = distance(delta, L2)
        better = is_clear(gap, logits, confidence=confidence) & (moved < smallest[active])
        if bool(better.any()):
            nearest[active[better]] = point[better]
            smallest[active[better]] = moved[better]
        # The chain rule through p = (tanh(w) + 1)/2: twice p(1 - p).
        gradient.add_(delta, alpha=2).mul_((1 - point).mul_(point).mul_(2))
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


def lacking(logits: Tensor, y: Tensor, targets: Tensor | None, constant: Tensor, confidence: float) -> Tensor:
    """Return the gradient of the paper's c·f_6, c times what the margin still lacks, with respect to the logits."""
    label = (y if targets is None else targets).unsqueeze(1)
    rival = logits.scatter(1, label, -torch.inf).argmax(1, keepdim=True)
    gap = (logits.gather(1, rival) - logits.gather(1, label)).squeeze(1) * (1 if targets is None else -1)
    pull = (constant * (gap <= confidence) * (1 if targets is None else -1)).unsqueeze(1)
    return torch.zeros_like(logits).scatter_(1, label, pull).scatter_(1, rival, -pull)


def _linearised(model: nn.Module, x: Tensor, y: Tensor, targets: Tensor | None, confidence: float) -> Tensor:
    """Return the constants at which the boundary would just be reached if the margin were linear and the box not there.

    Then |δ|² + c·(lack − g·δ) is smallest at δ = c·g/2, which makes up for the lack if c·|g|² = 2·lack.
    """
    logits, gradient = logits_and_gradient(model, x, margin, y, targets)
    lack = (confidence - margin(logits, y, targets)).clamp_min(1e-12)
    return 2 * lack / distance(gradient, L2).square().clamp_min(1e-12)
