"""Tiny sets share images between training and test; only the tests of these warnings mind."""

from __future__ import annotations

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "tests/data" in item.path.as_posix():
            for shared in ("test images are also training", "more than one label"):
                item.add_marker(pytest.mark.filterwarnings(f"ignore:.*{shared}"), append=False)
