"""Lines beside smooth activations: below and above at 10^5 points of every interval, and planted errors are found."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from sparring.bounds import _curves as curves
from sparring.bounds._curves import CURVES, Curve, Extremes, bend_of, between, extremes

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu-tanh": lambda z: F.gelu(z, approximate="tanh"),
    "hardswish": F.hardswish,
}
TURNS = {name: bend.turns for name, bend in CURVES.items()}
POINTS = 100_000


def curve(name: str) -> Curve:
    options = {"approximate": "tanh"} if name.endswith("-tanh") else {}
    return Curve(name.removesuffix("-tanh"), lambda self, **_: FUNCTIONS[name](self), ("self",), options)


def intervals(name: str) -> tuple[Tensor, Tensor]:
    """Return random intervals from 1e-4 to 60 wide, some of which begin, end or have their middle at a turn."""
    generator = torch.Generator().manual_seed(0)
    middle, wide = torch.rand(2, 36, generator=generator, dtype=torch.float64)
    middle, wide = 16 * middle - 8, 1e-4 * 6e5**wide
    turns = torch.tensor(TURNS[name], dtype=torch.float64).repeat(12)
    middle[:12] = turns[:12] + wide[:12] * torch.tensor([0.0, 0.5, -0.5, 0.3]).repeat(3)
    return middle - wide / 2, middle + wide / 2


def holds(name: str) -> bool:
    """Say whether lines and extremes hold at all points of all intervals, and touch the function."""
    op, (lower, upper) = curve(name), intervals(name)
    low_slope, low_shift, high_slope, high_shift = between(op, lower, upper)
    found = extremes(op, lower, upper)
    for i in range(len(lower)):
        z = torch.linspace(float(lower[i]), float(upper[i]), POINTS, dtype=torch.float64)
        value = FUNCTIONS[name](z)
        below, above = value - (low_slope[i] * z + low_shift[i]), high_slope[i] * z + high_shift[i] - value
        least, most = value.min() - found.least[i], found.most[i] - value.max()
        gaps = torch.stack([below.min(), above.min(), least, most])
        step = (upper[i] - lower[i]) / POINTS
        if bool((gaps < 0).any()) or float(gaps.max()) > 2 * float(step) + 1e-9:
            return False
    return True


@pytest.mark.parametrize("name", CURVES)
def test_lines_hold_at_a_hundred_thousand_points_of_every_interval(name: str) -> None:
    assert holds(name)


@pytest.mark.parametrize("name", CURVES)
def test_slopes_are_the_derivatives_and_monotone_between_turns(name: str) -> None:
    bend = CURVES[name]
    z = torch.linspace(-12, 12, 20_001, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(FUNCTIONS[name](z).sum(), z)
    found = bend.slope(z.detach())
    apart = (z.detach()[:, None] - torch.tensor(bend.turns)).abs().amin(1)
    torch.testing.assert_close(found[apart > 1e-3], slope[apart > 1e-3], atol=1e-9, rtol=0)
    ends = [-12.0, *bend.turns, 12.0]
    for left, right in pairwise(ends):
        change = found[(z > left) & (z < right)].diff()
        assert bool((change >= -1e-14).all() or (change <= 1e-14).all())
        assert float(change.abs().max()) <= bend.most * 24 / 20_000


def _without_turns(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CURVES, name, dataclasses.replace(CURVES[name], turns=()))


def _one_turn_moved(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    turns = tuple(turn + 0.5 for turn in CURVES[name].turns)
    monkeypatch.setitem(CURVES, name, dataclasses.replace(CURVES[name], turns=turns))


def _another_derivative(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    slope = CURVES[name].slope
    monkeypatch.setitem(CURVES, name, dataclasses.replace(CURVES[name], slope=lambda z: 0.8 * slope(z) + 0.05))


def _ends_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(op: Curve, lower: Tensor, upper: Tensor, slope: Tensor | float = 0.0) -> Extremes:
        one, two = (FUNCTIONS[name](z) - slope * z for z in (lower, upper))
        return Extremes(torch.minimum(one, two), torch.maximum(one, two), lower, upper)

    monkeypatch.setattr(curves, "extremes", broken)


def _no_widening(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(op: Curve, lower: Tensor, upper: Tensor, slope: Tensor | float = 0.0) -> Extremes:
        found = extremes(op, lower, upper, slope)
        return found._replace(least=found.least + 1e-7 * (1 + found.least.abs()))

    monkeypatch.setattr(curves, "extremes", broken)


@pytest.mark.parametrize("plant", [_without_turns, _another_derivative, _ends_alone, _no_widening, _one_turn_moved])
@pytest.mark.parametrize("name", ["gelu", "silu"])
def test_planted_tangents_are_found(name: str, plant, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(name, monkeypatch)
    assert not holds(name)


def test_other_functions_and_options_are_no_curves() -> None:
    assert bend_of(dataclasses.replace(curve("gelu"), options={"approximate": "other"})) is None
    assert bend_of(dataclasses.replace(curve("gelu"), name="mish")) is None
