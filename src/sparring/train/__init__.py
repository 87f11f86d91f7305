"""Train networks: dense, pruned, adversarially, or with certified bounds.

Examples:
    >>> from sparring import data, models, train
    >>> digits = data.load("digits")
    >>> net = models.build("linear", shape=(1, 8, 8), classes=10, mean=digits.mean, std=digits.std)
    >>> fit = train.fit(net, *digits.train, train.Recipe(epochs=2, lr=0.05))
    >>> train.predict(net, digits.test.x).shape
    torch.Size([353, 10])
"""

from __future__ import annotations

from ._certified import certified
from ._fit import EpochProgress, Fit, fit, is_whole, predict
from ._losses import Loss, Ramped, adversarial, cross_entropy, smoothed, trades
from ._memory import check_memory, copies_of, step_need
from ._recipe import Recipe, learning_rate

__all__ = [
    "EpochProgress",
    "Fit",
    "Loss",
    "Ramped",
    "Recipe",
    "adversarial",
    "certified",
    "check_memory",
    "copies_of",
    "cross_entropy",
    "fit",
    "is_whole",
    "learning_rate",
    "predict",
    "smoothed",
    "step_need",
    "trades",
]
