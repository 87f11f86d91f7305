"""Merging: two halves make the whole, and nothing forged, damaged or foreign gets in."""

from __future__ import annotations

import dataclasses
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sparring.data import Dataset
from sparring.errors import PlanError, UserError
from sparring.files import pack_tensors, write_json
from sparring.records import Record, Store, read_plan, write_plan
from sparring.study import Plan, merge, progress, run
from sparring.study._merge import _grown

from .runner.test_run import contents, tiny_plan

ONE = {"seeds": 1, "sparsities": [0.5]}
OTHER = {"seeds": 1, "sparsities": [0.9], "pruning": [{"label": "magnitude"}, {"label": "random", "score": "random"}]}


@pytest.fixture(scope="module")
def halves(tmp_path_factory: pytest.TempPathFactory, few_digits: Dataset) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("halves")
    for name, changes in (("a", ONE), ("b", OTHER)):
        run(tiny_plan(**changes), folder / name, dataset=few_digits, workers=0)
    return folder / "a", folder / "b"


@pytest.fixture
def forged(halves: tuple[Path, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(halves[1], tmp_path / "forged"))


def test_two_halves_make_the_whole(halves: tuple[Path, Path], few_digits: Dataset, tmp_path: Path) -> None:
    merged = merge(halves, tmp_path / "c")
    assert merged.added and merged.known and not merged.refused and not merged.different
    assert contents(tmp_path / "c") == contents(halves[0]) | contents(halves[1])
    found = progress(tmp_path / "c")
    assert found.done == found.tasks == len(list((tmp_path / "c" / "records").iterdir()))
    # What neither asked for alone is all that is left to do.
    whole = {**ONE, **OTHER, "sparsities": [0.5, 0.9]}
    fresh: list[Any] = []
    run(tiny_plan(**whole), tmp_path / "c", dataset=few_digits, workers=0, watch=fresh.append)
    made = [event.record for event in fresh if event.record is not None and event.record.stage == "prune"]
    assert [(r.inputs["sparsity"], r.inputs["pruning"]["score"]) for r in made] == [(0.5, "random")]
    run(tiny_plan(**whole), tmp_path / "at once", dataset=few_digits, workers=0)
    assert contents(tmp_path / "c") == contents(tmp_path / "at once")
    assert merge(halves, tmp_path / "c").added == 0


EVERY: dict[str, Any] = {
    "seeds": 2,
    "sparsities": [0.7],
    "pruning": [{"label": "other", "score": "random"}],
    "attacks": [{"name": "pgd", "eps": [0.2], "images": 40}],
    "activation": [{"kind": "top-k", "levels": [0.5]}],
    "controls": {"decays": [0.1, 0.01], "small_dense": [0.5], "wide_sparse": [0.5], "seeds": 1},
    "certify": [{"images": 10}],
    "lipschitz": [{"radius": 0.1}],
    "exact": [{"images": 3}],
    "verify": [{"eps": 0.1, "images": 3}],
    "transfer": [{"name": "fgsm", "eps": [0.1]}],
    "checkpoints": ["best"],
    "deploy": True,
    "shipped": [{"images": 10}],
    "margins": {"robust": 0.1},
}
# Foundations, which must be equal, and settings of one study alone: those of the first hold.
OWN = {"data", "prepare", "model", "recipe", "finetune", "training", "linear"}
OWN |= {"name", "title", "mark", "kernels", "batch_size", "shard", "gallery"}


def test_a_merged_plan_has_all_that_either_plan_declares() -> None:
    assert {field.name for field in dataclasses.fields(Plan)} == OWN | set(EVERY)
    plain, full = (tiny_plan(**changes).table() for changes in ({"seeds": 1}, EVERY))
    for first, second in ((plain, full), (full, plain)):
        both = Plan.from_table(_grown(first, second)).table()
        assert all(both.get(name) == first.get(name) for name in OWN)
        assert both["seeds"] == 2 and both["deploy"] is True and both["margins"] == {"robust": 0.1}
        assert both["sparsities"] == [0.5, 0.7, 0.9] and both["controls"] == full["controls"]
        for name in (
            "pruning",
            "attacks",
            "activation",
            "certify",
            "lipschitz",
            "exact",
            "verify",
            "transfer",
            "shipped",
        ):
            assert all(item in both[name] for item in (*first[name], *second[name])), name
        assert set(both["checkpoints"]) == {"final", "best"}
        assert Plan.from_table(_grown(both, both)).table() == both


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"controls": {"decays": [0.01, 0.1]}}, "decays"),
        ({"controls": {"wide_sparse": [0.5]}, "pruning": [{"label": "a", "score": "random"}]}, "wide sparse"),
    ],
)
def test_controls_that_are_other_networks_are_not_united(changes: dict[str, Any], words: str) -> None:
    full = tiny_plan(**EVERY, name="full").table()
    with pytest.raises(PlanError, match=words):
        _grown(tiny_plan(**changes).table(), full)


