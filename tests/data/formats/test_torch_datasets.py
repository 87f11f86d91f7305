"""What torch's datasets and loaders hold is what `load` returns of the same images."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
from torch.utils.data import Dataset as TorchDataset

from sparring import data
from sparring.data import as_float, from_torch
from sparring.errors import DataError


class Stream(IterableDataset[Any]):
    """Yield the items of a dataset, of no known length."""

    def __init__(self, held: TensorDataset) -> None:
        self.held = held

    def __iter__(self) -> Iterator[Any]:
        return (self.held[at] for at in range(len(self.held)))


class Own(TorchDataset[Any]):
    """Yield whatever it is given."""

    def __init__(self, *items: Any) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, at: int) -> Any:
        item = self.items[at]
        return item() if callable(item) else item


@pytest.mark.parametrize("kind", ["items", "floats", "loader", "stream"])
def test_the_same_images_have_the_same_hash(kind: str) -> None:
    digits = data.load("digits")

    def held(split: data.Split) -> TorchDataset[Any] | DataLoader[Any]:
        own = TensorDataset(as_float(split.x) if kind == "floats" else split.x, split.y)
        made: dict[str, TorchDataset[Any] | DataLoader[Any]] = {"loader": DataLoader(own, 100), "stream": Stream(own)}
        return made.get(kind, own)

    made = from_torch(held(digits.test), train=held(digits.train), valid=held(digits.valid))
    assert data.content_hash(made) == data.content_hash(digits)
    assert (made.mean, made.std, made.classes) == (digits.mean, digits.std, 10)


def test_validation_images_are_held_out() -> None:
    digits = data.load("digits")
    train, test = (TensorDataset(*split) for split in (digits.train, digits.test))
    made = from_torch(test, train=train, classes=[f"digit {number}" for number in range(10)])
    assert len(made.valid.y) == len(digits.train.y) - len(made.train.y) > 100 and made.class_names[9] == "digit 9"


def test_some_images_are_chosen_or_come_first() -> None:
    split = data.load("digits").test
    held = TensorDataset(*split)
    few = from_torch(held, n=30, classes=10)
    assert few.drawn is not None and torch.equal(few.test.x, split.x[few.drawn])
    assert torch.equal(few.drawn, data.fixed_order(len(split.y))[:30])
    for source in (DataLoader(held, 7), Stream(held)):
        first = from_torch(source, n=30, classes=10)
        assert first.drawn is None and torch.equal(first.test.x, split.x[:30])


def grey(*shape: int) -> Tensor:
    return torch.zeros(shape)


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ([(grey(1, 4, 4) - 1, 0)], r"lie in \[-1, -1\], not in \[0, 1\]; .*remove Normalize"),
        ([(grey(1, 4, 4) + 255, 0)], r"lie in \[255, 255\]"),
        ([(grey(1, 4, 4) * float("nan"), 0)], r"lie in \[nan, nan\]"),
        ([(grey(1, 4, 4).int(), 0)], "uint8 or floating in .*, not torch.int32"),
        ([(grey(1, 4, 4), 0), (grey(1, 4, 5), 0)], r"of \(1, 4, 4\) and of \(1, 4, 5\); resize"),
        ([(grey(1, 4, 4), 0.5)], r"labels integers .*torch.float32"),
        ([(grey(4), 0)], r"must be \(N, C, H, W\)"),
        ([("a picture", 0)], "must be tensors, not str; convert PIL images"),
        ([{"image": 1}], "must yield images with labels, not dict"),
        ([(grey(1, 4, 4), 0), (grey(1, 4, 4), 2)], r"labels from 0 to 2 have gaps .*classes=N"),
        ([(grey(1, 4, 4), -1)], "labels from -1 to -1"),
        ([(grey(8, 8, 3), 0)], r"\(8, 8, 3\) have 8 channels, the first axis; .*movedim\(-1, -3\)"),
        ([(grey(8, 8, 4).byte(), 0)], "have 8 channels"),
        ([(grey(1, 4, 4) + 1.00001, 0)], r"lie in \[1.00001"),
        ([(grey(1, 4, 4), [0, 1])], r"one integer, not of shape \(2,\).*argmax"),
        ([(grey(1, 4, 4), "cat")], "must be an integer, not 'cat'; number the classes"),
        ([lambda: 1 / 0], "the test dataset fails: ZeroDivisionError"),
        ([], "holds no images"),
    ],
)
def test_what_is_refused_has_a_reason(items: list[Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        from_torch(Own(*items))


def test_pixels_a_hair_outside_are_clamped() -> None:
    made = from_torch(Own((grey(1, 4, 4) - 1e-7, 0), (grey(1, 4, 4) + 1 + 2e-7, 1)))
    assert made.test.x.unique().tolist() == [0, 255]


@pytest.mark.parametrize("number", [0, -1, 2.5, True])
def test_numbers_that_make_no_sense_are_refused(number: Any) -> None:
    for name in ("n", "classes"):
        with pytest.raises(DataError, match=f"{name} must be a whole number of 1 or more"):
            from_torch(Own((grey(1, 4, 4), 0)), **{name: number})
