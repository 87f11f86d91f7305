"""Layers that write into their input or take several: attacks run them again and change nothing."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from sparring.attacks import ATTACKS, Attack, fgsm, nearest, pgd, run
from sparring.attacks._gradients import Probe, logits_and_gradient
from sparring.attacks.algorithms._losses import cross_entropy
from sparring.attacks.evaluation._bpda import seeded, split_at_draw, straight_through
from sparring.sparsity import ACTIVATIONS, with_activation_penalty
from sparring.threat import L2, LINF, Threat
from sparring.train import cross_entropy as training_loss

from ..noise import Noise

SMALL = Threat(LINF, 0.05)


class Step(nn.Module):
    """A staircase, written into its input or not."""

    def __init__(self, inplace: bool) -> None:
        super().__init__()
        self.inplace = inplace

    def forward(self, x: Tensor) -> Tensor:
        return x.mul_(4).round_().div_(4) if self.inplace else (x * 4).round() / 4


class Shift(nn.Module):
    """Write into the input and return something else."""

    def forward(self, x: Tensor) -> Tensor:
        return x.sub_(0.1).clone().detach()


class Sum(nn.Module):
    """A shortcut as a module of its own, with a further input by position and one by keyword."""

    def forward(self, x: Tensor, other: Tensor, *, scale: float) -> Tensor:
        return x + scale * other


class Residual(nn.Module):
    """A block in torchvision's manner: one ReLU module used twice, in place, once after the shortcut."""

    def __init__(self, bias: float, inplace: bool) -> None:
        super().__init__()
        self.conv, self.norm, self.sum = nn.Conv2d(2, 2, 3, padding=1), nn.BatchNorm2d(2), Sum()
        self.act = nn.ReLU(inplace)
        nn.init.constant_(self.norm.bias, bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.sum(self.act(self.norm(self.conv(x))), x, scale=0.5))


def dead(act: Callable[[bool], nn.Module], inplace: bool) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), act(inplace), nn.Flatten(), nn.Linear(144, 4)).eval()
    nn.init.constant_(model.get_parameter("0.bias"), -100.0)
    return model


ACTS: dict[str, Callable[[bool], nn.Module]] = {
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "hardtanh": lambda inplace: nn.Hardtanh(inplace=inplace),
    "hardsigmoid": nn.Hardsigmoid,
    "staircase": Step,
}


DEAD = [
    (act, attack, threat) for act in ACTS for attack, threat in ((fgsm, SMALL), (pgd, SMALL), (nearest, Threat(L2)))
]


@pytest.mark.parametrize(
    ("act", "attack", "threat"),
    [pytest.param(*case, marks=[] if case[1] is fgsm or case[0] == "relu" else pytest.mark.nightly) for case in DEAD],
)
def test_a_dead_layer_in_place_is_seen_through_like_another(
    act: str, attack: Attack, threat: Threat, images: Tensor
) -> None:
    images = images[:3]
    models = [dead(ACTS[act], inplace) for inplace in (False, True)]
    y = models[0](images).argmax(1)
    first, second = (run(m, images, y, attack, threat, generator=torch.Generator().manual_seed(0)) for m in models)
    assert first.flags == second.flags
    assert "zero-gradients" in {flag.name for flag in second.flags}
    assert torch.equal(first.x_adv, second.x_adv) and torch.equal(first.success, second.success)


@pytest.mark.parametrize("bias", [0.0, -100.0])
def test_a_block_in_the_manner_of_torchvision_is_attacked_alike(bias: float, images: Tensor) -> None:
    outcomes = []
    for inplace in (False, True):
        torch.manual_seed(0)
        body = [nn.Conv2d(1, 2, 3, padding=1), Residual(bias, inplace), Residual(bias, inplace)]
        model = nn.Sequential(*body, nn.Flatten(), nn.Linear(128, 4)).eval()
        y = model(images).argmax(1)
        outcomes.append(run(model, images, y, ATTACKS["fast"], SMALL, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(outcomes[0].x_adv, outcomes[1].x_adv) and outcomes[0].flags == outcomes[1].flags


@pytest.mark.parametrize("layer", [nn.ReLU(inplace=True), Step(inplace=True), Shift(), nn.Dropout(0.5, inplace=True)])
def test_a_secant_leaves_what_the_network_computes(layer: nn.Module, images: Tensor) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), layer, nn.Flatten(), nn.Linear(144, 4)).eval()
    nn.init.constant_(model.get_parameter("0.bias"), -0.5)
    plain = model(images)
    with straight_through(model, images[:1]):
        assert torch.allclose(model(images), plain, atol=1e-6)
        (gradient,) = torch.autograd.grad(model(point := images.clone().requires_grad_()).sum(), point)
    assert bool(gradient.any()), "each of them lets something pass"
    assert torch.equal(model(images), plain)


