from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sparring import report
from sparring.data import Dataset
from sparring.errors import UserError
from sparring.report.analysis._linear import DENSE, PATHS, LinearStudy, linear_claims, r_2, r_inf, read_linear
from sparring.report.analysis._records import load
from sparring.statistics import no_gain
from sparring.study import Plan, run

PATHS_TABLE = {
    "l2": [0.01, 1.0],
    "l1": [0.5, 5.0],
    "magnitude": [0.5, 0.9],
    "classes": [0, 1, 2, 3],
    "eps": [0.1, 0.2],
    "images": 40,
}


def make(out: Path, dataset: Dataset, **changes: Any) -> Path:
    table = {"name": "small", "data": "digits", "model": "linear", "linear": [{**PATHS_TABLE, **changes}]}
    run(Plan.from_table(table), out, dataset=dataset, workers=0)
    report.write(out)
    return out


@pytest.fixture(scope="module")
def folder(few_digits: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("linear-report"), few_digits)


@pytest.fixture(scope="module")
def data(folder: Path) -> LinearStudy:
    return read_linear(load(folder))


def test_the_page_is_whole_and_alone(folder: Path) -> None:
    page = (folder / "report.html").read_text()
    for heading in ("Theory and measurement", "Ledger of claims", "Every step of every path", "Flags", "Methods"):
        assert heading in page
    assert "http" not in page.replace("http://www.w3.org", "").replace("http-equiv", "")
    assert len(list((folder / "figures").glob("*.svg"))) == 5
    assert "Over 6 pairs of classes" in report.verdict(folder)
    assert "0 flags were raised" in report.verdict(folder)


def test_the_ledger_counts_pairs_as_seeds(folder: Path) -> None:
    rows = json.loads((folder / "ledger.json").read_text())
    assert len(rows) == 5 * len(PATHS)
    for row in rows:
        assert {"claim", "verdict", "estimate", "low", "high", "p", "seeds", "images", "study"} <= set(row)
        assert row["seeds"] == 6 and 0 < row["images"] <= 40
        assert row["low"] <= row["estimate"] <= row["high"]


def test_steps_are_chosen_on_validation_images_and_told_on_test_images(data: LinearStudy) -> None:
    value = r_inf(0.1)
    chosen = data.best("logistic", "magnitude", value)
    seen = {
        step: sum(value(group.points[step]["valid"]) for group in data.pairs("logistic"))
        for step in data.steps("logistic", "magnitude")
    }
    assert chosen == max(seen, key=lambda step: seen[step])
    effect = data.effect("logistic", DENSE, r_2())
    assert effect is not None
    assert effect.estimate == pytest.approx(data.mean("logistic", DENSE, r_2()))


@pytest.mark.parametrize("form", ["boxed", "unboxed"])
def test_that_l_2_gains_nothing_is_asked_of_every_step(data: LinearStudy, form: str) -> None:
    asked = [q for q in linear_claims(data) if q.claim.expects == "not above" and "svm" not in q.claim.test]
    asked = [q for q in asked if ("without the box" in q.claim.text) == (form == "unboxed")]
    for path, question in zip(PATHS, asked, strict=True):
        scale = 100 / data.mean("logistic", DENSE, r_2(form))
        steps = [data.effect("logistic", step, r_2(form), DENSE) for step in data.steps("logistic", path)]
        alone = [no_gain(one.scaled(scale), 2.0) for one in steps if one is not None]
        assert len(alone) == len(data.steps("logistic", path)) > 1
        assert question.p_small == max(alone)


def test_results_csv_has_every_number_of_every_classifier(folder: Path, data: LinearStudy) -> None:
    lines = (folder / "results.csv").read_text().splitlines()
    assert lines[0] == "loss,classes,path,step,metric,value"
    group = data.pairs("logistic")[0]
    expected = group.points["magnitude", 0.5]["r_inf_unboxed"]["0.2"]
    assert f"logistic,0 1,magnitude,0.5,r_inf_unboxed.0.2,{expected}" in lines


def test_pairs_that_are_not_all_there_claim_nothing(few_digits: Dataset, tmp_path: Path) -> None:
    out = make(tmp_path / "two", few_digits, classes=[3, 8], l1=[])
    rows = json.loads((out / "ledger.json").read_text())
    assert {row["verdict"] for row in rows} == {"undecided"}
    assert "before all pairs" in report.verdict(out)
    with pytest.raises(UserError, match="linear classifiers"):
        report.read(out)


def test_a_linear_ledger_merges_with_others(folder: Path) -> None:
    rows = json.loads((folder / "ledger.json").read_text())
    twice = report.merge_ledgers([folder, folder])
    merged = [row.as_dict() for row in report.merge_ledgers([folder])]
    assert [{k: v for k, v in row.items() if k not in ("merged", "p_merged")} for row in merged] == rows
    assert [row["merged"] for row in merged] == [row["verdict"] for row in rows], "alone among all"
    assert [one.p for one in twice] == [row["p"] for row in rows + rows], "a contrast counts once"


def test_a_classifier_without_weights_has_an_infinite_bound(few_digits: Dataset, tmp_path: Path) -> None:
    make(tmp_path, few_digits, classes=[3, 8], l2=[1.0], l1=[1e-6, 5.0], magnitude=[])
    assert ">inf<" in (tmp_path / "report.html").read_text()
