"""Draw every figure of a study once, for the page and for figures/."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from . import _figures as figures
from . import _numbers as numbers
from ._figures import Spec
from .analysis._comparisons import DistanceBounds, Verified, brackets, norms, verified
from .analysis._findings import Findings, Result
from .analysis._metrics import LIPSCHITZ, NORMS, Measure, pretty, pretty_eps, safe
from .analysis._records import attack_label

SPANS = 30  # spans of a training over which events of surgery are summed
OVERVIEW_METHODS = 4
OVERVIEW_SCALE = 1.25  # about 1,200 pixels wide


@dataclass(frozen=True)
class Picture:
    """A drawn figure: its file's name without extension, its description, and the scale of its PNG."""

    slug: str
    title: str
    svg: str
    note: str | None = None
    scale: float = 2.0


@dataclass(frozen=True)
class Panel:
    """One metric's two figures, its values and its gains over the dense control, and their content."""

    measure: Measure
    results: tuple[Result, ...]
    levels: Picture
    gains: Picture


@dataclass(frozen=True)
class Drawn:
    """All figures of a report, by section."""

    weights: Sequence[Panel]
    activations: Sequence[Panel]
    layers: Sequence[Picture]
    comparisons: Sequence[Picture]
    overview: Picture | None = None

    @property
    def pictures(self) -> list[Picture]:
        """Return all figures, as written to files."""
        panels = [picture for panel in (*self.weights, *self.activations) for picture in (panel.levels, panel.gains)]
        first = [self.overview] if self.overview is not None else []
        return [*first, *panels, *self.layers, *self.comparisons]


def styles(findings: Findings) -> dict[str, int]:
    """Return the number of each method's colour, dash and shape."""
    return {method: k for k, method in enumerate(findings.study.methods)}


def curve_panels(findings: Findings, axis: str, *, only_main: bool = False) -> list[Panel]:
    """Return a panel for every metric on test images, the main ones first, of the methods that make `axis` sparse."""
    numbered = {method: k for method, k in styles(findings).items() if findings.study.axis(method) == axis}
    tested = [m for m in findings.collected if m.split == "test" and m not in findings.main]
    wanted = findings.main if only_main else (*findings.main, *tested)
    return [panel for m in wanted if (panel := _panel(findings, m, numbered, axis)) is not None]


def _panel(findings: Findings, measure: Measure, numbered: Mapping[str, int], axis: str) -> Panel | None:
    results = tuple(r for method in numbered if (r := findings.result(measure, method)) is not None)
    if not results:
        return None
    slug = measure.slug if axis == "weights" else f"{axis}-{measure.slug}"
    named = numbers.axis_title(findings.study, *numbered)
    levels, gains = (draw(results, numbered, axis=named) for draw in (figures.levels_figure, figures.gains_figure))
    shown = _picture(findings, slug, measure.title, levels)
    return Panel(measure, results, shown, _picture(findings, f"{slug}-gain", f"{measure.title}: gain", gains))


def _picture(findings: Findings, slug: str, title: str, spec: Spec, note: str | None = None) -> Picture:
    return Picture(slug, title, figures.svg(spec, mark=findings.study.mark), note)


def overview_picture(findings: Findings) -> Picture | None:
    """Return accuracy, FGSM, the strongest budget attack and r_2 of the main methods in one picture, or None."""
    strongest = findings.first("worst") or findings.first("budget", "pgd", "apgd")
    distance = findings.first("distance", "deepfool") or findings.first("distance")
    wanted = (findings.first("accuracy"), findings.first("budget", "fgsm"), strongest, distance)
    measures = list(dict.fromkeys(m for m in wanted if m is not None))
    numbered, method = styles(findings), findings.method
    if method is None:
        return None
    axis = findings.study.axis(method)
    curved = [
        m for m in numbered if findings.study.axis(m) == axis and m != method and len(findings.study.sparsities(m)) >= 3
    ]
    axis_title = numbers.axis_title(findings.study, *curved, method)
    shown = [
        [r for m in (method, *curved[: OVERVIEW_METHODS - 1]) if (r := findings.result(measure, m)) is not None]
        for measure in measures
    ]
    specs = [figures.levels_figure(results, numbered, axis=axis_title) for results in shown if results]
    if not specs:
        return None
    return replace(_picture(findings, "overview", "Overview", figures.overview(specs)), scale=OVERVIEW_SCALE)


