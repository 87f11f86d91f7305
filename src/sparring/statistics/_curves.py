"""A metric against sparsity: gains over the dense control, peak, over-sparsified range and sweet spot."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special

from ._effects import LEVEL, Effect, beyond, effect, holm, log_ratio_values

CURVE_ALPHA = 0.05


@dataclass(frozen=True, eq=False)
class Curve:
    """Gains over the dense control at rising sparsities.

    `p_holm` are two-sided and corrected across the sparsities; `differences` (sparsities, seeds, images) are the values
    whose means are the effects. With one seed nothing is significant. `dropped` sparsities, which earlier looks had,
    still count among the tests.
    """

    sparsities: tuple[float, ...]
    effects: tuple[Effect, ...]
    p_holm: tuple[float, ...]
    differences: NDArray[np.float64]
    dropped: int = 0

    def at(self, sparsity: float) -> Effect:
        """Return the effect at one of the sparsities."""
        return self.effects[self.sparsities.index(sparsity)]

    def priced(self, price: float, dropped: int) -> Curve:
        """Return the same curve at a later look: p-values times `price`, and corrected for more tests."""
        effects = tuple(e.priced(price) for e in self.effects)
        p_holm = tuple(map(float, holm([e.p for e in effects], more=dropped)))
        return replace(self, effects=effects, p_holm=p_holm, dropped=dropped)

    def gains(self) -> list[bool]:
        """Return where the metric is significantly above the dense control."""
        return [s and e.estimate > 0 for s, e in zip(self._significant(), self.effects, strict=True)]

    def losses(self) -> list[bool]:
        """Return where the metric is significantly below the dense control."""
        return [s and e.estimate < 0 for s, e in zip(self._significant(), self.effects, strict=True)]

    def _significant(self) -> list[bool]:
        return [p <= CURVE_ALPHA and e.seeds > 1 for p, e in zip(self.p_holm, self.effects, strict=True)]


@dataclass(frozen=True)
class Peak:
    """The sparsity with the largest gain, and every sparsity that may have the largest gain."""

    sparsity: float
    members: tuple[float, ...]
    gain: Effect


@dataclass(frozen=True)
class SweetSpot:
    """The highest sparsity that is safe on every watched metric (None: not even the lowest), and its limit.

    `at_most` is the highest sparsity that the data do not rule out: the truth is between the two in 95% of studies.
    `limit` names the metric that ends the safe range, None if no metric does.
    """

    sparsity: float | None
    at_most: float | None
    limit: str | None


def curve(
    sparsities: Sequence[float],
    values: ArrayLike,
    control: ArrayLike,
    *,
    log: bool = False,
) -> Curve:
    """Compare each sparsity with the dense control, paired by seed and by image.

    `values` is (sparsities, seeds, images), `control` (seeds, images), in the metric's unit; the seeds and images of
    both are the same and in the same order. With `log`, gains are logarithms of ratios of means. Raises ValueError for
    shapes that do not match, or sparsities that do not rise.
    """
    v, c = np.asarray(values, dtype=np.float64), np.asarray(control, dtype=np.float64)
    if v.ndim != 3 or v.shape[1:] != c.shape or len(sparsities) != len(v) or len(v) == 0:
        raise ValueError(f"values {v.shape} and control {c.shape} do not fit {len(sparsities)} sparsities")
    if any(a >= b for a, b in itertools.pairwise(sparsities)):
        raise ValueError(f"sparsities must increase: {list(sparsities)}")
    d = log_ratio_values(v, c) if log else v - c
    effects = tuple(map(effect, d))
    corrected = holm([e.p for e in effects])
    return Curve(tuple(sparsities), effects, tuple(map(float, corrected)), d)


def joint_errors(one: Curve, *, generator: np.random.Generator, draws: int = 2000) -> NDArray[np.float64]:
    """Draw errors of all sparsities' estimates together, (sparsities, draws), by the crossed bootstrap.

    Seeds and images are drawn once for all sparsities, so that shared errors stay shared. The joint term is omitted,
    because resampling both would count the seed-by-image part three times (Owen 2007). Each row is then scaled to its
    effect's own standard error and given Student's tails.
    """
    _, seeds, images = one.differences.shape
    errors = one.differences.mean(axis=1) @ (_resample(images, draws, generator) / images - 1 / images)
    if seeds > 1:
        of_seeds = _resample(seeds, draws, generator) / seeds - 1 / seeds
        errors += one.differences.mean(axis=2) @ (of_seeds * np.sqrt(seeds / (seeds - 1)))
    spread = errors.std(axis=1)
    scale = np.array([e.se / s if s > 0 else 0.0 for e, s in zip(one.effects, spread, strict=True)])
    df = np.array([e.df for e in one.effects])[:, None]
    luck = 2 * special.gammaincinv(df / 2, generator.random(draws)) / df  # chi-square over its degrees
    return np.asarray(errors * scale[:, None] / np.sqrt(luck))


def _resample(n: int, draws: int, generator: np.random.Generator) -> NDArray[np.int64]:
    """Return how often each of n items occurs in each draw of n with replacement, (n, draws)."""
    picked = generator.integers(0, n, size=(n, draws)) + n * np.arange(draws)
    return np.bincount(picked.ravel(), minlength=n * draws).reshape(draws, n).T


def peak(one: Curve, *, generator: np.random.Generator, draws: int = 2000) -> Peak | None:
    """Return the peak of a curve, or None if no gain over the dense control is significant.

    A sparsity belongs to the peak unless another is significantly better (multiple comparison with the best, Hsu 1981,
    with the critical value from joint draws), so that the set contains the truly best in 95% of studies.
    """
    gains = one.gains()
    if not any(gains):
        return None
    means = np.array([e.estimate for e in one.effects])
    best = max((k for k, gain in enumerate(gains) if gain), key=lambda k: means[k])
    errors = joint_errors(one, generator=generator, draws=draws)
    members = tuple(s for k, s in enumerate(one.sparsities) if k == best or _may_be_best(k, means, errors))
    return Peak(one.sparsities[best], members, one.effects[best])


def _may_be_best(k: int, means: NDArray[np.float64], errors: NDArray[np.float64]) -> bool:
    """Return whether no other sparsity is significantly better than the k-th."""
    others = np.delete(errors, k, axis=0) - errors[k]
    if len(others) == 0:
        return True
    lead = np.delete(means, k) - means[k]
    spread = np.maximum(others.std(axis=1), np.finfo(float).tiny)
    critical = np.quantile((others / spread[:, None]).max(axis=0), 1 - CURVE_ALPHA)
    return bool((lead / spread).max() <= critical)


def leave_one_out(
    one: Curve, validation: Curve, candidates: Sequence[float] | None = None
) -> tuple[tuple[float, ...], Effect] | None:
    """Choose each seed's sparsity by the other seeds' validation gains; return the sparsities and the effect there.

    No network and no test image takes part in its own choice, so the estimate is unbiased. If seeds agree on a
    sparsity, each was chosen by the other, and their values are not independent; the standard error and the interval
    are widened by the largest effect of this dependence. For one seed, its own validation gains are used. Returns None
    if the two share no sparsity (of the candidates, if given). Seeds of both are the same and in the same order.
    """
    shared = [s for s in one.sparsities if s in validation.sparsities and (candidates is None or s in candidates)]
    if not shared:
        return None
    gains = validation.differences[[validation.sparsities.index(s) for s in shared]].mean(axis=2)
    seeds = gains.shape[1]
    others = gains.sum(axis=1, keepdims=True) - gains if seeds > 1 else gains
    picked = [shared[k] for k in others.argmax(axis=0)]
    values = one.differences[[one.sparsities.index(s) for s in picked], np.arange(seeds)]
    one_effect, wider = effect(values), _agreement(seeds, len(shared)) if min(seeds, len(shared)) > 1 else 1.0
    estimate, half = one_effect.estimate, wider * (one_effect.high - one_effect.estimate)
    widened = replace(one_effect, se=wider * one_effect.se, low=estimate - half, high=estimate + half)
    return tuple(picked), widened.priced(one_effect.price)


@functools.cache
def _agreement(seeds: int, candidates: int) -> float:
    """Return how much wider Student's t becomes when each seed's value is where the other seeds were best.

    By simulation without an effect, with only variation between networks, which is the same on both sets of images: the
    largest ratio of quantiles, from two-sided 5% to 0.2%.
    """
    generator = np.random.default_rng(1)
    luck = generator.normal(size=(max(2000, min(60_000, 15_000_000 // (seeds * candidates))), candidates, seeds))
    picked = (luck.sum(axis=2, keepdims=True) - luck).argmax(axis=1)
    values = np.take_along_axis(luck, picked[:, None], axis=1)[:, 0]
    t = np.abs(values.mean(axis=1)) / (values.std(axis=1, ddof=1) / math.sqrt(seeds))
    levels = np.array([0.05, 0.01, 0.002])
    return max(1.0, float((np.quantile(t, 1 - levels) / special.stdtrit(seeds - 1, 1 - levels / 2)).max()))


def simultaneous(one: Curve, *, generator: np.random.Generator, draws: int = 2000) -> list[Effect]:
    """Return the effects with intervals that hold at all sparsities together, and so at any chosen one.

    The half-width is the joint draws' quantile of the largest error in standard errors, and at least that of a single
    effect.
    """
    errors = joint_errors(one, generator=generator, draws=draws)
    spread = np.array([max(e.se, np.finfo(float).tiny) for e in one.effects])
    critical = float(np.quantile(np.abs(errors / spread[:, None]).max(axis=0), LEVEL))
    half = [max(critical * e.se, e.high - e.estimate) for e in one.effects]
    return [replace(e, low=e.estimate - h, high=e.estimate + h) for e, h in zip(one.effects, half, strict=True)]


def over_sparsified(one: Curve, margin: float = 0.0) -> float | None:
    """Return the sparsity from which on the metric is shown to lose more than its margin, or None.

    Holm's correction is over the sparsities. A sparsity in this range cannot be a sweet spot.
    """
    alone = [beyond(e, margin) if e.estimate < -margin and e.seeds > 1 else 1.0 for e in one.effects]
    lost = holm(alone, more=one.dropped)
    first = None
    for sparsity, p in zip(one.sparsities, lost, strict=True):
        if p > CURVE_ALPHA:
            first = None
        elif first is None:
            first = sparsity
    return first


def sweet_spot(curves: Mapping[str, Curve], margins: Mapping[str, float]) -> SweetSpot:
    """Return the highest sparsity up to which every watched metric's lower bound exceeds minus its margin.

    Margins are in the metrics' units. The sparsities that all curves share are tested from low to high until the first
    failure, so neither the number of sparsities (a fixed sequence of tests) nor that of metrics (all must pass) needs a
    correction; later looks have wider bounds. With one seed no sparsity is safe. Raises ValueError if there is no
    metric or a margin is missing.
    """
    if not curves or not set(curves) <= set(margins):
        raise ValueError("give at least one watched metric, and a margin for each")
    shared = sorted(set.intersection(*(set(c.sparsities) for c in curves.values())))
    safe, limit = _walk(shared, curves, margins, -1)
    return SweetSpot(safe, _walk(shared, curves, margins, +1)[0], limit)


def _bound(e: Effect, side: int) -> float:
    """Return an effect's 95% bound below (-1) or above (+1), at the price of the look; infinite with one seed."""
    half = float(special.stdtrit(e.df, 1 - CURVE_ALPHA / e.price / 2)) * e.se if e.seeds > 1 else math.inf
    return e.estimate + side * half


def _walk(
    sparsities: Sequence[float], curves: Mapping[str, Curve], margins: Mapping[str, float], side: int
) -> tuple[float | None, str | None]:
    """Return the last sparsity before some metric's bound falls to minus its margin, and that metric's name."""
    reached: float | None = None
    for sparsity in sparsities:
        for name, one in curves.items():
            if _bound(one.at(sparsity), side) <= -margins[name]:
                return reached, name
        reached = sparsity
    return reached, None
