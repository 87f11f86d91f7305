"""Minimum-norm attacks in l0: sigma-zero, and exchanges of values, which need fewer."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ...draws import Source
from ...threat import L0, LINF, distance
from .._entry import opening
from .._gradients import logits_and_gradient
from ._losses import is_clear, is_past, margin_loss
from ._projections import Nearest, column, keep_within

# Adam's memories of the gradient and of its square (Kingma & Ba 2015).
_MEAN, _SQUARE = 0.9, 0.999
# The last step length relative to the first, and how fast the threshold follows it.
_LAST, _FOLLOW = 0.1, 0.01
# Extra weights of values that have already moved, beyond their gradient, used in turn.
_LOYALTY = (0.0, 1.0, 0.3, 4.0)


@opening
def sigma_zero(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    norm: float = L0,
    eps: float | None = None,
    targets: Tensor | None = None,
    generator: Source = None,
    steps: int = 1000,
    sigma: float = 1e-3,
    threshold: float = 0.3,
) -> Tensor:
    """Descend margin plus a smooth l0 norm, and drop what is below a threshold (Cinà et al. 2025, algorithm 1).

    The smooth norm is the mean of d²/(d² + sigma) over all values d of the perturbation. Adam takes steps whose length
    falls from 1 to 0.1 on a half cosine, along gradients of unit linf norm. After each, values below a threshold of
    their image are set to 0; it grows by a hundredth of the step length where the point was adversarial and falls by
    as much elsewhere. Supports only l0. Returns the adversarial point that differs in the fewest values, or x if there
    is none (within eps, if given). The generator is not used. Raises Unsupported for other norms.
    """
    found, delta = Nearest.of(x), torch.zeros_like(x)
    mean, square, floor = torch.zeros_like(x), torch.zeros_like(x), torch.full_like(found.distance, threshold)
    for step in range(1, steps + 1):
        point = x + delta
        logits, gradient = logits_and_gradient(model, point, _shortfall, y, targets)
        won = is_past(logits, y, targets)
        found.update_(slice(None), point, distance(delta, L0), won)
        gradient -= _pull(delta, sigma)
        gradient /= column(distance(gradient, LINF).clamp_min(1e-12), x)
        mean.lerp_(gradient, 1 - _MEAN)
        square.mul_(_SQUARE).addcmul_(gradient, gradient, value=1 - _SQUARE)
        rate = _LAST + (1 - _LAST) * (1 + math.cos(math.pi * (step - 1) / steps)) / 2
        size = (square / (1 - _SQUARE**step)).sqrt_().add_(1e-8)
        delta = (x + delta).addcdiv_(mean, size, value=rate / (1 - _MEAN**step)).clamp_(0, 1).sub_(x)
        floor = (floor + _FOLLOW * rate * (2 * won - 1)).clamp_(0, 1)
        delta[delta.abs() < column(floor, x)] = 0
    return keep_within(x, found.point, norm, eps)


def _shortfall(logits: Tensor, y: Tensor, targets: Tensor | None) -> Tensor:
    return margin_loss(logits, y, targets).clamp_max(0)


def _pull(delta: Tensor, sigma: float) -> Tensor:
    """Return the gradient of the smooth l0 norm."""
    return 2 * sigma * delta / ((delta.square() + sigma).square() * delta[0].numel())


def exchange_(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    targets: Tensor | None,
    found: Nearest,
    rounds: int,
    *,
    aims: Tensor | None = None,
) -> None:
    """Look for points that differ from x in fewer values than those in `found`, and keep them there.

    Each round starts from the points found and moves the values that gain most to an end of the box: as many as the
    margin needs by its gradient at the last point, but fewer than are known to suffice. With `aims`, the margin is
    that of these classes.
    """
    point, base = found.point, x.flatten(1)
    for step in range(rounds + 1):
        aimed = targets if aims is None else aims
        logits, gradient = logits_and_gradient(model, point, margin_loss, y, aimed)
        delta = (point - x).flatten(1)
        found.update_(slice(None), point, distance(delta, L0), is_clear(margin_loss(logits, y, targets), logits))
        slope = gradient.flatten(1)
        gains = torch.where(slope > 0, 1 - base, -base).mul_(slope)
        order = (gains * (1 + _LOYALTY[step % len(_LOYALTY)] * (delta != 0))).argsort(dim=1, descending=True)
        missing = (delta * slope).sum(1) - margin_loss(logits, y, aimed)
        enough = 1 + (gains.gather(1, order).cumsum(1) < missing.unsqueeze(1)).sum(1)
        most = torch.minimum(enough, (found.distance - 1).clamp(1, base.shape[1])).unsqueeze(1)
        moved = order.argsort(dim=1) < most
        point = torch.where(moved, (slope > 0).to(base), base).view_as(x)
    with torch.no_grad():
        won = is_past(model(point), y, targets)
    found.update_(slice(None), point, distance(point - x, L0), won)
