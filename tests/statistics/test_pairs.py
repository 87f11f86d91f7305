from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from sparring.statistics import Claim, Effect, ask, effect, judge, pair_effect


def simulated(rng: np.random.Generator, members: int, general: float, special: float) -> dict[tuple[int, int], float]:
    g = rng.normal(0, general, members)
    return {(i, j): g[i] + g[j] + rng.normal(0, special) for i, j in combinations(range(members), 2)}


@pytest.mark.parametrize(("general", "special"), [(1.0, 0.0), (1.0, 1.0), (0.0, 1.0)])
def test_intervals_cover_a_mean_of_zero(general: float, special: float) -> None:
    rng = np.random.default_rng(0)
    found = [pair_effect(simulated(rng, 10, general, special), images=1) for _ in range(1000)]
    covered = np.mean([e.low <= 0 <= e.high for e in found])
    assert covered >= 0.925
    if general:  # as if the pairs were independent, the intervals would be far too short
        values = [np.array([list(simulated(rng, 10, general, special).values())]) for _ in range(300)]
        assert np.mean([(e := effect(v)).low <= 0 <= e.high for v in values]) < 0.85


def test_the_variance_is_that_of_its_model() -> None:
    rng = np.random.default_rng(1)
    found = [pair_effect(simulated(rng, 8, 1.0, 0.5), images=1) for _ in range(2000)]
    assert np.mean([e.se**2 for e in found]) == pytest.approx(np.var([e.estimate for e in found]), rel=0.1)


def test_numbers_and_refusals() -> None:
    constant = dict.fromkeys(combinations(range(4), 2), 2.0)
    one = pair_effect(constant, images=7)
    assert (one.estimate, one.low, one.high, one.p, one.seeds, one.images) == (2.0, 2.0, 2.0, 1.0, 6, 7)
    for values in ({(0, 1): 1.0}, {**constant, (0, 1): np.inf}, {k: v for k, v in constant.items() if k != (1, 2)}):
        with pytest.raises(ValueError, match="every pair"):
            pair_effect(values, images=7)


@pytest.mark.parametrize(
    ("estimate", "se", "verdict"),
    [(-9.0, 1.0, "reproduced"), (0.0, 0.5, "reproduced"), (9.0, 1.0, "opposite"), (1.0, 3.0, "undecided")],
)
def test_a_claim_of_no_gain_is_not_contradicted_by_a_loss(estimate: float, se: float, verdict: str) -> None:
    values = {pair: estimate + v for pair, v in simulated(np.random.default_rng(2), 10, 0, 1).items()}
    shift, scale = estimate - np.mean(list(values.values())), se / pair_effect(values, images=1).se
    one = pair_effect({k: estimate + scale * (v + shift - estimate) for k, v in values.items()}, images=1)
    assert isinstance(one, Effect) and one.se == pytest.approx(se)
    (row,) = judge([ask(Claim("no gain", "not above", 2.0, "%", "a test"), one)], study="s")
    assert row.verdict == verdict
