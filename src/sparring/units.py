"""Read and write norms, budgets, percentages and times, without torch."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Mapping

from .errors import UserError

__all__ = [
    "L0",
    "L1",
    "L2",
    "LINF",
    "duration",
    "html_table",
    "norm_name",
    "parse_budgets",
    "parse_eps",
    "parse_norm",
    "percent",
]

LINF = math.inf
L2 = 2.0
L1 = 1.0
L0 = 0.0  # number of values that differ: not a norm, but commonly called one
_NAMES = {LINF: "linf", L2: "l2", L1: "l1", L0: "l0"}
_SPELLINGS = {spelt: norm for norm, name in _NAMES.items() for spelt in (name[1:], f"{norm:g}", str(norm))}
_SPELLINGS |= {"infinity": LINF, "∞": LINF}
_DIGITS = re.compile(r"[^eE]*[1-9]")  # of a number that is not written as 0
_NORM = re.compile(r"(?:[lℓ][_-]?)?([^_-]+)")


def norm_name(norm: float) -> str:
    """Return "linf", "l2", "l1" or "l0"; raise UserError for any other norm."""
    if norm not in _NAMES:
        raise UserError(f"norm {norm} is not one of linf, l2, l1, l0")
    return _NAMES[norm]


def parse_norm(name: str | float) -> float:
    """Return the norm for a name such as "linf", "l_inf", "inf", "L2", "2", "l1" or "l0", or for a number."""
    spelt = _NORM.fullmatch(str(name).strip().lower())
    norm = _SPELLINGS.get(spelt[1]) if spelt else None
    if norm is None or isinstance(name, bool):
        raise UserError(f"norm '{name}' is not one of linf, l2, l1, l0")
    return norm


def parse_eps(value: str | float) -> float:
    """Return a budget from a number or a text such as "0.03" or "8/255"; raise UserError unless finite and >= 0."""
    above, slash, below = str(value).replace("_", "?").partition("/")  # Python reads "0_1" as 1
    try:
        eps = math.nan if isinstance(value, bool) else float(above) / (float(below) if slash else 1.0)
    except (ValueError, ZeroDivisionError, OverflowError):
        raise UserError(f"eps must be a number such as 0.03, or a fraction such as 8/255, not '{value}'") from None
    if not (math.isfinite(eps) and eps >= 0):
        raise UserError(f"eps must be a finite number >= 0, not {value}")
    if eps == 0 and _DIGITS.match(above):
        raise UserError(f"eps {value} is too small: it would be 0; give 0, or more than 1e-300")
    return eps + 0.0  # also for −0


def parse_budgets(text: str) -> tuple[float, ...]:
    """Return the budgets in a list such as "0.05,8/255", in order, without repeats; raise UserError if it is empty."""
    budgets = tuple(dict.fromkeys(parse_eps(part.strip()) for part in text.split(",") if part.strip()))
    if not budgets:
        raise UserError(f"eps takes numbers separated by commas, such as 0.05,8/255; '{text}' has none")
    return budgets


def html_table(rows: Mapping[str, str]) -> str:
    """Return named texts as an HTML table of two columns for notebooks."""
    cells = "".join(f"<tr><th>{html.escape(name)}</th><td>{html.escape(text)}</td></tr>" for name, text in rows.items())
    return f"<table>{cells}</table>"


def percent(share: float, decimals: int = 1, *, trim: bool = False) -> str:
    """Return a fraction as "61.2%", with more decimals if a value other than 0 or 1 would print as 0% or 100%.

    `trim` removes trailing zeros: "90%" and "99.7%" for sparsities.
    """
    number = 100 * share
    while decimals < 12 and number not in (0, 100) and float(f"{number:.{decimals}f}") in (0.0, 100.0):
        decimals += 1
    text = f"{number:.{decimals}f}"
    return (text.rstrip("0").rstrip(".") if trim and "." in text else text) + "%"


def duration(seconds: float) -> str:
    """Return seconds in readable units."""
    if seconds < 90:
        return f"{math.ceil(seconds)} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 4 * 86400 else f"{seconds / 86400:.0f} days"
