"""What a data set is: three splits of uint8 images with labels, and the fixed rules that divide images.

No random generator divides them, so that a split is the same on every machine.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import DataError

MOST_CLASSES = 1_000_000


class Split(NamedTuple):
    """Hold images x (N, C, H, W), uint8, and their labels y (N,), int64."""

    x: Tensor
    y: Tensor


@dataclass(frozen=True)
class Dataset:
    """Hold a named data set; choices are made on `valid`, never on `test`.

    `mean` and `std` are per channel over the training split, for images in [0, 1]. `class_names` is as long as
    `classes`, or empty where the classes have no names. Where only a test split was read, `train` and `valid` hold no
    images, and `mean` and `std` are empty. `drawn` says where in the split the images of `test` are, if only some were
    read; `notes` say what was done to them.
    """

    name: str
    train: Split
    valid: Split
    test: Split
    classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    class_names: tuple[str, ...] = ()
    drawn: Tensor | None = None
    notes: tuple[str, ...] = ()


def as_float(x: Tensor) -> Tensor:
    """Return uint8 images as float32 in [0, 1], which is what a model sees."""
    return x.to(torch.float32) / 255


def fixed_order(count: int) -> Tensor:
    """Return the random order, always the same, in which so many images of a split are chosen."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(0))


def from_splits(
    name: str, train: Split | None, valid: Split | None, test: Split, *, classes: int, class_names: Sequence[str] = (),
    drawn: Tensor | None = None, notes: Sequence[str] = (),
) -> Dataset:  # fmt: skip
    """Make a data set from its splits: check them, and measure mean and standard deviation of the training split.

    Without training and validation images it can be attacked, but nothing can be trained on it. Raises DataError,
    naming the split, for a wrong dtype or shape, an empty split, a label outside [0, classes), or classes outside
    [1, 1,000,000].
    """
    shape = (test if train is None else train).x.shape[1:]
    for part, split in (("training", train), ("validation", valid), ("test", test)):
        if split is not None:
            check_split(f"the {part} split of '{name}'", split, shape, classes)
    # Equal images lie equally in memory, so that equal data give equal arithmetic wherever they were read from.
    none = Split(test.x[:0], test.y[:0])
    train, valid, test = (Split(x.contiguous(), y.contiguous()) for x, y in (train or none, valid or none, test))
    if class_names and len(class_names) != classes:
        raise DataError(f"'{name}' has {classes} classes but {len(class_names)} class names")
    mean, std = _moments(train.x) if len(train.x) else ((), ())
    return Dataset(name, train, valid, test, classes, mean, std, tuple(class_names), drawn, tuple(notes))


def check_split(what: str, split: Split, shape: torch.Size, classes: int) -> None:
    """Raise DataError unless these are images of this shape with labels below `classes`."""
    x, y = split
    if not 1 <= classes <= MOST_CLASSES:
        raise DataError(f"{what} cannot have {classes} classes; from 1 to {MOST_CLASSES:,} are possible")
    if x.dtype != torch.uint8 or x.dim() != 4 or y.dtype != torch.int64 or y.dim() != 1:
        raise DataError(
            f"{what} must be uint8 images (N, C, H, W) and int64 labels (N,), "
            f"not {x.dtype} {tuple(x.shape)} and {y.dtype} {tuple(y.shape)}"
        )
    if len(x) != len(y):
        raise DataError(f"{what} has {len(x)} images but {len(y)} labels; one of its files is not the right one")
    if x.numel() == 0:
        raise DataError(f"{what} holds no images")
    if x.shape[1:] != shape:
        raise DataError(f"{what} has images of shape {tuple(x.shape[1:])}; those for training have {tuple(shape)}")
    wrong = (y < 0) | (y >= classes)
    if wrong.any():
        at = int(wrong.nonzero()[0])
        raise DataError(f"{what} has the label {int(y[at])} at image {at}; labels go from 0 to {classes - 1}")


def _moments(x: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    # From counts of the 256 values: exact, and the same whatever the order of summation.
    values = torch.arange(256, dtype=torch.float64) / 255
    means, deviations = [], []
    for channel in x.unbind(1):
        counts = torch.bincount(channel.reshape(-1), minlength=256).to(torch.float64)
        mean = (counts @ values) / counts.sum()
        variance = (counts @ (values - mean) ** 2) / counts.sum()
        means.append(float(mean))
        # A constant channel keeps its scale, since a model divides by the deviation.
        deviations.append(float(variance.sqrt()) or 1.0)
    return tuple(means), tuple(deviations)


def content_hash(dataset: Dataset) -> str:
    """Return the SHA-256 of a data set's images, labels and class count: its identity, whatever it is called."""
    digest = hashlib.sha256(f"classes={dataset.classes}".encode())
    for split in (dataset.train, dataset.valid, dataset.test):
        for tensor in split:
            digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
            digest.update(tensor.contiguous().numpy().data)
    return digest.hexdigest()


def balanced_order(y: Tensor) -> tuple[Tensor, Tensor]:
    """Order labelled items so that every prefix is as balanced as can be, without drawing anything at random.

    Takes labels y (N,), int64. Returns the order (N,), which takes the first item of every class, then the second of
    every class and so on, and the rank within its class (N,) of each item in that order.
    """
    by_class = torch.argsort(y, stable=True)
    counts = torch.bincount(y)
    starts = torch.cumsum(counts, 0) - counts
    rank = torch.arange(len(y)) - starts[y[by_class]]
    order = torch.argsort(rank, stable=True)
    return by_class[order], rank[order]


def take(split: Split, which: Tensor) -> Split:
    """Return the images and labels at the given positions, or where a mask is true."""
    return Split(split.x[which], split.y[which])


def tenths(every: Split) -> tuple[Split, Split, Split]:
    """Divide one set into training, validation and test: of every ten images of a class seven, one and two, in order.

    The parts come in balanced order.
    """
    order, rank = balanced_order(every.y)
    tenth = rank % 10
    return take(every, order[tenth < 7]), take(every, order[tenth == 7]), take(every, order[tenth > 7])


def hold_out(train: Split) -> tuple[Split, Split]:
    """Divide training images into training and validation: every tenth image of a class is held out.

    Of a class with two to nine images the last is held out, of a class with one none. The order stays.
    """
    order, rank = balanced_order(train.y)
    count = torch.bincount(train.y)[train.y[order]]
    chosen = (rank % 10 == 9) | ((count < 10) & (count > 1) & (rank == count - 1))
    held = torch.zeros(len(train.y), dtype=torch.bool)
    held[order[chosen]] = True
    return take(train, ~held), take(train, held)