def test_one_unit_in_a_layer_has_no_spread(images: Tensor) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 1), nn.ReLU(inplace=True), nn.Linear(1, 3)).eval()
    nn.init.constant_(model.get_parameter("1.bias"), -100.0)
    assert "zero-gradients" in {f.name for f in run(model, images[:1], model(images[:1]).argmax(1), pgd, SMALL).flags}


def test_the_penalty_on_activations_allows_writing_after_them(images: Tensor) -> None:
    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(64, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(nn.functional.relu6(self.first(x.flatten(1))).mul_(2))

    loss = with_activation_penalty(training_loss, 0.1)(Writes(), images, torch.zeros(12, dtype=torch.int64), None)
    loss.backward()  # type: ignore[no-untyped-call]


def drawing(units: int = 20) -> nn.Sequential:
    """A network whose second activation draws."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(64, units),
        nn.ReLU(),
        nn.Linear(units, 16),
        ACTIVATIONS["stochastic-pruning"](1.0),
        nn.Linear(16, 4),
    ).eval()


@pytest.fixture
def x() -> Tensor:
    return torch.rand(30, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def test_a_model_is_split_before_its_first_draw(x: Tensor) -> None:
    model = drawing()
    split = split_at_draw(model, x)
    assert split is not None
    assert list(split.steady.children()) == list(model)[:4]
    assert list(split.drawing.children()) == list(model)[4:]


def test_models_that_cannot_be_split_are_left_whole(x: Tensor) -> None:
    model = drawing()
    assert split_at_draw(nn.Sequential(model), x) is None
    assert split_at_draw(nn.Sequential(nn.Flatten(), Noise(), *list(model)[1:]), x) is None
    assert split_at_draw(model[:4], x) is None
    assert split_at_draw(nn.Sequential(nn.Flatten(), nn.Linear(64, 65), *list(drawing(65))[4:]), x) is None
    model.register_forward_hook(lambda *_: None)
    assert split_at_draw(model, x) is None
    replaced = drawing()
    inner = replaced.forward
    replaced.forward = lambda images: inner(1 - images)  # type: ignore[method-assign]
    assert split_at_draw(replaced, x) is None


def test_passes_through_both_parts_are_those_of_the_model(x: Tensor) -> None:
    model, y = drawing(), torch.zeros(30, dtype=torch.int64)
    found = []
    for split in (None, split_at_draw(model, x)):
        probe = Probe(model, draws=5, split=split)
        with seeded(model, 3):
            found.append((*logits_and_gradient(probe, x, cross_entropy, y), probe.forwards, probe.backwards))
    (logits, gradient, *counts), (logits_split, gradient_split, *counts_split) = found
    assert torch.allclose(logits, logits_split, atol=1e-6) and torch.allclose(gradient, gradient_split, atol=1e-6)
    assert gradient.abs().max() > 1e-3
    assert counts == counts_split == [150, 150]


def test_an_evaluation_asks_the_steady_part_once_for_all_draws(x: Tensor) -> None:
    model, rows = drawing(), [0, 0]
    y = model(x).argmax(1)
    for number, layer in enumerate((model[1], model[5])):
        layer.register_forward_hook(lambda _m, _i, out, n=number: rows.__setitem__(n, rows[n] + len(out)))
    result = run(model, x, y, pgd, Threat(LINF, 0.1), generator=torch.Generator().manual_seed(0), surrogates={})
    assert result.success.any()
    assert rows[1] > 5 * rows[0] > 0