def density_pictures(findings: Findings) -> list[Picture]:
    """Return heat maps of each layer's density and activation sparsity, means over seeds, if measured."""
    wanted = (
        ("density", "Weights kept in each layer", "% of the layer's weights"),
        ("activation_sparsity", "Zero activations after each nonlinearity", "% of activations"),
    )
    axis = numbers.axis_title(findings.study, findings.method or "")
    return [
        _picture(findings, f"layers-{name}", title, figures.heatmap(title, rows, x=axis, unit=unit))
        for name, title, unit in wanted
        if (rows := _by_layer(findings, name))
    ]


def _by_layer(findings: Findings, series: str) -> list[dict[str, str | float]]:
    """Return cells (layer, sparsity) of a per-layer series of the headline's method, the dense control first."""
    sums: dict[tuple[str, float], list[float]] = defaultdict(list)
    for network in (*findings.study.of(findings.study.control()), *findings.study.of(findings.method or "")):
        for record in network.stage("measure"):
            for layer, share in (record.series.get(series) or {}).items():
                sums[str(layer), network.sparsity].append(float(share))
    return _cells(sums)


def _cells(found: Mapping[tuple[str, float], Sequence[float]]) -> list[dict[str, str | float]]:
    """Return the cells of a heat map: lines by name, columns by sparsity, and means."""
    return [
        {"y": name, "x": numbers.percent(sparsity), "value": sum(shares) / len(shares), "order": sparsity}
        for (name, sparsity), shares in found.items()
    ]


def comparisons(findings: Findings) -> list[Picture]:
    """Return the comparisons for which this study has records."""
    drawn = (_brackets, _verified, _constants, _surgery, _speed, _transfer)
    return [picture for draw in drawn for picture in draw(findings)]


def _brackets(findings: Findings) -> Iterator[Picture]:
    """Draw, in each norm, proofs below and attacks above: the true distance lies between the two."""
    for norm in norms(findings):
        for exact in (False, True):
            found = brackets(findings, norm, exact=exact)
            if len(found) < 2:
                continue
            rows = [row for bracket in found for row in _sides(bracket)]
            way = "exact search" if exact else "certificate and attack"
            title = f"{NORMS.get(norm, norm)} distance to the decision boundary: {way}"
            counts = f"{numbers.seeds(max(b.seeds for b in found))}, {max(b.images for b in found)} images"
            ends = ", and between the two ends of the search, which are equal if it is solved" if exact else ""
            note = (
                "Medians over correctly classified images, the same for every line of a sparsity. A certified radius "
                "is a lower bound and the distance of an attack an upper bound; the true distance lies between"
                f"{ends}. At most {counts}; {findings.method}."
            )
            spec = figures.scatter(title, rows, x=_in_steps(findings), y="median distance", ordinal=True)
            yield _picture(findings, f"{'exact' if exact else 'brackets'}-{norm}", title, spec, note)


def _verified(findings: Findings) -> Iterator[Picture]:
    """Draw, for each budget, the verified share below and the share not falsified above: certified ≤ exact ≤ attack."""
    every = [one for one in verified(findings) if one.method in (findings.study.control(), findings.method)]
    for norm, eps in dict.fromkeys((one.norm, one.eps) for one in every):
        some = [one for one in every if (one.norm, one.eps) == (norm, eps)]
        if len(some) < 2:
            continue
        rows = [row for one in some for row in _shares(one)]
        title = f"Robust accuracy, {NORMS[norm]} ε = {pretty_eps(eps)}: verified and not falsified"
        spec = figures.scatter(title, rows, x=_in_steps(findings), y="% of images (of ReLUs)", ordinal=True)
        note = (
            "Robust accuracy lies between what is verified and what is not falsified; every network has the same "
            f"budget. {numbers.seeds(some[0].seeds)}, {some[0].images} images; {findings.method}."
        )
        yield _picture(findings, f"verdicts-{norm}-{eps:g}", title, spec, note)


