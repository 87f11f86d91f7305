"""Judge a ledger of before November 2026 again, as far as its fields and the tables of results allow.

    python benchmarks/rejudging.py docs/results

rewrites docs/results/ledger.json. Its rows had an estimate, a standard error and its degrees of freedom, but neither
single seeds nor the other sparsities of a curve. So p-values get as many degrees of freedom as the seeds have; a
sparsity that was chosen with the very networks that were tested is paid for by the number of sparsities; whether it was
appropriate or over-sparsified is read off the validation accuracies in results.csv. What cannot be known is said in a
row's `unknown`: whether "no effect that matters", or the opposite, holds at every sparsity; what flags attacks raised;
and how sure a per cent is of which the control's mean was taken as fixed.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from sparring.statistics import Claim, Effect, Question, Row, ask, judge, look_price, no_gain

APPROPRIATE, OVER = 0.005, 0.02  # of validation accuracy: what may be lost, and from where on it is over-sparsified
PLACE = re.compile(r", (?P<method>.+?) at (?P<sparsity>[\d.]+)%(?P<how> \(.*?\))?(?: − .*|: .*)?$")
BEST = ("chosen on validation images", "the best of the curve")
AT_FGSMS_BEST = ("the gain survives", "the gain exceeds", "adversarial examples transfer", "activation sparsity's gain")
GAINS = "networks gain"
LOSES = "over-sparsified networks lose"
PRIMARY = ("nonlinear networks gain", LOSES, "the gain survives the worst case")
LINEAR = ("linear: sparsity gains l_inf robustness", "linear: sparsity does not gain l_2 robustness")
FLAGS = "flags that the attacks raised"
LOOKS = {"paper-lenet-5": 2, "paper-resnet-32-small": 2}  # judged with one seed less before, as their pages said
EVERYWHERE = "whether it is so at every sparsity"


class Table:
    """Hold the validation accuracies of a study's results.csv, means over seeds; without a file nothing is known."""

    def __init__(self, path: Path) -> None:
        rows = list(csv.DictReader(path.open(encoding="utf-8"))) if path.exists() else []
        wanted = [row for row in rows if row.get("metric") == "accuracy" and row.get("split") == "valid"]
        self.accuracy = {(row["method"], float(row["sparsity"])): float(row["mean"]) for row in wanted}

    def loss(self, method: str, sparsity: float) -> float | None:
        """Return what a network loses of the dense control's validation accuracy, or None."""
        control, one = self.accuracy.get(("control", 0.0)), self.accuracy.get((method, sparsity))
        return None if control is None or one is None else control - one

    def choices(self, method: str) -> int:
        """Return at how many sparsities a method was tried."""
        return max(1, sum(name == method for name, _ in self.accuracy))


def question(row: Mapping[str, Any], table: Table) -> Question:
    """Return the question of an old row."""
    claim, effect = _claim(row), _effect(row)
    place = PLACE.search(claim.test)
    if effect is None or effect.seeds == 1 or place is None:
        return ask(claim, effect)
    method, sparsity = place["method"], round(float(place["sparsity"]) / 100, 6)
    loss = table.loss(method, sparsity)
    best = any(words in (place["how"] or "") for words in BEST)
    if LOSES in claim.text and loss is not None and loss <= OVER:
        return replace(ask(claim, None), unknown=f"no sparsity of the plan loses more than {OVER:.0%} of accuracy")
    if GAINS in claim.text and loss is not None and loss > APPROPRIATE:
        return replace(ask(claim, None), unknown=f"asked at {sparsity:.4g}, which loses {loss:.1%} of accuracy")
    at_best = best or claim.text.startswith(AT_FGSMS_BEST)
    found = ask(claim, effect, choices=table.choices(method) if at_best else 1)
    unknown = [FLAGS] + (["its per cent takes the control's mean as fixed"] if claim.unit == "%" else [])
    if best:  # it is claimed of some sparsity, and could only be refuted at all of them
        found = replace(found, p_small=math.nan, p_against=math.nan)
        unknown.append(EVERYWHERE)
    return replace(found, unknown="; ".join(unknown))


def _claim(row: Mapping[str, Any]) -> Claim:
    text = str(row["claim"]).replace(" (here: the sparsest)", "")
    primary = text.startswith(PRIMARY) or text in LINEAR
    origin: Any = "paper" if primary or "Lipschitz constant falls" in text else "this project"
    origin = "later work" if text.startswith("activation sparsity") else origin
    fields = (row["expects"], float(row["margin"]), str(row["unit"]), str(row["test"]))
    return Claim(text, *fields, primary=primary, origin=origin)


def _effect(row: Mapping[str, Any]) -> Effect | None:
    if row["estimate"] is None:
        return None
    estimate, se, df, low, high = (float(row[name]) for name in ("estimate", "se", "df", "low", "high"))
    low = max(low, -100.0) if row["unit"] == "%" else low  # no ratio falls further
    price = look_price(LOOKS.get(str(row["study"]), 1))
    one = Effect(estimate, se, df, low, high, math.nan, int(row["seeds"]), int(row["images"]), price)
    return (
        one if one.seeds == 1 else replace(one, p=min(1.0, 2 * no_gain(replace(one, estimate=-abs(estimate)), 1e-12)))
    )


def rejudged(rows: Sequence[Mapping[str, Any]], results: Path) -> list[Row]:
    """Return old rows judged again, each study among its own claims."""
    studies = list(dict.fromkeys(str(row["study"]) for row in rows))
    tables = {study: Table(results / study / "results.csv") for study in studies}
    return [
        new
        for study in studies
        for new in judge([question(row, tables[study]) for row in rows if row["study"] == study], study=study)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    path = parser.parse_args().results / "ledger.json"
    old = json.loads(path.read_text(encoding="utf-8"))
    if any("p_done_alone" in row for row in old):
        raise SystemExit(f"{path} is judged by the new rules already")
    rows = rejudged(old, path.parent)
    path.write_text(json.dumps([row.as_dict() for row in rows], indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    for row, before in zip(rows, old, strict=True):
        if row.verdict != before["verdict"]:
            print(f"{row.study}: {row.claim.text}: {before['verdict']} -> {row.told}")


if __name__ == "__main__":
    main()
