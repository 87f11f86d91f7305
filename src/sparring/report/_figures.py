"""Draw figures: each is one Vega-Lite specification, rendered once to SVG for the page and for papers.

Sparsity runs on a logit axis, so that 90% to 99.7% is readable, with the dense control at its left edge. Every method
has a colour (Okabe & Ito's, safe for colour-blind readers), a dash and a shape, so that figures can be printed in grey.
Marks have their numbers as descriptions, for screen readers, hovering and the arrow keys.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from textwrap import wrap
from typing import Any, Literal

import vl_convert

from . import _numbers as numbers
from .analysis._findings import Result
from .analysis._metrics import PIXELS

Spec = dict[str, Any]
# One colour fewer than dashes and shapes: the method that reuses the first colour has another dash and shape.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#333333")
DASHES: tuple[list[int], ...] = ([], [6, 2], [2, 2], [8, 2, 2, 2], [4, 4], [1, 3], [10, 3], [12, 3, 2, 3, 2, 3])
SHAPES = ("circle", "square", "triangle-up", "diamond", "triangle-down", "cross", "triangle-right", "triangle-left")
GREY, INK, FAINT = "#767676", "#222222", "#e6e6e6"
WIDTH, HEIGHT = 400, 230
LETTER = 7  # average width of a title's letter in pixels: a title that is wider than its plot takes two lines
FONT = "Helvetica Neue, Helvetica, Arial, Liberation Sans, DejaVu Sans, sans-serif"
CONFIG: Spec = {
    "font": FONT,
    "background": "white",
    "view": {"stroke": None},
    "title": {"anchor": "start", "fontSize": 13, "fontWeight": 600, "color": INK, "offset": 10, "frame": "group"},
    "axis": {"labelColor": INK, "titleColor": INK, "labelFontSize": 11, "titleFontSize": 11}
    | {"gridColor": FAINT, "domainColor": "#999999", "tickColor": "#999999"}
    | {"titleFontWeight": "normal", "titlePadding": 8},
    "legend": {"labelColor": INK, "labelFontSize": 11, "titleFontSize": 11, "symbolStrokeWidth": 2},
}


def svg(spec: Spec, *, mark: str = "") -> str:
    """Return a specification drawn as SVG text, with the plan's mark below its title, such as a warning."""
    complete = {"$schema": "https://vega.github.io/schema/vega-lite/v6.json", "config": CONFIG, "padding": 4} | spec
    title: Spec = {"text": wrap(spec["title"], spec["width"] // LETTER)} if "title" in spec else {}
    if mark:
        title |= {"subtitle": mark, "subtitleColor": COLORS[1]} if title else {"text": mark, "color": COLORS[1]}
    if title:
        complete["title"] = title
    return str(vl_convert.vegalite_to_svg(complete))


def png(drawn: str, *, scale: float = 2.0) -> bytes:
    """Return SVG as PNG bytes, at `scale` times the size."""
    return bytes(vl_convert.svg_to_png(drawn, scale=scale))


def number(field: str, **more: Any) -> Spec:
    """Return the channel of a field of numbers."""
    return {"field": field, "type": "quantitative"} | more


def vertical(title: str) -> Spec:
    """Return the channel of the vertical axis."""
    axis = {"title": title, "tickCount": 5, "domain": False, "ticks": False}
    return number("y", axis=axis, scale={"zero": False})


def layer(rows: Sequence[Mapping[str, Any]], mark: Spec, encoding: Spec, *, name: str = "") -> Spec:
    """Return marks for rows; the name becomes a class in the drawing."""
    return {"data": {"values": rows}, "mark": mark, "encoding": encoding} | ({"name": name} if name else {})


def line(width: float = 1.0, **more: Any) -> Spec:
    """Return the mark of a line."""
    return {"type": "line", "strokeWidth": width} | more


def dot(style: int, size: int = 42, **more: Any) -> Spec:
    """Return the mark of a method's points, in its shape."""
    return {"type": "point", "opacity": 1, "size": size, "shape": _of(SHAPES, style)} | more


BETWEEN: Spec = {"y": number("low"), "y2": {"field": "high"}}
TOLD: Spec = {"description": {"field": "text"}}


def levels_figure(results: Sequence[Result], styles: Mapping[str, int], *, axis: str = "sparsity") -> Spec:
    """Return the figure of one metric against sparsity: seeds thin, mean and interval bold, dense control grey."""
    first = results[0]
    x = _Axis([s for r in results for s in r.sparsities], axis)
    scale = 100.0 if first.measure.is_share else 1.0
    layers = _control(first, x, scale)
    legend = _legend([r.method for r in results], styles)
    for result in results:
        layers += _level_layers(result, styles[result.method], x, scale, legend, crowded=len(results) > 2)
    of = "ReLUs" if first.measure.role == "stable" else "images"
    length = {"l0": "values", PIXELS: "pixels"}.get(first.measure.norm, "distance")
    unit = f"% of {of}" if first.measure.is_share else length
    return _chart(first.measure.title, layers, x, unit)


def gains_figure(results: Sequence[Result], styles: Mapping[str, int], *, axis: str = "sparsity") -> Spec:
    """Return the figure of paired gains over the dense control; filled marks are significant (Holm), hollow are not."""
    first = results[0]
    x = _Axis([s for r in results for s in r.sparsities], axis)
    layers = [layer([{"x": end, "y": 0} for end in (x.left, x.right)], line(1.2, color=GREY), {})]
    legend = _legend([r.method for r in results], styles)
    for place, result in enumerate(results):
        shift = 0.035 * (place - (len(results) - 1) / 2)
        layers += _gain_layers(result, styles[result.method], x, shift, legend)
    unit = numbers.gain_unit(first.measure, first.control)
    return _chart(f"{first.measure.title}: gain", layers, x, f"{unit} over the dense control")


class _Axis:
    """Place sparsities on the logit axis: 0 is one step left of the lowest."""

    def __init__(self, sparsities: Sequence[float], what: str) -> None:
        self.title = f"{what} (logit scale)"
        self.ticks = sorted({s for s in sparsities if 0 < s < 1})
        inner = [_logit(s) for s in self.ticks] or [0.0]
        self._zero = min(inner) - 0.45
        self.left, self.right = -0.08, max(inner) - self._zero + 0.12

    def at(self, sparsity: float) -> float:
        return 0.0 if sparsity <= 0 else min(_logit(min(sparsity, 1 - 1e-6)) - self._zero, self.right)

    def encoding(self) -> Spec:
        labels = {f"{self.at(s):.4f}": numbers.percent(s) if s else "0 (dense)" for s in (0.0, *self.ticks)}
        table = "{" + ", ".join(f"'{place}': '{label}'" for place, label in labels.items()) + "}"
        axis = {"values": [self.at(s) for s in (0.0, *self.ticks)], "title": self.title, "grid": False}
        axis |= {"labelExpr": f"{table}[format(datum.value, '.4f')]"}
        axis |= {"labelOverlap": "greedy", "labelSeparation": 6, "labelFlush": False}
        return number("x", axis=axis, scale={"domain": [self.left, self.right], "nice": False, "zero": False})


def _logit(share: float) -> float:
    return math.log10(share / (1 - share))


def _chart(title: str, layers: list[Spec], x: _Axis, unit: str) -> Spec:
    encoding = {"x": x.encoding(), "y": vertical(unit)}
    layers = [one | {"encoding": encoding | one["encoding"]} for one in layers]
    return {"title": title, "width": WIDTH, "height": HEIGHT, "layer": layers}


def _legend(methods: Sequence[str], styles: Mapping[str, int]) -> Spec:
    """Return the scales and the one legend that colour, dash and shape share."""
    legend: Spec = {"orient": "top", "title": None, "symbolType": "stroke", "symbolSize": 300, "offset": 12}
    legend |= {"columnPadding": 20} | ({"columns": 4} if len(methods) > 4 else {})
    shown = legend if len(methods) > 1 else None
    tables: dict[str, Sequence[Any]] = {"color": COLORS, "strokeDash": DASHES}
    return {
        name: {"scale": {"domain": list(methods), "range": [_of(table, styles[m]) for m in methods]}, "legend": shown}
        for name, table in tables.items()
    }


def _of(table: Sequence[Any], style: int) -> Any:
    return table[style % len(table)]


def look(style: int) -> tuple[str, Sequence[int]]:
    """Return the colour and the dash of a style."""
    return _of(COLORS, style), _of(DASHES, style)


def _drawn(legend: Spec, method: str) -> Spec:
    return {name: {"datum": method} | channel for name, channel in legend.items()}


def _control(result: Result, x: _Axis, scale: float) -> list[Spec]:
    one = result.control
    row: Spec = {"y": scale * one.low, "y2": scale * one.high, "y0": scale * one.estimate}
    row |= {"text": f"dense control: {numbers.level(result.measure, one)}"}
    band = [{"x": end} | row for end in (x.left, x.right)]
    area = {"type": "area", "color": GREY, "opacity": 0.18}
    return [
        layer(band, area, TOLD | {"y2": {"field": "y2"}}, name="control_band"),
        layer(band, line(1.2, color=GREY, strokeDash=[3, 3]), TOLD | {"y": number("y0")}, name="control_line"),
    ]


def _level_layers(result: Result, style: int, x: _Axis, scale: float, legend: Spec, *, crowded: bool) -> list[Spec]:
    color, name = _of(COLORS, style), f"s{style}"
    places = (0.0, *result.sparsities)
    labels = ["dense control", *(f"{result.method}, {result.words(s)}" for s in result.sparsities)]
    mean = [
        {"x": x.at(s), "y": scale * one.estimate, "low": scale * one.low, "high": scale * one.high}
        | {"text": f"{label}: {numbers.level(result.measure, one)}"}
        for s, label, one in zip(places, labels, (result.control, *result.levels), strict=True)
    ]
    seeds = [
        {"x": x.at(s), "y": scale * float(value), "seed": seed}
        for seed, start, row in zip(result.seeds, result.control_by_seed, result.by_seed, strict=True)
        for s, value in zip(places, (start, *row), strict=True)
    ]
    area = {"type": "area", "color": color, "opacity": 0.06 if crowded else 0.15}
    thin = line(0.7, color=color, opacity=0.25 if crowded else 0.45)
    return [
        layer(mean, area, BETWEEN, name=f"{name}_band"),
        layer(seeds, thin, {"detail": {"field": "seed"}}, name=f"{name}_seeds"),
        layer(mean, line(2), _drawn(legend, result.method), name=f"{name}_line"),
        layer(mean, dot(style, filled=True, color=color), TOLD, name=f"{name}_points"),
    ]


def _gain_layers(result: Result, style: int, x: _Axis, shift: float, legend: Spec) -> list[Spec]:
    color, name = _of(COLORS, style), f"s{style}"
    rows: list[Spec] = []
    for sparsity, one, p in zip(result.sparsities, result.gains.effects, result.gains.p_holm, strict=True):
        told, at = numbers.gain(result.measure, one, result.control), numbers.shown(result.measure, one, result.control)
        row: Spec = {"x": x.at(sparsity) + shift, "y": at.estimate, "low": at.low, "high": at.high}
        row |= {"fill": color if p <= 0.05 else "white"}
        rows.append(row | {"text": f"{result.method}, {result.words(sparsity)}: {told}, Holm p {numbers.p_value(p)}"})
    bar = {"type": "rule", "color": color, "strokeWidth": 1.5}
    filled = {"fill": {"field": "fill", "type": "nominal", "scale": None}}
    return [
        layer(rows, line(), _drawn(legend, result.method), name=f"{name}_line"),
        layer(rows, bar, BETWEEN, name=f"{name}_bars"),
        layer(rows, dot(style, 50, stroke=color, strokeWidth=1.5), filled | TOLD, name=f"{name}_points"),
    ]


def heatmap(title: str, rows: Sequence[Mapping[str, Any]], *, x: str, unit: str) -> Spec:
    """Return a table of shares as a heat map with its numbers written in.

    Rows have `x`, `y` (text), `value` (0-1) and `order`, by which columns are sorted; lines keep the rows' order. `x`
    is an axis title and `unit` describes a cell's value.
    """
    shown = [dict(row) | {"shown": f"{100 * row['value']:.3g}"} for row in rows]
    shown = [row | {"text": f"{row['y']}, {row['x']}: {row['shown']}%"} for row in shown]
    columns = list(dict.fromkeys(row["x"] for row in sorted(rows, key=lambda row: row["order"])))
    lines = list(dict.fromkeys(row["y"] for row in rows))
    across = {"field": "x", "type": "ordinal", "sort": columns, "axis": {"title": x, "labelAngle": 0, "domain": False}}
    down = {"field": "y", "type": "ordinal", "sort": lines, "axis": {"title": "", "labelLimit": 220, "domain": False}}
    color = number("value", scale={"range": ["#f4f7fa", "#08519c"], "domain": [0, 1]}, legend=None)
    ink = {"condition": {"test": "datum.value > 0.55", "value": "white"}, "value": INK}
    return {
        "title": f"{title} ({unit})",
        "width": max(WIDTH - 60, 46 * len(columns)),
        "height": 26 * len(lines),
        "data": {"values": shown},
        "encoding": {"x": across, "y": down},
        "layer": [
            {"mark": {"type": "rect", "stroke": "white"}, "encoding": {"color": color} | TOLD},
            {"mark": {"type": "text", "fontSize": 11}, "encoding": {"text": {"field": "shown"}, "color": ink}},
        ],
    }


def scatter(
    title: str,
    rows: Sequence[Mapping[str, Any]],
    *,
    x: str,
    y: str,
    log_x: bool = False,
    log_y: bool | Literal["symlog"] = False,
    ordinal: bool = False,
) -> Spec:
    """Return points joined in their order, one line per series, with bars where rows have `low` and `high`.

    Rows have `x`, `y`, `series`, `order` and `text`. `x` and `y` are axis titles; with `ordinal` the rows' x are names,
    shown in their order; "symlog" is a log axis with a zero.
    """
    names = list(dict.fromkeys(row["series"] for row in rows))
    legend = _legend(names, {name: k for k, name in enumerate(names)})
    axis = {"title": x, "grid": False, "labelOverlap": "greedy", "labelSeparation": 6, "tickCount": 6}
    across = number("x", axis=axis, scale={"type": "log"} if log_x else {"zero": False})
    if ordinal:
        places = list(dict.fromkeys(row["x"] for row in sorted(rows, key=lambda row: row["order"])))
        across = {"field": "x", "type": "ordinal", "sort": places, "axis": {"title": x, "labelAngle": 0}}
    up = {"title": y, "tickCount": 5, "domain": False, "ticks": False, "labelOverlap": "greedy"}
    if log_y == "symlog":  # by default Vega labels only the highest decade
        highest = max(float(row["y"]) for row in rows)
        up["values"] = [0, *(10**k for k in range(16) if 10**k <= highest)]
    scale = {"type": "symlog" if log_y == "symlog" else "log"} if log_y else {"zero": False}
    place = {"x": across, "y": number("y", axis=up, scale=scale)}
    layers: list[Spec] = []
    for k, name in enumerate(names):
        mine, color = [row for row in rows if row["series"] == name], _of(COLORS, k)
        joined = place | {"order": number("order")} | _drawn(legend, name)
        layers.append(layer(mine, line(1.5), joined))
        if barred := [row for row in mine if "low" in row]:
            ends = {"y": place["y"] | {"field": "low"}, "y2": {"field": "high"}}
            layers.append(layer(barred, {"type": "rule", "color": color}, place | ends))
        layers.append(layer(mine, dot(k, filled=True, color=color), place | TOLD))
    return {"title": title, "width": WIDTH, "height": HEIGHT, "layer": layers}


def overview(panels: Sequence[Spec]) -> Spec:
    """Return figures of curves side by side, two in a row, with one legend for all."""
    # Layers' names must be unique in a specification: otherwise each panel would show the first one's data.
    nameless = [
        panel | {"layer": [{k: v for k, v in layer.items() if k != "name"} for layer in panel["layer"]]}
        for panel in panels
    ]
    # "flush" aligns the axes; the spacing must then leave room for their labels.
    return {"concat": nameless, "columns": 2, "bounds": "flush", "spacing": {"row": 104, "column": 72}}


def timings_figure(title: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the figure as SVG text; rows are as `deploy.bench` returns them, as mappings.

    A mark is the median milliseconds per image over rounds, its bar the quartiles, the thin tick the floor.
    """
    batches, engines = (list(dict.fromkeys(row[name] for row in rows)) for name in ("batch", "engine"))
    data = [_placed(row) for row in rows]
    axis = {"title": "milliseconds per image (log scale); bars: quartiles, ticks: floor", "grid": True}
    axis |= {"values": [step * 10.0**k for k in range(-7, 5) for step in (1, 3)], "labelOverlap": "greedy"}
    names = [f"batch {batch}" for batch in batches]
    place: Spec = {
        "y": {"field": "engine", "type": "nominal", "sort": engines, "axis": {"title": None, "labelLimit": 220}},
        "yOffset": {"field": "batch", "type": "ordinal", "sort": batches},
    }

    def channel(table: Sequence[str]) -> Spec:
        scale = {"domain": names, "range": list(table[: len(names)])}
        return {"field": "name", "scale": scale, "legend": {"orient": "top", "title": None}}

    def at(field: str) -> Spec:
        return place | {"x": number(field, scale={"type": "log"}, axis=axis), "color": channel(COLORS)}

    point = {"type": "point", "filled": True, "size": 42, "opacity": 1}
    layers = [
        layer(data, {"type": "rule"}, at("low") | {"x2": {"field": "high"}}),
        layer(data, {"type": "tick", "thickness": 1}, at("floor")),
        layer(data, point, at("milliseconds") | TOLD | {"shape": channel(SHAPES)}),
    ]
    return svg({"title": title, "width": WIDTH, "height": {"step": 11}, "layer": layers})


def _placed(row: Mapping[str, Any]) -> dict[str, Any]:
    batch = row["batch"]
    times = {name: row[name] / batch for name in ("milliseconds", "low", "high", "floor")}
    text = f"{row['engine']}, batch {batch}: {times['milliseconds']:.3g} ms per image"
    text += f" [{times['low']:.3g}, {times['high']:.3g}], floor {times['floor']:.3g}"
    return times | {"engine": row["engine"], "batch": batch, "name": f"batch {batch}", "text": text}
