from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from sparring import deploy
from sparring.deploy._compile import compile_model
from sparring.deploy._reference import run_reference
from sparring.deploy.kernels import _engine as engine
from sparring.deploy.kernels import _native as native
from sparring.deploy.kernels import _plan as planning
from sparring.deploy.kernels._abi import Layout
from sparring.deploy.kernels._engine import Engine
from sparring.deploy.kernels._fusion import FusedLayer, tasks_of
from sparring.deploy.kernels._native import host_lanes
from sparring.errors import UserError
from sparring.models import Residual
from sparring.sparsity import Threshold, TopK

pytestmark = pytest.mark.usefixtures("new_kernels")
BATCHES = (1, 3, 16, 64, 65)


def check(model: nn.Module, shape: tuple[int, ...], batches=BATCHES, lanes: int | None = None) -> None:
    engine = Engine(compile_model(model.eval(), shape), lanes=lanes)
    for n in batches:
        x = torch.rand(n, *shape, generator=torch.Generator().manual_seed(n))
        expected = model(x).detach()
        error = (torch.from_numpy(engine.run(x.numpy())) - expected).abs().max()
        assert error <= 5e-6 * expected.abs().max(), (n, error)


@pytest.mark.parametrize(("name", "density"), [("lenet-300-100", 0.1), ("lenet-5", 0.05), ("resnet-32", 0.02)])
def test_logits_are_torchs(sparse_model, name, density):
    check(sparse_model(name, density), (1, 28, 28) if "lenet" in name else (3, 32, 32))


def test_logits_are_torchs_for_a_wide_network(sparse_model):
    check(sparse_model("vgg-like", 0.05, width=0.5), (3, 32, 32), batches=(1, 5))


@pytest.mark.parametrize("lanes", [4, 8])
def test_hosts_with_shorter_vectors_get_the_same_logits(sparse_model, lanes):
    check(sparse_model("resnet-32", 0.1, width=0.25), (3, 32, 32), batches=(1, 3, 9), lanes=lanes)
    check(sparse_model("lenet-5", 0.1), (1, 28, 28), batches=(1, 9), lanes=lanes)


def test_dense_empty_and_all_zero_layers():
    model = nn.Sequential(nn.Conv2d(1, 5, 3), nn.ReLU(), nn.Conv2d(5, 6, 3, padding=1), nn.ReLU(), nn.Flatten())
    model = nn.Sequential(*model, nn.Linear(96, 4))
    with torch.no_grad():
        model[0].weight[2] = 0  # an empty row, whose constant stands in front of padding
        model[0].bias[2] = 1
    check(model, (1, 6, 6))
    with torch.no_grad():
        model[2].weight.zero_()
    check(model, (1, 6, 6))
    check(nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.ReLU(), nn.Flatten()), (1, 6, 6))  # logits of an image


def test_a_capped_relu_is_part_of_the_layer_before_it():
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 8, 3, 2, 1), nn.ReLU6(), nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Hardtanh(0.0, 1.0)]
    model = nn.Sequential(*layers, nn.MaxPool2d(3, 2, 1), nn.Flatten(), nn.Linear(800, 4))
    with torch.no_grad():
        model[0].weight *= 40  # both caps take effect
    check(model, (1, 40, 40), batches=(1, 17))
    program = compile_model(model, (1, 40, 40))
    assert [type(task).__name__ for task in tasks_of(program)] == ["FusedLayer"] * 2 + ["MaxPool", "View", "FusedLayer"]
    assert [task.cap for task in tasks_of(program)[:2]] == [6, 1]
    assert len(tasks_of(program, whole=False)) > 5


