"""The search for the largest eps that is certified: the root of a falling function, for many images at once."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Guesses keep this share of the tolerance away from both ends: a guess that was right then closes its other side.
_ASIDE = 0.4
# And the margin of one end counts at most so many times the other's, so that a cliff cannot make guesses crawl.
_STEEPEST = 200.0
# Below this eps nobody asks for more digits.
_SMALLEST = 1e-9


@dataclass
class Bracket:
    """Between which eps each image's margin falls to zero: certified at `low`, not certified at `high`.

    All have shape (N,), float64. above, below: the margins at both ends, or less of them (see `narrow_`); rose: +1
    where `low` moved last, −1 where `high` did. slope: how fast the margin falls at eps 0.
    """

    low: Tensor
    high: Tensor
    above: Tensor
    below: Tensor
    rose: Tensor
    slope: Tensor
    limit: float
    tolerance: float

    @classmethod
    def above_zero(cls, margin: Tensor, slope: Tensor, limit: float, tolerance: float) -> Bracket:
        """Begin at eps 0 with margins > 0 and how fast they fall there, (N,); no eps beyond the limit is asked for."""
        zero, inf = torch.zeros_like(margin), torch.full_like(margin, torch.inf)
        return cls(zero, inf, margin.clone(), -inf, zero.clone(), slope, limit, tolerance)

    def open_images(self) -> Tensor:
        """Return the numbers of the images whose ends are still farther apart than the tolerance, relative to high."""
        wide = (self.high - self.low > self.tolerance * self.high) & (self.high > _SMALLEST)
        return torch.where(torch.isfinite(self.high), wide, self.low < self.limit).nonzero().squeeze(1)

    def narrow_(self, rows: Tensor, eps: Tensor, margin: Tensor) -> Tensor:
        """Learn the margins of some images at eps, and return what to try for them next, (len(rows),).

        Regula falsi with the Illinois rule (Dowell & Jarratt 1971): an end that stays twice counts with half its
        margin, so that the other side is tried. Bounds loosen as balls widen: in place of the line through both ends
        comes the parabola that falls at 0 as the margin does. Until an end above is known, the line through the last
        two margins is followed, to at most four times low.
        """
        low, high, above, below, rose = (v[rows] for v in (self.low, self.high, self.above, self.below, self.rose))
        certified = margin > 0
        fall = (above - margin) / (eps - low)
        onward = torch.where(fall > 0, eps + margin / fall, torch.inf) * (1 + _ASIDE * self.tolerance)
        above = torch.where(certified, margin, torch.where(rose < 0, above / 2, above))
        below = torch.where(certified, torch.where(rose > 0, below / 2, below), margin)
        ended = torch.isfinite(high) | ~certified
        below = torch.where(ended, below.nan_to_num(-torch.inf).clamp_max(-1e-300).maximum(-_STEEPEST * above), below)
        above = above.minimum(-_STEEPEST * below)
        low, high = torch.where(certified, eps, low), torch.where(certified, high, eps)
        self.low[rows], self.high[rows], self.above[rows], self.below[rows] = low, high, above, below
        self.rose[rows] = torch.where(certified, 1.0, -1.0).to(rose.dtype)
        aside = torch.minimum(_ASIDE * self.tolerance * high, (high - low) / 2)
        between = _between(low, high, above, below, self.slope[rows])
        between = torch.minimum(torch.maximum(between, low + aside), high - aside)
        onward = torch.minimum(torch.maximum(onward, 1.05 * low), 4 * low).clamp_max(self.limit)
        return torch.where(torch.isfinite(high), between, onward)


def _between(low: Tensor, high: Tensor, above: Tensor, below: Tensor, slope: Tensor) -> Tensor:
    """Return where the parabola through both ends that falls as `slope` at 0 is zero, or the line if that bends up."""
    apart = high - low
    bend = (above - below - slope * apart) / (apart * (apart + 2 * low))
    steep = slope + 2 * bend * low
    curved = low + 2 * above / (steep + (steep**2 + 4 * bend * above).sqrt())
    return torch.where((bend > 0) & torch.isfinite(bend), curved, low + apart * above / (above - below))
