"""Draw every figure of a study once: what the page shows is what lies in figures/."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .. import _numbers as numbers
from ..analysis._findings import Findings, Result
from ..analysis._metrics import Measure
from . import _figures as figures

OVERVIEW_METHODS = 4
OVERVIEW_SCALE = 1.25  # about 1,200 pixels wide


@dataclass(frozen=True)
class Picture:
    """Hold one drawn figure; `slug` is its file's name without the ending, `note` what a reader must know.

    `scale` is how many times larger its PNG is drawn.
    """

    slug: str
    title: str
    svg: str
    note: str | None = None
    scale: float = 2.0


@dataclass(frozen=True)
class Panel:
    """Hold one metric's two figures, its own values and the gains over the dense control, and what they show."""

    measure: Measure
    results: tuple[Result, ...]
    levels: Picture
    gains: Picture


@dataclass(frozen=True)
class Drawn:
    """Hold every figure of a report, by the section that shows it."""

    weights: Sequence[Panel]
    activations: Sequence[Panel]
    layers: Sequence[Picture]
    comparisons: Sequence[Picture]
    overview: Picture | None = None

    @property
    def pictures(self) -> list[Picture]:
        """Return all of them, as they go into files."""
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
    return Panel(
        measure=measure,
        results=results,
        levels=Picture(slug, measure.title, figures.svg(levels, mark=findings.mark)),
        gains=Picture(f"{slug}-gain", f"{measure.title}: gain", figures.svg(gains, mark=findings.mark)),
    )


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
    curved = [m for m in numbered if findings.study.axis(m) == axis and _steps(findings, m) >= 3 and m != method]
    specs = []
    for measure in measures:
        shown = [r for m in (method, *curved[: OVERVIEW_METHODS - 1]) if (r := findings.result(measure, m)) is not None]
        if shown:
            specs.append(
                figures.levels_figure(shown, numbered, axis=numbers.axis_title(findings.study, *curved, method))
            )
    if not specs:
        return None
    drawn = figures.svg(figures.overview(specs), mark=findings.mark)
    return Picture("overview", "Overview", drawn, scale=OVERVIEW_SCALE)


def _steps(findings: Findings, method: str) -> int:
    return len({n.sparsity for n in findings.study.of(method)})


def density_pictures(findings: Findings) -> list[Picture]:
    """Return heat maps of each layer's density and activation sparsity, means over seeds, where they were measured."""
    wanted = (
        ("density", "Weights kept in each layer", "% of the layer's weights"),
        ("activation_sparsity", "Zero activations after each nonlinearity", "% of activations"),
    )
    pictures = []
    for name, title, unit in wanted:
        rows = _by_layer(findings, name)
        if rows:
            spec = figures.heatmap(
                title, rows, x=numbers.axis_title(findings.study, findings.method or ""), y="", unit=unit
            )
            pictures.append(Picture(f"layers-{name}", title, figures.svg(spec, mark=findings.mark)))
    return pictures


def _by_layer(findings: Findings, series: str) -> list[dict[str, str | float]]:
    """Return cells (layer, sparsity) of a per-layer series of the headline's method, the dense control first."""
    sums: dict[tuple[str, float], list[float]] = defaultdict(list)
    for network in (*findings.study.of(findings.study.control()), *findings.study.of(findings.method or "")):
        for record in network.stage("measure"):
            for layer, share in (record.series.get(series) or {}).items():
                sums[str(layer), network.sparsity].append(float(share))
    return [
        {"y": layer, "x": numbers.percent(sparsity), "value": sum(shares) / len(shares), "order": sparsity}
        for (layer, sparsity), shares in sums.items()
    ]
