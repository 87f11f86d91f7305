"""One small study with every kind of network and judgement, and what must hold between its records."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from sparring import deploy
from sparring.data import Dataset
from sparring.errors import UserError
from sparring.models import build
from sparring.records import Record, Store
from sparring.report.analysis._comparisons import shipped
from sparring.report.analysis._findings import find
from sparring.report.analysis._records import load
from sparring.study import Context, DataFacts, Plan, lay_out, load_network_, run
from sparring.study.plans._dry_run import _passes, estimate
from sparring.study.stages import _evaluate as judging
from sparring.study.stages._inputs import Network
from sparring.study.stages._networks import MASK, WEIGHTS, chosen_images, narrowed, widened

TABLE: dict[str, Any] = {
    "name": "everything",
    "data": "digits",
    "model": {"name": "mlp", "widths": [32, 16]},
    "seeds": 1,
    "sparsities": [0.8],
    "checkpoints": ["final", "best"],
    "deploy": True,
    "shipped": [
        {"values": "int8", "images": 40, "decisions": 2},
        {"values": "int8", "activations": "int8", "images": 40, "decisions": 0, "methods": ["magnitude"]},
    ],
    "training": {"loss": "pgd-at", "eps": 0.05, "steps": 2},
    "recipe": {"epochs": 3, "lr": 0.05},
    "finetune": {"epochs": 2},
    "pruning": [
        {"label": "frozen", "method": "dns", "c_rate": 0.5},
        {"label": "magnitude"},
        {"label": "surgery", "method": "dns", "sparsities": [0.7]},
    ],
    "controls": {"decays": [1e-4, 1e-1], "small_dense": [0.5, 0.95], "wide_sparse": [0.8]},
    "activation": [
        {"kind": "top-k", "levels": [0.8]},
        {"kind": "mean-sparse", "levels": [0.3]},
        {"kind": "stochastic-pruning", "levels": [1.0]},
        {"kind": "l1-penalty", "levels": [0.1]},
    ],
    "attacks": [
        {"name": "pgd", "eps": [0.1], "steps": 10, "images": 40},
        {"name": "pgd", "eps": [0.1], "steps": 10, "images": 40, "naive": True},
        {"name": "nearest", "norm": "linf", "images": 40},
        {"name": "fgsm", "eps": [0.1], "images": 40, "split": "valid", "methods": ["magnitude"]},
        {"name": "sigma-zero", "norm": 0, "images": 20, "steps": 10, "methods": ["magnitude"]},
    ],
    "transfer": [{"name": "pgd", "eps": [0.1], "images": 40, "steps": 5}],
    "certify": [{"norm": "linf", "images": 20, "eps": [0.01]}],
    "lipschitz": [{"norm": "linf", "images": 20, "radius": 0.05, "method": "jacobian"}],
    "exact": [{"norm": "linf", "images": 1, "nodes": 2000, "seconds": 100, "sparsities": [0.8]}],
    "verify": [{"eps": 0.02, "images": 20, "nodes": 20, "methods": ["magnitude", "top-k", "stochastic-pruning"]}],
}


class Finished:
    def __init__(self, out: Path) -> None:
        self.out = out
        self.store = Store(out)
        self.cells = json.loads((out / "plan.json").read_text())["cells"]

    def of(self, method: str, stage: str, sparsity: float | None = None) -> list[Record]:
        records = [
            self.store.read(key)
            for cell in self.cells
            if cell["method"] == method and sparsity in (None, cell["sparsity"])
            for key in cell["tasks"]
        ]
        return [record for record in records if record is not None and record.stage == stage]

    def one(self, method: str, stage: str, sparsity: float | None = None) -> Record:
        (record,) = self.of(method, stage, sparsity)
        return record


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory, few_digits: Dataset) -> Finished:
    out = tmp_path_factory.mktemp("everything")
    records = run(Plan.from_table(TABLE), out, dataset=few_digits, workers=2)
    assert not [record.error for record in records if record.error]
    return Finished(out)


def test_every_network_has_its_cell(study: Finished) -> None:
    final = {cell["method"] for cell in study.cells if "epoch)" not in cell["method"]}
    assert final == {
        "reference", "control", "magnitude", "surgery", "frozen", "top-k", "mean-sparse", "stochastic-pruning",
        "l1-penalty", "tuned decay", "small dense", "wide sparse",
    }  # fmt: skip
    assert {f"{method} (best epoch)" for method in final} == {c["method"] for c in study.cells} - final
    axes = {cell["method"]: cell["axis"] for cell in study.cells}
    assert axes["top-k"] == "activations" and axes["magnitude"] == "weights"


def test_the_tuned_decay_is_the_best_on_validation_images(study: Finished) -> None:
    choice = study.one("tuned decay", "choose")
    scores = choice.series["accuracy_valid"]
    assert choice.metrics["accuracy_valid"] == max(scores)
    assert choice.metrics["weight_decay"] == [1e-4, 1e-1][scores.index(max(scores))]


def test_controls_of_equal_size_have_equal_size(study: Finished) -> None:
    dense = study.one("control", "measure").metrics
    small = study.one("small dense", "measure", 0.5).metrics
    wide = study.one("wide sparse", "measure").metrics
    weights = 64 * 32 + 32 * 16 + 16 * 10
    assert small["parameters"] < dense["parameters"]  # type: ignore[operator]
    assert small["nonzero"] == pytest.approx(0.5 * weights, rel=0.1)
    assert wide["nonzero"] == pytest.approx(weights, rel=0.1)
    assert not study.of("small dense", "measure", 0.95), "no fair control below width 8"


def test_surgery_says_what_it_did_when(study: Finished) -> None:
    series = study.one("surgery", "prune").series
    removed = sum(series["pruned"]) - sum(series["spliced"])
    assert removed == round(0.7 * (64 * 32 + 32 * 16 + 16 * 10))
    assert series["step"] == sorted(series["step"])


def test_frozen_surgery_ends_where_its_thresholds_lead(study: Finished) -> None:
    record = study.one("frozen", "prune")
    reached = record.metrics["sparsity"]
    assert reached is not None and 0 < reached < 1 and record.inputs["sparsity"] is None
    # Biases share their layer's threshold in the paper, and are counted apart.
    held = study.store.tensors(record.key)
    weights = [v for k, v in held.items() if k.startswith("mask/") and v.dim() == 2]
    assert reached == pytest.approx(1 - sum(int(w.sum()) for w in weights) / sum(w.numel() for w in weights))
    assert any(name.startswith("mask/") and name.endswith("bias") for name in held)
    # The report puts it where it ended; the control that wants a sparsity takes the first method that has one.
    networks = [n for n in load(study.out).networks if n.method == "frozen"]
    assert [n.sparsity for n in networks] == [round(reached, 4)]
    assert study.one("wide sparse", "prune").inputs["pruning"] == {"method": "gradual"}


def test_the_best_epoch_stood_best_on_validation_images(study: Finished) -> None:
    record = study.one("reference", "train")
    scores = record.series["robust_accuracy_valid"]
    assert record.metrics["best_epoch"] == scores.index(max(scores)) + 1


def test_certified_radii_never_pass_an_attack(study: Finished) -> None:
    for method in ("reference", "control", "magnitude", "surgery", "wide sparse"):
        radius = study.store.tensors(study.one(method, "certify").key)["radius"]
        attacks = [r for r in study.of(method, "attack") if r.inputs["attack"]["name"] == "nearest"]
        distance = study.store.tensors(attacks[0].key)["distance"][: len(radius)].double()
        assert (radius <= distance * (1 + 1e-6)).all()


def test_theory_and_attacks_bracket_the_truth(study: Finished) -> None:
    record = study.one("magnitude", "exact")
    held = study.store.tensors(record.key)
    radius = study.store.tensors(study.one("magnitude", "certify").key)["radius"][:1]
    ratio = study.store.tensors(study.one("magnitude", "lipschitz").key)["ratio"][:1].clamp_max(0.05)
    right = held["clean_correct"]
    assert record.metrics["solved"] == 1.0
    assert (radius <= held["upper"] + 1e-6).all()
    assert (ratio[right] <= held["upper"][right] + 1e-6).all()
    assert (held["lower"][right] <= held["attack"][right].double() + 1e-6).all()


def test_verdicts_lie_between_certificates_and_attacks_on_every_image(study: Finished) -> None:
    record = study.one("magnitude", "verify")
    held = study.store.tensors(record.key)
    by, falsified, right = held["verified_by"], held["falsified"], held["clean_correct"]
    radius = study.store.tensors(study.one("magnitude", "certify").key)["radius"]
    (near,) = [r for r in study.of("magnitude", "attack") if r.inputs["attack"]["name"] == "nearest"]
    distance = study.store.tensors(near.key)["distance"][:20]
    assert not (falsified & (by > 0)).any() and falsified[~right].all() and not record.flags
    assert (by[radius > 0.02 * 1.001] > 0).all(), "what CROWN certifies is verified"
    assert (distance[by > 0] > 0.02 * 0.999).all() and (distance[falsified & right] < 0.02 * 1.2).all()
    assert ((by == 3) <= (held["nodes"] >= 0)).all() and (held["nodes"][(by == 1) | (by == 2)] == 0).all()
    shares = [record.metrics[name] for name in ("verified", "falsified", "undecided")]
    assert sum(shares) == pytest.approx(1) and 0 < record.metrics["stable"] <= 1  # type: ignore[arg-type,operator]
    (drawn,) = study.of("stochastic-pruning", "verify")
    assert [flag["name"] for flag in drawn.flags] == ["not-verified"]


def test_activation_sparsity_is_attacked_at_least_as_hard_as_naively(study: Finished) -> None:
    for method in ("top-k", "mean-sparse"):
        found = {
            bool(r.inputs["attack"].get("naive")): r.metrics["robust_accuracy"]
            for r in study.of(method, "attack")
            if r.inputs["attack"]["name"] == "pgd"
        }
        assert found[False] <= found[True]  # type: ignore[operator]
    naive = [r for r in study.of("magnitude", "attack") if r.inputs["attack"].get("naive")]
    assert not naive, "naive attacks are for activation sparsity alone"


def test_the_dense_control_is_attacked_once_for_all_that_are_lent_its_examples(study: Finished) -> None:
    records = [study.store.read(key) for cell in study.cells for key in cell["tasks"]]
    lending = {r.key: r for r in records if r is not None and r.stage == "lend"}
    lent = [r for r in records if r is not None and r.stage == "attack" and "activation" in r.inputs]
    plain = [r for r in lent if not r.inputs["attack"].get("naive")]
    assert {r.inputs["parents"][1] for r in plain} == set(lending)
    for record in plain:
        loan = lending[record.inputs["parents"][1]]
        assert loan.inputs["parents"] == study.one("control", "measure").inputs["parents"]
        assert loan.inputs["attack"] == record.inputs["attack"] and loan.inputs["stop"] == record.inputs["stop"]
    assert len(lending) < len(plain), "networks share them"
    assert all(len(r.inputs["parents"]) == 1 for r in lent if r not in plain)


def test_what_has_no_certificate_or_packed_form_says_why(study: Finished) -> None:
    record = study.one("stochastic-pruning", "certify")
    assert record.flags[0]["name"] == "no-certificate" and record.flags[0]["detail"]


def test_the_packed_artefact_answers_as_the_network(study: Finished) -> None:
    for record in study.of("magnitude", "deploy") + study.of("control", "deploy"):
        assert record.metrics["agreement"] == 1.0 and record.metrics["logits_agree"] == 1.0
        assert record.metrics["bytes_packed"] > 0 and record.times["latency"] > 0  # type: ignore[operator]
    sparse, dense = study.one("magnitude", "deploy"), study.one("control", "deploy")
    assert sparse.metrics["bytes_packed"] < dense.metrics["bytes_packed"]  # type: ignore[operator]


def test_the_rounded_artefact_is_attacked_and_certified(study: Finished) -> None:
    record, integers = study.of("magnitude", "ship")
    metrics, held = record.metrics, study.store.tensors(record.key)
    assert metrics["agreement"] > 0.9 and 0 < metrics["logit_error"] < 0.05  # type: ignore[operator]
    assert abs(metrics["robust_model"] - metrics["robust_packed"]) < 0.15  # type: ignore[operator]
    assert 0 <= metrics["robust_decision"] <= 1  # type: ignore[operator]
    exact = study.store.tensors(study.one("magnitude", "certify").key)["radius"]
    assert torch.equal(held["radius_model_linf_crown"], exact)
    rounded = held["radius_packed_linf_crown"]
    assert not torch.equal(rounded, exact) and (rounded - exact).abs().max() < 0.2 * exact.max()
    kind, other = (one for one in shipped(find(load(study.store.out))) if one.method == "magnitude")
    assert kind.values == "int8" and kind.verdict in ("equal", "equivalent", "undecided")
    assert any("crown" in name for name, _, _ in kind.radii())
    assert integers.inputs["activations"] == "int8" and "activations" not in record.inputs
    assert integers.metrics["agreement"] > 0.9 and integers.metrics["logit_error"] > metrics["logit_error"]  # type: ignore[operator]
    assert other.values == "int8, activations too" and not [*other.radii()]
    assert study.one("mean-sparse", "ship").metrics["agreement"] > 0.9  # type: ignore[operator]


def test_transfer_goes_both_ways(study: Finished) -> None:
    records = study.of("magnitude", "transfer")
    assert {r.inputs["direction"] for r in records} == {"to sparse", "to dense"}
    assert all(0 <= r.metrics["transferred"] <= 1 for r in records)  # type: ignore[operator]


def test_attacks_are_narrowed(study: Finished) -> None:
    assert [r for r in study.of("magnitude", "attack") if r.inputs["split"] == "valid"]
    assert not [r for r in study.of("control", "attack") if r.inputs["split"] == "valid"]


def test_weights_are_what_was_measured(study: Finished) -> None:
    made, measured = study.one("magnitude", "prune"), study.one("magnitude", "measure")
    tensors = study.store.tensors(made.key)
    nonzero = sum(int(v.count_nonzero()) for k, v in tensors.items() if k.startswith(WEIGHTS) and v.dim() == 2)
    assert nonzero == round(0.2 * (64 * 32 + 32 * 16 + 16 * 10))
    assert measured.metrics["sparsity"] == pytest.approx(0.8, abs=1e-3)
    model = build("mlp", shape=(1, 8, 8), classes=10, mean=(0.5,), std=(0.5,), widths=(32, 16))
    load_network_(model, tensors)
    name = next(name for name in tensors if name.startswith(MASK))
    tensors[WEIGHTS + name.removeprefix(MASK)][~tensors[name]] = 0.1
    with pytest.raises(UserError, match="masked weights of"):
        load_network_(model, tensors)


def test_widths_of_named_models() -> None:
    model = Network(name="lenet-5")
    narrow = narrowed(model, (1, 28, 28), 10, 0.9)
    assert narrow is None  # 20 channels at a tenth of the weights are fewer than 8
    assert (widened(model, (1, 28, 28), 10, 0.5).width or 0) > 1.2
    with pytest.raises(UserError, match="no width"):
        widened(Network(name="linear"), (1, 28, 28), 10, 0.5)


def test_the_images_of_a_split_are_a_fixed_unbiased_choice(few_digits: Dataset) -> None:
    x, y = chosen_images(few_digits, "test", 0, 30)
    again, _ = chosen_images(few_digits, "test", 10, 30)
    assert torch.equal(x[10:], again)
    assert len(set(y.tolist())) > 5


def test_attacks_through_packed_kernels_reach_what_torch_does(few_digits: Dataset, tmp_path: Path) -> None:
    distances = ("nearest", "deepfool")
    attacks = [{"name": "pgd", "eps": [0.1], "steps": 10}, *({"name": name, "images": 40} for name in distances)]
    small = {"name": "packed", "data": "digits", "model": {"name": "mlp", "widths": [32]}, "seeds": 1}
    table = {**small, "recipe": {"epochs": 2}, "sparsities": [0.9], "attacks": attacks}
    found: dict[str, dict[str, Record]] = {}
    for kernels in ("torch", "packed"):
        records = run(Plan.from_table({**table, "kernels": kernels}), tmp_path / kernels, dataset=few_digits, workers=0)
        found[kernels] = {r.inputs["attack"]["name"]: r for r in records if r.stage == "attack"}  # the last: sparse
    for name, one in found["torch"].items():
        other = found["packed"][name]
        assert other.inputs["kernels"] == "packed" and "kernels" not in one.inputs and other.key != one.key
        assert other.metrics["success"] == pytest.approx(one.metrics["success"], abs=0.02)
        if name in distances:
            assert other.metrics["mean_distance"] == pytest.approx(one.metrics["mean_distance"], rel=5e-3)


def test_the_route_of_attacks_is_the_plans_and_changes_no_other_key(few_digits: Dataset) -> None:
    def keys(**changes: Any) -> dict[str, dict[str, Any]]:
        bare = {"model": "lenet-5", "pruning": [{"label": "magnitude"}], "controls": {}, "exact": []}
        table = {**TABLE, **bare, **changes}
        tasks = lay_out(Plan.from_table(table), DataFacts.of(few_digits)).tasks
        return {key: task.table() for key, task in tasks.items()}

    torch_only, auto = keys(kernels="torch", sparsities=[0.3]), keys(sparsities=[0.3, 0.95])
    assert torch_only == keys(sparsities=[0.3]), "0.3 is too dense to gain"
    packed = [inputs for inputs in auto.values() if inputs.get("kernels") == "packed"]
    assert packed and {inputs["attack"]["name"] for inputs in packed} == {"pgd", "nearest", "sigma-zero"}
    assert all(inputs["attack"].get("naive") is None and "activation" not in inputs for inputs in packed)
    assert torch_only.keys() <= auto.keys()
    mlp = {"model": "lenet-300-100", "sparsities": [0.95]}
    assert keys(**mlp) == keys(kernels="torch", **mlp), "attacks compute these by hand"


@pytest.mark.parametrize(
    ("model", "sparsity", "routed"),
    [
        ("vgg-like", 0.5, {"deepfool"}),
        ("vgg-like", 0.8, {"deepfool", "pgd"}),
        ("resnet-32", 0.5, {"deepfool", "pgd"}),
        ("lenet-300-100", 0.8, set()),
    ],
)
def test_attacks_go_through_the_kernels_where_these_were_measured_to_be_faster(
    few_digits: Dataset, model: str, sparsity: float, routed: set[str]
) -> None:
    attacks = [{"name": "pgd", "eps": [0.1]}, {"name": "deepfool", "norm": "l2"}, {"name": "fgsm", "eps": [0.1]}]
    plan = {"name": "r", "data": "digits", "model": model, "seeds": 1, "sparsities": [sparsity], "attacks": attacks}
    tasks = lay_out(Plan.from_table({**plan, "pruning": [{"label": "magnitude"}]}), DataFacts.of(few_digits)).tasks
    packed = {t.table()["attack"]["name"] for t in tasks.values() if t.table().get("kernels") == "packed"}
    assert packed == routed


def test_a_packed_form_that_differs_is_not_gone_through(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = (
        build("mlp", shape=(1, 4, 4), classes=3, mean=(0.5,), std=(0.5,), widths=(8,)).eval(),
        torch.rand(8, 1, 4, 4),
    )
    assert judging._packed(model, x)[0] is not None
    wrong = deploy.PackedModule.forward
    monkeypatch.setattr(deploy.PackedModule, "forward", lambda self, x: 1.01 * wrong(self, x))
    through, flags = judging._packed(model, x)
    assert through is None and flags[0]["name"] == "packed-form-differs"


def test_the_estimate_grows_with_the_work(few_digits: Dataset) -> None:
    context = Context(few_digits, lambda key: {})
    tasks = list(lay_out(Plan.from_table(TABLE), DataFacts.of(few_digits)).tasks.values())
    assert estimate([], context, workers=1) == 0
    whole, first = (estimate(some, context, workers=1) for some in (tasks, tasks[:1]))
    assert whole is not None and first is not None and whole > first > 0

    def passes(kind: str, naive: bool = False) -> float:
        (task, *_) = (
            t
            for t in tasks
            if t.stage == "attack"
            and t.table().get("activation", {}).get("kind") == kind
            and t.table()["attack"].get("naive", False) == naive
        )
        return _passes(task.inputs, context)

    assert passes("top-k") == 2 * passes("top-k", naive=True) == 2 * passes("l1-penalty"), "again straight through"
    assert passes("stochastic-pruning") > 5 * passes("top-k"), "a mean over draws"
