from __future__ import annotations

from dataclasses import asdict, replace

import pytest
import torch

from sparring import attacks, deploy
from sparring.deploy import _ship, interleaved
from sparring.errors import UserError
from sparring.report import timings_figure
from sparring.threat import LINF, Threat

onnxruntime = pytest.importorskip("onnxruntime")
SHAPE = (1, 28, 28)


@pytest.mark.parametrize("values", ["fp32", "int8", "int8 activations"])
def test_what_is_shipped_is_attacked_and_compared(sparse_model, values, monkeypatch):
    model, threat = sparse_model("lenet-5", 0.1), Threat(LINF, 0.1)
    x = torch.rand(55, *SHAPE, generator=torch.Generator().manual_seed(0))
    y = model.eval()(x).argmax(1)
    alone = attacks.run(model, x, y, attacks.fgsm, threat)
    model.train()
    calibrate = x if "activations" in values else None
    packed = deploy.pack(model, shape=SHAPE, values=values.split()[0], calibrate=calibrate)
    asked, run = [], attacks.run

    def watched(network, x, y, attack, *rest, **options):
        asked.append((isinstance(network, deploy.PackedModule), attack, len(x)))
        return run(network, x, y, attack, *rest, **options)

    monkeypatch.setattr(attacks, "run", watched)
    result = deploy.ship_report(model, packed, x, y, attacks.fgsm, threat, decisions=1)
    assert asked[:2] == [(False, attacks.fgsm, 55), (True, attacks.fgsm, 55)]
    ((shipped, blind, few),) = asked[2:]
    assert shipped and blind.func is attacks.hopskipjump and few == 50 and 0 <= result.robust_decision <= 1
    assert result.robust_model == attacks.robust_accuracy(alone)
    assert result.stands_packed.double().mean() <= min(result.robust_packed, result.robust_transfer)
    assert result.stands_model.double().mean() <= result.robust_model
    assert model.training
    assert result.accuracy_model == 1 and result.agreement == result.accuracy_packed >= 0.9
    assert result.logit_error <= (5e-6 if values == "fp32" else 5e-2)
    assert abs(result.robust_transfer - result.robust_model) <= (0.03 if values == "fp32" else 0.15)
    assert abs(result.robust_packed - result.robust_model) <= (0.03 if values == "fp32" else 0.15)
    share = float(result.stands_packed.double().mean() - result.stands_model.double().mean())
    assert result.change.estimate == pytest.approx(share) and result.change.low <= share <= result.change.high


def test_a_report_without_decisions(sparse_model):
    model = sparse_model("lenet-300-100", 0.1)
    x = torch.rand(30, *SHAPE, generator=torch.Generator().manual_seed(0))
    packed, threat = deploy.pack(model, shape=SHAPE), Threat(LINF, 0.02)
    blind = deploy.ship_report(model, packed, x, model(x).argmax(1), attacks.fgsm, threat, decisions=0)
    assert blind.robust_decision is None and blind.change.estimate == 0


ENGINES = ("packed", "packed int8", "torch", "onnxruntime", "onnxruntime int8", "openvino")


def test_bench_measures_engines_on_equal_terms(sparse_model):
    model, small = sparse_model("lenet-300-100", 0.1), sparse_model("lenet-300-100", 1, width=0.1)
    found = deploy.bench(model, shape=SHAPE, batches=(1, 5), rounds=2, small=small, engines=ENGINES)
    names = [row.engine for row in found.rows if row.batch == 5]
    assert {"packed", "packed int8", "torch", "onnxruntime", "onnxruntime int8", "small dense, torch"} <= set(names)
    assert set(names) | set(found.left_out) == {*ENGINES, *(f"small dense, {name}" for name in ENGINES)}
    for row in found.rows:
        assert 0 < row.low <= row.milliseconds <= row.high and row.bytes_disk > 0
        assert (row.logit_error < 5e-6) == row.exact, "int8 rounds, and says so"
        assert row.logit_error < 0.06, "no sum saturates"
    floors = {row.engine: row.floor for row in found.rows if row.batch == 1}
    assert floors["packed"] == floors["torch"] and floors["packed"] != floors["small dense, packed"]
    shares = {row.engine: row.of_peak * row.milliseconds for row in found.rows if row.batch == 1}
    assert shares["torch"] == pytest.approx(10 * shares["packed"], rel=1e-2), "a tenth of the products is left"
    drawn = timings_figure("one core", [asdict(row) for row in found.rows])
    assert drawn.startswith("<svg") and all(name in drawn for name in (*names, "batch 5"))


