"""Shared by all tests: one thread, and small real data."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

from sparring import data
from sparring.data import Dataset, Split


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def digits() -> Dataset:
    """Return scikit-learn's 8 × 8 digits: real images that train in a second."""
    return data.load("digits")


@pytest.fixture(scope="session")
def few_digits(digits: Dataset) -> Dataset:
    """Return a few hundred digits, for tests that run a whole study."""

    def first(split: Split, count: int) -> Split:
        return Split(split.x[:count], split.y[:count])

    train, valid, test = first(digits.train, 300), first(digits.valid, 60), first(digits.test, 100)
    return Dataset("few-digits", train, valid, test, digits.classes, digits.mean, digits.std)
