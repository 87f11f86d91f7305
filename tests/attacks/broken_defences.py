"""Defences by sparsity that only hide gradients, each put on a trained LeNet; see test_broken_defences.py.

MeanSparse stands on a small convolutional LeNet, whose weights are kept beside this file (`python
benchmarks/broken_defences.py --train` writes them): on LeNet-300-100 it hides nothing, PGD with its true gradient comes
within a few points of every other attack. All others stand on LeNet-300-100.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sparring import data, models
from sparring.attacks import Attack, fgsm, pgd
from sparring.data import as_float
from sparring.declared import Declared
from sparring.files import load_tensors
from sparring.models import Normalise, load_weights_
from sparring.sparsity import MeanSparse, StochasticPruning, TopK, calibrate_

__all__ = ["DEFENCES", "UNDEFENDED", "Hidden", "Task", "convolutional", "defended", "naive", "right", "task", "train_"]

IMAGES = 100
# Where each image takes thousands of passes, or each pass long.
FEWER = {"stochastic-pruning": 60, "mean-sparse": 50, "undefended-convolutional": 50}
CONVOLUTIONAL = {"mean-sparse", "undefended-convolutional"}
UNDEFENDED = ("undefended", "undefended-convolutional")
WEIGHTS = Path(__file__).parent / "convolutional_lenet.safetensors"


class Task(NamedTuple):
    """A network, images that it classified correctly before it was defended, and the l_inf budget.

    At that budget the undefended network keeps between 30 and 60% of its images.
    """

    network: nn.Sequential
    x: Tensor
    y: Tensor
    eps: float


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
    "k-winners": lambda: TopK(0.7),
    "mean-sparse": lambda: MeanSparse(0.5),
    "stochastic-pruning": lambda: StochasticPruning(0.5),
    "staircase": Staircase,
    "scaled-logits": Loud,
    "cut": Cut,
}
LAST_ONLY = {"stochastic-pruning"}


def task(name: str, images: int | None = None) -> Task:
    """Return an undefended network, or the one that a defence is put on, with so many images and its budget."""
    small = name in CONVOLUTIONAL
    network = convolutional() if small else _fully_connected()
    if small:
        load_weights_(network, load_tensors(WEIGHTS))
        network.eval()
    else:
        train_(network, epochs=5)
    test = data.load("mnist-5k").test
    x, y = as_float(test.x[:300]), test.y[:300]
    rows = right(network, x, y).nonzero().squeeze(1)[: images or FEWER.get(name, IMAGES)]
    return Task(network, x[rows], y[rows], 0.145 if small else 0.07)


def defended(model: nn.Sequential, name: str) -> nn.Sequential:
    """Return a copy of the network behind a defence."""
    layer = DEFENCES[name]
    model = copy.deepcopy(model)
    if name == "scaled-logits":
        return nn.Sequential(*model, layer()).eval()
    places = [place for place, part in enumerate(model) if isinstance(part, nn.ReLU)]
    replaced = places[-1:] if name in LAST_ONLY else places
    network = nn.Sequential(*(layer() if place in replaced else part for place, part in enumerate(model))).eval()
    if name == "mean-sparse":
        calibrate_(network, as_float(data.load("mnist-5k").train.x))
    return network


def naive(eps: float) -> dict[str, Attack]:
    """Return what somebody would try who suspects nothing."""
    return {"fgsm": fgsm, "pgd": partial(pgd, steps=10, step_size=eps / 4)}


def right(network: nn.Module, x: Tensor, y: Tensor, votes: int = 101) -> Tensor:
    """Return which images most passes classify correctly; one pass decides where all are alike."""
    votes = votes if any(isinstance(module, Declared) and module.stochastic for module in network.modules()) else 1
    with torch.no_grad():
        return torch.stack([network(x).argmax(1) == y for _ in range(votes)]).double().mean(0) >= 0.5


def convolutional() -> nn.Sequential:
    """Return a LeNet of two convolutions with a ReLU after each, as MeanSparse is made for."""
    dataset = data.load("mnist-5k")
    torch.manual_seed(0)
    return nn.Sequential(
        Normalise(dataset.mean, dataset.std),
        *(nn.Conv2d(1, 10, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(10, 20, 5), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(320, 64), nn.ReLU(), nn.Linear(64, 10)),
    )


def _fully_connected() -> nn.Sequential:
    dataset = data.load("mnist-5k")
    shape = tuple(dataset.train.x.shape[1:])
    model = models.build("lenet-300-100", shape=shape, classes=10, mean=dataset.mean, std=dataset.std)
    assert isinstance(model, nn.Sequential)
    return model


def train_(model: nn.Module, *, epochs: int) -> None:
    """Train with Adam on mnist-5k.

    Frozen numbers belong to this network, so every processor must arrive at it: what adding in another order does in
    single precision grows to another network within an epoch, in double precision it stays below what can be seen.
    """
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
