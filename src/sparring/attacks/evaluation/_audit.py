"""Audit a model: run several attacks, check the reliability of each, and take the worst case."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise, permutations

import torch
from torch import Tensor, nn

from ...draws import Draws, Source
from ...errors import UserError
from ...facts import ATTACKS, OWN_ATTACK
from ...modes import eval_mode
from ...outputs import Opened, opened
from ...threat import LINF, Threat, diameter, distance
from ...waiting import courteous
from .._gradients import frozen
from .._meter import Progress, with_title
from ..algorithms._losses import is_answer, margin_loss
from ..algorithms._projections import column
from ._run import AttackResult, check_convergence, draws_for, run
from ._sanity_checks import Flag, check_inputs, exceeds
from ._scoring import NOTABLE, TOLERANCE, Attack, budget_of, check_batch, facts_of, length_of, source_for

_SILENCE_IMAGES = 4  # each image is attacked alone
_RETRIES = 3

Found = dict[tuple[str, Threat], AttackResult]


@dataclass(frozen=True)
class AuditRow:
    """One attack (by its name, or "worst case" over several) under one threat, and its result with all flags."""

    attack: str
    threat: Threat
    result: AttackResult


@courteous()
def audit(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    attacks: Mapping[str, Attack],
    *,
    norm: float = LINF,
    eps: Sequence[float] = (),
    checks: int = 128,
    batch_size: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[AuditRow]:
    """Run attacks at each budget, check every result, and add the worst case over all attacks at each budget.

    x: float (N, ...) in [0, 1]; y: int64 (N,). The keys of `attacks` are names in `ATTACKS`, which determine their
    rank, or your own names. A minimum-norm attack runs once, without eps. `checks` is the number of images used by the
    reliability checks (docs/flags.md); 0 disables these, and the comparison of attacks and budgets. Each attack starts
    from `seed`, so that its result does not depend on the other attacks. Raises UserError as `run` does, and for an
    attack that needs a budget if `eps` is empty. `progress` is as in `run`, with the attack's name before the stage.
    """
    found: Found = {}
    draws = Draws.of(seed, range(len(x)), x.device)
    asked = [(name, attack, threat) for name, attack in attacks.items() for threat in _threats(name, attack, norm, eps)]
    if batch_size is not None:
        _check_batches(model, x, asked, batch_size)
    for name, attack, threat in asked:
        title = name if threat.eps is None else f"{name} eps {threat.eps:g}"
        shown, longer = (with_title(what, progress) for what in (title, f"{title}, four times the steps"))
        result = run(model, x, y, attack, threat, batch_size=batch_size, generator=draws, progress=shown)
        if checks and length_of(attack) is not None:
            flags = check_convergence(
                model, x, y, attack, threat, result, images=checks, batch_size=batch_size, generator=draws,
                progress=longer,
            )  # fmt: skip
            result = replace(result, flags=(*result.flags, *flags))
        found[name, threat] = result
    for key, flags in _opinions(found, attacks, (model, x, y), checks, batch_size, draws, progress) if checks else ():
        found[key] = replace(found[key], flags=(*found[key].flags, *flags))
    return [AuditRow(name, threat, result) for (name, threat), result in found.items()] + _worst_cases(found)


def _check_batches(model: nn.Module, x: Tensor, asked: Sequence[tuple[str, Attack, Threat]], batch_size: int) -> None:
    """Raise UserError if images are too many for memory, before any attack is run."""
    check_inputs(x, torch.zeros(len(x), dtype=torch.int64))
    with eval_mode(model):
        answer = opened(model, x)
        for _, attack, threat in asked:
            check_batch(answer, x, attack, threat, batch_size)


def _threats(name: str, attack: Attack, norm: float, eps: Sequence[float]) -> list[Threat]:
    if facts_of(attack).kind == "minimum-norm":
        return [Threat(norm)]
    if not eps:
        raise UserError(f"the attack '{name}' needs a budget; give eps, such as eps=[0.03]")
    return [Threat(norm, budget) for budget in eps]


def _opinions(
    found: Found,
    attacks: Mapping[str, Attack],
    task: tuple[nn.Module, Tensor, Tensor],
    images: int,
    batch_size: int | None,
    draws: Draws,
    progress: Progress | None,
) -> Iterator[tuple[tuple[str, Threat], tuple[Flag, ...]]]:
    """Yield flags against a result: from other attacks, other budgets, no budget at all, and the points that it saw."""
    for threat in {threat for _, threat in found}:
        rivals = {name: result for (name, other), result in found.items() if other == threat}
        yield from (((name, threat), flags) for name, flags in check_order(rivals).items())
    for name, attack in attacks.items():
        budgets = {threat.eps: threat for who, threat in found if who == name and threat.eps is not None}
        results = {eps: found[name, threat] for eps, threat in budgets.items()}
        yield from (((name, budgets[eps]), flags) for eps, flags in check_budgets(results).items())
        if budgets and not facts_of(attack).single_step:
            threat = budgets[max(budgets)]
            wide, silent = (with_title(f"{name}, {how}", progress) for how in ("unlimited", "one by one"))
            flags = check_unlimited(
                *task, attack, norm=threat.norm, images=images, batch_size=batch_size, generator=draws, progress=wide
            )
            result = found[name, threat]
            flags += check_silence(
                *task, attack, threat, result, images=_SILENCE_IMAGES, generator=draws, progress=silent
            )
            yield (name, threat), flags


def _worst_cases(found: Found) -> list[AuditRow]:
    """Return a row for each budget that several attacks used: an image is robust if all of them fail."""
    rows = []
    for threat in dict.fromkeys(threat for _, threat in found if threat.eps is not None):
        rivals = [result for (_, other), result in found.items() if other == threat]
        if len(rivals) > 1:
            rows.append(AuditRow("worst case", threat, _worst_case(rivals)))
    return rows


def _worst_case(rivals: Sequence[AttackResult]) -> AttackResult:
    """Return each image's first success, if any, and the passes and seconds of all attacks."""
    worst = replace(rivals[0], flags=())
    for rival in rivals[1:]:
        gained = rival.success & ~worst.success
        worst = replace(
            worst,
            x_adv=torch.where(column(gained, worst.x_adv), rival.x_adv, worst.x_adv),
            success=worst.success | rival.success,
            distance=torch.where(gained, rival.distance, worst.distance),
            forwards=worst.forwards + rival.forwards,
            backwards=worst.backwards + rival.backwards,
            seconds=worst.seconds + rival.seconds,
        )
    return worst


