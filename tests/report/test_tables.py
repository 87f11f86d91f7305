"""Where pruning may touch half of the weight matrices, no sparsity stands in a report without the share of all."""

import html
import re

import pytest

from sparring import report
from sparring.report import _summary as words
from sparring.report.analysis import _claims as claims
from sparring.report.analysis._findings import Result, find
from sparring.report.analysis._looks import open_study

SPARSE = r"\d+(?:\.\d+)?%"


@pytest.fixture(scope="module")
def folder(make_study):
    return make_study(methods=("gradual", "random"), images=80, extras=True, valid=True, share=0.5)


@pytest.fixture(scope="module")
def page(folder):
    return html.unescape(report.write(folder).read_text())


def test_phrases_of_the_headline(folder, monkeypatch):
    monkeypatch.setattr(Result, "over_sparsified", 0.95)
    text = str(words.headline(find(open_study(folder)), []))
    for phrase in (r"\bAt", "do not rule out", r"not a verdict\): .* from"):
        told = re.findall(rf"{phrase} ({SPARSE})(.{{18}})", text)
        assert told, phrase
        assert all(rest == " (of all matrices " for _, rest in told), told


def test_cells_of_every_table(page):
    cells = re.findall(r"<t[dh][^>]*>(50|80|90|95|98|99)%( or [^<]*| to [^<]*| \([^<]*)?</t[dh]>", page)
    bare = [cell for cell in cells if f"(of all matrices {float(cell[0]) / 2:.1f}%" not in cell[1]]
    assert len(cells) > 50
    assert not bare


def test_captions_and_axes(page):
    told = re.findall(rf"(?:peak at|more than allowed from) {SPARSE}[^,;.(]*(.?)", page)
    assert told
    assert set(told) == {"("}
    titles = re.findall(r"X-axis titled '([^']*sparsity[^']*)'", page)
    assert titles
    assert all("up to 99% (of all matrices 49.5%)" in title for title in titles), set(titles)


def test_every_test_of_the_ledger(folder):
    tests = [question.claim.test for question in claims.claims(find(open_study(folder)))]
    told = [test for test in tests if re.search(rf" at {SPARSE}", test)]
    assert any("transfer" in test.lower() for test in told)
    assert all(re.search(rf" at {SPARSE}[^(]* \(of all matrices", test) for test in told), told


def test_networks_of_prunable_matrices_alone_say_nothing_of_it(study_folder):
    assert "of all matrices" not in report.write(study_folder).read_text()
