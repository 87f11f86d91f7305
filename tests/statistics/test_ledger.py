"""Verdicts follow from the effect, the margin, the family and what the attacks' flags say."""

import itertools
import json
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparring.statistics import Claim, Effect, ask, effect, judge, reread


def measured(mean, *, seeds=5, noise=0.1) -> Effect:
    rng = np.random.default_rng(7)
    rest = rng.normal(size=(seeds, 200))
    return effect(mean + noise * (rest - rest.mean()))


def claim(expects="above", margin=0.05, **others) -> Claim:
    return Claim("c", expects, margin, others.pop("unit", "points"), "t", **others)


def sure(estimate, p=None, *, seeds=5) -> Effect:
    """Return an effect whose p-value is given, by the standard error."""
    return Effect(estimate, 1.0, seeds - 1.0, estimate - 1, estimate + 1, 1.0 if p is None else p, seeds, 100)


def one_row(expects, one, **others):
    (row,) = judge([ask(claim(expects), one, **others)], study="s")
    return row


VERDICTS = [
    ("above", 0.2, 0.1, "reproduced", "p"),
    ("above", -0.2, 0.1, "opposite", "p_against"),
    ("above", 0.0, 0.1, "no effect that matters", "p_small"),
    ("above", 0.01, 3.0, "undecided", "p"),
    ("below", -0.2, 0.1, "reproduced", "p"),
    ("below", 0.2, 0.1, "opposite", "p_against"),
    ("below", 0.0, 0.1, "no effect that matters", "p_small"),
    ("none", 0.0, 0.1, "reproduced", "p_small"),
    ("none", 0.2, 0.1, "opposite", "p_against"),
    ("none", 0.01, 3.0, "undecided", "p"),
    ("not above", 0.0, 0.1, "reproduced", "p_small"),
    ("not above", -0.2, 0.1, "reproduced", "p_small"),
    ("not above", 0.2, 0.1, "opposite", "p_against"),
]


@pytest.mark.parametrize(("expects", "mean", "noise", "expected", "rests"), VERDICTS)
def test_verdicts_and_the_p_value_that_each_rests_on(expects, mean, noise, expected, rests):
    row = one_row(expects, measured(mean, noise=noise))
    assert row.verdict == expected
    assert row.decisive == getattr(row, rests)
    assert row.verdict == "undecided" or row.decisive <= 0.05


@pytest.mark.parametrize(("expects", "mean", "noise", "expected", "_"), VERDICTS)
def test_an_attack_in_doubt_decides_nothing(expects, mean, noise, expected, _):
    row = one_row(expects, measured(mean, noise=noise), doubt="masked-gradients (PGD-40)")
    assert row.told == "undecided, attack unreliable"
    assert "masked-gradients (PGD-40)" in row.why


def test_what_holds_nowhere_must_fail_at_every_sparsity():
    small, unclear, gone = (measured(mean, noise=noise) for mean, noise in ((0.0, 0.1), (0.02, 3.0), (-0.3, 0.1)))
    assert one_row("above", small, curve=(small, gone)).verdict == "no effect that matters"
    assert one_row("above", small, curve=(small, unclear)).verdict == "undecided"
    assert one_row("above", gone, curve=(gone, small)).verdict == "no effect that matters"
    assert one_row("above", gone, curve=(gone, gone)).verdict == "opposite"
    assert one_row("above", gone, curve=(gone, unclear)).verdict == "undecided"


def test_what_is_claimed_to_hold_nowhere_is_reproduced_only_if_it_holds_nowhere():
    small, unclear, gone, gain = (measured(m, noise=n) for m, n in ((0.0, 0.1), (0.02, 3.0), (-0.3, 0.1), (0.3, 0.1)))
    assert one_row("not above", gone, curve=(gone, small)).verdict == "reproduced"
    assert one_row("not above", gone, curve=(gone, unclear)).verdict == "undecided"
    assert one_row("not above", gone, curve=(gone, gain)).verdict == "undecided"
    assert one_row("not above", gain, curve=(gain, gone)).verdict == "opposite"
    assert one_row("none", gain, curve=(gain, small)).verdict == "opposite"
    assert one_row("none", small, curve=(gain, small)).verdict == "undecided"


