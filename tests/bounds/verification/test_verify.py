"""Answers against brute force, hostile points and closed forms; the order certified ≤ exact ≤ attacked."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from torch import nn

from sparring.bounds import Property, radius, verify, verify_property
from sparring.bounds.verification._vnnlib import Case
from sparring.errors import Unsupported, UserError
from sparring.threat import distance

from ..exact_distances.test_exact import brute_force, brute_force_of_maxima, pooled, tiny
from ..random_networks import hostile_points, network


@pytest.mark.parametrize("norm", [math.inf, 2.0])
@pytest.mark.parametrize("seed", (1, 3, 8, 9))
def test_the_answer_turns_at_the_exact_distance(seed: int, norm: float) -> None:
    model, x, y = tiny(seed)
    _turns(model, x, y, norm, brute_force(model, x, int(y), norm))


@pytest.mark.parametrize("norm", [math.inf, 2.0])
def test_the_answer_turns_at_the_exact_distance_where_maxima_are_split(norm: float) -> None:
    model, x, y = pooled(1)
    _turns(model, x, y, norm, brute_force_of_maxima(model, x, int(y), norm))


def _turns(model: nn.Module, x: torch.Tensor, y: torch.Tensor, norm: float, distance_: float) -> None:
    expected = min(distance_, 1.0)
    (inside,) = verify(model, x, y, norm, expected * 0.999)
    assert inside.status == "verified" and inside.bound > 0 and inside.x_adv is None
    if expected < 0.99:
        (beyond,) = verify(model, x, y, norm, expected * 1.005)
        assert beyond.status == "falsified" and beyond.x_adv is not None
        assert model(beyond.x_adv).argmax() != y
        assert distance(beyond.x_adv.double() - x.double(), norm) <= expected * 1.005


@pytest.mark.parametrize("seed", range(14))
def test_nothing_verified_is_beaten_on_every_layer_kind(seed: int) -> None:
    model, shape = network(seed)
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(1, *shape, generator=generator)
    y = model(x).argmax(1)
    certified = float(radius(model, x, y, math.inf))
    for eps in {min(1.0, factor * certified) for factor in (0.99, 1.5)} - {0.0}:
        (found,) = verify(model, x, y, math.inf, eps, nodes=100)
        points = hostile_points(model, x.double(), y, math.inf, eps, points=100, generator=generator)
        wrong = model.double()(points).argmax(1) != y
        model.float()
        assert not (found.status == "verified" and wrong.any())
        assert found.status == "verified" or eps > certified
        assert found.status != "falsified" or model(found.x_adv).argmax() != y


def test_a_wrong_image_is_its_own_counter_example_and_a_tie_is_not_proved() -> None:
    model, x, y = tiny(0)
    (found,) = verify(model, x, (y + 1) % 3, math.inf, 0.01)
    assert found.status == "falsified"
    tied = nn.Sequential(nn.Flatten(), nn.Linear(3, 2))
    tied.load_state_dict({"1.weight": torch.zeros(2, 3), "1.bias": torch.zeros(2)})
    (found,) = verify(tied, x, torch.tensor([0]), math.inf, 0.01, nodes=10)  # argmax says 0 for both
    assert found.status == "unknown" and found.bound <= 0


def hard() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 30), nn.ReLU(), nn.Linear(30, 30), nn.ReLU(), nn.Linear(30, 3))
    x = torch.rand(1, 1, 4, 4)
    return model, x, model(x).argmax(1)


def test_a_budget_of_nodes_ends_the_search_with_a_bound_the_same_each_time() -> None:
    model, x, y = hard()
    one, two = (verify(model, x, y, math.inf, 0.1, nodes=50, seconds=1e6)[0] for _ in range(2))
    assert one.status == two.status and one.bound == two.bound and one.nodes == two.nodes


def test_a_search_decides_what_bounds_alone_do_not_and_tells_how_far_it_is() -> None:
    model, x, y = hard()
    told: list[tuple[float, int, int]] = []
    eps = next(e / 100 for e in range(1, 50) if verify(model, x, y, math.inf, e / 100, nodes=0)[0].status == "unknown")
    (found,) = verify(model, x, y, math.inf, eps, progress=lambda *state: told.append(state))
    assert found.status == "verified" and found.nodes > 0
    assert all(bound <= found.bound + 1e-9 or bound > 0 for bound, _, _ in told)


def unsafe(*rows: tuple[dict[int, int], float], low: float = 0.0, high: float = 1.0) -> Case:
    box = (Fraction(low),) * 2, (Fraction(high),) * 2
    exact = tuple(({k: Fraction(c) for k, c in row.items()}, Fraction(limit)) for row, limit in rows)
    return Case(box, exact)


def test_properties_are_disjunctions_of_conjunctions_over_boxes() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())  # max(x, 0)
    model.load_state_dict({"0.weight": torch.eye(2), "0.bias": torch.zeros(2)})

    def answer(*cases: Case) -> tuple[str, Case | None]:
        found, case = verify_property(model, (2,), Property(2, 2, cases))
        return found.status, case

    high_and_low = unsafe(({0: -1}, -0.75), ({1: 1}, 0.25))  # y0 ≥ 0.75 and y1 ≤ 0.25
    beyond = unsafe(({0: -1}, -1.25))  # y0 ≥ 1.25
    contradiction = unsafe(({0: -1}, -0.75), ({0: 1}, 0.5))
    elsewhere = unsafe(({0: -1}, -1.25), low=1.0, high=2.0)
    assert answer(high_and_low) == ("falsified", high_and_low)
    assert answer(beyond) == ("verified", None)
    assert answer(contradiction) == ("verified", None)
    assert answer(beyond, contradiction, elsewhere) == ("falsified", elsewhere)
    assert answer(unsafe(({0: 1}, 0.0), low=0.5)) == ("verified", None)
    assert answer(unsafe(({0: 1}, 0.5), low=0.5)) == answer(unsafe(({0: 1}, 0.5), low=0.5))  # a tie counts
    assert answer(unsafe(({0: 1}, 0.5), low=0.5))[0] == "falsified"
    assert answer() == ("verified", None)


def test_questions_that_do_not_fit_are_refused() -> None:
    model, x, y = tiny(0)
    with pytest.raises(UserError, match="linf and l2"):
        verify(model, x, y, 1.0, 0.1)
    assert verify(model, x[:0], y[:0], math.inf, 0.1) == ()
    with pytest.raises(UserError, match="2 inputs"):
        verify_property(model, (1, 1, 3), Property(2, 3, ()))
    with pytest.raises(UserError, match="4 outputs"):
        verify_property(model, (1, 1, 3), Property(3, 4, ()))
    with pytest.raises(Unsupported):
        verify(nn.Sequential(nn.Flatten(), nn.Linear(3, 2), nn.Softmax(1)), x, y, math.inf, 0.1)
