"""Verdicts follow from the effect, the margin and Holm's correction."""

import json

import numpy as np
import pytest

from sparring.statistics import Claim, Effect, effect, judge, reread


def measured(mean, *, seeds=5, noise=0.1) -> Effect:
    rng = np.random.default_rng(7)
    rest = rng.normal(size=(seeds, 200))
    return effect(mean + noise * (rest - rest.mean()))


def verdict(expects, one):
    (row,) = judge([(Claim("c", expects, 0.05, "points", "t"), one)], study="s")
    return row.verdict


@pytest.mark.parametrize(
    ("expects", "mean", "noise", "expected"),
    [
        ("above", 0.2, 0.1, "reproduced"),
        ("above", -0.2, 0.1, "contradicted"),
        ("above", 0.0, 0.1, "contradicted"),
        ("above", 0.01, 3.0, "undecided"),
        ("below", -0.2, 0.1, "reproduced"),
        ("below", 0.2, 0.1, "contradicted"),
        ("none", 0.0, 0.1, "reproduced"),
        ("none", 0.2, 0.1, "contradicted"),
        ("none", 0.01, 3.0, "undecided"),
    ],
)
def test_verdicts(expects, mean, noise, expected):
    assert verdict(expects, measured(mean, noise=noise)) == expected


def test_what_was_not_measured_stays_undecided_and_does_not_count_in_the_correction():
    claim = Claim("c", "above", 0.05, "points", "t")
    rows = judge([(claim, measured(0.2)), (claim, None)], study="s")
    assert (rows[1].verdict, rows[1].p, rows[1].p_small, rows[1].as_dict()["seeds"]) == ("undecided", None, None, 0)
    assert rows[0].p == measured(0.2).p


def test_holm_runs_across_the_ledger():
    claim, weak = Claim("c", "above", 0.001, "points", "t"), Effect(0.1, 0.048, 50.0, 0.004, 0.196, 0.04, 5, 100)
    assert judge([(claim, weak)], study="s")[0].verdict == "reproduced"
    assert judge([(claim, weak)] * 3, study="s")[0].verdict == "undecided"


@pytest.mark.parametrize(
    ("expects", "found"),
    [("above", "contradicted"), ("below", "contradicted"), ("none", "reproduced"), ("not above", "reproduced")],
)  # fmt: skip
def test_holm_runs_across_what_is_too_small_to_matter(expects, found):
    """One test in twenty finds "no effect that matters" by chance: five verdicts in a ledger of a hundred."""
    claim, small = Claim("c", expects, 2.0, "points", "t"), Effect(0.1, 0.95, 50.0, -1.8, 2.0, 0.9, 5, 100)
    alone, *_ = judge([(claim, small)], study="s")
    assert alone.verdict == found
    assert alone.p_small == alone.decisive
    assert 0.017 < alone.p_small < 0.05
    among, *_ = judge([(claim, small)] * 3, study="s")
    assert among.verdict == "undecided"
    assert among.p_small == pytest.approx(3 * alone.p_small)
    size = "less than 2.0 points, by a one-sided test" if expects == "not above" else "within ±2.0 points, by two"
    assert among.why.startswith(size)
    assert "but not after correction" in among.why


def test_the_two_corrections_do_not_pay_for_each_other():
    sharp, strong = Effect(0.0, 0.01, 50.0, -0.02, 0.02, 1.0, 5, 100), Effect(9.0, 4.4, 50.0, 0.16, 17.8, 0.045, 5, 100)
    without = (Claim("c", "above", 0.0, "points", "t"), strong)  # no margin: no test of a small effect
    within, gain = judge([(Claim("d", "none", 2.0, "points", "t"), sharp), without], study="s")
    assert (gain.p, gain.p_small) == (0.09, None)
    assert within.p_small == pytest.approx(judge([(within.claim, sharp)], study="s")[0].p_small)


@pytest.mark.parametrize(
    ("expects", "mean", "noise", "rests"),
    [("above", 0.2, 0.1, "p"), ("above", -0.2, 0.1, "p"), ("above", 0.0, 0.1, "p_small"), ("above", 0.01, 3.0, "p"),
     ("none", 0.0, 0.1, "p_small"), ("none", 0.2, 0.1, "p"), ("not above", -0.2, 0.1, "p_small"),
     ("not above", 0.2, 0.1, "p")],
)  # fmt: skip
def test_the_p_value_shown_is_that_of_the_test_a_verdict_rests_on(expects, mean, noise, rests):
    (row,) = judge([(Claim("c", expects, 0.05, "points", "t"), measured(mean, noise=noise))], study="s")
    assert row.decisive == getattr(row, rests)
    assert row.verdict == "undecided" or row.decisive <= 0.05


def test_few_seeds_are_called_indicative_and_the_undecided_say_what_it_takes():
    (row,) = judge([(Claim("c", "above", 0.001, "points", "t"), measured(0.02, seeds=3, noise=2.0))], study="s")
    assert row.why.startswith("indicative (3 seeds)")
    assert "seeds or more" in row.why


def test_what_no_share_can_differ_by_is_not_promised_to_be_seen():
    wide = Effect(-2.0, 1.6, 1.0, -22.0, 18.0, 0.4, 2, 300)
    points, per_cent = (
        judge([(Claim("c", "above", 2.0, unit, "t"), wide)] * 9, study="s")[0] for unit in ("points", "%")
    )
    assert "would have seen no effect, however large" in points.why
    assert "would have seen an effect of" in per_cent.why


def test_one_seed_decides_nothing():
    (row,) = judge([(Claim("c", "above", 0.001, "points", "t"), measured(0.5, seeds=1))], study="s")
    assert (row.verdict, row.why) == ("undecided", "indicative (1 seed): one seed cannot decide")


def test_a_row_that_was_written_is_judged_again_from_what_it_says():
    asked = [
        (Claim("c", "above", 0.05, "points", "t"), measured(0.2)),
        (Claim("d", "none", 2.0, "%", "u"), measured(0.0)),
        (Claim("e", "not above", 2.0, "%", "v"), None),
    ]
    flat = json.loads(json.dumps([row.as_dict() for row in judge(asked, study="s")]))
    assert [reread(row) for row in flat] == asked
    assert [row["p_alone"] for row in flat[:2]] == [one.p for _, one in asked[:2]]
    del flat[0]["se"]
    with pytest.raises(KeyError, match="se"):
        reread(flat[0])
