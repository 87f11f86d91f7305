"""Kernels on bytes give the logits of plain NumPy integers, to the last bit."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from sparring import deploy
from sparring.deploy._artefact import round_program
from sparring.deploy._compile import compile_model
from sparring.deploy._program import Program
from sparring.deploy.kernels import _engine as engine
from sparring.deploy.kernels._engine import Engine
from sparring.deploy.rounding._calibrate import calibrate
from sparring.deploy.rounding._reference import run_rounded
from sparring.models import Residual
from sparring.sparsity import TopK
from tests.deploy.kernels.test_engine import networks

pytestmark = pytest.mark.usefixtures("new_kernels")
BATCHES = (1, 3, 18, 64)


def rounded(model: nn.Module, shape: tuple[int, ...]) -> Program:
    images = torch.rand(8, *shape, generator=torch.Generator().manual_seed(0))
    return calibrate(round_program(compile_model(model.eval(), shape), "int8"), images)


def check(program: Program, batches=BATCHES, lanes: int | None = None) -> None:
    run = Engine(program, lanes=lanes)
    x = np.random.default_rng(0).random((max(batches), *program.shape), np.float32) * np.float32(1.4) - np.float32(0.2)
    expected = run_rounded(program, x)  # of images beyond [0, 1] too
    for n in batches:
        assert (run.run(x[:n]) == expected[:n]).all(), n


@pytest.mark.parametrize(("name", "width"), [("lenet-300-100", None), ("lenet-5", None), ("resnet-32", 0.125)])
def test_logits_are_the_references(sparse_model, name, width):
    shape = (1, 28, 28) if "lenet" in name else (3, 32, 32)
    check(rounded(sparse_model(name, 0.1, width=width), shape), (1, 3, 18) if width else BATCHES)


@settings(max_examples=6, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(network=networks(), lanes=st.sampled_from([None, None, 8, 4]))
def test_any_geometry(sparsify, network, lanes):
    model, shape, density, seed = network
    check(rounded(sparsify(model, density, torch.Generator().manual_seed(seed)), shape), (1, 3, 18), lanes)


def test_extreme_weights_and_activations_saturate_as_they_should():
    """All weights are 127 or -127 and all inputs 255, so that sums of two products leave 16 bits."""
    torch.manual_seed(0)
    first, second = nn.Linear(40, 24), nn.Linear(24, 5)
    with torch.no_grad():
        for layer in (first, second):
            layer.weight.copy_(torch.sign(torch.randn_like(layer.weight)))
            layer.weight[:3] = layer.weight[:3].abs()
    program = rounded(nn.Sequential(first, nn.ReLU(), second), (40,))
    run = Engine(program)
    for x in (np.ones((70, 40), np.float32), np.full((70, 40), 1e30, np.float32), np.full((70, 40), -1e30, np.float32)):
        expected = run_rounded(program, x)
        assert all((run.run(x[:n]) == expected[:n]).all() for n in (1, 3, 70))


def test_what_has_no_kernel_on_bytes_runs_in_floats_between_them():
    torch.manual_seed(0)
    layers = [
        nn.Conv2d(2, 6, 3, padding=1),
        TopK(0.5),
        nn.Conv2d(6, 5, 3),
        nn.ReLU(),
        nn.MaxPool2d(3, 2, 1),
        nn.ReLU6(),
    ]
    tail = [Residual(nn.Sequential(nn.ReLU(), nn.Conv2d(5, 5, 3, padding=1)), nn.Identity()), nn.AvgPool2d(2)]
    check(rounded(nn.Sequential(*layers, *tail, nn.Flatten(), TopK(0.5), nn.Linear(20, 6)), (2, 9, 9)), (1, 3, 18))


def test_tuning_and_threads_change_no_bit(sparse_model, monkeypatch):
    program = rounded(sparse_model("lenet-5", 0.1), (1, 28, 28))
    x = np.random.default_rng(0).random((40, 1, 28, 28), np.float32)
    expected = run_rounded(program, x)
    assert (Engine(program, threads=2).run(x) == expected).all()
    for number in range(4):

        def choose(planner, *_, number=number, **__):
            return lambda key: planner.choices[number]

        monkeypatch.setattr(engine, "tuned", choose)
        assert all((Engine(program).run(x[:n]) == expected[:n]).all() for n in (1, 40))


CAPPED = """
import sys
import numpy as np
from sparring import deploy
from sparring.deploy.rounding._reference import run_rounded
packed = deploy.load(sys.argv[1])
assert packed.native
x = np.random.default_rng(0).random((21, *packed.program.shape), np.float32)
assert all((packed(x[:n]) == run_rounded(packed.program, x[:n])).all() for n in (1, 3, 21))
"""


@pytest.mark.parametrize("cap", ["avx2", "sse"])
def test_every_processor_gives_the_same_bits(sparse_model, tmp_path: Path, cap: str) -> None:
    path, images = tmp_path / "net.sparring", torch.rand(8, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    deploy.export(sparse_model("lenet-5", 0.1), path, shape=(1, 28, 28), values="int8", calibrate=images)
    environment = {**os.environ, "SPARRING_CPU": cap}
    subprocess.run([sys.executable, "-c", CAPPED, str(path)], env=environment, check=True, timeout=120)


@pytest.mark.parametrize("lanes", [4, 8])
def test_processors_without_such_products_give_the_same_bits(sparse_model, monkeypatch, lanes):
    monkeypatch.setattr(engine, "way_of_products", lambda: "plain")
    check(rounded(sparse_model("lenet-5", 0.1), (1, 28, 28)), (1, 18), lanes)
