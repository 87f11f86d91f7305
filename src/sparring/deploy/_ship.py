"""Attack an artefact: is it as robust as the network it was exported from?"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from .. import attacks
from ..memory import answers
from ..modes import eval_mode
from ..outputs import opened
from ..statistics import Effect, effect
from ..threat import Threat
from ..waiting import courteous
from ._program import products
from ._runtime import Packed
from ._torch_modules import PackedModule

# Images of the attack that sees only classes: at most, and so many that all its passes take this many products.
_FEW, _PRODUCTS = 50, 6 * 10**12


@dataclass(frozen=True)
class Shipped:
    """Comparison of a network with its artefact on the same images; shares are fractions of the images.

    `agreement` is the share of clean images with the same prediction, `logit_error` the largest difference of logits
    over the largest logit. `robust_model` and `robust_packed` are the robust accuracies under an attack on the network
    and on the artefact, `robust_transfer` that of the artefact under examples made on the model, and `robust_decision`
    that of the artefact under a decision-based attack on its kernels, over the first `decided` images (None without).
    `stands_model` and `stands_packed`, bool (N,), are the images that remain correct under the examples made on the
    model and those made on the artefact. Both use the same examples, so that they can be compared.
    """

    accuracy_model: float
    accuracy_packed: float
    agreement: float
    logit_error: float
    robust_model: float
    robust_packed: float
    robust_transfer: float
    robust_decision: float | None
    decided: int
    stands_model: Tensor
    stands_packed: Tensor

    @property
    def change(self) -> Effect:
        """Return the artefact's robust accuracy minus the model's, paired by image."""
        return effect((self.stands_packed.double() - self.stands_model.double()).numpy()[None])


@courteous()
def ship_report(
    model: nn.Module,
    packed: Packed,
    x: Tensor,
    y: Tensor,
    attack: attacks.Attack,
    threat: Threat,
    *,
    decisions: int = 5,
    progress: attacks.Progress | None = None,
) -> Shipped:
    """Compare a network with its artefact under an attack, and run HopSkipJump on the artefact.

    x: float (N, *shape) in [0, 1]; y: int64 (N,); the model may be on another device. Attacks use `attacks.run` and the
    same seed. On the artefact, a gradient attack uses its rounded weights. HopSkipJump uses only the predicted classes
    of the shipped kernels, in `decisions` steps (0 disables it), on the first 50 images, or fewer of a large network,
    but at least one. `progress` is as in `attacks.audit`. The model runs in eval mode and is restored. Raises UserError
    as `attacks.run` does.
    """
    blind, place = partial(attacks.hopskipjump, steps=decisions), next((p.device for p in model.parameters()), x.device)
    with eval_mode(model):
        shipped, network = PackedModule(packed), opened(model, x[:2].to(place))
        stages = ("attack on the model", "attack on the artefact", "decision-based attack on the artefact")
        one, other, third = (attacks.with_title(stage, progress) for stage in stages)
        examples = [_attacked(network, x.to(place), y.to(place), attack, threat, one).cpu()]
        examples += [_attacked(shipped, x, y, attack, threat, other)]
        few = min(len(x), _few(packed, decisions))
        decided = _attacked(shipped, x[:few], y[:few], blind, threat, third) if few else None
        logits, own = answers(network, x.to(place)).cpu(), answers(packed, x)
        right, right_packed = logits.argmax(1) == y, own.argmax(1) == y
        standing = [right & (answers(network, one.to(place)).argmax(1).cpu() == y) for one in examples]
        standing_packed = [right_packed & (answers(packed, one).argmax(1) == y) for one in examples]
        return Shipped(
            accuracy_model=_share(right),
            accuracy_packed=_share(right_packed),
            agreement=_share(logits.argmax(1) == own.argmax(1)),
            logit_error=float((logits - own).abs().max() / logits.abs().max().clamp_min(1e-30)),
            robust_model=_share(standing[0]),
            robust_packed=_share(standing_packed[1]),
            robust_transfer=_share(standing_packed[0]),
            robust_decision=None if decided is None else _share(packed(decided).argmax(1) == y[:few]),
            decided=few,
            stands_model=standing[0] & standing[1],
            stands_packed=standing_packed[0] & standing_packed[1],
        )


def _attacked(
    network: nn.Module,
    x: Tensor,
    y: Tensor,
    attack: attacks.Attack,
    threat: Threat,
    progress: attacks.Progress | None,
) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return attacks.run(network, x, y, attack, threat, generator=generator, progress=progress).x_adv


def _few(packed: Packed, steps: int) -> int:
    """Return how many images HopSkipJump gets: it makes about 250 passes for each, and more with every step."""
    passes = 250 + 70 * steps**1.5
    return max(1, min(_FEW, int(_PRODUCTS / (passes * max(1, products(packed.program)[1]))))) if steps else 0


def _share(hits: Tensor) -> float:
    return float(hits.double().mean())
