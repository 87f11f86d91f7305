"""Duals of half-spaces in balls and boxes against the programs that they bound."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.optimize import LinearConstraint, linprog, minimize

from sparring.bounds.exact_distances._half_spaces import Plane, Room

PIXELS = 8
NORMS = [math.inf, 2.0]


def setting(seed: int, norm: float) -> tuple[Room, Plane]:
    """An image with pixels at both ends of the range, and a half-space that steps can reach."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(PIXELS, generator=generator, dtype=torch.float64)
    x[:3], x[3] = 0, 1
    room = Room(norm, -x, 1 - x)
    a = torch.randn(1, PIXELS, generator=generator, dtype=torch.float64)
    fall = -(torch.where(a > 0, room.low, room.high) * a).sum(1)
    return room, Plane(a, 0.6 * torch.rand(1, generator=generator, dtype=torch.float64) * fall)


def shortest(room: Room, plane: Plane) -> tuple[float, np.ndarray]:
    """The shortest step into a half-space, by a solver."""
    a, gap, box = plane.a[0].numpy(), float(plane.gap), list(zip(room.low.numpy(), room.high.numpy(), strict=True))
    if room.norm == 2:
        inside = LinearConstraint(a[None], -np.inf, -gap)
        found = minimize(
            lambda d: d @ d / 2, np.zeros(PIXELS), jac=lambda d: d, bounds=box, constraints=inside, method="SLSQP"
        )
        return float(np.linalg.norm(found.x)), found.x
    eye, one = np.eye(PIXELS), np.ones((PIXELS, 1))
    rows = np.vstack([np.append(a, 0)[None], np.hstack([eye, -one]), np.hstack([-eye, -one])])
    limits = np.concatenate([[-gap], np.zeros(2 * PIXELS)])
    found = linprog([0] * PIXELS + [1], A_ub=rows, b_ub=limits, bounds=[*box, (0, None)])
    return float(found.fun), found.x[:PIXELS]


def steps(room: Room, plane: Plane, eps: float, seed: int) -> torch.Tensor:
    """Steps of the ball into the half-space, around the shortest."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(4000, PIXELS, generator=generator, dtype=torch.float64)
    noise *= eps * torch.rand(4000, 1, generator=generator, dtype=torch.float64)
    some = (torch.from_numpy(shortest(room, plane)[1]) + noise).clamp(room.low, room.high)
    near = some.norm(dim=1, p=room.norm) <= eps
    return some[near & (some @ plane.a[0] + plane.gap <= 0)]


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("seed", range(12))
def test_the_distance_of_a_half_space_is_that_of_its_nearest_step(seed: int, norm: float) -> None:
    room, plane = setting(seed, norm)
    found, step = room.away(plane)
    assert float(found) == pytest.approx(shortest(room, plane)[0], rel=1e-5)
    assert float((plane.a * step).sum(1) + plane.gap) == pytest.approx(0, abs=1e-9)
    assert (step >= room.low).all() and (step <= room.high).all()


@pytest.mark.parametrize("norm", NORMS)
def test_a_half_space_out_of_reach_is_farther_than_any_image(norm: float) -> None:
    room, plane = setting(0, norm)
    found, _ = room.away(Plane(plane.a, plane.gap + 10 * plane.a.abs().sum()))
    assert float(found) > math.sqrt(PIXELS)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("seed", range(12))
def test_no_step_into_a_half_space_is_below_its_reach_and_the_half_space_counts(seed: int, norm: float) -> None:
    room, plane = setting(seed, norm)
    eps = 1.2 * shortest(room, plane)[0]
    v = torch.randn(1, 5, PIXELS, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    bound, alone = room.reach(v, plane, eps), room.reach(v, Plane(plane.a, plane.gap - 1e6), eps)
    inside = steps(room, plane, eps, seed)
    assert len(inside) > 5
    assert (bound <= (inside @ v[0].T).amin(0) + 1e-9).all()
    assert (bound >= alone - 1e-9).all() and (bound > alone + 1e-3).any()


@pytest.mark.parametrize("norm", NORMS)
def test_the_slope_of_a_distance_is_that_of_its_differences(norm: float) -> None:
    room, (a, gap) = setting(1, norm)
    a, gap = a.requires_grad_(), gap.requires_grad_()
    slope, by_gap = torch.autograd.grad(room.away(Plane(a, gap))[0].sum(), [a, gap])
    a, gap = a.detach(), gap.detach()
    for i in range(PIXELS):
        moved = a.clone()
        moved[0, i] += 1e-6
        change = float(room.away(Plane(moved, gap))[0] - room.away(Plane(a, gap))[0]) / 1e-6
        assert change == pytest.approx(float(slope[0, i]), abs=1e-4)
    change = float(room.away(Plane(a, gap + 1e-6))[0] - room.away(Plane(a, gap))[0]) / 1e-6
    assert change == pytest.approx(float(by_gap), abs=1e-4)
