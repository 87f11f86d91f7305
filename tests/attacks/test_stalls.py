"""Images whose search has stalled: what APGD does with the steps they have left."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sparring.attacks import apgd
from sparring.attacks.derivatives import Probe
from sparring.attacks.losses import margin


def won(model: nn.Module, x_adv: Tensor, y: Tensor) -> Tensor:
    with torch.no_grad():
        return margin(model(x_adv), y) > 0


def test_other_starts_of_apgd_cost_no_image_more_than_its_steps(trained: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, x, y = trained
    passes = []
    for image, label in zip(x[:60].split(1), y[:60].split(1), strict=True):
        probe = Probe(model)
        apgd(probe, image, label, eps=0.07, generator=torch.Generator().manual_seed(0))
        passes.append(probe.forwards)
    assert max(passes) <= 101
    # Given up at the earliest after 28 steps; some went on from another start then, for 28 each.
    assert any(count > 57 for count in passes)


def test_other_starts_of_apgd_fool_more(trained: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, x, y = trained
    fooled = {
        again: sum(
            int(won(model, apgd(model, x, y, eps=0.1, generator=generator, again=again), y).sum())
            for generator in (torch.Generator().manual_seed(seed) for seed in range(5))
        )
        for again in (False, True)
    }
    assert fooled[True] > fooled[False]
