"""Gradient attacks with a budget: FGSM, R-FGSM and PGD."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...draws import Source, drawn_at
from ...threat import LINF, random_point
from ...waiting import alone
from .._entry import opening
from .._gradients import logits_and_gradient, on_cpu
from ._losses import Objective, cross_entropy, margin_loss
from ._projections import FeasibleSet, budget, climb, inside, put_, select, shrink

# PGD's last step as a share of its first.
_LAST_STEP = 0.01
# An image is given up when even this many times its recent pace would not bring it to the boundary.
_PATIENCE = 2.0
# Just short of the boundary: the remaining gap is at most this share of what was climbed.
_SHORT = 0.1
# Compacting the batch costs more than a few wasted passes: wait until this share of images has left.
_SLACK = 0.1


@dataclass
class Prospects:
    """Which images of a batch are still climbing, in an attack of `steps` steps that is checked every `interval` steps.

    spared: the step up to which images just short of the boundary are kept; row: their numbers, int64 (N,); y and
    targets: their labels; first, best and checked: the margin at the start, the largest so far, and the one at the last
    check; gone: which images have left but are still in the batch.

    An ascent inside a ball slows down: it crosses the ball first, then only turns corners. So twice the pace since the
    last check, for all remaining steps, is more than can be expected. But an image may also make no progress while
    steps are too long and continue once they are shorter, above all on convolutional networks.
    """

    steps: int
    interval: int
    spared: int
    row: Tensor
    y: Tensor
    targets: Tensor | None
    first: Tensor
    best: Tensor
    checked: Tensor
    gone: Tensor

    @classmethod
    def of(
        cls, x: Tensor, y: Tensor, targets: Tensor | None, steps: int, *, interval: int, spared: int = 0
    ) -> Prospects:
        """Return the beginning, with all images x in it."""
        row = torch.arange(len(x), device=x.device)
        low = torch.full((len(x),), -torch.inf, dtype=x.dtype, device=x.device)
        return cls(steps, interval, spared, row, y, targets, low, low, low, torch.zeros_like(row, dtype=torch.bool))

    def judge_(self, logits: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Record the logits after `step` steps; return which images have just succeeded and which leave now."""
        margin = margin_loss(logits, self.y, self.targets)
        if step == 0:
            self.first = margin
        self.best = torch.maximum(self.best, margin)
        done = (margin > 0) & ~self.gone
        leaving = done
        if step > 0 and step % self.interval == 0:
            pace = (self.best - self.checked) / self.interval
            hopeless = self.best + _PATIENCE * pace * (self.steps - step) < 0
            if step <= self.spared:
                hopeless &= ~self.short()
            leaving = done | (hopeless & ~self.gone)
        if step % self.interval == 0:
            self.checked = self.best
        self.gone = self.gone | leaving
        return done, leaving

    def short(self) -> Tensor:
        """Return whose best point lies just short of the boundary, or beyond it."""
        return self.best + _SHORT * (self.best - self.first) > 0

    def crowded(self, step: int, *, every: int = 0) -> bool:
        """Return whether enough images of the batch have left to move the others together.

        Off the CPU, where asking means waiting, only once in `every` steps (0: never).
        """
        asked = on_cpu(self.gone) or (every > 0 and step % every == every - 1)
        return asked and int(self.gone.sum()) > _SLACK * len(self.gone)

    def staying(self) -> Tensor:
        """Return the positions in the batch of the images that have not left."""
        return (~self.gone).nonzero().squeeze(1)


@opening
def fgsm(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    norm: float = LINF,
    eps: float | None = None,
    targets: Tensor | None = None,
    generator: Source = None,
    objective: Objective = cross_entropy,
) -> Tensor:
    """Take one steepest step of length eps (Goodfellow et al. 2015, section 4).

    x: (N, ...) in [0, 1]; eps in units of pixels. Returns points inside the box and the budget. The generator is not
    used. Raises UserError without eps.
    """
    eps = budget(eps)
    _, gradient = logits_and_gradient(model, x, objective, y, targets)
    return inside(x, climb(x, gradient, norm, eps), norm, eps)


