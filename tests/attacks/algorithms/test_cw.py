"""Carlini and Wagner's attack: its gradient by hand, and a search that no scale of the logits misleads."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor, nn

from sparring.attacks import cw, run
from sparring.attacks._gradients import Probe, frozen, logits_and_gradient, logits_and_pull
from sparring.attacks.algorithms._cw import Aim
from sparring.attacks.algorithms._losses import margin_loss
from sparring.attacks.algorithms._projections import select
from sparring.threat import L2, Threat

from ..linear_answers import affine_problem


class Scaled(nn.Module):
    def __init__(self, model: nn.Module, scale: float) -> None:
        super().__init__()
        self.model, self.scale = model, scale

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.model(x)


class Turned(nn.Module):
    """Changes nothing, but its input's gradient comes in another order of memory."""

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)


@pytest.mark.parametrize("targeted", [True, False])
def test_the_slope_is_that_of_the_papers_objective(targeted: bool) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Flatten(), nn.Linear(20, 4)).eval(), torch.rand(40, 1, 20, 1)
    y, constant = torch.arange(40) % 4, torch.linspace(0.1, 2.0, 40)
    targets = (y + 1) % 4 if targeted else None

    def objective(logits: Tensor, y: Tensor, targets: Tensor | None) -> Tensor:
        return constant * (0.5 - margin_loss(logits, y, targets)).clamp_min(0)

    with frozen(model):
        probe = Probe(model)
        _, expected = logits_and_gradient(probe, x, objective, y, targets)
        aim = Aim(y if targets is None else targets, constant, 0.5, -1 if targeted else 1)
        logits, found = logits_and_pull(probe, x, aim)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(aim.gap, margin_loss(logits, y, targets))
    assert probe.backwards == 80 and bool((expected != 0).any())


@pytest.mark.parametrize("scale", [1e-4, 1e4])
def test_no_scale_of_the_logits_moves_the_search_that_begins_at_the_linearised_margin(scale: float) -> None:
    model, x, y = affine_problem(1, images=10, on_box=False)
    attack = partial(cw, steps=200, start_constant=None)
    plain, scaled = (run(m, x, y, attack, Threat(L2)).distance for m in (model, Scaled(model, scale)))
    assert bool(torch.isfinite(plain).all())
    torch.testing.assert_close(scaled, plain, rtol=2e-3, atol=0)


@pytest.mark.parametrize("targeted", [True, False])
@pytest.mark.parametrize("steps", [100, 117])
def test_every_image_ends_where_it_would_alone_at_whatever_pace_the_others_go(steps: int, targeted: bool) -> None:
    torch.manual_seed(2)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 3)).eval()
    x = torch.rand(8, 1, 12, 1)
    y = model(x).argmax(1)
    targets = (y + 1) % 3 if targeted else None
    attack = partial(cw, steps=steps, searches=4, learning_rate=0.05, start_constant=1.0)
    paces = []

    def watch(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        paces.append(len(inputs[0]))

    with frozen(model):
        together = attack(model, x, y, targets=targets)
        alone = torch.cat(
            [attack(model, x[i : i + 1], y[i : i + 1], targets=select(targets, torch.tensor([i]))) for i in range(8)]
        )
        handle = model.register_forward_pre_hook(watch)
        attack(model, x, y, targets=targets)
        handle.remove()
    assert 1 <= paces[-1] < 8 == max(paces)  # some made all their rounds before others
    moved, expected = ((points - x).flatten(1).norm(dim=1) for points in (together, alone))
    assert int((expected > 0).sum()) >= 6
    torch.testing.assert_close(moved, expected, rtol=1e-3, atol=1e-6)


def test_the_order_of_images_and_gradients_in_memory_changes_nothing() -> None:
    torch.manual_seed(1)
    model, x = nn.Sequential(nn.Flatten(), nn.Linear(24, 3)).eval(), torch.rand(5, 2, 3, 4)
    y = model(x).argmax(1)
    attack = partial(cw, steps=50, searches=2, learning_rate=0.1, start_constant=1.0)
    with frozen(model):
        plain = attack(model, x, y)
        last = attack(model, x.contiguous(memory_format=torch.channels_last), y)
        strided = attack(nn.Sequential(Turned(), model), x, y)
    assert bool((plain != x).any())
    torch.testing.assert_close(last, plain)
    torch.testing.assert_close(strided, plain)


def test_rounds_are_those_of_the_authors_code() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Flatten(), nn.Linear(20, 4)).eval(), torch.rand(6, 1, 20, 1)
    y = model(x).argmax(1)
    with frozen(model):
        found = cw(model, x, y, steps=100, searches=4, learning_rate=0.05, start_constant=0.1, precision=0.0)
        expected = torch.stack([_by_rounds(model, x[i : i + 1], y[i : i + 1], 100, 4, 0.05, 0.1) for i in range(6)])
    torch.testing.assert_close((found - x).flatten(1).norm(dim=1), expected, rtol=1e-4, atol=1e-6)


def _by_rounds(
    model: nn.Module, x: Tensor, y: Tensor, steps: int, searches: int, learning_rate: float, constant: float
) -> Tensor:
    """Return the distance that Carlini & Wagner's search finds for one image: autograd, arctanh and torch's Adam."""
    smallest, low, high = torch.tensor(torch.inf), 0.0, float("inf")
    for _ in range(searches):
        w = torch.atanh((2 * x - 1) * (1 - 1e-6)).requires_grad_()
        adam, won, checked = torch.optim.Adam([w], lr=learning_rate), False, float("inf")
        for step in range(1, steps + 1):
            point = (torch.tanh(w) + 1) / 2
            gap, square = margin_loss(model(point), y).squeeze(), (point - x).square().sum()
            loss = square + constant * (-gap).clamp_min(0)
            if gap.item() > 1e-5:
                won, smallest = True, torch.minimum(smallest, square.detach().sqrt())
            adam.zero_grad()
            loss.backward()
            adam.step()
            if step % (steps // 10) == 0:
                if loss.item() > 0.9999 * checked:
                    break
                checked = loss.item()
        high, low = (constant, low) if won else (high, constant)
        constant = (low + high) / 2 if high < float("inf") else low * 10
    return smallest
