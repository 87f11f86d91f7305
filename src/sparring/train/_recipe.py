"""Recipes: training settings as one frozen value, the learning rate, and the optimiser."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn
from torch.optim.adam import adam
from torch.optim.sgd import sgd

from ..errors import UserError


@dataclass(frozen=True)
class Recipe:
    """Everything that a training run depends on in addition to data, model, loss and seed.

    `lr` is the highest learning rate, reached after `warmup` (a fraction of all steps); `schedule` says how it falls to
    zero afterwards. `augment` pads images by 4 pixels, crops at random and flips horizontally (for CIFAR).
    """

    optimizer: Literal["sgd", "adam", "adamw"] = "sgd"
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    epochs: int = 20
    batch_size: int = 64
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    warmup: float = 0.0
    augment: bool = False

    def __post_init__(self) -> None:
        for name, value, low, high in (
            ("lr", self.lr, 0.0, 1e3),
            ("momentum", self.momentum, 0.0, 0.9999),
            ("weight_decay", self.weight_decay, 0.0, 10.0),
            ("epochs", self.epochs, 0, 100_000),
            ("batch_size", self.batch_size, 1, 1_000_000),
            ("warmup", self.warmup, 0.0, 1.0),
        ):
            if not low <= value <= high:  # also refuses NaN
                raise UserError(f"recipe: {name} must lie between {low} and {high}, not {value}")
        if self.optimizer not in ("sgd", "adam", "adamw"):
            raise UserError(f"recipe: optimizer must be 'sgd', 'adam' or 'adamw', not '{self.optimizer}'")
        if self.schedule not in ("constant", "linear", "cosine"):
            raise UserError(f"recipe: schedule must be 'constant', 'linear' or 'cosine', not '{self.schedule}'")


def learning_rate(recipe: Recipe, step: int, steps: int) -> float:
    """Return the learning rate of one step (0 to steps - 1)."""
    warm = recipe.warmup * steps
    if step < warm:
        return recipe.lr * (step + 1) / (warm + 1)
    progress = (step - warm) / max(1.0, steps - warm)
    if recipe.schedule == "cosine":
        return recipe.lr * 0.5 * (1 + math.cos(math.pi * progress))
    return recipe.lr * (1 - progress) if recipe.schedule == "linear" else recipe.lr


@dataclass
class Optimizer:
    """The parameters that a recipe trains, and the moving averages of each, under the names in torch's optimisers.

    SGD, Adam and AdamW use torch's functions: the first object of its classes imports its compiler, which takes 1.7 s
    per process. The numbers are those of `torch.optim.SGD`, `Adam` and `AdamW` with `fused=True`.
    """

    recipe: Recipe
    parameters: list[nn.Parameter]
    state: dict[nn.Parameter, dict[str, Tensor]] = field(default_factory=dict)

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Move the parameters that have a gradient."""
        moving = [p for p in self.parameters if p.grad is not None]
        gradients = [p.grad for p in moving if p.grad is not None]
        if self.recipe.optimizer == "sgd":
            self._sgd(moving, gradients, lr)
        else:
            self._adam(moving, gradients, lr)

    def _sgd(self, moving: list[nn.Parameter], gradients: list[Tensor], lr: float) -> None:
        recipe = self.recipe
        buffers: list[Tensor | None] = []
        if recipe.momentum:
            buffers = [self.state.get(p, {}).get("momentum_buffer") for p in moving]
        sgd(
            list[Tensor](moving), gradients, buffers, lr=lr, momentum=recipe.momentum,
            weight_decay=recipe.weight_decay, dampening=0, nesterov=False, maximize=False, fused=True,
        )  # fmt: skip
        for parameter, buffer in zip(moving, buffers, strict=False):
            assert buffer is not None  # made by the first step
            self.state[parameter] = {"momentum_buffer": buffer}

    def _adam(self, moving: list[nn.Parameter], gradients: list[Tensor], lr: float) -> None:
        for p in moving:
            if p not in self.state:
                step = torch.zeros((), dtype=torch.float32, device=p.device)
                self.state[p] = {"step": step, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
        slots = [self.state[p] for p in moving]
        means, squares, steps = ([slot[name] for slot in slots] for name in ("exp_avg", "exp_avg_sq", "step"))
        adam(
            list[Tensor](moving), gradients, means, squares, [], steps, lr=lr, beta1=0.9, beta2=0.999, eps=1e-8,
            weight_decay=self.recipe.weight_decay, amsgrad=False, maximize=False, fused=True,
            decoupled_weight_decay=self.recipe.optimizer == "adamw",
        )  # fmt: skip
