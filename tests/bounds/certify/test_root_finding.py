"""The search for certified radii: any falling margin's root, in few steps, and never above it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sparring.bounds.certify._certificates import Bracket

ROOTS = torch.logspace(-6, 0, 200, dtype=torch.float64)
# Margins of eps and of where they fall to zero: straight, bent either way, with a kink, a cliff, noise of rounding.
MARGINS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "straight": lambda eps, root: 3 * (root - eps),
    "steep later": lambda eps, root: 1 - (eps / root) ** 8,
    "steep at once": lambda eps, root: 1 - (eps / root) ** 0.1,
    "kink": lambda eps, root: torch.where(eps < root, 1 - eps / root, -1e6 * (eps / root - 1)),
    "cliff": lambda eps, root: torch.where(eps < root, 1.0, -torch.inf).double(),
    "no number beyond": lambda eps, root: torch.where(eps < root, 1 - eps / root, torch.nan),
    "flat": lambda eps, root: torch.where(eps < root, 1.0, -1e-9).double(),
}


def search(
    margin: Callable[[Tensor, Tensor], Tensor], guess: Tensor, limit: float, slope: float = 1.0
) -> tuple[Bracket, Tensor]:
    bracket = Bracket.above_zero(margin(torch.zeros_like(ROOTS), ROOTS), slope / ROOTS, limit, 1e-3)
    steps = torch.zeros_like(ROOTS)
    while len(rows := bracket.open_images()):
        guess[rows] = bracket.narrow_(rows, guess[rows], margin(guess[rows], ROOTS[rows]))
        steps[rows] += 1
        assert float(steps.max()) < 60
    return bracket, steps


@pytest.mark.parametrize("slope", [0.0, 1.0, 1e3])  # of use where it is right, harmless where it is not
@pytest.mark.parametrize("factor", [0.01, 0.7, 1.0, 30.0])
@pytest.mark.parametrize("name", MARGINS)
def test_ends_lie_on_both_sides_of_the_root_within_the_tolerance(name: str, factor: float, slope: float) -> None:
    bracket, _ = search(MARGINS[name], (factor * ROOTS).clamp_max(2.0), 2.0, slope)
    assert bool((bracket.low < ROOTS).all() and (bracket.high >= ROOTS).all())
    assert bool((bracket.high - bracket.low <= 1e-3 * bracket.high).all())


def test_a_nearly_straight_margin_takes_half_of_the_steps_of_bisection() -> None:
    _, steps = search(lambda eps, root: 1 - (eps / root) ** 1.2, 1.5 * ROOTS, 2.0)
    assert float(steps.mean()) <= 6


def test_a_bent_margin_is_found_from_far_beyond_its_root() -> None:
    _, steps = search(lambda eps, root: 4 - eps / root - 3 * (eps / root) ** 2, 6 * ROOTS, 1e3)
    assert float(steps.max()) <= 5


def test_what_is_certified_everywhere_ends_at_the_limit() -> None:
    bracket, _ = search(lambda eps, root: torch.ones_like(eps), ROOTS.clone(), 0.5)
    assert bool((bracket.low[ROOTS < 0.5] == 0.5).all()) and bool(torch.isinf(bracket.high).all())


def test_the_clean_margins_given_are_not_written_to() -> None:
    margin = torch.ones(200, dtype=torch.float64)
    bracket = Bracket.above_zero(margin, torch.ones_like(margin), 1.0, 1e-3)
    bracket.narrow_(torch.arange(200), torch.full_like(margin, 0.5), -margin)
    assert bool((margin == 1).all()) and bool((bracket.low == 0).all()) and bool((bracket.high == 0.5).all())