def test_a_loss_where_one_looked_settles_nothing_about_a_gain_elsewhere():
    gone, unclear = measured(-0.3), measured(0.02, noise=3.0)
    for expects in ("above", "not above"):
        assert ask(claim(expects), gone).p_done < 0.05
        assert ask(claim(expects), gone, curve=(gone, unclear)).p_done > 0.05


def test_a_choice_on_the_tests_own_images_is_paid_for():
    one = measured(0.2, noise=0.3)
    free, paid = (ask(claim(), one, choices=choices) for choices in (1, 11))
    assert paid.p == pytest.approx(min(1.0, 11 * free.p))
    assert paid.p_done >= free.p_done


def test_what_was_not_measured_stays_undecided_and_does_not_count():
    rows = judge([ask(claim(), measured(0.2)), ask(claim(), None)], study="s")
    assert (rows[1].verdict, rows[1].p, rows[1].p_small, rows[1].as_dict()["seeds"]) == ("undecided", None, None, 0)
    assert rows[0].p == measured(0.2).p


def test_one_seed_decides_nothing_has_no_p_and_does_not_count():
    alone, many = ask(claim(), measured(0.5, seeds=1)), ask(claim(), measured(0.02, noise=0.3))
    first, second = judge([alone, many], study="s")
    assert (first.verdict, first.p, first.decisive) == ("undecided", None, None)
    assert first.why == "indicative (1 seed): one seed cannot decide"
    assert second.p == judge([many], study="s")[0].p


def test_the_number_of_claims_is_corrected_and_repeated_contrasts_count_once():
    weak = [Effect(0.1 + k / 1e6, 0.03, 50.0, 0.04, 0.16, 0.03, 5, 100) for k in range(3)]
    assert judge([ask(claim(margin=0.0), weak[0])], study="s")[0].verdict == "reproduced"
    assert judge([ask(claim(margin=0.0), weak[0])] * 3, study="s")[0].verdict == "reproduced"
    assert judge([ask(claim(margin=0.0), one) for one in weak], study="s")[0].verdict == "undecided"


def primary(one):
    return ask(claim(margin=0.001, primary=True), one)


def other(one):
    return ask(claim(margin=0.001), one)


def test_the_primary_family_is_tested_first_whatever_the_rest_holds():
    one = measured(0.02, noise=0.2)
    few = judge([primary(one)], study="s")[0]
    many = judge([primary(one), *(other(measured(0.001 * k)) for k in range(1, 60))], study="s")[0]
    assert (few.verdict, few.p) == (many.verdict, many.p)


def test_the_rest_waits_until_a_primary_claim_is_settled():
    unsettled, settled, clear = measured(0.001, noise=1.0), measured(0.5), measured(0.3)
    waiting = judge([primary(unsettled), other(clear)], study="s")[1]
    assert waiting.verdict == "undecided" and "no primary claim is settled" in waiting.why
    assert judge([primary(settled), other(clear)], study="s")[1].verdict == "reproduced"
    assert judge([primary(settled), primary(unsettled), other(clear)], study="s")[2].verdict == "reproduced"


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0.001, 0.2), min_size=1, max_size=8), st.lists(st.floats(0.001, 0.2), max_size=8))
def test_corrected_p_values_rise_with_the_raw_ones_and_never_fall_below_them(first, rest):
    asked = [ask(claim(margin=0.0, primary=k < len(first)), sure(1 + k / 100, p)) for k, p in enumerate(first + rest)]
    rows = judge(asked, study="s")
    for family in (rows[: len(first)], rows[len(first) :]):
        ordered = sorted(family, key=lambda row: row.question.p)
        assert all(row.p >= row.question.p for row in family)
        assert all(a.p <= b.p for a, b in itertools.pairwise(ordered))
    assert min(row.p for row in rows[: len(first)]) == pytest.approx(min(1.0, min(first) * len(first)))


