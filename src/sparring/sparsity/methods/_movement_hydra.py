"""Scores that are learned during training: movement pruning and HYDRA."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ...errors import UserError
from .._masks import Loss, Masks, Scores, applied_, prunable
from .._rule import Pruner, Rule, Schedule, Step, check_sparsity, cubic, last_step

_BY_LAYER = Rule(scope="layer")


@dataclass
class _Movement(Pruner):
    dense_weights = True
    sparsity: float
    schedule: Schedule
    rule: Rule
    scores: Scores = field(default_factory=dict, init=False)

    def __call__(self, step: Step) -> Masks:
        if step.number > self.schedule.window(step.steps)[1]:
            return step.masks
        weights = prunable(step.model)
        for name, weight in weights.items():
            if weight.grad is not None:
                score = self.scores.setdefault(name, torch.zeros_like(weight))
                score.addcmul_(weight.detach(), weight.grad, value=-1.0)
        progress = self.schedule.progress(step)
        if progress is None:
            return step.masks
        scores = {name: self.scores.get(name, torch.zeros_like(weight)) for name, weight in weights.items()}
        target = cubic(progress, self.sparsity)
        return self.rule.masks(step.model, scores, target, masks=step.masks, batch=step.batch, regrow=True)

    def state(self) -> dict[str, Tensor]:
        return dict(self.scores)

    def load_state_(self, tensors: Mapping[str, Tensor]) -> None:
        self.scores = dict(tensors)


def movement(
    sparsity: float, *, start: float = 0.0, stop: float = 0.8, every: int | None = None, rule: Rule | None = None
) -> Pruner:
    """Keep weights that move away from zero: score −Σ w · ∂L/∂w over the training (Sanh et al. 2020, equation 4).

    The weights behind the mask stay dense and can come back until `stop`; the sparsity follows the cubic schedule. One
    pruner serves one training. Raise UserError for values out of range.
    """
    check_sparsity(sparsity)
    return _Movement(sparsity, Schedule(start, stop, every), rule or Rule())


@dataclass
class _Hydra(Pruner):
    dense_weights = True
    sparsity: float
    stop: float
    rate: float
    momentum: float
    loss: Loss | None
    rule: Rule
    scores: Scores = field(default_factory=dict, init=False)
    speeds: dict[str, Tensor] = field(default_factory=dict, init=False)
    frozen: dict[str, Tensor] = field(default_factory=dict, init=False)

    def __call__(self, step: Step) -> Masks:
        last = last_step(self.stop, step.steps)
        if step.number > last:
            return step.masks
        if not self.scores:
            self._begin(step.model)
        else:
            rate = self.rate * (1 + math.cos(math.pi * step.number / (last + 1))) / 2
            for name, slope in self._slopes(step).items():
                # Straight through the choice of the largest: ∂L/∂score = w · ∂L/∂(w∘mask).
                speed = self.speeds[name].mul_(self.momentum).addcmul_(self.frozen[name], slope)
                self.scores[name].sub_(speed, alpha=rate)
        self._restore_(step.model)
        sizes = {name: score.abs() for name, score in self.scores.items()}
        return self.rule.masks(step.model, sizes, self.sparsity, masks=step.masks, batch=step.batch, regrow=True)

    def _begin(self, model: nn.Module) -> None:
        # Sehwag et al. 2020, equation 4: s ∝ w / max|w|, with the spread of Kaiming's initialisation.
        for name, weight in prunable(model).items():
            spread = math.sqrt(6 / weight[0].numel())
            self.scores[name] = spread * weight.detach() / weight.detach().abs().max().clamp_min(1e-12)
            self.speeds[name] = torch.zeros_like(weight)
        self.frozen = {name: value.detach().clone() for name, value in model.named_parameters()}

    def _slopes(self, step: Step) -> dict[str, Tensor]:
        """Return the gradient for the masked weights: the training step's own, unless there is a separate loss."""
        weights = prunable(step.model)
        if self.loss is None:
            return {n: w.grad for n, w in weights.items() if w.grad is not None}
        masks = applied_(step.model, {n: step.masks[n] for n in weights})
        masked = {n: self.frozen[n] * mask for n, mask in masks.items()}
        inputs = [masked[n].requires_grad_() for n in weights]
        value = self.loss(_Swapped(step.model, self.frozen | masked), *step.batch, step.generator)
        return dict(zip(weights, torch.autograd.grad(value, inputs), strict=True))

    @torch.no_grad()
    def _restore_(self, model: nn.Module) -> None:
        for name, parameter in model.named_parameters():
            parameter.copy_(self.frozen[name])

    def state(self) -> dict[str, Tensor]:
        parts = {"score": self.scores, "speed": self.speeds, "frozen": self.frozen}
        return {f"{part}.{name}": value for part, values in parts.items() for name, value in values.items()}

    def load_state_(self, tensors: Mapping[str, Tensor]) -> None:
        self.scores, self.speeds, self.frozen = (
            {k.removeprefix(part): v.clone() for k, v in tensors.items() if k.startswith(part)}
            for part in ("score.", "speed.", "frozen.")
        )


class _Swapped(nn.Module):
    """A model with other parameters, so that a loss can call it as usual."""

    def __init__(self, model: nn.Module, parameters: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.model = [model]  # in a list, so that its parameters are not registered here
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
    """Learn which weights to keep under the loss, which may be adversarial, with frozen weights (Sehwag et al. 2020).

    Until the fraction `stop` of the training, scores start from the scaled weights and descend the loss through the
    masked network (SGD with momentum, `rate` falling along a cosine), while all parameters keep their values. After
    that the chosen weights are fine-tuned. `loss` None uses the gradient of the training loss at no extra cost; another
    loss (PGD, TRADES) costs one more forward and backward pass per step. The default scope of the rule is "layer", as
    in the paper. One pruner serves one training. Raises UserError for values out of range.
    """
    check_sparsity(sparsity)
    if not 0 < stop <= 1 or rate <= 0 or not 0 <= momentum < 1:
        raise UserError(f"HYDRA needs 0 < stop <= 1, rate > 0 and 0 <= momentum < 1, not {stop}, {rate}, {momentum}")
    return _Hydra(sparsity, stop, rate, momentum, loss, rule)
