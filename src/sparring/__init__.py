"""Measure, explain and exploit how sparsity changes a neural network's adversarial robustness."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # for completion in editors
    from . import (  # noqa: F401  # fmt: skip
        attacks,
        bounds,
        data,
        deploy,
        metrics,
        models,
        progress,
        records,
        report,
        sparsity,
        statistics,
        study,
        train,
    )

try:
    __version__ = version("sparring")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"

__all__ = ["__version__"]

_PARTS = (
    "attacks",
    "bounds",
    "data",
    "deploy",
    "metrics",
    "models",
    "progress",
    "records",
    "report",
    "sparsity",
    "statistics",
    "study",
    "train",
)


def __getattr__(name: str) -> ModuleType:
    """Import a part when it is first used, so that `import sparring` is fast and `sparring.deploy.load` is found."""
    if name in _PARTS:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")


def __dir__() -> list[str]:
    """List the public parts, imported or not, and the version."""
    return [*_PARTS, "__version__"]
