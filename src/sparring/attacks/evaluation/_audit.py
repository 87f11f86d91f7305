"""Audit a model: several attacks with all their checks, second opinions on each, and the worst case over them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ...errors import UserError
from ...threat import LINF, Threat
from ..algorithms._projections import column
from ._cross_checks import check_budgets, check_order, check_silence, check_unlimited
from ._flags import Flag
from ._run import AttackResult, run
from ._scoring import Attack, facts_of

_SILENCE_IMAGES = 4  # each is attacked alone

Found = dict[tuple[str, Threat], AttackResult]


@dataclass(frozen=True)
class AuditRow:
    """One attack (by its name, or "worst case" over several) under one threat, its result with all flags."""

    attack: str
    threat: Threat
    result: AttackResult


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
) -> list[AuditRow]:
    """Run attacks at each budget, check every result, and add the worst case over all attacks at each budget.

    x: float (N, ...) in [0, 1]; y: int64 (N,). `attacks` go by their names in `ATTACKS`, which rank them, or by any
    other of yours. A minimum-norm attack runs once, without eps. `checks`: on how many images a longer run and an
    unlimited budget give second opinions (docs/flags.md); 0: no opinions, nor a comparison of attacks and budgets. Each
    attack starts from `seed`, so that its result does not depend on which others run. Raises UserError as `run` does,
    and for an attack that needs a budget where `eps` has none.
    """
    found: Found = {}
    for name, attack in attacks.items():
        for threat in _threats(name, attack, norm, eps):
            generator = torch.Generator().manual_seed(seed)
            found[name, threat] = run(
                model, x, y, attack, threat, batch_size=batch_size, generator=generator, convergence=checks
            )
    for key, flags in _opinions(found, attacks, (model, x, y), checks, seed) if checks else ():
        found[key] = replace(found[key], flags=(*found[key].flags, *flags))
    return [AuditRow(name, threat, result) for (name, threat), result in found.items()] + _worst_cases(found)


def _threats(name: str, attack: Attack, norm: float, eps: Sequence[float]) -> list[Threat]:
    if facts_of(attack).kind == "minimum-norm":
        return [Threat(norm)]
    if not eps:
        raise UserError(f"the attack '{name}' needs a budget: give eps, as eps=[0.03]")
    return [Threat(norm, budget) for budget in eps]


def _opinions(
    found: Found, attacks: Mapping[str, Attack], task: tuple[nn.Module, Tensor, Tensor], images: int, seed: int
) -> Iterator[tuple[tuple[str, Threat], tuple[Flag, ...]]]:
    """Yield what other attacks, other budgets, no budget at all and the points that it saw say against a result."""
    for threat in {threat for _, threat in found}:
        rivals = {name: result for (name, other), result in found.items() if other == threat}
        yield from (((name, threat), flags) for name, flags in check_order(rivals).items())
    for name, attack in attacks.items():
        budgets = {threat.eps: threat for who, threat in found if who == name and threat.eps is not None}
        results = {eps: found[name, threat] for eps, threat in budgets.items()}
        yield from (((name, budgets[eps]), flags) for eps, flags in check_budgets(results).items())
        if budgets and not facts_of(attack).single_step:
            threat, generator = budgets[max(budgets)], torch.Generator().manual_seed(seed)
            flags = check_unlimited(*task, attack, norm=threat.norm, images=images, generator=generator)
            result = found[name, threat]
            flags += check_silence(*task, attack, threat, result, images=_SILENCE_IMAGES, generator=generator)
            yield (name, threat), flags


def _worst_cases(found: Found) -> list[AuditRow]:
    """Return a row for each budget that several attacks were given: what is robust is what withstands them all."""
    rows = []
    for threat in dict.fromkeys(threat for _, threat in found if threat.eps is not None):
        rivals = [result for (_, other), result in found.items() if other == threat]
        if len(rivals) > 1:
            rows.append(AuditRow("worst case", threat, _worst_case(rivals)))
    return rows


def _worst_case(rivals: Sequence[AttackResult]) -> AttackResult:
    """Return for each image the first success that there is, and the passes and seconds of all."""
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
