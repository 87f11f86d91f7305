import itertools

import pytest

from sparring.statistics import look_price


def test_all_looks_together_spend_alpha_and_the_first_most_of_it():
    spent = [1 / look_price(k) for k in range(1, 10_001)]
    assert spent[0] == pytest.approx(0.8)
    assert all(a > b for a, b in itertools.pairwise(spent))
    assert sum(spent) == pytest.approx(1 - 0.2 / 10_000)
    with pytest.raises(ValueError, match="from 1"):
        look_price(0)
