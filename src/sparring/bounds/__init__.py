"""Theory on the same axis as data: what robustness can be proved, and how far attacks are from it."""

from __future__ import annotations

from .certificates import BOUNDS, certified_accuracy, margin, radius
from .distances import Exact, exact

__all__ = ["BOUNDS", "Exact", "certified_accuracy", "exact", "margin", "radius"]
