"""The l2 attack of Carlini & Wagner 2017, with two ways to start the search of c.

Every image goes through its rounds at its own pace: one that ends a round begins the next in the same batch. The batch
therefore stays full until images have finished all their rounds.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...draws import Source
from ...threat import L2, distance
from .._entry import opening
from .._gradients import logits_and_gradient, logits_and_pull
from ._losses import is_clear, margin_loss
from ._projections import keep_within, shrink

# Keeps arctanh finite for pixels that lie on the box.
_SHRINK = 1 - 1e-6
# How far beyond the constant of the linearised margin the search begins: nearly every image then succeeds at once.
_AHEAD = 2.0


@opening
def cw(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    norm: float = L2,
    eps: float | None = None,
    targets: Tensor | None = None,
    generator: Source = None,
    confidence: float = 0.0,
    steps: int = 1000,
    searches: int = 9,
    learning_rate: float = 0.01,
    start_constant: float | None = 1e-3,
    precision: float = 0.5,
) -> Tensor:
    """Minimise squared distance plus c times the margin shortfall over tanh variables (sections V and VI-A).

    Runs Adam for `steps` iterations in at most `searches` rounds of binary search on c (the paper's code: 10000 and 9).
    Each round starts from the clean image and ends early if a tenth of the steps made no progress, as in the authors'
    code. The search starts at `start_constant` and multiplies by ten; it ends when c is known up to the fraction
    `precision`. 0 runs all rounds, as the authors' code does: on MNIST 40% more steps for distances that are 0.02%
    smaller on average. start_constant=None starts at twice the c at which the linearised margin reaches the boundary,
    and needs a third of the steps. Supports only l2. Returns the nearest point with a margin above `confidence`, or x
    if there is none (within eps, if given). The generator is not used. Raises Unsupported for other norms.
    """
    if start_constant is None:
        constant, growth = _AHEAD * _linearised(model, x, y, targets, confidence), 2.0
    else:
        constant, growth = torch.full((len(x),), start_constant, dtype=x.dtype, device=x.device), 10.0
    nearest, sign = x.clone(), 1 if targets is None else -1
    images = _Images.starting(x.contiguous(), y if targets is None else targets, constant)
    often = max(steps // 10, 1)
    while len(images.x):
        ahead = torch.minimum(often - images.step % often, steps - images.step)
        pause = int(ahead.min())
        moved, gap = _descend(model, images, nearest, pause, confidence, learning_rate, sign)
        images.step += pause
        due = images.step % often == 0
        loss = moved.square() + images.constant * (confidence - gap).clamp_min(0)
        over = (due & ~(loss <= 0.9999 * images.checked)) | (images.step == steps)
        images.checked = torch.where(due, loss, images.checked)
        if bool(over.any()):
            _begin_next(images, over.nonzero().squeeze(1), growth)
            searching = torch.isinf(images.high) | (images.high - images.low > precision * images.high)
            rows = (searching & (images.rounds < searches) | ~over).nonzero().squeeze(1)
            images = shrink(images, rows[images.step[rows].argsort(stable=True)])
    return keep_within(x, nearest, L2, eps)


@dataclass
class _Images:
    """Images whose search continues, a row each; Adam updates the rows of one `step`, which are neighbours, together.

    place: the image's row in the batch. label: y or the target. low, high: bounds of c. step: of this round,
    which `won` if it found an adversarial point. checked: the loss when progress was last looked for. smallest: the
    distance of the nearest point of all rounds. v: 2·arctanh(2p - 1) for the point p, with Adam's averages.
    """

    place: Tensor
    x: Tensor
    label: Tensor
    constant: Tensor
    low: Tensor
    high: Tensor
    rounds: Tensor
    step: Tensor
    won: Tensor
    checked: Tensor
    smallest: Tensor
    v: Tensor
    mean: Tensor
    square: Tensor

    @classmethod
    def starting(cls, x: Tensor, label: Tensor, constant: Tensor) -> _Images:
        """Return images before their first step."""
        v, none, never = _variable(x), torch.zeros_like(label), torch.full_like(constant, torch.inf)
        return cls(
            place=torch.arange(len(x), device=x.device), x=x, label=label, constant=constant,
            low=torch.zeros_like(constant), high=never, rounds=none, step=none.clone(), won=none.bool(),
            checked=never.clone(), smallest=never.clone(), v=v, mean=torch.zeros_like(v), square=torch.zeros_like(v),
        )  # fmt: skip


def _variable(x: Tensor) -> Tensor:
    return torch.atanh((2 * x - 1) * _SHRINK).mul_(2)


def _begin_next(images: _Images, rows: Tensor, growth: float) -> None:
    """Narrow down the constants of the images in these rows by the result of their round, and begin another."""
    won, constant = images.won[rows], images.constant[rows]
    low, high = torch.where(won, images.low[rows], constant), torch.where(won, constant, images.high[rows])
    images.low[rows], images.high[rows] = low, high
    images.constant[rows] = torch.where(torch.isfinite(high), (low + high) / 2, low * growth)
    images.rounds[rows] += 1
    images.step[rows], images.won[rows], images.checked[rows] = 0, False, torch.inf
    images.v[rows], images.mean[rows], images.square[rows] = _variable(images.x[rows]), 0.0, 0.0


def _descend(
    model: nn.Module, images: _Images, nearest: Tensor, count: int, confidence: float, learning_rate: float, sign: int
) -> tuple[Tensor, Tensor]:
    """Take `count` steps and note what is found in `nearest`; return distances and margins before the last, (N,) each.

    Written out by hand: the gradient of the distance and of the sigmoid needs no graph, and Adam works in place.
    """
    x, v = images.x, images.v
    paces, sizes = torch.unique_consecutive(images.step, return_counts=True)
    taken = paces.to(torch.float32)
    point, delta, slope = (torch.empty_like(v) for _ in range(3))
    # Adam reads memory in order, whatever the strides, so it gets the gradient in a buffer of our own.
    blocks = (list(torch.split(values, sizes.tolist())) for values in (v, delta, images.mean, images.square))
    variables, gradients, means, squares = blocks
    # Half the gradient with respect to v, which is a quarter of that with respect to arctanh(2p - 1).
    aim = Aim(images.label, images.constant / 2, confidence, sign)
    moved = gap = images.smallest
    for _ in range(count):
        torch.sigmoid(v, out=point)
        logits, gradient = logits_and_pull(model, point, aim)
        torch.sub(point, x, out=delta)
        moved, gap = distance(delta, L2), aim.gap
        clear = is_clear(gap, logits, confidence=confidence)
        images.won |= clear
        better = clear.logical_and_(moved < images.smallest).nonzero().squeeze(1)
        if len(better):
            nearest.index_copy_(0, images.place[better], point[better])
            images.smallest[better] = moved[better]
        # The chain rule through p = sigmoid(v): p - p².
        delta.add_(gradient).mul_(torch.addcmul(point, point, point, value=-1, out=slope))
        # The same update as torch.optim.Adam, whose public wrapper takes half as long again. The paper steps in half
        # of v: there the step is half as long, and gradient and epsilon are four times as large.
        taken += 1
        torch._fused_adam_(
            variables, gradients, means, squares, [], list(taken.unbind()), lr=2 * learning_rate, beta1=0.9,
            beta2=0.999, eps=1e-8 / 4, weight_decay=0.0, amsgrad=False, maximize=False,
        )  # fmt: skip
    return moved, gap


class Aim:
    """The gradient of the paper's c·f_6, c times the margin shortfall, with respect to the logits.

    label, constant: (N,); sign: 1 to leave the label, -1 to reach it. `gap` keeps the margins that were last seen.
    """

    def __init__(self, label: Tensor, constant: Tensor, confidence: float, sign: int) -> None:
        self.label, self.sign, self.confidence = label.unsqueeze(1), sign, confidence
        self.constant = sign * constant.unsqueeze(1)
        self.away = torch.zeros(0)
        self.gap = torch.empty_like(constant)

    def __call__(self, logits: Tensor) -> Tensor:
        """Return the gradient (N, classes) at these logits."""
        if self.away.shape != logits.shape:
            self.away = torch.zeros_like(logits).scatter_(1, self.label, 1.0)
        best, rival = logits.scatter(1, self.label, -torch.inf).max(1, keepdim=True)
        gap = best.sub_(logits.gather(1, self.label)).mul_(self.sign)
        self.gap = gap.squeeze(1)
        pull = self.constant * (gap <= self.confidence)
        return (self.away * pull).scatter_(1, rival, pull.neg_())


def _linearised(model: nn.Module, x: Tensor, y: Tensor, targets: Tensor | None, confidence: float) -> Tensor:
    """Return the constants at which the boundary would just be reached if the margin were linear and the box not there.

    Then |δ|² + c·(lack − g·δ) is smallest at δ = c·g/2, which closes the gap if c·|g|² = 2·lack.
    """
    logits, gradient = logits_and_gradient(model, x, margin_loss, y, targets)
    lack = (confidence - margin_loss(logits, y, targets)).clamp_min(1e-12)
    return 2 * lack / distance(gradient, L2).square().clamp_min(1e-12)