def _rewritten(out: Path, stage: str, **changes: Any) -> Record:
    """Change a record of a stage and give it the checksum that then is right."""
    store = Store(out)
    for path in sorted(store.records.iterdir()):
        content = json.loads(path.read_text())
        if content["stage"] == stage:
            content |= changes
            content.pop("sha256")
            record = Record(**content)
            write_json(path, {**content, "sha256": record.checksum()})
            return record
    raise AssertionError(stage)


def test_what_lies_is_refused(halves: tuple[Path, Path], forged: Path, tmp_path: Path) -> None:
    measure = _rewritten(forged, "measure", inputs={"data": "x"})
    prune = next(p for p in sorted((forged / "objects").iterdir()) if p.stem != measure.key)
    prune.write_bytes(prune.read_bytes()[:-4] + b"abcd")
    (forged / "records" / ("0" * 32 + ".json")).write_text("[]")
    (forged / "records" / ("1" * 32 + ".json")).write_text((forged / "records" / f"{measure.key}.json").read_text())
    (forged / "records" / "not a key.json").write_text("{}")
    merged = merge([forged], tmp_path / "c")
    said = "\n".join(merged.refused)
    for words in ("not the hash of its inputs", "does not match its record", "does not match its key", "not a record"):
        assert words in said
    assert len(merged.refused) == 5
    assert {p.stem for p in (tmp_path / "c" / "records").iterdir()}.isdisjoint({measure.key, prune.stem, "0" * 32})


def test_contradictions_are_told_and_the_first_stays(halves: tuple[Path, Path], forged: Path, tmp_path: Path) -> None:
    changed = _rewritten(forged, "attack", metrics={"robust_accuracy": 1.0})
    merged = merge([halves[1], forged], tmp_path / "c")
    assert merged.different == (changed.key,) and merged.added == merged.known
    assert contents(tmp_path / "c") == contents(halves[1])


def test_what_was_made_from_other_weights_is_refused(halves: tuple[Path, Path], forged: Path, tmp_path: Path) -> None:
    store = Store(forged)
    trained = next(r for p in sorted(store.records.iterdir()) if (r := store.read(p.stem)) and r.stage == "train")
    tensors = {name: value + 1 for name, value in store.tensors(trained.key).items()}
    other = store.write(trained, pack_tensors(tensors))  # as another type of processor might have trained it
    assert other.object != trained.object
    merged = merge([halves[1], forged], tmp_path / "c")
    assert merged.different == (trained.key,) and not merged.refused
    for path in sorted(store.records.iterdir()):
        record = store.read(path.stem)
        if record is not None and trained.key in record.origin["weights"]:
            weights = {**record.origin["weights"], trained.key: other.object["sha256"]}  # type: ignore[index]
            store.write(replace(record, origin={**record.origin, "weights": weights}), b"")
    merged = merge([halves[1], forged], tmp_path / "c")
    assert len(merged.refused) > 2 and all("other weights" in line for line in merged.refused)
    assert contents(tmp_path / "c") == contents(halves[1])


def test_a_failed_record_gives_way(halves: tuple[Path, Path], forged: Path, tmp_path: Path) -> None:
    _rewritten(forged, "measure", error="out of memory", metrics={}, series={}, object=None)
    merged = merge([forged, halves[1]], tmp_path / "c")
    assert not progress(tmp_path / "c").failures and not merged.different
    assert contents(tmp_path / "c") == contents(halves[1])


def test_other_studies_and_folders_that_are_none_are_refused(
    halves: tuple[Path, Path], forged: Path, few_digits: Dataset, tmp_path: Path
) -> None:
    run(tiny_plan(seeds=1, recipe={"epochs": 1}), tmp_path / "other", dataset=few_digits, workers=0)
    with pytest.raises(UserError, match="another plan"):
        merge([halves[0], tmp_path / "other"], tmp_path / "c")
    with pytest.raises(UserError, match=r"no plan\.json"):
        merge([tmp_path], tmp_path / "c")
    content = read_plan(forged)
    content.plan["pruning"][0]["score"] = "random"
    write_plan(forged, content)
    with pytest.raises(UserError, match="'magnitude' has different meanings"):
        merge([halves[0], forged], tmp_path / "c")
    first = json.loads((forged / "plan.json").read_text())
    first = {**first, "schema": 1}
    first.pop("sha256")  # as the first ones were
    wrong: tuple[object, ...] = ([{}], [{**first["cells"][0], "tasks": ["../../x"]}], {})
    for cells in wrong:
        write_json(forged / "plan.json", {**first, "cells": cells})
        with pytest.raises(UserError, match="cell"):
            merge([forged], tmp_path / "c")
