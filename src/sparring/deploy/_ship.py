"""Attack what is shipped: is the artefact as robust as the network that was studied?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..modes import eval_mode
from ..outputs import opened
from ._differentiable import PackedModule
from ._runtime import Packed

Attack = Callable[[nn.Module, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Shipped:
    """Studied network and artefact side by side, over the same images; shares are fractions of them.

    `agreement` is the share of clean images with the same prediction, `logit_error` the largest difference of logits
    over the largest logit. `robust_model` and `robust_packed` are the shares classified correctly under an attack made
    on the network itself, `robust_transfer` that of the artefact under examples made on the model, `robust_decision`
    that of the artefact under a decision-based attack on its kernels, over the first few images, None without one.
    `stands_model` and `stands_packed`, bool (N,), are the images that withstand both the examples made on the model and
    those made on the artefact: the same examples for both, so that the two can be compared.
    """

    accuracy_model: float
    accuracy_packed: float
    agreement: float
    logit_error: float
    robust_model: float
    robust_packed: float
    robust_transfer: float
    robust_decision: float | None
    stands_model: Tensor
    stands_packed: Tensor


def compare_shipped(
    model: nn.Module,
    packed: Packed,
    x: Tensor,
    y: Tensor,
    attack: Attack,
    *,
    decide: Attack | None = None,
    few: int = 50,
) -> Shipped:
    """Attack a model and its artefact on images x (N, *shape) in [0, 1] with labels y (N,), int64.

    `attack` maps (network, x, y) to adversarial images within its budget; on the artefact a gradient attack works with
    its own values, as rounded. `decide` does the same from predictions alone, on the first `few` images: they come from
    the very kernels that are shipped. The model is evaluated in eval mode and left as it was.
    """
    with eval_mode(model):
        shipped, model = PackedModule(packed), opened(model, x)
        examples = [attack(model, x, y), attack(shipped, x, y)]
        decided = None if decide is None else decide(shipped, x[:few], y[:few])
        with torch.no_grad():
            logits, own = model(x), packed(x)
            right, right_packed = logits.argmax(1) == y, own.argmax(1) == y
            standing = [right & (model(one).argmax(1) == y) for one in examples]
            standing_packed = [right_packed & (packed(one).argmax(1) == y) for one in examples]
        return Shipped(
            accuracy_model=_share(right),
            accuracy_packed=_share(right_packed),
            agreement=_share(logits.argmax(1) == own.argmax(1)),
            logit_error=float((logits - own).abs().max() / logits.abs().max().clamp_min(1e-30)),
            robust_model=_share(standing[0]),
            robust_packed=_share(standing_packed[1]),
            robust_transfer=_share(standing_packed[0]),
            robust_decision=None if decided is None else _share(packed(decided).argmax(1) == y[:few]),
            stands_model=standing[0] & standing[1],
            stands_packed=standing_packed[0] & standing_packed[1],
        )


def _share(hits: Tensor) -> float:
    return float(hits.double().mean())
