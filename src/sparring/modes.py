"""Run a model in evaluation mode, and restore the training flags afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

__all__ = ["eval_mode", "train_"]


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Put every submodule of a model into eval mode; restore each submodule's own mode afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training


def train_(model: nn.Module) -> None:
    """Put a model into training mode, in place, except for its frozen submodules.

    A submodule is frozen if it is in eval mode inside a model in training mode, such as a BatchNorm that keeps its
    statistics. If the model itself is in eval mode, all of it is put into training mode.
    """
    frozen = [module for module in model.modules() if not module.training] if model.training else []
    model.train()
    for module in frozen:
        module.training = False
