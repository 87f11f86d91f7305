"""The minimum-norm attack where the answer is known: on the boundary of a linear model, on the far side of a flat."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor, nn

from sparring.attacks import nearest, run
from sparring.threat import L2, LINF, Threat, distance

from ..linear_answers import affine_problem, boxed_distance


@pytest.mark.parametrize("norm", [L2, LINF])
@pytest.mark.parametrize("on_box", [True, False])
def test_it_ends_on_the_boundary_of_a_linear_model(norm: float, on_box: bool) -> None:
    model, x, y = affine_problem(3, on_box=on_box)
    found = run(model, x, y, partial(nearest, steps=10, starts=0), Threat(norm)).distance
    ratio = found / boxed_distance(model, x, y, norm)
    assert 1 - 1e-6 <= float(ratio.min()) <= float(ratio.max()) <= 1 + 3e-4


class Flat(nn.Module):
    """Class 1 begins at 0.95 of the first pixel; class 2, whose logit is flat at first, at 0.85 of the second."""

    def forward(self, x: Tensor) -> Tensor:
        first, second = x.flatten(1).unbind(1)
        return torch.stack([torch.zeros_like(first), 5 * (first - 0.95), 50 * (second - 0.75).relu() - 5], dim=1)


def test_further_starts_find_a_class_that_no_gradient_leads_to() -> None:
    x, y = torch.full((1, 1, 1, 2), 0.5), torch.zeros(1, dtype=torch.long)
    one, several = (float(distance(nearest(Flat(), x, y, starts=starts) - x, L2)) for starts in (0, 5))
    assert one == pytest.approx(0.45, rel=1e-3)
    assert several == pytest.approx(0.35, rel=1e-3)


def test_it_keeps_to_two_hundred_passes() -> None:
    model, x, y = affine_problem(1, images=10, on_box=True)
    result = run(model, x, y, nearest, Threat(LINF), generator=torch.Generator().manual_seed(0))
    assert max(result.forwards, result.backwards) <= 200
