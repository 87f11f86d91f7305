"""The part of a ball inside a half-space and the image range: its distance and its extent.

All bounds are duals in which every multiplier is valid, so that their search may stop after a few steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from ...threat import LINF
from .._region import dot

_STEPS, _LOOKS, _CUTS = 12, 2, 6
_FAR, _INSIDE, _TINY = 1e6, 0.9999, 1e-300


class Plane(NamedTuple):
    """The half-spaces a·d + gap ≤ 0 of steps d from the image: a (N, pixels), gap (N,)."""

    a: Tensor
    gap: Tensor


@dataclass(frozen=True, eq=False)
class Room:
    """The steps from an image that stay in the image range, low ≤ d ≤ high of (pixels,), measured in linf or l2."""

    norm: float
    low: Tensor
    high: Tensor

    def away(self, plane: Plane) -> tuple[Tensor, Tensor]:
        """Bound the length of all steps into half-spaces with gap ≥ 0 from below, (N,); return short ones, (N, pixels).

        Where no step leads into a half-space the bound is large. It is differentiable in the half-spaces.
        """
        return self._away_linf(plane) if self.norm == LINF else self._away_l2(plane)

    def _away_l2(self, plane: Plane) -> tuple[Tensor, Tensor]:
        # min over the box of d²/2 + m(a·d + gap); Newton's steps approach the best multiplier m from below.
        a, gap = plane.a.detach(), plane.gap.detach().clamp_min(0)
        step, multiplier = torch.zeros_like(a), torch.zeros_like(gap)
        for _ in range(_STEPS):
            wanted = -multiplier[:, None] * a
            step = wanted.clamp(self.low, self.high)
            square = torch.where(step == wanted, self._against(a), 0).square().sum(1)
            rest = gap + (a * torch.where(step == wanted, 0, step)).sum(1)
            multiplier = torch.where(rest > 0, (rest / square.clamp_min(_TINY)).clamp_max(_FAR), multiplier)
        step = (-multiplier[:, None] * a).clamp(self.low, self.high)
        value = step.square().sum(1) / 2 + multiplier * ((plane.a * step).sum(1) + plane.gap)
        return (2 * value.clamp_min(_TINY)).sqrt(), step

    def _away_linf(self, plane: Plane) -> tuple[Tensor, Tensor]:
        # The fall Σ|aᵢ|·min(t, roomᵢ) has to make up for the gap; it is concave in t, so that Newton ends below.
        a, gap = plane.a.detach(), plane.gap.detach().clamp_min(0)
        size, room = a.abs(), torch.where(a > 0, -self.low, self.high)
        t = torch.zeros_like(gap)
        for _ in range(_STEPS):
            beyond = room > t[:, None]
            rest = gap - torch.where(beyond, 0, size * room).sum(1)
            t = torch.maximum(t, (rest / torch.where(beyond, size, 0).sum(1).clamp_min(_TINY)).clamp_max(_FAR))
        step = -a.sign() * torch.minimum(t[:, None], room)
        slope = torch.where(room > t[:, None], size, 0).sum(1).clamp_min(1 / _FAR)
        return t + ((plane.a * step).sum(1) + plane.gap) / slope, step

    def reach(self, v: Tensor, plane: Plane, eps: float) -> Tensor:
        """Bound v·d from below over the steps up to eps into the half-spaces: v (N, K, pixels) to (N, K).

        The minimum of (v + m·a)·d over the ball, plus m·gap, is a lower bound for every m ≥ 0.
        """
        return self._reach_linf(v, plane, eps) if self.norm == LINF else self._reach_l2(v, plane, eps)

    def _reach_l2(self, v: Tensor, plane: Plane, eps: float) -> Tensor:
        # Steps on m take the pixels that can move against a for those that can move against v + m·a.
        gap, square = plane.gap[:, None], self._against(plane.a).square().sum(1)[:, None].clamp_min(_TINY)
        share = (gap / square.sqrt() / eps).clamp(0, _INSIDE)
        steep = share / (1 - share.square()).sqrt() * square.sqrt()
        multiplier = v.new_zeros(v.shape[:2])
        for _ in range(_LOOKS):
            total = self._against(torch.addcmul(v, multiplier[..., None], plane.a[:, None]))
            along = dot(total, plane.a)
            across = (total.square().sum(2) - along.square() / square).clamp_min(0).sqrt()
            multiplier = (multiplier + (across * steep - along) / square).clamp_min(0)
        total = self._against(torch.addcmul(v, multiplier[..., None], plane.a[:, None]))
        return multiplier * gap - eps * total.square().sum(2).sqrt()

    def _reach_linf(self, v: Tensor, plane: Plane, eps: float) -> Tensor:
        # The bound is concave and piecewise linear in m: cuts by its tangents at both ends of a bracket.
        low, high = self.low.clamp_min(-eps), self.high.clamp_max(eps)
        gap = plane.gap[:, None]

        def at(m: Tensor) -> tuple[Tensor, Tensor]:
            total = torch.addcmul(v, m[..., None], plane.a[:, None])
            step = torch.where(total > 0, low, high)
            slope = dot(step, plane.a) + gap
            return (v * step).sum(2) + m * slope, slope

        corner = torch.where(plane.a > 0, low, high)
        spare = -(plane.a * corner).sum(1)[:, None] - gap
        left = v.new_zeros(v.shape[:2])
        best, rise = at(left)
        right = ((dot(v, corner) - best) / spare.clamp_min(_TINY)).clamp(0, _FAR)
        first, (second, fall) = best, at(right)
        best = torch.maximum(best, second)
        for _ in range(_CUTS):
            cut = (second - first + rise * left - fall * right) / (rise - fall).clamp_min(_TINY)
            m = torch.minimum(torch.maximum(cut, left), right)
            value, slope = at(m)
            best, up = torch.maximum(best, value), slope > 0
            left, first, rise = (torch.where(up, new, old) for new, old in ((m, left), (value, first), (slope, rise)))
            right, second, fall = (
                torch.where(up, old, new) for new, old in ((m, right), (value, second), (slope, fall))
            )
        return best

    def _against(self, v: Tensor) -> Tensor:
        """Return coefficients (..., pixels) of steps, 0 where the box keeps a pixel from moving against them."""
        return v.clamp(*self._signs)

    @cached_property
    def _signs(self) -> tuple[Tensor, Tensor]:
        inf, zero = torch.full_like(self.low, torch.inf), torch.zeros_like(self.low)
        return torch.where(self.high > 0, -inf, zero), torch.where(self.low < 0, inf, zero)
