"""One effect: its estimate, interval and p-value from values of seeds and images.

The model is the crossed one, d[s, i] = μ + a[s] + b[i] + e[s, i]: every seed is tested on the same images, so an image
that is easy for one seed is easy for the others, and averaging over seeds does not remove the variation of images.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special  # not scipy.stats, which takes a second or two to import

LEVEL = 0.95  # coverage of every interval
POWER = 0.8  # power of a study that can detect an effect
INDICATIVE_BELOW = 5  # with fewer seeds than this, a result is called "indicative"
MOST_POINTS = 100.0  # the largest difference of shares of images
LEAST_P = 1e-4  # the smallest p-value: the tails of a few seeds cannot be trusted
LEAST_RATIO = 1e-6  # of a control's mean: zero has no logarithm
MOST_LOG = 300.0  # larger exponentials mean nothing
MOST_SEEDS = 10_000  # the largest number of seeds that is tried
FIRST_LOOK = 0.8  # of alpha: most studies are run as planned and looked at once


def look_price(look: int) -> float:
    """Return the factor of the p-values at the k-th look, from 1.

    Repeated looks at a growing study repeat the chance of an error. The first look uses four fifths of alpha and the
    k-th alpha / (5 k (k - 1)); all possible looks together use alpha, so Bonferroni's inequality holds for any number
    of them. Raises ValueError for k < 1.
    """
    if look < 1:
        raise ValueError(f"looks are counted from 1, not {look}")
    return 1 / FIRST_LOOK if look == 1 else look * (look - 1) / (1 - FIRST_LOOK)


@dataclass(frozen=True)
class Effect:
    """The mean of crossed values with its standard error, interval and two-sided p-value against zero.

    `df` are Satterthwaite's degrees of freedom, for the interval. With one seed the interval covers the choice of
    images only and `p` is NaN. Every p-value is multiplied by `price`, the correction for looks (`look_price`); the
    interval is not corrected for looks.
    """

    estimate: float
    se: float
    df: float
    low: float
    high: float
    p: float
    seeds: int
    images: int
    price: float = 1.0

    @property
    def indicative(self) -> bool:
        """Return whether there are too few seeds for more than an indication."""
        return self.seeds < INDICATIVE_BELOW

    @property
    def df_p(self) -> float:
        """Return the degrees of freedom of p-values: never more than the seeds have.

        Satterthwaite's are estimated and err together with the standard error: if seeds are similar by chance, both are
        too good, and far tails are tens of times too likely. With seeds - 1, the test is exact for normally distributed
        seeds and conservative if images add to the variance. With one seed, only images count.
        """
        return self.df if self.seeds == 1 else min(self.df, self.seeds - 1.0)

    def scaled(self, factor: float) -> Effect:
        """Return the same effect in another unit: times a positive factor."""
        estimate, se, low, high = (factor * v for v in (self.estimate, self.se, self.low, self.high))
        return replace(self, estimate=estimate, se=se, low=low, high=high)

    def priced(self, price: float) -> Effect:
        """Return the same effect with p-values that are multiplied by `price`."""
        one = replace(self, price=price)
        return replace(one, p=two_sided(one)) if self.seeds > 1 else one


def binomial_interval(successes: int, n: int) -> tuple[float, float]:
    """Return the exact 95% (Clopper-Pearson) interval of a proportion, as fractions.

    Raises ValueError unless 0 <= successes <= n and n >= 1. Source: Clopper & Pearson 1934, through the beta quantiles.
    """
    if not 0 <= successes <= n or n < 1:
        raise ValueError(f"{successes} successes of {n}: need 0 <= successes <= n and n >= 1")
    tail = (1 - LEVEL) / 2
    low = special.betaincinv(successes, n - successes + 1, tail) if successes > 0 else 0.0
    high = special.betaincinv(successes + 1, n - successes, 1 - tail) if successes < n else 1.0
    return float(low), float(high)


def effect(values: ArrayLike) -> Effect:
    """Estimate the mean of `values` (seeds, images), with its variation over new seeds and new images.

    The variance is that of the crossed bootstrap (one draw of images for all seeds) in closed form and without its
    bias: (MS_seed + MS_image - MS_rest) / (seeds · images), and at least what the seeds or the images alone give. The
    interval is Student's, with Satterthwaite's degrees of freedom. The p-value has seeds - 1 (`Effect.df_p`) and is at
    least 1e-4; it is 1 if all values are equal. One seed, or copies of one, give the variance of images only and no
    p-value.

    Raises ValueError for fewer than two images or values that are not finite. Sources: Cornfield & Tukey 1956
    (variance); Satterthwaite 1946; Owen 2007 (the crossed bootstrap and its bias).
    """
    d = np.asarray(values, dtype=np.float64)
    if d.ndim != 2 or d.shape[0] < 1 or d.shape[1] < 2:
        raise ValueError(f"values must be (seeds, images) with at least two images, not {d.shape}")
    if not np.isfinite(d).all():
        raise ValueError("values must be finite: omit failed images with ratio_values")
    if len(d) > 1 and (d == d[0]).all() and np.ptp(d) > 0:
        d = d[:1]  # copies of one seed count as one
    seeds, images = d.shape
    return _student(float(d.mean()), *_crossed_error(d), seeds, images)


def _student(estimate: float, se: float, df: float, seeds: int, images: int) -> Effect:
    """Return an effect with Student's interval and p-value."""
    half = float(special.stdtrit(df, (1 + LEVEL) / 2)) * se
    one = Effect(estimate, se, df, estimate - half, estimate + half, math.nan, seeds, images)
    return one.priced(1.0)


