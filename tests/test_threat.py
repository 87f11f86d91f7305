from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparring.errors import Unsupported, UserError
from sparring.threat import (
    L0,
    L1,
    L2,
    LINF,
    Threat,
    diameter,
    distance,
    dual,
    norm_name,
    parse_norm,
    project,
    random_point,
)  # fmt: skip

NORMS = [LINF, L2, L1]


@pytest.mark.parametrize("norm", NORMS)
def test_names_go_there_and_back(norm: float) -> None:
    assert parse_norm(norm_name(norm)) == norm
    assert dual(dual(norm)) == norm
    p, q = 1 / norm, 1 / dual(norm)
    assert math.isclose(p + q, 1)


@pytest.mark.parametrize("eps", [-0.1, math.nan, math.inf])
def test_threat_refuses_bad_budgets(eps: float) -> None:
    with pytest.raises(UserError, match="eps"):
        Threat(L2, eps)


def test_threat_refuses_units_of_255_and_unknown_norms() -> None:
    with pytest.raises(UserError, match="255"):
        Threat(LINF, 8)
    with pytest.raises(UserError, match="not one of"):
        Threat(3.0, 0.1)


def test_l0_counts_values_and_is_no_norm() -> None:
    delta = torch.tensor([[[[0.5, 0.0], [-1.0, 0.1]]], [[[0.0, 0.0], [0.0, 1e-9]]]])
    assert parse_norm(norm_name(L0)) == L0
    assert distance(delta, L0).tolist() == [3, 1] and diameter(delta, L0) == 4
    near = project(delta, L0, 2.9)
    assert near.flatten(1).tolist() == [[0.5, 0.0, -1.0, 0.0], [0.0, 0.0, 0.0, pytest.approx(1e-9)]]
    assert distance(project(torch.ones(1, 1, 2, 2), L0, 3), L0).tolist() == [3], "of equals so many stay"
    for refused in (lambda: dual(L0), lambda: random_point(delta, L0, 1.0)):
        with pytest.raises(Unsupported, match="l0"):
            refused()


@given(seed=st.integers(0, 10_000), norm=st.sampled_from(NORMS), eps=st.floats(0.01, 3))
@settings(max_examples=60, deadline=None)
def test_projection_is_the_nearest_point_of_the_ball(seed: int, norm: float, eps: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    delta = torch.randn(4, 3, 2, 2, generator=generator, dtype=torch.float64) * 2
    near = project(delta, norm, eps)
    assert (distance(near, norm) <= eps * (1 + 1e-9)).all()
    inside = distance(delta, norm) <= eps
    assert torch.equal(near[inside], delta[inside])
    # No sampled point of the ball is nearer: the variational inequality <delta - near, z - near> <= 0.
    for _ in range(5):
        other = random_point(delta, norm, eps, generator)
        inner = ((delta - near) * (other - near)).flatten(1).sum(1)
        assert (inner <= 1e-9).all()


@pytest.mark.parametrize("norm", NORMS)
def test_random_points_fill_the_ball(norm: float) -> None:
    generator = torch.Generator().manual_seed(1)
    points = random_point(torch.zeros(20_000, 2), norm, 1.0, generator)
    sizes = distance(points, norm)
    assert sizes.max() <= 1 + 1e-6
    # Uniform in two dimensions: half of the area lies within a radius of sqrt(1/2), in every norm.
    share = float((sizes < math.sqrt(0.5)).float().mean())
    assert abs(share - 0.5) < 0.02
    assert points.mean(0).abs().max() < 0.02


def test_projection_takes_a_budget_for_each_image() -> None:
    delta = torch.full((2, 1, 1, 4), 1.0)
    near = project(delta, LINF, torch.tensor([0.1, 0.5]))
    assert torch.equal(near[:, 0, 0, 0], torch.tensor([0.1, 0.5]))
