"""The networks that benchmarks of attacks race on: trained once, on real images where there are any, and kept."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sparring import data, models, sparsity
from sparring.errors import DataError
from sparring.files import load_tensors, save_tensors
from sparring.train import Recipe, fit

__all__ = ["NETWORKS", "Trained", "correct_images", "trained"]

SHORT = Recipe(optimizer="adam", lr=1e-3, weight_decay=0.0, epochs=6, batch_size=128)


@dataclass(frozen=True)
class Network:
    """How a network is made: on the first data set that is found, dense first, then at each sparsity in turn."""

    model: str
    data: tuple[str, ...]
    recipe: Recipe = SHORT
    sparsities: tuple[float, ...] = ()
    depth: int | None = None


MNIST = ("mnist", "mnist-5k")
NETWORKS = {
    "lenet-300-100": Network("lenet-300-100", MNIST),
    "lenet-300-100-p90": Network("lenet-300-100", MNIST, sparsities=(0.8, 0.9)),
    "lenet-300-100-p95": Network("lenet-300-100", MNIST, sparsities=(0.8, 0.9, 0.95)),
    "lenet-300-100-p98": Network("lenet-300-100", MNIST, sparsities=(0.8, 0.9, 0.95, 0.98)),
    "lenet-300-100-p99": Network("lenet-300-100", MNIST, sparsities=(0.8, 0.9, 0.95, 0.98, 0.99)),
    "lenet-5": Network("lenet-5", MNIST),
    "resnet-20": Network(
        "resnet-32",
        ("cifar10", "cifar10-jpeg.zip", *MNIST),
        Recipe(lr=0.1, epochs=2, batch_size=128, warmup=0.2),
        depth=20,
    ),
}


class Trained(NamedTuple):
    """A trained network in eval mode, the data set it was trained on, and its test accuracy."""

    model: nn.Module
    dataset: data.Dataset
    accuracy: float


def trained(name: str, root: Path | None, cache: Path) -> Trained:
    """Return a network of `NETWORKS`, from the cache where it has been trained before."""
    made = NETWORKS[name]
    dataset = _first_found(made.data, root)
    model = models.build(
        made.model,
        shape=tuple(dataset.train.x.shape[1:]),
        classes=dataset.classes,
        mean=dataset.mean,
        std=dataset.std,
        depth=made.depth,
    )
    path = cache / f"{name}-on-{dataset.name}.safetensors"
    if path.exists():
        models.load_weights_(model, load_tensors(path))
    else:
        print(f"training {name} on {dataset.name}, once", file=sys.stderr)
        _train(model, dataset, made)
        cache.mkdir(parents=True, exist_ok=True)
        save_tensors(path, model.state_dict())
    model.eval()
    accuracy = float(_right(model, dataset.test).double().mean())
    return Trained(model, dataset, accuracy)


def correct_images(network: Trained, images: int) -> tuple[Tensor, Tensor]:
    """Return the first test images, at most so many, that a network classifies correctly, in [0, 1], with labels."""
    test = network.dataset.test
    rows = _right(network.model, data.Split(test.x[: 3 * images], test.y[: 3 * images])).nonzero().squeeze(1)
    rows = rows[:images]
    return data.as_float(test.x[rows]), test.y[rows]


def _first_found(names: tuple[str, ...], root: Path | None) -> data.Dataset:
    for place, name in enumerate(names):
        try:
            dataset = data.load(name, root)
        except DataError as error:
            if place + 1 == len(names):
                raise
            print(f"{name} was not found; trying {names[place + 1]} ({str(error).splitlines()[0]})", file=sys.stderr)
        else:
            return dataset
    raise ValueError("no data set named")


def _train(model: nn.Module, dataset: data.Dataset, made: Network) -> None:
    x, y = dataset.train
    fit(model, x, y, made.recipe)
    for level in made.sparsities:
        fit(model, x, y, made.recipe, masks=sparsity.select(sparsity.magnitude(model), level))


@torch.no_grad()
def _right(model: nn.Module, split: data.Split) -> Tensor:
    return torch.cat(
        [model(data.as_float(x)).argmax(1) == y for x, y in zip(split.x.split(500), split.y.split(500), strict=True)]
    )
