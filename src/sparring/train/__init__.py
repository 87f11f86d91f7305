"""Train networks, dense, pruned and adversarially."""

from __future__ import annotations

from ._fit import EpochProgress, Fit, fit, is_whole, predict
from ._losses import Loss, Ramped, adversarial, cross_entropy, smoothed, trades
from ._recipe import Recipe, learning_rate

__all__ = [
    "EpochProgress",
    "Fit",
    "Loss",
    "Ramped",
    "Recipe",
    "adversarial",
    "cross_entropy",
    "fit",
    "is_whole",
    "learning_rate",
    "predict",
    "smoothed",
    "trades",
]
