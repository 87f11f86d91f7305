"""Fully connected networks by hand: the same logits and gradients as autograd's, and only where that is so."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor, nn

from sparring import models
from sparring.attacks import square
from sparring.attacks._gradients import Probe, frozen, logits_and_gradient, logits_and_pull
from sparring.attacks.algorithms._losses import cross_entropy, margin_loss
from sparring.attacks.black_box import _square as lookahead
from sparring.attacks.fastpath._mlp import read_dense

from ..broken_defences import Hidden


class Loud(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 1e4 * x


def networks() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    built = partial(models.build, shape=(2, 6, 6), classes=5, mean=(0.3, 0.4), std=(0.2, 0.5))
    batch_norm = nn.Sequential(nn.Flatten(), nn.Linear(72, 9), nn.BatchNorm1d(9), nn.ReLU(), nn.Linear(9, 5))
    batch_norm(torch.rand(16, 2, 6, 6))
    return {
        "linear": built("linear"),
        "lenet": built("lenet-300-100"),
        "scaled": nn.Sequential(built("lenet-300-100"), Loud()),
        "batch-norm": batch_norm.eval(),
        "no-bias": nn.Sequential(nn.Flatten(), nn.Linear(72, 9, bias=False), nn.ReLU(), nn.Linear(9, 5)),
    }


@pytest.mark.parametrize("name", list(networks()))
def test_logits_and_gradients_are_those_of_autograd(name: str) -> None:
    model = networks()[name].eval()
    x, y = torch.rand(7, 2, 6, 6, generator=torch.Generator().manual_seed(1)), torch.arange(7) % 5
    with frozen(model):
        dense = read_dense(model, x[:2])
        assert dense is not None
        plain, by_hand = Probe(model), Probe(model, hand=dense)
        for objective in (cross_entropy, margin_loss):
            for first, second in zip(
                logits_and_gradient(plain, x, objective, y), logits_and_gradient(by_hand, x, objective, y), strict=True
            ):
                torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-5 * float(first.abs().max()))
        rows = torch.randn(3, 7, 5, generator=torch.Generator().manual_seed(2))
        for first, second in zip(
            logits_and_pull(plain, x, lambda _: rows), logits_and_pull(by_hand, x, lambda _: rows), strict=True
        ):
            torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-5 * float(first.abs().max()))
        assert (plain.forwards, plain.backwards) == (by_hand.forwards, by_hand.backwards)


@pytest.mark.parametrize("name", ["linear", "lenet"])
def test_square_computes_what_changes_and_finds_the_same(name: str) -> None:
    model = networks()[name].eval()
    x = torch.rand(9, 2, 6, 6, generator=torch.Generator().manual_seed(1))
    with frozen(model):
        y = model(x).argmax(1)
        plain, by_hand = Probe(model), Probe(model, hand=read_dense(model, x[:2]))
        found = [
            square(probe, x, y, eps=0.1, queries=400, generator=torch.Generator().manual_seed(0))
            for probe in (plain, by_hand)
        ]
    assert by_hand.dense is not None
    torch.testing.assert_close(found[0], found[1], rtol=0.0, atol=1e-6)
    assert plain.forwards <= by_hand.forwards < 2 * plain.forwards  # several at once: some are asked again
    assert not torch.equal(found[0], x)


def test_squares_tried_together_end_as_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    # Sixteenths and eighths: every sum is exact, in whatever order it is made.
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(72, 16), nn.ReLU(), nn.Linear(16, 5)).eval()
    for parameter in model.parameters():
        parameter.data = torch.randint(-8, 9, parameter.shape, generator=generator) / 8
    x = torch.randint(0, 17, (20, 2, 6, 6), generator=generator) / 16
    found, forwards = [], []
    with frozen(model):
        y = model(x).argmax(1)
        for tries in (1, 2, 8):
            monkeypatch.setattr(lookahead, "_TRIES", tries)
            probe = Probe(model, hand=read_dense(model, x[:2]))
            found.append(square(probe, x, y, eps=1 / 16, queries=600, generator=torch.Generator().manual_seed(1)))
            forwards.append(probe.forwards)
        plain = square(Probe(model), x, y, eps=1 / 16, queries=600, generator=torch.Generator().manual_seed(1))
        won = model(plain).argmax(1) != y
    assert all(torch.equal(one, plain) for one in found)
    assert forwards[0] < forwards[1] < forwards[2] < 2 * forwards[0]
    assert bool(won.any()) and not bool(won.all())
    assert not torch.equal(plain, x)


def test_images_without_slope_are_not_sent_back_and_nothing_else_changes() -> None:
    model = networks()["lenet"].eval()
    x, y = torch.rand(40, 2, 6, 6, generator=torch.Generator().manual_seed(1)), torch.arange(40) % 5
    with frozen(model):
        by_hand = Probe(model, hand=read_dense(model, x[:2]))
        _, every = logits_and_gradient(by_hand, x, margin_loss, y)
        _, some = logits_and_gradient(by_hand, x, lambda *a: margin_loss(*a) * (torch.arange(40) % 3 == 0), y)
    assert by_hand.backwards == 80
    torch.testing.assert_close(some[::3], every[::3])
    assert bool((some[1::3] == 0).all()) and bool((some[2::3] == 0).all())


def test_anything_else_is_left_to_autograd() -> None:
    lenet = networks()["lenet"].eval()
    x = torch.rand(2, 2, 6, 6, generator=torch.Generator().manual_seed(1))
    assert read_dense(Hidden(lenet), x) is None
    assert read_dense(nn.Sequential(nn.Flatten(), nn.Linear(72, 9), nn.Tanh(), nn.Linear(9, 5)), x) is None
    assert read_dense(nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 5)), x) is None
    lenet.register_forward_hook(lambda _module, _inputs, output: -output)
    assert read_dense(lenet, x) is None


def test_a_replaced_forward_is_computed_by_hand_or_not_at_all() -> None:
    lenet = networks()["lenet"].eval()
    x = torch.rand(4, 2, 6, 6, generator=torch.Generator().manual_seed(1))
    inner = lenet.forward
    lenet.forward = lambda images: inner(1 - images)
    dense = read_dense(lenet, x)
    assert dense is not None
    torch.testing.assert_close(dense.forward(x)[0], lenet(x), rtol=1e-4, atol=1e-5)
    lenet.forward = lambda images: inner(images + 0.1 * torch.rand(1))
    assert read_dense(lenet, x) is None