@st.composite
def networks(draw):
    """A small convolutional network with odd shapes, strides, paddings, dilations and pools."""
    side, channels = draw(st.integers(5, 21)), draw(st.integers(1, 3))
    layers: list[nn.Module] = []
    shape = (channels, side, draw(st.integers(5, 21)))
    probe = torch.zeros(1, *shape)
    for _ in range(draw(st.integers(1, 3))):
        kernel = (draw(st.integers(1, 3)), draw(st.integers(1, 3)))
        options = {
            "stride": (draw(st.integers(1, 3)), draw(st.integers(1, 3))),
            "padding": (draw(st.integers(0, 2)), draw(st.integers(0, 2))),
            "dilation": draw(st.integers(1, 2)),
        }
        out = draw(st.integers(1, 6))
        block: list[nn.Module] = [nn.Conv2d(probe.shape[1], out, kernel, **options)]
        block += [nn.BatchNorm2d(out)] if draw(st.booleans()) else []
        pools = [nn.MaxPool2d(2), nn.MaxPool2d(3, 2, 1), nn.MaxPool2d(2, ceil_mode=True), nn.AvgPool2d(2)]
        tail: list[nn.Module] = [nn.ReLU()] + ([draw(st.sampled_from(pools))] if draw(st.booleans()) else [])
        block += tail if draw(st.booleans()) else tail[::-1]
        try:
            with torch.no_grad():
                after = nn.Sequential(*block).eval()(probe)
        except RuntimeError:
            break
        if after.numel() == 0:
            break
        layers, probe = layers + block, after
        if draw(st.booleans()):
            layers.append(Residual(nn.Conv2d(probe.shape[1], probe.shape[1], 3, padding=1), nn.Identity()))
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(probe[0].numel(), draw(st.integers(2, 20))))
    return model, shape, draw(st.sampled_from([0.0, 0.1, 0.5, 1.0])), draw(st.integers(0, 99))


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(network=networks(), lanes=st.sampled_from([None, None, 8, 4]))
def test_any_geometry(sparsify, network, lanes):
    model, shape, density, seed = network
    check(sparsify(model, density, torch.Generator().manual_seed(seed)), shape, (1, 3, 18), lanes)


def test_numpy_and_native_agree_and_threads_change_nothing(sparse_model):
    model = sparse_model("lenet-5", 0.1)
    x = np.random.default_rng(0).random((200, 1, 28, 28), np.float32)
    one = deploy.pack(model, shape=(1, 28, 28))
    assert one.native
    expected = run_reference(one.program, x)
    np.testing.assert_allclose(one(x), expected, atol=5e-6 * np.abs(expected).max())
    assert (deploy.Packed(one.program, threads=2)(x) == one(x)).all()
    with ThreadPoolExecutor(4) as pool:  # one network, many callers
        for result in pool.map(one, [x[i : i + 50] for i in range(0, 150, 10)]):
            assert result.shape == (50, 10)
    again = np.concatenate(list(ThreadPoolExecutor(4).map(one, np.split(x[:192], 3))))
    assert (again == one(x)[:192]).all()


@pytest.mark.parametrize("values", ["fp32", "int8"])
def test_threads_that_share_every_kernel_change_no_bit(sparse_model, monkeypatch, values):
    x = torch.rand(20, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    calibrate = x if values == "int8" else None
    model = sparse_model("resnet-32", 0.2, width=0.25)
    one = deploy.pack(model, shape=x.shape[1:], values=values, calibrate=calibrate)
    batches = [x[:1], x[:9], x, x[3:4], x[4:9]]
    expected = [one(batch) for batch in batches]
    monkeypatch.setattr(engine, "_SHARED", 0)
    monkeypatch.setattr(planning, "_MANY_TILES", 4)
    three = deploy.Packed(one.program, threads=3)
    shared, run = [], engine.ExecutionPlan.run_shared
    monkeypatch.setattr(engine.ExecutionPlan, "run_shared", lambda *given: (shared.append(given), run(*given)))
    assert all(torch.equal(three(batch), logits) for batch, logits in zip(batches, expected, strict=True))
    assert len(shared) >= len(batches)
    with ThreadPoolExecutor(4) as pool:  # one call at a time has the helpers
        again = list(pool.map(three, batches * 3))
    assert all(torch.equal(*two) for two in zip(again, expected * 3, strict=True))


def test_images_are_answered_alike_with_and_without_builtins(sparse_model, monkeypatch):
    program = deploy.pack(sparse_model("lenet-5", 0.1), shape=(1, 28, 28)).program
    images = [np.random.default_rng(i).random((1, 1, 28, 28), np.float32) for i in range(12)]
    packed = deploy.Packed(program)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(packed, images))
    monkeypatch.setattr(engine, "builtin", lambda *_: None)
    monkeypatch.setattr(engine, "reader", lambda *_: None)
    plain = deploy.Packed(program)
    assert (plain(np.concatenate(images)) == packed(np.concatenate(images))).all()
    for image, logits in zip(images, found, strict=True):
        assert (plain(image) == logits).all()
    assert (plain(images[0][..., ::-1]) == packed(images[0][..., ::-1])).all()


