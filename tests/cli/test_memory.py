"""A network or images that do not fit into memory are refused with the number, in every command."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sparring import memory, ram
from sparring.cli import _sources

NETWORKS = """
from torch import nn

def huge():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 2_000_000), nn.ReLU(), nn.Linear(2_000_000, 10))

def giant():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 2**34), nn.ReLU(), nn.Linear(2**34, 10))

def small():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
"""
FEW = ("--data", "digits", "--images", "4")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "own_sizes.py").write_text(NETWORKS)
    (tmp_path / "plan.toml").write_text('data = "digits"\nmodel = "own_sizes:huge"\n[[pruning]]\n')
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


COMMANDS = pytest.mark.parametrize(
    "words",
    [
        ("attack", "own_sizes:huge", *FEW),
        ("certify", "own_sizes:huge", *FEW),
        ("compare", "own_sizes:huge", "own_sizes:huge", *FEW),
        ("export", "own_sizes:huge", "out.sparring", *FEW),
        ("bench", "own_sizes:huge", "--data", "digits"),
        ("train", "own_sizes:huge", "--data", "digits", "--out", "out.safetensors"),
        ("prune", "own_sizes:huge", "--data", "digits", "--sparsity", "0.5", "--out", "out.safetensors"),
        ("study", "plan.toml", "--out", "out"),
    ],
    ids=lambda words: words[0],
)


@COMMANDS
def test_a_network_far_too_large_is_refused_before_it_is_built(
    sparring: Callable[..., Any], folder: Path, words: tuple[str, ...]
) -> None:
    plan = folder / "plan.toml"
    plan.write_text(plan.read_text().replace("huge", "giant"))
    found = sparring(*(word.replace("huge", "giant") for word in words))
    assert found.code == 2 and re.search(r"own_sizes:giant' takes at least [\d.]+ GiB and [\d.]+ [GM]iB are", found.err)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is limited on Linux")
@pytest.mark.skipif(Path("/dev/nvidiactl").exists(), reason="memory is not limited where there is an NVIDIA driver")
@COMMANDS
def test_a_network_that_does_not_fit_is_refused(
    sparring: Callable[..., Any], folder: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]
) -> None:
    monkeypatch.setattr(ram, "available", lambda: 2**20)
    monkeypatch.setattr(memory, "available", lambda: 2**62)  # an estimate that is too low
    found = sparring(*words)
    assert found.code == 2 and re.search(r"out of memory: 488 MiB more do not fit; use a smaller model", found.err)


def test_a_batch_or_images_that_do_not_fit_are_refused(
    sparring: Callable[..., Any], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "_SCRATCH", 2**30)
    monkeypatch.setattr(memory, "available", lambda: 2**29)
    words = ("attack", "own_sizes:small", *FEW, "--attacks", "fgsm", "--eps", "0.1")
    found = sparring(*words, "--batch-size", 4)
    assert found.code == 2 and "an attack takes 1.0 GiB for 4 images at a time and 512 MiB are free" in found.err
    found = sparring("bench", "own_sizes:small", "--data", "digits", "--batches", 8)
    assert found.code == 2 and "a forward pass takes 1.0 GiB for 8 images" in found.err
    monkeypatch.setattr(_sources, "free_memory", lambda: 3000)
    found = sparring(*words)
    assert found.code == 2 and "1 MiB are free: at most 1 fit" in found.err
