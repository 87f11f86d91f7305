"""FAB: a minimum-norm attack along linearised boundaries, biased towards the clean image."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...draws import Source, drawn_at
from ...threat import L2, LINF, distance, project, random_point
from .._entry import opening
from ._losses import is_past, margin_loss
from ._projections import Nearest, boundary_step, column, keep_within, nearest_boundary, pull_back, select, shrink

_ALPHA_MAX, _ETA, _BETA = 0.1, 1.05, 0.9
# With eps: steps between checks of prospects, and how many times its recent pace an image is assumed to reach.
_CHECKS, _PATIENCE = 10, 2.0
# How far a projection may stay short of its plane, as a share of the way; η goes 5% past it.
_SHORT = 1e-3
# The smallest gain that a step aims at, as a share of the largest logit. Nearer to the boundary the step is lost in
# rounding, and an image would not move for all remaining steps.
_LEAST = 1e-4


@dataclass
class _Walkers:
    """State of the images still searched: one entry per image in every tensor."""

    row: Tensor
    x: Tensor
    y: Tensor
    targets: Tensor | None
    aims: Tensor | None
    point: Tensor


@opening
def fab(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    norm: float = L2,
    eps: float | None = None,
    targets: Tensor | None = None,
    generator: Source = None,
    steps: int = 100,
    restarts: int = 1,
    aims: Tensor | None = None,
    candidates: int | None = None,
) -> Tensor:
    """Project the point and the clean image onto the nearest linearised boundary and mix (Croce & Hein 2020, alg. 1).

    Supports linf, l2 and l1. The first start is x; further ones are random within half of the known distance. With eps,
    an image leaves as soon as it succeeds within eps. `aims` restricts the boundaries to those with one class each
    (FAB-T). Returns the nearest adversarial point found, refined by bisection, or x if there is none (within eps).
    """
    nearest = Nearest.of(x)
    for restart in range(restarts):
        row = torch.arange(len(x), device=x.device)
        start = x if restart == 0 else _restart(x, norm, eps, nearest.distance, drawn_at(generator, restart))
        _walk(model, _Walkers(row, x, y, targets, aims, start), nearest, norm, eps, steps, candidates)
    found = torch.isfinite(nearest.distance).nonzero().squeeze(1)
    if len(found):
        adversarial = nearest.point[found]
        nearest.point[found] = pull_back(model, x[found], adversarial, y[found], select(targets, found), rounds=3)
    return keep_within(x, nearest.point, norm, eps)


def _restart(x: Tensor, norm: float, eps: float | None, smallest: Tensor, generator: Source) -> Tensor:
    widest = 1.0 if norm == LINF else float(x[0].numel()) ** (1 / norm)
    limit = smallest.clamp_max(widest if eps is None else eps)
    offset = random_point(x, norm, widest, generator)
    return (x + project(offset, norm, limit) / 2).clamp(0, 1)


def _walk(
    model: nn.Module,
    walk: _Walkers,
    nearest: Nearest,
    norm: float,
    eps: float | None,
    steps: int,
    candidates: int | None,
) -> None:
    """Move all images `steps` times and record adversarial points in `nearest`.

    With eps an image leaves at its success, or when twice its recent pace would not bring it within eps.
    """
    closest = torch.full_like(nearest.distance, torch.inf)
    checked, interval = closest.clone(), max(steps // _CHECKS, 5)
    for step in range(steps):
        if eps is not None:
            leaving = nearest.distance <= eps
            if step % interval == 0:
                pace = (checked - closest) / interval
                leaving |= closest - _PATIENCE * pace * (steps - step) > eps
                checked.copy_(closest)
            if bool(leaving[walk.row].any()):
                walk = shrink(walk, ~leaving[walk.row])
        if len(walk.row) == 0:
            return
        boundary = nearest_boundary(
            model, walk.point, walk.y, walk.targets, norm=norm, aims=walk.aims, candidates=candidates
        )
        least = (_LEAST * boundary.logits.abs().amax(1)).nan_to_num_(nan=0.0, posinf=0.0)
        gap = torch.where(boundary.gap.abs() < least, least, boundary.gap)
        lead = ((walk.point - walk.x) * boundary.gradient).flatten(1).sum(1)
        # Both projections in one call: for small batches its cost is that of its operations, not of their size.
        starts, gradients = torch.cat([walk.point, walk.x]), boundary.gradient.repeat(2, *[1] * (walk.x.dim() - 1))
        from_point, from_x = _onto(starts, gradients, torch.cat([gap, gap + lead]), norm).chunk(2)
        near, far = distance(from_point, norm), distance(from_x, norm)
        alpha = column((near / (near + far).clamp_min(1e-30)).clamp_max(_ALPHA_MAX), walk.x)
        mixed = (1 - alpha) * (walk.point + _ETA * from_point) + alpha * (walk.x + _ETA * from_x)
        point = mixed.clamp(0, 1)
        with torch.no_grad():
            logits = model(point)
        won = is_past(logits, walk.y, walk.targets)
        moved = distance(point - walk.x, norm)
        closest[walk.row] = torch.where(won, torch.minimum(moved, closest[walk.row]), closest[walk.row])
        nearest.update_(walk.row, point, moved, won)
        # After a success the search continues a little nearer to x, even if only rounding separates it from the
        # boundary: otherwise ever smaller steps would follow.
        beyond = column(margin_loss(logits, walk.y, walk.targets) > 0, point)
        walk.point = torch.where(beyond, walk.x + _BETA * (point - walk.x), point)


def _onto(x: Tensor, gradient: Tensor, gap: Tensor, norm: float) -> Tensor:
    """Return the smallest step inside the box from x to the hyperplane, from either side."""
    side = column(torch.where(gap < 0, -1.0, 1.0), x)
    return boundary_step(x, gradient * side, gap.abs(), norm, tolerance=_SHORT)
