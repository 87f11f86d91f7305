"""How far an attack is follows from the passes of the images in work, and never exceeds what is in work."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from sparring import attacks
from sparring.attacks._meter import Meter
from sparring.threat import L2, Threat


class Sine(nn.Module):
    """A network that no fast path can read, which is told how many images it sees."""

    def __init__(self, tick: Callable[[int], None]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last, self.tick = nn.Linear(16, 8), nn.Linear(8, 3), tick

    def forward(self, x: Tensor) -> Tensor:
        self.tick(len(x))
        return self.last(self.first(x.flatten(1)).sin())


def test_an_attack_on_a_slow_model_tells_how_far_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0

    def tick(images: int) -> None:
        nonlocal now
        now += 0.1 * images

    monkeypatch.setattr("time.monotonic", lambda: now)
    model, told = Sine(tick).eval(), list[tuple[str, float, int, float]]()
    x = torch.rand(8, 1, 4, 4)
    y = model(x).argmax(1)
    told.clear()
    tell = attacks.with_title("ddn", lambda stage, done, images: told.append((stage, done, images, now)))
    attacks.run(model, x, y, attacks.ddn, Threat(L2), progress=tell)
    stages = list(dict.fromkeys(stage for stage, *_ in told))
    assert stages == ["ddn, preparing", "ddn, attacking"]
    for stage in stages:
        steps = [(done, images, seconds) for name, done, images, seconds in told if name == stage]
        shares = [done / images for done, images, _ in steps]
        assert shares[0] == 0 and shares[-1] == 1 and shares == sorted(shares)
        pauses = [later - earlier for (*_, earlier), (*_, later) in pairwise(steps)]
        assert stage == "ddn, preparing" or max(pauses) <= 2, "each step passes eight images in 0.8 s"
    attacking = [(done, seconds) for stage, done, _, seconds in told if stage == "ddn, attacking"]
    rates = [done / (seconds - attacking[0][1]) for done, seconds in attacking[5:]]
    assert max(rates) < 3 * min(rates), "the estimate of the time for the rest comes from the rate"


def test_a_batch_longer_than_estimated_is_silent_and_a_quick_preparation_too() -> None:
    told: list[tuple[str, float, int]] = []
    meter = Meter(lambda *what: told.append(what), "attacking", 10, each=2, together=4)
    meter.due = 0
    for _ in range(4):
        meter.pass_(4)
        meter.due = 0
    meter.finish_(4)
    meter.finish_(10)
    assert told == [("attacking", 0, 10), ("attacking", 2, 10), ("attacking", 4, 10), ("attacking", 10, 10)]
    told.clear()
    quick = Meter(lambda *what: told.append(what), "preparing", 3, together=3, patience=60)
    quick.finish_(2)
    quick.finish_(3)
    assert told == [("preparing", 0, 3), ("preparing", 2, 3)]
