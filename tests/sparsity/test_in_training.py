"""Every pruner in the real training loop: exact at the end, zero where masked, and resumable to the same bits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from sparring.metrics import size
from sparring.sparsity import (
    METHODS,
    Masks,
    Pruner,
    PruningSpec,
    Step,
    all_ones,
    build_pruner,
    check_reached,
    sparsity_of,
)
from sparring.train import EpochProgress, Fit, Recipe, fit

RECIPE = Recipe(epochs=3, batch_size=16, lr=0.05)


def digits() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (80, 1, 4, 4), dtype=torch.uint8, generator=generator)
    return x, torch.randint(4, (80,), generator=generator)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 20), nn.BatchNorm1d(20), nn.ReLU(), nn.Linear(20, 4))


class Interrupted(Exception):
    """Stand for a process that dies after an epoch."""


def run(method: str, checkpoint: Path | None = None, *, stop_after: int | None = None) -> tuple[nn.Module, Fit]:
    def progress(state: EpochProgress) -> None:
        if state.epoch == stop_after:
            raise Interrupted

    model = network()
    pruner = build_pruner(PruningSpec(method=method), 0.5)
    result = fit(
        model,
        *digits(),
        RECIPE,
        masks=all_ones(model),
        pruner=pruner,
        checkpoint=checkpoint,
        progress=progress,
    )
    check_reached(pruner, result.masks, 0.5)
    return model, result


@pytest.mark.parametrize("method", METHODS)
def test_masked_weights_are_zero_when_training_ends(method: str) -> None:
    model, result = run(method)
    for name, mask in result.masks.items():
        assert not bool(model.get_parameter(name)[~mask].any())
    assert size(model).sparsity >= sparsity_of(result.masks)


@pytest.mark.parametrize("method", ["gradual", "iterative", "movement", "hydra", "dns", "rigl"])
def test_an_interrupted_training_ends_in_the_same_bits(method: str, tmp_path: Path) -> None:
    whole, _ = run(method)
    with pytest.raises(Interrupted):
        run(method, tmp_path / "state.safetensors", stop_after=2)
    resumed, _ = run(method, tmp_path / "state.safetensors")
    pairs = zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


class Spy(Pruner):
    """Ask for two cycles, and work out the learning rate of every step from what it did to a weight."""

    cycles = 2

    def __init__(self, model: nn.Module) -> None:
        self.before = model.get_parameter("1.weight").detach().clone()
        self.rates: list[float] = []

    def __call__(self, step: Step) -> Masks:
        weight = step.model.get_parameter("1.weight")
        moved, slope = self.before - weight.detach(), weight.grad
        assert slope is not None
        self.rates.append((moved * slope).sum().item() / slope.square().sum().item())
        self.before = weight.detach().clone()
        return step.masks


def test_the_learning_rate_starts_anew_in_each_cycle() -> None:
    model = network()
    spy = Spy(model)
    recipe = Recipe(epochs=2, batch_size=16, lr=0.1, momentum=0.0, weight_decay=0.0, schedule="linear")
    fit(model, *digits(), recipe, pruner=spy)
    assert spy.rates == pytest.approx([0.1, 0.08, 0.06, 0.04, 0.02] * 2, rel=1e-3)
