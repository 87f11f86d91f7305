"""Train networks, dense, pruned and adversarially."""

from __future__ import annotations

from .loop import Fit, Progress, fit, predict
from .losses import Loss, adversarial, cross_entropy, trades
from .recipe import Recipe, learning_rate

__all__ = [
    "Fit",
    "Loss",
    "Progress",
    "Recipe",
    "adversarial",
    "cross_entropy",
    "fit",
    "learning_rate",
    "predict",
    "trades",
]
