"""Types of data sets: three splits of uint8 images with labels, and fixed rules for splitting.

No random generator divides them, so that a split is the same on every machine.
"""

from __future__ import annotations

import hashlib
import math
import warnings
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import DataError, DataWarning
from ._places import space
from ._undecoded import Undecoded

MOST_CLASSES = 1_000_000
CHUNK = 1 << 26  # values that are counted at once
FEW = 10  # classes that are counted one by one
NAMED = {"train": "training", "valid": "validation", "test": "test"}
LARGE = 256 << 20  # bytes of images above which a copy is in a file
ROWS = 1_000  # images that are copied at once


class Split(NamedTuple):
    """Images x (N, C, H, W), uint8, and their labels y (N,), int64."""

    x: Tensor
    y: Tensor


@dataclass(frozen=True)
class Dataset:
    """A named data set; choices are made on `valid`, never on `test`.

    `mean` and `std` are per channel over the training split, for images in [0, 1]. `class_names` is as long as
    `classes`, or empty. If only a test split was read, `train` and `valid` have no images, and `mean` and `std` are
    empty. If only some test images were read, `drawn` has their indices in the split. `notes` say what was read and
    done, `left_out` why files were not read. `identity` is the hash of a set that is too large to be hashed by its
    pixels.
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
    identity: str = ""
    left_out: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


def as_float(x: Tensor) -> Tensor:
    """Return uint8 images as float32 in [0, 1], the input of models."""
    return x.to(torch.float32) / 255


def fixed_order(count: int) -> Tensor:
    """Return the fixed random order in which images of a split are chosen."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(0))


def from_splits(
    name: str, train: Split | None, valid: Split | None, test: Split, *, classes: int, class_names: Sequence[str] = (),
    drawn: Tensor | None = None, notes: Sequence[str] = (), counts: Tensor | None = None, identity: str = "",
) -> Dataset:  # fmt: skip
    """Make a data set from its splits: check them, and measure mean and standard deviation of the training split.

    Without training and validation images it can be used for attacks only. For a large set, known values need not be
    measured again: `counts` (how often each of the 256 values occurs in the training images, by channel) and
    `identity`. Raises DataError, naming the split, for a wrong dtype or shape, an empty split, a label outside [0,
    classes), or classes outside [1, 1,000,000].
    """
    shape = (test if train is None else train).x.shape[1:]
    for part, split in (("training", train), ("validation", valid), ("test", test)):
        if split is not None:
            check_split(f"the {part} split of '{name}'", split, shape, classes)
    # Equal images have the same memory layout, so that results do not depend on where the data came from.
    none = Split(test.x[:0], test.y[:0])
    train, valid, test = (Split(x.contiguous(), y.contiguous()) for x, y in (train or none, valid or none, test))
    if class_names and len(class_names) != classes:
        raise DataError(f"'{name}' has {classes} classes but {len(class_names)} class names")
    mean, std = _moments(_counts(train.x) if counts is None else counts) if len(train.x) else ((), ())
    return Dataset(name, train, valid, test, classes, mean, std, tuple(class_names), drawn, tuple(notes), identity)


def check_split(what: str, split: Split, shape: torch.Size, classes: int) -> None:
    """Raise DataError unless these are images of this shape with labels below `classes`."""
    x, y = split
    if not 1 <= classes <= MOST_CLASSES:
        raise DataError(f"{what} cannot have {classes} classes; the range is 1 to {MOST_CLASSES:,}")
    if x.dtype != torch.uint8 or x.dim() != 4 or y.dtype != torch.int64 or y.dim() != 1:
        raise DataError(
            f"{what} must be uint8 images (N, C, H, W) and int64 labels (N,), "
            f"not {x.dtype} {tuple(x.shape)} and {y.dtype} {tuple(y.shape)}"
        )
    if len(x) != len(y):
        raise DataError(f"{what} has {len(x)} images but {len(y)} labels; one of its files is wrong")
    if x.numel() == 0:
        raise DataError(f"{what} holds no images")
    if x.shape[1:] != shape:
        raise DataError(f"{what} has images of shape {tuple(x.shape[1:])}; training images have {tuple(shape)}")
    wrong = (y < 0) | (y >= classes)
    if wrong.any():
        at = int(wrong.nonzero()[0])
        raise DataError(f"{what} has the label {int(y[at])} at image {at}; labels go from 0 to {classes - 1}")


def check_classes(dataset: Dataset) -> None:
    """Raise DataError if a network would be trained on images of one class."""
    y = dataset.train.y
    if len(y) and bool((y == y[0]).all()):
        one = f" ('{dataset.class_names[int(y[0])]}')" if dataset.class_names else ""
        raise DataError(
            f"all training images of '{dataset.name}' are of one class{one}, so there is nothing to learn; add images "
            "of another class"
        )


