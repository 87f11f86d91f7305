"""Methods against one another at the same sparsity."""

import numpy as np
import pytest

from sparring import report
from sparring.report.analysis._comparisons import duels, yardstick
from sparring.report.analysis._findings import find
from sparring.report.analysis._records import load
from sparring.statistics import effect, holm

PRUNING = (
    {"label": "gradual", "method": "gradual", "score": "magnitude"},
    {"label": "luck", "method": "gradual", "score": "random"},
)


@pytest.fixture(scope="module")
def findings(make_study):
    folder = make_study(seeds=3, images=60, sparsities=(0.5, 0.9), methods=("gradual", "luck"), pruning=PRUNING)
    return find(load(folder))


def test_a_duel_is_the_paired_difference_over_seeds_and_images(findings):
    accuracy = findings.first("accuracy")
    (duel,) = [d for d in duels(findings) if d.measure == accuracy and d.sparsity == 0.9]
    held = findings.collected[accuracy]
    mine, theirs = (np.stack([held[m, 0.9, k].top for k in range(3)]) for m in ("gradual", "luck"))
    expected = effect(mine - theirs)
    assert (duel.method, duel.against, duel.effect.seeds) == ("gradual", "luck", 3)
    assert duel.effect.estimate == pytest.approx(100 * expected.estimate)
    assert duel.effect.high == pytest.approx(100 * expected.high)


def test_p_values_are_corrected_over_all_duels(findings):
    found = duels(findings)
    assert {d.sparsity for d in found} == {0.5, 0.9} and {d.measure for d in found} == set(findings.main)
    assert [d.p for d in found] == pytest.approx(list(holm([d.effect.p for d in found])))


def test_random_masks_are_the_yardstick_wherever_they_stand(findings):
    assert yardstick(findings) == "luck"
    assert yardstick(findings, "best") is None


def test_without_random_masks_the_headlines_method_is(make_study):
    found = find(load(make_study(seeds=2, images=40, sparsities=(0.5, 0.9), methods=("gradual", "own"))))
    assert yardstick(found) == found.method
    assert {d.method for d in duels(found)} == {"gradual", "own"} - {found.method}


def test_the_page_and_the_ledger_say_it(findings):
    page = report.write(findings.study.folder).read_text()
    assert "Methods at the same sparsity" in page and "gradual − luck" in page
    assert "chosen weights keep more accuracy than random ones (gradual)" in page


def test_one_method_has_no_rival(study_folder):
    assert duels(find(load(study_folder))) == []
    assert "Methods at the same sparsity" not in report.write(study_folder).read_text()
