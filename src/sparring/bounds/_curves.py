"""Smooth functions of one variable: extremes over an interval, and lines that bound them.

A function is given by its derivative and by the points between which the derivative is monotone. There a line touches
the function once, at a point that bisection finds. The remaining width of its interval, and rounding, widen the result.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from ..graph import Call, evaluate

_HALVINGS = 26
_ROUNDING = 1e-13  # of the numbers that go into a difference
_TOGETHER = 1 << 15  # numbers up to which one call for all lines is faster than one for each
_ROOT = math.sqrt(2 / math.pi)


@dataclass(frozen=True, eq=False)
class Curve(Call):
    """A smooth function of each value; `CURVES` has its derivative."""


@dataclass(frozen=True)
class Bend:
    """Description of a function: its derivative, where that turns or jumps, and how fast it changes at most."""

    slope: Callable[[Tensor], Tensor]
    turns: tuple[float, ...]
    most: float


def _sigmoid(z: Tensor) -> Tensor:
    return torch.sigmoid(z) * torch.sigmoid(-z)


def _tanh(z: Tensor) -> Tensor:
    return 1 - torch.tanh(z).square()


def _silu(z: Tensor) -> Tensor:
    return torch.sigmoid(z) * (1 + z * torch.sigmoid(-z))


def _gelu(z: Tensor) -> Tensor:
    return (1 + torch.erf(z / math.sqrt(2))) / 2 + z * torch.exp(-z * z / 2) / math.sqrt(2 * math.pi)


def _gelu_tanh(z: Tensor) -> Tensor:
    inner = torch.tanh(_ROOT * (z + 0.044715 * z**3))
    return (1 + inner) / 2 + z / 2 * (1 - inner * inner) * _ROOT * (1 + 0.134145 * z * z)


def _hardswish(z: Tensor) -> Tensor:
    return torch.where(z <= -3, 0.0, torch.where(z >= 3, 1.0, (2 * z + 3) / 6))


CURVES = {
    "sigmoid": Bend(_sigmoid, (0.0,), 0.1),
    "tanh": Bend(_tanh, (0.0,), 0.8),
    "silu": Bend(_silu, (-2.3993572805154676, 2.3993572805154676), 0.5),
    "gelu": Bend(_gelu, (-math.sqrt(2), math.sqrt(2)), 0.8),
    "gelu-tanh": Bend(_gelu_tanh, (-1.4185040087908284, 1.4185040087908284), 0.8),
    "hardswish": Bend(_hardswish, (-3.0, 3.0), 0.4),
}


def bend_of(op: Call) -> Bend | None:
    """Return the description of the function that a Call computes."""
    name = op.name.rstrip("_")
    approximate = op.options.get("approximate", "none")
    return CURVES.get(name if approximate == "none" else f"{name}-{approximate}")


class Extremes(NamedTuple):
    """The minimum and maximum of f(z) − slope·z over intervals, and approximately where they are."""

    least: Tensor
    most: Tensor
    lowest: Tensor
    highest: Tensor


def extremes(op: Curve, lower: Tensor, upper: Tensor, slope: Tensor | float = 0.0) -> Extremes:
    """Find the extremes of f(z) − slope·z over [lower, upper], outwards of the true ones by rounding."""
    bend = bend_of(op)
    assert bend is not None
    slope = torch.as_tensor(slope, dtype=lower.dtype).expand_as(lower)
    ends = [lower, *(torch.minimum(torch.maximum(lower.new_tensor(turn), lower), upper) for turn in bend.turns), upper]
    places = list(ends)
    for low, high in pairwise(ends):
        sign = bend.slope(low + (high - low) * 2.0**-30) > slope
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            same = (bend.slope(middle) > slope) == sign
            low, high = torch.where(same, middle, low), torch.where(same, high, middle)
        places += [low, high]
    at = torch.stack(places)
    value, drop = evaluate(op, at), slope * at
    (least, first), (most, last) = (value - drop).min(0), (value - drop).max(0)
    apart = bend.most * ((upper - lower) * 2.0**-_HALVINGS).square()
    apart = apart + _ROUNDING * (value.abs().amax(0) + drop.abs().amax(0) + at.abs().amax(0))
    return Extremes(least - apart, most + apart, *(at.gather(0, i[None])[0] for i in (first, last)))


def between(op: Curve, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return low slope, low shift, high slope and high shift of lines below and above f over [lower, upper].

    Of the chord, tangents at the ends and the middle, and lines through an end that touch nearly, those with the
    smallest areas; each is shifted until it holds.
    """
    bend = bend_of(op)
    assert bend is not None
    middle = (lower + upper) / 2
    chord = _through(op, lower, upper, bend.slope(middle))
    first = extremes(op, lower, upper, chord)
    slopes = [chord, *(bend.slope(z) for z in (lower, middle, upper))]
    for touching in (first.lowest, first.highest):
        slopes += [_through(op, lower, touching, chord), _through(op, touching, upper, chord)]
    every = torch.stack(slopes)
    found = [
        extremes(op, lower.expand_as(part).contiguous(), upper.expand_as(part).contiguous(), part)
        for part in torch.split(every, len(every) if every.numel() <= _TOGETHER else 1)
    ]
    low, high = torch.cat([one.least for one in found]), torch.cat([one.most for one in found])
    below, above = (every * middle + low).argmax(0)[None], (every * middle + high).argmin(0)[None]
    chosen = ((every, below), (low, below), (every, above), (high, above))
    low_slope, low_shift, high_slope, high_shift = (value.gather(0, index)[0] for value, index in chosen)
    return low_slope, low_shift, high_slope, high_shift


def _through(op: Curve, left: Tensor, right: Tensor, otherwise: Tensor) -> Tensor:
    """Return the slope of the line through two points of a function, or a default if they are too close."""
    apart = right - left
    rise = evaluate(op, right) - evaluate(op, left)
    return torch.where(apart > 1e-7, rise / apart.clamp_min(1e-300), otherwise)
