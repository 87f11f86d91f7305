"""The report: one self-contained page, its figures and tables, from the records of a study alone."""

from __future__ import annotations

from .build import verdict, write

__all__ = ["verdict", "write"]
