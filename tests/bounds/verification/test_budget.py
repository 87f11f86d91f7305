"""Budgets of searches: nodes that do not depend on the clock, caps of seconds, and memory."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import nn

from sparring.bounds import exact, verify
from sparring.bounds.verification import _budget as budgets
from sparring.bounds.verification._budget import Budget

from ..exact_distances.test_exact import brute_force, tiny
from .test_verify import hard


def at(moments: list[float], **limits: Any) -> Budget:
    return Budget(clock=iter(moments).__next__, **limits)


def test_no_part_lasts_longer_than_the_whole() -> None:
    assert at([10.0], deadline=14.0).within(9).deadline == 14.0


def test_what_ended_a_search_is_named_and_parts_are_counted() -> None:
    whole = Budget(nodes=5)
    part = whole.part(3)
    part.used, part.full = 3, True
    whole.take_(part)
    assert (whole.used, whole.full, whole.over, whole.limit) == (3, True, False, "memory")
    whole.used = 5
    assert whole.over and whole.limit == "nodes"
    assert at([2.0, 2.0], deadline=1.0).limit == "seconds"
    assert Budget().limit == ""


def test_nodes_end_an_exact_search_alike_whatever_the_clock() -> None:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))
    x = torch.rand(1, 1, 2, 2)
    y = model(x).argmax(1)
    slow, fast = (itertools.count(0, pace).__next__ for pace in (1e-9, 10.0))
    one, two = (exact(model, x, y, math.inf, nodes=1, seconds=1e12, clock=clock) for clock in (slow, fast))
    assert one.status == two.status == ("node limit",)
    assert torch.equal(one.lower, two.lower) and torch.equal(one.upper, two.upper)
    assert one.lower < one.upper


def test_many_nodes_suffice() -> None:
    model, x, y = tiny(0)
    found = exact(model, x, y, math.inf, nodes=10_000, seconds=1e6)
    assert found.status == ("exact",)
    assert found.upper.item() == pytest.approx(brute_force(model, x, int(y), math.inf), rel=1e-3)


@pytest.mark.parametrize(
    ("limits", "limit", "words"),
    [({"nodes": 20}, "nodes", "more nodes"), ({"seconds": 0.0}, "seconds", "more seconds"), ({}, "memory", "2 GB")],
)
def test_an_unknown_answer_says_what_ended_it(
    limits: dict[str, Any], limit: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(budgets, "BYTES", 0 if limit == "memory" else budgets.BYTES)
    model, x, y = hard()
    (found,) = verify(model, x, y, math.inf, 0.22, **limits)
    assert (found.status, found.limit) == ("unknown", limit) and words in found.why
    assert verify(model, x, y, math.inf, 1e-4)[0].why == ""
