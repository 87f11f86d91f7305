"""`sparring verify`: its exit codes, what it prints, and the counter-example that it writes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from sparring.deploy import to_onnx
from sparring.graph import onnx_runtime, read_onnx
from sparring.models import Blueprint, save_model

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write max(x, 0) of two pixels as an ONNX file."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
    model.load_state_dict({f"{i}.weight": torch.eye(2) for i in (1, 3)} | {f"{i}.bias": torch.zeros(2) for i in (1, 3)})
    path = tmp_path_factory.mktemp("exported") / "m.onnx"
    to_onnx(model.eval(), path, shape=(1, 1, 2))
    return path


@pytest.fixture
def work(exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work in a folder with that file."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(exported, tmp_path)
    return tmp_path


def ask(limit: str) -> str:
    declared = "".join(f"(declare-const {name} Real)" for name in ("X_0", "X_1", "Y_0", "Y_1"))
    box = "".join(f"(assert (>= {x} -1))(assert (<= {x} 0.7))" for x in ("X_0", "X_1"))
    Path("p.vnnlib").write_text(declared + box + f"(assert (>= Y_0 {limit}))")
    return "p.vnnlib"


def test_a_property_that_fails_has_a_counter_example_in_the_formats_of_others(work: Path, sparring) -> None:  # type: ignore[no-untyped-def]
    done = sparring("verify", "m.onnx", ask("0.65"), "--counter-example", "out.txt", "--json")
    found = json.loads(done.out)
    assert done.code == 1 and found["results"][0]["status"] == "falsified"
    first, *rest = (work / "out.txt").read_text().splitlines()
    values = {name: float(value) for name, value in (line.strip(" ()").split() for line in rest)}
    assert first == "sat" and list(values) == ["X_0", "X_1", "Y_0", "Y_1"] and values["X_0"] <= 0.7
    y = onnx_runtime(read_onnx("m.onnx"))(torch.tensor([[values["X_0"], values["X_1"]]]))
    assert y.tolist() == [[values["Y_0"], values["Y_1"]]] and values["Y_0"] >= 0.65


def test_a_property_that_holds_ends_with_0_and_one_out_of_time_with_3(work: Path, sparring) -> None:  # type: ignore[no-untyped-def]
    done = sparring("verify", "m.onnx", ask("0.71"), "--counter-example", "out.txt")
    assert done.code == 0 and "1 verified" in done.out and (work / "out.txt").read_text() == "unsat\n"
    made = Blueprint("mlp", (1, 8, 8), 10, (0.0,), (1.0,), widths=(60, 60))
    save_model("hard.safetensors", made.build(), made)
    data = ("--data", "digits", "--images", "2")
    done = sparring("verify", "hard.safetensors", "--eps", "0.0001", "--seconds", "1e-9", *data)
    assert done.code in (1, 3) and "verified" in done.out
    assert ("unknown: the search ran out of time" in done.out) == (" 0 unknown" not in done.out)


def test_images_are_asked_one_by_one(work: Path, sparring) -> None:  # type: ignore[no-untyped-def]
    made = Blueprint("mlp", (1, 8, 8), 10, (0.0,), (1.0,), widths=(8,))
    save_model("m.safetensors", made.build(), made)
    done = sparring("verify", "m.safetensors", "--eps", "1e-6", "--data", "digits", "--images", "3", "--json")
    assert {row["status"] for row in json.loads(done.out)["results"]} <= {"verified", "falsified"}
    assert done.code == 1  # an untrained network is wrong on some image


MISTAKES = {
    "nothing asked": ("m.onnx", "a property in VNN-LIB or --eps"),
    "no such property": ("m.onnx p.txt", "does not exist"),
    "no time": ("m.onnx --eps 0.1 --seconds 0", "--seconds must be above 0"),
    "an example of images": ("m.onnx --eps 0.1 --counter-example o", "a property in VNN-LIB"),
    "no model": ("n.onnx --eps 0.1", "n.onnx does not exist"),
    "a broken model": ("broken.onnx p.vnnlib", "not an ONNX file"),
    "units": ("m.onnx --eps 8", "larger than the image range"),
}


@pytest.mark.parametrize("kind", MISTAKES)
def test_mistakes_end_with_2_and_one_sentence(kind: str, work: Path, sparring) -> None:  # type: ignore[no-untyped-def]
    words, reason = MISTAKES[kind]
    (work / "broken.onnx").write_bytes(b"broken")
    ask("1")
    done = sparring("verify", *words.split())
    assert done.code == 2 and reason in done.err and done.err.count("\n") == 1