def _counts(x: Tensor) -> Tensor:
    """Return how often each of the 256 values occurs in images, by channel (C, 256)."""
    counts = torch.zeros(x.shape[1], 256, dtype=torch.int64)
    for part in torch.split(x, max(1, CHUNK // x[0].numel())):
        counts += torch.stack([torch.bincount(channel.reshape(-1), minlength=256) for channel in part.unbind(1)])
    return counts


def _moments(counts: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    # From counts of the 256 values: exact, and independent of the order of summation.
    values = torch.arange(256, dtype=torch.float64) / 255
    means, deviations = [], []
    for count in counts.to(torch.float64):
        mean = (count @ values) / count.sum()
        variance = (count @ (values - mean) ** 2) / count.sum()
        means.append(float(mean))
        # A constant channel keeps its scale, since a model divides by the deviation.
        deviations.append(float(variance.sqrt()) or 1.0)
    return tuple(means), tuple(deviations)


def content_hash(dataset: Dataset) -> str:
    """Return the SHA-256 of a data set's images, labels and class count, independent of its name.

    For more than 512 MiB of pixels from image files, it is the hash of the files and of their preparation.
    """
    if dataset.identity:
        return dataset.identity
    digest = hashlib.sha256(f"classes={dataset.classes}".encode())
    for split in (dataset.train, dataset.valid, dataset.test):
        for tensor in split:
            digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
            for part in torch.split(tensor, ROWS):
                plain = part.decoded() if isinstance(part, Undecoded) else part.contiguous()
                digest.update(plain.numpy().data)
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


def counted(labels: Mapping[str, Tensor], names: Sequence[str]) -> str:
    """Count the images of each class in each split, from its labels (N,)."""
    told = []
    for part, y in labels.items():
        found = sorted(Counter(y.tolist()).items())
        each = [count for _, count in found]
        if len(names) <= FEW:
            shown = ", ".join(
                f"{n} {names[at]}" if at in range(len(names)) else f"{n} of class {at}" for at, n in found[:FEW]
            )
            shown += ", ..." if len(found) > FEW else ""
        else:
            shown = f"{len(found):,} of {len(names):,} classes, {min(each):,} to {max(each):,} each"
        told.append(f"{len(y):,} for {NAMED[part]} ({shown})")
    return f"images: {'; '.join(told)}"


def tell_shared(keys: Sequence[Hashable], labels: Sequence[str], tested: int, names: Sequence[str], path: Path) -> None:
    """Warn of images with more than one label, and of test images (the last) that are also others.

    Results on these are too good. Equal images have equal `keys`; `names` say which one is meant.
    """
    seen = set(keys[:-tested])
    if shared := sum(key in seen for key in keys[-tested:]):
        told = f"{path}: {shared} of {tested} test images are also training or validation images"
        warnings.warn(told, DataWarning, stacklevel=4)
    first = dict(reversed(list(zip(keys, range(len(keys)), strict=True))))
    if pairs := {key: (first[key], at) for at, key in enumerate(keys) if labels[at] != labels[first[key]]}:
        found = " and ".join(f"{names[at]} ('{labels[at]}')" for at in next(iter(pairs.values())))
        many = "images have" if len(pairs) > 1 else "image has"
        told = f"{path}: {len(pairs)} {many} more than one label, such as {found}"
        warnings.warn(told, DataWarning, stacklevel=4)


def take(split: Split, which: Tensor) -> Split:
    """Return the images and labels at the given positions, or where a mask is true."""
    where = which.nonzero()[:, 0] if which.dtype == torch.bool else which
    size = len(where) * math.prod(split.x.shape[1:])
    if size <= LARGE or split.x.dtype != torch.uint8:
        return Split(split.x[where], split.y[where])
    x = torch.frombuffer(space(size), dtype=torch.uint8).view(len(where), *split.x.shape[1:])
    for start in range(0, len(where), ROWS):
        x[start : start + ROWS] = split.x[where[start : start + ROWS]]
    return Split(x, split.y[where])


def tenths(every: Split) -> tuple[Split, Split, Split]:
    """Divide one set into training, validation and test: of every ten images of a class seven, one and two, in order.

    The parts come in balanced order.
    """
    order, rank = balanced_order(every.y)
    tenth = rank % 10
    return take(every, order[tenth < 7]), take(every, order[tenth == 7]), take(every, order[tenth > 7])


def hold_out(train: Split, *, seed: int | None = None) -> tuple[Split, Split]:
    """Divide training images into training and validation: every tenth image of a class is held out.

    Of a class with two to nine images the last is held out, of a class with one none. The order stays. With a `seed`
    the images of a class are counted in an order that is drawn from it.
    """
    drawn = torch.arange(len(train.y))
    if seed is not None:
        drawn = torch.randperm(len(train.y), generator=torch.Generator().manual_seed(seed))
    order, rank = balanced_order(train.y[drawn])
    order = drawn[order]
    count = torch.bincount(train.y)[train.y[order]]
    chosen = (rank % 10 == 9) | ((count < 10) & (count > 1) & (rank == count - 1))
    held = torch.zeros(len(train.y), dtype=torch.bool)
    held[order[chosen]] = True
    return take(train, ~held), take(train, held)


def untrained(dataset: Dataset) -> Dataset:
    """Return a data set for networks that are not trained, which needs no training images.

    Validation images take their place, on which only scores are computed. If there are none either, every tenth image
    of a class is held out of the test images, as in `hold_out`; raises DataError if no class has two.
    """
    if len(dataset.train.y):
        return dataset
    test, valid = (dataset.test, dataset.valid) if len(dataset.valid.y) else hold_out(dataset.test)
    if not len(valid.y):
        raise DataError(f"'{dataset.name}' has one image per class; a study needs others for validation, in valid/")
    return replace(dataset, train=valid, valid=valid, test=test)


def limited(dataset: Dataset, limit: Mapping[str, int]) -> Dataset:
    """Return a data set of at most so many images of each split, as balanced as can be."""

    def cut(part: str, split: Split) -> Split:
        return take(split, balanced_order(split.y)[0][: limit[part]]) if part in limit and len(split.y) else split

    train, valid, test = cut("train", dataset.train), cut("valid", dataset.valid), cut("test", dataset.test)
    return from_splits(
        dataset.name, train if len(train.y) else None, valid if len(valid.y) else None, test, classes=dataset.classes,
        class_names=dataset.class_names, notes=dataset.notes,
    )  # fmt: skip
