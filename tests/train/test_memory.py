"""A training that does not fit into memory does not begin."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sparring.errors import UserError
from sparring.train import Recipe, _memory, check_memory, step_need


def test_a_batch_that_does_not_fit_is_refused_with_the_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = nn.Sequential(nn.Flatten(), nn.Linear(64, 4)), torch.zeros(3, 1, 8, 8, dtype=torch.uint8)
    check_memory(model, x, Recipe(batch_size=64))
    monkeypatch.setattr(_memory, "free_memory", lambda _: 130 * 2**20)
    check_memory(model, x, Recipe(batch_size=64))
    with pytest.raises(
        UserError, match=r"training takes \d+ MiB for 100000 images at a time and 130 MiB are free: at most"
    ):
        check_memory(model, x, Recipe(batch_size=100_000))
    check_memory(model, x, Recipe(batch_size=100_000, epochs=0))
    assert all(p.grad is None for p in model.parameters())


def test_gradients_are_counted_once_for_any_number_of_images() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 1000), nn.Linear(1000, 1000), nn.Linear(1000, 3))
    assert step_need(model, torch.rand(1, 1, 8, 8), Recipe()).each < 10 * 4 * 2064


def test_measuring_leaves_statistics_alone_and_counts_what_the_optimiser_keeps() -> None:
    model, x = (
        nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 3)),
        torch.rand(1, 1, 8, 8),
    )
    before = {name: value.clone() for name, value in model.state_dict().items()}
    sgd, adam = (step_need(model, x, Recipe(optimizer=name, lr=0.1)) for name in ("sgd", "adam"))
    assert adam.fixed - sgd.fixed == 4 * sum(p.numel() for p in model.parameters()) and adam.each == sgd.each
    assert model.training and all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
