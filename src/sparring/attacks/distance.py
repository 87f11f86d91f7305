"""Minimum-norm attacks that read like their papers: DeepFool."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from ..threat import L2, dual
from .derivatives import logits_and_rows
from .losses import margin
from .steps import column, keep_within, select, steepest

__all__ = ["deepfool"]

# Added to every step after the first, in pixel units (the authors' code adds it always): where clipping takes more
# than the overshoot, steps alone would approach the boundary for ever.
_PUSH = 1e-4


def deepfool(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    norm: float = L2,
    eps: float | None = None,
    targets: Tensor | None = None,
    generator: torch.Generator | None = None,
    steps: int = 50,
    overshoot: float = 0.02,
    candidates: int | None = None,
) -> Tensor:
    """Step onto the nearest linearised boundary until the label changes (Moosavi-Dezfooli et al. 2016, algorithm 2).

    norm: l_2, l_inf (the paper's section 3.3) or l_1. All classes compete unless `candidates` limits them to those of
    largest logit. Every step is stretched by 1 + overshoot and clipped to the box at once, never at the end: the
    network judges exactly what is returned, and what clipping took from one step the next one makes up for. Images
    leave at their first success; one still standing after `steps` comes back where it was left, one outside a given
    eps unchanged. The generator is not used.
    """
    x_adv = x.clone()
    active = torch.arange(len(x), device=x.device)
    point = x
    for step in range(steps + 1):
        with torch.no_grad():
            standing = margin(model(point), y, targets) <= 0
        x_adv[active] = point
        if step == steps or not bool(standing.any()):
            break
        active, point, y, targets = active[standing], point[standing], y[standing], select(targets, standing)
        length, gradient = _nearest_boundary(model, point, y, targets, norm, candidates)
        stretched = column((1 + overshoot) * (length + (_PUSH if step > 0 else 0.0)), point)
        point = (point + stretched * steepest(gradient, norm)).clamp_(0, 1)
    return keep_within(x, x_adv, norm, eps)


def _nearest_boundary(
    model: nn.Module, x: Tensor, y: Tensor, targets: Tensor | None, norm: float, candidates: int | None
) -> tuple[Tensor, Tensor]:
    """Return the distance, shape (N,), and the gradient of the two-class boundary that is nearest when linearised."""
    pairs: list[Tensor] = []

    def differences(logits: Tensor) -> Tensor:
        pairs.append(_rivals(logits, y, targets, candidates))
        return pairs[0]

    logits, gradients = logits_and_rows(model, x, differences)
    gaps = -(pairs[0] * logits).sum(2)
    dual_norms = torch.linalg.vector_norm(gradients.flatten(2), ord=dual(norm), dim=2).clamp_min(1e-30)
    nearest = (gaps / dual_norms).argmin(0)
    images = torch.arange(len(x), device=x.device)
    return (gaps / dual_norms)[nearest, images], gradients[nearest, images]


def _rivals(logits: Tensor, y: Tensor, targets: Tensor | None, candidates: int | None) -> Tensor:
    """Return the differences of logits that an attack may turn positive, as weights of shape (rivals, N, classes)."""
    classes = logits.shape[1]
    if targets is not None:
        best = logits.scatter(1, targets.unsqueeze(1), -torch.inf).argmax(1)
        pair = one_hot(targets, classes) - one_hot(best, classes)
        return pair.unsqueeze(0).to(logits.dtype)
    count = classes - 1 if candidates is None else min(candidates, classes - 1)
    others = logits.scatter(1, y.unsqueeze(1), -torch.inf).topk(count, dim=1).indices.T
    return (one_hot(others, classes) - one_hot(y, classes)).to(logits.dtype)
