"""Findings of a study: curves over the dense control, important sparsities, and the effects of the ledger."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from ...statistics import (
    Curve,
    Effect,
    Row,
    SweetSpot,
    curve,
    effect,
    leave_one_out,
    over_sparsified,
    peak,
    simultaneous,
    sweet_spot,
)
from .. import _numbers as numbers
from ._cross_checks import Doubt, doubts
from ._metrics import Collected, Measure, PerImage, collect, common, main_measures, values
from ._records import Study

MANY_FAILED = 0.01  # of the images: with more failures on either side, a distance decides nothing
DRAWS_SEED = 20260101  # joint draws are part of the result, so they are fixed
# Allowed losses; "over_sparsified": the loss of validation accuracy from which on a network is called so.
DEFAULT_MARGINS = {"accuracy": 0.005, "robust": 0.02, "distance": 0.02, "over_sparsified": 0.02}


@dataclass(frozen=True, eq=False)
class Result:
    """One metric of one method against sparsity.

    `levels` are the metric's own means with intervals, at each sparsity; `by_seed` (seeds, sparsities) the lines of
    single seeds; `gains` compares with the dense control: differences of shares, logarithms of ratios of lengths (of a
    control above zero). `margin` is the loss that does not matter, in the same unit. `left_out` names sparsities with
    missing seeds. For distances, `medians` are over the counted images, means over seeds, and `failed` the shares of
    images on which the attack failed, which count as the largest distance found: the dense control's first.
    """

    study: Study
    measure: Measure
    method: str
    sparsities: tuple[float, ...]
    seeds: tuple[int, ...]
    images: int
    levels: tuple[Effect, ...]
    by_seed: NDArray[np.float64]
    control: Effect
    control_by_seed: tuple[float, ...]
    gains: Curve
    left_out: tuple[float, ...]
    medians: tuple[float, ...]
    failed: tuple[float, ...]
    margin: float

    @functools.cached_property
    def simultaneous(self) -> list[Effect]:
        """Return the gains with intervals that hold at all sparsities together."""
        return simultaneous(self.gains, generator=np.random.default_rng(DRAWS_SEED))

    @property
    def over_sparsified(self) -> float | None:
        """Return the sparsity from which on the metric is shown to lose more than its margin."""
        return over_sparsified(self.gains, self.margin)

    def words(self, *sparsities: float) -> str:
        """Return sparsities of the curve in words, with the share of all weight matrices if that is less."""
        return numbers.span(sparsities, self.sparsities) + numbers.of_all(self.study, self.method, sparsities)

    def failures(self, sparsities: Sequence[float]) -> tuple[float, float]:
        """Return the largest shares of images on which an attack failed, of the dense control and of the sparse."""
        if not self.failed:
            return 0.0, 0.0
        return self.failed[0], max((self.failed[1 + self.sparsities.index(s)] for s in sparsities), default=0.0)

    def gain(self, sparsity: float) -> Effect | None:
        """Return the gain at one sparsity, or None if it was not measured."""
        return self.gains.at(sparsity) if sparsity in self.sparsities else None


@dataclass(frozen=True, eq=False)
class Findings:
    """Everything that page, tables and verdict show, computed once.

    `method` is that of the headline: the plan's first that chooses weights, since random masks are a baseline.
    The sweet spot does not watch `unwatched` metrics: distances whose searches failed too often, or over a control of
    zero.
    """

    study: Study
    collected: Collected
    results: Mapping[tuple[Measure, str], Result]
    main: tuple[Measure, ...]
    method: str | None
    margins: Mapping[Measure, float]
    sweet_spot: SweetSpot | None
    doubts: tuple[Doubt, ...] = ()
    unwatched: tuple[Measure, ...] = ()

    def result(self, measure: Measure | None, method: str | None = None) -> Result | None:
        """Return one metric's result for a method (None: the headline's), or None if there is none."""
        name = method if method is not None else self.method
        return None if measure is None or name is None else self.results.get((measure, name))

    @property
    def seeds(self) -> int:
        """Return the number of seeds of the headline's comparison."""
        found = self.result(self.main[0]) if self.main else None
        return len(found.seeds) if found else len({n.seed for n in self.study.networks})

    @property
    def r_2(self) -> Measure | None:
        """Return the paper's measure of l2 robustness, DeepFool's mean distance, or None if it was not measured."""
        return next((m for m in self.main if (m.role, m.name, m.norm) == ("distance", "deepfool", "l2")), None)

    def first(self, role: str, *names: str) -> Measure | None:
        """Return the first main metric with a role, and an attack's name if any are given."""
        return next((m for m in self.main if m.role == role and (not names or m.name in names)), None)


