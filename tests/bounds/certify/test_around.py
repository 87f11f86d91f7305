"""Rough bounds: sound, near those of CROWN, and their rounding in float32 is covered."""

from __future__ import annotations

import pytest
import torch

from sparring.bounds._network import prepare
from sparring.bounds._region import region
from sparring.bounds.certify import _around as around
from sparring.bounds.certify import _receptive_field as windows
from sparring.bounds.certify._crown import bound_nodes
from sparring.bounds.certify._relaxations import Interval, Lines
from sparring.threat import L1, L2, LINF

from .test_receptive_field import BODIES, network


def rough(body: str, norm: float, eps: float = 0.01) -> tuple[list[Interval], list[Interval]]:
    """Return rough bounds of all nodes and those without rounding: the same lines in float64."""
    graph = prepare(network(body), (1, 16, 15))
    x = torch.rand(3, 1, 16, 15, generator=torch.Generator().manual_seed(0))
    reach = region(x, norm, torch.full((3,), eps * (1 if norm == LINF else 20), dtype=torch.float64))
    found, _ = bound_nodes(graph, reach, backward=True, roughly=True)
    torch.set_float32_matmul_precision("high")
    try:
        exact, _ = bound_nodes(graph, reach, backward=True, roughly=True)
    finally:
        torch.set_float32_matmul_precision("highest")
    return found, exact


def outside(found: list[Interval], exact: list[Interval]) -> float:
    """Return by how much bounds exceed exact ones, at most, where both chose the same lines.

    Near a tie, rounding makes a unit choose the other slope, which moves some bound by far more than rounding does.
    """
    gaps = [torch.maximum(a.lower - b.lower, b.upper - a.upper).flatten() for a, b in zip(found, exact, strict=True)]
    gap = torch.cat(gaps)
    chosen = gap > 1e-5
    assert chosen.double().mean() < 1e-3
    return float(gap[~chosen].max())


@pytest.mark.parametrize("norm", [LINF, L2, L1])
@pytest.mark.parametrize("body", BODIES)
def test_bounds_in_float32_contain_those_in_float64(body: str, norm: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(windows, "_WORTH", 1.0)
    found, exact = rough(body, norm)
    assert outside(found, exact) < 1e-12
    wide, narrow = (sum(float((side.upper - side.lower).mean()) for side in bounds) for bounds in (found, exact))
    assert wide <= 1.01 * narrow  # a unit whose sign is settled in one of them alone is refined in the other


def test_rounding_that_is_not_counted_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(windows, "_WORTH", 1.0)
    monkeypatch.setattr(around, "_terms", lambda *_: 0)
    assert max(outside(*rough(body, LINF)) for body in BODIES) > 1e-10


@pytest.mark.parametrize("body", BODIES)
def test_rough_bounds_are_near_those_of_crown(body: str) -> None:
    graph = prepare(network(body), (1, 16, 15))
    reach = region(torch.rand(2, 1, 16, 15, generator=torch.Generator().manual_seed(1)), LINF, 0.01)
    full, simple = (bound_nodes(graph, reach, backward=backward)[0] for backward in (True, False))
    found, _ = bound_nodes(graph, reach, backward=True, roughly=True)
    for one, other, loose in zip(found, full, simple, strict=True):
        width, least, most = (float((side.upper - side.lower).mean()) for side in (one, other, loose))
        assert width <= least + 0.3 * (most - least) + 1e-12


def beaten(body: str) -> bool:
    """Return whether any node of sampled points lies outside rough bounds."""
    graph = prepare(network(body), (1, 16, 15))
    generator = torch.Generator().manual_seed(2)
    x = torch.rand(1, 1, 16, 15, generator=generator, dtype=torch.float64)
    reach = region(x, LINF, 0.05)
    corners = torch.rand(400, 1, 16, 15, generator=generator, dtype=torch.float64) < 0.5
    found, _ = bound_nodes(graph, reach, backward=True, roughly=True)
    values = graph.values(torch.where(corners, reach.lower, reach.upper))
    return any(bool(((v < b.lower - 1e-9) | (v > b.upper + 1e-9)).any()) for v, b in zip(values, found, strict=True))


def test_no_rough_bound_is_beaten_and_lines_without_their_shifts_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(windows, "_WORTH", 1.0)
    assert not any(beaten(body) for body in BODIES)

    def moved(lines: Lines, *_: object, parallel: bool) -> Lines:
        return lines._replace(low_shift=0 * lines.low_shift, high_shift=0 * lines.high_shift)

    monkeypatch.setattr(Lines, "around", moved)
    assert any(beaten(body) for body in BODIES)
