"""Peaks, over-sparsified ranges and sweet spots on planted curves."""

import numpy as np
import pytest

from sparring.statistics import curve, joint_errors, over_sparsified, simultaneous, sweet_spot
from sparring.statistics import peak as peak_of

SPARSITIES = (0.5, 0.8, 0.9, 0.95, 0.99)


def planted(gains, *, seeds=5, images=300, noise=0.3, seed=0):
    """Return a curve with known gains on top of a control that seeds and images vary."""
    rng = np.random.default_rng(seed)
    control = 0.5 + 0.05 * rng.normal(size=(seeds, 1)) + 0.3 * rng.normal(size=(1, images))
    rest = noise * rng.normal(size=(len(gains), seeds, images))
    values = control + np.asarray(gains)[:, None, None] + rest
    return curve(SPARSITIES, values, control)


def peak(one):
    return peak_of(one, generator=np.random.default_rng(9))


def test_no_effect_has_no_peak_and_no_loss():
    flat = planted([0.0] * 5)
    assert peak(flat) is None
    assert over_sparsified(flat) is None


def test_a_planted_peak_is_found_with_its_equals():
    found = peak(planted([0.0, 0.2, 0.202, 0.1, -0.2]))
    assert found is not None
    assert found.sparsity in (0.8, 0.9)
    assert found.members == (0.8, 0.9)
    assert found.gain.low <= 0.202 <= found.gain.high


def test_a_curve_without_noise_has_a_sharp_peak():
    found = peak(planted([0.0, 0.1, 0.2, 0.1, 0.0], noise=0.0))
    assert found is not None
    assert found.members == (0.9,)


def test_over_sparsified_begins_where_losses_stay():
    assert over_sparsified(planted([-0.2, 0.0, 0.0, -0.2, -0.3])) == 0.95
    assert over_sparsified(planted([-0.2, -0.2, -0.2, -0.2, 0.0])) is None


def test_a_loss_within_the_margin_is_no_over_sparsification():
    one = planted([0.0, -0.2, -0.2, -0.2, -0.5], noise=0.1)
    assert [over_sparsified(one, margin) for margin in (0.0, 0.1, 0.4, 0.6)] == [0.8, 0.8, 0.99, None]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("margin", [0.01, 0.03, 0.06])
def test_no_sweet_spot_is_over_sparsified(seed, margin):
    one = planted([-0.01, -0.03, -0.05, -0.07, -0.09], seed=seed, seeds=10)
    spot, over = sweet_spot({"a": one}, {"a": margin}).sparsity, over_sparsified(one, margin)
    assert spot is None or over is None or spot < over


def test_simultaneous_intervals_hold_the_single_ones():
    one = planted([0.0, 0.1, 0.2, 0.1, 0.0])
    for wide, narrow in zip(simultaneous(one, generator=np.random.default_rng(0)), one.effects, strict=True):
        assert wide.low < narrow.low < narrow.estimate < narrow.high < wide.high
        assert wide.p == narrow.p


def test_the_sweet_spot_ends_at_the_first_failure_and_names_it():
    accuracy, robust = planted([0.0, 0.0, 0.0, -0.3, 0.0]), planted([0.1, 0.1, 0.1, 0.1, 0.1], seed=5)
    spot = sweet_spot({"accuracy": accuracy, "robust": robust}, {"accuracy": 0.1, "robust": 0.1})
    assert (spot.sparsity, spot.limit) == (0.9, "accuracy")
    assert sweet_spot({"robust": robust}, {"robust": 0.1}).sparsity == 0.99
    assert sweet_spot({"accuracy": accuracy}, {"accuracy": 0.0}).sparsity is None


def test_fewer_seeds_can_only_make_the_sweet_spot_smaller():
    gains = [0.0, -0.02, -0.04, -0.06, -0.1]
    many = sweet_spot({"a": planted(gains, seeds=8)}, {"a": 0.08}).sparsity
    few = sweet_spot({"a": planted(gains, seeds=2)}, {"a": 0.08}).sparsity
    assert many is not None
    assert few is None or few <= many


def test_a_sweet_spot_needs_metrics_and_margins():
    with pytest.raises(ValueError, match="margin"):
        sweet_spot({}, {})
    with pytest.raises(ValueError, match="margin"):
        sweet_spot({"a": planted([0.0] * 5)}, {"b": 0.1})


def test_draws_carry_each_effects_error_and_what_sparsities_share():
    rng = np.random.default_rng(4)
    shared = rng.normal(size=(5, 200))
    values = np.stack([shared, shared + 0.05 * rng.normal(size=(5, 200))])
    both = curve((0.5, 0.9), values, np.zeros((5, 200)))
    errors = joint_errors(both, generator=rng, draws=4000)
    assert errors.std(axis=1) == pytest.approx([e.se for e in both.effects], rel=0.4)
    assert np.corrcoef(errors)[0, 1] > 0.9


def test_draws_are_the_same_for_the_same_generator():
    one = planted([0.1] * 5)
    first, second = (joint_errors(one, generator=np.random.default_rng(3)) for _ in range(2))
    assert (first == second).all()


@pytest.mark.parametrize("sparsities", [(0.9, 0.5), (0.5, 0.5), (0.5,)])
def test_curves_refuse_what_does_not_fit(sparsities):
    with pytest.raises(ValueError):
        curve(sparsities, np.zeros((2, 3, 4)), np.zeros((3, 4)))


def test_one_seed_claims_nothing():
    one = planted([0.0, 0.2, 0.3, 0.2, -0.3], seeds=1)
    assert peak(one) is None
    assert over_sparsified(one) is None
    spot = sweet_spot({"a": one}, {"a": 1.0})
    assert (spot.sparsity, spot.at_most, spot.limit) == (None, 0.99, "a")