def test_odd_inputs_are_taken_as_they_come(sparse_model):
    packed = deploy.pack(sparse_model("lenet-300-100", 0.1), shape=(1, 28, 28))
    x = np.random.default_rng(0).random((6, 1, 28, 56)).astype(np.float64)[..., ::2]
    expected = packed(np.ascontiguousarray(x, np.float32))
    assert (packed(x) == expected).all()
    assert packed(x[:0]).shape == (0, 10)
    one = np.asfortranarray(x[:1], np.float32)
    assert not one.flags.c_contiguous
    assert (packed(one) == packed(np.ascontiguousarray(one))).all()
    assert (packed(np.ascontiguousarray(one, ">f4")) == packed(np.ascontiguousarray(one))).all()
    assert (packed(torch.from_numpy(x).requires_grad_()).numpy() == expected).all()


def test_what_answers_one_image_leaves_anything_else_to_others(sparse_model):
    packed = deploy.pack(sparse_model("lenet-300-100", 0.1), shape=(1, 28, 28))
    image = np.random.default_rng(0).random((1, 1, 28, 28), np.float32)
    expected, again = packed(image), packed(image)
    assert (expected == again).all() and again is not expected
    double, flat, two = image.astype(np.float64), image.reshape(1, 28, 28), np.concatenate([image, image])
    others = [
        double,
        image.astype(">f4"),
        flat,
        image[:, 0],
        two,
        image[..., ::-1],
        torch.from_numpy(image),
        [1.0],
        None,
    ]
    assert packed._answer(image) is not None and all(packed._answer(other) is None for other in others)
    assert (packed(double) == expected).all() and (packed(two)[:1] == expected).all()
    with pytest.raises(UserError, match="takes images"):
        packed(flat)


@pytest.mark.parametrize("name", ["lenet-5", "vgg-like"])
def test_what_is_tuned_never_changes_a_bit(sparse_model, monkeypatch, name):
    shape = (1, 28, 28) if name == "lenet-5" else (3, 32, 32)
    program = compile_model(sparse_model(name, 0.1, width=0.25), shape)
    x = np.random.default_rng(0).random((18, *shape), np.float32)
    found = set()
    for choice in planning.candidates(host_lanes(), False):
        monkeypatch.setattr(engine, "tuned", lambda *_, choice=choice, **__: lambda key: choice)
        found.add(b"".join(Engine(program).run(part).tobytes() for part in (x, x[:1])))
    assert len(found) == 1


@pytest.mark.parametrize("few", [1, 1 << 30], ids=["tiles", "rows"])
def test_threads_that_share_tiles_or_rows_of_any_tuning_change_no_bit(sparse_model, monkeypatch, few):
    monkeypatch.setattr(engine, "_SHARED", 0)
    monkeypatch.setattr(planning, "_MANY_TILES", few)
    program = compile_model(sparse_model("vgg-like", 0.1, width=0.25), (3, 32, 32))
    x, blocked = np.random.default_rng(0).random((1, 3, 32, 32), np.float32), set()
    expected = Engine(program).run(x)
    for choice in planning.candidates(host_lanes(), False):
        monkeypatch.setattr(engine, "tuned", lambda *_, choice=choice, **__: lambda key: choice)
        three = Engine(program, threads=3)
        assert all((three.run(x) == expected).all() for _ in range(5))
        (plan,) = three._plans.values()
        blocked |= {call.spec.blocked for call in plan._calls if getattr(call.spec, "by_tiles", False)}
    assert blocked == ({True, False} if few == 1 else set())


