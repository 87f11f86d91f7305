"""The ledger's claims, the brackets around the truth, and ledgers of several studies in one."""

import dataclasses
import json

import numpy as np
import pytest

from sparring import report
from sparring.errors import UserError
from sparring.report.analysis._claims import claims, ledger, places
from sparring.report.analysis._comparisons import brackets
from sparring.report.analysis._cross_checks import suspicion
from sparring.report.analysis._findings import choose, find
from sparring.report.analysis._looks import dropped_tests, note_look, open_study
from sparring.report.analysis._metrics import Measure, collect, parts
from sparring.report.analysis._records import load

from ..rewriting import records_of, rewrite, rewrite_plan

FGSM = Measure("budget", "test", "fgsm", "fgsm", "linf", 0.1)

PRUNING = (
    {"label": "gradual", "method": "gradual", "score": "magnitude"},
    {"label": "luck", "method": "gradual", "score": "random"},
    {"label": "not random", "method": "gradual", "structure": "channels"},
    {"label": "top-k channels", "method": "dns"},
)
METHODS = (*(table["label"] for table in PRUNING), "small dense", "tuned decay")


@pytest.fixture(scope="module")
def folder(make_study):
    return make_study(seeds=3, images=60, sparsities=(0.5, 0.9), methods=METHODS, extras=True, pruning=PRUNING)


@pytest.fixture(scope="module")
def rows(folder):
    return [row.as_dict() for row in ledger(find(load(folder)))]


def test_kinds_come_from_the_plan_not_from_the_words_of_a_label(folder):
    study = load(folder)
    kinds = {method: study.kind(method) for method in study.methods if method != "top-k channels"}
    assert kinds == {
        "gradual": "pruned",
        "luck": "random",
        "not random": "channels",
        "small dense": "small dense",
        "tuned decay": "tuned decay",
    }


@pytest.mark.parametrize(
    "words",
    [
        "random masks gain r_inf too (luck)",
        "pruning whole channels or filters gains r_inf too (not random)",
        "a dense network of equal size (small dense)",
        "tuned weight decay (tuned decay)",
        "fine-tuning alone",
        "the ℓ∞ Lipschitz constant falls with sparsity",
        "the ℓ∞ margin / Lipschitz constant rises",
        "the certified ℓ2 radius rises",
        "transfer dense → sparse",
        "transfer sparse → dense",
        "the gain survives PGD",
        "the gain survives FGSM and PGD",
        "nonlinear networks gain r_inf (FGSM) at an appropriate sparsity",
        "nonlinear networks gain r_2 (DeepFool) at an appropriate sparsity",
        "over-sparsified networks lose r_inf (FGSM)",
        "over-sparsified networks lose accuracy under FGSM and PGD",
    ],
)
def test_each_claim_is_asked_once(rows, words):
    claims = [row["claim"] for row in rows]
    assert claims.count(words) == 1 or sum(words in claim for claim in claims) == 1
    assert len(set(claims)) == len(claims)


def test_a_test_is_known_again_by_its_key_whatever_its_words(folder):
    asked = claims(find(open_study(folder)))
    keys = [question.claim.key for question in asked]
    assert len(set(keys)) == len(keys) and all(keys)
    told = [dataclasses.replace(one, claim=dataclasses.replace(one.claim, text="in other words")) for one in asked]
    assert dropped_tests(note_look(open_study(folder), asked), told) == []


def test_what_was_planted_is_found(rows):
    falls = next(row for row in rows if "Lipschitz constant falls" in row["claim"])
    assert falls["log"] and -100 < falls["low"] < falls["estimate"] < falls["high"] < -80
    assert next(row for row in rows if "constant rises" in row["claim"])["low"] > 0
    moved = [row for row in rows if "transfer" in row["claim"]]
    assert [row["estimate"] for row in moved] == pytest.approx([40.0, 40.0])


def test_brackets_hold_what_the_records_say(folder):
    found = find(load(folder))
    exact = brackets(found, "l2", exact=True)
    assert [b.sparsity for b in exact] == [0.0, 0.5, 0.9]
    assert all(b.solved == 1.0 and b.lower == b.upper and b.images <= 5 for b in exact)
    wide = brackets(found, "l2", exact=False)
    assert all(b.lower is None and 15 <= b.images <= 20 for b in wide)


def test_merged_ledgers_correct_for_all_claims_of_all_studies(folder, make_study, rows):
    other = make_study(seeds=3, images=60, sparsities=(0.5, 0.9), name="another")
    merged = report.merge_ledgers([folder, other])
    assert {row.study for row in merged} == {"made-up", "another"}
    first = [row for row in merged if row.study == "made-up"]
    assert [row.claim.text for row in first] == [row["claim"] for row in rows]
    assert [row.verdict for row in first] == [row["verdict"] for row in rows], "its own family decides"
    assert all(row.merged is not None for row in merged)


