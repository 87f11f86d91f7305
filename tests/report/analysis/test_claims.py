"""The ledger's claims, the brackets around the truth, and ledgers of several studies in one."""

import json

import pytest

from sparring import report
from sparring.errors import UserError
from sparring.report.analysis._comparisons import brackets
from sparring.report.analysis._findings import find
from sparring.report.analysis._records import load

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
    report.write(folder)
    return json.loads((folder / "ledger.json").read_text())


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
        "the l∞ Lipschitz constant falls with sparsity",
        "the l∞ margin / Lipschitz constant rises",
        "the certified l2 radius rises",
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
    with pytest.raises(UserError, match="no ledger of this version"):
        report.merge_ledgers([], earlier=path)
    with pytest.raises(UserError, match="cannot read"):
        report.merge_ledgers([], earlier=tmp_path / "none.json")