def find(study: Study) -> Findings:
    """Compute a study's findings."""
    collected = collect(study)
    results = {
        (measure, method): result
        for measure, held in collected.items()
        for method in study.methods
        if (result := _result(study, measure, method, held)) is not None
    }
    main = tuple(main_measures(list(collected)))
    method = _headline(study)
    every = {m: results[m, method] for m in main if method is not None and (m, method) in results}
    seeds = max((len(result.seeds) for result in every.values()), default=0)
    asked = {m: r for m, r in every.items() if m.role != "distance-correct" and len(r.seeds) == seeds}
    watched = {m: r for m, r in asked.items() if r.margin > 0 and max(r.failed, default=0.0) <= MANY_FAILED}
    margins = {m: r.margin for m, r in watched.items()}
    spot = None
    if watched:
        spot = sweet_spot({m.slug: r.gains for m, r in watched.items()}, {m.slug: margins[m] for m in watched})
    unwatched = tuple(m for m in asked if m not in watched)
    return Findings(study, collected, results, main, method, margins, spot, tuple(doubts(study, collected)), unwatched)


def _headline(study: Study) -> str | None:
    """Return the plan's first method that chooses weights; without one, its first that makes weights sparse, or any."""
    weights = [m for m in study.methods if study.axis(m) == "weights"]
    chosen = [m for m in weights if study.kind(m) in ("pruned", "channels", "surgery")]
    return next(iter(chosen or weights or study.methods), None)


def margins_of(study: Study) -> dict[str, float]:
    """Return the allowed losses, as fractions: from the plan, else the defaults."""
    margins = DEFAULT_MARGINS | {name: float(loss) for name, loss in (study.plan.get("margins") or {}).items()}
    return margins | {"over_sparsified": max(margins["over_sparsified"], margins["accuracy"])}


def _margin(measure: Measure, log: bool, margins: Mapping[str, float]) -> float:
    """Return how much a metric may fall, in its gains' unit; 0 for a control of zero."""
    if measure.is_share:
        return margins["accuracy" if measure.role == "accuracy" else "robust"]
    return -math.log1p(-margins["distance"]) if log else 0.0


def _result(
    study: Study, measure: Measure, method: str, held: Mapping[tuple[str, float, int], PerImage]
) -> Result | None:
    """Compare a method with the dense control on their common seeds and images."""
    usable = {who: one for who, one in held.items() if one.bottom.any()}
    control = {seed: one for (name, _, seed), one in usable.items() if name == study.control(method)}
    by_sparsity: dict[float, dict[int, PerImage]] = {}
    for (name, sparsity, seed), one in sorted(usable.items()):
        if name == method and seed in control:
            by_sparsity.setdefault(sparsity, {})[seed] = one
    if not by_sparsity:
        return None
    seeds = max((tuple(sorted(part)) for part in by_sparsity.values()), key=len)
    kept = {s: part for s, part in by_sparsity.items() if tuple(sorted(part)) == seeds}
    images = common([one.images for part in (*kept.values(), control) for k, one in part.items() if k in seeds])
    if len(images) < 2:
        return None
    dense = values([control[k] for k in seeds], images)
    sparse = np.stack([values([part[k] for k in seeds], images) for part in kept.values()])
    log = not measure.is_share and dense.mean() > 0
    gains = curve(tuple(kept), sparse, dense, log=log)
    gains = gains.priced(study.looks.price, len(study.looks.dropped.get(method, ())))
    groups = [[part[k].at(images) for k in seeds] for part in (control, *kept.values())]
    return Result(
        study=study,
        measure=measure,
        method=method,
        sparsities=tuple(kept),
        seeds=seeds,
        images=len(images),
        levels=tuple(_level(one, measure) for one in sparse),
        by_seed=sparse.mean(axis=2).T,
        control=_level(dense, measure),
        control_by_seed=tuple(dense.mean(axis=1)),
        gains=gains,
        left_out=tuple(s for s in by_sparsity if s not in kept),
        medians=() if measure.is_share else _means(groups, lambda one: np.median(one.top[one.bottom > 0])),
        failed=_means(groups, lambda one: one.missed) if measure.role in ("distance", "distance-correct") else (),
        margin=_margin(measure, log, margins_of(study)),
    )