def near(rows):
    """Return ledger rows to compare with: where an array begins in memory may move the last bit of its mean."""
    return [{k: pytest.approx(v, rel=1e-12) if isinstance(v, float) else v for k, v in row.items()} for row in rows]


def test_a_ledger_is_merged_with_studies_whose_folders_are_gone(folder, make_study, tmp_path):
    other = make_study(seeds=3, images=60, sparsities=(0.5, 0.9), name="another")
    both = [row.as_dict() for row in report.merge_ledgers([folder, other])]
    alone = tmp_path / "earlier.json"
    alone.write_text(json.dumps([row.as_dict() for row in report.merge_ledgers([folder])]))
    assert [row.as_dict() for row in report.merge_ledgers([other], earlier=alone)] == near(both)
    alone.write_text(json.dumps(both))
    again = [row.as_dict() for row in report.merge_ledgers([folder], earlier=alone)]  # its own old rows are replaced
    assert again == near(both)


NO_LEDGERS = ("{}", "[{", "[1]", '[{"study": "s"}]', '[{"study": "s", "claim": "c", "expects": "above"}]')


@pytest.mark.parametrize("text", NO_LEDGERS)
def test_what_is_no_ledger_is_said_to_be_none(text, tmp_path):
    path = tmp_path / "ledger.json"
    path.write_text(text)
    with pytest.raises(UserError, match="not a ledger of this version"):
        report.merge_ledgers([], earlier=path)
    with pytest.raises(UserError, match="cannot read"):
        report.merge_ledgers([], earlier=tmp_path / "none.json")


# -- where a claim is asked: fixed by accuracy before robustness is seen, never where its own networks chose it -------


@pytest.fixture(scope="module")
def findings(make_study):
    return find(load(make_study(seeds=5, images=300, valid=True, fall=40.0)))


def of(rows, words):
    return next(row for row in rows if row.claim.text == words)


@pytest.mark.parametrize("fall", [0.0, 4.0, 15.0, 40.0])
@pytest.mark.parametrize("valid", [True, False])
def test_no_sparsity_is_both_appropriate_and_over_sparsified(make_study, fall, valid):
    found = find(load(make_study(seeds=3, images=200, fall=fall, valid=valid)))
    place = places(found, "gradual")
    assert not set(place.appropriate) & set(place.over)
    assert place.split == ("valid" if valid else "test")
    accuracy = found.result(Measure("accuracy", place.split))
    gains = dict(zip(accuracy.sparsities, (e.estimate for e in accuracy.gains.effects), strict=True))
    assert all(gains[s] >= -0.005 for s in place.appropriate)
    assert not place.over or gains[place.over[0]] < -0.02


@pytest.mark.parametrize("fall", [0.0, 4.0, 15.0, 40.0])
def test_one_network_is_not_told_to_gain_and_to_contradict_that_the_over_sparsified_lose(make_study, fall):
    """A study had said of one network at 99%, "gain reproduced" and "over-sparsified networks lose: contradicted"."""
    rows = ledger(find(load(make_study(seeds=5, images=200, fall=fall))))
    gain = of(rows, "nonlinear networks gain r_inf (FGSM) at an appropriate sparsity")
    loss = of(rows, "over-sparsified networks lose r_inf (FGSM)")
    assert gain.effect is None or loss.effect is None or gain.effect.estimate != loss.effect.estimate
    if loss.effect is None:
        assert "no sparsity of the plan is over-sparsified" in loss.why


def test_a_margin_of_the_plan_moves_the_words(findings, make_study):
    study = load(make_study(seeds=5, images=300, valid=True, fall=40.0))
    study.plan["margins"] = {"over_sparsified": 0.9, "accuracy": 0.5}
    place = places(find(study), "gradual")
    assert place.over == () and len(place.appropriate) == 6
    study.plan["margins"] = {"accuracy": 0.5}
    assert places(find(study), "gradual").over == (), "the second margin is at least the first"


def test_each_seed_is_tested_where_the_others_were_best_on_validation_images(findings):
    result = findings.result(FGSM)
    valid = findings.result(Measure("budget", "valid", "fgsm", "fgsm", "linf", 0.1))
    choice = choose(findings, result)
    by_seed = valid.gains.differences.mean(axis=2)
    for seed, sparsity in enumerate(choice.sparsities):
        others = np.delete(by_seed, seed, axis=1).mean(axis=1)
        assert result.sparsities.index(sparsity) == others.argmax()
    rows = [result.gains.differences[result.sparsities.index(s), k] for k, s in enumerate(choice.sparsities)]
    assert choice.effect.estimate == pytest.approx(np.mean(rows))
    assert choice.choices == 1


