"""Theory on the same axis as data: what robustness can be proved, and how far attacks are from it."""

from __future__ import annotations

from .certificates import BOUNDS, certified_accuracy, margin, radius
from .constants import LIPSCHITZ, lipschitz
from .distances import Exact, exact
from .estimators import linear_path
from .linear import Theorem, linear_distance, linear_r_2, linear_r_inf, theorem, weights_of

__all__ = [
    "BOUNDS",
    "LIPSCHITZ",
    "Exact",
    "Theorem",
    "certified_accuracy",
    "exact",
    "linear_distance",
    "linear_path",
    "linear_r_2",
    "linear_r_inf",
    "lipschitz",
    "margin",
    "radius",
    "theorem",
    "weights_of",
]
