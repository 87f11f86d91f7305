"""Statistics of a study: paired by seed and image, corrected for many sparsities, valid for few seeds.

Pure numpy and scipy. Everything here is a function of arrays of per-image values: a metric is the mean of such an
array, (seeds, images), and a curve is a stack of them, (sparsities, seeds, images).

Examples:
    >>> from sparring.statistics import binomial_interval, holm
    >>> low, high = binomial_interval(50, 100)
    >>> round(low, 3), round(high, 3)
    (0.398, 0.602)
    >>> [round(float(p), 2) for p in holm([0.01, 0.04, 0.03])]
    [0.03, 0.06, 0.06]
"""

from __future__ import annotations

from ._curves import (
    Curve,
    Peak,
    SweetSpot,
    curve,
    joint_errors,
    leave_one_out,
    over_sparsified,
    peak,
    simultaneous,
    sweet_spot,
)
from ._effects import (
    INDICATIVE_BELOW,
    LEAST_P,
    LEAST_RATIO,
    MOST_POINTS,
    Effect,
    beyond,
    binomial_interval,
    change,
    effect,
    equivalence,
    error_of,
    holm,
    log_ratio_values,
    look_price,
    minimum_detectable_effect,
    no_gain,
    pair_effect,
    ratio_values,
    seeds_needed,
    unpaired,
    with_seeds,
    within_points,
)
from ._ledger import Claim, Expects, Origin, Question, Row, Verdict, ask, decide, judge, reread

__all__ = [
    "INDICATIVE_BELOW",
    "LEAST_P",
    "LEAST_RATIO",
    "MOST_POINTS",
    "Claim",
    "Curve",
    "Effect",
    "Expects",
    "Origin",
    "Peak",
    "Question",
    "Row",
    "SweetSpot",
    "Verdict",
    "ask",
    "beyond",
    "binomial_interval",
    "change",
    "curve",
    "decide",
    "effect",
    "equivalence",
    "error_of",
    "holm",
    "joint_errors",
    "judge",
    "leave_one_out",
    "log_ratio_values",
    "look_price",
    "minimum_detectable_effect",
    "no_gain",
    "over_sparsified",
    "pair_effect",
    "peak",
    "ratio_values",
    "reread",
    "seeds_needed",
    "simultaneous",
    "sweet_spot",
    "unpaired",
    "with_seeds",
    "within_points",
]
