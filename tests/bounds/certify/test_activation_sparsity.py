"""Bounds through activation-sparsity modules, which are known by their kind alone."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from sparring.bounds import lipschitz, margin
from sparring.bounds._network import margin_rows, prepare
from sparring.errors import Unsupported
from sparring.sparsity.activations._activations import (
    ActivationSparsifier,
    MeanSparse,
    Percentile,
    ShiftedReLU,
    StochasticPruning,
    Threshold,
    TopK,
)
from sparring.threat import Threat

from ..random_networks import double, hostile_points


class Saturating(ActivationSparsifier):
    """A kind that bounds know by nothing but that it is nondecreasing."""

    kind = "saturating"
    nondecreasing = True

    def sparse(self, x: torch.Tensor) -> torch.Tensor:
        return x.clamp(0, 0.5)


def with_activation(seed: int, activation: nn.Module) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 5), activation, nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 3))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    x = torch.rand(1, 1, 2, 2)
    for module in model.modules():
        if isinstance(module, MeanSparse):
            module.mean, module.radius = torch.randn(5) * 0.3, torch.rand(5) * 0.5
        if isinstance(module, Percentile):
            module.threshold.fill_(0.3)
    return model.eval(), x


@pytest.mark.parametrize(
    "make",
    [
        lambda: ShiftedReLU(0.3),
        lambda: Threshold(0.3),
        lambda: Percentile(0.5),
        lambda: TopK(0.5),
        lambda: MeanSparse(0.5),
        Saturating,
    ],
)
@pytest.mark.parametrize("norm", [math.inf, 2.0])
def test_no_margin_is_beaten(make, norm: float) -> None:
    for seed in range(10):
        model, x = with_activation(seed, make())
        exact, graph = double(model), prepare(model, (1, 2, 2))
        y = exact(x.double()).argmax(1)
        eps = 0.02 + 0.03 * (seed % 10)
        points = hostile_points(
            model, x.double(), int(y), norm, eps, points=200, generator=torch.Generator().manual_seed(seed)
        )
        lowest = (margin_rows(graph, y)[0] @ exact(points).T).amin(1)
        for method in ("interval", "crown-interval", "crown"):
            assert (margin(model, x, y, Threat(norm, eps), method=method)[0] <= lowest + 1e-9).all(), (seed, method)


def test_random_modules_have_no_bound_and_jumps_no_constant() -> None:
    model, x = with_activation(0, StochasticPruning(0.5))
    with pytest.raises(Unsupported, match="stochastic-pruning"):
        margin(model, x, torch.tensor([0]), Threat(2.0, 0.1))
    model, x = with_activation(0, Threshold(0.3))
    with pytest.raises(Unsupported, match="discontinuous"):
        lipschitz(model, x, 0.1, norm=2.0)
    model, x = with_activation(0, ShiftedReLU(0.3))
    assert (lipschitz(model, x, 0.1, norm=2.0) >= lipschitz(model, x, 0.1, norm=2.0, method="sampled") - 1e-9).all()
