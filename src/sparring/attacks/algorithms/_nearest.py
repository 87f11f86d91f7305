"""sparring's minimum-norm attack: a short guided descent of the radius, then projections onto the boundary.

Why it beats its parts: steps on a smooth margin see every class and find the right side of the network, which
projections alone (DeepFool, FAB) do not; projections land on the boundary exactly, which steps only approach.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ...outputs import opening
from ...threat import L2, LINF, diameter, distance, dual, project
from .._gradients import logits_and_gradient
from ._losses import Objective, margin_loss, smooth_margin
from ._projections import Nearest, boundary_step, column, hold, keep_within, shrink

# Clean margins span this many units of temperature, so that scaling the logits changes nothing.
_SHARPNESS = 10.0
# A point counts as adversarial from this share of the clean margin on: far above rounding, about 0.01% of a distance.
_CLEARANCE = 1e-4
_OVERSHOOT = 2e-3


@dataclass
class _Images:
    """The images still searched for: one entry per image in every tensor; clean: the margin that they began with."""

    row: Tensor
    x: Tensor
    y: Tensor
    targets: Tensor | None
    clean: Tensor
    point: Tensor

    def look(self, model: nn.Module, objective: Objective) -> tuple[Tensor, Tensor, Tensor]:
        """Return the objective's gradient at the points, their margins, and which of them are adversarial."""
        logits, gradient = logits_and_gradient(model, self.point, objective, self.y, self.targets)
        gap = margin_loss(logits, self.y, self.targets)
        return gradient, gap, gap > _CLEARANCE * self.clean

    def tempered(self) -> Objective:
        """Return the smooth margin at a temperature that follows the clean one."""
        sharpness = (_SHARPNESS / self.clean).unsqueeze(1)
        return lambda logits, y, targets: smooth_margin(logits * sharpness, y, targets)


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

    The steps follow DDN (Rony et al. 2019, algorithm 1) with four changes: the radius starts at the linearised
    distance, a logsumexp margin replaces the cross-entropy, pixels stay fixed where the box is active, and rates are
    annealed. The projections follow FAB (Croce & Hein 2020) without its memory: from x onto the linearised boundary at
    the best point, inside the box. Images leave when their projection no longer improves. Supports l2, linf and l1.
    Images without success (within eps, if given) are returned unchanged; with eps, an image leaves as soon as it
    succeeds within eps. The generator is not used.
    """
    with torch.no_grad():
        clean = -margin_loss(model(x), y, targets)
    found = Nearest(x.clone(), torch.where(clean < 0, 0.0, torch.inf).to(x.dtype))
    images = _Images(torch.arange(len(x), device=x.device), x, y, targets, clean.clamp_min(1e-12), x)
    rows = (clean >= 0).nonzero().squeeze(1)
    if len(rows):
        _descend(model, shrink(images, rows), found, norm, eps, steps)
        _project_repeatedly(model, images, found, norm, eps, polish)
    return keep_within(x, found.point, norm, eps)


def _descend(model: nn.Module, images: _Images, found: Nearest, norm: float, eps: float | None, steps: int) -> None:
    """Walk around the boundary on a shrinking sphere and record the nearest adversarial points in `found`."""
    objective = images.tempered()
    for step in range(steps):
        if eps is not None:
            still = (found.distance[images.row] > eps).nonzero().squeeze(1)
            if len(still) < len(images.row):
                images = shrink(images, still)
                objective = images.tempered()
        if len(images.row) == 0:
            return
        gradient, _, won = images.look(model, objective)
        delta = images.point - images.x
        moved = distance(delta, norm)
        found.update_(images.row, images.point, moved, won)
        gradient = hold(gradient, images.point)
        done = step / max(steps - 1, 1)
        if step == 0:
            # The linearised distance, a little enlarged; a dead gradient must not send an image to infinity.
            slope = torch.linalg.vector_norm(gradient.flatten(1), ord=dual(norm), dim=1)
            radius = (1.2 * _SHARPNESS / slope.clamp_min(1e-12)).clamp_max(diameter(images.x, norm))
        else:
            change = 0.2 * 0.05**done
            nearest_yet = found.distance[images.row]
            shrunk = torch.minimum(moved, nearest_yet) * (1 - change)
            radius = torch.minimum(torch.where(won, shrunk, moved * (1 + change)), nearest_yet * 0.998)
        rate = 2.0 * 0.025**done
        delta = delta + column(rate * radius, delta) * _direction(gradient, norm)
        images.point = (images.x + _onto_sphere(delta, norm, radius)).clamp(0, 1)
    with torch.no_grad():
        gap = margin_loss(model(images.point), images.y, images.targets)
    moved = distance(images.point - images.x, norm)
    found.update_(images.row, images.point, moved, gap > _CLEARANCE * images.clean)


def _project_repeatedly(
    model: nn.Module, images: _Images, found: Nearest, norm: float, eps: float | None, rounds: int
) -> None:
    """Project x onto the boundary linearised at the latest point, for as long as that brings an image nearer."""
    open_still = torch.isfinite(found.distance) & (found.distance > (0.0 if eps is None else eps))
    images = shrink(replace(images, point=found.point), open_still)
    for turn in range(rounds + 1):
        if len(images.row) == 0:
            return
        gradient, gap, won = images.look(model, margin_loss)
        delta = images.point - images.x
        improved = found.update_(images.row, images.point, distance(delta, norm), won)
        # The first projection starts from the best point, the second may still be on its way.
        keep = (torch.ones_like(improved) if turn < 2 else improved).nonzero().squeeze(1)
        gain = _CLEARANCE * 2 * images.clean - gap + (delta * gradient).flatten(1).sum(1)
        images, gradient, gain = shrink(images, keep), gradient[keep], gain[keep]
        step = boundary_step(images.x, gradient, gain, norm)
        images.point = (images.x + (1 + _OVERSHOOT) * step).clamp(0, 1)


def _direction(gradient: Tensor, norm: float) -> Tensor:
    """Return the gradient at unit length in the norm; for linf its sign."""
    if norm == LINF:
        return gradient.sign()
    return gradient / column(distance(gradient, norm).clamp_min(1e-30), gradient)


def _onto_sphere(delta: Tensor, norm: float, radius: Tensor) -> Tensor:
    """Return delta at length `radius`; for linf and l1 the nearest point of the ball, which has their shape."""
    if norm == L2:
        return delta * column(radius / distance(delta, L2).clamp_min(1e-30), delta)
    return project(delta, norm, radius)
