"""Small convolutional networks by hand: the same logits and gradients as autograd's, and only where that is so."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from sparring import models
from sparring.attacks import nearest, run
from sparring.attacks._gradients import Probe, frozen, logits_and_gradient, logits_and_pull
from sparring.attacks.algorithms._losses import cross_entropy, margin_loss
from sparring.attacks.fastpath import _convnet
from sparring.attacks.fastpath._convnet import read_convolved
from sparring.threat import L2, Threat


def networks() -> dict[str, nn.Module]:
    """Return networks of one kind that differ in what surrounds the convolutions, for images of (2, 20, 17)."""
    torch.manual_seed(0)
    batch_norm = nn.Sequential(nn.Conv2d(2, 5, 5), nn.BatchNorm2d(5), nn.ReLU(), nn.MaxPool2d(2), nn.BatchNorm2d(5))
    batch_norm = nn.Sequential(batch_norm, nn.Conv2d(5, 3, 3), nn.Flatten(), nn.Linear(72, 5))
    batch_norm(torch.rand(16, 2, 20, 17))
    return {
        "lenet-5": models.build("lenet-5", shape=(2, 20, 17), classes=5, mean=(0.3, 0.4), std=(0.2, 0.5), width=0.2),
        "batch-norm": batch_norm.eval(),
        "strided": nn.Sequential(nn.Conv2d(2, 4, (3, 5), stride=(2, 1)), nn.ReLU(), nn.Flatten(), nn.Linear(468, 5)),
    }


def images(count: int) -> tuple[Tensor, Tensor]:
    x = torch.rand(count, 2, 20, 17, generator=torch.Generator().manual_seed(1))
    return x, torch.arange(count) % 5


@pytest.mark.parametrize("name", ["lenet-5", "batch-norm", "strided"])
def test_logits_and_gradients_are_those_of_autograd(name: str) -> None:
    model = networks()[name]
    x, y = images(7)
    with frozen(model):
        hand = read_convolved(model, x[:2])
        assert hand is not None
        plain, by_hand = Probe(model), Probe(model, hand=hand)
        pairs = [
            pair
            for objective in (cross_entropy, margin_loss)
            for pair in zip(*(logits_and_gradient(probe, x, objective, y) for probe in (plain, by_hand)), strict=True)
        ]
        rows = torch.randn(3, 7, 5, generator=torch.Generator().manual_seed(2))
        pairs += zip(*(logits_and_pull(probe, x, lambda _: rows) for probe in (plain, by_hand)), strict=True)
        for expected, found in pairs:
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
        assert (plain.forwards, plain.backwards) == (by_hand.forwards, by_hand.backwards)


def test_of_equal_values_one_takes_the_gradient() -> None:
    model = networks()["lenet-5"]
    x = torch.zeros(1, 2, 20, 17)
    x[..., 8:, :] = 1.0  # two flat halves: most windows hold four equal values
    with frozen(model):
        hand = read_convolved(model, images(2)[0])
        y = torch.tensor([0])
        expected = logits_and_gradient(Probe(model), x, margin_loss, y)[1]
        found = logits_and_gradient(Probe(model, hand=hand), x, margin_loss, y)[1]
    # Whichever it is, a gradient keeps its sum: filters are only shifted.
    torch.testing.assert_close(found.sum((2, 3)), expected.sum((2, 3)), rtol=1e-3, atol=1e-4)


def test_only_what_is_such_a_network_is_read() -> None:
    x, _ = images(2)
    others: dict[str, list[nn.Module]] = {
        "padded": [nn.Conv2d(2, 3, 5, padding=1)],
        "dilated": [nn.Conv2d(2, 3, 3, dilation=2)],
        "overlapping": [nn.Conv2d(2, 3, 5), nn.MaxPool2d(3, 2)],
        "wasteful": [nn.Conv2d(2, 3, 3), nn.MaxPool2d(2)],
        "shifted before a ReLU": [nn.Conv2d(2, 3, 5), nn.MaxPool2d(2), nn.BatchNorm2d(3), nn.ReLU()],
        "without convolutions": [],
        "smooth": [nn.Conv2d(2, 3, 5), nn.Tanh()],
    }
    for name, layers in others.items():
        model = nn.Sequential(*layers, nn.Flatten(), nn.LazyLinear(5)).eval()
        model(x)
        with frozen(model):
            assert read_convolved(model, x) is None, name
    hooked = networks()["lenet-5"]
    hooked.register_forward_hook(lambda _module, _inputs, output: 2 * output)
    with frozen(hooked):
        assert read_convolved(hooked, x) is None


def test_an_attack_finds_what_it_finds_by_autograd() -> None:
    model = networks()["lenet-5"].eval()
    x, _ = images(40)
    y = model(x).argmax(1)
    by_hand = run(model, x, y, nearest, Threat(L2))
    model.register_forward_hook(lambda _module, _inputs, _output: None)  # which is refused
    plain = run(model, x, y, nearest, Threat(L2))
    assert torch.equal(by_hand.success, plain.success)
    assert by_hand.forwards == pytest.approx(plain.forwards, rel=0.02)
    torch.testing.assert_close(by_hand.distance.median(), plain.distance.median(), rtol=1e-3, atol=0)


def test_nobody_waits_for_the_graph_of_a_transformer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_convnet, "lower", lambda *_, **__: pytest.fail("torch.export takes seconds"))
    patches = nn.Sequential(nn.Conv2d(2, 8, 4, 4), nn.Flatten(2), nn.LayerNorm(4), nn.Flatten(), nn.Linear(32, 5))
    assert read_convolved(patches.eval(), torch.rand(2, 2, 8, 8)) is None