@opening
def rfgsm(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    norm: float = LINF,
    eps: float | None = None,
    targets: Tensor | None = None,
    generator: Source = None,
    objective: Objective = cross_entropy,
    share: float = 0.5,
) -> Tensor:
    """Take a random step of length share·eps, then a gradient step with the rest (Tramèr et al. 2018, equation 7).

    The random step is a corner of the cube for linf (the paper's sign of a Gaussian) and a uniform point in the ball
    for other norms. Raises UserError without eps.
    """
    eps = budget(eps)
    first = random_point(x, norm, share * eps, generator)
    if norm == LINF:
        first = share * eps * first.sign()
    start = inside(x, x + first, norm, eps)
    _, gradient = logits_and_gradient(model, start, objective, y, targets)
    return inside(x, climb(start, gradient, norm, (1 - share) * eps), norm, eps)


@opening
def pgd(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    norm: float = LINF,
    eps: float | None = None,
    targets: Tensor | None = None,
    generator: Source = None,
    objective: Objective = cross_entropy,
    steps: int = 40,
    step_size: float | None = None,
    restarts: int = 1,
    random_start: bool = True,
    stop_early: bool = True,
) -> Tensor:
    """Ascend the objective by projected steepest steps (Madry et al. 2018, section 2.1).

    `step_size`, in units of eps, is constant. By default, steps shrink geometrically from eps to eps/100, which fools
    more images in fewer steps than any constant. Images leave at their first success, or when their ascent has stalled
    far from the boundary (see `Prospects`), unless `stop_early` is False, as in adversarial training. Restarts use the
    remaining images. Raises UserError without eps.
    """
    eps = budget(eps)
    lengths = [eps * _LAST_STEP ** (step / steps) if step_size is None else step_size for step in range(steps)]
    x_adv = x.clone()
    standing = torch.arange(len(x), device=x.device)
    for restart in range(restarts):
        if len(standing) == 0:
            break
        region = FeasibleSet.around(x[standing], norm, eps)
        start = region.x.clone()
        if random_start or restart > 0:
            source = drawn_at(generator, restart, standing)
            start = region.bring_in_(start.add_(random_point(start, norm, eps, source)))
        interval = max(steps // 8, 4)
        prospects = Prospects.of(start, y[standing], select(targets, standing), steps, interval=interval)
        x_adv[standing], won = _ascend(model, region, start, prospects, objective, lengths, stop_early)
        standing = standing[~won]
    return x_adv


def _ascend(
    model: nn.Module,
    region: FeasibleSet,
    point: Tensor,
    prospects: Prospects,
    objective: Objective,
    lengths: list[float],
    stop_early: bool,
) -> tuple[Tensor, Tensor]:
    """Return the points where each image's ascent ended, and which are known to be adversarial."""
    end = point.clone()
    won = torch.zeros(len(end), dtype=torch.bool, device=end.device)
    for step, length in enumerate(lengths):
        logits, gradient = logits_and_gradient(model, point, objective, prospects.y, prospects.targets)
        if stop_early:
            done, leaving = prospects.judge_(logits, step)
            put_(end, prospects.row, leaving, point)
            put_(won, prospects.row, done, done)
        with alone(point.numel()) if region.norm == LINF else nullcontext():
            point = region.ahead(point, gradient, length)
        if prospects.crowded(step):
            stay = prospects.staying()
            prospects, region, point = shrink(prospects, stay), shrink(region, stay), point[stay]
            if len(stay) == 0:
                return end, won
    stay = prospects.staying()
    prospects, point = shrink(prospects, stay), point[stay]
    end[prospects.row] = point
    with torch.no_grad():
        won[prospects.row] = margin_loss(model(point), prospects.y, prospects.targets) > 0
    return end, won
