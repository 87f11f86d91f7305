"""One effect from values of all pairs of some things: pairs that share a member are not independent."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from itertools import combinations

import numpy as np
from scipy import special

from ._effects import Effect, two_sided


def pair_effect(values: Mapping[tuple[int, int], float], *, images: int, level: float = 0.95) -> Effect:
    """Estimate the mean over pairs, as a draw of new members (digits, say) would vary it.

    `values` holds one value for every pair of n members. The model is the diallel cross without parents,
    d[i, j] = μ + g[i] + g[j] + s[i, j]: variances come from its two mean squares, and the interval has n − 1 degrees of
    freedom; the standard error is never below that of independent pairs. The effect's `seeds` counts the pairs, and
    `images` how many images were behind each at most.

    Raises ValueError unless there are four members at least and a finite value for each pair.
    Source: Griffing 1956, method 4, model II.
    """
    members = sorted({member for pair in values for member in pair})
    n = len(members)
    if n < 4 or set(values) != set(combinations(members, 2)) or not all(map(math.isfinite, values.values())):
        raise ValueError("need a finite value for every pair (smaller, larger) of four members at least")
    d = np.array(list(values.values()), dtype=np.float64)
    mean, pairs = float(d.mean()), len(d)
    sums = {m: sum(value for pair, value in values.items() if m in pair) for m in members}
    general = {m: (sums[m] - (n - 1) * mean) / (n - 2) for m in members}
    rest = sum((value - mean - general[i] - general[j]) ** 2 for (i, j), value in values.items())
    ms_rest = rest / (n * (n - 3) / 2)
    ms_general = (n - 2) * sum(g**2 for g in general.values()) / (n - 1)
    crossed = 4 * ms_general / (n * (n - 2)) - 2 * ms_rest / ((n - 1) * (n - 2))
    se = math.sqrt(max(crossed, float(d.var(ddof=1)) / pairs))
    df = n - 1.0
    half = float(special.stdtrit(df, (1 + level) / 2)) * se
    one = Effect(mean, se, df, mean - half, mean + half, math.nan, pairs, images)
    return replace(one, p=two_sided(one))
