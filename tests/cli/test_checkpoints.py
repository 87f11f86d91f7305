"""A user's own network with a checkpoint from elsewhere: what to type is said, and the same weights are judged."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from sparring.cli._app import ModelSource

CODE = """
from torch import nn
from sparring.models import Normalise

def inner():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))

def wrapped():
    return nn.Sequential(Normalise((0.3,), (0.5,)), inner())

def given(mean, std):
    return nn.Sequential(Normalise(mean, std), inner())
"""
ATTACK = ("--data", "digits", "--images", 20, "--attacks", "fgsm", "--checks", 0, "--json")


@pytest.fixture
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the path of weights, in a folder that holds the user's code."""
    (tmp_path / "owners.py").write_text(CODE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "owners", raising=False)
    torch.manual_seed(0)
    save_file(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).state_dict(), "w.safetensors")
    return Path("w.safetensors")


def test_a_checkpoint_is_converted_and_named_after_an_at(weights: Path, sparring) -> None:  # type: ignore[no-untyped-def]
    state = {f"module.{name}": value for name, value in load_file(weights).items()}
    torch.save({"state_dict": state, "epoch": 1}, "w.pth")
    refused = sparring("attack", "owners:wrapped", "--weights", "w.pth", *ATTACK)
    assert refused.code == 2
    assert "type `sparring convert w.pth w.safetensors`" in refused.err
    assert sparring("attack", "owners:wrapped@w.pth", *ATTACK).err == refused.err
    done = sparring("convert", "w.pth", "w.safetensors", "--json")
    assert json.loads(done.out)["key"] == "state_dict"
    assert "under 'state_dict'" in done.err and "'module.'" in done.err
    found = [
        sparring("attack", *model, *ATTACK)
        for model in (
            ("owners:wrapped", "--weights", weights),
            (f"owners:wrapped@{weights}",),
            (f"owners:given@{weights}", "--mean", "0.3", "--std", "0.5"),
        )
    ]
    assert all(one.code == 0 for one in found)
    assert "the network inside" in found[0].err
    rows = [json.loads(one.out)["results"][0] for one in found]
    assert len({(row["accuracy"], row["robust_accuracy"]) for row in rows}) == 1


def test_moments_that_are_assumed_are_said(weights: Path, sparring) -> None:  # type: ignore[no-untyped-def]
    assert "mean and std of digits" in sparring("attack", f"owners:given@{weights}", *ATTACK).err
    for words, message in (
        (("owners:given", "--mean", "0.3"), "must be given together"),
        (("owners:wrapped", "--mean", "0.3", "--std", "0.5"), "its own normalisation"),
        (("owners:given", "--mean", "0.3,0.3", "--std", "0.5"), "1 numbers"),
        (("owners:given", "--mean", "0", "--std", "0"), "numbers in [0.0001, 1]"),
        ((f"owners:given@{weights}", "--weights", weights), "drop --weights"),
    ):
        refused = sparring("attack", *words, *ATTACK)
        assert refused.code == 2 and message in refused.err


def test_training_refuses_weights_that_it_would_not_use(weights: Path, sparring) -> None:  # type: ignore[no-untyped-def]
    refused = sparring("train", f"owners:inner@{weights}", "--data", "digits", "--out", "m.safetensors")
    assert refused.code == 2 and "starts from new weights" in refused.err


@pytest.mark.parametrize(
    ("model", "name", "file"),
    [
        ("a:b@w.safetensors", "a:b", "w.safetensors"),
        ("a:b@/home/me@work/w.pth", "a:b", "/home/me@work/w.pth"),
        ("hf:/home/me@work/net@w.safetensors", "hf:/home/me@work/net", "w.safetensors"),
        ("a:b@c", "a:b@c", None),
        ("@w.safetensors", "@w.safetensors", None),
    ],
)
def test_a_file_of_weights_stands_after_an_at(model: str, name: str, file: str | None) -> None:
    assert ModelSource(model).named() == (name, file and Path(file))


def test_a_model_file_may_have_an_at_in_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("net@2.safetensors").touch()
    assert ModelSource("net@2.safetensors").named() == ("net@2.safetensors", None)
