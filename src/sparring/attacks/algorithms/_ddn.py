"""DDN: search the direction and the norm of a perturbation separately."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ...draws import Source
from ...threat import L2, distance
from .._entry import opening
from .._gradients import logits_and_gradient
from ._losses import Objective, cross_entropy, is_past
from ._projections import Nearest, column, keep_within, steepest


@opening
def ddn(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    norm: float = L2,
    eps: float | None = None,
    targets: Tensor | None = None,
    generator: Source = None,
    objective: Objective = cross_entropy,
    steps: int = 100,
    start_radius: float = 1.0,
    gamma: float = 0.05,
) -> Tensor:
    """Walk on a sphere whose radius shrinks by gamma while adversarial and grows otherwise (Rony et al. 2019, alg. 1).

    Supports only l2. The step length falls from 1 to 0.01 on a half cosine. On linear models with pixels on the box,
    100 steps end within 1.4% of the exact distance and 300 within 1%. Returns the nearest adversarial point found, or x
    if there is none (within eps, if given). The generator is not used. Raises Unsupported for other norms.
    """
    nearest = Nearest.of(x)
    radius = torch.full_like(nearest.distance, start_radius)
    point = x
    for step in range(steps + 1):
        logits, gradient = logits_and_gradient(model, point, objective, y, targets)
        won = is_past(logits, y, targets)
        delta = point - x
        moved = distance(delta, L2)
        nearest.update_(slice(None), point, moved, won)
        if step > 0:
            radius = radius * torch.where(won, 1 - gamma, 1 + gamma)
        rate = 0.01 + 0.99 * (1 + math.cos(math.pi * step / steps)) / 2
        # In place: through sparse kernels the passes over these arrays take longer than the network.
        delta.add_(steepest(gradient, L2), alpha=rate)
        delta.mul_(column(radius / distance(delta, L2).clamp_min(1e-30), x))
        point = delta.add_(x).clamp_(0, 1)
    return keep_within(x, nearest.point, L2, eps)
