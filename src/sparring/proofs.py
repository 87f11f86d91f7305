"""Compare proofs with attacks: an adversarial example inside a certified ball raises an error."""

from __future__ import annotations

from typing import Any

import numpy as np

from .errors import UserError

__all__ = ["refuse_refuted"]

# How far rounding of float32 logits can move a distance to the decision boundary.
_RELATIVE, _ABSOLUTE = 1e-3, 1e-5


def refuse_refuted(
    proved: Any, reached: Any, *, norm: str, who: str = "", images: Any = None, closed: bool = False
) -> None:
    """Raise UserError, with both numbers, if an adversarial example is nearer than the proved distance.

    proved, reached: arrays (N,), certified radii or lower bounds and the distances of adversarial examples in the same
    norm, infinite or NaN where there is none. who: the network, in words; images: the images' numbers (None: from 0).
    closed: both are budgets, so that an example within an equal one refutes.
    """
    radius, distance = (np.asarray(values, np.float64) for values in (proved, reached))
    with np.errstate(invalid="ignore"):
        beyond = distance <= radius if closed else distance * (1 + _RELATIVE) + _ABSOLUTE < radius
    refuted = np.flatnonzero(beyond & (radius > 0))
    if not len(refuted):
        return
    worst = refuted[np.argmax(radius[refuted] - distance[refuted])]
    number = int(worst) if images is None else int(np.asarray(images)[worst])
    raise UserError(
        f"{who}: " * bool(who) + f"image {number} is certified up to {norm} {radius[worst]:.4g}, but an adversarial "
        f"example exists at {distance[worst]:.4g} ({len(refuted)} of {len(radius)} images are refuted in this way). "
        "The certified network is not the attacked one, so neither result is reliable; "
        "docs/theory.md lists differences that the comparison of the two cannot detect"
    )