def _crossed_error(d: NDArray[np.float64]) -> tuple[float, float]:
    """Return the standard error of the mean of d (seeds, images) and its degrees of freedom."""
    seeds, images = d.shape
    if seeds == 1:
        return float(d.std(ddof=1)) / math.sqrt(images), images - 1.0
    by_seed, by_image = d.mean(axis=1), d.mean(axis=0)
    ms_seed = images * float(by_seed.var(ddof=1))
    ms_image = seeds * float(by_image.var(ddof=1))
    rest = d - by_seed[:, None] - by_image + d.mean()
    ms_rest = float(np.square(rest).sum()) / ((seeds - 1) * (images - 1))
    return error_of(ms_seed, ms_image, ms_rest, seeds, images)


def error_of(ms_seed: float, ms_image: float, ms_rest: float, seeds: int, images: int) -> tuple[float, float]:
    """Return the standard error of a crossed mean and Satterthwaite's degrees of freedom, from its mean squares.

    With fewer than five seeds, their mean square counts twice for the degrees of freedom. Otherwise seeds that are
    similar by chance give too many, and intervals of three seeds that differ by 4 points would cover 92.7%.
    """
    total = max(ms_seed + ms_image - ms_rest, ms_seed, ms_image)
    if total <= 0:
        return 0.0, seeds - 1.0
    se = math.sqrt(total / (seeds * images))
    if seeds == 2:  # Satterthwaite's would be too many: simulated studies then claimed 8% false peaks
        return se, 1.0
    ms_seed *= 2 if seeds < INDICATIVE_BELOW else 1
    total = max(ms_seed + ms_image - ms_rest, ms_seed, ms_image)
    spread = ms_seed**2 / (seeds - 1) + ms_image**2 / (images - 1) + ms_rest**2 / ((seeds - 1) * (images - 1))
    return se, min(max(total**2 / spread, seeds - 1.0), seeds * images - 1.0)


def two_sided(one: Effect) -> float:
    """Return the p-value of "the effect is not zero"."""
    return min(1.0, 2 * _tail(one, -abs(one.estimate)))


def _tail(one: Effect, distance: float) -> float:
    """Return Student's lower tail at a distance from a hypothesis, at least 1e-4 / 2, times the price of the look."""
    if one.se == 0:  # a metric at its end, or copies of a seed: the distance of the true value is unknown
        return 1.0
    return one.price * max(LEAST_P / 2, float(special.stdtr(one.df_p, distance / one.se)))