def test_few_seeds_are_called_indicative_and_the_undecided_say_what_it_takes():
    (row,) = judge([ask(claim(margin=0.001), measured(0.02, seeds=3, noise=2.0))], study="s")
    assert row.why.startswith("indicative (3 seeds)")
    assert "seeds or more" in row.why
    assert one_row("above", measured(0.5, seeds=3)).told == "reproduced, indicative"


def test_what_no_share_can_differ_by_is_not_promised_to_be_seen():
    wide = [Effect(-2.0 - k / 1e6, 1.6, 1.0, -22.0, 18.0, 0.4, 2, 300) for k in range(9)]
    points, per_cent = (
        judge([ask(claim(unit=unit, margin=2.0), one) for one in wide], study="s")[0] for unit in ("points", "%")
    )
    assert "no effect of any size could have been detected" in points.why
    assert "detectable: " in per_cent.why


def test_ratios_are_shown_as_changes_in_percent_and_never_fall_below_minus_100():
    log = Effect(-460.0, 100.0, 4.0, -740.0, -180.0, 0.01, 5, 100)
    (row,) = judge([ask(claim("below", 2.0, unit="%", log=True), log)], study="s")
    assert row.effect.estimate == pytest.approx(100 * (math.exp(-4.6) - 1))
    assert -100 < row.effect.low < row.effect.estimate < row.effect.high < 0
    assert row.claim.limit == pytest.approx(100 * math.log(1.02))


def test_a_row_that_was_written_is_judged_again_from_what_it_says():
    asked = [
        ask(claim(primary=True, origin="paper"), measured(0.2), curve=(measured(0.1),), choices=3),
        ask(claim("none", 2.0, unit="%", log=True), measured(0.01)),
        ask(claim("not above", 2.0, unit="%"), None),
        replace(ask(claim(), measured(0.1, seeds=1), doubt="partial-gradients"), failed=(0.02, 0.0)),
    ]
    flat = json.loads(json.dumps([row.as_dict() for row in judge(asked, study="s")]))
    again = [row.as_dict() for row in judge([reread(row) for row in flat], study="s")]
    for row, other_row in zip(flat, again, strict=True):
        assert {k: v for k, v in row.items() if isinstance(v, str)} == {
            k: v for k, v in other_row.items() if isinstance(v, str)
        }
        numbers = [k for k, v in row.items() if isinstance(v, float)]
        assert [row[k] for k in numbers] == pytest.approx([other_row[k] for k in numbers])
    del flat[0]["se"]
    with pytest.raises(KeyError, match="se"):
        reread(flat[0])


SETTINGS = {"spread": 1.0, "half": 0.5}


@pytest.mark.parametrize("truth", [0.0, 2.0])
def test_a_small_ledger_of_fixed_seeds_is_wrong_in_at_most_one_study_of_twenty(truth):
    """400 ledgers of 12 claims: nothing is there, or everything lies exactly on the margin."""
    rng, wrong = np.random.default_rng(20), 0
    for _ in range(400):
        rows = []
        for k in range(12):
            by_seed = truth + rng.normal(size=3) * SETTINGS["spread"] + rng.normal() * SETTINGS["half"]
            one = effect(by_seed[:, None] + 3 * rng.normal(size=(1, 30)) + 10 * rng.normal(size=(3, 30)))
            rows.append(ask(claim(margin=2.0, primary=k < 4), one))
        bad = ("reproduced", "opposite") if truth == 0 else ("no effect that matters", "opposite")
        wrong += any(row.verdict in bad for row in judge(rows, study="s"))
    assert wrong <= 400 * 0.05 + 3 * math.sqrt(400 * 0.05 * 0.95)
