"""Sparse from scratch with a fixed number of weights that move: SET and RigL."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ...errors import UserError
from .._masks import apply_, sparsity_of
from .._rule import Rule
from .._schedule import check_every, check_sparsity, require_unstructured, window
from .._scores import gradients, random
from .._select import largest
from .._types import Batch, Loss, Masks, Pruner

_ERK = Rule(scope="erk")


@dataclass(frozen=True)
class _Regrow:
    sparsity: float
    fraction: float
    every: int
    stop: float
    by_gradient: bool
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
        _, last = window(0.0, self.stop, steps)
        if step == 0 and sparsity_of(self.rule.open(masks)) < self.sparsity:
            scores = random(model, generator=generator)
            masks = self.rule.masks(model, scores, self.sparsity, masks=masks)
        elif 0 < step <= last and step % self.every == 0:
            share = self.fraction
            if self.by_gradient:  # Evci et al. 2020, section 3: cosine decay
                share *= (1 + math.cos(math.pi * step / max(last, 1))) / 2
            growth = self._growth(model, batch, loss, generator)
            masks = {**masks, **self._moved(model, self.rule.open(masks), growth, share)}
        else:
            return masks
        apply_(model, masks)
        return masks

    def _growth(self, model: nn.Module, batch: Batch, loss: Loss, generator: torch.Generator) -> Mapping[str, Tensor]:
        if not self.by_gradient:
            return random(model, generator=generator)
        slopes = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        return {name: slope.abs() for name, slope in (slopes or gradients(model, batch, loss, generator)).items()}

    def _moved(self, model: nn.Module, masks: Masks, growth: Mapping[str, Tensor], share: float) -> Masks:
        new = {}
        for name, mask in masks.items():
            kept = int(torch.count_nonzero(mask))
            moved = min(round(share * kept), mask.numel() - kept)
            weight = model.get_parameter(name).detach()
            (stay,) = largest([weight.abs().masked_fill(~mask, -math.inf)], kept - moved)
            # RigL may take back what it has just dropped, SET may not.
            (grown,) = largest([growth[name].masked_fill(stay if self.by_gradient else mask, -math.inf)], moved)
            weight.masked_fill_(~stay, 0.0)  # a connection that comes back starts at zero
            new[name] = stay | grown
        return new


def _regrow(sparsity: float, fraction: float, every: int, stop: float, by_gradient: bool, rule: Rule) -> Pruner:
    require_unstructured(rule, "sparse training from scratch")
    check_sparsity(sparsity)
    check_every(every)
    if not 0 < fraction < 1 or not 0 <= stop <= 1:
        raise UserError(f"regrowth needs 0 < fraction < 1 and 0 <= stop <= 1, not {fraction}, {stop}")
    return _Regrow(sparsity, fraction, every, stop, by_gradient, rule)


def sparse_evolution(
    sparsity: float, *, fraction: float = 0.3, every: int = 100, stop: float = 0.8, rule: Rule = _ERK
) -> Pruner:
    """Train sparse from scratch by SET (Mocanu et al. 2018): drop the smallest weights, grow random ones.

    Every `every` optimiser steps, until the fraction `stop` of the training, each layer moves `fraction` of its
    weights. The first call draws a random mask (allocation ERK, unless `rule` says otherwise) where the masks it gets
    are denser than `sparsity`; the number of weights per layer never changes after. Raise UserError for values out of
    range and for a rule whose structure is not Unstructured.
    """
    return _regrow(sparsity, fraction, every, stop, False, rule)


def rigged_lottery(
    sparsity: float, *, fraction: float = 0.3, every: int = 100, stop: float = 0.75, rule: Rule = _ERK
) -> Pruner:
    """Train sparse from scratch by RigL (Evci et al. 2020, algorithm 1): grow where the dense gradient is largest.

    As `sparse_evolution`, with `fraction` falling to zero along a cosine.
    """
    return _regrow(sparsity, fraction, every, stop, True, rule)
