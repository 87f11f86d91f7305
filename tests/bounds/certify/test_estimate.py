"""Which bound fits in the time given: estimates rise with tightness, and the choice keeps within them."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from sparring.bounds import BOUNDS, estimate, radius, tightest
from sparring.bounds._network import margin_rows, prepare
from sparring.bounds.certify import _open_units as units
from sparring.bounds.certify import _search as search
from sparring.bounds.certify._estimate import TIGHTEST
from sparring.models import build

EACH = {"interval": 0.1, "crown-interval": 0.5, "crown": 20.0, "alpha-crown": 100.0}


@pytest.mark.parametrize(
    ("seconds", "method"),
    [(1e4, "alpha-crown"), (999, "crown"), (100, "crown-interval"), (1.5, "interval"), (0.1, "interval")],
)
def test_the_tightest_that_fits_is_chosen(seconds: float, method: str) -> None:
    assert tightest(EACH, 10, seconds) == method


def test_every_method_has_an_estimate_and_convolutions_cost_more() -> None:
    x = torch.rand(2, 1, 28, 28)
    small, large = (
        estimate(build(name, shape=(1, 28, 28), classes=10, mean=(0.5,), std=(0.5,)).eval(), x, math.inf)
        for name in ("lenet-300-100", "lenet-5")
    )
    assert set(small) == set(large) == set(TIGHTEST) <= set(BOUNDS)
    assert 0 < small["crown"] < large["crown"] < large["alpha-crown"]


def test_an_estimate_tells_its_steps() -> None:
    told: list[tuple[int, int]] = []
    model, x, _ = padded()
    estimate(model, x, math.inf, progress=lambda done, total: told.append((done, total)))
    assert told == [(0, 4), (1, 4), (2, 4), (3, 4), (4, 4)]


def padded(seed: int = 0) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        body = (nn.Conv2d(1, 6, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 6, 3, padding=1), nn.ReLU())
        model = nn.Sequential(*body, nn.Flatten(), nn.Linear(6 * 36, 12), nn.ReLU(), nn.Linear(12, 3)).eval()
        x = torch.rand(4, 1, 12, 12)
    return model, x, model(x).argmax(1)


def test_a_heavy_networks_radius_is_certified_and_near_the_full_search(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, y = padded()
    full = radius(model, x, y, math.inf, tolerance=1e-3)
    monkeypatch.setattr(units, "_HEAVY", 0.0)
    units.heavy.cache_clear()
    told: list[tuple[int, int]] = []
    found = radius(model, x, y, math.inf, progress=lambda done, total: told.append((done, total)))
    units.heavy.cache_clear()
    assert told[-1] == (4, 4) and len(told) > 1
    assert (found <= full * (1 + 1e-3)).all() and (found >= 0.8 * full).all() and (found / full).median() >= 0.93


def test_a_search_begins_where_intervals_say_nothing() -> None:
    model, x, y = padded()
    graph = prepare(model, (1, 12, 12), certified=True)
    far, told = 0.5, [-math.inf, -1e30, -10.0, 0.5, 0.1, 0.01]

    def final(*_: object) -> torch.Tensor:
        return torch.tensor([[told.pop(0)]])

    found = search.Search(graph, x[:1], margin_rows(graph, y[:1]), math.inf, final, 0.0, 1.0, far).radius(0.0, 1.0)
    assert 0 < found < far


def test_few_passes_do(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, y = padded(1)
    monkeypatch.setattr(units, "_HEAVY", 0.0)
    units.heavy.cache_clear()
    passes: list[float] = []
    margin = search.Search._margin

    def counted(self: search.Search, eps: float, known: object) -> object:
        passes.append(eps)
        return margin(self, eps, known)  # type: ignore[arg-type]

    monkeypatch.setattr(search.Search, "_margin", counted)
    radius(model, x, y, math.inf)
    units.heavy.cache_clear()
    assert len(passes) <= 4 * len(x)


def test_a_maximum_behind_a_relu_needs_no_more_than_its_rivals() -> None:
    model, _, _ = padded()
    graph = prepare(model, (1, 12, 12))
    assert units.refined(graph) == [1, 4, 7]
