"""Norms, budgets and percentages as people write them."""

from __future__ import annotations

import math

import pytest

from sparring.errors import UserError
from sparring.threat import Threat
from sparring.units import parse_budgets, parse_eps, parse_norm, percent


@pytest.mark.parametrize(
    ("norm", "names"),
    [
        (math.inf, ["linf", "Linf", "l_inf", "L-inf", "inf", " LINF ", "l∞", "ℓ_∞", math.inf]),
        (2.0, ["l2", "L2", "l_2", "2", 2, 2.0]),
        (1.0, ["l1", "L1", "1", 1]),
        (0.0, ["l0", "L0", "ℓ0", "l_0", "0", "0.0", 0, 0.0]),
    ],
)
def test_norms_in_every_spelling(norm: float, names: list[str | float]) -> None:
    assert {parse_norm(name) for name in names} == {norm}


@pytest.mark.parametrize(
    "name", ["l3", "", "l", "nan", False, "linff", "-inf2", True, -1, "-1", "-2", "-inf", -math.inf, "_2", "l--2"]
)
def test_other_norms_are_refused(name: str | float) -> None:
    with pytest.raises(UserError, match="linf, l2, l1, l0"):
        parse_norm(name)


def test_budgets_in_fractions() -> None:
    assert parse_eps("8/255") == 8 / 255 and parse_eps(" 0.1 ") == 0.1 and parse_eps(0) == 0
    assert parse_budgets("8/255, 0.1,,8/255") == (8 / 255, 0.1)
    assert Threat("L2", "1/2") == Threat(2.0, 0.5)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "value",
    [
        "",
        "a",
        "1/0",
        "8/",
        "/255",
        "1/2/3",
        "nan",
        "-0.1",
        "inf",
        "1e999",
        "0.1/-2",
        True,
        "0_1",
        "1_0/255",
        "8/inf",
        "8/1e400",
        "1e-400",
    ],
)
def test_what_is_no_budget_is_refused(value: str) -> None:
    with pytest.raises(UserError, match="eps"):
        parse_eps(value)


@pytest.mark.parametrize("text", ["", " , ", ",,"])
def test_an_empty_list_of_budgets_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="has none"):
        parse_budgets(text)


@pytest.mark.parametrize("decimals", [0, 1, 2])
@pytest.mark.parametrize("share", [0.99999, 0.999999999, 1e-7, 0.00049, 0.9996])
def test_percentages_never_round_to_nothing_or_all(share: float, decimals: int) -> None:
    text = percent(share, decimals)
    assert 0 < float(text.removesuffix("%")) < 100
    assert abs(float(text.removesuffix("%")) / 100 - share) <= 0.5 * min(share, 1 - share)


def test_percentages_are_as_short_as_asked_elsewhere() -> None:
    assert (percent(0.0), percent(1.0), percent(0.6123), percent(-0.5)) == ("0.0%", "100.0%", "61.2%", "-50.0%")
    assert [percent(s, 2, trim=True) for s in (0.9, 0.997, 0.99999, 1.0, 0.0)] == [
        "90%",
        "99.7%",
        "99.999%",
        "100%",
        "0%",
    ]
