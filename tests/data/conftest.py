"""Tiny sets share images between training and test; only the test of that warning minds."""

from __future__ import annotations

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "tests/data" in item.path.as_posix():
            item.add_marker(pytest.mark.filterwarnings("ignore:.*test images are also training"), append=False)
