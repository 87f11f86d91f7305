"""Losses against their closed forms."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sparring.errors import UserError
from sparring.train import adversarial, cross_entropy, smoothed, trades

MODEL = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
X, Y = torch.rand(5, 1, 2, 2), torch.tensor([0, 1, 2, 0, 1])


def test_smoothed_labels_give_every_class_its_share() -> None:
    logs = MODEL(X).log_softmax(1)
    wanted = -(0.8 * logs[torch.arange(5), Y] + 0.2 * logs.mean(1)).mean()
    torch.testing.assert_close(smoothed(0.2)(MODEL, X, Y, None), wanted)
    torch.testing.assert_close(smoothed(0.0)(MODEL, X, Y, None), cross_entropy(MODEL, X, Y))


def test_losses_under_attack_smooth_labels_too() -> None:
    for make in (adversarial, trades):
        plain, soft = (
            make(eps=0.1, steps=2, label_smoothing=share)(MODEL, X, Y, torch.Generator().manual_seed(0))
            for share in (0.0, 0.2)
        )
        assert not torch.equal(plain, soft)


@pytest.mark.parametrize("share", [-0.1, 1.0])
def test_a_share_outside_of_its_range_is_refused(share: float) -> None:
    with pytest.raises(UserError, match="label_smoothing"):
        smoothed(share)