def ratio_values(numerator: ArrayLike, denominator: ArrayLike) -> NDArray[np.float64]:
    """Return values per image whose mean over the last axis is sum(numerator) / sum(denominator).

    A mean over some of the images (the correctly classified, those on which the attack did not fail) is thus handled
    like any other mean: the values are the ratio plus each image's influence on it (the linearised bootstrap). Shapes
    are equal, (..., images). Raises ValueError if a denominator sums to zero.
    """
    top, bottom = np.asarray(numerator, dtype=np.float64), np.asarray(denominator, dtype=np.float64)
    share = bottom.mean(axis=-1, keepdims=True)
    if (share == 0).any():
        raise ValueError("the mean over zero images is undefined")
    ratio = top.mean(axis=-1, keepdims=True) / share
    return np.asarray(ratio + (top - ratio * bottom) / share)


def log_ratio_values(values: ArrayLike, control: ArrayLike) -> NDArray[np.float64]:
    """Return values whose mean over seeds and images is log(mean of values / mean of control), (..., seeds, images).

    The logarithm is linearised around both means (the delta method), so that an interval of a ratio never reaches below
    zero, and both means count as uncertain. A mean below 1e-6 of the control's counts as 1e-6. Raises ValueError if the
    control's mean is not positive.
    """
    v, c = np.asarray(values, dtype=np.float64), np.asarray(control, dtype=np.float64)
    base = c.mean(axis=(-2, -1), keepdims=True)
    if not (base > 0).all():
        raise ValueError("a ratio needs a control whose mean is positive")
    mean = v.mean(axis=(-2, -1), keepdims=True)
    level = np.maximum(mean, LEAST_RATIO * base)
    return np.asarray(np.log(level / base) + (v - mean) / level - (c - base) / base)


def change(log: float) -> float:
    """Return the logarithm of a ratio as a change in per cent, never below -100."""
    return 100 * math.expm1(min(log, MOST_LOG))


def holm(p: ArrayLike, *, more: int = 0) -> NDArray[np.float64]:
    """Return p-values corrected for their number by Holm's step-down method (Holm 1979); NaN stays and does not count.

    `more` tests, which are no longer made, count as if their p-values were the largest.
    """
    raw = np.asarray(p, dtype=np.float64)
    known = np.flatnonzero(~np.isnan(raw))
    order = known[np.argsort(raw[known], kind="stable")]
    corrected = np.full_like(raw, np.nan)
    steps = raw[order] * np.arange(len(order) + more, more, -1)
    corrected[order] = np.minimum(np.maximum.accumulate(steps), 1.0) if len(order) else steps
    return corrected


def minimum_detectable_effect(one: Effect, *, alpha: float = 0.05) -> float:
    """Return the smallest true effect that would be significant in four of five such studies.

    It is in the effect's own unit, by the noncentral t. Divide alpha by the number of tests for the first step of
    Holm's method.
    """
    critical = special.stdtrit(one.df_p, 1 - alpha / one.price / 2)
    return float(special.nctdtrinc(one.df_p, 1 - POWER, critical)) * one.se


def seeds_needed(one: Effect, *, alpha: float = 0.05) -> int | None:
    """Return about how many seeds would make an effect of this size significant, if all its variation shrank with them.

    This is a lower bound, because the variation over images does not shrink with seeds. It is at least one more than
    now, and None for more than 10,000. It applies to a new study; adding seeds would be another look. Raises ValueError
    for an effect of zero.
    """
    if one.estimate == 0:
        raise ValueError("no number of seeds makes an effect of zero significant")
    more = range(one.seeds + 1, MOST_SEEDS + 1)

    def suffice(seeds: int) -> bool:
        return minimum_detectable_effect(with_seeds(one, seeds), alpha=alpha) <= abs(one.estimate)

    place = bisect.bisect_left(more, True, key=suffice)
    return more[place] if place < len(more) else None


