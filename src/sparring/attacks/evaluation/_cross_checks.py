"""Second opinions on a result: would more steps, another attack or a larger budget change it?"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise, permutations

import torch
from torch import Tensor, nn

from ...facts import ATTACKS, OWN_ATTACK
from ...outputs import Opened, opened
from ...threat import LINF, Threat, diameter, distance
from .._gradients import frozen
from ..algorithms._losses import is_answer, margin_loss
from ._flags import Flag, exceeds
from ._run import AttackResult, run
from ._scoring import Attack, budget_of

_NOTABLE = 0.02
_RETRIES = 3
# What the evaluator itself allows beyond box and budget.
_TOLERANCE = 1e-6


def check_unlimited(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    attack: Attack,
    *,
    norm: float = LINF,
    images: int = 64,
    generator: torch.Generator | None = None,
) -> tuple[Flag, ...]:
    """Return a flag unless the attack fools the images when each pixel may take any value (Athalye et al. 2018).

    Images still standing are attacked three times again: an honest network too may be silent around one random start.
    At least 2 images and 2% of all must withstand that. Not for attacks of a single step (FGSM), which need not arrive
    anywhere.
    """
    threat = Threat(norm, diameter(x, norm))
    rows = torch.arange(min(images, len(x)), device=x.device)
    attacked = 0
    for attempt in range(1 + _RETRIES):
        result = run(model, x[rows], y[rows], attack, threat, generator=generator)
        attacked = int(result.clean_correct.sum()) if attempt == 0 else attacked
        rows = rows[result.clean_correct & ~result.success]
        if len(rows) < max(2, _NOTABLE * attacked):
            return ()
    detail = f"{len(rows)} of {attacked} images withstand any change; do not report this attack"
    return (Flag("unlimited-budget", detail),)


def check_order(results: Mapping[str, AttackResult]) -> dict[str, tuple[Flag, ...]]:
    """Return, for each stronger attack, a flag if one of lower rank on the same images and threat did better.

    Better: it fools at least 2% more images, beyond chance (see `exceeds`).
    """
    flags: dict[str, tuple[Flag, ...]] = {}
    for low, high in permutations(results, 2):
        if not ATTACKS.get(low, OWN_ATTACK).is_weaker(ATTACKS.get(high, OWN_ATTACK)):
            continue
        found = _outdone(results[low], results[high], f"{low} fools", high)
        flags |= {high: (*flags.get(high, ()), *found)} if found else {}
    return flags


def check_budgets(results: Mapping[float, AttackResult]) -> dict[float, tuple[Flag, ...]]:
    """Return, for each eps, a flag if the same attack on the same images did better within the next smaller eps."""
    flags: dict[float, tuple[Flag, ...]] = {}
    for low, high in pairwise(sorted(results)):
        found = _outdone(results[low], results[high], f"eps {low:g} fools", f"eps {high:g}")
        flags |= {high: found} if found else {}
    return flags


def _outdone(weak: AttackResult, strong: AttackResult, who: str, whom: str) -> tuple[Flag, ...]:
    more, fewer = int((weak.success & ~strong.success).sum()), int((strong.success & ~weak.success).sum())
    if not exceeds(more, fewer, share=_NOTABLE, of=len(weak.success)):
        return ()
    detail = f"{who} {more - fewer} images more than {whom}; take the worst case of both (`worst_case`)"
    return (Flag("weaker-wins", detail),)


class _Witness(Opened):
    """Pass images on to a model and remember whether any was adversarial within the box and the budget."""

    def __init__(self, model: nn.Module, x: Tensor, y: Tensor, threat: Threat) -> None:
        super().__init__()
        self.model, self.x, self.y, self.threat = model, x, y, threat
        self.seen = False

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.model(x)
        with torch.no_grad():
            allowed = ((x - x.clamp(0, 1)).abs().flatten(1).amax(1) <= _TOLERANCE) & is_answer(logits)
            if self.threat.eps is not None:
                allowed &= distance(x - self.x, self.threat.norm) <= self.threat.eps * (1 + _TOLERANCE)
            won = margin_loss(logits, self.y.expand(len(x))) > 1e-4 * logits.abs().amax(1)
            self.seen = self.seen or bool((allowed & won).any())
        return logits


def check_silence(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    attack: Attack,
    threat: Threat,
    result: AttackResult,
    *,
    images: int = 16,
    generator: torch.Generator | None = None,
) -> tuple[Flag, ...]:
    """Return a flag if an attack met an adversarial example of an image it failed on, and returned another point.

    From the indicators of attack failure (Pintor et al. 2022, "silent success"). The attack runs again, untargeted, on
    the first `images` images it failed on, one by one, so that every point it looks at belongs to the image.
    """
    failed = (result.clean_correct & ~result.success).nonzero().squeeze(1)[:images]
    silent, budget = 0, budget_of(attack, threat)
    with frozen(model):
        model = opened(model, x)
        for row in failed.unsqueeze(1):
            witness = _Witness(model, x[row], y[row], threat)
            x_adv = attack(witness, x[row], y[row], norm=threat.norm, generator=generator, **budget)
            with torch.no_grad():
                silent += witness.seen and not bool(margin_loss(model(x_adv), y[row]) > 0)
    if silent == 0:
        return ()
    detail = f"for {silent} of {len(failed)} images it failed on; let it return the best point that it saw"
    return (Flag("silent-success", detail),)