def test_bench_refuses_what_it_cannot_time(sparse_model):
    with pytest.raises(UserError, match="at least 1"):
        deploy.bench(sparse_model("lenet-300-100", 0.1), shape=SHAPE, batches=())
    with pytest.raises(UserError, match="an engine in float32"):
        deploy.bench(sparse_model("lenet-300-100", 0.1), shape=SHAPE, engines=["onnxruntime int8"])
    with pytest.raises(UserError, match="an engine in float32"):
        deploy.bench(sparse_model("lenet-300-100", 0.1), shape=SHAPE, engines=[])
    with pytest.raises(UserError, match="Did you mean 'openvino'"):
        deploy.bench(sparse_model("lenet-300-100", 0.1), shape=SHAPE, engines=["openvin"])


def test_a_dense_network_is_told_from_which_sparsity_the_kernels_win(sparse_model):
    model = sparse_model("lenet-5", 1.0)
    found = deploy.bench(model, shape=SHAPE, batches=(1,), rounds=3, engines=("packed", "torch"))
    assert found.sparsity == 0
    if found.fastest(1, exact=True).engine == "torch":
        assert found.wins_from is not None and 0.5 <= found.wins_from <= 0.98
    else:
        assert found.wins_from is None


def test_the_last_word_names_the_engine_to_ship():
    def row(engine, milliseconds, exact=True, batch=1):
        return deploy.BenchRow(engine, "", batch, milliseconds, 0, 0, 0, 1, 0, None, 1, None, 0.03, exact)

    rows = [
        row("packed", 2.0),
        row("torch", 8.0),
        row("onnxruntime int8", 1.0, exact=False),
        row("small dense, torch", 0.1),
    ]
    found = deploy.Bench("a processor", 100.0, rows, {}, 0.9, None)
    assert deploy.what_to_ship(found) == [
        "At batch 1 ship packed: 2 ms, 4.0 times as fast as torch; onnxruntime int8 takes 1 ms, with logits off by "
        "3.0% of the largest: ship it only after its accuracy and robustness have been measured."
    ]
    worse = replace(found, rows=[replace(one, logit_error=0.34) for one in rows])
    assert "off by 34.0% of" in deploy.what_to_ship(worse)[0]
    lost = deploy.Bench("a processor", 100.0, [row("packed", 3.0), row("onnxruntime", 1.5)], {}, 0.6, 0.9)
    assert deploy.what_to_ship(lost) == [
        "At batch 1 ship onnxruntime: 1.5 ms, 2.0 times as fast as packed.",
        "The sparse kernels would be the fastest from about 90% sparsity; this network has 60%.",
    ]
    assert "at no sparsity up to 99%" in deploy.what_to_ship(replace(lost, wins_from=None))[-1]


def test_rounds_interleave():
    order = []
    timings = interleaved([lambda: order.append("a"), lambda: order.append("b")], rounds=3)
    assert len(timings) == 2 and order[-1] == "b"
    assert all(t.low <= t.median <= t.high for t in timings)


def test_large_networks_get_fewer_decisions_and_the_report_says_how_many(sparse_model, monkeypatch):
    model, threat = sparse_model("lenet-5", 0.1).eval(), Threat(LINF, 0.05)
    x = torch.rand(6, *SHAPE, generator=torch.Generator().manual_seed(0))
    packed, y = deploy.pack(model, shape=SHAPE), model(x).argmax(1)
    monkeypatch.setattr(_ship, "_PRODUCTS", 1e9)
    found = deploy.ship_report(model, packed, x, y, attacks.fgsm, threat, decisions=1)
    assert found.decided == 1 and found.robust_decision in (0, 1)
    assert deploy.ship_report(model, packed, x, y, attacks.fgsm, threat, decisions=0).decided == 0


@pytest.mark.parametrize("density", [0.05, 1.0])
def test_layers_too_dense_for_kernels_run_in_torch_if_asked(sparse_model, density):
    model = sparse_model("lenet-5", density).eval()
    x = torch.rand(4, *SHAPE, generator=torch.Generator().manual_seed(0))
    plain, mixed = (deploy.pack(model, shape=SHAPE, dense=dense) for dense in (False, True))
    assert (plain.favours_torch, mixed.favours_torch) == (False, density > 0.3)
    assert torch.allclose(mixed(x), model(x), atol=1e-5)
    image = x.clone().requires_grad_()
    found = torch.autograd.grad(deploy.PackedModule(mixed)(image)[:, 0].sum(), image)[0]
    assert torch.allclose(found, torch.autograd.grad(model(image)[:, 0].sum(), image)[0], atol=1e-5)
