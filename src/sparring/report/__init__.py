"""The report: one self-contained page, its figures and tables, from the records of a study alone."""

from __future__ import annotations

from .build import Report, read, verdict, write
from .versus import Difference, Side, broken, compare

__all__ = ["Difference", "Report", "Side", "broken", "compare", "read", "verdict", "write"]
