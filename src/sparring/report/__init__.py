"""The report: one self-contained page with figures and tables, from the records of a study only."""

from __future__ import annotations

from ._build import Report, merge_ledgers, publish, read, verdict, write
from ._compare import Choice, Difference, Side, broken, compare, compare_values, pick
from ._figures import png, timings_figure
from .analysis._comparisons import shipped_verdict

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
