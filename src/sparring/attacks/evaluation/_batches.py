"""How many images an attack takes at once where nobody says, and what a model makes of them, so many at a time."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .._gradients import ROWS_AT_ONCE
from ..algorithms._losses import is_answer

_BATCH_BYTES = 256 * 2**20


def batch_size_for(model: nn.Module, x: Tensor, *, draws: int = 1) -> int:
    """Return how many images an attack can take at once in 256 MB (1 to 1024).

    Counted for each image and draw: the outputs of all layers, stored for the backward pass, and the gradients of the
    largest for as many classes as go back together.
    """
    numbers = [x[:1].numel()]

    def count(output: object) -> None:
        if isinstance(output, Tensor):
            numbers.append(output.numel())
        elif isinstance(output, tuple | list):
            for part in output:
                count(part)

    def pack(saved: Tensor) -> Tensor:
        count(saved)
        return saved

    leaves = [module for module in model.modules() if not any(True for _ in module.children())]
    scripted = [module for module in leaves if isinstance(module, torch.jit.ScriptModule)]
    handles = [
        module.register_forward_hook(lambda _module, _inputs, output: count(output))
        for module in leaves
        if not isinstance(module, torch.jit.ScriptModule)
    ]
    try:
        # Scripted modules take no hooks; what they save for the backward pass tells as much.
        with torch.set_grad_enabled(bool(scripted)), torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept):
            classes: int = model(x[:1].clone().requires_grad_(bool(scripted))).shape[1]
    finally:
        for handle in handles:
            handle.remove()
    stored: int = sum(numbers) + min(classes, ROWS_AT_ONCE) * max(numbers)
    return max(1, min(1024, _BATCH_BYTES // (x.element_size() * draws * stored)))


def classify(model: nn.Module, x: Tensor, batch_size: int) -> Tensor:
    """Return the predicted classes, −1 where the logits are no answer."""
    with torch.no_grad():
        logits = torch.cat([model(part) for part in torch.split(x, batch_size)])
    return torch.where(is_answer(logits), logits.argmax(1), -1)
