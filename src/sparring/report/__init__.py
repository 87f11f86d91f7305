"""The report: one self-contained page, its figures and tables, from the records of a study alone."""

from __future__ import annotations

from .build import verdict, write
from .comparing import Comparison, Drop, compare, compare_models, failures

__all__ = ["Comparison", "Drop", "compare", "compare_models", "failures", "verdict", "write"]
