from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from sparring.draws import Draws, drawn_at, shared_of

LIKE = torch.zeros(0)
MANY = Draws.of(0, range(200))
# 200,000 numbers: bounds of five standard errors or more.
SHAPE = (10, 100)


def correlation(one: Tensor, other: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([one.flatten(), other.flatten()]).double())[0, 1])


def test_uniform_numbers_have_the_moments_and_the_spread_of_uniform_ones() -> None:
    drawn = MANY.uniform(SHAPE, LIKE).double()
    assert drawn.shape == (200, *SHAPE)
    assert drawn.min() >= 0 and drawn.max() < 1
    for power in (1, 2, 3):
        spread = math.sqrt(1 / (2 * power + 1) - 1 / (power + 1) ** 2)
        assert abs(float((drawn**power).mean()) - 1 / (power + 1)) < 5 * spread / math.sqrt(drawn.numel())
    counts = torch.histc(drawn, 100, 0, 1)
    expected = drawn.numel() / 100
    # Chi-square of 99 degrees of freedom: mean 99, standard deviation 14.
    assert 45 < float(((counts - expected) ** 2 / expected).sum()) < 170


def test_every_bit_is_a_fair_coin() -> None:
    numbers = (MANY.uniform(SHAPE, LIKE) * 2**24).long()
    for bit in range(24):
        assert abs(float((numbers >> bit & 1).double().mean()) - 0.5) < 5 * 0.5 / math.sqrt(numbers.numel())


def test_normal_numbers_have_the_moments_of_normal_ones() -> None:
    drawn, error = MANY.normal(SHAPE, LIKE).double(), 1 / math.sqrt(200_000)
    for power, moment, spread in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(float((drawn**power).mean()) - moment) < 5 * math.sqrt(spread) * error
    assert float((drawn.abs() < 1).double().mean()) == pytest.approx(math.erf(1 / math.sqrt(2)), abs=5 * 0.47 * error)


@pytest.mark.parametrize("bound", [1, 2, 3, 10, 729])
def test_integers_are_even_below_their_bound(bound: int) -> None:
    drawn = MANY.below(bound, SHAPE)
    counts, expected = torch.bincount(drawn.flatten(), minlength=bound).double(), drawn.numel() / bound
    assert len(counts) == bound
    assert float(((counts - expected) ** 2 / expected).sum()) < bound + 7 * math.sqrt(2 * bound)


def test_neighbours_of_any_kind_are_independent() -> None:
    drawn, few = MANY.uniform(SHAPE, LIKE), 5 / math.sqrt(190_000)
    assert abs(correlation(drawn[1:], drawn[:-1])) < few  # images
    assert abs(correlation(drawn[..., 1:], drawn[..., :-1])) < few  # counters
    for other in (MANY.at(0), MANY.at(1), MANY.at(0).at(0), Draws.of(1, range(200)), Draws.of(0, range(200, 400))):
        assert abs(correlation(drawn, other.uniform(SHAPE, LIKE))) < few
    assert abs(correlation(MANY.at(0).uniform(SHAPE, LIKE), MANY.at(1).uniform(SHAPE, LIKE))) < few
    assert abs(correlation(*MANY.normal(SHAPE, LIKE).flatten(1).chunk(2, dim=1))) < few  # the two of a pair


def test_no_key_comes_twice() -> None:
    places = [Draws.of(seed, range(500)).at(place) for seed in range(20) for place in range(20)]
    keys = torch.cat([one.keys for one in places] + [one.common for one in places])
    assert len(keys.unique()) == len(keys) == 20 * 20 * 501


def test_numbers_follow_from_seed_and_image_alone() -> None:
    whole = MANY.at(2).normal((7,), LIKE)
    rows = torch.tensor([150, 3, 99])
    assert torch.equal(MANY[rows].at(2).normal((7,), LIKE), whole[rows])
    assert torch.equal(MANY.at(2)[rows].normal((7,), LIKE), whole[rows])
    assert torch.equal(Draws.of(0, range(90, 110)).at(2).normal((7,), LIKE), whole[90:110])
    assert torch.equal(MANY[rows].shared().at(1).keys, MANY.shared().at(1).keys)
    spread = MANY[rows].spread(range(4, 9))
    assert torch.equal(spread.keys.view(3, 5), torch.stack([MANY[rows].at(k).keys for k in range(4, 9)], dim=1))


def test_types_have_the_same_numbers_whatever_is_made_at_once() -> None:
    assert torch.equal(MANY.uniform(SHAPE, LIKE).double(), MANY.uniform(SHAPE, LIKE.double()))
    one_by_one = torch.cat([MANY[torch.tensor([i])].uniform((3, 5), LIKE) for i in range(5)])
    assert torch.equal(one_by_one, MANY.uniform((3, 5), LIKE)[:5])


def test_a_generator_goes_on_from_where_it_is() -> None:
    generator = torch.Generator()
    assert drawn_at(generator, 3, torch.arange(2)) is shared_of(generator) is generator
    assert drawn_at(None, 3) is None
