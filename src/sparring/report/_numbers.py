"""Format numbers in reports: real minus signs, signs on gains, units once."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from .. import units
from ..statistics import LEAST_P, MOST_POINTS, Effect, Row, change, within_points

if TYPE_CHECKING:
    from .analysis._metrics import Measure
    from .analysis._records import Study

MOST_WRITTEN = 1e5  # larger numbers are written with an exponent
ABSOLUTE = "absolute"  # a gain in the metric's own unit
UNIT = 5e-4  # differences by one weight, or one unit of a structure, are not mentioned


def percent(share: float) -> str:
    """Return a sparsity as "90%", "99.7%" or "99.999%"."""
    return units.percent(share, 2, trim=True)


def sparsity(study: Study, method: str, share: float) -> str:
    """Return a sparsity as "90%" or, if less of all weight matrices was removed, as "90% (of all matrices 6.8%)"."""
    return percent(share) + of_all(study, method, [share])


def of_all(study: Study, method: str, sparsities: Sequence[float]) -> str:
    """Return the share removed of all weight matrices, mean over seeds, as " (of all matrices 6.8%)"; "" if no less."""
    told = [gone for s in sparsities if (gone := _gone(study, method, s)) is not None and gone < s - UNIT]
    if not told or study.kind(method) not in ("pruned", "random", "channels", "surgery"):
        return ""
    shares = [f"{100 * gone:.1f}%" for gone in told]
    return f" (of all matrices {f'{shares[0]} to {shares[-1]}' if len(shares) > 2 else ' or '.join(shares)})"


def axis_title(study: Study, *methods: str) -> str:
    """Return "sparsity", or if less of all weight matrices was removed "sparsity, up to 90% (of all matrices 6.8%)"."""
    for method in methods:
        highest = max((network.sparsity for network in study.of(method)), default=0.0)
        if of_all(study, method, [highest]):
            return f"sparsity, up to {sparsity(study, method, highest)}"
    return "activation sparsity" if {study.axis(method) for method in methods} == {"activations"} else "sparsity"


def _gone(study: Study, method: str, sparsity: float) -> float | None:
    shares = []
    for network in study.of(method, sparsity):
        total, share = network.metric("sparsity_matrices"), network.metric("sparsity")
        shares += [one for one in (share if total is None else total,) if one is not None]
    return sum(shares) / len(shares) if shares else None


def span(chosen: Sequence[float], grid: Sequence[float]) -> str:
    """Return sparsities as "95%", "90% or 95%", or "90% to 99%" if they are neighbours in the grid."""
    places = [grid.index(s) for s in chosen]
    if len(chosen) > 2 and places == list(range(places[0], places[-1] + 1)):
        return f"{percent(chosen[0])} to {percent(chosen[-1])}"
    *others, last = map(percent, chosen)
    return f"{', '.join(others)} or {last}" if others else last


def listed(names: Iterable[str]) -> str:
    """Return "a", "a and b" or "a, b and c"."""
    *most, last = names
    return f"{', '.join(most)} and {last}" if most else last


def value(measure: Measure, number: float | None) -> str:
    """Return one value of a metric: "61.2%", "1.083" or "2.7e−05"."""
    if number is None or not math.isfinite(number):
        return "–"
    return units.percent(number) if measure.is_share else length(number)


def level(measure: Measure, one: Effect) -> str:
    """Return a metric's mean with its interval: "61.2% [58.9, 63.4]"."""
    if measure.is_share:
        return f"{units.percent(one.estimate)} [{_fixed(100 * one.low, 1)}, {_fixed(100 * one.high, 1)}]"
    return f"{length(one.estimate)} [{length(one.low)}, {length(one.high)}]"


def length(number: float, digits: int = 3) -> str:
    """Return a distance or radius with a number of decimals, or with two digits if that would leave fewer."""
    few = number != 0 and abs(number) < 10.0 ** (1 - digits)
    return f"{number:.2g}".replace("-", "−") if few else _fixed(number, digits)


def gain_unit(measure: Measure, control: Effect | None = None) -> str:
    """Return the unit of a metric's gains over a dense control: if its mean is zero, there are no per cents."""
    if measure.is_share:
        return "points"
    return "%" if control is None or control.estimate > 0 else ABSOLUTE


def gain(measure: Measure, one: Effect, control: Effect, *, unit: bool = True) -> str:
    """Return a gain over the dense control: "+16 [+13, +19] points", or "+1.2% [+0.3, +2.1]" of its mean distance."""
    name = gain_unit(measure, control)
    return signed(shown(measure, one, control), name if unit or name == ABSOLUTE else "")


def shown(measure: Measure, one: Effect, control: Effect) -> Effect:
    """Return a gain in its unit: points of a share, or % of a length, whose gain is a logarithm."""
    name = gain_unit(measure, control)
    if name != "%":
        return within_points(one.scaled(100.0)) if name == "points" else one
    estimate, low, high = (change(number) for number in (one.estimate, one.low, one.high))
    return replace(one, estimate=estimate, low=low, high=high, se=100 * one.se)


def signed(one: Effect, unit: str) -> str:
    """Return a difference in points or % with its interval, and a decimal only if one is needed.

    It is needed if the interval is narrow, or if an end of it would be rounded to zero, which it excludes.
    """
    sharp = one.high - one.low < 4 or any(0.05 <= abs(end) < 0.5 for end in (one.low, one.high))
    form = ".2g" if unit == ABSOLUTE or one.high > MOST_WRITTEN else f".{1 if sharp else 0}f"
    told = (f"{number:+{form}}".replace("-", "−") for number in (one.estimate, one.low, one.high))
    estimate, low, high = (text if text.strip("+−0.") else text[1:] for text in told)  # zero has no sign
    return f"{estimate}% [{low}, {high}]" if unit == "%" else f"{estimate} [{low}, {high}] {unit}".rstrip()


def amount(number: float, unit: str) -> str:
    """Return an amount of a gain's unit without a sign: "2.4 points" or "3%"."""
    form = ".2g" if unit == ABSOLUTE or number > MOST_WRITTEN else f".{1 if abs(number) < 10 else 0}f"
    return f"{number:{form}}%" if unit == "%" else f"{number:{form}} {unit}"


def detectable(measure: Measure, control: Effect, least: float) -> str:
    """Return the smallest detectable gain, in its unit, or "none" if no share can gain as much."""
    unit = gain_unit(measure, control)
    number = change(least) if unit == "%" else 100 * least if unit == "points" else least
    return "none" if unit == "points" and number > MOST_POINTS else amount(number, unit)


def p_value(p: float) -> str:
    """Return a p-value as "< 1e-4", "0.0021" or "0.034"; "–" if there is none, as with one seed."""
    if math.isnan(p):
        return "–"
    if p <= LEAST_P:
        return "< 1e-4"
    return f"{p:.4f}" if p < 0.01 else f"{p:.3f}"


def decisive(row: Row) -> str:
    """Return ", p 0.034", the p-value that decides a row's verdict, or "" if there is none."""
    return "" if row.decisive is None or row.question.doubt else f", p {p_value(row.decisive)}"


def seeds(count: int) -> str:
    """Return "1 seed" or "5 seeds"."""
    return f"{count} seed{'s' if count != 1 else ''}"


def _fixed(number: float, digits: int) -> str:
    return f"{number:.{digits}f}".replace("-", "−")
