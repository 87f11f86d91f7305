"""Bounds of cells against the points in them; planted bugs must be caught."""

from __future__ import annotations

import math

import pytest
import torch

from sparring.bounds._network import margin_rows, prepare
from sparring.bounds.certify._relaxations import Interval
from sparring.bounds.exact_distances._cells import Bounder, Cells
from sparring.bounds.exact_distances._half_spaces import Plane, Room
from sparring.bounds.exact_distances._maxima import without_maxima
from sparring.bounds.exact_distances._settled import settled
from sparring.bounds.verification._budget import Budget
from sparring.bounds.verification._leaves import joined
from sparring.threat import distance

from ..random_networks import network

SEEDS = range(14)
NORMS = [math.inf, 2.0]


def setting(seed: int, norm: float) -> tuple[Bounder, torch.Tensor]:
    """The problems of one image, pixels at 0 among its own, and points of the ball."""
    model, shape = network(seed)
    box = torch.zeros(1, *shape, dtype=torch.float64)
    graph = without_maxima(prepare(model, shape), Interval(box, box + 1))
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(1, *shape, generator=generator, dtype=torch.float64)
    x = torch.where(x < 0.4, 0, x)
    rows = margin_rows(graph, graph(x).argmax(1))[0]
    bounder = Bounder(graph, x, rows, norm)
    return bounder, points(bounder, generator)


def points(bounder: Bounder, generator: torch.Generator) -> torch.Tensor:
    """Steps just beyond a boundary, in random directions and those in which margins fall, and some others."""
    at = bounder.x.clone().requires_grad_()
    slopes = torch.autograd.functional.jacobian(lambda v: bounder.rows @ bounder.graph(v.view(bounder.shape))[0], at)
    falls = -(slopes.sign() if bounder.norm == math.inf else slopes / slopes.norm(dim=1, keepdim=True).clamp_min(1e-9))
    noise = torch.randn(150, len(bounder.x), generator=generator, dtype=torch.float64)
    fall = falls[torch.arange(150) % len(falls)] + noise * torch.rand(150, 1, generator=generator, dtype=torch.float64)
    ways = torch.cat([noise, noise.sign(), fall])
    scale = torch.linspace(0.02, 2, 20, dtype=torch.float64)
    steps = (bounder.x + scale[:, None, None] * ways).clamp(0, 1) - bounder.x
    with torch.no_grad():
        logits = bounder.graph((bounder.x + steps).view(-1, *bounder.shape[1:])).view(*steps.shape[:2], -1)
    first = (logits @ bounder.rows.T <= 0).any(2).int().argmax(0)
    return torch.cat([steps[first, torch.arange(len(ways))], steps[:, ::20].flatten(0, 1)])


@torch.no_grad()
def violated(seed: int, norm: float) -> bool:
    """Say whether any point of a cell is nearer than its bound, or has units beyond theirs."""
    bounder, steps = setting(seed, norm)
    far = distance(steps, norm)
    values = bounder.graph.values((bounder.x + steps).view(-1, *bounder.shape[1:]))
    wrong = (values[-1] @ bounder.rows.T) <= 0
    bounder.within_(float(far[wrong.any(1)].quantile(0.3)) if bool(wrong.any()) else float(far.median()))
    z = torch.cat([steps[:, :0], *(values[source].flatten(1) for source in bounder.relus.values())], 1)
    cells, _ = bounder.bounded(bounder.roots(torch.arange(len(bounder.rows))))
    for _ in range(4):
        if _beaten(bounder, cells, z, wrong, far):
            return True
        left = cells.score.sum(1) > 0
        if not bool(left.any()):
            break
        cells, _ = bounder.bounded(cells[left].split())
    ended = cells[cells.score.sum(1) <= 1e-6]
    better = [
        cells[:0],
        bounder.polished(cells[:1], 10)[0],
        settled(bounder, ended, Budget())[0] if len(ended) else ended,
    ]
    return _beaten(bounder, joined(better), z, wrong, far)


def _beaten(bounder: Bounder, cells: Cells, z: torch.Tensor, wrong: torch.Tensor, far: torch.Tensor) -> bool:
    inside = ((cells.signs[:, None] * z[None]) >= 0).all(2) & wrong.T[cells.owner] & (far <= bounder.eps)
    beyond = (z < cells.low[:, None] - 1e-9) | (z > cells.high[:, None] + 1e-9)
    return bool((inside & ((far < cells.lower[:, None] - 1e-9) | beyond.any(2))).any())


@pytest.mark.parametrize("norm", NORMS)
def test_no_point_of_a_cell_is_nearer_than_its_bound_or_beyond_those_of_its_units(norm: float) -> None:
    assert not [seed for seed in SEEDS[:7] if violated(seed, norm)]


_plane, _reach, _against, _away = Bounder._plane, Room.reach, Room._against, Room.away


def _wrong_multipliers(self, cells, lines, alpha, beta):
    return _plane(self, cells, lines, alpha, -beta)


def _wrong_slopes(self, cells, lines, alpha, beta):
    return _plane(self, cells, lines, 1.5 * alpha + 0.5, beta)


def _from_the_other_side(self, v, plane, eps):
    return _reach(self, v, Plane(-plane.a, plane.gap), eps)


def _of_a_smaller_ball(self, v, plane, eps):
    return _reach(self, v, plane, 0.6 * eps)


def _too_far(self, plane):
    found, step = _away(self, plane)
    return 2 * found, step


def _free_of_what_moves(self, v):
    return v - _against(self, v)


BUGS = {
    "multipliers of the wrong sign": (Bounder, "_plane", _wrong_multipliers, NORMS),
    "slopes above 1": (Bounder, "_plane", _wrong_slopes, NORMS),
    "a half-space of the wrong side": (Room, "reach", _from_the_other_side, NORMS),
    "units of a smaller ball": (Room, "reach", _of_a_smaller_ball, NORMS),
    "half-spaces farther than they are": (Room, "away", _too_far, NORMS),
    "pixels that move left out": (Room, "_against", _free_of_what_moves, [2.0]),
}


@pytest.mark.parametrize("bug", BUGS)
def test_planted_bugs_are_caught(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, name, broken, norms = BUGS[bug]
    monkeypatch.setattr(owner, name, broken)
    for norm in norms:
        assert any(violated(seed, norm) for seed in SEEDS), norm
