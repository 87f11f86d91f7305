"""Run a model in evaluation mode, and restore the training flags afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

__all__ = ["eval_mode", "train_"]


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Put every sub-module of a model in evaluation mode; on leaving, give each its own training flag back."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training


def train_(model: nn.Module) -> None:
    """Put a model in training mode, in place, but for its frozen sub-modules.

    Frozen are those in evaluation mode inside a model in training mode, such as a BatchNorm that keeps its statistics.
    A model that is in evaluation mode itself is trained as a whole.
    """
    frozen = [module for module in model.modules() if not module.training] if model.training else []
    model.train()
    for module in frozen:
        module.training = False
