"""Theory on the same axis as data: what robustness can be proved, and how far attacks are from it."""

from __future__ import annotations

from .certificates import BOUNDS, certified_accuracy, margin, radius
from .constants import LIPSCHITZ, lipschitz
from .distances import Exact, exact
from .estimators import linear_path, linear_pruned
from .linear import (
    LinearMap,
    Theorem,
    linear_distance,
    linear_distances,
    linear_fooled,
    linear_r_2,
    linear_r_inf,
    theorem,
    weights_of,
)
from .random_masks import MaskedPoint, bernoulli, margin_ratios

__all__ = [
    "BOUNDS",
    "LIPSCHITZ",
    "Exact",
    "LinearMap",
    "MaskedPoint",
    "Theorem",
    "bernoulli",
    "certified_accuracy",
    "exact",
    "linear_distance",
    "linear_distances",
    "linear_fooled",
    "linear_path",
    "linear_pruned",
    "linear_r_2",
    "linear_r_inf",
    "lipschitz",
    "margin",
    "margin_ratios",
    "radius",
    "theorem",
    "weights_of",
]
