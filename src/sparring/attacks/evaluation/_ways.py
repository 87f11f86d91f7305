"""The ways in which `run` attacks a model: itself, a draw at a time, straight through, by differences, by transfer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from ...errors import UserError
from ...facts import ATTACKS, OWN_ATTACK, AttackFacts
from ...plugins import takes
from ...threat import Threat
from .._gradients import Probe
from ..algorithms._losses import dlr
from ..algorithms._pgd import pgd
from ..algorithms._projections import column, select
from ._bpda import straight_through
from ._finite_differences import Differences
from ._flags import Flag
from ._scoring import Judge, Scored, better, resized, still_open

# Another way of attacking must do better on this share of the images before it is called a sign of masking.
NOTABLE = 0.02
# What only just fools another network need not fool this one: a second loan comes from as deep as a budget allows.
_DEEP = partial(pgd, objective=dlr, stop_early=False)


class Attack(Protocol):
    """What every attack is: a function from images to perturbed images; configure it with functools.partial."""

    def __call__(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        /,
        *,
        norm: float,
        eps: float | None = None,
        targets: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor: ...


def facts_of(attack: Attack) -> AttackFacts:
    """Return what is known of an attack, however it is configured; one that takes no `eps` is a minimum-norm attack."""
    function = cast(Callable[..., Tensor], attack)
    while isinstance(function, partial):
        function = function.func
    name = getattr(function, "__name__", "").replace("_", "-")
    if name in ATTACKS and function.__module__.startswith(f"{__package__.partition('.')[0]}."):
        return ATTACKS[name]
    return OWN_ATTACK if takes(function, "eps") else replace(OWN_ATTACK, kind="minimum-norm")


def budget_of(attack: Attack, threat: Threat) -> dict[str, Any]:
    """Return the keyword that gives an attack its budget; a user's minimum-norm attack need not take one."""
    return {"eps": threat.eps} if takes(cast(Callable[..., Tensor], attack), "eps") else {}


@dataclass(frozen=True)
class Order:
    """An attack with its images: call it with a model and a mask of the images to attack."""

    attack: Attack
    threat: Threat
    x: Tensor
    y: Tensor
    targets: Tensor | None
    batch_size: int
    generator: torch.Generator | None

    def __call__(self, model: nn.Module, wanted: Tensor) -> Tensor:
        x_adv, budget = self.x.clone(), budget_of(self.attack, self.threat)
        for rows in torch.split(wanted.nonzero().squeeze(1), self.batch_size):
            if len(rows):
                found = self.attack(
                    model,
                    self.x[rows],
                    self.y[rows],
                    norm=self.threat.norm,
                    targets=select(self.targets, rows),
                    generator=self.generator,
                    **budget,
                )
                if not isinstance(found, Tensor) or found.shape != x_adv[rows].shape:
                    what = f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
                    raise UserError(f"the attack returned {what}, not images of shape {tuple(x_adv[rows].shape)}")
                x_adv[rows] = found.detach().to(x_adv)
        return x_adv

    def loans(self, surrogate: Probe, wanted: Callable[[], Tensor]) -> Iterator[Tensor]:
        """Yield what a surrogate lends, found on the images that are wanted when their turn comes."""
        yield self(surrogate, wanted())
        # To a single step it would be no loan but another attack, and robust accuracy under it no longer that.
        if self.threat.eps is not None and not facts_of(self.attack).single_step:
            yield replace(self, attack=_DEEP)(surrogate, wanted())


@dataclass
class Best:
    """Hold the best that was found for each image so far, over all ways of attacking; `flags` grows beside it."""

    judge: Judge
    order: Order
    threat: Threat
    x: Tensor
    clean_correct: Tensor
    outcome: Scored
    flags: list[Flag]

    def open(self) -> Tensor:
        """Return the images (N,) that are still worth an attack."""
        return still_open(self.outcome, self.threat)

    def add_(self, found: Tensor) -> Tensor:
        """Judge examples (N, ...) and keep the better ones; return the images (N,) that these gained."""
        self.outcome, gained = better(self.outcome, self.judge(self.x, found, self.clean_correct))
        return gained

    def flag_(self, way: str, gained: Tensor) -> None:
        """Flag that gradients are masked if a way around them gained notably many images."""
        self.flags += _masked(way, gained, self.clean_correct)


def attack_single_draws(best: Best, probe: Probe, draws: int) -> None:
    """Attack a model that draws as one would attack any: what the expectation adds to that, chance had hidden."""
    probe.draws = 1
    best.add_(best.order(probe, best.open()))
    probe.draws = draws


def attack_itself(best: Best, probe: Probe, *, random: bool) -> None:
    """Attack the model, or its expectation over draws.

    What fools one set of draws need not fool another: images still standing get four more chances.
    """
    gained = torch.zeros_like(best.clean_correct)
    for _ in range(5 if random else 1):
        gained |= best.add_(best.order(probe, best.open()))
    if random:
        if best.threat.eps is None:
            best.outcome = resized(best.judge, best.x, best.outcome, best.clean_correct)
        best.flag_("the expectation over draws", gained)


def attack_straight_through(best: Best, probe: Probe, model: nn.Module) -> None:
    """Attack through the backward pass that layers which mask gradients declare."""
    probe.model, probe.hand = model, None
    with straight_through(model, best.x[:1]):
        found = best.order(probe, best.open())
    best.flag_("a straight-through backward pass", best.add_(found))


def attack_by_differences(best: Best, probe: Probe, model: nn.Module, blind: Tensor) -> None:
    """Attack by finite differences where the gradient misses what an image does."""
    probe.model, probe.hand = (differences := Differences(model, blind)), None
    best.flag_("a gradient by finite differences", best.add_(best.order(probe, best.open())))
    probe.forwards += differences.passes


def transfer(best: Best, lenders: Mapping[str, Probe], lent: Mapping[str, Sequence[Tensor]]) -> None:
    """Try the examples of other models, attacked here or lent."""
    loans: list[tuple[str, Iterable[Tensor]]] = [
        (name, best.order.loans(lender, best.open)) for name, lender in lenders.items()
    ]
    for name, examples in (*loans, *lent.items()):
        gained = torch.zeros_like(best.clean_correct)
        for found in examples:
            gained |= best.add_(torch.where(column(best.open(), best.x), found, best.x))
        best.flag_(f"transfer from {name}", gained)


def _masked(way: str, more: Tensor, attacked: Tensor) -> list[Flag]:
    gained, count = int(more.sum()), int(attacked.sum())
    if gained < max(2, NOTABLE * count):
        return []
    return [Flag("masked-gradients", f"{way} does better on {gained} of {count} images")]
