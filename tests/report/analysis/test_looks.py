"""A study's looks: counted, paid for, told; what a plan drops stays among the tests, and registration is seen."""

import json
import math
import shutil

import pytest

from sparring import report
from sparring.errors import DamageError, PlanError
from sparring.history import append_entry, read_history
from sparring.report.analysis._claims import claims
from sparring.report.analysis._findings import find
from sparring.report.analysis._looks import dropped_tests, look_sentences, open_study
from sparring.statistics import look_price
from sparring.study import Plan, merge, register, run

ATTACKS = [{"name": "fgsm", "eps": [0.1], "images": 40}, {"name": "pgd", "steps": 4, "eps": [0.1], "images": 40}]


def plan(**changes):
    table = {
        "name": "tiny",
        "data": "digits",
        "model": {"name": "mlp", "widths": [16]},
        "seeds": 2,
        "sparsities": [0.5, 0.8, 0.9],
        "recipe": {"epochs": 1, "lr": 0.05},
        "finetune": {"epochs": 1},
        "pruning": [{"label": "magnitude"}],
        "attacks": ATTACKS,
        "margins": {"accuracy": 0.9},  # every sparsity counts as appropriate
        "shard": 40,
        "batch_size": 10,
    }
    return Plan.from_table({**table, **changes})


@pytest.fixture(scope="module")
def told(tmp_path_factory, few_digits):
    """Return the folder of a study that was shrunk, grown and grown again, and its verdict after each."""
    out = tmp_path_factory.mktemp("looks") / "out"
    verdicts = []
    for changes in ({}, {"sparsities": [0.8]}, {}, {"seeds": 3}, {"seeds": 3}):
        run(plan(**changes), out, dataset=few_digits, workers=0)
        verdicts.append(report.verdict(out))
    report.write(out)
    return out, verdicts


def test_a_study_that_shrinks_and_grows_tells_its_history(told):
    first, shrunk, back, grown, again = told[1]
    assert "First look: 2 seeds; p-values are multiplied by 1.25." in first
    assert "Second look: 2 seeds; " in shrunk and "p-values are multiplied by 10." in shrunk
    assert "records belong to tasks that are no longer in the plan; magnitude at 50%, 90% was dropped" in shrunk
    assert "First look of 2 at this folder" in back and "multiplied by 1.25" in back
    assert "Third look: 2, 3 seeds; 1 of the looks had other sparsities; p-values are multiplied by 30" in grown
    assert again == grown, "the same plan and records are the same look"
    assert all("not registered" in verdict for verdict in told[1])


def test_every_change_of_plan_or_records_is_one_entry(told):
    entries = read_history(told[0])
    assert [entry["look"] for entry in entries] == [1, 2, 1, 3]
    assert [entry["seeds"] for entry in entries] == [2, 2, 2, 3]
    assert [len(entry["sparsities"]["magnitude"]) for entry in entries] == [3, 1, 3, 3]
    assert all(0 <= test["p"] <= 1 for entry in entries for test in entry["tests"].values())
    assert len({entry["state"] for entry in entries}) == 3


def test_the_candidates_of_a_choice_are_no_records_of_another_plan(few_digits, tmp_path):
    controls = {"decays": [1e-4, 1e-3], "small_dense": [0.5]}
    model = {"name": "mlp", "widths": [32]}
    run(plan(controls=controls, model=model), tmp_path, dataset=few_digits, workers=0)
    study = open_study(tmp_path)
    assert study.looks.orphans == 0 and not study.looks.dropped
    assert len(list((tmp_path / "records").glob("*.json"))) > len(study.records), "candidates have records"


def test_the_page_shows_every_look_and_the_last_hash(told):
    page = (told[0] / "report.html").read_text()
    assert 'id="looks"' in page and "Third look: 2, 3 seeds" in page
    for entry in read_history(told[0]):
        assert entry["time"] in page
    assert read_history(told[0])[-1]["sha256"] in page


def test_reading_a_report_again_and_again_is_one_look(told, tmp_path):
    out = shutil.copytree(told[0], tmp_path / "out")
    before = (out / "history.jsonl").read_bytes()
    page = (out / "report.html").read_bytes()
    report.write(out)
    report.read(out)
    report.merge_ledgers([out])
    assert (out / "history.jsonl").read_bytes() == before
    assert (out / "report.html").read_bytes() == page


