"""Layers that write into their input or take several: attacks run them again and change nothing."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from sparring.attacks import ATTACKS, Attack, fgsm, nearest, pgd, run
from sparring.attacks.evaluation._bpda import straight_through
from sparring.sparsity import with_activation_penalty
from sparring.threat import L2, LINF, Threat
from sparring.train import cross_entropy

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
    nn.init.constant_(model[0].bias, -100.0)
    return model


ACTS: dict[str, Callable[[bool], nn.Module]] = {
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "hardtanh": lambda inplace: nn.Hardtanh(inplace=inplace),
    "hardsigmoid": nn.Hardsigmoid,
    "staircase": Step,
}


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize(("attack", "threat"), [(fgsm, SMALL), (pgd, SMALL), (nearest, Threat(L2))])
def test_a_dead_layer_in_place_is_seen_through_like_another(
    act: str, attack: Attack, threat: Threat, images: Tensor
) -> None:
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
    nn.init.constant_(model[0].bias, -0.5)
    plain = model(images)
    with straight_through(model, images[:1]):
        assert torch.allclose(model(images), plain, atol=1e-6)
        (gradient,) = torch.autograd.grad(model(point := images.clone().requires_grad_()).sum(), point)
    assert bool(gradient.any()), "each of them lets something pass"
    assert torch.equal(model(images), plain)


def test_one_unit_in_a_layer_has_no_spread(images: Tensor) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 1), nn.ReLU(inplace=True), nn.Linear(1, 3)).eval()
    nn.init.constant_(model[1].bias, -100.0)
    assert "zero-gradients" in {f.name for f in run(model, images[:1], model(images[:1]).argmax(1), pgd, SMALL).flags}


def test_the_penalty_on_activations_allows_writing_after_them(images: Tensor) -> None:
    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(64, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(nn.functional.relu6(self.first(x.flatten(1))).mul_(2))

    loss = with_activation_penalty(cross_entropy, 0.1)(Writes(), images, torch.zeros(12, dtype=torch.int64), None)
    loss.backward()  # type: ignore[no-untyped-call]
