"""sparring's own minimum-norm attack: a short guided descent of the radius, then projections onto the boundary.

Why it beats its parts: steps on a smooth margin see every class and find the right side of the network, which
projections alone (DeepFool, FAB) do not; projections land on the boundary exactly, which steps only approach.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...outputs import opening
from ...threat import L2, LINF, diameter, distance, dual, project
from .._gradients import logits_and_gradient
from ._losses import Objective, margin_loss, smooth_margin
from ._projections import boundary_step, column, hold, keep_within, select

# Clean margins span this many units of temperature, so that scaling the logits changes nothing.
_SHARPNESS = 10.0
# A point counts as adversarial from this share of the clean margin on: far above rounding, about 0.01% of a distance.
_CLEARANCE = 1e-4
_OVERSHOOT = 2e-3


@dataclass
class _Best:
    """The nearest adversarial point of each image so far, and its distance (inf while there is none)."""

    point: Tensor
    distance: Tensor

    def update(self, rows: Tensor, point: Tensor, moved: Tensor, won: Tensor) -> Tensor:
        """Take over points that won at a smaller distance; return which did."""
        better = won & (moved < self.distance[rows])
        self.point[rows[better]] = point[better]
        self.distance[rows[better]] = moved[better]
        return better


@opening
def nearest(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    norm: float = L2,
    eps: float | None = None,
    targets: Tensor | None = None,
    generator: torch.Generator | None = None,
    steps: int = 30,
    polish: int = 5,
) -> Tensor:
    """Find the smallest perturbation by `steps` guided steps and at most `polish` projections onto the boundary.

    The steps follow DDN (Rony et al. 2019, algorithm 1) with a radius that starts at the linearised distance, a
    logsumexp margin in place of the cross-entropy, pixels held where the box is active, and annealed rates. The
    projections follow FAB (Croce & Hein 2020) without its memory: from x onto the linearised boundary at the best
    point, inside the box. Images whose projection no longer gains leave. norm: l_2, l_inf or l_1. Images for which
    nothing was found, or nothing within a given eps, come back unchanged; with eps an image leaves as soon as it
    succeeds within it. The generator is not used.
    """
    with torch.no_grad():
        clean = -margin_loss(model(x), y, targets)
    best = _Best(x.clone(), torch.where(clean < 0, 0.0, torch.inf).to(x.dtype))
    rows = (clean >= 0).nonzero().squeeze(1)
    if len(rows):
        scale = clean.clamp_min(1e-12)
        _descend(model, x[rows], y[rows], select(targets, rows), norm, scale[rows], steps, best, rows, eps)
        _project_repeatedly(model, x, y, targets, norm, scale, polish, best, eps)
    return keep_within(x, best.point, norm, eps)


def _descend(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    targets: Tensor | None,
    norm: float,
    scale: Tensor,
    steps: int,
    best: _Best,
    rows: Tensor,
    eps: float | None,
) -> None:
    """Walk around the boundary on a shrinking sphere and record the nearest adversarial points in `best`."""
    objective = _tempered(_SHARPNESS / scale)
    point, radius = x, torch.zeros_like(scale)
    for step in range(steps):
        if eps is not None and bool((best.distance[rows] <= eps).any()):
            going = best.distance[rows] > eps
            rows, x, y, point, radius, scale = (part[going] for part in (rows, x, y, point, radius, scale))
            targets, objective = select(targets, going), _tempered(_SHARPNESS / scale)
        if len(rows) == 0:
            return
        logits, gradient = logits_and_gradient(model, point, objective, y, targets)
        won = margin_loss(logits, y, targets) > _CLEARANCE * scale
        delta = point - x
        moved = distance(delta, norm)
        best.update(rows, point, moved, won)
        gradient = hold(gradient, point)
        done = step / max(steps - 1, 1)
        if step == 0:
            # The linearised distance, a little enlarged; a dead gradient must not send an image to infinity.
            slope = torch.linalg.vector_norm(gradient.flatten(1), ord=dual(norm), dim=1)
            radius = (1.2 * _SHARPNESS / slope.clamp_min(1e-12)).clamp_max(diameter(x, norm))
        else:
            change = 0.2 * 0.05**done
            nearest_yet = best.distance[rows]
            shrunk = torch.minimum(moved, nearest_yet) * (1 - change)
            radius = torch.minimum(torch.where(won, shrunk, moved * (1 + change)), nearest_yet * 0.998)
        rate = 2.0 * 0.025**done
        delta = delta + column(rate * radius, x) * _direction(gradient, norm)
        point = (x + _onto_sphere(delta, norm, radius)).clamp(0, 1)
    with torch.no_grad():
        won = margin_loss(model(point), y, targets) > _CLEARANCE * scale
    best.update(rows, point, distance(point - x, norm), won)


def _project_repeatedly(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    targets: Tensor | None,
    norm: float,
    scale: Tensor,
    rounds: int,
    best: _Best,
    eps: float | None,
) -> None:
    """Project x onto the boundary linearised at the latest point, for as long as that brings an image nearer."""
    enough = 0.0 if eps is None else eps
    active = (torch.isfinite(best.distance) & (best.distance > enough)).nonzero().squeeze(1)
    point = best.point[active]
    for turn in range(rounds + 1):
        if len(active) == 0:
            return
        origin, labels, aims, unit = x[active], y[active], select(targets, active), scale[active]
        logits, gradient = logits_and_gradient(model, point, margin_loss, labels, aims)
        gap = margin_loss(logits, labels, aims)
        improved = best.update(active, point, distance(point - origin, norm), gap > _CLEARANCE * unit)
        # The first projection starts from the best point, the second may still be on its way.
        keep = torch.ones_like(improved) if turn < 2 else improved
        gain = _CLEARANCE * 2 * unit - gap + ((point - origin) * gradient).flatten(1).sum(1)
        active, origin, gradient, gain = active[keep], origin[keep], gradient[keep], gain[keep]
        point = (origin + (1 + _OVERSHOOT) * boundary_step(origin, gradient, gain, norm)).clamp(0, 1)


def _tempered(sharpness: Tensor) -> Objective:
    def objective(logits: Tensor, y: Tensor, targets: Tensor | None) -> Tensor:
        return smooth_margin(logits * sharpness.unsqueeze(1), y, targets)

    return objective


def _direction(gradient: Tensor, norm: float) -> Tensor:
    """Return the gradient at unit length in the norm; for l_inf its sign."""
    if norm == LINF:
        return gradient.sign()
    return gradient / column(distance(gradient, norm).clamp_min(1e-30), gradient)


def _onto_sphere(delta: Tensor, norm: float, radius: Tensor) -> Tensor:
    """Return delta at length `radius`; for l_inf and l_1 the nearest point of the ball, which has their shape."""
    if norm == L2:
        return delta * column(radius / distance(delta, L2).clamp_min(1e-30), delta)
    return project(delta, norm, radius)
