"""What is tampered with, damaged or foreign is refused by whoever reads it; what is whole is read, of both schemas."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load, save

from sparring import report
from sparring.data import Dataset
from sparring.errors import UserError
from sparring.files import canonical_json, sha256_bytes
from sparring.records import STAGES, Record, Store, read_plan, read_record, tensor_bytes, write_plan
from sparring.records import _reader as reader
from sparring.report.analysis._metrics import Measure, collect
from sparring.report.analysis._records import load as load_study
from sparring.study import Event, Plan, merge, run

TABLE: dict[str, Any] = {
    "name": "tiny",
    "data": "digits",
    "model": {"name": "mlp", "widths": [16]},
    "seeds": 1,
    "sparsities": [0.5, 0.9],
    "recipe": {"epochs": 1, "lr": 0.05},
    "finetune": {"epochs": 1},
    "pruning": [{"label": "control (best epoch)"}, {"label": "not random", "score": "random"}],
    "activation": [{"kind": "top-k", "levels": [0.5]}],
    "controls": {"small_dense": [0.5], "wide_sparse": [0.5], "decays": [1e-3]},
    "attacks": [
        {"name": "fgsm", "eps": [0.1], "images": 60},
        {"name": "fgsm", "eps": [0.1], "images": 40, "naive": True},
        {"name": "deepfool", "norm": "l2", "images": 40},
    ],
    "certify": [{"images": 20, "norm": "l2", "eps": [0.1], "methods": ["not random"]}],
    "lipschitz": [{"radius": 0.1, "images": 10, "methods": ["not random"]}],
    "exact": [{"images": 2, "norm": "linf", "seconds": 0.2, "sparsities": [0.9]}],
    "verify": [{"eps": 0.01, "images": 5, "nodes": 5, "methods": ["not random"]}],
    "transfer": [{"name": "fgsm", "eps": [0.1], "images": 20, "methods": ["not random"]}],
    "shipped": [{"images": 20, "steps": 2, "decisions": 0, "methods": ["not random"]}],
    "shard": 30,
    "batch_size": 20,
}
SIDE = "control (best epoch)"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, few_digits: Dataset) -> Path:
    out = tmp_path_factory.mktemp("whole") / "out"
    assert not [r.error for r in run(Plan.from_table(TABLE), out, dataset=few_digits, workers=0) if r.error]
    report.write(out)
    return out


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "copy"))


def records_of(out: Path) -> list[Record]:
    found = [read_record(out, path.stem) for path in sorted((out / "records").glob("*.json"))]
    return [record for record in found if record is not None]


def _record(out: Path, stage: str = "measure") -> Path:
    named = {key for cell in read_plan(out).cells if cell.method == SIDE for key in cell.tasks}
    return Store(out).record(next(r.key for r in records_of(out) if r.stage == stage and r.key in named))


def _change(path: Path, edit: Callable[[dict[str, Any]], object]) -> Path:
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))
    return path


def a_metric(out: Path) -> Path:
    return _change(_record(out), lambda record: record["metrics"].update(accuracy=0.99))


def a_schema(out: Path) -> Path:
    path, content = _record(out), {}
    _change(path, lambda record: (record.update(schema=99), content.update(record)))
    content.pop("sha256")
    return _change(path, lambda record: record.update(sha256=Record(**content).checksum()))


def a_foreign_record(out: Path) -> Path:
    path = _record(out)
    other = next(r for r in records_of(out) if r.stage == "measure" and r.key != path.stem)
    shutil.copyfile(Store(out).record(other.key), path)
    return path


def a_damaged_object(out: Path) -> Path:
    path = Store(out).object(_record(out, "attack").stem)
    path.write_bytes(path.read_bytes()[:-1] + b"\x07")
    return path


def a_foreign_object(out: Path) -> Path:
    path = Store(out).object(_record(out, "attack").stem)
    held = load(path.read_bytes())
    path.write_bytes(save({**held, "success": np.zeros_like(held["success"])}))
    return path


def a_plan(out: Path) -> Path:
    return _change(out / "plan.json", lambda content: content["plan"].update(title="better"))


def a_plan_without_checksum(out: Path) -> Path:
    return _change(out / "plan.json", lambda content: content.pop("sha256"))


def a_checksum(out: Path) -> Path:
    return _change(out / "plan.json", lambda content: content.update(sha256="0" * 64))


def a_plans_schema(out: Path) -> Path:
    return _change(out / "plan.json", lambda content: content.update(schema=99))


RECORDS = (a_metric, a_schema, a_foreign_record, a_damaged_object, a_foreign_object)
PLANS = (a_plan, a_plan_without_checksum, a_checksum, a_plans_schema)
READERS: dict[str, Callable[[Path], object]] = {
    "report": report.write,
    "compare": lambda out: report.compare(report.Side(out, SIDE, 0.5), report.Side(out, SIDE, 0.9)),
    "pick": lambda out: report.pick(out, max_accuracy_drop=100.0),
}


@pytest.mark.parametrize("reads", [*READERS, "merge", "study"])
@pytest.mark.parametrize("tampered", [*RECORDS, *PLANS], ids=lambda tamper: tamper.__name__)
def test_what_is_tampered_with_is_refused_by_whoever_reads_it(
    tampered: Callable[[Path], Path], reads: str, whole: Path, copy: Path, few_digits: Dataset, tmp_path: Path
) -> None:
    path = tampered(copy)
    named = rf"{path.stem}|{path.name}"
    if reads in READERS:
        with pytest.raises(UserError, match=named):
            READERS[reads](copy)
    elif reads == "merge" and tampered in RECORDS:
        merged = merge([copy], tmp_path / "merged")
        assert any(path.stem in line for line in merged.refused)
        assert not (tmp_path / "merged" / "records" / f"{path.stem}.json").exists()
    elif reads == "study" and tampered != a_plans_schema:
        events: list[Event] = []
        run(Plan.from_table(TABLE), copy, dataset=few_digits, workers=0, watch=events.append)
        assert path.name in events[-1].damaged
        assert {r.key: r.metrics for r in records_of(copy)} == {r.key: r.metrics for r in records_of(whole)}
    else:
        with pytest.raises(UserError, match=named):
            merge([copy], tmp_path / "merged") if reads == "merge" else run(
                Plan.from_table(TABLE), copy, dataset=few_digits, workers=0
            )


@pytest.mark.parametrize("reads", ["compare", "pick"])
def test_what_is_whole_is_read(reads: str, whole: Path) -> None:
    assert READERS[reads](whole)


def test_what_can_be_written_can_be_read(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, file = (copy / "plan.json").read_text(), read_plan(copy)
    monkeypatch.setattr(reader, "MAX_PLAN", len(before) - 1)
    with pytest.raises(UserError, match="larger"):
        write_plan(copy, replace(file, command=file.command + "x"))
    assert (copy / "plan.json").read_text() == before
    monkeypatch.setattr(reader, "MAX_PLAN", len(before))
    write_plan(copy, file)
    assert read_plan(copy) == file
    record = records_of(copy)[0]
    monkeypatch.setattr(reader, "MAX_RECORD", 1000)
    with pytest.raises(UserError, match="larger"):
        Store(copy).write(replace(record, series={"long": list(range(1000))}))


def test_records_hold_what_the_schema_says(whole: Path) -> None:
    told = records_of(whole)
    assert {r.stage for r in told} == set(STAGES) - {"linear", "deploy"}
    for record in told:
        holds, tensors = STAGES[record.stage], load(tensor_bytes(record)) if record.object else {}
        for names, known in (
            (record.metrics, holds.metrics),
            (record.series, holds.series),
            (record.times, (*holds.times, "seconds")),
            (tensors, holds.tensors),
        ):
            patterns = ["".join("*" if c.isupper() else c for c in name) for name in known]
            assert all(any(fnmatch(name, pattern) for pattern in patterns) for name in names), (record.stage, names)


def test_cells_say_what_they_are_whatever_their_labels(whole: Path) -> None:
    kinds = {(cell.method, cell.kind, cell.checkpoint) for cell in read_plan(whole).cells}
    assert kinds == {
        ("reference", "reference", "final"),
        ("control", "control", "final"),
        ("tuned decay", "tuned decay", "final"),
        ("small dense", "small dense", "final"),
        ("wide sparse", "wide sparse", "final"),
        ("control (best epoch)", "pruned", "final"),
        ("not random", "random", "final"),
        ("top-k", "activations", "final"),
    }


def test_tensors_say_which_images_they_speak_of(whole: Path, few_digits: Dataset) -> None:
    seen = set()
    for record in records_of(whole):
        held = load(tensor_bytes(record)) if record.object is not None else {}
        if "label" in held:
            part = few_digits.valid if record.inputs.get("split") == "valid" else few_digits.test
            assert (held["label"] == part.y[torch.from_numpy(held["images"]).long()].numpy()).all()
            seen.add(record.stage)
    assert seen == {"measure", "attack", "transfer", "certify", "lipschitz", "exact", "verify", "ship"}


def test_stages_are_joined_by_image(whole: Path) -> None:
    """Accuracy is of all images in their order, attacks of a few in a random one: they had been joined by position."""
    found = collect(load_study(whole))
    right, joined = found[Measure("accuracy")], 0
    for measure in (m for m in found if m.role in ("budget", "certified", "distance")):
        for who, one in found[measure].items():
            correct = right[who].at(one.images).top > 0
            assert not correct.all() and not one.top[~correct].any(), measure
            joined += 1
    assert joined > 10


def as_first_written(out: Path) -> None:
    """Write a study again as schema 1 had it: no indices, no kinds, no checkpoints, records without an origin."""
    store = Store(out)
    for record in records_of(out):
        held = {k: v for k, v in load(tensor_bytes(record)).items() if k != "images"} if record.object else {}
        store.write(replace(record, schema=1, origin={}), save(held) if held else b"")
    content = json.loads((out / "plan.json").read_text())
    content.pop("sha256")
    cells = [{n: v for n, v in cell.items() if n not in ("kind", "checkpoint")} for cell in content["cells"]]
    content |= {"schema": 1, "cells": cells}
    (out / "plan.json").write_text(json.dumps({**content, "sha256": sha256_bytes(canonical_json(content).encode())}))


def test_a_study_of_schema_1_is_read_reported_and_gone_on_with(tmp_path: Path, few_digits: Dataset) -> None:
    table = {**TABLE, "pruning": [{"label": "magnitude"}], "shipped": []}
    table |= {"training": {"loss": "pgd-at", "eps": 0.1, "steps": 1}, "checkpoints": ["final", "best"]}
    for name in ("controls", "transfer", "certify", "lipschitz", "verify"):
        table.pop(name)
    run(Plan.from_table(table), tmp_path / "new", dataset=few_digits, workers=0)
    shutil.copytree(tmp_path / "new", tmp_path / "old")
    as_first_written(tmp_path / "old")
    assert read_plan(tmp_path / "old").cells == read_plan(tmp_path / "new").cells
    for name in ("new", "old"):
        report.write(tmp_path / name)
    for name in ("results.csv", "ledger.json"):
        assert (tmp_path / "old" / name).read_text() == (tmp_path / "new" / name).read_text()
    events: list[Event] = []
    grown = {**table, "sparsities": [0.5, 0.8, 0.9]}
    run(Plan.from_table(grown), tmp_path / "old", dataset=few_digits, workers=0, watch=events.append)
    made = [event.record for event in events if event.record is not None]
    assert events[0].cached == len(records_of(tmp_path / "new"))
    assert {r.inputs["sparsity"] for r in made if r.stage == "prune"} == {0.8}
    report.write(tmp_path / "old")  # records of both schemas, joined by image
    with (tmp_path / "old" / "results.csv").open() as file:
        found = {row["sparsity"] for row in csv.DictReader(file) if row["method"] == "magnitude"}
    assert found == {"0.5", "0.8", "0.9"}
    merged = merge([tmp_path / "new"], tmp_path / "old")
    assert not merged.different and not merged.refused