def test_a_dropped_sparsity_and_a_dropped_test_still_count(told, tmp_path, few_digits):
    out = shutil.copytree(told[0], tmp_path / "out")
    run(plan(seeds=3, sparsities=[0.8], attacks=ATTACKS[:1]), out, dataset=few_digits, workers=0)
    study = open_study(out)
    assert study.looks.dropped == {"magnitude": (0.5, 0.9)}
    found = find(study)
    gains = found.result(found.first("budget", "fgsm")).gains
    (one,) = gains.effects
    assert one.price == look_price(4)
    assert gains.p_holm[0] == pytest.approx(min(1.0, 3 * one.p))
    alone = one.priced(1.0)
    assert one.p == pytest.approx(min(1.0, look_price(4) * alone.p))
    gone = dropped_tests(study, claims(found))
    assert len(gone) >= 2, "of PGD and of the worst case nothing is asked any more"
    gains = [q for q in claims(found) if "gain" in q.claim.text and q.effect is not None]
    assert gains and all(math.isnan(q.p_small) and math.isnan(q.p_against) for q in gains), (
        "what is not so at a sparsity that was dropped cannot be known any more"
    )


def test_records_tell_of_sparsities_that_no_report_was_made_of(tmp_path, few_digits):
    for sparsities in ([0.5, 0.8], [0.8]):
        run(plan(sparsities=sparsities), tmp_path / "out", dataset=few_digits, workers=0)
    assert open_study(tmp_path / "out").looks.dropped == {"magnitude": (0.5,)}


def test_titles_change_no_look(told, tmp_path, few_digits):
    out = shutil.copytree(told[0], tmp_path / "out")
    run(plan(seeds=3, title="Another title"), out, dataset=few_digits, workers=0)
    report.verdict(out)
    assert len(read_history(out)) == 4


def test_a_broken_history_is_refused_and_one_that_was_removed_is_told_of(told, tmp_path, few_digits):
    out = shutil.copytree(told[0], tmp_path / "out")
    path = out / "history.jsonl"
    path.write_text(path.read_text().replace('"seeds":2', '"seeds":9', 1))
    with pytest.raises(DamageError, match="line 1"):
        report.write(out)
    with pytest.raises(DamageError, match="line 1"):
        run(plan(seeds=3), out, dataset=few_digits, workers=0)
    path.unlink()
    verdict = report.verdict(out)
    assert "a report was written before this history began, so earlier looks are unknown" in verdict
    assert report.publish(out)[1] == verdict


def test_a_look_that_no_version_wrote_is_refused(told, tmp_path):
    out = shutil.copytree(told[0], tmp_path / "out")
    append_entry(out, {"kind": "look", "look": "fifth"})
    with pytest.raises(DamageError, match="an invalid entry"):
        report.write(out)


def test_a_registered_plan_is_told_and_so_is_what_changed_since(tmp_path, few_digits):
    out = tmp_path / "out"
    entry = register(plan(), out)
    assert register(plan(), out) == entry, "once is enough"
    run(plan(), out, dataset=few_digits, workers=0)
    assert register(plan(), out) == entry, "the same plan goes on"
    verdict = report.verdict(out)
    assert (
        f"registered before the first record, on {entry['time']} ({entry['plan'][:12]}), and has not changed since."
        in verdict
    )
    with pytest.raises(PlanError, match="has records already"):
        register(plan(seeds=3), out)
    run(plan(seeds=3, sparsities=[0.8]), out, dataset=few_digits, workers=0)
    assert "changed since: seeds, sparsities." in report.verdict(out)


def test_a_merged_study_has_the_looks_of_its_parts(tmp_path, few_digits):
    parts = [tmp_path / name for name in "ab"]
    for out, sparsities in zip(parts, ([0.5], [0.8]), strict=True):
        run(plan(sparsities=sparsities), out, dataset=few_digits, workers=0)
        report.verdict(out)
    merge(parts, tmp_path / "c")
    assert "Third look" in look_sentences(open_study(tmp_path / "c"))[0]
    report.verdict(tmp_path / "c")
    merge(parts, tmp_path / "c")
    assert [entry["look"] for entry in read_history(tmp_path / "c")] == [1, 2, 3]


def test_a_ledger_row_keeps_the_price_of_its_look(told):
    rows = json.loads((told[0] / "ledger.json").read_text())
    assert {row["price"] for row in rows if row["estimate"] is not None} == {look_price(3)}
    again = report.merge_ledgers([], earlier=told[0] / "ledger.json")
    assert [row.p for row in again] == [row["p"] for row in rows]