def test_without_validation_images_the_whole_curve_is_paid_for(make_study):
    found = find(load(make_study(seeds=3, images=100)))
    result = found.result(FGSM)
    choice = choose(found, result, within=(0.8, 0.9))
    assert choice.choices == 2 and len(choice.curve) == 2
    single = result.gains.effects[result.sparsities.index(choice.sparsities[0])]
    assert choice.effect.low < single.low and choice.effect.high > single.high
    assert choose(found, result, within=()) is None


def test_the_papers_claims_are_primary_and_name_their_attacks(findings):
    asked = claims(findings)
    primary = [q.claim for q in asked if q.claim.primary]
    assert {claim.origin for claim in primary} == {"paper"}
    texts = [claim.text for claim in primary]
    assert "the gain survives FGSM and PGD" in texts
    assert "over-sparsified networks lose accuracy under FGSM and PGD" in texts
    assert len(texts) == 6
    assert any("among images that both classify correctly" in q.claim.text for q in asked)


def test_the_loss_is_asked_at_every_eps(make_study):
    budgets = (("fgsm", 0.05), ("fgsm", 0.1), ("fgsm", 0.2), ("pgd", 0.1), ("pgd", 0.2))
    asked = claims(find(load(make_study(seeds=2, images=60, budgets=budgets, fall=40.0))))
    texts = [q.claim.text for q in asked if "over-sparsified" in q.claim.text and "correctly" not in q.claim.text]
    for eps in ("0.05", "0.1"):
        assert f"over-sparsified networks lose r_inf (FGSM) at ε = {eps}" in texts
    assert "over-sparsified networks lose accuracy under FGSM and PGD at ε = 0.1" in texts


@pytest.mark.parametrize("flag", ["masked-gradients", "partial-gradients", "shattered-gradients"])
def test_a_flag_that_says_an_attack_missed_something_leaves_its_claims_undecided(make_study, flag):
    rows = ledger(find(load(make_study(seeds=5, images=100, flag=flag))))
    weak = of(rows, "nonlinear networks gain r_inf (FGSM) at an appropriate sparsity")
    strong = [row for row in rows if row.claim.text.startswith("the gain survives") and row.effect is not None]
    assert strong and not weak.question.doubt
    for row in strong:
        assert bool(row.question.doubt) == (flag != "shattered-gradients")
        assert not row.question.doubt or (row.told == "undecided, attack unreliable" and f"{flag} (PGD)" in row.why)


def test_a_stronger_ensemble_on_one_seed_undoes_what_cheap_attacks_say(make_study):
    budgets = (("fgsm", 0.1), ("pgd", 0.1), ("standard", 0.1))
    study = load(make_study(seeds=3, images=200, budgets=budgets))

    def without(network):
        dropped = [r for r in network.records if r.stage == "attack" and r.inputs["attack"]["name"] == "standard"]
        kept = tuple(r for r in network.records if r not in dropped or network.seed == 0)
        return dataclasses.replace(network, records=kept)

    study = dataclasses.replace(study, networks=tuple(map(without, study.networks)))
    collected = collect(study)
    worst = Measure("worst", "test", norm="linf", eps=0.1)
    assert [m.name for m in parts(collected, worst)] == ["fgsm", "pgd"]
    whos = {("gradual", 0.9, 0), ("control", 0.0, 0)}
    assert "under standard is" in suspicion(study, collected, (), worst, whos)
    assert suspicion(study, collected, (), worst, {("gradual", 0.9, 1)}) == ""
    assert suspicion(study, collected, (), FGSM, whos) == ""


def test_nonlinear_networks_are_held_against_linear_ones_where_two_studies_share_their_images(make_study):
    folders = [make_study(seeds=3, images=100, name=name) for name in ("curved", "straight", "elsewhere")]
    for folder, model, data in zip(folders, ("lenet-300-100", "linear", "linear"), ("a", "a", "b"), strict=True):
        rewrite_plan(folder, model={"name": model})
        for record in records_of(folder):
            if record.stage == "measure":
                rewrite(record, inputs={**record.inputs, "data": data})
    rows = [row for row in report.merge_ledgers(folders) if "than linear ones" in row.claim.text]
    assert [row.study for row in rows] == ["curved and straight"]
    assert rows[0].claim.log and rows[0].effect.estimate == pytest.approx(0.0), "the same made-up networks twice"
    assert report.merge_ledgers(folders[:1] + folders[2:])[-1].study == "elsewhere"
