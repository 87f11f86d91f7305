"""DeepFool, a minimum-norm attack."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...draws import Source
from ...threat import L1, L2
from .._entry import opening
from ..fastpath._gram_matrix import find_stem
from ._losses import is_past
from ._projections import boundary_step, column, keep_within, nearest_boundary, select, steepest

# Added to every step after the first, in pixel units (the authors' code adds it always): if clipping takes more
# than the overshoot, steps alone would approach the boundary forever.
_PUSH = 1e-4


@opening
def deepfool(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    norm: float = L2,
    eps: float | None = None,
    targets: Tensor | None = None,
    generator: Source = None,
    steps: int = 50,
    overshoot: float = 0.02,
    candidates: int | None = None,
) -> Tensor:
    """Step onto the nearest linearised boundary until the label changes (Moosavi-Dezfooli et al. 2016, algorithm 2).

    Supports l2, linf (the paper's section 3.3) and l1. All classes are considered unless `candidates` limits them to
    those with the largest logits. Every step is multiplied by 1 + overshoot and clipped to the box at once, so that the
    network judges exactly the returned point. Images leave at their first success. An image without success after
    `steps` is returned at its last point, and one outside of eps unchanged. The generator is not used.
    """
    x_adv = x.clone()
    active = torch.arange(len(x), device=x.device)
    point = x
    stem = find_stem(model) if norm == L2 else None
    for step in range(steps + 1):
        with torch.no_grad():
            seen = None if stem is None else stem.look(point)
            standing = ~is_past(model(point) if seen is None else seen.logits, y, targets)
        x_adv[active] = point
        if step == steps or not bool(standing.any()):
            break
        active, point, y, targets = active[standing], point[standing], y[standing], select(targets, standing)
        seen = seen and seen.of(standing)
        boundary = nearest_boundary(model, point, y, targets, norm=norm, candidates=candidates, seen=seen)
        push = _PUSH if step > 0 else 0.0
        if norm == L1:  # one pixel, which the box would stop: as many as the box makes necessary
            gain = boundary.gap * (1 + overshoot) + push * boundary.gradient.flatten(1).abs().amax(1)
            point = (point + boundary_step(point, boundary.gradient, gain, norm)).clamp_(0, 1)
        else:
            stretched = column((1 + overshoot) * (boundary.distance + push), point)
            point = (point + stretched * steepest(boundary.gradient, norm)).clamp_(0, 1)
    return keep_within(x, x_adv, norm, eps)
