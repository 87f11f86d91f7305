"""What the pages of docs/results may say in digits: every number worked out again from results.csv and ledger.json.

`FACTS` has for each page the phrases with numbers that it holds; digits anywhere else in its prose are an error.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

RESULTS = Path(__file__).parents[2] / "docs" / "results"
EPS = {"0.1": 0.1, "0.2": 0.2, "0.3": 0.3, "1/255": 1 / 255, "2/255": 2 / 255}


def signed(number: float, digits: int = 1) -> str:
    """Return a number with a real minus or a plus sign, none of a zero."""
    text = f"{number:+.{digits}f}".replace("-", "−")
    return text if text.strip("+−0.") else text[1:]


def interval(row: dict, digits: int = 1) -> str:
    """Return a row's effect with its interval, as "+5.7 [+1.3, +10.1]"."""
    estimate, low, high = (signed(row[name], digits) for name in ("estimate", "low", "high"))
    return f"{estimate} [{low}, {high}]"


class Numbers:
    """Hold one study's results.csv and its rows of the ledger."""

    def __init__(self, study: str) -> None:
        self.study = study

    @cached_property
    def rows(self) -> list[dict]:
        with (RESULTS / self.study / "results.csv").open(encoding="utf-8") as file:
            return list(csv.DictReader(file))

    @cached_property
    def claims(self) -> list[dict]:
        ledger = json.loads((RESULTS / "ledger.json").read_text(encoding="utf-8"))
        return [row for row in ledger if row["study"] == self.study]

    def claim(self, *words: str) -> dict:
        """Return the one row whose claim and test hold all the words."""
        (found,) = [row for row in self.claims if all(w in f"{row['claim']}. {row['test']}" for w in words)]
        return found

    def row(self, metric: str, method: str, sparsity: float, attack: str = "", eps: str = "", norm: str = "") -> dict:
        """Return the one row of results.csv; `norm` is asked for where a metric has several."""
        found = [
            row
            for row in self.rows
            if row["metric"] == metric
            and row["method"] == method
            and math.isclose(float(row["sparsity"]), sparsity)
            and (not attack or row["attack"] == attack)
            and (not eps or math.isclose(float(row["eps"] or 0), EPS[eps]))
            and (not norm or row["norm"] == norm)
            and row["split"] != "valid"
        ]
        (only,) = found
        return only

    def mean(self, *who: str | float, **more: str) -> float:
        return float(self.row(*who, **more)["mean"])  # type: ignore[arg-type]

    # What pages speak of, shares in per cent; without a method the dense control and the headline's method.

    def share(self, metric: str, sparsity: float, method: str, attack: str = "", eps: str = "") -> float:
        return 100 * self.mean(metric, method or ("magnitude" if sparsity else "control"), sparsity, attack, eps)

    def accuracy(self, sparsity: float = 0, method: str = "") -> float:
        return self.share("accuracy", sparsity, method)

    def fgsm(self, sparsity: float = 0, method: str = "", eps: str = "0.1") -> float:
        return self.share("robust_accuracy", sparsity, method, "fgsm", eps)

    def under(self, attack: str, sparsity: float = 0, method: str = "", eps: str = "0.1") -> float:
        return self.share("robust_accuracy", sparsity, method, attack, eps)

    def worst(self, sparsity: float = 0, method: str = "", eps: str = "0.1") -> float:
        return self.share("worst_case_accuracy", sparsity, method, "", eps)

    def distance(self, attack: str, sparsity: float = 0, method: str = "", *, correct: bool = False) -> float:
        metric = "mean_distance_correct" if correct else "mean_distance"
        return self.mean(metric, method or ("magnitude" if sparsity else "control"), sparsity, attack)

    def r_2(self, sparsity: float = 0, method: str = "") -> float:
        return self.distance("deepfool-50", sparsity, method)

    def certified(self, way: str, sparsity: float = 0, method: str = "") -> float:
        return self.mean("mean_certified_radius", method or ("magnitude" if sparsity else "control"), sparsity, way)


Facts = Callable[[], list[str]]
