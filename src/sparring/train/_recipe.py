"""How a network is trained, as one frozen value."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from ..errors import UserError


@dataclass(frozen=True)
class Recipe:
    """Fix everything that a training run depends on besides data, model, loss and seed.

    `lr` is the highest learning rate, reached after `warmup` (a fraction of all steps); `schedule` says how it falls
    to zero afterwards. `augment` pads images by 4 pixels, crops at random and flips horizontally (for CIFAR).
    """

    optimizer: Literal["sgd", "adam"] = "sgd"
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
            if not low <= value <= high:  # NaN lies nowhere
                raise UserError(f"recipe: {name} must lie between {low} and {high}, not {value}")
        if self.optimizer not in ("sgd", "adam"):
            raise UserError(f"recipe: optimizer must be 'sgd' or 'adam', not '{self.optimizer}'")
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