def with_seeds(one: Effect, seeds: int) -> Effect:
    """Return the effect of a new study with this number of seeds, if all its variation shrank with them."""
    df = seeds - 1.0 if one.df_p == one.seeds - 1 else one.df_p  # pairs of few members have fewer
    return replace(one, se=one.se * math.sqrt(one.seeds / seeds), df=df, seeds=seeds).priced(look_price(1))


def equivalence(one: Effect, margin: float) -> float:
    """Return the p-value of "the effect lies within ±margin": two one-sided tests (Schuirmann 1987).

    Raises ValueError unless margin > 0.
    """
    return max(no_gain(replace(one, estimate=-one.estimate), margin), no_gain(one, margin))


def within_points(one: Effect) -> Effect:
    """Return a difference of shares, in points, with an interval limited to possible differences."""
    return replace(one, low=max(one.low, -MOST_POINTS), high=min(one.high, MOST_POINTS))


def no_gain(one: Effect, margin: float) -> float:
    """Return the p-value of "the effect is less than margin", a gain too small to matter or a loss: one one-sided test.

    Raises ValueError unless margin > 0.
    """
    if not margin > 0:
        raise ValueError(f"a margin must be positive, not {margin}")
    return min(1.0, max(LEAST_P, _tail(one, one.estimate - margin)))


def beyond(one: Effect, margin: float) -> float:
    """Return the two-sided p-value of "the effect lies beyond ±margin, on the side where its estimate is"."""
    return min(1.0, 2 * _tail(one, margin - abs(one.estimate)))


def unpaired(first: Effect, second: Effect) -> Effect:
    """Return second − first for two means that share neither seeds nor images (Welch 1947).

    `seeds` and `images` are the smaller of the two.
    """
    variances = first.se**2, second.se**2
    se = math.sqrt(sum(variances))
    spread = sum(v**2 / one.df for v, one in zip(variances, (first, second), strict=True))
    df = se**4 / spread if spread > 0 else min(first.df, second.df)
    fewest = min(first.seeds, second.seeds), min(first.images, second.images)
    return _student(second.estimate - first.estimate, se, df, *fewest)


def pair_effect(values: Mapping[tuple[int, int], float], *, images: int) -> Effect:
    """Estimate the mean over pairs, with its variation over new members (such as digits).

    Pairs that share a member are not independent. `values` has one value for every pair of n members. The model is the
    diallel cross without parents, d[i, j] = μ + g[i] + g[j] + s[i, j]. Variances come from its two mean squares, the
    interval has n − 1 degrees of freedom, and the standard error is at least that of independent pairs. The effect's
    `seeds` is the number of pairs, and `images` the largest number of images of a pair.

    Raises ValueError unless there are at least four members and a finite value for each pair. Source: Griffing 1956,
    method 4, model II.
    """
    members = sorted({member for pair in values for member in pair})
    n = len(members)
    if n < 4 or set(values) != set(combinations(members, 2)) or not all(map(math.isfinite, values.values())):
        raise ValueError("need a finite value for every pair (smaller, larger) of at least four members")
    d = np.array(list(values.values()), dtype=np.float64)
    mean, pairs = float(d.mean()), len(d)
    sums = {m: sum(value for pair, value in values.items() if m in pair) for m in members}
    general = {m: (sums[m] - (n - 1) * mean) / (n - 2) for m in members}
    rest = sum((value - mean - general[i] - general[j]) ** 2 for (i, j), value in values.items())
    ms_rest = rest / (n * (n - 3) / 2)
    ms_general = (n - 2) * sum(g**2 for g in general.values()) / (n - 1)
    crossed = 4 * ms_general / (n * (n - 2)) - 2 * ms_rest / ((n - 1) * (n - 2))
    se = math.sqrt(max(crossed, float(d.var(ddof=1)) / pairs))
    return _student(mean, se, n - 1.0, pairs, images)
