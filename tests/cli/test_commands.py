"""The command line as a user meets it: exit codes, messages, and no traceback."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import nn

from sparring import data, deploy, study
from sparring.cli import main
from sparring.models import load_model
from sparring.records import read_plan
from sparring.sparsity import NM, LeftDenseWarning, covered, select, sparsity_of

from ..study.pretend_gpu import PretendGPU

TINY = """
data = "digits"
model = { name = "mlp", widths = [16] }
seeds = 2
sparsities = [0.5, 0.9]
deploy = true
[recipe]
epochs = 1
lr = 0.05
[[attacks]]
name = "fgsm"
eps = [0.1]
images = 30
[[attacks]]
name = "deepfool"
norm = "l2"
images = 30
[[shipped]]
images = 30
decisions = 1
seeds = 2
"""
SHORT = TINY.partition("[[shipped]]")[0].replace("deploy = true\n", "")


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plan") / "tiny.toml"
    path.write_text(TINY)
    return path


@pytest.fixture(scope="module")
def short(plan: Path) -> Path:
    """Return a plan that neither deploys nor ships."""
    path = plan.with_name("short.toml")
    path.write_text(SHORT)
    return path


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return a trained network's file and that of a pruned one."""
    folder = tmp_path_factory.mktemp("models")
    dense, sparse = folder / "dense.safetensors", folder / "sparse.safetensors"
    options = ("--data", "digits", "--quiet", "--set", "epochs=2")
    before = signal.getsignal(signal.SIGTERM)
    for words in (
        ("train", "lenet-300-100", "--out", dense, *options),
        ("prune", dense, "--out", sparse, "--sparsity", 0.9, *options, "--set", "method=one-shot"),
    ):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stop:
            patch.setattr(sys, "argv", ["sparring", *map(str, words)])
            main()
        assert not stop.value.code
    signal.signal(signal.SIGTERM, before)
    return dense, sparse