def _level(one: NDArray[np.float64], measure: Measure) -> Effect:
    """Return a metric's mean; its interval ends at 0, and that of a share at 1."""
    level = effect(one)
    low = min(level.estimate, max(level.low, 0.0))  # no metric is negative, but the margin of a bound may be
    return replace(level, low=low, high=min(level.high, 1.0) if measure.is_share else level.high)


def _means(groups: Sequence[Sequence[PerImage]], of: Callable[[PerImage], float]) -> tuple[float, ...]:
    return tuple(float(np.mean([of(one) for one in seeds])) for seeds in groups)


def difference(findings: Findings, measure: Measure, one: tuple[str, float], other: tuple[str, float]) -> Effect | None:
    """Return the paired difference of a metric between two (method, sparsity), or None if they share no seed."""
    held = findings.collected[measure].items()
    sides = [{seed: values for (*who, seed), values in held if tuple(who) == side} for side in (one, other)]
    return paired(findings, measure, *sides)


def paired(
    findings: Findings, measure: Measure, one: Mapping[int, PerImage], other: Mapping[int, PerImage]
) -> Effect | None:
    """Return the change of a metric between two networks of each seed, None without common seeds and images."""
    seeds = sorted(set(one) & set(other))
    if not seeds:
        return None
    images = common([side[k].images for side in (one, other) for k in seeds])
    if len(images) < 2 or not all(side[k].at(images).bottom.any() for side in (one, other) for k in seeds):
        return None
    first, second = (values([side[k] for k in seeds], images) for side in (one, other))
    return measure.change(first, second).priced(findings.study.looks.price)


@dataclass(frozen=True, eq=False)
class ChosenGain:
    """Sparsities chosen to test a gain, one per seed, the gain there, and how they were chosen.

    `curve` are the gains at every sparsity that could have been chosen; `choices` counts them, and those that the plan
    dropped, if the choice was made on the images of the test, else it is 1.
    """

    sparsities: tuple[float, ...]
    effect: Effect
    curve: tuple[Effect, ...]
    choices: int


def choose(
    findings: Findings, result: Result, *, by: Result | None = None, within: Sequence[float] | None = None
) -> ChosenGain | None:
    """Return the gain at the sparsity that is best for another metric (None: its own), without selection bias.

    If validation images were attacked, each seed's sparsity is the best one of the other seeds there. Otherwise the
    best of the curve is used, with an interval that holds for all of it. `within` are the allowed sparsities.
    """
    by = by if by is not None else result
    every = [s for s in result.sparsities if s in by.sparsities and (within is None or s in within)]
    if not every:
        return None
    effects = tuple(map(result.gains.at, every))
    twin = findings.result(replace(by.measure, split="valid"), by.method)
    if twin is not None and twin.seeds == result.seeds:
        found = leave_one_out(result.gains, twin.gains, every)
        if found is not None:
            return ChosenGain(found[0], found[1].priced(findings.study.looks.price), effects, 1)
    best = max(every, key=lambda s: by.gains.at(s).estimate)
    wide = result.simultaneous
    return ChosenGain(
        (best,) * len(result.seeds), wide[result.sparsities.index(best)], effects, len(every) + result.gains.dropped
    )


def gain_told(result: Result, ledger: Sequence[Row]) -> str:
    """Return the ledger's verdict on a gain, and where it may be largest if there is one; "" if it was not tested."""
    row = next((r for r in ledger if r.question.gain == (result.measure.slug, result.method)), None)
    if row is None or row.effect is None:
        return ""
    told = f"{row.told} ({numbers.signed(row.effect, row.claim.unit)}{numbers.decisive(row)})"
    reproduced = row.verdict == "reproduced" and row.claim.expects == "above"
    found = peak(result.gains, generator=np.random.default_rng(DRAWS_SEED)) if reproduced else None
    return told if found is None else f"{told}, peak at {result.words(*found.members)}"


def seeds_phrase(seeds: int) -> str:
    """Return "5 seeds", or "3 seeds (indicative)" if there are too few for more."""
    return numbers.seeds(seeds) + (" (indicative)" if seeds < 5 else "")
