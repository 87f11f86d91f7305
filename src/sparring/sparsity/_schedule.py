"""When pruning happens and how far it has come; the checks that all pruners share."""

from __future__ import annotations

import math
from collections.abc import Mapping

from ..errors import UserError
from ._rule import Rule
from ._structures import Unstructured


def cubic(progress: float, final: float, initial: float = 0.0) -> float:
    """Return the sparsity when the fraction `progress` of the schedule is over (Zhu & Gupta 2017, equation 1)."""
    left = 1.0 - min(max(progress, 0.0), 1.0)
    return final + (initial - final) * left**3


def window(start: float, stop: float, steps: int) -> tuple[int, int]:
    """Return the first and the last step of the part [start, stop] of a training; the last is never step `steps`."""
    last = min(steps - 1, max(0, math.ceil(stop * steps) - 1))
    return min(math.floor(start * steps), last), last


def check_window(start: float, stop: float) -> None:
    """Raise UserError unless 0 <= start <= stop <= 1."""
    if not 0 <= start <= stop <= 1:
        raise UserError(
            f"pruning goes from start to stop, fractions of the training with start <= stop, not {start}, {stop}"
        )


def check_sparsity(sparsity: float | Mapping[str, float]) -> None:
    """Raise UserError unless the sparsity, or each of them, is in [0, 1)."""
    for value in sparsity.values() if isinstance(sparsity, Mapping) else (sparsity,):
        if not 0 <= value < 1:
            raise UserError(f"sparsity is the fraction removed, at least 0 and below 1, not {value}")


UPDATES = 100  # how often masks change along a schedule unless a plan says otherwise


def due(step: int, first: int, last: int, every: int | None) -> float | None:
    """Return how much of the schedule is over if the masks change at this step (1 at the last), else None.

    With `every` None they change about a hundred times, however short the training: few large cuts cost accuracy.
    """
    every = max(1, (last - first) // UPDATES) if every is None else every
    if not first <= step <= last or ((step - first) % every and step != last):
        return None
    return 1.0 if step == last else (step - first) / (last - first)


def check_every(every: int | None) -> None:
    """Raise UserError unless there is at least one step from update to update."""
    if every is not None and every < 1:
        raise UserError(f"every is a number of optimiser steps, at least 1, not {every}")


def require_unstructured(rule: Rule, method: str) -> None:
    """Raise UserError if a rule has a structure that a method cannot keep."""
    if not isinstance(rule.structure, Unstructured):
        raise UserError(
            f"{method} moves single weights and cannot keep the structure {type(rule.structure).__name__}; "
            "use a gradual, one-shot or iterative method"
        )
