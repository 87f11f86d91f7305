"""The effects against closed forms, scipy and simulation."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from sparring.statistics import (
    LEAST_P,
    Claim,
    Effect,
    ask,
    beyond,
    binomial_interval,
    effect,
    equivalence,
    holm,
    judge,
    log_ratio_values,
    look_price,
    minimum_detectable_effect,
    no_gain,
    pair_effect,
    ratio_values,
    seeds_needed,
)


def crossed(rng, seeds, images, *, mean=0.0, a=0.3, b=1.0, e=1.0):
    return (
        mean + a * rng.normal(size=(seeds, 1)) + b * rng.normal(size=(1, images)) + e * rng.normal(size=(seeds, images))
    )


@given(st.integers(1, 500), st.data())
def test_binomial_interval_is_scipys_exact_one(n, data):
    k = data.draw(st.integers(0, n))
    expected = stats.binomtest(k, n).proportion_ci(method="exact")
    assert binomial_interval(k, n) == pytest.approx((expected.low, expected.high), abs=1e-9)


@pytest.mark.parametrize(("successes", "n"), [(-1, 5), (6, 5), (0, 0)])
def test_binomial_interval_refuses_what_is_no_proportion(successes, n):
    with pytest.raises(ValueError, match="successes"):
        binomial_interval(successes, n)


def test_one_seed_is_the_t_interval_over_images():
    d = crossed(np.random.default_rng(0), 1, 40, mean=0.2)
    one = effect(d)
    expected = stats.ttest_1samp(d[0], 0.0)
    interval = expected.confidence_interval()
    assert (one.low, one.high) == pytest.approx((interval.low, interval.high))
    assert one.seeds == 1 and math.isnan(one.p), "one seed bounds images, and decides nothing"
    assert one.indicative


def test_seeds_without_image_spread_are_the_t_interval_over_seeds():
    by_seed = np.array([0.1, 0.4, 0.2, 0.7])
    one = effect(np.tile(by_seed[:, None], (1, 50)))
    expected = stats.ttest_1samp(by_seed, 0.0)
    assert (one.p, one.df) == pytest.approx((expected.pvalue, 3.0))


def test_identical_seeds_add_no_information():
    d = crossed(np.random.default_rng(1), 1, 60)
    one, copies = effect(d), effect(np.repeat(d, 5, axis=0))
    assert copies.se == pytest.approx(one.se)
    assert copies.seeds == 1 and math.isnan(copies.p), "and decide nothing"


@pytest.mark.parametrize("value", [0.0, 0.25])
def test_constant_values_decide_nothing(value):
    one = effect(np.full((3, 10), value))
    assert (one.estimate, one.se, one.low, one.high) == (value, 0.0, value, value)
    assert one.p == no_gain(one, 0.1) == beyond(one, 0.1) == 1.0


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 6), st.floats(-3, 3), st.floats(0.1, 5), st.integers(0, 2**32 - 1))
def test_effects_shift_and_scale_with_the_values(seeds, shift, scale, seed):
    d = crossed(np.random.default_rng(seed), seeds, 30)
    one, moved = effect(d), effect(shift + scale * d)
    assert moved.estimate == pytest.approx(shift + scale * one.estimate, abs=1e-9)
    assert moved.se == pytest.approx(scale * one.se)


@pytest.mark.parametrize("values", [np.zeros(3), np.zeros((2, 1)), np.full((2, 3), np.inf)])
def test_effect_refuses_what_it_cannot_average(values):
    with pytest.raises(ValueError):
        effect(values)


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 12), st.integers(0, 2**32 - 1))
def test_no_p_value_is_below_what_the_seeds_alone_support(seeds, seed):
    """It is Student's with seeds - 1 degrees of freedom, of a standard error that is at least the seeds' own."""
    d = crossed(np.random.default_rng(seed), seeds, 40, mean=0.5, a=0.2)
    one = effect(d)
    assert one.df_p == seeds - 1
    assert one.p == pytest.approx(max(LEAST_P, 2 * stats.t.sf(abs(one.estimate / one.se), seeds - 1)))
    assert one.p >= min(LEAST_P, stats.ttest_1samp(d.mean(axis=1), 0.0).pvalue)


@settings(max_examples=30, deadline=None)
@given(st.floats(0.01, 100), st.integers(1, 6), st.integers(0, 2**32 - 1))
def test_logarithms_of_ratios_are_those_of_the_means_and_forget_the_unit(unit, seeds, seed):
    rng = np.random.default_rng(seed)
    control = rng.gamma(4, size=(seeds, 50))
    values = 0.01 * control * rng.gamma(1, size=(seeds, 50))
    one = effect(log_ratio_values(values, control))
    assert one.estimate == pytest.approx(math.log(values.mean() / control.mean()))
    assert effect(log_ratio_values(unit * values, unit * control)).se == pytest.approx(one.se)
    back = effect(log_ratio_values(control, values))
    assert (back.estimate, back.se) == pytest.approx((-one.estimate, one.se))
    assert 100 * math.expm1(one.low) > -100


def test_a_ratio_needs_a_control_and_what_has_vanished_stays_finite():
    assert effect(log_ratio_values(np.zeros((2, 5)), np.ones((2, 5)))).estimate == pytest.approx(math.log(1e-6))
    with pytest.raises(ValueError, match="positive"):
        log_ratio_values(np.ones((2, 5)), np.zeros((2, 5)))


def test_intervals_cover_at_the_nominal_rate():
    rng = np.random.default_rng(2)
    covered = [(one.low <= 0.5 <= one.high) for one in (effect(crossed(rng, 5, 60, mean=0.5)) for _ in range(600))]
    assert 0.93 <= np.mean(covered) <= 0.98


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_lies_between_raw_and_bonferroni(p):
    corrected, raw = holm(p), np.array(p)
    assert (corrected >= raw).all()
    assert (corrected <= np.minimum(raw * len(p), 1)).all()
    assert (np.diff(corrected[np.argsort(raw, kind="stable")]) >= 0).all()


def test_holm_by_hand_and_with_a_gap():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.01, math.nan, 0.03]) == pytest.approx([0.02, math.nan, 0.03], nan_ok=True)


def test_ratio_values_average_to_the_ratio_and_have_its_jackknife_error():
    rng = np.random.default_rng(3)
    counted = (rng.random(400) < 0.8).astype(float)
    distance = counted * rng.gamma(4, size=400)
    values = ratio_values(distance, counted)
    assert values.mean() == pytest.approx(distance.sum() / counted.sum())
    left_out = [np.delete(distance, i).sum() / np.delete(counted, i).sum() for i in range(400)]
    jackknife = math.sqrt(399 / 400 * np.square(left_out - np.mean(left_out)).sum())
    assert values.std(ddof=1) / math.sqrt(400) == pytest.approx(jackknife, rel=0.01)


def test_ratio_values_refuse_a_mean_over_nothing():
    with pytest.raises(ValueError, match="over zero images"):
        ratio_values(np.zeros(4), np.zeros(4))


def test_the_minimum_detectable_effect_is_detected_at_its_power():
    one = Effect(estimate=0.0, se=0.1, df=20.0, low=-0.2, high=0.2, p=1.0, seeds=5, images=100)
    least = minimum_detectable_effect(one)
    reach = stats.nct.sf(stats.t.ppf(0.975, 4), 4, least / one.se)
    assert reach == pytest.approx(0.8, abs=1e-4)


def test_seeds_needed_grow_as_the_effect_shrinks():
    large = Effect(0.2, 0.1, 20.0, 0.0, 0.4, 0.06, 5, 100)
    small = Effect(0.05, 0.1, 20.0, -0.15, 0.25, 0.6, 5, 100)
    assert 5 < seeds_needed(large) < seeds_needed(small)
    with pytest.raises(ValueError, match="zero"):
        seeds_needed(Effect(0.0, 0.1, 20.0, -0.2, 0.2, 1.0, 5, 100))
    assert seeds_needed(Effect(1e-9, 0.1, 20.0, -0.2, 0.2, 1.0, 5, 100)) is None


@settings(max_examples=30, deadline=None)
@given(st.floats(0.02, 0.5), st.sampled_from([0.05, 0.005, 3e-4]))
def test_so_many_seeds_as_are_needed_suffice_and_one_less_does_not(estimate, alpha):
    one = Effect(estimate, 0.1, 4.0, 0.0, 1.0, 0.5, 5, 100)
    needed = seeds_needed(one, alpha=alpha)

    def detects(seeds):
        more = Effect(estimate, 0.1 * math.sqrt(5 / seeds), seeds - 1.0, 0.0, 1.0, 0.5, seeds, 100)
        return minimum_detectable_effect(more, alpha=alpha / look_price(1)) <= estimate

    assert detects(needed)
    assert needed == 6 or not detects(needed - 1)


@settings(max_examples=50, deadline=None)
@given(st.floats(-0.3, 0.3), st.floats(0.01, 0.2), st.floats(0.01, 0.3))
def test_equivalence_is_the_ninety_percent_interval_inside_the_margin(estimate, se, margin):
    one = Effect(estimate, se, 12.0, 0.0, 0.0, 1.0, 5, 100)
    half = float(stats.t.ppf(0.95, 4)) * se
    inside = -margin < estimate - half and estimate + half < margin
    assert (equivalence(one, margin) < 0.05) == inside


def test_equivalence_needs_a_margin():
    with pytest.raises(ValueError, match="margin"):
        equivalence(Effect(0.0, 0.1, 12.0, -0.2, 0.2, 1.0, 5, 100), 0.0)


def test_all_looks_together_spend_alpha_and_the_first_most_of_it():
    spent = [1 / look_price(k) for k in range(1, 10_001)]
    assert spent[0] == pytest.approx(0.8)
    assert all(a > b for a, b in itertools.pairwise(spent))
    assert sum(spent) == pytest.approx(1 - 0.2 / 10_000)
    with pytest.raises(ValueError, match="from 1"):
        look_price(0)


# -- pairs that share members -----------------------------------------------------------------------------------------


def simulated(rng: np.random.Generator, members: int, general: float, special: float) -> dict[tuple[int, int], float]:
    g = rng.normal(0, general, members)
    return {(i, j): g[i] + g[j] + rng.normal(0, special) for i, j in itertools.combinations(range(members), 2)}


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
    constant = dict.fromkeys(itertools.combinations(range(4), 2), 2.0)
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
    shift, scale = estimate - float(np.mean(list(values.values()))), se / pair_effect(values, images=1).se
    one = pair_effect({k: estimate + scale * (v + shift - estimate) for k, v in values.items()}, images=1)
    assert isinstance(one, Effect) and one.se == pytest.approx(se)
    (row,) = judge([ask(Claim("no gain", "not above", 2.0, "%", "a test"), one)], study="s")
    assert row.verdict == verdict
