"""Train networks, dense, pruned and adversarially."""

from __future__ import annotations

from .checkpoint import is_whole
from .loop import Fit, Progress, fit, predict
from .losses import Loss, Ramped, adversarial, cross_entropy, trades
from .recipe import Recipe, learning_rate

__all__ = [
    "Fit",
    "Loss",
    "Progress",
    "Ramped",
    "Recipe",
    "adversarial",
    "cross_entropy",
    "fit",
    "is_whole",
    "learning_rate",
    "predict",
    "trades",
]
