from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from sparring import deploy
from sparring.deploy._artefact import MAGIC, read_program
from sparring.deploy._reference import run_reference
from sparring.errors import UserError

SAMPLES = Path(__file__).parent / "samples"
BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "hostile_artefacts.py"
spec = importlib.util.spec_from_file_location("hostile_artefacts", BENCHMARK)
assert spec is not None and spec.loader is not None
hostile = importlib.util.module_from_spec(spec)
spec.loader.exec_module(hostile)


@pytest.fixture
def artefact(tmp_path, sparse_model):
    model = sparse_model("resnet-32", 0.1, width=0.125)
    return deploy.export(model, tmp_path / "net.sparring", shape=(3, 32, 32), provenance={"seed": 3})


@pytest.mark.parametrize("values", ["fp32", "fp16", "int8"])
@pytest.mark.parametrize("name", ["lenet-300-100", "lenet-5", "resnet-32"])
def test_what_is_loaded_is_what_was_exported(tmp_path, sparse_model, name, values):
    model = sparse_model(name, 0.05)
    shape = (1, 28, 28) if "lenet" in name else (3, 32, 32)
    names = [f"class {i}" for i in range(10)]
    path = deploy.export(
        model, tmp_path / "a.sparring", shape=shape, values=values, class_names=names, provenance={"cell": "x"}
    )
    packed = deploy.load(path)
    assert packed.program.class_names == tuple(names) and packed.program.provenance == {"cell": "x"}
    x = torch.rand(3, *shape, generator=torch.Generator().manual_seed(0))
    expected = deploy.pack(model, shape=shape, values=values)(x)
    assert (packed(x) - expected).abs().max() <= 1e-6 * expected.abs().max()
    error = (packed(x) - model(x).detach()).abs().max() / expected.abs().max()
    assert error <= {"fp32": 5e-6, "fp16": 2e-3, "int8": 5e-2}[values]
    assert isinstance(packed(x.numpy()), np.ndarray)


LOGITS = json.loads((SAMPLES / "logits.json").read_text())


@pytest.mark.parametrize("name", sorted(LOGITS))
def test_files_of_every_format_give_what_they_gave_when_they_were_written(name):
    packed = deploy.load(SAMPLES / f"{name}.sparring")
    x = np.linspace(0, 1, 64, dtype=np.float32).reshape(1, 1, 8, 8)
    np.testing.assert_allclose(packed(x)[0], LOGITS[name], rtol=0, atol=2e-6)