def test_a_study_from_start_to_report(sparring, plan: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    words = ("study", plan, "--set", "seeds=2", "--out", tmp_path / "out")
    first = sparring(*words, "--workers", 0)
    assert first.code == 0
    assert "seed 0" in first.out and str(tmp_path / "out" / "report.html") in first.out
    page = (tmp_path / "out" / "report.html").stat().st_mtime_ns
    again = sparring(*words, "--workers", 0, "--json")
    summary = json.loads(again.out)
    assert summary["failed"] == 0 and summary["verdict"] and len(summary["records"]) > 10
    assert (tmp_path / "out" / "report.html").stat().st_mtime_ns == page
    assert read_plan(tmp_path / "out").command == " ".join(map(str, ("sparring", *words)))
    rebuilt = sparring("report", tmp_path / "out", "--json")
    assert json.loads(rebuilt.out)["verdict"] == summary["verdict"]
    against = sparring(
        "compare",
        tmp_path / "out",
        tmp_path / "out",
        "--methods",
        "control",
        "gradual",
        "--sparsities",
        0,
        0.5,
        "--json",
    )
    assert against.code == 0 and json.loads(against.out)["differences"]
    limits = ("--max-accuracy-drop", 100, "--max-latency", 1000)
    picked = sparring("pick", tmp_path / "out", *limits, "--values", "int8", "--out", tmp_path / "best.sparring")
    assert picked.code == 0
    best = deploy.load(tmp_path / "best.sparring").program
    assert best.provenance["cell"]["method"] == "gradual" and len(best.provenance["data_hash"]) == 64
    assert best.provenance["weights_sha256"] and best.class_names == tuple("0123456789")
    assert "as shipped in int8: robust_packed" in picked.out
    network = study.trained(tmp_path / "out", best.provenance["key"])
    x, _ = study.chosen_images(data.load("digits"), "test", 0, 40)
    packed = deploy.load(tmp_path / "best.sparring")(data.as_float(x))
    assert not network.training and torch.allclose(network(data.as_float(x)), packed, rtol=0.1, atol=0.1)
    assert json.loads(sparring("pick", tmp_path / "out", *limits, "--json").out)["method"] == "gradual"
    merged = json.loads(sparring("merge", tmp_path / "out", "--out", tmp_path / "merged", "--json").out)
    assert merged["added"] == len(summary["records"])
    nothing = sparring("pick", tmp_path / "out", "--max-accuracy-drop", -100)
    assert nothing.code == 2 and "no network fits" in nothing.err
    status = sparring("status", tmp_path / "out", "--json")
    assert json.loads(status.out)["done"] == len(summary["records"])


def test_a_plan_is_registered_before_its_first_record(sparring, short: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    words = ("study", short, "--out", tmp_path / "out", "--register", "--workers", 0)
    done = sparring(*words, "--json")
    assert done.code == 0 and "registered on " in done.err
    assert "registered before the first record" in json.loads(done.out)["verdict"]
    assert sparring(*words).code == 0, "the registered plan goes on"
    another = sparring(*words, "--set", "seeds=3")
    assert another.code == 2 and "has records already" in another.err
    history = tmp_path / "out" / "history.jsonl"
    history.write_text(history.read_text().replace('"look":1', '"look":0'))
    broken = sparring("report", tmp_path / "out")
    assert broken.code == 2 and "damaged or changed at line 2" in broken.err and "Traceback" not in broken.err


def test_failed_cells_give_exit_code_3(  # type: ignore[no-untyped-def]
    sparring, short: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "breaking.py").write_text(
        "from sparring.sparsity import Pruner\n"
        "class Broken(Pruner):\n"
        "    def __call__(self, step):\n"
        "        raise RuntimeError('my pruner broke')\n"
        "def pruner(sparsity):\n"
        "    return Broken()\n"
    )
    monkeypatch.chdir(tmp_path)
    result = sparring(
        "study", short, "--out", "out", "--workers", 0, "--set", "pruning=[{method='breaking:pruner',label='mine'}]"
    )
    assert result.code == 3
    assert "my pruner broke" in result.err
    assert Path("out/report.html").exists()


def test_train_prune_attack_certify_compare(sparring, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    dense, sparse = tmp_path / "dense.safetensors", tmp_path / "sparse.safetensors"
    options = ("--data", "digits", "--quiet")
    assert sparring("train", "lenet-300-100", "--out", dense, *options, "--set", "epochs=2").code == 0
    pruned = sparring(
        "prune", dense, "--out", sparse, "--sparsity", 0.9, *options, "--set", "epochs=2", "--set", "method=one-shot"
    )
    assert pruned.code == 0 and "90.00%" in pruned.out
    attacked = sparring(
        "attack", sparse, "--data", "digits", "--attacks", "fgsm,deepfool", "--norm", "l2", "--eps", "0.1,0.2",
        "--images", 50, "--json",
    )  # fmt: skip
    rows = json.loads(attacked.out)["results"]
    assert [(r["attack"], r["eps"]) for r in rows] == [("fgsm", 0.1), ("fgsm", 0.2), ("deepfool", None)]
    assert all(r["mean_distance"] > 0 for r in rows if r["eps"] is None)
    table = sparring("attack", sparse, "--data", "digits", "--images", 20, "--checks", 10).out
    assert "robust accuracy" in table and "worst case" in table
    certified = json.loads(sparring("certify", sparse, "--data", "digits", "--images", 20, "--json").out)
    assert certified["certified_accuracy"]["0.01"] <= certified["attacked_accuracy"]["0.01"]
    same = sparring("compare", dense, dense, "--data", "digits", "--images", 40, "--max-drop", "accuracy", 0.1)
    assert same.code == 0
    worse = sparring("compare", dense, sparse, "--data", "digits", "--images", 40, "--max-drop", "accuracy", 0.0001)
    assert worse.code in (0, 1)
    unknown = sparring("compare", dense, sparse, "--data", "digits", "--images", 40, "--max-drop", "acuracy", 1)
    assert unknown.code == 2 and "Did you mean 'accuracy'" in unknown.err


def test_commands_run_on_a_gpu_as_on_the_cpu(sparring, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    options, found = ("--data", "digits", "--images", 20, "--json"), {}
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        for device in ("cpu", "cuda:0"):
            made = tmp_path / f"{device[:3]}.safetensors"
            with PretendGPU() if device != "cpu" else nullcontext():
                words = ("--data", "digits", "--device", device, "--quiet", "--set", "epochs=1")
                assert sparring("train", "mlp", "--out", made, *words).code == 0
                attack = ("attack", made, *options, "--attacks", "pgd", "--checks", 0, "--device", device)
                attacked = json.loads(sparring(*attack).out)
                certify = ("certify", made, *options, "--method", "interval", "--device", device)
                certified = json.loads(sparring(*certify).out)
            assert attacked["device"] == certified["device"] == device and attacked["dtype"] == "float32"
            shown = [
                attacked["results"][0]["robust_accuracy"],
                certified["radius_median"],
                certified["distance_median"],
            ]
            found[device] = shown, load_model(made)[0].state_dict()
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)
    (first, weights), (second, others) = found.values()
    assert first == second and all(torch.equal(weights[name], others[name]) for name in weights)


def test_a_network_is_pruned_under_attack(sparring, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    dense, sparse = tmp_path / "dense.safetensors", tmp_path / "sparse.safetensors"
    attack = ("--data", "digits", "--quiet", "--loss", "trades", "--eps", 0.05, "--set", "epochs=1")
    trained = json.loads(sparring("train", "mlp", "--out", dense, *attack, "--json").out)["written"]
    assert [one["path"] for one in trained] == [str(dense), str(tmp_path / "dense-best.safetensors")]
    told = sparring("prune", dense, "--out", sparse, "--sparsity", 0.8, *attack, "--set", "method=hydra")
    assert told.code == 0 and "(80.00%)" in told.out and "under PGD (eps 0.05)" in told.out
    for path in (sparse, tmp_path / "sparse-best.safetensors"):
        assert f"wrote {path}" in told.out
        model, _, masks = load_model(path)
        assert sparsity_of(masks) == pytest.approx(0.8)
        assert all(not model.get_parameter(name)[~mask].any() for name, mask in masks.items())
    half = ("--quiet", "--set", "epochs=1", "--set", "structure=2:4", "--set", "scope=layer", "--sparsity", 0.5)
    halved = sparring("prune", dense, "--out", sparse, "--data", "digits", *half, "--json")
    assert json.loads(halved.out)["sparsity"] == 0.5 and "(50.00%)" in halved.err
    assert json.loads(halved.out)["covered"] == 1 and "2:4 covers 100.0% of the weights" in halved.err
    wrong = sparring("prune", dense, "--out", sparse, "--data", "digits", "--sparsity", 0.8, "--loss", "pdg-at")
    assert wrong.code == 2 and "'pgd-at'" in wrong.err


def test_covered_is_the_share_of_matrices_that_an_nm_structure_prunes() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 4))
    with pytest.warns(LeftDenseWarning, match=r"'0.weight' \(3 inputs\)"):
        masks = select({"0.weight": torch.rand(8, 3, 3, 3), "3.weight": torch.rand(4, 32)}, 0.5, structure=NM(2, 4))
    assert covered(model, masks, "2:4") == 128 / (128 + 216)
    assert covered(model, masks, "unstructured") is covered(model, masks, None) is None


def test_eps_grows_where_a_ramp_is_asked_for(sparring, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    attack = ("--data", "digits", "--quiet", "--loss", "pgd-at", "--eps", 0.2, "--set", "epochs=1")
    weights = []
    for name, ramp in (("whole", ()), ("ramped", ("--ramp", 1)), ("again", ("--ramp", 1))):
        path = tmp_path / f"{name}.safetensors"
        assert sparring("train", "mlp", "--out", path, *attack, *ramp).code == 0
        weights.append(torch.cat([p.detach().flatten() for p in load_model(path)[0].parameters()]))
    whole, ramped, again = weights
    assert torch.equal(ramped, again) and not torch.allclose(whole, ramped)
    wrong = sparring("train", "mlp", "--out", tmp_path / "x.safetensors", *attack, "--ramp", 2)
    assert wrong.code == 2 and "ramp is a fraction of the training" in wrong.err


def test_a_constant_network_is_written_and_refused(sparring, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / "constant.safetensors"
    options = ("--data", "digits", "--quiet", "--set", "epochs=1", "--set", "lr=50", "--width", 0.1)
    told = sparring("train", "lenet-300-100", "--out", path, *options)
    assert told.code == 2 and "for every validation image" in told.err and "ramp" in told.err
    assert f"wrote {path}" in told.out and load_model(path)


def test_export_runs_the_artefact_against_the_model(  # type: ignore[no-untyped-def]
    sparring, models: tuple[Path, Path], tmp_path: Path
) -> None:
    for values, activations in (("fp32", "fp32"), ("int8", "int8"), ("int8", "fp32")):
        path, numbers = tmp_path / f"{values}.sparring", ("--values", values, "--activations", activations)
        told = sparring("export", models[1], path, "--data", "digits", *numbers, "--images", 20)
        assert told.code == 0 and path.exists() and "times smaller" in told.out and "artefact" in told.out
        assert re.search(r"one image takes [\d.e-]+ ms on one core, [\d.]+ times as fast", told.out)
        assert bool(deploy.load(path).program.rounding) == (activations == "int8")
        certified = sparring("certify", path, "--data", "digits", "--images", 10)
        assert certified.code == (2 if activations == "int8" else 0)
        assert "HopSkipJump" in told.out and "artefact − model" in told.out
    refused = sparring("export", models[1], path, "--data", "digits", "--activations", "int8")
    assert refused.code == 2 and "--values int8" in refused.err
    program = deploy.load(path).program
    assert program.class_names is not None and len(program.provenance["weights_sha256"]) == 64
    again = sparring("export", models[1], path, "--data", "digits", "--values", "int8", "--images", 20, "--json")
    assert json.loads(again.out)["bytes"] == path.stat().st_size and "HopSkipJump" in again.err
    few = sparring("export", models[1], path, "--data", "digits", "--seconds", 1e-3, "--images", 50, "--json")
    assert json.loads(few.out)["images"] == 2 and "attacking 2 of 50 images" in few.err
    onnx = sparring("export", models[1], tmp_path / "m.onnx", "--format", "onnx", "--data", "digits", "--json")
    assert json.loads(onnx.out)["logit_error"] < 1e-4 and "checked in ONNX Runtime" in onnx.err
    attacked = sparring("attack", path, "--data", "digits", "--images", 20, "--attacks", "pgd", "--json")
    assert 0 <= json.loads(attacked.out)["results"][0]["robust_accuracy"] <= 1
    assert "median certified radius" in certified.out
    refused = sparring("prune", path, "--out", tmp_path / "x.safetensors", "--sparsity", 0.5, "--data", "digits")
    assert refused.code == 2 and "cannot be pruned further" in refused.err
    shown = ("--batches", "1", "--rounds", 2, "--data", "digits", "--engines", "packed, torch")
    small = tmp_path / "small.safetensors"
    options = ("--data", "digits", "--quiet", "--set", "epochs=1", "--width", 0.1)
    assert sparring("train", "lenet-300-100", "--out", small, *options).code == 0
    table = sparring("bench", models[1], *shown, "--plot", tmp_path / "bench.svg", "--small", small)
    assert table.code == 0 and "in memory" in table.out and "small dense one" in table.out
    assert (tmp_path / "bench.svg").read_text().startswith("<svg")
    assert "At batch 1 ship" in table.out
    found = json.loads(sparring("bench", path, *shown, "--json").out)
    rows = found["rows"]
    assert {"packed", "torch"} <= {row["engine"] for row in rows} and all(row["milliseconds"] > 0 for row in rows)
    wrong = sparring("export", models[1], tmp_path / "m.tflite", "--format", "tflite", "--data", "digits")
    assert wrong.code == 2 and "packed or onnx" in wrong.err


def test_a_study_of_weights_that_exist(  # type: ignore[no-untyped-def]
    sparring, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "shipped.py").write_text(
        "from torch import nn\n\ndef net(shape, classes):\n    return nn.Sequential(nn.Flatten(), nn.Linear(64, 9), "
        "nn.ReLU(), nn.Linear(9, classes))\n"
    )
    monkeypatch.chdir(tmp_path)
    options = ("--data", "digits", "--quiet", "--set", "epochs=2")
    assert sparring("train", "shipped:net", "--out", "mine.safetensors", *options).code == 0
    Path("own.toml").write_text(SHORT.replace('model = { name = "mlp", widths = [16] }', ""))
    words = ("--model", "shipped:net", "--weights", "mine.safetensors")
    done = sparring("study", "own.toml", "--out", "own", *words, "--workers", 0, "--json")
    assert done.code == 0
    trained = [record for record in json.loads(done.out)["records"] if record["stage"] == "train"]
    assert len(trained) == 1, "one dense network, the user's, for both seeds"
    missing = sparring("study", "own.toml", "--out", "none", "--weights", "nowhere.safetensors")
    assert missing.code == 2 and "nowhere.safetensors" in missing.err


def test_lists_and_doctor(sparring) -> None:  # type: ignore[no-untyped-def]
    tables = json.loads(sparring("list", "--json").out)
    assert "quick" in tables["presets"] and "pgd" in tables["attacks"] and "digits" in tables["data"]
    assert all(text for table in tables.values() for text in table.values()), "everything has a description"
    assert "lenet-5" in sparring("list", "models").out
    facts = json.loads(sparring("doctor", "--json").out)
    assert facts["cores"] >= 1 and facts["data"]["mnist-5k"] and facts["packages"]["torch"]
    assert "torch" in sparring("doctor").out


def test_doctor_says_when_torchvision_is_for_another_torch(
    sparring,  # type: ignore[no-untyped-def]
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "torchvision.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    (tmp_path / "torchvision-0.1.dist-info").mkdir()
    (tmp_path / "torchvision-0.1.dist-info" / "METADATA").write_text("Name: torchvision\nVersion: 0.1\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    said = json.loads(sparring("doctor", "--json").out)["extras"]["torchvision"]
    assert said.startswith("0.1, cannot be imported with torch") and "pip install" in said


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("study", "quik"), "Did you mean 'quick'"),
        (("study", "nowhere.toml"), "nowhere.toml"),
        (("study", "quick", "--set", "sedes=3"), "did you mean 'seeds'"),
        (("study", "quick", "--set", "data=mnits"), "Did you mean 'mnist'"),
        (("study", "quick", "--set", "data=/nowhere/at/all"), "/nowhere/at/all"),
        (("study", "quick", "--workers", "-1"), "workers"),
        (("report", "nowhere"), "nowhere"),
        (("status", "nowhere"), "not a study"),
        (("attack", "lenet-5"), "without weights"),
        (("attack", "missing.safetensors"), "missing.safetensors"),
        (("attack", "lenet-5", "--attacks", "fgms"), "Did you mean 'fgsm'"),
        (("attack", "lenet-5", "--eps", "8"), "255"),
        (("attack", "lenet-5", "--eps", "a"), "a fraction such as 8/255"),
        (("attack", "lenet-5", "--norm", "l3"), "linf, l2, l1, l0"),
        (("attack", "no_module:f", "--data", "digits"), "cannot import"),
        (("train", "lenet-6", "--out", "x.safetensors"), "Did you mean 'lenet-5'"),
        (("train", "mlp", "--out", "x.safetensors", "--set", "lr=-1"), "lr must lie"),
        (("list", "atacks"), "Did you mean 'attacks'"),
        (("compare", "a", "b"), "a"),
        (("frobnicate",), "frobnicate"),
        (("study", "--no-such-option"), "no-such-option"),
    ],
)
def test_mistakes_end_with_code_2_and_say_why(  # type: ignore[no-untyped-def]
    sparring, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    result = sparring(*words)
    assert result.code == 2
    assert message in result.err + result.out
    assert not (tmp_path / "x.safetensors").exists()


def test_a_model_that_does_not_fit_the_data_is_named(sparring, models: tuple[Path, Path]) -> None:  # type: ignore[no-untyped-def]
    result = sparring("attack", models[0], "--data", "mnist-5k", "--images", 10)
    assert result.code == 2 and "does not accept" in result.err


def test_help_needs_no_heavy_import() -> None:
    code = (
        "import sys, sparring.cli as c; sys.argv = ['sparring', '--help']\n"
        "try: c.main()\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'numpy', 'scipy', 'pydantic', 'sklearn'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ, check=False)
    assert done.returncode == 0, done.stderr
    assert "study" in done.stdout


def test_prune_says_what_share_of_all_matrices_is_gone(  # type: ignore[no-untyped-def]
    sparring, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mixing.py").write_text(
        "import torch\nfrom torch import nn\n"
        "class Mix(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.matrix = nn.Parameter(torch.randn(64, 20) / 8)\n"
        "    def forward(self, x):\n"
        "        return x @ self.matrix\n"
        "def net(shape, classes):\n"
        "    return nn.Sequential(nn.Flatten(), Mix(), nn.ReLU(), nn.Linear(20, classes))\n"
    )
    dense, options = tmp_path / "dense.safetensors", ("--data", "digits", "--set", "epochs=1")
    assert sparring("train", "mixing:net", "--out", dense, *options).code == 0
    words = (
        "prune",
        "mixing:net",
        "--weights",
        dense,
        "--sparsity",
        0.5,
        "--out",
        tmp_path / "s.safetensors",
        *options,
    )
    told = sparring(*words)
    assert "removed 100 of 200 weights (50.00%), 6.76% of all 1480 weights" in told.out and "'1.matrix'" in told.out
