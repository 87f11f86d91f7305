"""Data that are too few for what is asked: one class, or fewer images than a command would take."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparring.models import Blueprint, save_model
from sparring.train import predict

Sparring = Callable[..., Any]
PLAN = 'data = "{data}"\nmodel = "mlp"\n[recipe]\nepochs = 1\n[[pruning]]\n'


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    made = Blueprint("mlp", (1, 8, 8), 2, (0.0,), (1.0,), widths=(8,))
    save_model(tmp_path / "m.safetensors", made.build(), made)
    x = np.random.default_rng(0).integers(0, 256, (20, 8, 8), np.uint8)
    one, two = 0 * x[:, 0, 0], x[:, 0, 0] % 2
    for name, y, classes in (("one", one, 1), ("named", one, 2), ("two", two, 2)):
        arrays = {"x_train": x, "y_train": y, "x_test": 255 - x[:5], "y_test": y[:5]}
        np.savez(tmp_path / f"{name}.npz", allow_pickle=False, **arrays, classes=np.array(classes))
        (tmp_path / f"{name}.toml").write_text(PLAN.format(data=f"{name}.npz"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("data", ["one", "named"])
def test_training_on_one_class_is_refused_before_work(sparring: Sparring, folder: Path, data: str) -> None:
    for words in (
        ("train", "mlp", "--data", f"{data}.npz", "--out", "o.safetensors"),
        ("prune", "m.safetensors", "--data", f"{data}.npz", "--sparsity", 0.5, "--out", "o.safetensors"),
        ("study", f"{data}.toml", "--out", "out"),
    ):
        told = sparring(*words)
        assert told.code == 2 and f"all training images of '{data}' are of one class" in told.err
        assert not (folder / "out").exists() and not (folder / "o.safetensors").exists()
    told = sparring("attack", "m.safetensors", "--data", f"{data}.npz", "--attacks", "fgsm", "--checks", 0)
    if data == "one":
        assert told.code == 2 and "returns 2 numbers per image, but one has 1 class: do model and data" in told.err
    else:
        assert told.code == 0


def test_fewer_images_than_asked_for_are_counted(sparring: Sparring, folder: Path) -> None:
    given = ("--data", "two.npz", "--images", 6)
    for words in (
        ("attack", "m.safetensors", "--attacks", "fgsm", "--checks", 0),
        ("certify", "m.safetensors"),
        ("verify", "m.safetensors", "--eps", 0.01),
        ("compare", "m.safetensors", "m.safetensors"),
        ("export", "m.safetensors", "o.sparring"),
        ("export", "m.safetensors", "o.onnx"),
    ):
        assert "two has 5 test images, fewer than 6: all are used" in sparring(*words, *given).err
        assert "all are used" not in sparring(*words, *given[:3], 5).err


def test_training_predicts_each_image_once(sparring: Sparring, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = list[int]()

    def count(model: Any, x: Any, **options: Any) -> Any:
        seen.append(len(x))
        return predict(model, x, **options)

    monkeypatch.setattr("sparring.cli._progress.predict", count)
    sparring("train", "mlp", "--data", "two.npz", "--out", "o.safetensors", "--set", "epochs=1")
    assert sorted(seen) == [2, 5]
