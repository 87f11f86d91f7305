"""The figure of `sparring bench`: every engine's time for an image, with its spread and its floor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ._figures import COLORS, SHAPES, WIDTH, Spec, svg


def timings_figure(title: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the figure as SVG text; rows are as `deploy.bench` returns them, as mappings.

    A mark is the median over rounds of milliseconds an image, its bar the quartiles, the thin tick the floor.
    """
    batches = list(dict.fromkeys(row["batch"] for row in rows))
    engines = list(dict.fromkeys(row["engine"] for row in rows))
    data = [_placed(row) for row in rows]
    axis = {"title": "milliseconds an image (log scale); bars: quartiles, ticks: floor", "grid": True}
    across: Spec = {"type": "quantitative", "scale": {"type": "log"}, "axis": axis}
    down = {"field": "engine", "type": "nominal", "sort": engines, "axis": {"title": None, "labelLimit": 220}}
    offset = {"field": "batch", "type": "ordinal", "sort": batches}
    names = [f"batch {batch}" for batch in batches]
    legend = {"orient": "top", "title": None}
    color = {"field": "name", "scale": {"domain": names, "range": list(COLORS[: len(names)])}, "legend": legend}
    shape = {"field": "name", "scale": {"domain": names, "range": list(SHAPES[: len(names)])}, "legend": legend}
    place = {"y": down, "yOffset": offset}

    def layer(mark: Spec, **encoding: Spec) -> Spec:
        return {"mark": mark, "encoding": {**place, **encoding}}

    return svg(
        {
            "title": title,
            "width": WIDTH,
            "height": {"step": 11},
            "data": {"values": data},
            "layer": [
                layer({"type": "rule"}, x=across | {"field": "low"}, x2={"field": "high"}, color=color),
                layer({"type": "tick", "thickness": 1}, x=across | {"field": "floor"}, color=color),
                layer(
                    {"type": "point", "filled": True, "size": 42, "opacity": 1},
                    x=across | {"field": "milliseconds"},
                    color=color,
                    shape=shape,
                    description={"field": "text"},
                ),
            ],
        }
    )


def _placed(row: Mapping[str, Any]) -> dict[str, Any]:
    batch = row["batch"]
    times = {name: row[name] / batch for name in ("milliseconds", "low", "high", "floor")}
    text = f"{row['engine']}, batch {batch}: {times['milliseconds']:.3g} ms an image"
    text += f" [{times['low']:.3g}, {times['high']:.3g}], floor {times['floor']:.3g}"
    return times | {"engine": row["engine"], "batch": batch, "name": f"batch {batch}", "text": text}
