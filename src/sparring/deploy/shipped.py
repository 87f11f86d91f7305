"""Attack what is shipped: is the artefact as robust as the network that was studied?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .differentiable import PackedModule
from .runtime import Packed

__all__ = ["Shipped", "compare_shipped"]

Attack = Callable[[nn.Module, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Shipped:
    """Studied network and artefact side by side, over the same images; shares are fractions of all images.

    `agreement` is the share of clean images with the same prediction, `logit_error` the largest difference of logits
    over the largest logit. `robust_model` and `robust_packed` are the shares classified correctly under an attack made
    on the network itself, `robust_transfer` that of the artefact under adversarial examples made on the model.
    """

    accuracy_model: float
    accuracy_packed: float
    agreement: float
    logit_error: float
    robust_model: float
    robust_packed: float
    robust_transfer: float


def compare_shipped(model: nn.Module, packed: Packed, x: Tensor, y: Tensor, attack: Attack) -> Shipped:
    """Attack a model and its artefact on images x (N, *shape) in [0, 1] with labels y (N,), int64.

    `attack` maps (network, x, y) to adversarial images within its budget. A gradient attack runs on the artefact's own
    values, as rounded; one that reads predictions only runs on the very kernels that are shipped. The model is
    evaluated in eval mode and left as it was.
    """
    training = model.training
    model.eval()
    try:
        shipped = PackedModule(packed)
        adversarial, adversarial_shipped = attack(model, x, y), attack(shipped, x, y)
        with torch.no_grad():
            logits, own = model(x), packed(x)
            return Shipped(
                accuracy_model=_share(logits.argmax(1) == y),
                accuracy_packed=_share(own.argmax(1) == y),
                agreement=_share(logits.argmax(1) == own.argmax(1)),
                logit_error=float((logits - own).abs().max() / logits.abs().max().clamp_min(1e-30)),
                robust_model=_share(model(adversarial).argmax(1) == y),
                robust_packed=_share(packed(adversarial_shipped).argmax(1) == y),
                robust_transfer=_share(packed(adversarial).argmax(1) == y),
            )
    finally:
        model.train(training)


def _share(hits: Tensor) -> float:
    return float(hits.double().mean())
