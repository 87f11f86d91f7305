"""Defences by sparsity that only hide gradients, each put on one trained LeNet-300-100; see test_broken_defences.py."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from sparring import data, models
from sparring.data import as_float
from sparring.sparsity import MeanSparse, StochasticPruning, TopK, calibrate_

__all__ = ["DEFENCES", "EPS", "IMAGES", "Hidden", "defended", "undefended"]

IMAGES = 100
# The l_inf budget at which the undefended network keeps between 30 and 60% of these images.
EPS = 0.07


class Staircase(nn.Module):
    """A ReLU rounded to steps of a half."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.round(x.clamp_min(0) * 2) / 2


class Cut(nn.Module):
    """A ReLU that no gradient passes."""

    def forward(self, x: Tensor) -> Tensor:
        return x.clamp_min(0).detach()


class Loud(nn.Module):
    """Logits times 10^4."""

    def forward(self, x: Tensor) -> Tensor:
        return 1e4 * x


class Hidden(nn.Module):
    """A network inside one module that cuts the graph, where no straight-through pass reaches."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return self.inner(x)


# Each takes the place of the network's ReLUs: of both, or of the last alone. Loud follows the logits.
DEFENCES: dict[str, Callable[[], nn.Module]] = {
    "k-winners": lambda: TopK(0.8),
    "mean-sparse": lambda: MeanSparse(1.0),
    "stochastic-pruning": lambda: StochasticPruning(0.3),
    "staircase": Staircase,
    "scaled-logits": Loud,
    "cut": Cut,
}
LAST_ONLY = {"stochastic-pruning"}


def undefended() -> tuple[nn.Sequential, Tensor, Tensor]:
    """Return LeNet-300-100 trained on mnist-5k, and test images that it classifies correctly.

    Frozen numbers belong to this network, so every processor must arrive at it: what adding in another order does in
    single precision grows to another network within an epoch, in double precision it stays below what can be seen.
    """
    dataset = data.load("mnist-5k")
    shape = tuple(dataset.train.x.shape[1:])
    model = models.build("lenet-300-100", shape=shape, classes=10, mean=dataset.mean, std=dataset.std)
    assert isinstance(model, nn.Sequential)
    _train(model, epochs=5)
    x, y = as_float(dataset.test.x), dataset.test.y
    with torch.no_grad():
        right = (model(x).argmax(1) == y).nonzero().squeeze(1)[:IMAGES]
    return model, x[right], y[right]


def defended(model: nn.Sequential, name: str) -> nn.Sequential:
    """Return a copy of the network behind a defence; behind MeanSparse, which costs it accuracy, it learns on."""
    layer = DEFENCES[name]
    model = copy.deepcopy(model)
    if name == "scaled-logits":
        return nn.Sequential(*model, layer()).eval()
    places = [place for place, part in enumerate(model) if isinstance(part, nn.ReLU)]
    replaced = places[-1:] if name in LAST_ONLY else places
    network = nn.Sequential(*(layer() if place in replaced else part for place, part in enumerate(model))).eval()
    if name == "mean-sparse":
        for _ in range(3):
            calibrate_(network, as_float(data.load("mnist-5k").train.x))
            for place in replaced:
                network[place].straight_through = True
            _train(network, epochs=1)
            for place in replaced:
                network[place].straight_through = False
    return network


def _train(model: nn.Module, *, epochs: int) -> None:
    train = data.load("mnist-5k").train
    model.double()
    optimiser = torch.optim.Adam(model.parameters(), 1e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(epochs):
        for rows in torch.randperm(len(train.x), generator=generator).split(128):
            optimiser.zero_grad()
            nn.functional.cross_entropy(model(as_float(train.x[rows]).double()), train.y[rows]).backward()
            optimiser.step()
    model.float().eval()
