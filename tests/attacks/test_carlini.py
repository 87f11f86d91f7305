"""Carlini and Wagner's attack: its gradient by hand, and a search that no scale of the logits misleads."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from linear_answers import affine_problem
from torch import Tensor, nn

from sparring.attacks import cw, run
from sparring.attacks.carlini import lacking
from sparring.attacks.derivatives import Probe, frozen, logits_and_gradient, logits_and_pull
from sparring.attacks.losses import margin
from sparring.threat import L2, Threat


class Scaled(nn.Module):
    def __init__(self, model: nn.Module, scale: float) -> None:
        super().__init__()
        self.model, self.scale = model, scale

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.model(x)


@pytest.mark.parametrize("targeted", [True, False])
def test_the_slope_is_that_of_the_papers_objective(targeted: bool) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Flatten(), nn.Linear(20, 4)).eval(), torch.rand(40, 1, 20, 1)
    y, constant = torch.arange(40) % 4, torch.linspace(0.1, 2.0, 40)
    targets = (y + 1) % 4 if targeted else None

    def objective(logits: Tensor, y: Tensor, targets: Tensor | None) -> Tensor:
        return constant * (0.5 - margin(logits, y, targets)).clamp_min(0)

    with frozen(model):
        probe = Probe(model)
        _, expected = logits_and_gradient(probe, x, objective, y, targets)
        _, found = logits_and_pull(probe, x, lambda logits: lacking(logits, y, targets, constant, 0.5))
    torch.testing.assert_close(found, expected)
    assert probe.backwards == 80 and bool((expected != 0).any())


@pytest.mark.parametrize("scale", [1e-4, 1e4])
def test_no_scale_of_the_logits_moves_the_search_that_begins_at_the_linearised_margin(scale: float) -> None:
    model, x, y = affine_problem(1, images=10, on_box=False)
    attack = partial(cw, steps=200, start_constant=None, precision=0.5)
    plain, scaled = (run(m, x, y, attack, Threat(L2)).distance for m in (model, Scaled(model, scale)))
    assert bool(torch.isfinite(plain).all())
    torch.testing.assert_close(scaled, plain, rtol=2e-3, atol=0)
