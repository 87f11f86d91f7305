from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest
import torch

from sparring import deploy
from sparring.deploy.artefact import MAGIC, read_program
from sparring.deploy.reference import run_reference
from sparring.errors import UserError


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


@pytest.mark.parametrize(("sparsity", "exact", "half"), [(0.9, 8.5, 13.9), (0.95, 16, 26.2), (0.98, 38, 60.3)])
def test_a_sparse_network_is_a_smaller_file(tmp_path, sparse_model, sparsity, exact, half):
    model = sparse_model("vgg-like", 1 - sparsity, width=0.5)
    dense = 4 * sum(p.numel() for p in model.state_dict().values())
    for values, floor in (("fp32", exact), ("fp16", half)):
        path = deploy.export(model, tmp_path / "a.sparring", shape=(3, 32, 32), values=values)
        assert dense / path.stat().st_size >= floor


def test_equal_networks_make_equal_files(tmp_path, sparse_model):
    files = [
        deploy.export(sparse_model("lenet-5", 0.1), tmp_path / name, shape=(1, 28, 28)).read_bytes() for name in "ab"
    ]
    assert files[0] == files[1]


def resealed(body: bytes) -> bytes:
    return body + hashlib.sha256(body).digest()


def test_a_thousand_mutated_files_end_in_a_clear_error_or_a_sound_network(artefact, tmp_path):
    original, generator = artefact.read_bytes(), np.random.default_rng(0)
    header = 24 + int.from_bytes(original[16:24], "little")
    path, x, opened = tmp_path / "mutant.sparring", np.zeros((1, 3, 32, 32), np.float32), 0
    for trial in range(1000):
        body = bytearray(original[:-32])
        for _ in range(generator.integers(1, 4)):
            where = generator.integers(0, header if trial % 4 < 2 else len(body))
            body[where] = generator.integers(0, 256)
        if trial % 10 == 0:
            del body[generator.integers(0, len(body)) :]
        path.write_bytes(resealed(bytes(body)) if trial % 2 else bytes(body) + original[-32:])
        try:
            program = read_program(path)
        except UserError:
            continue
        opened += 1
        if opened % 10 == 0 and program.shape == (3, 32, 32):
            with np.errstate(all="ignore"):
                assert run_reference(program, x).shape == (1, program.classes)
    assert 50 < opened < 500  # changed weights with a right checksum are a sound, different network


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
        {"format": 2},
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
    with pytest.raises(UserError, match="not"):
        deploy.pack(model, shape=(1, 28, 28))(np.zeros((1, 1, 27, 28), np.float32))
