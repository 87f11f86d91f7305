"""Defences by sparsity that only hide the gradient, on one trained network: the default evaluation must see through."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from sparring import models
from sparring.attacks import Attack, fast, nearest, pgd, robust_accuracy, run
from sparring.data import Dataset, as_float
from sparring.sparsity import MeanSparse, StochasticPruning, TopK, calibrate_
from sparring.threat import L2, LINF, Threat

EPS = 0.11


@pytest.fixture(scope="module")
def trained(digits: Dataset) -> tuple[nn.Sequential, Tensor, Tensor]:
    """Return LeNet-300-100 trained on digits with 100 test images that it classifies correctly."""
    torch.manual_seed(0)
    model = models.build("lenet-300-100", shape=(1, 8, 8), classes=10, mean=digits.mean, std=digits.std)
    optimiser = torch.optim.Adam(model.parameters(), 2e-3)
    x, y = as_float(digits.train.x), digits.train.y
    for _ in range(15):
        for rows in torch.randperm(len(x)).split(128):
            optimiser.zero_grad()
            nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
            optimiser.step()
    model.eval()
    x, y = as_float(digits.test.x), digits.test.y
    right = (model(x).argmax(1) == y).nonzero().squeeze(1)[:100]
    assert isinstance(model, nn.Sequential)
    return model, x[right], y[right]


class Staircase(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.round(x.clamp_min(0) * 2) / 2


class Cut(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.clamp_min(0).detach()


class Loud(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 1e4 * x


def with_activation(model: nn.Sequential, layer: Callable[[], nn.Module]) -> nn.Sequential:
    return nn.Sequential(*(layer() if isinstance(part, nn.ReLU) else part for part in model)).eval()


def robust(model: nn.Module, x: Tensor, y: Tensor, attack: Attack) -> tuple[float, set[str]]:
    result = run(model, x, y, attack, Threat(LINF, EPS), generator=torch.Generator().manual_seed(0))
    return robust_accuracy(result), {flag.name for flag in result.flags}


def test_the_undefended_network_is_neither_lost_nor_safe(trained: tuple[nn.Sequential, Tensor, Tensor]) -> None:
    share, flags = robust(*trained, fast)
    assert 0.3 <= share <= 0.6
    assert flags == set()


@pytest.mark.parametrize("layer", [Staircase, Cut])
def test_dead_activations_gain_nothing(layer: type[nn.Module], trained: tuple[nn.Sequential, Tensor, Tensor]) -> None:
    model, x, y = trained
    base, _ = robust(model, x, y, fast)
    share, flags = robust(with_activation(model, layer), x, y, fast)
    assert share <= base + 0.04
    assert {"zero-gradients", "masked-gradients"} <= flags


def test_scaled_logits_change_no_image(trained: tuple[nn.Sequential, Tensor, Tensor]) -> None:
    model, x, y = trained
    scaled = nn.Sequential(*model, Loud())
    threat, generator = Threat(LINF, EPS), torch.Generator()
    first = run(model, x, y, fast, threat, generator=generator.manual_seed(0))
    second = run(scaled, x, y, fast, threat, generator=generator.manual_seed(0))
    assert torch.equal(first.success, second.success)
    assert {flag.name for flag in second.flags} == {"logit-scale"}
    naive, _ = robust(scaled, x, y, pgd)
    assert naive >= robust_accuracy(second) + 0.1
    reach = [run(net, x, y, nearest, Threat(L2)).distance for net in (model, scaled)]
    assert torch.allclose(reach[0], reach[1], rtol=1e-2)


@pytest.mark.parametrize("layer", [lambda: TopK(0.8), lambda: MeanSparse(1.0)])
def test_masked_gradients_are_attacked_straight_through(
    layer: Callable[[], nn.Module], trained: tuple[nn.Sequential, Tensor, Tensor]
) -> None:
    model, x, y = trained
    defended = with_activation(model, layer)
    calibrate_(defended, x)
    # The reference was written for these layers: PGD on the straight-through backward pass, 10 restarts of 100 steps.
    for part in defended:
        if hasattr(part, "straight_through"):
            part.straight_through = True
    x_adv = pgd(defended, x, y, eps=EPS, steps=100, restarts=10, generator=torch.Generator().manual_seed(1))
    clean = defended(x).argmax(1) == y
    reference = float((clean & (defended(x_adv).argmax(1) == y)).double().mean())
    for part in defended:
        if hasattr(part, "straight_through"):
            part.straight_through = False
    share, _ = robust(defended, x, y, fast)
    assert share <= reference + 0.02
    assert not any(getattr(part, "straight_through", False) for part in defended)


def test_random_activations_are_attacked_in_expectation(trained: tuple[nn.Sequential, Tensor, Tensor]) -> None:
    model, x, y = trained
    defended = with_activation(model, lambda: StochasticPruning(1.0))
    base, _ = robust(model, x[:30], y[:30], pgd)
    first = run(defended, x[:30], y[:30], pgd, Threat(LINF, EPS), generator=torch.Generator().manual_seed(0))
    again = run(defended, x[:30], y[:30], pgd, Threat(LINF, EPS), generator=torch.Generator().manual_seed(0))
    assert torch.equal(first.x_adv, again.x_adv)
    assert torch.equal(first.success, again.success)
    assert robust_accuracy(first) <= base + 0.05
    assert all(part.generator is None for part in defended if hasattr(part, "stochastic"))


def test_examples_are_transferred_from_a_named_model(trained: tuple[nn.Sequential, Tensor, Tensor]) -> None:
    model, x, y = trained

    class Mute(nn.Module):
        """A defence inside one module, where no straight-through pass reaches."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                return self.inner(x)

    threat = Threat(LINF, EPS)
    alone = run(Mute(), x, y, pgd, threat, generator=torch.Generator().manual_seed(0))
    helped = run(Mute(), x, y, pgd, threat, surrogates={"dense": model}, generator=torch.Generator().manual_seed(0))
    assert robust_accuracy(alone) > robust_accuracy(helped) + 0.2
    assert any(flag.name == "masked-gradients" and "dense" in flag.detail for flag in helped.flags)
