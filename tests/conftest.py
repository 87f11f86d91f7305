"""Shared by all tests: one thread, small real data, and a browser."""

from __future__ import annotations

import gc
import os
import shutil
from collections.abc import Iterator
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

from sparring import data
from sparring.data import Dataset, Split

gc.set_threshold(50_000, 20, 20)  # thousands of tests live as long as a run: looking through them took a tenth of it


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


BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Open a headless browser that logs its console and its requests; skip where there is none."""
    if BROWSER is None or DRIVER is None:
        pytest.skip("Chromium and its driver are not installed (Debian: apt-get install chromium chromium-driver)")
    webdriver = pytest.importorskip("selenium.webdriver")
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    quiet = ("background-networking", "component-update", "sync", "gpu", "dev-shm-usage")
    for name in ("headless", "no-sandbox", "no-first-run", "window-size=1280,1000", *(f"disable-{q}" for q in quiet)):
        options.add_argument(f"--{name}")
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('browser')}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    with webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER)) as opened:
        yield opened
