"""The report: one self-contained page, its figures and tables, from the records of a study alone."""

from __future__ import annotations

from ._build import Report, merge_ledgers, publish, read, verdict, write
from ._compare import Difference, Side, broken, compare, compare_values
from ._pick import Choice, pick
from .analysis._shipped import shipped_verdict
from .pages._bench_plot import timings_figure
from .pages._figures import png

__all__ = [
    "Choice",
    "Difference",
    "Report",
    "Side",
    "broken",
    "compare",
    "compare_values",
    "merge_ledgers",
    "pick",
    "png",
    "publish",
    "read",
    "shipped_verdict",
    "timings_figure",
    "verdict",
    "write",
]
