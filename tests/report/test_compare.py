"""Comparisons of networks: paired where they may be, judged on the interval's bound."""

import pytest

from sparring import report
from sparring.errors import UnknownNameError, UserError
from sparring.report import Side, broken, compare


@pytest.fixture(scope="module")
def other_folder(make_study):
    return make_study(seeds=2, images=90, sparsities=(0.5, 0.9))


def by_name(differences):
    return {one.metric: one for one in differences}


def test_networks_do_not_differ_from_themselves(study_folder):
    side = Side(study_folder, "gradual", 0.9)
    assert all(one.paired and one.change.estimate == one.change.se == 0 for one in compare(side, side))


def test_a_study_agrees_with_its_own_gains(study_folder):
    change = by_name(compare(Side(study_folder, "control"), Side(study_folder, "gradual", 0.9)))["fgsm-linf-0.1"]
    assert change.paired
    assert change.change.low > 0
    assert change.change.estimate == pytest.approx(100 * (change.second.estimate - change.first.estimate))
    assert change.unit == "points"
    assert repr(change).startswith("fgsm-linf-0.1: ") and repr(change).endswith("] points")


def test_different_images_are_not_paired_and_less_sure(study_folder, other_folder):
    first, second = Side(study_folder, "control"), Side(study_folder, "gradual", 0.9)
    paired = by_name(compare(first, second))["fgsm-linf-0.1"]
    apart = by_name(compare(first, Side(other_folder, "gradual", 0.9)))["fgsm-linf-0.1"]
    assert not apart.paired
    assert apart.change.se > paired.change.se


def test_drops_are_judged_on_the_bound(study_folder):
    differences = compare(Side(study_folder, "control"), Side(study_folder, "gradual", 0.99))
    accuracy = by_name(differences)["accuracy"].change
    assert broken(differences, {"accuracy": 0.01 - accuracy.low}) == []
    (sentence,) = broken(differences, {"accuracy": -0.01 - accuracy.low})
    assert sentence.startswith("Accuracy: ")
    assert "does not rule out" in sentence


def test_what_is_not_there_is_named(study_folder):
    with pytest.raises(UnknownNameError, match="gradual"):
        compare(Side(study_folder, "gradul"), Side(study_folder))
    with pytest.raises(UserError, match=r"no sparsity 0\.7"):
        compare(Side(study_folder, "gradual", 0.7), Side(study_folder))
    with pytest.raises(UnknownNameError, match="accuracy"):
        broken(compare(Side(study_folder), Side(study_folder)), {"acuracy": 1.0})


def test_a_folder_displays_in_a_notebook_and_becomes_rows(study_folder):
    shown = report.read(study_folder)
    html = shown._repr_html_()
    assert "Allowed losses" in html
    assert html.count("<svg") == 6
    rows = shown.rows()
    assert {"method", "sparsity", "seed", "metric", "value"} <= set(rows[0])
    assert len(shown.frame()) == len(rows)
    assert str(shown) == report.verdict(study_folder)
