"""Objectives of attacks per image: (logits, y, targets) to (N,), larger = closer to the attacker's goal.

With `targets` (int64, (N,)) the goal is that class, otherwise any class but y.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

# A fresh pass in another batch may round this differently, as a share of the largest logit.
_ROUNDING = 2e-6

Objective = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def is_answer(logits: Tensor) -> Tensor:
    """Return which images have a largest logit: no NaN, no +inf, and not only −inf, which masks a class."""
    return torch.isfinite(logits.amax(1))


def others(logits: Tensor, label: Tensor) -> Tensor:
    """Return the logits with those of each image's label at −inf."""
    return logits.scatter(1, label.unsqueeze(1), -torch.inf)


def margin_loss(logits: Tensor, y: Tensor, targets: Tensor | None = None) -> Tensor:
    """Return the signed logit difference to the boundary: positive if and only if the attack succeeded.

    Untargeted: the maximum of the other logits minus the label's logit; targeted: the target's logit minus the maximum
    of the others (Carlini & Wagner 2017, section V-A, f_6 with opposite sign and without a floor).
    """
    label = y if targets is None else targets
    gap = others(logits, label).amax(1) - logits.gather(1, label.unsqueeze(1)).squeeze(1)
    return gap if targets is None else -gap


def is_past(logits: Tensor, y: Tensor, targets: Tensor | None = None, *, confidence: float = 0.0) -> Tensor:
    """Return where the margin exceeds `confidence` by more than rounding.

    A search for the nearest point ends so near the boundary that another pass could otherwise judge differently.
    """
    return is_clear(margin_loss(logits, y, targets), logits, confidence=confidence)


def is_clear(gap: Tensor, logits: Tensor, *, confidence: float = 0.0) -> Tensor:
    """Return what `is_past` does for logits whose margin is known, (N,)."""
    return gap > confidence + _ROUNDING * logits.abs().amax(1)


def smooth_margin(logits: Tensor, y: Tensor, targets: Tensor | None = None) -> Tensor:
    """Return the margin with its maximum over classes replaced by a logsumexp, so that every class pulls."""
    label = y if targets is None else targets
    gap = others(logits, label).logsumexp(1) - logits.gather(1, label.unsqueeze(1)).squeeze(1)
    return gap if targets is None else -gap


def cross_entropy(logits: Tensor, y: Tensor, targets: Tensor | None = None) -> Tensor:
    """Return the cross-entropy of y, or minus that of the targets."""
    if targets is None:
        return functional.cross_entropy(logits, y, reduction="none")
    return -functional.cross_entropy(logits, targets, reduction="none")


def cross_entropy_slope(logits: Tensor, y: Tensor, targets: Tensor | None = None) -> Tensor:
    """Return the gradient of `cross_entropy` with respect to the logits: what autograd finds, to the last bit."""
    label, sign = (y, -1.0) if targets is None else (targets, 1.0)
    upstream = torch.zeros_like(logits).scatter_(1, label.unsqueeze(1), sign)
    slope: Tensor = torch.ops.aten._log_softmax_backward_data(upstream, logits.log_softmax(1), 1, logits.dtype)
    return slope


def scaled_cross_entropy(logits: Tensor, y: Tensor, targets: Tensor | None = None) -> Tensor:
    """Return the cross-entropy of logits scaled to a range of 20, so that it never saturates and is scale-invariant.

    The scale is constant for the gradient. 20 is the typical range of a trained network with ten classes. For two
    classes the margin is returned, because float32 would lose the gradient of the label's class at this range.
    """
    if logits.shape[1] == 2:
        return margin_loss(logits, y, targets)
    span = (logits.amax(1, keepdim=True) - logits.amin(1, keepdim=True)).detach().clamp_min(1e-12)
    return cross_entropy(logits * (20 / span), y, targets)


def dlr(logits: Tensor, y: Tensor, targets: Tensor | None = None) -> Tensor:
    """Return the difference-of-logits ratio, which is invariant to scale and shift of the logits.

    Croce & Hein 2020 (AutoAttack), equations 6 and 7. The paper's denominators need three classes, or four if targeted.
    With three classes a targeted loss divides by the range of the logits, held constant: otherwise it would be constant
    for the lowest class. With two classes, the margin is returned.
    """
    if logits.shape[1] == 2:
        return margin_loss(logits, y, targets)
    ordered = logits.sort(dim=1, descending=True).values
    own = logits.gather(1, y.unsqueeze(1)).squeeze(1)
    if targets is None:
        rival, low = others(logits, y).amax(1), ordered[:, 2]
    else:
        rival = logits.gather(1, targets.unsqueeze(1)).squeeze(1)
        if logits.shape[1] == 3:
            return (rival - own) / ((ordered[:, 0] - ordered[:, 2]).detach() + 1e-12)
        low = ordered[:, 2:4].mean(1)
    return (rival - own) / (ordered[:, 0] - low + 1e-12)
