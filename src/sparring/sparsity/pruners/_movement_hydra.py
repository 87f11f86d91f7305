"""Scores that are learned while training: movement pruning and HYDRA."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ...errors import UserError
from .._masks import applied_, prunable
from .._rule import Rule
from .._schedule import check_every, check_sparsity, check_window, cubic, due, window
from .._types import Batch, Loss, Masks, Pruner, Scores

_BY_LAYER = Rule(scope="layer")


@dataclass(frozen=True)
class _Movement:
    sparsity: float
    start: float
    stop: float
    every: int | None
    rule: Rule
    scores: Scores = field(default_factory=dict, init=False)
    dense_weights: bool = field(default=True, init=False)

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
        if step > last:
            return masks
        for name, weight in prunable(model).items():
            if weight.grad is not None:
                score = self.scores.setdefault(name, torch.zeros_like(weight))
                score.addcmul_(weight.detach(), weight.grad, value=-1.0)
        progress = due(step, first, last, self.every)
        if progress is None:
            return masks
        scores = {name: self.scores.get(name, torch.zeros_like(w)) for name, w in prunable(model).items()}
        target = cubic(progress, self.sparsity)
        return self.rule.masks(model, scores, target, masks=masks, batch=batch, regrow=True)

    def state(self) -> dict[str, Tensor]:
        return dict(self.scores)

    def load_state_(self, tensors: Mapping[str, Tensor]) -> None:
        self.scores.clear()
        self.scores.update(tensors)


def movement(
    sparsity: float, *, start: float = 0.0, stop: float = 0.8, every: int | None = None, rule: Rule | None = None
) -> Pruner:
    """Keep weights that move away from zero: score −Σ w · ∂L/∂w over the training (Sanh et al. 2020, equation 4).

    The weights behind the mask stay dense and can come back until `stop`; the sparsity follows the cubic schedule. One
    pruner serves one training. Raise UserError for values out of range.
    """
    check_window(start, stop)
    check_sparsity(sparsity)
    check_every(every)
    return _Movement(sparsity, start, stop, every, rule or Rule())


@dataclass(frozen=True)
class _Hydra:
    sparsity: float
    stop: float
    rate: float
    momentum: float
    loss: Loss | None
    rule: Rule
    scores: Scores = field(default_factory=dict, init=False)
    speeds: dict[str, Tensor] = field(default_factory=dict, init=False)
    frozen: dict[str, Tensor] = field(default_factory=dict, init=False)
    dense_weights: bool = field(default=True, init=False)

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
        if step > last:
            return masks
        if not self.scores:
            self._begin(model)
        else:
            slopes = self._slopes(model, masks, batch, loss, generator)
            rate = self.rate * (1 + math.cos(math.pi * step / (last + 1))) / 2
            for name, slope in slopes.items():
                # Straight through the choice of the largest: ∂L/∂score = w · ∂L/∂(w∘mask).
                speed = self.speeds[name].mul_(self.momentum).addcmul_(self.frozen[name], slope)
                self.scores[name].sub_(speed, alpha=rate)
        self._restore_(model)
        sizes = {name: score.abs() for name, score in self.scores.items()}
        return self.rule.masks(model, sizes, self.sparsity, masks=masks, batch=batch, regrow=True)

    def _begin(self, model: nn.Module) -> None:
        # Sehwag et al. 2020, equation 4: s ∝ w / max|w|, with the spread of Kaiming's initialisation.
        for name, weight in prunable(model).items():
            spread = math.sqrt(6 / weight[0].numel())
            self.scores[name] = spread * weight.detach() / weight.detach().abs().max().clamp_min(1e-12)
            self.speeds[name] = torch.zeros_like(weight)
        self.frozen.update({name: value.detach().clone() for name, value in model.named_parameters()})

    def _slopes(
        self, model: nn.Module, masks: Masks, batch: Batch, loss: Loss, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """Return the gradient for the masked weights: the training step's own, unless there is a loss of our own."""
        if self.loss is None:
            return {n: w.grad for n, w in prunable(model).items() if w.grad is not None}
        names = list(prunable(model))
        masked = {n: self.frozen[n] * mask for n, mask in applied_(model, {n: masks[n] for n in names}).items()}
        inputs = [masked[n].requires_grad_() for n in names]
        value = self.loss(_Swapped(model, self.frozen | masked), *batch, generator)
        return dict(zip(names, torch.autograd.grad(value, inputs), strict=True))

    @torch.no_grad()
    def _restore_(self, model: nn.Module) -> None:
        for name, parameter in model.named_parameters():
            parameter.copy_(self.frozen[name])

    def state(self) -> dict[str, Tensor]:
        parts = {"score": self.scores, "speed": self.speeds, "frozen": self.frozen}
        return {f"{part}.{name}": value for part, values in parts.items() for name, value in values.items()}

    def load_state_(self, tensors: Mapping[str, Tensor]) -> None:
        for part, values in (("score.", self.scores), ("speed.", self.speeds), ("frozen.", self.frozen)):
            values.clear()
            values.update({k.removeprefix(part): v.clone() for k, v in tensors.items() if k.startswith(part)})


class _Swapped(nn.Module):
    """A model with other parameters, so that a loss can call it as usual."""

    def __init__(self, model: nn.Module, parameters: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.model = [model]  # in a list, so that its parameters do not become this module's
        self.parameters_used = dict(parameters)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = functional_call(self.model[0], self.parameters_used, (x,))
        return result


def hydra(
    sparsity: float,
    *,
    stop: float = 0.5,
    rate: float = 0.1,
    momentum: float = 0.9,
    loss: Loss | None = None,
    rule: Rule = _BY_LAYER,
) -> Pruner:
    """Learn which weights to keep under the loss, adversarial if it is, with weights frozen (Sehwag et al. 2020).

    Until the fraction `stop` of the training, scores start from the scaled weights and descend the loss through the
    masked network (SGD with momentum, `rate` falling along a cosine), and all parameters keep their values; from then
    on the chosen weights are fine-tuned. `loss` None takes the gradient of the training's own loss, which costs
    nothing; another loss (PGD, TRADES) costs one more forward and backward per step. The rule's scope should be
    "layer", as published, which is the default. One pruner serves one training. Raise UserError for values out of
    range.
    """
    check_sparsity(sparsity)
    if not 0 < stop <= 1 or rate <= 0 or not 0 <= momentum < 1:
        raise UserError(f"HYDRA needs 0 < stop <= 1, rate > 0 and 0 <= momentum < 1, not {stop}, {rate}, {momentum}")
    return _Hydra(sparsity, stop, rate, momentum, loss, rule)
