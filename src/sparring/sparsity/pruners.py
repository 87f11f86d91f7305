"""Pruners that follow a schedule: one-shot, gradual, proximal."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from ..errors import UserError
from .contracts import Batch, Loss, Masks, Pruner, Score
from .masks import apply_, sparsity_of
from .rules import Rule

__all__ = ["cubic", "gradual", "one_shot"]


def cubic(progress: float, final: float, initial: float = 0.0) -> float:
    """Return the sparsity when the fraction `progress` of the schedule is over (Zhu & Gupta 2017, equation 1)."""
    left = 1.0 - min(max(progress, 0.0), 1.0)
    return final + (initial - final) * left**3


def window(start: float, stop: float, steps: int) -> tuple[int, int]:
    """Return the first and the last step of the part [start, stop] of a training; the last is never step `steps`."""
    last = min(steps - 1, max(0, math.ceil(stop * steps) - 1))
    return min(math.floor(start * steps), last), last


def check_window(start: float, stop: float) -> None:
    """Raise UserError unless 0 <= start <= stop <= 1."""
    if not 0 <= start <= stop <= 1:
        raise UserError(
            f"pruning goes from start to stop, fractions of the training with start <= stop, not {start}, {stop}"
        )


def check_sparsity(sparsity: float | Mapping[str, float]) -> None:
    """Raise UserError unless the sparsity, or each of them, is in [0, 1)."""
    for value in sparsity.values() if isinstance(sparsity, Mapping) else (sparsity,):
        if not 0 <= value < 1:
            raise UserError(f"sparsity is the fraction removed, at least 0 and below 1, not {value}")


@dataclass(frozen=True)
class _Gradual:
    score: Score
    sparsity: float | Mapping[str, float]
    start: float
    stop: float
    every: int
    rule: Rule
    dense_weights: bool = field(default=False, init=False)

    def __call__(
        self,
        model: nn.Module,
        masks: Masks,
        *,
        step: int,
        steps: int,
        batch: Batch,
        loss: Loss,
        generator: torch.Generator,
    ) -> Masks:
        first, last = window(self.start, self.stop, steps)
        if not first <= step <= last or ((step - first) % self.every and step != last):
            return masks
        progress = 1.0 if step == last else (step - first) / (last - first)
        scores = self.score(model, batch, loss=loss, generator=generator)
        masks = self.rule.masks(model, scores, self._target(masks, progress), masks=masks, batch=batch)
        apply_(model, masks)
        return masks

    def _target(self, masks: Masks, progress: float) -> float | dict[str, float]:
        # What is gone stays gone: a network that is already pruned waits until the schedule has caught up.
        now = self.rule.open(masks)
        if not isinstance(self.sparsity, Mapping):
            return max(cubic(progress, self.sparsity), sparsity_of(now))
        return {
            name: max(cubic(progress, value), sparsity_of({name: now[name]}))
            for name, value in self.sparsity.items()
            if name in now
        }


def gradual(
    score: Score,
    sparsity: float | Mapping[str, float],
    *,
    start: float = 0.0,
    stop: float = 0.8,
    every: int = 100,
    rule: Rule | None = None,
) -> Pruner:
    """Prune along the cubic schedule of Zhu & Gupta 2017, every `every` optimiser steps, from start to stop.

    `sparsity` is what is reached at `stop`, for the network or by layer; start and stop are fractions of the training.
    At every update the sparsity is exactly the schedule's, to one unit of the rule's structure.
    Raise UserError for values out of range.
    """
    check_window(start, stop)
    check_sparsity(sparsity)
    if every < 1:
        raise UserError(f"every is a number of optimiser steps, at least 1, not {every}")
    return _Gradual(score, sparsity, start, stop, every, rule or Rule())


def one_shot(
    score: Score, sparsity: float | Mapping[str, float], *, at: float = 0.0, rule: Rule | None = None
) -> Pruner:
    """Prune once, when the fraction `at` of the training is over; what remains is fine-tuning."""
    return gradual(score, sparsity, start=at, stop=at, rule=rule)
