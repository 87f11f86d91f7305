"""Budget attacks that follow the gradient: FGSM, R+FGSM and PGD."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..threat import LINF, random_point
from .derivatives import logits_and_gradient
from .losses import Objective, cross_entropy, margin
from .steps import Region, budget, inside, select, steepest

__all__ = ["fgsm", "pgd", "rfgsm"]


def fgsm(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    norm: float = LINF,
    eps: float | None = None,
    targets: Tensor | None = None,
    generator: torch.Generator | None = None,
    objective: Objective = cross_entropy,
) -> Tensor:
    """Take one steepest step of length eps (Goodfellow et al. 2015, section 4).

    x: (N, ...) in [0, 1]; eps in pixel units. Returns points inside the box and the budget. The generator is not used.
    Raises UserError without eps.
    """
    eps = budget(eps)
    _, gradient = logits_and_gradient(model, x, objective, y, targets)
    return inside(x, x + eps * steepest(gradient, norm), norm, eps)


def rfgsm(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    norm: float = LINF,
    eps: float | None = None,
    targets: Tensor | None = None,
    generator: torch.Generator | None = None,
    objective: Objective = cross_entropy,
    share: float = 0.5,
) -> Tensor:
    """Take a random step of length share·eps, then a gradient step with what is left (Tramèr et al. 2018, equation 7).

    The random step is a corner of the cube for l_inf (the paper's sign of a Gaussian) and a uniform point of the ball
    otherwise. Raises UserError without eps.
    """
    eps = budget(eps)
    first = random_point(x, norm, share * eps, generator)
    if norm == LINF:
        first = share * eps * first.sign()
    start = inside(x, x + first, norm, eps)
    _, gradient = logits_and_gradient(model, start, objective, y, targets)
    return inside(x, start + (1 - share) * eps * steepest(gradient, norm), norm, eps)


def pgd(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    norm: float = LINF,
    eps: float | None = None,
    targets: Tensor | None = None,
    generator: torch.Generator | None = None,
    objective: Objective = cross_entropy,
    steps: int = 40,
    step_size: float | None = None,
    restarts: int = 1,
    random_start: bool = True,
    stop_early: bool = True,
) -> Tensor:
    """Ascend the objective by projected steepest steps (Madry et al. 2018, section 2.1).

    step_size defaults to 2.5·eps/steps, in the units of eps. Images leave at their first
    success, unless `stop_early` is False (adversarial training wants the full ascent). Restarts go on with the images
    still standing. Raises UserError without eps.
    """
    eps = budget(eps)
    length = 2.5 * eps / steps if step_size is None else step_size
    x_adv = x.clone()
    standing = torch.arange(len(x), device=x.device)
    for restart in range(restarts):
        if len(standing) == 0:
            break
        region = Region.around(x[standing], norm, eps)
        start = region.x
        if random_start or restart > 0:
            start = region.bring_in(start + random_point(start, norm, eps, generator))
        labels, aims = y[standing], select(targets, standing)
        x_adv[standing], won = _ascend(model, region, start, labels, aims, objective, steps, length, stop_early)
        standing = standing[~won]
    return x_adv


def _ascend(
    model: nn.Module,
    region: Region,
    point: Tensor,
    y: Tensor,
    targets: Tensor | None,
    objective: Objective,
    steps: int,
    length: float,
    stop_early: bool,
) -> tuple[Tensor, Tensor]:
    """Return the points where the ascent of each image ended, and which of them are known to have succeeded."""
    end = point.clone()
    won = torch.zeros(len(end), dtype=torch.bool, device=end.device)
    active = torch.arange(len(end), device=end.device)
    for _ in range(steps):
        logits, gradient = logits_and_gradient(model, point, objective, y, targets)
        if stop_early:
            done = margin(logits, y, targets) > 0
            if bool(done.any()):
                end[active[done]] = point[done]
                won[active[done]] = True
                active, y, point, gradient = (part[~done] for part in (active, y, point, gradient))
                targets, region = select(targets, ~done), region.take(~done)
            if len(active) == 0:
                return end, won
        point = region.bring_in(point.add(steepest(gradient, region.norm), alpha=length))
    end[active] = point
    with torch.no_grad():
        won[active] = margin(model(point), y, targets) > 0
    return end, won
