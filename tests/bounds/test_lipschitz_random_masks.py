from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from sparring.bounds import margin_ratios, random_mask_bounds
from sparring.errors import UserError


def one_matrix() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """A network whose product bound is the norm of [[1, 1], [1, −1]]."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    with torch.no_grad():
        model.get_parameter("1.weight").copy_(torch.tensor([[1.0, 1.0], [1.0, -1.0]]))
        model.get_parameter("2.weight").copy_(torch.tensor([[1.0, 0.0], [0.0, 0.0]]))
    return model, torch.full((1, 1, 1, 2), 0.5), torch.tensor([0])


def test_the_expected_spectral_norm_rises_first() -> None:
    model, x, y = one_matrix()
    start, later = random_mask_bounds(model, x, y, (0.0, 0.1), norm=2.0, radius=0.1, layers=("1",), draws=300)
    assert start.constant[0] == pytest.approx(math.sqrt(2), abs=1e-6)
    # (1−α)⁴ √2 + 4α(1−α)³ φ + ... with φ = 1.618: 1.465 at α = 0.1
    assert later.constant[1] < 1.465 < later.constant[2]
    assert later.change[1] > 0


def test_the_expected_row_sum_falls() -> None:
    model, x, y = one_matrix()
    points = random_mask_bounds(model, x, y, (0.0, 0.3, 0.9), norm=math.inf, radius=0.1, layers=("1",), draws=100)
    assert all(point.change[2] < 0 for point in points[1:])


def test_scaling_the_weights_moves_no_ratio() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    x = torch.rand(5, 1, 2, 2)
    y = model(x).argmax(1)
    constant, ratio = margin_ratios(model, x, y, 0.1, norm=2.0)
    with torch.no_grad():
        model.get_parameter("3.weight").mul_(0.1)
        model.get_parameter("3.bias").mul_(0.1)
    smaller, same = margin_ratios(model, x, y, 0.1, norm=2.0)
    torch.testing.assert_close(smaller, constant * 0.1, rtol=1e-5, atol=0)
    torch.testing.assert_close(same, ratio, rtol=1e-5, atol=0)


def test_the_model_is_untouched_and_bad_requests_are_refused() -> None:
    model, x, y = one_matrix()
    random_mask_bounds(model, x, y, (1.0,), norm=2.0, radius=0.1, draws=2)
    assert (model.get_parameter("1.weight") != 0).all()
    with pytest.raises(UserError, match="layers"):
        random_mask_bounds(model, x, y, (0.5,), norm=2.0, radius=0.1, layers=("7",))
    with pytest.raises(UserError, match="two draws"):
        random_mask_bounds(model, x, y, (0.5,), norm=2.0, radius=0.1, draws=1)
