"""What one attack proves, another must not deny."""

import numpy as np
import pytest

from sparring import report
from sparring.report import _tables as tables
from sparring.report.analysis._cross_checks import doubts
from sparring.report.analysis._findings import find
from sparring.report.analysis._metrics import pretty
from sparring.report.analysis._records import load

from ..rewriting import records_of, rewrite


def change(out, name, eps, seed, sparsity, edit):
    """Change the tensors of one attack on one network, in all its shards."""
    for record in records_of(out):
        attack = record.inputs.get("attack", {"name": None, "eps": None})
        who = record.inputs["seed"], record.inputs["sparsity"]
        if (*who, attack["name"], attack["eps"]) == (seed, sparsity, name, eps):
            rewrite(record, edit=edit)


def stand(held):
    held["success"][:] = False


def fall(held):
    held["success"][:] = True


def far(held):
    held["distance"][:] = np.where(held["clean_correct"], 10.0, 0.0)


@pytest.mark.parametrize(
    ("name", "eps", "edit", "doubt", "attack"),
    [
        ("pgd", 0.1, stand, "weaker-wins", "pgd"),
        ("fgsm", 0.05, fall, "weaker-wins", "fgsm"),
        ("deepfool", None, far, "contradicted-distance", "deepfool-50"),
        ("standard", 0.1, fall, "outdone", "fast"),
        ("fast", 0.1, fall, "weaker-wins", "pgd"),
        ("square", 0.1, fall, "weaker-wins", "fast"),
    ],
)
def test_an_attack_that_another_one_contradicts_is_doubted(make_study, name, eps, edit, doubt, attack):
    budgets = (
        ("fgsm", 0.05),
        ("fgsm", 0.1),
        ("pgd", 0.1),
        ("pgd", 0.2),
        ("square", 0.1),
        ("fast", 0.1),
        ("standard", 0.1),
    )
    out = make_study(sparsities=(0.5, 0.9), budgets=budgets)
    assert find(load(out)).doubts == ()
    change(out, name, eps, 1, 0.9, edit)
    findings = find(load(out))
    assert {d.who for d in findings.doubts} == {("gradual", 0.9, 1)}
    mine = [d for d in findings.doubts if d.who == ("gradual", 0.9, 1) and d.name == doubt]
    assert attack in {d.attack for d in mine}
    assert doubt in [row[0] for row in tables.flags(findings.study, findings.doubts).rows]
    said = report.verdict(out)
    assert "Unreliable: " in said and f"{pretty(attack)} at 90%" in said
    assert "sparsity, on one network; another" in said


def test_a_naive_attack_is_made_to_be_outdone(make_study):
    out = make_study(seeds=2, sparsities=(0.5, 0.9))
    change(out, "deepfool", None, 1, 0.9, far)
    assert find(load(out)).doubts
    for record in records_of(out):
        if record.inputs.get("attack", {}).get("name") == "deepfool":
            rewrite(record, inputs={**record.inputs, "attack": {**record.attack, "naive": True}})
    assert find(load(out)).doubts == ()


def test_attacks_that_agree_raise_no_doubt(study_folder):
    study = load(study_folder)
    assert doubts(study, find(study).collected) == []
    assert "Unreliable" not in report.verdict(study_folder)


def test_a_single_step_may_find_less_in_a_larger_budget_than_an_ensemble_in_a_smaller_one(make_study):
    out = make_study(sparsities=(0.5, 0.9), budgets=(("fgsm", 0.2), ("fast", 0.1)))
    change(out, "fgsm", 0.2, 1, 0.9, stand)
    assert "fgsm" not in {doubt.attack for doubt in find(load(out)).doubts}
