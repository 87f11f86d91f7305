"""Robustness and ease of verification: brackets that separate, and those that do not."""

import dataclasses

import numpy as np
import pytest

from sparring import report
from sparring.errors import UserError
from sparring.report._tables import verified as table
from sparring.report.analysis._claims import claims
from sparring.report.analysis._comparisons import verified
from sparring.report.analysis._findings import find
from sparring.report.analysis._records import load

from ..rewriting import records_of, rewrite


@pytest.fixture(scope="module")
def folder(make_study):
    return make_study(seeds=3, images=60, sparsities=(0.5, 0.9), extras=True)


@pytest.fixture(scope="module")
def findings(folder):
    return find(load(folder))


def test_only_brackets_that_separate_show_robustness(findings):
    rows = {one.sparsity: one for one in verified(findings)}
    assert [rows[s].told for s in (0.0, 0.5, 0.9)] == ["", "easier to verify", "more robust"]
    assert [rows[s].undecided for s in (0.0, 0.5, 0.9)] == pytest.approx([0.4, 0.3, 0.05])
    least, most = rows[0.9].gap
    assert (least.estimate, most.estimate) == pytest.approx((0.9 - 0.7, 0.95 - 0.3))


def test_a_falling_bracket_is_less_robust_and_a_wide_one_shows_nothing(findings):
    one = next(one for one in verified(findings) if one.sparsity == 0.9)
    below = tuple(dataclasses.replace(e, estimate=-e.estimate, low=-e.high, high=-e.low) for e in one.gap[::-1])
    assert dataclasses.replace(one, gap=below).told == "less robust"
    level = dataclasses.replace(one.eased, low=-0.1, high=0.1)
    assert dataclasses.replace(one, gap=(below[0], one.gap[1]), eased=level).told == "no difference shown"


def test_the_ledger_asks_for_ease_and_for_robustness_apart(findings):
    asked = claims(findings)
    robust = next(q for q in asked if "brackets separate" in q.claim.text)
    assert robust.effect.estimate == pytest.approx(20.0) and robust.p < 0.2 and robust.p_against == 1.0
    easier = next(q for q in asked if "easier to verify" in q.claim.text)
    assert easier.effect.estimate == pytest.approx(60.0) and easier.claim.origin == "later work"
    assert next(q for q in asked if "unstable" in q.claim.text).effect.estimate == pytest.approx(36, abs=1)


def test_undecided_images_prove_neither_a_gain_nor_its_absence(folder, make_study):
    out = make_study(seeds=3, images=60, sparsities=(0.5, 0.9), extras=True)
    for record in records_of(out):
        if record.stage == "verify":
            rewrite(record, edit=lambda held: held["verified_by"].fill(0))
    (robust,) = [q for q in claims(find(load(out))) if "brackets separate" in q.claim.text]
    assert not any(p <= 0.05 for p in (robust.p, robust.p_against, robust.p_small))  # NaN is none


def test_an_attack_within_a_verified_ball_stops_the_report(make_study):
    out = make_study(seeds=2, images=60, sparsities=(0.5, 0.9), extras=True)
    for record in records_of(out):
        if record.stage == "attack" and record.inputs["attack"]["name"] == "deepfool":
            rewrite(record, edit=lambda held: held["distance"].fill(0.19))
    with pytest.raises(UserError, match=r"certified up to l2 0\.2, but an adversarial example"):
        report.write(out)


def test_the_table_has_every_share(findings):
    shown = table(findings)
    row = dict(zip(shown.head, next(r for r in shown.rows if r[2] == "50%"), strict=True))
    assert (row["Verified"], row["Falsified"], row["Undecided"], row["Share decided"]) == (
        "60.0%",
        "10.0%",
        "30.0%",
        "70.0%",
    )
    assert row["Robust accuracy − control, points"] == "−10.0 to +60.0"
    assert np.isfinite(float(row["Stable ReLUs"].rstrip("%")))
