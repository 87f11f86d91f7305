"""Sparse training from scratch with a fixed number of weights: SET and RigL."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import UserError
from .._masks import Masks, apply_, sparsity_of
from .._rule import Pruner, Rule, Schedule, Step, check_sparsity, last_step, require_unstructured
from .._scores import gradients, random
from .._select import largest

_ERK = Rule(scope="erk")


@dataclass(frozen=True)
class _Regrow(Pruner):
    sparsity: float
    fraction: float
    every: int
    stop: float
    by_gradient: bool
    rule: Rule

    def __call__(self, step: Step) -> Masks:
        last, masks = last_step(self.stop, step.steps), step.masks
        if step.number == 0 and sparsity_of(self.rule.open(masks)) < self.sparsity:
            scores = random(step.model, generator=step.generator)
            masks = self.rule.masks(step.model, scores, self.sparsity, masks=masks)
        elif 0 < step.number <= last and step.number % self.every == 0:
            share = self.fraction
            if self.by_gradient:  # Evci et al. 2020, section 3: cosine decay
                share *= (1 + math.cos(math.pi * step.number / max(last, 1))) / 2
            masks = {**masks, **self._moved(step, self._growth(step), share)}
        else:
            return masks
        apply_(step.model, masks)
        return masks

    def _growth(self, step: Step) -> Mapping[str, Tensor]:
        if not self.by_gradient:
            return random(step.model, generator=step.generator)
        slopes = {name: p.grad for name, p in step.model.named_parameters() if p.grad is not None}
        slopes = slopes or gradients(step.model, step.batch, step.loss, step.generator)
        return {name: slope.abs() for name, slope in slopes.items()}

    def _moved(self, step: Step, growth: Mapping[str, Tensor], share: float) -> Masks:
        new = {}
        for name, mask in self.rule.open(step.masks).items():
            kept = int(torch.count_nonzero(mask))
            moved = min(round(share * kept), mask.numel() - kept)
            weight = step.model.get_parameter(name).detach()
            (stay,) = largest([weight.abs().masked_fill(~mask, -math.inf)], kept - moved)
            # RigL may take back what it has just dropped, SET may not.
            (grown,) = largest([growth[name].masked_fill(stay if self.by_gradient else mask, -math.inf)], moved)
            weight.masked_fill_(~stay, 0.0)  # a connection that comes back starts at zero
            new[name] = stay | grown
        return new


def _regrow(sparsity: float, fraction: float, every: int, stop: float, by_gradient: bool, rule: Rule) -> Pruner:
    require_unstructured(rule, "sparse training from scratch")
    check_sparsity(sparsity)
    Schedule(every=every)
    if not 0 < fraction < 1 or not 0 <= stop <= 1:
        raise UserError(f"regrowth needs 0 < fraction < 1 and 0 <= stop <= 1, not {fraction}, {stop}")
    return _Regrow(sparsity, fraction, every, stop, by_gradient, rule)


def sparse_evolution(
    sparsity: float, *, fraction: float = 0.3, every: int = 100, stop: float = 0.8, rule: Rule = _ERK
) -> Pruner:
    """Train sparse from scratch by SET (Mocanu et al. 2018): drop the smallest weights, grow random ones.

    Every `every` optimiser steps, until the fraction `stop` of the training, each layer moves `fraction` of its
    weights. The first call draws a random mask (allocation ERK, unless `rule` says otherwise) if its masks are denser
    than `sparsity`; the number of weights per layer does not change afterwards. Raises UserError for values out of
    range and for a rule whose structure is not Unstructured.
    """
    return _regrow(sparsity, fraction, every, stop, False, rule)


def rigged_lottery(
    sparsity: float, *, fraction: float = 0.3, every: int = 100, stop: float = 0.75, rule: Rule = _ERK
) -> Pruner:
    """Train sparse from scratch by RigL (Evci et al. 2020, algorithm 1): grow where the dense gradient is largest.

    Like `sparse_evolution`, with `fraction` falling to zero along a cosine.
    """
    return _regrow(sparsity, fraction, every, stop, True, rule)
