"""Pruners without a memory: gradual and one-shot by any score, random with Bernoulli masks, proximal."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn.functional import softshrink

from ...errors import UserError
from .._allocation import erdos_renyi_kernel
from .._masks import applied_, apply_, sparsity_of, warn_of_collapse
from .._rule import Rule
from .._schedule import check_every, check_sparsity, check_window, cubic, due, require_unstructured, window
from .._scores import magnitude
from .._types import Batch, Loss, Masks, Pruner, Score


@dataclass(frozen=True)
class _Gradual:
    score: Score
    sparsity: float | Mapping[str, float]
    start: float
    stop: float
    every: int | None
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
        progress = due(step, *window(self.start, self.stop, steps), self.every)
        if progress is None:
            return masks
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
            for name, value in self.rule.by_layer(masks, self.sparsity).items()
        }


def gradual(
    score: Score,
    sparsity: float | Mapping[str, float],
    *,
    start: float = 0.0,
    stop: float = 0.8,
    every: int | None = None,
    rule: Rule | None = None,
) -> Pruner:
    """Prune along the cubic schedule of Zhu & Gupta 2017, every `every` optimiser steps, from start to stop.

    Without `every` the masks change about a hundred times: few large cuts cost accuracy at high sparsity.
    `sparsity` is what is reached at `stop`, for the network or by layer; start and stop are fractions of the training.
    At every update the sparsity is exactly the schedule's, to one unit of the rule's structure.
    Raise UserError for values out of range.
    """
    check_window(start, stop)
    check_sparsity(sparsity)
    check_every(every)
    return _Gradual(score, sparsity, start, stop, every, rule or Rule())


def one_shot(
    score: Score, sparsity: float | Mapping[str, float], *, at: float = 0.0, rule: Rule | None = None
) -> Pruner:
    """Prune once, when the fraction `at` of the training is over; what remains is fine-tuning."""
    return gradual(score, sparsity, start=at, stop=at, rule=rule)


@dataclass(frozen=True)
class _Bernoulli:
    sparsity: float | Mapping[str, float]
    at: float
    rule: Rule
    exact: bool = field(default=False, init=False)
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
        if step != window(self.at, self.at, steps)[1]:
            return masks
        new = dict(masks)
        for name, drop in self._chances(masks).items():
            draw = torch.rand(masks[name].shape, generator=generator, device=generator.device)
            new[name] = masks[name] & (draw >= drop).to(masks[name].device)
        warn_of_collapse(new, masks)
        apply_(model, new)
        return new

    def _chances(self, masks: Masks) -> dict[str, float]:
        if isinstance(self.sparsity, Mapping) or self.rule.scope != "erk":
            return self.rule.by_layer(masks, self.sparsity)
        return erdos_renyi_kernel(self.rule.open(masks), self.sparsity)


def bernoulli(sparsity: float | Mapping[str, float], *, at: float = 0.0, rule: Rule | None = None) -> Pruner:
    """Drop every weight independently with probability `sparsity` (by layer, if a mapping): the theorem's masks.

    The sparsity is that of the expectation; read what was drawn from the masks. The rule's scope "erk" gives each layer
    a probability of its own; the others are the same here. Raise UserError for a rule with a floor or a structure,
    which draws that know nothing of one another cannot keep.
    """
    check_sparsity(sparsity)
    check_window(at, at)
    rule = rule or Rule()
    require_unstructured(rule, "Bernoulli masking")
    if rule.floor:
        raise UserError("Bernoulli masking draws each weight by itself and cannot keep a floor; use score 'random'")
    return _Bernoulli(sparsity, at, rule)


@dataclass(frozen=True)
class _Proximal:
    then: Pruner
    strength: float
    start: float
    stop: float
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
        if first <= step <= last:
            for name in self.rule.open(masks):
                weight = model.get_parameter(name).detach()
                weight.copy_(softshrink(weight, self.strength))
            applied_(model, masks)
        return self.then(model, masks, step=step, steps=steps, batch=batch, loss=loss, generator=generator)


def proximal(
    sparsity: float | Mapping[str, float],
    *,
    strength: float = 1e-5,
    start: float = 0.0,
    stop: float = 0.6,
    rule: Rule | None = None,
) -> Pruner:
    """Train with an l_1 penalty by proximal steps, then keep the largest weights (Parikh & Boyd 2014, section 6.5.2).

    After every optimiser step from start to stop, all weights move towards zero by `strength` (learning rate ×
    penalty) and stop there; at `stop` the network is pruned to `sparsity` by magnitude, and fine-tuned from then on.
    """
    check_window(start, stop)
    if strength < 0:
        raise UserError(f"strength is by how much a step shrinks every weight, at least 0, not {strength}")
    rule = rule or Rule()
    return _Proximal(one_shot(magnitude, sparsity, at=stop, rule=rule), strength, start, stop, rule)
