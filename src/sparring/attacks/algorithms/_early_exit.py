"""Who is still worth a step: images leave at their success, or once their ascent has stalled far from the boundary."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# An image is given up when even this many times its recent pace would not bring it to the boundary.
_PATIENCE = 2.0
# Just short of the boundary: what is missing is at most this share of what was climbed.
_SHORT = 0.1
# Moving the others together costs more than a few passes for nothing: wait until this share has left.
_SLACK = 0.1


@dataclass
class Prospects:
    """Which images of a batch are still climbing, in an attack of `steps` steps that is checked every `interval` steps.

    spared: the step up to which nobody just short of the boundary is given up; row: their numbers, int64 (N,); first,
    best and checked: the margin at the start, the largest so far, and the one at the last check; gone: who has left but
    is still in the batch.

    An ascent inside a ball slows down: it crosses the ball first, then only turns corners. So twice the pace since the
    last check, kept up for all steps that are left, is more than what is to be hoped for. But an image may also stand
    still while steps are too long, and go on once they are shorter, on networks with convolutions most of all.
    """

    steps: int
    interval: int
    spared: int
    row: Tensor
    first: Tensor
    best: Tensor
    checked: Tensor
    gone: Tensor

    @classmethod
    def of(cls, images: int, steps: int, *, interval: int, like: Tensor, spared: int = 0) -> Prospects:
        """Return the beginning, with everybody in it."""
        row = torch.arange(images, device=like.device)
        lowest = torch.full((images,), -torch.inf, dtype=like.dtype, device=like.device)
        return cls(steps, interval, spared, row, lowest, lowest, lowest, torch.zeros_like(row, dtype=torch.bool))

    def judge(self, margin: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Take note of the margins after `step` steps; return who has just succeeded and who leaves at this step."""
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

    def crowded(self) -> bool:
        """Return whether enough images of the batch have left to move the others together."""
        return int(self.gone.sum()) > _SLACK * len(self.gone)

    def staying(self) -> Tensor:
        """Return the places in the batch of the images that have not left."""
        return (~self.gone).nonzero().squeeze(1)

    def take(self, which: Tensor) -> Prospects:
        """Return the chosen images."""
        return Prospects(
            self.steps,
            self.interval,
            self.spared,
            self.row[which],
            self.first[which],
            self.best[which],
            self.checked[which],
            self.gone[which],
        )
