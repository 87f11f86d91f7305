"""Search the certified radius of a large network with few evaluations."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from ...graph import Graph
from .._region import Region, region
from ._crown import bound_nodes
from ._relaxations import Interval, Relaxation

Final = Callable[[Graph, Region, Tensor, list[Interval], Mapping[int, Relaxation]], Tensor]
# Power of eps with which CROWN's bounds loosen, and more of it the farther the radius is below the linearised one:
# 2 to 4 as measured on convolutional networks.
_POWER, _STEEPER, _STEEPEST = 2.0, 0.2, 5.0
_GUESS = 0.76  # where radii lie between a bound too small, 0, and one too large, 1, in logarithms: measured 0.45 to 1
_LEAST = 1e-4  # of the linearised radius: interval bounds may be looser for deep networks, or vacuous
_SMALLEST = 1e-9
_CLOSE, _ASIDE, _PASSES = 0.055, 0.98, 6


@dataclass(frozen=True, eq=False)
class Search:
    """One image x (1, ...), coefficients of its margins (1, classes − 1, classes), and how the final margins are found.

    rounding: subtracted from every margin. margin: the smallest at eps 0. far: where it would vanish if the network
    were linear.
    """

    graph: Graph
    x: Tensor
    rows: Tensor
    norm: float
    final: Final
    rounding: float
    margin: float
    far: float

    def radius(self, near: float, limit: float) -> float:
        """Return a certified radius, starting from a guess that is too small, `near`; 0 if none is found.

        It ends within 6% of a guess of where the margin vanishes, or of an eps that is not certified.
        """
        low, high, known = 0.0, math.inf, None
        eps = min(limit, max(_LEAST * self.far, near) ** (1 - _GUESS) * self.far**_GUESS)
        for _ in range(_PASSES):
            bounds, value = self._margin(eps, known)
            root = max(self._root(eps, value) if math.isfinite(value) else eps / 4, _SMALLEST)
            aside = 1.0 if known is None and value <= 0 else _ASIDE  # the next bounds will be tighter
            if value > 0:
                low = eps
            else:
                high, known = eps, bounds
            if low >= (1 - _CLOSE) * min(limit, root, high):
                break
            eps = min(limit, aside * root) if root < high else (low + high) / 2
        return low

    def _margin(self, eps: float, known: list[Interval] | None) -> tuple[list[Interval], float]:
        """Return the bounds of all nodes over a ball, starting from those of a larger one, and the margin."""
        ball = region(self.x, self.norm, eps)
        bounds, relaxed = bound_nodes(self.graph, ball, backward=True, known=known, roughly=True)
        return bounds, float(self.final(self.graph, ball, self.rows, bounds, relaxed).min()) - self.rounding

    def _root(self, eps: float, value: float) -> float:
        """Guess where the margin vanishes, given its value at eps: it falls as in a linear network, and by a power."""
        slope = self.margin / self.far
        power = min(_POWER + _STEEPER * self.far / eps, _STEEPEST)
        loss = (self.margin - slope * eps - value) / eps**power
        low, high = 0.0, self.far
        for _ in range(40):
            middle = (low + high) / 2
            above = self.margin - slope * middle - loss * middle**power > 0
            low, high = (middle, high) if above else (low, middle)
        return low