@pytest.fixture
def rounded(tmp_path, sparse_model):
    images = torch.rand(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    model = sparse_model("resnet-32", 0.1, width=0.125)
    return deploy.export(model, tmp_path / "rounded.sparring", shape=(3, 32, 32), values="int8", calibrate=images)


def test_rounded_activations_are_loaded_as_exported_to_the_last_bit(rounded, sparse_model):
    images = torch.rand(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    model = sparse_model("resnet-32", 0.1, width=0.125)
    packed, loaded = deploy.pack(model, shape=(3, 32, 32), values="int8", calibrate=images), deploy.load(rounded)
    assert dict(loaded.program.rounding) == dict(packed.program.rounding) and loaded.native
    assert (loaded(images) == packed(images)).all()
    assert (deploy.load(rounded, native=False)(images) == packed(images)).all()
    error = (packed(images) - model(images).detach()).abs().max() / model(images).abs().max()
    assert 0 < error < 0.2
    with pytest.raises(UserError, match="int8"):
        deploy.pack(model, shape=(3, 32, 32), calibrate=images)


def test_hostile_scales_of_activations_are_refused(rounded, tmp_path):
    listed = parts(rounded)[0]["activations"]
    (value, scale, zero), *others = listed
    for activations in (
        None,
        [],
        others,
        [*listed, [999, 0.1, 0]],
        [[value, scale], *others],
        [[value, -scale, zero], *others],
        [[value, 1e-38, zero], *others],
        [[value, 1, zero], *others],
        [[value, scale, 256], *others],
        [[value, scale, True], *others],
    ):
        with pytest.raises(UserError, match=r"mutant\.sparring"):
            deploy.load(change(rounded, tmp_path / "mutant.sparring", activations=activations))
    with pytest.raises(UserError, match=r"mutant\.sparring"):
        deploy.load(change(rounded, tmp_path / "mutant.sparring", values="fp16"))


@pytest.mark.parametrize(("sparsity", "exact", "half"), [(0.9, 8.5, 13.9), (0.95, 16, 26.2), (0.98, 38, 60.3)])
def test_a_sparse_network_is_a_smaller_file(tmp_path, sparse_model, sparsity, exact, half):
    model = sparse_model("vgg-like", 1 - sparsity, width=0.5)
    dense = 4 * sum(p.numel() for p in model.state_dict().values())
    for values, floor in (("fp32", exact), ("fp16", half)):
        path = deploy.export(model, tmp_path / "a.sparring", shape=(3, 32, 32), values=values)
        assert dense / path.stat().st_size >= floor


def test_the_limit_of_weights_counts_groups_as_torch_holds_them(monkeypatch, tmp_path):
    model = nn.Sequential(nn.Conv2d(64, 64, 3, groups=64), nn.Conv2d(64, 64, 3, groups=2), nn.Flatten()).eval()
    path, held = deploy.export(model, tmp_path / "a.sparring", shape=(64, 5, 5)), 64 * 9 + 64 * 32 * 9
    for most, fits in ((held, True), (held - 1, False)):
        monkeypatch.setattr("sparring.deploy._artefact._MOST_WEIGHTS", most)
        with contextlib.nullcontext() if fits else pytest.raises(UserError, match="above the limit"):
            deploy.load(path)


def test_equal_networks_make_equal_files(tmp_path, sparse_model):
    files = [
        deploy.export(sparse_model("lenet-5", 0.1), tmp_path / name, shape=(1, 28, 28)).read_bytes() for name in "ab"
    ]
    assert files[0] == files[1]


def parts(path):
    """Return the header of an artefact, and where its blobs start in the file."""
    data = path.read_bytes()
    length = int.from_bytes(data[16:24], "little")
    return json.loads(data[24 : 24 + length]), 24 + length + -(24 + length) % 64


def test_values_can_be_mapped_as_they_lie(artefact):
    header, start = parts(artefact)
    program = read_program(artefact)
    layers = [(s, step.op) for s, step in zip(header["steps"], program.steps, strict=True) if s["op"] == "sparse"]
    for described, op in layers:
        assert (start + described["kept"][0]) % 64 == 0
        kept = np.memmap(artefact, "<f4", "r", start + described["kept"][0], (described["nonzeros"],))
        assert (kept == op.values).all()


def test_each_layer_has_the_shortest_index(tmp_path, sparsify):
    model = nn.Sequential(nn.Flatten(), *(nn.Linear(64, 64, bias=False) for _ in range(3)))
    with torch.no_grad():
        for layer, density in zip(model[1:], (1.0, 0.5, 0.02), strict=True):
            layer.weight.mul_(torch.rand(64, 64, generator=torch.Generator().manual_seed(0)) < density)
    header, _ = parts(deploy.export(model.eval(), tmp_path / "a.sparring", shape=(1, 8, 8)))
    codings = [step["coding"] for step in header["steps"] if step["op"] == "sparse"]
    assert codings[:2] == ["all", "bitmask"] and codings[2].startswith("rice-")


def resealed(body: bytes) -> bytes:
    return body + hashlib.sha256(body).digest()


def test_a_thousand_mutated_files_end_in_a_clear_error_or_a_sound_network(artefact, tmp_path):
    original, generator = artefact.read_bytes(), np.random.default_rng(0)
    path, x, opened = tmp_path / "mutant.sparring", np.zeros((1, 3, 32, 32), np.float32), 0
    for trial in range(1000):
        path.write_bytes(hostile.mutate(original, trial, generator))
        try:
            program = read_program(path)
        except UserError:
            continue
        opened += 1
        if opened % 10 == 0 and program.shape == (3, 32, 32):
            with np.errstate(all="ignore"):
                assert run_reference(program, x).shape == (1, program.classes)
    print(f"{1000 - opened} refused, {opened} sound")
    assert 50 < opened < 500  # changed weights with a right checksum are a sound, different network


def test_kernels_survive_mutants_in_processes_of_their_own(artefact, tmp_path):
    deploy.load(artefact)(np.zeros((1, 3, 32, 32), np.float32))
    tally = hostile.try_all([artefact.read_bytes()], 24, 0, tmp_path / "mutant.sparring")
    assert tally["refused"] + tally["sound"] == 24 and tally["sound"] > 0, tally


def change(path, out, **fields):
    """Write the artefact again with other header fields and a right checksum."""
    data = path.read_bytes()
    length = int.from_bytes(data[16:24], "little")
    header = json.loads(data[24 : 24 + length]) | fields
    text = json.dumps(header).encode()
    blobs = data[24 + length + -(24 + length) % 64 : -32]
    body = MAGIC + len(text).to_bytes(8, "little") + text + bytes(-(24 + len(text)) % 64) + blobs
    out.write_bytes(resealed(body))
    return out


def test_hostile_headers_are_refused(artefact, tmp_path):
    steps = json.loads(artefact.read_bytes()[24:].split(b'"values"')[0].rstrip(b",") + b"}")["steps"]
    sparse = next(s for s in steps if s["op"] == "sparse")
    for fields in (
        {"format": 4},
        {"format": 0},
        {"shape": [3, 1 << 20, 1 << 20]},
        {"shape": [3, 0, 32]},
        {"class_names": ["one"]},
        {"steps": []},
        {"steps": steps[:3]},
        {"steps": [steps[0] | {"inputs": [1]}, *steps[1:]]},
        {"steps": [sparse | {"weight": [1 << 20, 1 << 20, 3, 3]}]},
        {"steps": [sparse | {"nonzeros": -1}]},
        {"steps": [sparse | {"coding": "rice-99999999999999999999"}]},
        {"steps": [sparse | {"index": [1 << 26, 9]}]},
        {"steps": [{"op": "pickle", "inputs": [0]}]},
        {"values": "fp8"},
        {"shape": [3, 1 << 12, 1 << 12], "steps": [{"op": "relu", "inputs": [i]} for i in range(9)]},
        {"steps": [sparse | {"weight": [1 << 14, 1 << 13, 1, 1]}] * 9},
    ):
        with pytest.raises(UserError, match=r"mutant\.sparring"):
            deploy.load(change(artefact, tmp_path / "mutant.sparring", **fields))


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", MAGIC, resealed(MAGIC + b"\xff" * 8), resealed(MAGIC)])
def test_what_is_no_artefact_is_refused(tmp_path, content):
    path = tmp_path / "no.sparring"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"no\.sparring"):
        deploy.load(path)


def test_wrong_arguments_are_refused_by_name(tmp_path, sparse_model):
    model = sparse_model("lenet-5", 0.1)
    with pytest.raises(UserError, match="fp8"):
        deploy.export(model, tmp_path / "a.sparring", shape=(1, 28, 28), values="fp8")
    with pytest.raises(UserError, match="2 class names"):
        deploy.pack(model, shape=(1, 28, 28), class_names=["a", "b"])
    packed = deploy.pack(model, shape=(1, 28, 28))
    with pytest.raises(UserError, match="not"):
        packed(np.zeros((1, 1, 27, 28), np.float32))
    for images in (np.zeros((1, 1, 28, 28), np.uint8), torch.zeros(3, 1, 28, 28, dtype=torch.int64)):
        with pytest.raises(UserError, match="divide by 255"):
            packed(images)