@pytest.mark.parametrize("lanes", [4, host_lanes()])
def test_channels_in_turns_change_no_bit(monkeypatch, lanes):
    torch.manual_seed(0)
    deep = [nn.Conv2d(24, 24, 3, stride, 1, groups=24) for stride in (1, 2)]
    layers = [nn.Conv2d(3, 24, 1), nn.ReLU6(), deep[0], nn.Conv2d(24, 24, 1), nn.ReLU(), deep[1], nn.Conv2d(24, 6, 1)]
    model = nn.Sequential(*layers, nn.MaxPool2d(3, 2, 1), nn.Flatten(), nn.Linear(6 * 25, 4)).eval()
    with torch.no_grad():
        for layer in (model[0], model[3], model[6]):
            layer.weight *= torch.rand(layer.weight.shape) < 0.4
    program, found, turns = compile_model(model, (3, 20, 20)), set(), set()
    x = np.random.default_rng(0).random((lanes + 1, 3, 20, 20), np.float32)
    monkeypatch.setattr(planning, "_MANY_TILES", 1)  # a chain's kernels share rows all the same
    for most in (1 << 30, 1 << 16, 1 << 15, 1 << 14, 1 << 13, 1):
        monkeypatch.setattr(planning, "_CHAINED", most)
        run = Engine(program, lanes=lanes)
        found.add(b"".join(run.run(part).tobytes() for part in (x, x[:1])))
        turns.add(max(call.turns for plan in run._plans.values() for call in plan._calls))
    assert len(found) == 1 and len(turns) >= 3 and {1, 24} <= turns


def test_large_images_run_one_by_one_where_asked(sparse_model, monkeypatch):
    program = compile_model(sparse_model("resnet-32", 0.1, width=0.25), (3, 32, 32))
    x = np.random.default_rng(0).random((5, 3, 32, 32), np.float32)
    monkeypatch.setattr(engine, "_FAR_CACHE", 0)
    alone, together = Engine(program, alone=True, threads=2), Engine(program)
    assert [(layout.tiles, at, n) for layout, at, n in alone._parts(5)] == [(False, 0, 3), (False, 3, 2)]
    assert all(layout.tiles for layout, _, _ in together._parts(host_lanes()))
    assert (alone.run(x) == np.concatenate([alone.run(x[i : i + 1]) for i in range(5)])).all()
    assert len(alone.run(x[:0])) == 0
    assert np.abs(alone.run(x) - together.run(x)).max() <= 5e-6 * np.abs(together.run(x)).max()


def test_a_second_start_compiles_nothing(sparse_model, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    program = compile_model(sparse_model("lenet-5", 0.1), (1, 28, 28))
    x = np.random.default_rng(0).random((20, 1, 28, 28), np.float32)
    first = [Engine(program).run(part) for part in (x, x[:1])]
    monkeypatch.delattr(native, "_compiled")
    assert all((Engine(program).run(part) == logits).all() for part, logits in zip((x, x[:1]), first, strict=True))


def test_units_share_memory_up_to_the_first_linear_layer(sparse_model):
    program = compile_model(sparse_model("lenet-5", 0.1), (1, 28, 28))
    tasks = engine.tasks_of(program)
    one, four = (planning.Planner(program, tasks, Layout(True, 8, units)) for units in (1, 4))
    assert one.end == four.end and one.unit_bytes == four.unit_bytes
    convolved, *linear = [four.buffer(task.result) for task in tasks if isinstance(task, FusedLayer)]
    assert convolved.origin >= 0 and all(buffer.origin < 0 for buffer in linear)
    assert four.arena_bytes - one.arena_bytes == 3 * four.unit_bytes


def test_blocks_of_a_linear_layer_change_no_bit(sparse_model, monkeypatch):
    program = compile_model(sparse_model("lenet-300-100", 0.1), (1, 28, 28))
    x = np.random.default_rng(0).random((64, 1, 28, 28), np.float32)
    found, blocks = set(), set()
    for most in (1 << 12, 1 << 16, 1 << 30):
        monkeypatch.setattr(planning, "_LINEAR_BYTES", most)
        monkeypatch.setattr(planning, "_LINEAR_READS", 1)
        run = Engine(program)
        found.add(run.run(x).tobytes())
        blocks.add(max(int(call.arguments[9]) for call in run._split[1][0][0]._calls if call.spec.name[:4] == "tile"))
    assert len(found) == 1 and len(blocks) == 3


@pytest.mark.parametrize("lanes", [4, 8])
def test_hosts_with_shorter_vectors_sparsify_alike(lanes):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 5, 3, padding=1), TopK(0.7), nn.Conv2d(5, 4, 3, padding=1), Threshold(0.1))
    check(nn.Sequential(*model, nn.Flatten(), TopK(0.5), nn.Linear(4 * 49, 6)), (2, 7, 7), (1, 5, 19), lanes)