def _shares(one: Verified) -> Iterator[Mapping[str, str | float]]:
    place = _place(one.sparsity)
    shares = {
        "not falsified": 1 - one.falsified,
        "verified": one.verified,
        "by α-CROWN": one.alpha_crown,
        "by interval": one.interval,
        "stable ReLUs": one.stable,
    }
    for series, share in shares.items():
        text = f"{series}, {place}: {100 * share:.1f}%"
        yield {"x": place, "y": 100 * share, "series": series, "order": one.sparsity, "text": text}


def _in_steps(findings: Findings) -> str:
    return f"{numbers.axis_title(findings.study, findings.method or '')}, in the plan's steps"


def _sides(bracket: DistanceBounds) -> Iterator[Mapping[str, str | float]]:
    place = _place(bracket.sparsity)
    sides = {
        "smallest attack": bracket.attack,
        "search, upper end": bracket.upper,
        "search, lower end": bracket.lower,
        "certified": bracket.certified,
    }
    for series, value in sides.items():
        if value is not None:
            text = f"{series}, {place}: {value:.4g}"
            yield {"x": place, "y": value, "series": series, "order": bracket.sparsity, "text": text}


def _place(sparsity: float) -> str:
    return numbers.percent(sparsity) if sparsity else "0 (control)"


def _constants(findings: Findings) -> Iterator[Picture]:
    """Draw margin, Lipschitz constant and their ratio, each as a multiple of the dense control's."""
    names = {"margin": "margin", "lipschitz": "Lipschitz constant L", "ratio": "margin / L"}
    for key in dict.fromkeys((m.norm, m.attack) for m in findings.collected if m.role in LIPSCHITZ):
        chosen = {m.role: m for m in findings.collected if m.role in LIPSCHITZ and (m.norm, m.attack) == key}
        results = {names[role]: r for role, m in chosen.items() if (r := findings.result(m)) is not None}
        rows = [row for name, result in results.items() for row in _multiples(name, result)]
        if rows:
            title = f"Margin and Lipschitz constant, {NORMS.get(key[0], key[0])}, {key[1]}"
            y = "× the dense control's (log)"
            spec = figures.scatter(title, rows, x=_in_steps(findings), y=y, ordinal=True, log_y=True)
            note = (
                f"Means over correctly classified images with 95% intervals; {findings.method}. A smaller L is not "
                "a gain if the margin shrinks as much; margin / L bounds the distance."
            )
            yield _picture(findings, f"lipschitz-{safe(key[0])}-{safe(key[1])}", title, spec, note)


def _multiples(name: str, result: Result) -> Iterator[Mapping[str, str | float]]:
    one = result.control.estimate
    levels = ((0.0, result.control), *zip(result.sparsities, result.levels, strict=True))
    for sparsity, level in (pair for pair in levels if one > 0 and pair[1].estimate > 0):
        place = _place(sparsity)
        text = f"{name}, {place}: {level.estimate / one:.3g} × (mean {level.estimate:.4g})"
        row: dict[str, str | float] = {"x": place, "y": level.estimate / one, "series": name, "order": sparsity}
        ends = {"low": level.low / one, "high": level.high / one} if level.low > 0 else {}
        yield row | ends | {"text": text}


def _surgery(findings: Findings) -> Iterator[Picture]:
    """Draw, for each method with surgery, when it pruned and spliced back how many weights, at its highest sparsity."""
    for k, method in enumerate(m for m in findings.study.methods if findings.study.kind(m) == "surgery"):
        networks = findings.study.of(method)
        last = [n for n in networks if n.sparsity == networks[-1].sparsity]
        series = [r.series for n in last for r in n.stage("prune") if r.series.get("step")]
        if not series:
            continue
        title = f"Surgery: weights pruned and spliced back ({method}, {numbers.percent(last[0].sparsity)})"
        rows = [row for name in ("pruned", "spliced") for row in _over_time(name, series)]
        spec = figures.scatter(title, rows, x="training step", y="weights in each span (log, from 0)", log_y="symlog")
        note = f"Sums over spans of equal length, means over {len(series)} seeds."
        yield _picture(findings, f"surgery-{k}", title, spec, note)


