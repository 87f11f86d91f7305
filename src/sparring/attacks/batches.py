"""How many images an attack takes at once where nobody says, and what a model makes of them, so many at a time."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .derivatives import ROWS_AT_ONCE

__all__ = ["batch_size_for", "classify"]

_BATCH_BYTES = 256 * 2**20


def batch_size_for(model: nn.Module, x: Tensor, *, draws: int = 1) -> int:
    """Return how many images an attack can take at once in 256 MB (1 to 1024).

    Counted for each image and draw: the outputs of all layers, stored for the backward pass, and the gradients of the
    largest for as many classes as go back together.
    """
    numbers = [x[:1].numel()]
    handles = [
        module.register_forward_hook(lambda _module, _inputs, output: numbers.append(output.numel()))
        for module in model.modules()
        if not any(True for _ in module.children())
    ]
    try:
        with torch.no_grad():
            classes: int = model(x[:1]).shape[1]
    finally:
        for handle in handles:
            handle.remove()
    stored: int = sum(numbers) + min(classes, ROWS_AT_ONCE) * max(numbers)
    return max(1, min(1024, _BATCH_BYTES // (x.element_size() * draws * stored)))


def classify(model: nn.Module, x: Tensor, batch_size: int) -> Tensor:
    """Return the predicted classes, −1 where the logits are not finite: no class."""
    with torch.no_grad():
        logits = torch.cat([model(part) for part in torch.split(x, batch_size)])
    return torch.where(torch.isfinite(logits).all(1), logits.argmax(1), -1)
