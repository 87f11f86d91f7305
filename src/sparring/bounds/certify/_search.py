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
_POWER = 2.7  # power of eps with which CROWN's bounds loosen, as measured on convolutional networks
_GUESS = 0.7  # where radii lie between a bound too small, 0, and one too large, 1, in logarithms: measured 0.4 to 1
_LEAST = 1e-4  # of the linearised radius: interval bounds may be looser for deep networks, or vacuous
_SMALLEST = 1e-9
_CLOSE, _ASIDE, _PASSES = 0.03, 0.985, 6


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
        """Return a certified radius, starting from a smaller known one, `near`.

        It ends within 3% of a guess of where the margin vanishes, or of an eps that is not certified.
        """
        low, high, known = near, math.inf, None
        eps = min(limit, max(near, max(near, _LEAST * self.far) ** (1 - _GUESS) * self.far**_GUESS))
        for _ in range(_PASSES):
            bounds, value = self._margin(eps, known)
            root = max(self._root(eps, value) if math.isfinite(value) else eps / 4, _SMALLEST)
            if value > 0:
                low = eps
            else:
                high, known = eps, bounds
            if low >= (1 - _CLOSE) * min(limit, root, high):
                break
            eps = min(limit, _ASIDE * root) if root < high else (low + high) / 2
        return low

    def _margin(self, eps: float, known: list[Interval] | None) -> tuple[list[Interval], float]:
        """Return the bounds of all nodes over a ball, starting from those of a larger one, and the margin."""
        ball = region(self.x, self.norm, eps)
        bounds, relaxed = bound_nodes(self.graph, ball, backward=True, known=known, roughly=True)
        return bounds, float(self.final(self.graph, ball, self.rows, bounds, relaxed).min()) - self.rounding

    def _root(self, eps: float, value: float) -> float:
        """Guess where the margin vanishes, given its value at eps: it falls as in a linear network, and by eps^2.7."""
        slope = self.margin / self.far
        loss = (self.margin - slope * eps - value) / eps**_POWER
        low, high = 0.0, self.far
        for _ in range(40):
            middle = (low + high) / 2
            above = self.margin - slope * middle - loss * middle**_POWER > 0
            low, high = (middle, high) if above else (low, middle)
        return low