def check_unlimited(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    attack: Attack,
    *,
    norm: float = LINF,
    images: int = 64,
    batch_size: int | None = None,
    generator: Source = None,
    progress: Progress | None = None,
) -> tuple[Flag, ...]:
    """Return a flag unless the attack fools the images when each pixel may take any value (Athalye et al. 2018).

    Remaining images are attacked three more times, because any network may have no gradient around one random start.
    The flag is raised if at least 2 images and 2% of all remain correct. Attacks with a single step (FGSM) are exempt,
    since one step may not be enough. `progress` is as in `run`.
    """
    threat = Threat(norm, diameter(x, norm))
    rows = torch.arange(min(images, len(x)), device=x.device)
    attacked, draws = 0, draws_for(x, generator)
    for attempt in range(1 + _RETRIES):
        source = draws[rows].at(attempt)
        result = run(
            model, x[rows], y[rows], attack, threat, batch_size=batch_size, generator=source, progress=progress
        )
        attacked = int(result.clean_correct.sum()) if attempt == 0 else attacked
        rows = rows[result.clean_correct & ~result.success]
        if len(rows) < max(2, NOTABLE * attacked):
            return ()
    detail = f"{len(rows)} of {attacked} images remain correct with an unlimited budget; do not report this attack"
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
    if not exceeds(more, fewer, share=NOTABLE, of=len(weak.success)):
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
            allowed = ((x - x.clamp(0, 1)).abs().flatten(1).amax(1) <= TOLERANCE) & is_answer(logits)
            if self.threat.eps is not None:
                allowed &= distance(x - self.x, self.threat.norm) <= self.threat.eps * (1 + TOLERANCE)
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
    generator: Source = None,
    progress: Progress | None = None,
) -> tuple[Flag, ...]:
    """Return a flag if an attack evaluated an adversarial example of an image on which it failed, but returned another.

    From the indicators of attack failure (Pintor et al. 2022, "silent success"). The attack runs again, untargeted, on
    the first `images` images on which it failed, one by one, so that every evaluated point belongs to the image.
    `progress` is as in `run`.
    """
    failed = (result.clean_correct & ~result.success).nonzero().squeeze(1)[:images]
    silent, budget, draws = 0, budget_of(attack, threat), draws_for(x, generator)
    with frozen(model):
        model = opened(model, x)
        for number, row in enumerate(failed.unsqueeze(1)):
            if progress is not None:
                progress("attacking", number, len(failed))
            witness = _Witness(model, x[row], y[row], threat)
            source = source_for(attack, draws[row])
            x_adv = attack(witness, x[row], y[row], norm=threat.norm, generator=source, **budget)
            with torch.no_grad():
                silent += witness.seen and not bool(margin_loss(model(x_adv), y[row]) > 0)
    if silent == 0:
        return ()
    detail = f"for {silent} of {len(failed)} images it failed on; make it return the best point that it evaluated"
    return (Flag("silent-success", detail),)
