"""Few seeds are told to show little: how large a gain must be with as many as there are, and with more."""

import re

import pytest

from sparring import report
from sparring.report._summary import headline
from sparring.report.analysis._claims import ledger
from sparring.report.analysis._findings import find
from sparring.report.analysis._looks import open_study
from sparring.statistics import look_price, minimum_detectable_effect, with_seeds

SAYS = "Few seeds can show only large gains"


@pytest.fixture(scope="module")
def folder(make_study):
    return make_study(seeds=3, images=60, sparsities=(0.5, 0.8, 0.9))


def test_three_seeds_say_what_they_can_show(folder):
    found = find(open_study(folder))
    rows = ledger(found)
    (told,) = [sentence for sentence in headline(found, rows).decided if SAYS in sentence]
    gains = [float(number) for number in re.findall(r"([\d.]+) points with (?:3|5|10)", told)]
    assert gains == sorted(gains, reverse=True) and len(gains) in (2, 3), "more seeds show smaller gains"
    primary = [row for row in rows if row.claim.primary and row.effect is not None]
    (survives,) = [row.question.effect for row in primary if row.claim.text.startswith("the gain survives")]
    least = minimum_detectable_effect(with_seeds(survives, 10), alpha=0.05 / len(primary))
    assert gains[-1] == pytest.approx(least, abs=0.51)


def test_the_top_of_the_page_says_what_to_ship_and_what_is_not_known(folder):
    found = find(open_study(folder))
    rows = ledger(found)
    short = headline(found, rows).short
    measured = [row for row in rows if row.claim.primary and row.effect is not None]
    undecided = sum(row.verdict == "undecided" for row in measured)
    assert f"{undecided} of {len(measured)} primary claims are undecided" in short
    box = re.search(r'verdict-box">(.*?)</div>', report.write(folder).read_text(), re.DOTALL)[1]
    assert "To ship: " in box and f"{undecided} of" in box


@pytest.mark.parametrize("seeds", [1, 5])
def test_one_seed_and_five_do_not(make_study, seeds):
    out = make_study(seeds=seeds, images=60, sparsities=(0.5, 0.9))
    assert SAYS not in report.verdict(out)


def test_a_new_study_of_as_many_seeds_is_this_one_at_the_price_of_a_first_look(folder):
    found = find(open_study(folder))
    one = found.result(found.first("worst")).gains.effects[0]
    assert with_seeds(one.priced(30.0), 3).price == look_price(1)
    assert with_seeds(one, 12).se == pytest.approx(one.se / 2)
    assert with_seeds(one, 12).df_p == 11


def test_the_headline_is_about_a_method_that_chooses_weights(make_study):
    tables = ({"label": "random", "score": "random"}, {"label": "magnitude"})
    first = make_study(images=40, methods=("random", "magnitude"), sparsities=(0.9, 0.98), pruning=tables)
    assert find(open_study(first)).method == "magnitude"
    alone = make_study(images=40, methods=("random",), sparsities=(0.9, 0.98), pruning=tables[:1])
    assert find(open_study(alone)).method == "random"
