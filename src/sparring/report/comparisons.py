"""Figures that put two kinds of record side by side: theory and attacks, speed and robustness, source and target."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping

from . import figures, numbers
from .findings import Findings, Result
from .measures import NORMS, Measure, pretty
from .panels import Picture
from .records import CONTROL, REFERENCE, attack_label
from .words import short_name

__all__ = ["comparisons"]


def comparisons(findings: Findings) -> list[Picture]:
    """Return the comparisons that this study has records for."""
    return [*_brackets(findings), *_speed(findings), *_transfer(findings)]


def _brackets(findings: Findings) -> Iterator[Picture]:
    """Draw, in each norm, the certified radius and the attack's distance: the true distance lies between the two."""
    certified = [m for m in findings.collected if m.role == "certified"]
    for norm in dict.fromkeys(m.norm for m in certified):
        distances = [m for m in findings.collected if (m.role, m.norm, m.split) == ("distance", norm, "test")]
        shown = [m for m in certified if m.norm == norm] + distances
        rows = [row for m in shown if (r := findings.result(m)) for row in _levels(r, m)]
        if not rows:
            continue
        title = f"{NORMS.get(norm, norm)} distance to the decision boundary: proof below, attacks above"
        spec = figures.scatter(title, rows, x="sparsity, in the plan's steps", y="mean distance", ordinal=True)
        note = "A certified radius is a sound lower bound, an attack's distance an upper bound; the truth lies between."
        yield Picture(f"brackets-{norm}", title, figures.svg(spec), note)


def _levels(result: Result, measure: Measure) -> Iterator[Mapping[str, str | float]]:
    series = "certified" if measure.role == "certified" else pretty(measure.attack)
    levels = ((0.0, result.control), *zip(result.sparsities, result.levels, strict=True))
    for order, (sparsity, level) in enumerate(levels):
        place = numbers.percent(sparsity) if sparsity else "0 (control)"
        text = f"{series}, {place}: {numbers.level(measure, level)}"
        yield {"x": place, "y": level.estimate, "series": series, "order": order, "text": text}


def _speed(findings: Findings) -> Iterator[Picture]:
    """Draw robustness against the latency of the packed network, where "deploy" records have it."""
    measure = findings.first("worst") or findings.first("budget") or findings.first("accuracy")
    rows = [] if measure is None else list(_fast(findings, measure))
    if rows and measure is not None:
        title = f"{measure.title} against latency"
        axis = "milliseconds an image, one at a time (log scale)"
        spec = figures.scatter(title, rows, x=axis, y=f"{short_name(measure)}, %", log_x=True)
        note = "Networks as deployed, packed for sparse kernels, on the machine of this study; means over seeds."
        yield Picture("latency", title, figures.svg(spec), note)


def _fast(findings: Findings, measure: Measure) -> Iterator[Mapping[str, str | float]]:
    """Return a mark for every method and sparsity: mean latency and mean share over seeds."""
    found: dict[tuple[str, float], list[tuple[float, float]]] = defaultdict(list)
    for network in findings.study.networks:
        held = findings.collected[measure].get(network.who)
        for record in network.stage("deploy"):
            seconds = record.times.get("latency")
            if held is not None and seconds:
                share = float(held.top.sum() / held.bottom.sum())
                found[network.method, network.sparsity].append((1000 * seconds, 100 * share))
    for (method, sparsity), pairs in found.items():
        latency, share = (sum(column) / len(pairs) for column in zip(*pairs, strict=True))
        text = f"{_name(method, sparsity)}: {share:.1f}% at {latency:.3g} ms"
        yield {"x": latency, "y": share, "series": method, "order": sparsity, "text": text}


def _transfer(findings: Findings) -> Iterator[Picture]:
    """Draw which share of the examples that fool one network fool the other too, both ways, means over seeds."""
    cells: dict[str, dict[tuple[str, str], list[float]]] = defaultdict(lambda: defaultdict(list))
    for network in findings.study.networks:
        for record in network.stage("transfer"):
            moved = record.metrics.get("transferred")
            if moved is not None:
                way = "control → sparse" if record.inputs["direction"] == "to sparse" else "sparse → control"
                eps = record.inputs["attack"]["eps"]
                title = f"Transfer of {pretty(attack_label(record))} examples" + (f", ε = {eps:g}" if eps else "")
                cells[title][f"{network.method}: {way}", numbers.percent(network.sparsity)].append(float(moved))
    for k, (title, found) in enumerate(cells.items()):
        rows = [{"y": way, "x": place, "value": sum(shares) / len(shares)} for (way, place), shares in found.items()]
        spec = figures.heatmap(title, rows, x="sparsity", y="", unit="% that fool the other network too")
        note = "Among images that fool the network attacked and that the other classifies correctly when clean."
        yield Picture(f"transfer-{k}", title, figures.svg(spec), note)


def _name(method: str, sparsity: float) -> str:
    return method if method in (CONTROL, REFERENCE) else f"{method} {numbers.percent(sparsity)}"