def _over_time(name: str, series: Sequence[Mapping[str, Any]]) -> Iterator[Mapping[str, str | float]]:
    """Return the numbers of events in SPANS spans of the training."""
    steps = max(max(one["step"]) for one in series) + 1
    counts = np.zeros(SPANS)
    for one in series:
        place = np.asarray(one["step"]) * SPANS // steps
        counts += np.bincount(place, weights=np.asarray(one[name], dtype=float), minlength=SPANS) / len(series)
    for k, count in enumerate(counts):
        middle = (k + 0.5) * steps / SPANS
        text = f"{name} around step {middle:,.0f}: {count:,.1f} weights"
        yield {"x": middle, "y": float(count), "series": name, "order": k, "text": text}


def _speed(findings: Findings) -> Iterator[Picture]:
    """Draw robustness against the latency of the packed network, if "deploy" records have it."""
    measure = findings.first("worst") or findings.first("budget") or findings.first("accuracy")
    rows = [] if measure is None else list(_fast(findings, measure))
    if rows and measure is not None:
        title = f"{measure.title} against latency"
        axis = "milliseconds per image, one at a time (log scale)"
        spec = figures.scatter(title, rows, x=axis, y=f"{measure.phrase}, %", log_x=True)
        note = "Networks as deployed, packed for sparse kernels, on the machine of this study; means over seeds."
        yield _picture(findings, "latency", title, spec, note)


def _fast(findings: Findings, measure: Measure) -> Iterator[Mapping[str, str | float]]:
    """Return a mark for every method and sparsity: mean latency and mean share over seeds."""
    found: dict[tuple[str, float], list[tuple[float, float]]] = defaultdict(list)
    for network in findings.study.networks:
        held = findings.collected[measure].get(network.who)
        for record in network.stage("deploy"):
            seconds = record.times.get("latency")
            if held is not None and seconds:
                found[network.method, network.sparsity].append((1000 * seconds, 100 * held.mean))
    for (method, sparsity), pairs in found.items():
        latency, share = (sum(column) / len(pairs) for column in zip(*pairs, strict=True))
        name = method if findings.study.is_dense(method) else f"{method} {numbers.percent(sparsity)}"
        text = f"{name}: {share:.1f}% at {latency:.3g} ms"
        yield {"x": latency, "y": share, "series": method, "order": sparsity, "text": text}


def _transfer(findings: Findings) -> Iterator[Picture]:
    """Draw the share of one network's adversarial examples that also fool the other, both ways, means over seeds."""
    cells: dict[str, dict[tuple[str, float], list[float]]] = defaultdict(lambda: defaultdict(list))
    for network in findings.study.networks:
        for record in network.stage("transfer"):
            moved = record.metrics.get("transferred")
            if moved is not None:
                way = "control → sparse" if record.inputs["direction"] == "to sparse" else "sparse → control"
                eps = record.inputs["attack"]["eps"]
                at = f", ε = {pretty_eps(eps)}" if eps else ""
                title = f"Transfer of {pretty(attack_label(record))} examples{at}"
                cells[title][f"{network.method}: {way}", network.sparsity].append(float(moved))
    axis = numbers.axis_title(findings.study, *findings.study.methods)
    for k, (title, found) in enumerate(cells.items()):
        spec = figures.heatmap(title, _cells(found), x=axis, unit="% transferred")
        note = (
            "Share of adversarial examples that also fool the other network, among those that fool the attacked "
            "network and whose clean image the other network classifies correctly."
        )
        yield _picture(findings, f"transfer-{k}", title, spec, note)
