"""A plan's memory is known before it begins."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from sparring.data import Dataset
from sparring.errors import PlanError
from sparring.memory import _SCRATCH
from sparring.records import read_plan
from sparring.study import Plan, register, run
from sparring.study.plans import _memory
from sparring.study.plans._memory import fitted
from sparring.study.stages._networks import Context

from ..runner.test_run import tiny_plan

ATTACK = {"name": "fgsm", "eps": [0.1], "images": 20}


@pytest.fixture
def context(few_digits: Dataset) -> Context:
    return Context(few_digits, lambda _: {})


def test_auto_is_what_memory_allows(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = tiny_plan(batch_size="auto", attacks=[ATTACK], recipe={"batch_size": 1})
    assert plan.batch_size == Plan(name="own").batch_size and fitted(plan, context, 1).batch_size == 500
    assert fitted(plan, context, 1, kept=77).batch_size == 77
    monkeypatch.setattr(_memory, "_LARGE", 0)
    monkeypatch.setattr(_memory, "free_memory", lambda _: 2 * (2 * _SCRATCH + 2**20))
    few = fitted(plan, context, 2).batch_size
    monkeypatch.setattr(_memory, "free_memory", lambda _: 2 * (2 * _SCRATCH + 2**21))
    more = fitted(plan, context, 2).batch_size
    assert isinstance(few, int) and isinstance(more, int) and 1 < few < more <= 500


def test_what_does_not_fit_is_refused_with_the_number(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_memory, "free_memory", lambda _: 129 * 2**20)
    plan = tiny_plan(batch_size=400, attacks=[ATTACK])
    with pytest.raises(
        PlanError, match=r"an attack takes \d+ MiB for 400 images .* and 64 MiB are free.*fewer --workers"
    ):
        fitted(plan, context, 2)
    with pytest.raises(PlanError, match=r"training takes .* for 64 images"):
        fitted(replace(plan, attacks=()), context, 2)


def test_the_number_is_written_and_kept(few_digits: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = tiny_plan(batch_size="auto", attacks=[ATTACK], seeds=1, sparsities=[0.5])
    assert register(plan, tmp_path)["table"]["batch_size"] == "auto"
    first = run(plan, tmp_path, dataset=few_digits, workers=0)
    assert read_plan(tmp_path).plan["batch_size"] == 500
    monkeypatch.setattr(_memory, "free_memory", lambda _: 2 * 150 * 2**20)
    assert [r.key for r in run(plan, tmp_path, dataset=few_digits, workers=0)] == [r.key for r in first]
    monkeypatch.setattr(_memory, "free_memory", lambda _: 0)  # which nobody asks for where nothing is missing
    assert [r.key for r in run(plan, tmp_path, dataset=few_digits, workers=0)] == [r.key for r in first]
    with pytest.raises(PlanError, match="1 MiB are free"):
        run(replace(plan, sparsities=(0.5, 0.6)), tmp_path, dataset=few_digits, workers=0)
