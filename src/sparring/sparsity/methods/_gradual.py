"""Pruners by score: along a schedule, at once, or in rounds with rewinding; Bernoulli masks; proximal steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import softshrink

from ...errors import UserError
from .._masks import Masks, Score, applied_, apply_, sparsity_of, warn_of_collapse
from .._rule import Pruner, Rule, Schedule, Step, check_sparsity, cubic, last_step, require_unstructured
from .._scores import magnitude
from .._select import erdos_renyi_kernel


def _cut(step: Step, score: Score, rule: Rule, sparsity: float | Mapping[str, float]) -> Masks:
    """Return the masks of a sparsity within the current ones, applied to the model."""
    scores = score(step.model, step.batch, loss=step.loss, generator=step.generator)
    masks = rule.masks(step.model, scores, sparsity, masks=step.masks, batch=step.batch)
    apply_(step.model, masks)
    return masks


@dataclass(frozen=True)
class _Gradual(Pruner):
    score: Score
    sparsity: float | Mapping[str, float]
    schedule: Schedule
    rule: Rule

    def __call__(self, step: Step) -> Masks:
        progress = self.schedule.progress(step)
        return step.masks if progress is None else _cut(step, self.score, self.rule, self._target(step.masks, progress))

    def _target(self, masks: Masks, progress: float) -> float | dict[str, float]:
        # Removed weights never come back: a network that is already pruned waits until the schedule has caught up.
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

    By default the masks change about a hundred times, because few large cuts cost accuracy at high sparsity. `sparsity`
    is reached at `stop`, for the network or per layer; start and stop are fractions of the training. At every update
    the sparsity is exactly the schedule's, to one unit of the rule's structure. Raises UserError for values out of
    range.
    """
    check_sparsity(sparsity)
    return _Gradual(score, sparsity, Schedule(start, stop, every), rule or Rule())


def one_shot(
    score: Score, sparsity: float | Mapping[str, float], *, at: float = 0.0, rule: Rule | None = None
) -> Pruner:
    """Prune once, at the fraction `at` of the training; the rest is fine-tuning."""
    return gradual(score, sparsity, start=at, stop=at, rule=rule)


@dataclass(frozen=True)
class _Bernoulli(Pruner):
    exact = False
    sparsity: float | Mapping[str, float]
    at: float
    rule: Rule

    def __call__(self, step: Step) -> Masks:
        masks, generator = step.masks, step.generator
        if step.number != last_step(self.at, step.steps):
            return masks
        new = dict(masks)
        for name, drop in self._chances(masks).items():
            draw = torch.rand(masks[name].shape, generator=generator, device=generator.device)
            new[name] = masks[name] & (draw >= drop).to(masks[name].device)
        warn_of_collapse(new, masks)
        apply_(step.model, new)
        return new

    def _chances(self, masks: Masks) -> dict[str, float]:
        if isinstance(self.sparsity, Mapping) or self.rule.scope != "erk":
            return self.rule.by_layer(masks, self.sparsity)
        return erdos_renyi_kernel(self.rule.open(masks), self.sparsity)


def bernoulli(sparsity: float | Mapping[str, float], *, at: float = 0.0, rule: Rule | None = None) -> Pruner:
    """Drop every weight independently with probability `sparsity` (per layer, if a mapping): the theorem's masks.

    The sparsity is an expectation; the masks have the actual one. The rule's scope "erk" gives each layer its own
    probability; the other scopes are equivalent. Raises UserError for a rule with a floor or a structure, which
    independent draws cannot guarantee.
    """
    check_sparsity(sparsity)
    Schedule(at, at)
    rule = rule or Rule()
    require_unstructured(rule, "Bernoulli masking")
    if rule.floor:
        raise UserError("Bernoulli masks draw each weight independently and cannot keep a floor; use score 'random'")
    return _Bernoulli(sparsity, at, rule)


@dataclass(frozen=True)
class _Proximal(Pruner):
    then: Pruner
    strength: float
    schedule: Schedule
    rule: Rule

    def __call__(self, step: Step) -> Masks:
        first, last = self.schedule.window(step.steps)
        if first <= step.number <= last:
            for name in self.rule.open(step.masks):
                weight = step.model.get_parameter(name).detach()
                weight.copy_(softshrink(weight, self.strength))
            applied_(step.model, step.masks)
        return self.then(step)


def proximal(
    sparsity: float | Mapping[str, float],
    *,
    strength: float = 1e-5,
    start: float = 0.0,
    stop: float = 0.6,
    rule: Rule | None = None,
) -> Pruner:
    """Train with an ℓ1 penalty by proximal steps, then keep the largest weights (Parikh & Boyd 2014, section 6.5.2).

    After every optimiser step from start to stop, all weights move towards zero by `strength` (learning rate × penalty)
    and stop there. At `stop` the network is pruned to `sparsity` by magnitude, and then fine-tuned.
    """
    schedule = Schedule(start, stop)
    if strength < 0:
        raise UserError(f"strength is the amount by which a step shrinks every weight, at least 0, not {strength}")
    rule = rule or Rule()
    return _Proximal(one_shot(magnitude, sparsity, at=stop, rule=rule), strength, schedule, rule)


@dataclass
class _Iterative(Pruner):
    score: Score
    sparsity: float
    rounds: int
    rewind: str
    rewind_at: float
    rule: Rule
    early: dict[str, Tensor] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        self.cycles = self.rounds + 1

    def __call__(self, step: Step) -> Masks:
        part = -(-step.steps // self.cycles)
        ends = [min((r + 1) * part, step.steps) - 1 for r in range(self.rounds)]
        if self.rewind == "weights" and step.number == int(self.rewind_at * ends[0]):
            self.early = {name: value.detach().clone() for name, value in step.model.state_dict().items()}
        if step.number not in ends:
            return step.masks
        # The density falls by the same factor in every round; short trainings may end several rounds at one step.
        finished = max(r for r, end in enumerate(ends) if end == step.number) + 1
        target = 1 - (1 - self.sparsity) ** (finished / self.rounds)
        masks = _cut(step, self.score, self.rule, target)
        if self.rewind == "weights":
            step.model.load_state_dict(self.early)
            apply_(step.model, masks)
        return masks

    def state(self) -> dict[str, Tensor]:
        return dict(self.early)

    def load_state_(self, tensors: Mapping[str, Tensor]) -> None:
        self.early = dict(tensors)


def iterative(
    score: Score,
    sparsity: float,
    *,
    rounds: int = 5,
    rewind: Literal["weights", "learning-rate"] = "weights",
    rewind_at: float = 0.1,
    rule: Rule | None = None,
) -> Pruner:
    """Prune in `rounds` rounds, each after an equal part of the training; a last part trains what remains.

    With `rewind` "weights" all parameters and buffers go back, after every round, to what they were when the fraction
    `rewind_at` of the first part was over (Frankle et al. 2020, algorithm 1); with "learning-rate" they stay (Renda et
    al. 2020, section 3). Both need a learning-rate schedule that restarts in each part, as training loops with the
    attribute `cycles` do. One pruner serves one training. Raises UserError for values out of range.
    """
    check_sparsity(sparsity)
    if rounds < 1 or not 0 <= rewind_at <= 1:
        raise UserError(f"iterative pruning needs rounds >= 1 and 0 <= rewind_at <= 1, not {rounds}, {rewind_at}")
    if rewind not in ("weights", "learning-rate"):
        raise UserError(f"rewind is 'weights' or 'learning-rate', not '{rewind}'")
    return _Iterative(score, sparsity, rounds, rewind, rewind_at, rule or Rule())
