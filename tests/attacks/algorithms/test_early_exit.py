"""Images whose search has stalled: what APGD does with the steps they have left, and that FAB goes on."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from sparring.attacks import apgd, fab
from sparring.attacks._gradients import Probe
from sparring.attacks.algorithms._losses import margin_loss


def won(model: nn.Module, x_adv: Tensor, y: Tensor) -> Tensor:
    with torch.no_grad():
        return margin_loss(model(x_adv), y) > 0


def test_other_starts_of_apgd_cost_no_image_more_than_its_steps(trained: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, x, y = trained
    passes = []
    for image, label in zip(x[:60].split(1), y[:60].split(1), strict=True):
        probe = Probe(model)
        apgd(probe, image, label, eps=0.07, generator=torch.Generator().manual_seed(0))
        passes.append(probe.forwards)
    assert max(passes) <= 101
    # Given up just short of the boundary after 70 steps, some went on from two other starts, for 14 each.
    assert any(count > 71 for count in passes)


def test_other_starts_of_apgd_fool_more(trained: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, x, y = trained
    fooled = {
        again: sum(
            int(won(model, apgd(model, x, y, eps=0.07, generator=generator, again=again), y).sum())
            for generator in (torch.Generator().manual_seed(seed) for seed in range(5))
        )
        for again in (False, True)
    }
    assert fooled[True] > fooled[False]


@pytest.mark.parametrize("gap", [0.0, 1e-6])
def test_fab_goes_on_where_rounding_would_take_its_step(gap: float) -> None:
    generator = torch.Generator().manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 2)).requires_grad_(False)
    x = 0.25 + torch.rand(20, 1, 8, 8, generator=generator) / 2
    y = torch.zeros(len(x), dtype=torch.int64)
    weight = torch.randn(64, generator=generator)
    for image, label in zip(x.split(1), y.split(1), strict=True):
        net.get_parameter("1.weight").copy_(torch.stack([-weight, weight]))
        net.get_parameter("1.bias").fill_(5.0)
        net.get_parameter("1.bias")[0] += margin_loss(net(image), label)[0] + gap
        x_adv = fab(net, image, label, steps=5)
        assert bool(won(net, x_adv, label).all())
        assert float((x_adv - image).norm()) < 1e-3
