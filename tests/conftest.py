"""Shared by all tests: one thread, small real data, and a browser."""

from __future__ import annotations

import functools
import gc
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
import vl_convert

from sparring import data
from sparring.data import Dataset, Split

gc.set_threshold(50_000, 20, 20)  # thousands of tests live as long as a run: looking through them took a tenth of it


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def drawing() -> Iterator[SimpleNamespace]:
    """Draw equal figures once and no PNG of them, and do not wait for disks; return the functions that draw."""
    once = functools.cache(vl_convert.vegalite_to_svg)
    real = SimpleNamespace(svg=once, png=vl_convert.svg_to_png)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vl_convert, "vegalite_to_svg", lambda spec: once(json.dumps(spec)))
        patch.setattr(vl_convert, "svg_to_png", lambda drawn, scale: b"no picture")
        patch.setattr(os, "fsync", lambda _: None)
        yield real


def _untraced(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **options: Any) -> Any:
        before = sys.gettrace()
        sys.settrace(None)
        try:
            return function(*args, **options)
        finally:
            sys.settrace(before)

    # A refusal names the innermost line outside of torch, which must not be one of these.
    call.__code__ = call.__code__.replace(co_filename=function.__code__.co_filename)
    return functools.wraps(function)(call)


@pytest.fixture(autouse=True, scope="session")
def _nothing_of_torch_is_traced() -> Iterator[None]:
    """Keep coverage out of torch.export's own code, where it costs half of the time and finds nothing of ours."""
    with pytest.MonkeyPatch.context() as patch:
        if sys.gettrace() is not None:
            from torch._export.non_strict_utils import _NonStrictTorchFunctionHandler as Handler

            patch.setattr(Handler, "__torch_function__", _untraced(Handler.__torch_function__))
            whole = torch.export.ExportedProgram
            patch.setattr(whole, "run_decompositions", _untraced(whole.run_decompositions))
        yield


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
