"""The table of data sets, and the one function that loads any of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from ..errors import UnknownNameError
from .cifar import CIFAR10, cifar10
from .embedded import digits, mnist_5k
from .idx import FASHION_MNIST, MNIST, fashion_mnist, mnist
from .places import Content, Find, Source, locate, missing, read, roots
from .types import Dataset

__all__ = ["DATASETS", "Available", "available", "load"]

DATASETS: dict[str, Callable[[Find], Dataset]] = {
    "cifar10": cifar10,
    "digits": digits,
    "fashion-mnist": fashion_mnist,
    "mnist": mnist,
    "mnist-5k": mnist_5k,
}

SOURCES = (CIFAR10, FASHION_MNIST, MNIST)


class Available(NamedTuple):
    """Name a data set that this machine has, and where ("" if a package ships it)."""

    name: str
    where: str


def load(name: str, root: Path | str | None = None) -> Dataset:
    """Load a data set by its name in `DATASETS`.

    Files are looked for in `root`, $SPARRING_DATA, the user's cache folder and known system folders, in that order.
    Raises DataError if they are missing (it lists which files go where), damaged, mislabelled or of the wrong shape,
    and UnknownNameError if there is no such data set.
    """
    places = roots(root)

    def find(source: Source) -> list[Content]:
        paths = locate(source, places)
        if paths is None:
            raise missing(source, places)
        return read(source, paths)

    if name in DATASETS:
        return DATASETS[name](find)
    raise UnknownNameError("data set", name, DATASETS)


def available(root: Path | str | None = None) -> list[Available]:
    """Return the data sets that can be loaded here without a download, and where they lie; nothing is read."""
    places = roots(root)
    by_name = {source.name: source for source in SOURCES}
    found = []
    for name in DATASETS:
        paths = locate(by_name[name], places) if name in by_name else []
        if paths is not None:
            found.append(Available(name, str(paths[0].parent) if paths else ""))
    return found
