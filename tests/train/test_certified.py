"""Certified training: the bounds are those of the certificates, and training on them certifies."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from sparring.bounds import certified_accuracy, ibp_initialise_, margin, training_bounds
from sparring.errors import Unsupported, UserError
from sparring.graph import lower
from sparring.models import Normalise
from sparring.threat import LINF, Threat
from sparring.train import certified, cross_entropy

SHAPE, X, Y = (1, 6, 6), torch.rand(8, 1, 6, 6, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 3


def network(*, norm: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    first = [nn.Conv2d(1, 4, 3, padding=1), *([nn.BatchNorm2d(4)] if norm else []), nn.ReLU(), nn.MaxPool2d(2)]
    last = (nn.Flatten(), nn.Linear(36, 12), nn.ReLU(), nn.Linear(12, 3))
    model = nn.Sequential(Normalise((0.5,), (0.5,)), *first, *last)
    if norm:
        model(torch.rand(64, *SHAPE))  # running statistics of their own
    return model.eval()


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize(("crown", "method"), [(0.0, "interval"), (1.0, "crown-interval")])
def test_the_bounds_trained_on_are_those_that_certify(norm: bool, crown: float, method: str) -> None:
    model = network(norm=norm)
    found = training_bounds(model, lower(model, SHAPE), X, Y, eps=0.05, crown=crown)
    wanted = margin(model, X, Y, Threat(LINF, 0.05), method=method)
    torch.testing.assert_close(found.margins.double(), wanted, atol=1e-4, rtol=1e-4)
    found.margins.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("crown", [0.0, 0.5, 1.0])
def test_without_a_ball_the_loss_is_the_clean_one_and_gradients_are_finite(crown: float) -> None:
    model = network()
    loss = certified(eps=1e-9, kappa=0.0, crown=crown > 0, ramp=None).at(1.0)(model, X, Y, None)
    torch.testing.assert_close(loss, cross_entropy(model, X, Y), atol=1e-4, rtol=1e-4)
    training_bounds(model, lower(model, SHAPE), X, Y, eps=0.0, crown=crown).margins.sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_the_ramp_leads_from_the_clean_loss_to_the_certified_one() -> None:
    model, ramped = network(), certified(eps=0.2, ramp=0.5, kappa=0.5)
    values = [float(ramped.at(share)(model, X, Y, None).detach()) for share in (1e-9, 0.25, 0.5, 1.0)]
    assert values[0] == pytest.approx(float(cross_entropy(model, X, Y).detach()), rel=1e-3)
    assert values[0] < values[1] < values[2] == values[3]


def test_training_on_the_bounds_certifies_what_it_did_not() -> None:
    model, threat, ramped = network(), Threat(LINF, 0.05), certified(eps=0.05, ramp=0.5)
    optimiser = torch.optim.Adam(model.parameters(), lr=0.01)
    before = certified_accuracy(model, X, Y, threat, method="interval")
    for step in range(200):
        optimiser.zero_grad()
        ramped.at((step + 1) / 200)(model, X, Y, None).backward()
        optimiser.step()
    assert before < 0.5 < certified_accuracy(model, X, Y, threat, method="interval")


def test_the_stability_loss_is_small_where_signs_are_kept() -> None:
    model, shifted = network(), network()
    with torch.no_grad():
        for layer in (shifted[1], shifted[5]):
            layer.get_parameter("bias").add_(50.0)  # every unit is alive over the whole ball
    of_stability = certified(eps=0.1, kappa=1.0, stability=1.0).at(1.0)
    open_, shut = (float((of_stability(m, X, Y, None) - cross_entropy(m, X, Y)).detach()) for m in (model, shifted))
    assert shut == pytest.approx(-1, abs=1e-3) and open_ > shut + 1e-3


def test_weights_are_drawn_so_that_intervals_keep_their_width() -> None:
    model = nn.Sequential(nn.Linear(400, 500), nn.ReLU(), nn.Linear(500, 10))
    ibp_initialise_(model, generator=torch.Generator().manual_seed(0))
    weight = model.get_parameter("0.weight").detach()
    assert float(weight.std()) == pytest.approx(math.sqrt(2 * math.pi) / 400, rel=0.02)
    assert float(weight.abs().sum(1).mean()) == pytest.approx(2.0, rel=0.02), "half of it passes a ReLU"
    assert float(model.get_parameter("2.bias").detach().abs().sum()) == 0


def test_computed_weights_and_settings_out_of_range_are_refused() -> None:
    normed = nn.Sequential(nn.Flatten(), nn.utils.parametrizations.weight_norm(nn.Linear(36, 3)))
    with pytest.raises(Unsupported, match="weights"):
        certified(eps=0.1).at(1.0)(normed, X, Y, None)
    wrong = ((0.0, 0.5, 1.0, 0.0), (0.1, 2.0, 1.0, 0.0), (0.1, 0.5, 1.5, 0.0), (0.1, 0.5, 1.0, -1.0))
    for eps, kappa, ramp, stability in wrong:
        with pytest.raises(UserError, match="certified training"):
            certified(eps=eps, kappa=kappa, ramp=ramp, stability=stability)
