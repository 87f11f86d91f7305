"""The networks that benchmarks of attacks race on: trained once, on real images where there are any, and kept."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sparring import data, models, sparsity
from sparring.errors import DataError
from sparring.files import load_tensors, save_tensors
from sparring.train import Loss, Recipe, adversarial, cross_entropy, fit, trades

__all__ = ["NETWORKS", "Trained", "correct_images", "trained"]

SHORT = Recipe(optimizer="adam", lr=1e-3, weight_decay=0.0, epochs=6, batch_size=128)


@dataclass(frozen=True)
class Network:
    """How a network is made: on the first data set that is found, from scratch or at `sparsity` from `start`."""

    model: str
    data: tuple[str, ...]
    recipe: Recipe = SHORT
    start: str | None = None
    sparsity: float = 0.0
    depth: int | None = None
    seed: int = 0
    loss: Loss = cross_entropy


def family(name: str, dense: Network) -> dict[str, Network]:
    """Return a dense network and those made of it, at 80, 90, 95, 98 and 99%, each from the one before."""
    networks = {name: dense}
    for level in (80, 90, 95, 98, 99):
        networks[f"{name}-p{level}"] = replace(dense, start=[*networks][-1], sparsity=level / 100)
    return networks


MNIST = ("mnist", "mnist-5k")
RESIDUAL = Network(
    "resnet-32",
    ("cifar10", "cifar10-jpeg.zip", *MNIST),
    Recipe(lr=0.1, epochs=2, batch_size=128, warmup=0.2),
    depth=20,
)
ORDINARY = {"lenet-300-100": Network("lenet-300-100", MNIST), "lenet-5": Network("lenet-5", MNIST)}
# Names end as "-s1" for a second seed, "-pgd" and "-trades" for adversarial training, "-p95" for 95% sparsity.
NETWORKS = {
    key: network
    for name, dense in {**ORDINARY, "resnet-20": RESIDUAL}.items()
    for suffix, change in {
        "": dense,
        "-s1": replace(dense, seed=1),
        "-pgd": replace(dense, loss=adversarial(eps=0.3 if dense.data is MNIST else 8 / 255)),
        "-trades": replace(dense, loss=trades(eps=0.3 if dense.data is MNIST else 8 / 255)),
    }.items()
    for key, network in family(name + suffix, change).items()
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
        seed=made.seed,
    )
    path = cache / f"{name}-on-{dataset.name}.safetensors"
    if path.exists():
        models.load_weights_(model, load_tensors(path))
    else:
        masks = None
        if made.start is not None:
            models.load_weights_(model, trained(made.start, root, cache).model.state_dict())
            masks = sparsity.select(sparsity.magnitude(model), made.sparsity)
        print(f"training {name} on {dataset.name}, once", file=sys.stderr)
        fit(model, *dataset.train, made.recipe, seed=made.seed, loss=made.loss, masks=masks)
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


@torch.no_grad()
def _right(model: nn.Module, split: data.Split) -> Tensor:
    return torch.cat(
        [model(data.as_float(x)).argmax(1) == y for x, y in zip(split.x.split(500), split.y.split(500), strict=True)]
    )
