"""Figures of a linear study: closed forms as lines, attacks as marks, one colour for each way to sparsity."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from ..pages import _figures as figures
from ..pages._plots import Picture
from ._claims import NAMES, r_2, r_inf
from ._study import DENSE, Group, LinearStudy, Step, Value

LINES: dict[str, list[int]] = {"boxed": [], "unboxed": [5, 3], "ratio": []}
Row = dict[str, Any]


def linear_pictures(data: LinearStudy) -> list[Picture]:
    """Return both metrics and the ratio of weight norms against sparsity, over pairs and for all classes."""
    return [picture for loss in data.losses for picture in (*_over_pairs(data, loss), *_together(data, loss))]


def _over_pairs(data: LinearStudy, loss: str) -> Iterator[Picture]:
    count = len(data.pairs(loss))
    if not count:
        return
    eps = data.eps[0]
    note = (
        f"Mean over {count} pairs of classes; bars are 95% intervals over the classes. Solid: the closed form inside "
        "the box [0, 1]; dashed: the theorem's, without the box; marks: measured by the attack."
    )
    yield _picture(data, loss, f"{loss}: accuracy at l∞ ε = {eps:g}, pairs", f"{loss}-r_inf", _r_inf(eps), "%", note)
    left_out = f"{note} Images that nothing inside the box moves are left out of solid lines and marks."
    yield _picture(data, loss, f"{loss}: mean l2 distance, pairs", f"{loss}-r_2", _r_2(), "distance", left_out)
    ratio = {"ratio": lambda point: point["theorem"]["l1"] / max(point["theorem"]["l2"], 1e-30)}
    note = "r_2 divided by ε times this ratio bounds r_inf (both without the box): a smaller ratio leaves more room."
    yield _picture(data, loss, f"{loss}: ‖w‖₁ / ‖w‖₂, pairs", f"{loss}-norms", ratio, "ratio", note)


def _together(data: LinearStudy, loss: str) -> Iterator[Picture]:
    group = data.together(loss)
    if group is None:
        return
    eps, count = data.eps[0], len(group.classes)
    note = (
        f"One classifier of {count} classes. Solid: the worst case inside the box; dashed: without the box; marks: "
        "measured by the attack, which for FGSM is not the worst case with more than two classes."
    )
    alone = LinearStudy(data.study, (group,), data.eps)
    title = f"{loss}: accuracy at l∞ ε = {eps:g}, {count} classes"
    yield _picture(alone, loss, title, f"{loss}-all-r_inf", _r_inf(eps), "%", note)
    yield _picture(
        alone, loss, f"{loss}: mean l2 distance, {count} classes", f"{loss}-all-r_2", _r_2(), "distance", note
    )


def _r_inf(eps: float) -> dict[str, Value]:
    return {form: _scaled(100.0, r_inf(eps, form)) for form in ("boxed", "unboxed")} | {
        "measured": _scaled(100.0, r_inf(eps, "fgsm"))
    }


def _r_2() -> dict[str, Value]:
    return {"boxed": r_2(), "unboxed": r_2("unboxed"), "measured": r_2("deepfool")}


def _scaled(factor: float, value: Value) -> Value:
    return lambda point: factor * value(point)


def _picture(
    data: LinearStudy, loss: str, title: str, slug: str, values: Mapping[str, Value], unit: str, note: str
) -> Picture:
    layers: list[Row] = []
    for k, path in enumerate(NAMES):
        steps = data.steps(loss, path)
        if steps:
            rows = {
                form: [_row(data, loss, step, form, value, unit) for step in steps] for form, value in values.items()
            }
            layers += list(_layers(rows, k))
    dense = [_row(data, loss, DENSE, form, value, unit) for form, value in values.items() if form == "measured"]
    if dense:
        mark = {"type": "point", "shape": "cross", "size": 110, "color": figures.INK, "filled": True, "opacity": 1}
        layers.append({"data": {"values": dense}, "mark": mark, "encoding": {"description": {"field": "text"}}})
    spec = {"title": title, "width": figures.WIDTH, "height": figures.HEIGHT, "layer": layers, "encoding": _axes(unit)}
    return Picture(slug, title, figures.svg(spec), note + (" The cross is the dense classifier." if dense else ""))


def _row(data: LinearStudy, loss: str, step: Step, form: str, value: Value, unit: str) -> Row:
    def of(group: Group) -> float:
        return value(group.points[step])

    groups = data.shown(loss)
    mean = sum(map(of, groups)) / len(groups)
    sparsity = sum(float(group.points[step]["sparsity"]) for group in groups) / len(groups)
    found = data.effect(loss, of)
    if found is not None and unit == "%":
        found = replace(found, low=max(0.0, found.low), high=min(100.0, found.high))
    told = "" if found is None else f" [{found.low:.3g}, {found.high:.3g}]"
    row = {"x": max(1 - sparsity, 1e-4), "y": mean, "series": NAMES.get(step[0], "dense")}
    text = f"{row['series']}, {form}, {100 * sparsity:.3g}% sparse: {mean:.4g}{told}"
    return row | {
        "low": mean if found is None else found.low,
        "high": mean if found is None else found.high,
        "text": text,
    }


def _layers(rows: Mapping[str, list[Row]], k: int) -> Iterator[Row]:
    color: dict[str, Any] = {"scale": {"domain": list(NAMES.values()), "range": list(figures.COLORS[: len(NAMES)])}}
    color |= {"field": "series", "type": "nominal", "legend": {"orient": "top", "title": None, "symbolType": "stroke"}}
    described = {"description": {"field": "text"}, "color": color}
    for form, found in rows.items():
        data = {"values": [row | {"order": place} for place, row in enumerate(found)]}
        if form == "measured":
            yield {
                "data": data,
                "mark": {"type": "rule", "strokeWidth": 1.2},
                "encoding": {"color": color, "y": {"field": "low", "type": "quantitative"}, "y2": {"field": "high"}},
            }
            mark = {"type": "point", "filled": True, "opacity": 1, "size": 46, "shape": figures.SHAPES[k]}
            yield {"data": data, "mark": mark, "encoding": described}
        else:
            line = {"type": "line", "strokeWidth": 1.6, "strokeDash": LINES[form], "point": "measured" not in rows}
            yield {"data": data, "mark": line, "encoding": described | {"order": {"field": "order"}}}


def _axes(unit: str) -> Row:
    ticks = [1.0, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01]
    label = "format(1 - datum.value, '.3~%')"
    return {
        "x": {
            "field": "x",
            "type": "quantitative",
            "scale": {"type": "log", "reverse": True},
            "axis": {"title": "sparsity (log scale of density)", "values": ticks, "labelExpr": label, "grid": False},
        },
        "y": {
            "field": "y",
            "type": "quantitative",
            "scale": {"zero": False},
            "axis": {"title": unit, "tickCount": 5, "domain": False, "ticks": False},
        },
    }
