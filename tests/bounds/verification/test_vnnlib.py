"""Properties say exactly what they say in decimals; what is not read is refused by name."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import pytest
import torch

from sparring.bounds import Property, read_vnnlib, results_text
from sparring.bounds.verification._vnnlib import inward, outward
from sparring.errors import UserError

DECLARED = "".join(f"(declare-const {name} Real)\n" for name in ("X_0", "X_1", "Y_0", "Y_1", "Y_2"))
BOX = "(assert (>= X_0 0.1)) (assert (<= X_0 0.3)) (assert (and (<= X_1 1e-1) (>= X_1 -0.5)))\n"


def read(tmp_path: Path, text: str) -> Property:
    (tmp_path / "p.vnnlib").write_text(text)
    return read_vnnlib(tmp_path / "p.vnnlib")


def test_disjunctions_are_cases_with_one_box(tmp_path: Path) -> None:
    found = read(
        tmp_path, DECLARED + BOX + "; a comment (\n(assert (or (and (>= Y_1 Y_0)) (and (>= Y_2 Y_0) (<= Y_2 2.5))))"
    )
    assert (found.inputs, found.outputs, len(found.cases)) == (2, 3, 2)
    one, two = found.cases
    assert one.box is two.box and one.box == ((Fraction("0.1"), Fraction("-0.5")), (Fraction("0.3"), Fraction("0.1")))
    assert one.rows == (({0: 1, 1: -1}, 0),) and two.rows == (({0: 1, 2: -1}, 0), ({2: 1}, Fraction("2.5")))


def test_a_tie_is_a_counter_example_and_nothing_above_is(tmp_path: Path) -> None:
    (case,) = read(tmp_path, DECLARED + BOX + "(assert (>= Y_1 Y_0))").cases
    assert case.satisfied(torch.tensor([1.0, 1.0, 0.0]))
    assert not case.satisfied(torch.tensor([1.0, 1.0, 0.0]).nextafter(torch.tensor([2.0, 0.0, 0.0])))
    assert not case.satisfied(torch.tensor([1.0, torch.nan, 0.0]))


def test_expressions_are_linear(tmp_path: Path) -> None:
    text = "(assert (<= (+ (* 2 Y_0) (- Y_1) (* Y_2 (- 3 1)) 1.5) (- Y_0 0.5)))(assert (<= (* -2 X_0) -0.4))"
    (case,) = read(tmp_path, DECLARED + BOX + text).cases
    assert case.rows == (({0: 1, 1: -1, 2: 2}, -2),)
    assert case.box[0][0] == Fraction("0.2")


def test_boxes_differ_and_empty_ones_are_dropped(tmp_path: Path) -> None:
    either = "(assert (or (and (<= X_0 0.2) (<= Y_0 0)) (and (>= X_0 0.2) (<= Y_1 0)) (and (>= X_0 0.4) (<= Y_2 0))))"
    first, second = read(tmp_path, DECLARED + BOX + either).cases
    assert first.box[1][0] == second.box[0][0] == Fraction("0.2")


def test_the_box_is_rounded_outward_for_proofs_and_inward_for_points(tmp_path: Path) -> None:
    (case,) = read(tmp_path, DECLARED + BOX + "(assert (<= Y_0 0))").cases
    (low, high), (inner_low, inner_high) = outward(case.box), inward(case.box)
    for i in range(2):
        exact = case.box[0][i], case.box[1][i]
        assert Fraction(float(low[i])) <= exact[0] <= Fraction(float(inner_low[i]))
        assert Fraction(float(inner_high[i])) <= exact[1] <= Fraction(float(high[i]))


def test_a_box_without_float32_numbers_has_the_nearest_and_is_written_in_its_own_decimals(tmp_path: Path) -> None:
    text = BOX.replace("0.3", "0.1") + "(assert (<= Y_0 0))"
    (case,) = read(tmp_path, DECLARED + text).cases
    low, high = inward(case.box)
    assert low[0] == high[0] == torch.tensor(0.1)
    written = results_text("falsified", low, torch.zeros(3), case.box)
    assert written.startswith("sat\n((X_0 0.1)\n (X_1 -0.5)\n (Y_0 0.0)") and written.endswith("(Y_2 0.0))\n")


def test_answers_without_a_point() -> None:
    assert [results_text(status) for status in ("verified", "unknown")] == ["unsat\n", "unknown\n"]


REFUSED = {
    "version 2": ("(vnnlib-version <2.0>)(declare-network f)", "VNN-LIB 2"),
    "open": (DECLARED + "(assert (<= X_0 1)", "is truncated"),
    "no parentheses": ("hello", "outside of parentheses"),
    "too deep": ("(" * 100, "nested"),
    "no variable": ("(declare-const Z_0 Real)", "'Z_0' is declared"),
    "a gap": ("(declare-const X_1 Real)(declare-const Y_0 Real)", "not every X_i before it"),
    "an integer": ("(declare-const X_0 Int)", "neither a declaration of a Real"),
    "undeclared": (DECLARED + "(assert (<= X_7 1))", "'X_7' is used"),
    "no bound": (DECLARED + "(assert (<= X_0 1))(assert (<= Y_0 1))", "no lower bound"),
    "mixed": (DECLARED + "(assert (<= X_0 Y_0))", "inputs and outputs"),
    "two inputs": (DECLARED + "(assert (<= X_0 X_1))", "several inputs"),
    "no variable in it": (DECLARED + "(assert (<= 1 2))", "has no variable"),
    "a product": (DECLARED + "(assert (<= (* Y_0 Y_1) 1))", "not a linear expression"),
    "strict": (DECLARED + "(assert (< Y_0 Y_1))", "not '<'"),
    "a word": (DECLARED + "(assert (<= Y_0 one))", "'one' is neither a variable"),
    "a huge number": (DECLARED + "(assert (<= Y_0 1e999))", "nor a number within"),
    "a large number": (DECLARED + "(assert (<= Y_0 (* 1e20 1e20)))", "above 1e30"),
    "too many cases": (
        DECLARED + "(assert (or (<= Y_0 0) (<= Y_0 1)))" * 14, "more than 10000 cases",
    ),
    "nothing": ("", "0 inputs"),
    "not a formula": (DECLARED + "(assert ())", "is not a formula"),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_refusals_say_what_and_why(kind: str, tmp_path: Path) -> None:
    text, reason = REFUSED[kind]
    with pytest.raises(UserError, match=reason):
        read(tmp_path, text)


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        read_vnnlib(tmp_path / "none")
    (tmp_path / "p.vnnlib").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="ASCII"):
        read_vnnlib(tmp_path / "p.vnnlib")
