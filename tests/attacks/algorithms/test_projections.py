"""The geometry of budgets: the nearest point of box and ball, and the best one along a gradient."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sparring.attacks.algorithms._projections import FeasibleSet, boundary_step, climb, hold, inside
from sparring.threat import L1, L2, LINF, distance


def problem(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(20, 1, 6, 6, generator=generator)
    return torch.where(x < 0.3, 0.0, x), torch.randn(x.shape, generator=generator)


def nearest_by_bisection(x: Tensor, step: Tensor, eps: float) -> Tensor:
    """Return the nearest point of box and l_1 ball in float64: soft thresholds, cut off at the box."""
    base, delta = x.double().flatten(1), step.double().flatten(1)
    room = torch.where(delta > 0, 1 - base, base)
    low, high = torch.zeros(len(x), 1).double(), torch.full((len(x), 1), 10.0).double()
    for _ in range(60):
        level = (low + high) / 2
        moved = torch.minimum((delta.abs() - level).clamp_min(0), room)
        out = moved.sum(1, keepdim=True) > eps
        low, high = torch.where(out, level, low), torch.where(out, high, level)
    return (base + moved * delta.sign()).view(x.shape)


@pytest.mark.parametrize("eps", [0.01, 1.0, 4.0])
def test_the_l1_projection_is_the_nearest_point_of_ball_and_box(eps: float) -> None:
    x, step = problem(0)
    point = inside(x, x + step, L1, eps)
    # float32 against float64: 2.2e-6 apart where products are not fused
    torch.testing.assert_close(point.double(), nearest_by_bisection(x, step, eps), rtol=0, atol=1e-5)
    assert float(distance(point - x, L1).max()) <= eps * (1 + 1e-6)


def test_points_already_inside_stay_where_they_are() -> None:
    x, step = problem(1)
    near = (x + 0.01 * step).clamp(0, 1)
    for norm in (L1, L2, LINF):
        torch.testing.assert_close(inside(x, near, norm, 2.0), near, rtol=0, atol=1e-7)


@pytest.mark.parametrize(("norm", "eps"), [(LINF, 0.2), (L2, 1.0), (L1, 3.0)])
def test_no_point_of_the_region_gains_more_than_one_long_step(norm: float, eps: float) -> None:
    x, gradient = problem(2)
    region = FeasibleSet.around(x, norm, eps)
    best = region.ahead(x.clone(), gradient, eps)
    gain = ((best - x) * gradient).flatten(1).sum(1)
    generator = torch.Generator().manual_seed(3)
    for length in (0.1, 1.0, 3.0):
        other = inside(x, x + length * (gradient + torch.randn(x.shape, generator=generator)), norm, eps)
        assert bool((((other - x) * gradient).flatten(1).sum(1) <= gain + 1e-5).all())
    assert float(distance(best - x, norm).max()) <= eps * (1 + 1e-6)
    onward = region.ahead(best.clone(), gradient, 0.1 * eps)
    assert bool((((onward - x) * gradient).flatten(1).sum(1) >= 0.99 * gain).all()), "the best point is left"


def test_an_l1_step_uses_its_length_up_inside_the_box() -> None:
    x, gradient = problem(4)
    point = climb(x, gradient, L1, torch.full((20,), 2.5))
    torch.testing.assert_close(distance(point - x, L1), torch.full((20,), 2.5))
    assert float(point.min()) >= 0 and float(point.max()) <= 1 + 1e-6


def test_only_what_the_box_stops_is_held() -> None:
    x, gradient = problem(3)
    x[0, 0, 0, 0], x[0, 0, 0, 1] = 1.0, 1.0
    gradient[0, 0, 0, :2] = torch.tensor([1.0, -1.0])
    stopped = ((x <= 0) & (gradient < 0)) | ((x >= 1) & (gradient > 0))
    assert 0 < int(stopped.sum()) < x.numel() // 2
    assert torch.equal(hold(gradient, x), torch.where(stopped, 0.0, gradient))


@pytest.mark.parametrize("norm", [L1, L2, LINF])
def test_a_boundary_step_gains_what_is_wanted_or_all_the_box_allows(norm: float) -> None:
    x, gradient = problem(4)
    gradient[:, :, 0] = 0.0
    most = torch.where(gradient > 0, 1 - x, -x).mul(gradient).flatten(1).sum(1)
    for share, gained in ((0.3, 0.3), (1.5, 1.0)):
        step = boundary_step(x, gradient, share * most, norm)
        torch.testing.assert_close((step * gradient).flatten(1).sum(1), gained * most, rtol=1e-5, atol=0)
        assert float((x + step).min()) >= -1e-6 and float((x + step).max()) <= 1 + 1e-6
        assert bool((step[:, :, 0] == 0).all())
