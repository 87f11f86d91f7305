"""Numbers as the report writes them: gains in points, per cent of the control, or absolute where that is zero."""

import json
from functools import partial

import pytest

from sparring import report
from sparring.report import _numbers as numbers
from sparring.report.analysis._metrics import Measure
from sparring.report.analysis._records import load
from sparring.statistics import Effect

from .rewriting import rewrite

SHARE, DISTANCE = Measure("worst", norm="linf", eps=0.1), Measure("distance", attack="nearest", norm="l2")


def one(estimate: float, low: float, high: float) -> Effect:
    return Effect(estimate, 0.1, 4.0, low, high, 0.5, 5, 100)


@pytest.mark.parametrize(
    ("measure", "control", "gain"),
    [
        (SHARE, 0.5, "+1.2 [−0.4, +2.8] points"),
        (SHARE, 0.0, "+1.2 [−0.4, +2.8] points"),
        (DISTANCE, 0.5, "+1.2% [−0.4, +2.8]"),
        (DISTANCE, 0.0, "+0.012 [−0.004, +0.028] absolute"),
    ],
)
def test_a_gain_has_its_unit(measure: Measure, control: float, gain: str) -> None:
    over = one(control, control, control)
    assert numbers.gain(measure, one(0.012, -0.004, 0.028), over) == gain
    assert numbers.gain_unit(measure, over) in gain


def test_an_interval_that_excludes_zero_does_not_show_it() -> None:
    assert numbers.signed(one(-3.1, -5.96, -0.2), "points") == "−3.1 [−6.0, −0.2] points"
    assert numbers.signed(one(-3.1, -5.96, -0.6), "points") == "−3 [−6, −1] points"
    assert numbers.signed(one(0.0, 0.0, 4.0), "points") == "0 [0, +4] points"


@pytest.mark.parametrize("low", [-0.1, -1.0, -10.0, -700.0])
def test_no_interval_of_a_length_reaches_below_minus_100_per_cent(low: float) -> None:
    """A Lipschitz constant had fallen by 99.3% [−116, −83.1]: a constant below zero."""
    shown = numbers.shown(DISTANCE, one(low / 2, low, 0.1), one(0.5, 0.4, 0.6))
    assert -100 <= shown.low <= shown.estimate < shown.high
    assert len(numbers.signed(numbers.shown(DISTANCE, one(0, low, -low), one(0.5, 0.4, 0.6)), "%")) < 40


@pytest.mark.parametrize(("p", "text"), [(1e-4, "< 1e-4"), (0.0021, "0.0021"), (0.034, "0.034"), (float("nan"), "–")])
def test_no_p_value_is_written_that_seeds_cannot_support(p: float, text: str) -> None:
    assert numbers.p_value(p) == text


@pytest.mark.parametrize(
    ("number", "digits", "text"),
    [(1.0826, 3, "1.083"), (0.01, 3, "0.010"), (0.0, 3, "0.000"), (2.69e-5, 3, "2.7e−05"), (-0.0042, 3, "−0.0042"),
     (0.254, 2, "0.25"), (1 / 255, 2, "0.0039")],
)  # fmt: skip
def test_no_length_is_rounded_to_nothing(number: float, digits: int, text: str) -> None:
    """Certified radii of 2.7e-05 had been written as 0.000, and a step of 1/255 as 0.00."""
    assert numbers.length(number, digits) == text


def test_a_level_keeps_two_digits_of_every_bound() -> None:
    assert numbers.level(DISTANCE, one(2.69e-5, 1.1e-5, 0.25)) == "2.7e−05 [1.1e−05, 0.250]"
    assert numbers.value(DISTANCE, 2.69e-5) == "2.7e−05"


def _shrink_radii_(held, times: float) -> None:  # type: ignore[no-untyped-def]
    held["radius"] *= times


def test_nothing_is_a_per_cent_of_a_certified_radius_of_zero(make_study) -> None:  # type: ignore[no-untyped-def]
    """A radius that rose from 0 to .000006 had been "+0.0006%": within 2%, so contradicted."""
    out = make_study(seeds=3, images=60, sparsities=(0.5, 0.9), extras=True)
    for network in load(out).networks:
        for record in network.stage("certify"):
            rewrite(record, edit=partial(_shrink_radii_, times=0.0 if network.sparsity == 0 else 1e-5))
    report.write(out)
    row = next(r for r in json.loads((out / "ledger.json").read_text()) if r["claim"].startswith("the certified"))
    assert row["unit"] == numbers.ABSOLUTE
    assert 0 < row["estimate"] < 1e-4
    assert row["verdict"] != "contradicted"
