"""The report: one self-contained page, its figures and tables, from the records of a study alone."""

from __future__ import annotations

from .build import Report, merge_ledgers, publish, read, verdict, write
from .picking import Choice, pick
from .shipped import shipped_verdict
from .timings import timings_figure
from .versus import Difference, Side, broken, compare, compare_values

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
    "publish",
    "read",
    "shipped_verdict",
    "timings_figure",
    "verdict",
    "write",
]
