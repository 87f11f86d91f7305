"""Convert a torch Dataset or DataLoader to a data set."""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Sized
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset
from torch.utils.data import Dataset as TorchDataset

from ...errors import DataError, UserError, told
from .._types import Dataset, Split, fixed_order, from_splits, hold_out

CHANNELS = (1, 3)
ROUNDING = 1e-6  # by which resizing and rounding bring pixels out of [0, 1]
TorchData = TorchDataset[Any] | DataLoader[Any]


def from_torch(
    dataset: TorchData, *, n: int | None = None, classes: int | Sequence[str] | None = None,
    train: TorchData | None = None, valid: TorchData | None = None, name: str = "torch",
) -> Dataset:  # fmt: skip
    """Make a data set from a torch Dataset or DataLoader of test images, and optionally ones of training images.

    Images are tensors (C, H, W), or (N, C, H, W) from a loader, uint8 or floating in [0, 1], give or take 1e-6; the
    latter are rounded to the nearest of 256 values. Labels are integers from 0. `n`: number of test images; from a
    dataset with a length those that `fixed_order` chooses, otherwise the first. `classes` is the number of classes or
    their names; without it, every label up to the last must occur. Without `valid`, every tenth image of a class of
    `train` is held out. Raises DataError for anything else, and for a dataset that fails.
    """
    for what, number in (("n", n), ("classes", classes)):
        if number is not None and not isinstance(number, Sequence) and (type(number) is not int or number < 1):
            raise DataError(f"{what} must be a whole number of 1 or more, not {number!r}")
    places = _places(dataset, n)
    test = _split(dataset, "test", places, n)
    own = None if train is None else _split(train, "train", _places(train))
    held = None if valid is None else _split(valid, "valid", _places(valid))
    count, names = (classes, ()) if isinstance(classes, int) else (None, classes or ())
    y = (test if own is None else own).y
    found = sorted(set(y.tolist()))
    if count is None and not names and found != list(range(len(found))):
        raise DataError(f"labels from {found[0]} to {found[-1]} have gaps or do not start at 0; give classes=N")
    if own is not None and held is None:
        own, held = hold_out(own)
    count = count or len(names) or len(found)
    drawn = None if n is None or places is None else torch.tensor(places)
    return from_splits(name, own, held, test, classes=count, class_names=names, drawn=drawn)


def _places(data: TorchData, n: int | None = None) -> list[int] | None:
    """Return which items of a dataset with a length are taken, None if they are taken in their order."""
    if isinstance(data, DataLoader | IterableDataset) or not isinstance(data, Sized):
        return None
    return list(range(len(data))) if n is None else fixed_order(len(data))[:n].tolist()


def _split(data: TorchData, what: str, places: list[int] | None, most: int | None = None) -> Split:
    """Return the images and labels of a dataset or loader, at most a given number."""
    xs, ys, here = list[Tensor](), list[Tensor](), 0
    try:
        for item in _batches(data, places):
            x, y = _batch(item, what)
            if xs and x.shape[1:] != xs[0].shape[1:]:
                raise DataError(f"{what}: images of {tuple(xs[0].shape[1:])} and of {tuple(x.shape[1:])}; resize them")
            xs.append(x)
            ys.append(y)
            here += len(x)
            if most is not None and here >= most:
                break
    except UserError:
        raise
    except Exception as error:  # a user's own code may raise anything
        raise DataError(f"the {what} dataset fails: {told(error)}") from error
    if not xs:
        raise DataError(f"the {what} dataset holds no images")
    return Split(torch.cat(xs)[:most], torch.cat(ys)[:most])


def _batches(data: TorchData, places: list[int] | None) -> Iterator[Any]:
    """Yield batches of a loader, or items of a dataset, each as a batch of one."""
    if isinstance(data, DataLoader):
        yield from data
        return
    for item in iter(data) if places is None else (data[place] for place in places):
        if not isinstance(item, tuple | list) or len(item) < 2:
            yield item
        else:
            if isinstance(item[1], str | None):
                raise DataError(f"a label must be an integer, not {item[1]!r}; number the classes 0, 1, 2, ...")
            x, y = item[0], torch.as_tensor(item[1])
            if y.numel() != 1:
                raise DataError(
                    f"a label must be one integer, not of shape {tuple(y.shape)}; convert one-hot labels with argmax()"
                )
            yield (x[None] if isinstance(x, Tensor) else x), y.reshape(1)


def _batch(item: Any, what: str) -> tuple[Tensor, Tensor]:
    """Return uint8 images (N, C, H, W) and int64 labels (N,) of a batch; raise DataError for anything else."""
    if not isinstance(item, tuple | list) or len(item) < 2:
        raise DataError(f"{what}: it must yield images with labels, not {type(item).__name__}")
    x, y = item[0], item[1]
    if not isinstance(x, Tensor) or not isinstance(y, Tensor):
        kind = type(x if not isinstance(x, Tensor) else y).__name__
        raise DataError(f"{what}: images and labels must be tensors, not {kind}; convert PIL images with ToTensor()")
    x = x[:, None] if x.dim() == 3 else x
    if x.dim() != 4 or y.dim() != 1 or len(x) != len(y) or y.is_floating_point():
        raise DataError(
            f"{what}: images must be (N, C, H, W) and labels integers (N,), "
            f"not {tuple(x.shape)} and {y.dtype} {tuple(y.shape)}"
        )
    if x.shape[1] not in CHANNELS and x.shape[3] in (1, 2, 3, 4):
        raise DataError(
            f"{what}: images of shape {tuple(x.shape[1:])} have {x.shape[1]} channels, the first axis; if the last "
            "axis holds the channels, move it: x.movedim(-1, -3)"
        )
    if x.is_floating_point():
        low, high = (float(end) for end in x.detach().aminmax())
        if not (low >= -ROUNDING and high <= 1 + ROUNDING):
            raise DataError(
                f"{what}: images lie in [{low:.9g}, {high:.9g}], not in [0, 1]; leave normalisation to the model "
                "(remove Normalize), and divide values from 0 to 255 by 255"
            )
        x = (x.detach().double() * 255).round().clamp(0, 255).to(torch.uint8)
    if x.dtype != torch.uint8:
        raise DataError(f"{what}: images must be uint8 or floating in [0, 1], not {x.dtype}")
    return x.cpu(), y.to("cpu", torch.int64)
