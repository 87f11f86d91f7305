"""One code for CPU and GPU: a study on a pretended GPU finds the very numbers that it finds on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from sparring.data import Dataset
from sparring.errors import UserError
from sparring.records import Record
from sparring.study import DataFacts, Merged, lay_out, merge, run, trained

from ..pretend_gpu import PretendGPU
from .test_run import tiny_plan

PLAN: dict[str, Any] = {
    "seeds": 1,
    "sparsities": [0.9],
    "shard": 40,
    "model": {"name": "mlp", "widths": [8]},
    "pruning": [{"label": "magnitude"}, {"label": "surgery", "method": "dns"}],
    "activation": [{"kind": "percentile", "levels": [0.5]}],
    "attacks": [
        {"name": name, "norm": "l2" if smallest else "linf", "images": 20} | ({} if smallest else {"eps": [0.1]}) | more
        for name, smallest, more in (
            ("fgsm", False, {}),
            ("pgd", False, {"steps": 3, "restarts": 2}),
            ("apgd", False, {"steps": 5}),
            ("square", False, {"queries": 20}),
            ("deepfool", True, {}),
            ("ddn", True, {"steps": 5}),
            ("nearest", True, {}),
            ("hopskipjump", True, {"steps": 2}),
        )
    ],
    "transfer": [{"name": "fgsm", "eps": [0.1], "images": 20}],
    "certify": [{"norm": "linf", "images": 5}],
    "deploy": True,
    "kernels": "torch",  # on a GPU there are no others
}


# On a GPU images that are done stay in the batch: to move the others together would mean to wait for it.
PASSES = ("forwards", "backwards")


def _numbers(records: list[Record]) -> list[Any]:
    return [
        (
            r.stage,
            r.inputs.get("attack"),
            {k: v for k, v in r.metrics.items() if k not in PASSES},
            r.series,
            r.flags,
            r.error,
        )
        for r in records
    ]


ROBUST: dict[str, Any] = {
    "training": {"loss": "trades", "eps": 0.1, "steps": 2},
    "checkpoints": ["final", "best"],
    "pruning": [{"label": "magnitude"}],
    "attacks": PLAN["attacks"][:1],
    "activation": [],
    "transfer": [],
    "certify": [],
    "deploy": False,
}


@pytest.mark.parametrize("changes", [pytest.param({}, marks=pytest.mark.nightly), ROBUST])
def test_a_gpu_finds_what_the_cpu_finds(few_digits: Dataset, tmp_path: Path, changes: dict[str, Any]) -> None:
    plan = tiny_plan(**{**PLAN, **changes})
    expected = run(plan, tmp_path / "cpu", dataset=few_digits, workers=0)
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        with PretendGPU() as gpu:
            found = run(plan, tmp_path / "gpu", dataset=few_digits, device="cuda:0")
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)
    assert gpu.moved > len(found) and not [r.error for r in expected if r.error]
    assert _numbers(found) == _numbers(expected)


def test_a_study_in_double_precision_has_its_own_keys_and_is_read_back(few_digits: Dataset, tmp_path: Path) -> None:
    # On the CPU with the attacks of one step, the packed network and a certificate.
    changes = PLAN | {
        "attacks": PLAN["attacks"][:1],
        "kernels": "auto",
        "activation": [],
        "pruning": PLAN["pruning"][:1],
    }
    plan = tiny_plan(**changes)
    found = run(plan, tmp_path, dataset=few_digits, workers=0, dtype="float64")
    assert not [r.error for r in found if r.error] and {r.environment["dtype"] for r in found} == {"float64"}
    keys = lay_out(plan, DataFacts.of(few_digits)).tasks
    assert not keys.keys() & {r.key for r in found}
    network = trained(tmp_path, next(r.key for r in found if r.stage == "prune"))
    assert {p.dtype for p in network.parameters()} == {torch.float64}
    assert Merged(added=0, known=len(found), refused=(), different=()) == merge([tmp_path], tmp_path)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("device", ["cuda:0", "gpu", "meta", ""])
def test_a_device_that_is_not_there_is_said(few_digits: Dataset, tmp_path: Path, device: str) -> None:
    with pytest.raises(UserError, match="device"):
        run(tiny_plan(), tmp_path, dataset=few_digits, device=device)


def test_auto_takes_what_there_is(few_digits: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    plan = tiny_plan(seeds=1, sparsities=[0.5])
    first = run(plan, tmp_path, dataset=few_digits, device="auto", workers=0)
    assert [r.key for r in run(plan, tmp_path, dataset=few_digits, device="cpu", workers=0)] == [r.key for r in first]
