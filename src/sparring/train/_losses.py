"""Losses of `fit`: a scalar from a model, float images in [0, 1], labels and a generator."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..attacks import pgd
from ..errors import UserError
from ..modes import eval_mode
from ..outputs import Door, logits_of
from ..threat import L2, LINF, gaussian

Loss = Callable[[nn.Module, Tensor, Tensor, torch.Generator | None], Tensor]


@dataclass(frozen=True)
class Ramped:
    """A loss that changes during training: `at(share)` is the loss at a fraction of all steps, in (0, 1].

    Adversarial training with a large eps needs an eps that grows; otherwise it ends at a constant network.
    """

    at: Callable[[float], Loss]


def smoothed(label_smoothing: float) -> Loss:
    """Return the cross-entropy on clean images against labels smoothed by a share in [0, 1) (Szegedy et al. 2016)."""
    _check_smoothing(label_smoothing)

    def loss(model: nn.Module, x: Tensor, y: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return F.cross_entropy(logits_of(model(x)), y, label_smoothing=label_smoothing)

    return loss


def cross_entropy(model: nn.Module, x: Tensor, y: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Return the mean cross-entropy on clean images."""
    return F.cross_entropy(logits_of(model(x)), y)


def adversarial(
    *, eps: float, norm: float = LINF, steps: int = 7, step_size: float | None = None, label_smoothing: float = 0.0
) -> Loss:
    """Return the PGD adversarial training loss (Madry et al. 2018, eq. 2.1): cross-entropy at PGD's points.

    `eps` is in image units ([0, 1]); `step_size` defaults to 2.5 eps / steps.
    """
    _check(eps, norm, steps)
    _check_smoothing(label_smoothing)
    length = 2.5 * eps / steps if step_size is None else step_size

    def loss(model: nn.Module, x: Tensor, y: Tensor, generator: torch.Generator | None = None) -> Tensor:
        with eval_mode(model):
            x_adv = pgd(
                Door(model), x, y, norm=norm, eps=eps, steps=steps, step_size=length, stop_early=False,
                generator=generator,
            )  # fmt: skip
        return F.cross_entropy(logits_of(model(x_adv)), y, label_smoothing=label_smoothing)

    return loss


def trades(*, eps: float, norm: float = LINF, steps: int = 7, beta: float = 6.0, label_smoothing: float = 0.0) -> Loss:
    """Return the TRADES loss (Zhang et al. 2019, eq. 5): clean cross-entropy + beta · KL(clean ‖ perturbed).

    The inner maximisation ascends the KL divergence from a small Gaussian start, as its authors do.
    """
    _check(eps, norm, steps)
    _check_smoothing(label_smoothing)

    def loss(model: nn.Module, x: Tensor, y: Tensor, generator: torch.Generator | None = None) -> Tensor:
        with eval_mode(model):
            x_adv = _ascend_divergence(model, x, eps, norm, steps, generator)
        clean = logits_of(model(x))
        divergence = F.kl_div(F.log_softmax(logits_of(model(x_adv)), 1), F.softmax(clean, 1), reduction="batchmean")
        return F.cross_entropy(clean, y, label_smoothing=label_smoothing) + beta * divergence

    return loss


def _ascend_divergence(
    model: nn.Module, x: Tensor, eps: float, norm: float, steps: int, generator: torch.Generator | None
) -> Tensor:
    with torch.no_grad():
        target = F.softmax(logits_of(model(x)), 1)
    noise = gaussian(x.shape, x, generator)
    x_adv = (x + 1e-3 * noise).clamp(0, 1)
    for _ in range(steps):
        x_adv.requires_grad_(True)
        divergence = F.kl_div(F.log_softmax(logits_of(model(x_adv)), 1), target, reduction="sum")
        (gradient,) = torch.autograd.grad(divergence, x_adv)
        step = 2.5 * eps / steps
        with torch.no_grad():
            if norm == LINF:
                move = x_adv + step * gradient.sign()
                x_adv = torch.minimum(torch.maximum(move, x - eps), x + eps).clamp(0, 1)
            else:
                length = gradient.flatten(1).norm(dim=1).clamp_min(1e-30).view(-1, 1, 1, 1)
                delta = x_adv + step * gradient / length - x
                size = delta.flatten(1).norm(dim=1).clamp_min(1e-30).view(-1, 1, 1, 1)
                x_adv = (x + delta * (eps / size).clamp_max(1.0)).clamp(0, 1)
    return x_adv.detach()


def _check_smoothing(label_smoothing: float) -> None:
    if not 0 <= label_smoothing < 1:
        raise UserError(f"label_smoothing must be in [0, 1), not {label_smoothing}")


def _check(eps: float, norm: float, steps: int) -> None:
    if norm not in (LINF, L2):
        raise UserError("adversarial training supports only linf and l2")
    if not eps > 0 or (norm == LINF and eps > 1):
        raise UserError(f"adversarial training: eps is in image units [0, 1]; {eps} is out of range; divide it by 255")
    if steps < 1:
        raise UserError(f"adversarial training: steps must be at least 1, not {steps}")
