"""Every built-in network has a recipe, which trains it, and which the commands take."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch

from sparring.cli import main
from sparring.data import Dataset, as_float
from sparring.facts import MODELS as FACTS
from sparring.metrics import accuracy
from sparring.models import MODELS, build, recipe_settings
from sparring.train import Recipe, fit, predict

PAGE = (Path(__file__).parents[2] / "docs" / "recipes.md").read_text()


def test_every_network_has_a_recipe_that_the_page_tells() -> None:
    for name in MODELS:
        recipe = Recipe(**recipe_settings(name, channels=3))
        row = rf"\| `{name}[^`]*` \| [^|]+ \| {recipe.lr:g} \| {recipe.epochs} \| {recipe.batch_size} \|"
        assert re.search(row, PAGE), name


def test_only_colour_images_are_augmented_and_fine_tuning_takes_half_the_rate() -> None:
    assert Recipe(**recipe_settings("vgg-like", channels=3)).augment
    assert not Recipe(**recipe_settings("vgg-like", channels=1)).augment
    whole, half = (recipe_settings("lenet-5", channels=1, fine_tuning=fine) for fine in (False, True))
    assert half["lr"] == whole["lr"] / 2
    assert Recipe(**recipe_settings("mine:net", channels=1)).optimizer == "adam"


@pytest.mark.parametrize("name", ["linear", "mlp", "lenet-300-100", "lenet-5"])
def test_a_recipe_trains_with_room_to_spare(name: str, digits: Dataset) -> None:
    """Twice the recipe's learning rate on enlarged digits: no loss that diverges, nine of ten images right."""
    settings = recipe_settings(name, channels=1)
    x, x_test = (split.x.repeat_interleave(2, 2).repeat_interleave(2, 3) for split in (digits.train, digits.test))
    model = build(name, shape=(1, 16, 16), classes=10, mean=digits.mean, std=digits.std, seed=1)
    fit(model, x, digits.train.y, Recipe(**{**settings, "lr": 2 * settings["lr"]}))
    assert accuracy(predict(model, x_test), digits.test.y) > 0.9


@pytest.mark.parametrize(("name", "width"), [("vgg-like", 0.03), ("resnet-32", 0.1)])
def test_the_first_steps_of_the_deep_networks_stay_finite(name: str, width: float) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (256, 3, 16, 16), generator=generator, dtype=torch.uint8)
    model = build(name, shape=(3, 16, 16), classes=10, mean=(0.5,) * 3, std=(0.3,) * 3, width=width)
    fit(
        model, x, torch.arange(256) % 10, Recipe(**{**recipe_settings(name, channels=3), "epochs": 1, "batch_size": 32})
    )
    assert torch.isfinite(model(as_float(x[:4]))).all()


def test_train_takes_the_recipe_and_what_is_set_besides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def lines(*words: str) -> list[str]:
        out = str(tmp_path / "model.safetensors")
        monkeypatch.setattr(sys, "argv", ["sparring", *words, "--data", "digits", "--out", out])
        with pytest.raises(SystemExit) as stop:
            main()
        assert stop.value.code == 0
        return [line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch ")]

    assert len(lines("train", "linear")) == FACTS["linear"].recipe["epochs"]
    assert len(lines("train", "linear", "--set", "epochs=2")) == 2
    first, again = lines("train", "linear", "--set", "lr=0.01"), lines("train", "linear")
    assert [line.split("  ")[1] for line in first] == [line.split("  ")[1] for line in again], "0.01 is the recipe's"
    pruned = lines("prune", str(tmp_path / "model.safetensors"), "--sparsity", "0.5")
    assert len(pruned) == FACTS["linear"].recipe["epochs"]
