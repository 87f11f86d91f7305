"""A metric against sparsity: gains over the dense control, their peak, the over-sparsified range and the sweet spot."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from .effects import Effect, effect, holm

__all__ = ["Curve", "Peak", "SweetSpot", "curve", "over_sparsified", "peak", "sweet_spot"]

ALPHA = 0.05


@dataclass(frozen=True, eq=False)
class Curve:
    """Hold the gains over the dense control at rising sparsities.

    `p_holm` are two-sided and corrected across the sparsities; `draws` (sparsities, B) are joint errors of the
    estimates: crossed bootstrap draws, scaled to each effect's standard error and Student's tails.
    """

    sparsities: tuple[float, ...]
    effects: tuple[Effect, ...]
    p_holm: tuple[float, ...]
    draws: NDArray[np.float64]

    def gains(self) -> list[bool]:
        """Tell where the metric is significantly above the dense control."""
        return [p <= ALPHA and e.estimate > 0 for p, e in zip(self.p_holm, self.effects, strict=True)]

    def losses(self) -> list[bool]:
        """Tell where the metric is significantly below the dense control."""
        return [p <= ALPHA and e.estimate < 0 for p, e in zip(self.p_holm, self.effects, strict=True)]


@dataclass(frozen=True)
class Peak:
    """Name the sparsity with the largest gain and every sparsity that may as well hold the largest."""

    sparsity: float
    members: tuple[float, ...]
    gain: Effect


@dataclass(frozen=True)
class SweetSpot:
    """Name the highest sparsity that is safe on every watched metric (None: not even the lowest), and what ends it."""

    sparsity: float | None
    limit: str | None


def curve(
    sparsities: Sequence[float],
    values: ArrayLike,
    control: ArrayLike,
    *,
    generator: np.random.Generator,
    draws: int = 2000,
    level: float = 0.95,
) -> Curve:
    """Compare each sparsity with the dense control, paired by seed and by image.

    `values` is (sparsities, seeds, images), `control` (seeds, images), in the metric's unit; the seeds and images of
    both are the same and in the same order. Raises ValueError for shapes that do not fit, or sparsities not rising.
    """
    v, c = np.asarray(values, dtype=np.float64), np.asarray(control, dtype=np.float64)
    if v.ndim != 3 or v.shape[1:] != c.shape or len(sparsities) != len(v) or len(v) == 0:
        raise ValueError(f"values {v.shape} and control {c.shape} do not fit {len(sparsities)} sparsities")
    if any(a >= b for a, b in itertools.pairwise(sparsities)):
        raise ValueError(f"sparsities must rise: {list(sparsities)}")
    d = v - c
    effects = tuple(effect(one, level=level) for one in d)
    corrected = holm([e.p for e in effects])
    return Curve(tuple(sparsities), effects, tuple(map(float, corrected)), _joint_errors(d, effects, generator, draws))


def _joint_errors(
    d: NDArray[np.float64], effects: Sequence[Effect], generator: np.random.Generator, draws: int
) -> NDArray[np.float64]:
    """Draw errors of all sparsities' estimates together, so that what they share (seeds, images) stays shared.

    Seeds and images are drawn once for all sparsities. Their joint term is left out, as resampling both would count
    the seed-by-image part three times (Owen 2007); each row is then scaled to its effect's own standard error.
    """
    _, seeds, images = d.shape
    of_images = generator.multinomial(images, np.full(images, 1 / images), size=draws).T / images - 1 / images
    errors = d.mean(axis=1) @ of_images
    if seeds > 1:
        of_seeds = generator.multinomial(seeds, np.full(seeds, 1 / seeds), size=draws).T / seeds - 1 / seeds
        errors += d.mean(axis=2) @ (of_seeds * np.sqrt(seeds / (seeds - 1)))
    spread = errors.std(axis=1)
    scale = np.array([e.se / s if s > 0 else 0.0 for e, s in zip(effects, spread, strict=True)])
    df = np.array([e.df for e in effects])[:, None]
    luck = stats.chi2.ppf(generator.random(draws), df) / df
    return np.asarray(errors * scale[:, None] / np.sqrt(luck))


def peak(one: Curve) -> Peak | None:
    """Return the peak of a curve, or None where no gain over the dense control is significant.

    A sparsity belongs to the peak unless some other is significantly better than it (multiple comparison with the best,
    Hsu 1981, with the critical value from the joint draws), so that the set holds the truly best in 95% of studies.
    """
    gains = one.gains()
    if not any(gains):
        return None
    means = np.array([e.estimate for e in one.effects])
    best = max((k for k, gain in enumerate(gains) if gain), key=lambda k: means[k])
    members = tuple(s for k, s in enumerate(one.sparsities) if k == best or _may_be_best(k, means, one.draws))
    return Peak(one.sparsities[best], members, one.effects[best])


def _may_be_best(k: int, means: NDArray[np.float64], draws: NDArray[np.float64]) -> bool:
    """Tell whether no other sparsity is significantly better than the k-th."""
    others = np.delete(draws, k, axis=0) - draws[k]
    if len(others) == 0:
        return True
    lead = np.delete(means, k) - means[k]
    spread = np.maximum(others.std(axis=1), np.finfo(float).tiny)
    critical = np.quantile((others / spread[:, None]).max(axis=0), 1 - ALPHA)
    return bool((lead / spread).max() <= critical)


def over_sparsified(one: Curve) -> float | None:
    """Return the sparsity from which on the metric is significantly below the dense control, or None."""
    first = None
    for sparsity, loss in zip(one.sparsities, one.losses(), strict=True):
        if not loss:
            first = None
        elif first is None:
            first = sparsity
    return first


def sweet_spot(curves: Mapping[str, Curve], margins: Mapping[str, float]) -> SweetSpot:
    """Return the highest sparsity up to which every watched metric's lower bound exceeds minus its margin.

    Margins are in the metrics' units. The sparsities that all curves share are walked upwards and the walk ends at the
    first failure, so neither the many sparsities (a fixed sequence of tests) nor the many metrics (all must pass) need
    a correction. Raises ValueError when there is no metric or a margin is missing.
    """
    if not curves or not set(curves) <= set(margins):
        raise ValueError("every watched metric needs a margin, and there must be one at least")
    reached: float | None = None
    for sparsity in sorted(set.intersection(*(set(c.sparsities) for c in curves.values()))):
        for name, one in curves.items():
            if one.effects[one.sparsities.index(sparsity)].low <= -margins[name]:
                return SweetSpot(reached, name)
        reached = sparsity
    return SweetSpot(reached, None)
