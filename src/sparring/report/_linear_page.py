"""The page of a linear study: the theorem next to attacks, over all pairs of classes."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ..statistics import Row
from . import _figures as figures
from . import _numbers as numbers
from . import _tables as tables
from ._figures import Spec
from ._page import Opening, Section, document, judged_sections
from ._plots import Picture
from ._summary import Verdict, missing
from .analysis._linear import DENSE, NAMES, PATHS, LinearStudy, Point, Step, Value, r_2, r_inf
from .analysis._looks import look_sentences

METHODS = (
    "Linear classifiers (liblinear in scikit-learn, one against the rest for more than two classes) were trained with "
    "ℓ2 and ℓ1 penalties of several strengths. The classifier with the ℓ2 penalty and the best validation accuracy is "
    "the dense one. It was pruned by magnitude, and the remaining weights were trained again. For every classifier we "
    "computed in closed form, inside the box [0, 1] and without it, the accuracy within ℓ∞ ε and the mean ℓ2 distance, "
    "with 0 for misclassified images and without images that cannot be changed inside the box. On the same test images "
    "we measured accuracy under FGSM and the distances of DeepFool and of the attack “nearest”. The steps in the "
    "claims were chosen on validation images by the mean of the boxed closed form over pairs; their values are from "
    "test images. Differences are paired over pairs of classes. Pairs share classes, so the standard error of their "
    "mean is that of a diallel cross (Griffing 1956, method 4, model II), with Student's quantiles and one degree of "
    "freedom less than the number of classes. Intervals are 95%; p-values are corrected across the ledger by Holm's "
    "method."
)


def render(data: LinearStudy, pictures: Sequence[Picture], ledger: Sequence[Row], told: Verdict) -> str:
    """Return the page as HTML text."""
    study = data.study
    steps = [(note, means) for loss in data.losses if data.pairs(loss) for note, means in (_means(data, loss),)]
    sections: list[Section] = [
        ("theory", "Theory and measurement against sparsity", (pictures,)),
        ("ledger", "Ledger of claims", (tables.ledger_table(ledger),)),
        ("steps", "Every step of every path", (steps,)),
        *judged_sections(study),
        ("method", "Methods", (METHODS,)),
        ("again", "Reproduce this report", ([("", study.command), ("", json.dumps(study.plan, indent=2))],)),
    ]
    title, subject = f"{study.name}: linear classifiers", f"Linear classifiers on {study.plan.get('data')}"
    return document(study, title, subject, Opening(told, pictures[:2]), sections)


def headline(data: LinearStudy, ledger: Sequence[Row]) -> Verdict:
    """Return the verdict: the ledger on sparsity in each norm and on a penalty, and whether the theory holds."""
    decided, gaps = tuple(verdicts(ledger)), missing(data.study)
    if not decided:
        few = "The effect of sparsity cannot be tested before all pairs of four classes have finished."
        return Verdict(" ".join(filter(None, [few, gaps])))
    costs = filter(None, (_costs(data, loss, path) for loss, path in data.ways))
    boxes = (_box(data, loss) for loss in data.losses if data.pairs(loss))
    found = " ".join(filter(None, [_summary(data), gaps]))
    return Verdict(found, "", decided, (*costs, *boxes, _agreement(data), *look_sentences(data.study)))


def _summary(data: LinearStudy) -> str:
    """Return a sentence on the norms in which sparsity gains, over all losses and ways to sparsity."""
    eps = data.eps[0]
    linf: list[float] = []
    l2: list[float] = []
    for loss, path in data.ways:
        one = data.effect(loss, data.best(loss, path, r_inf(eps)), r_inf(eps, "fgsm"), DENSE)
        other = data.effect(loss, data.best(loss, path, r_2()), r_2(), DENSE)
        if one is not None and other is not None:
            linf.append(100 * one.estimate)
            l2.append(100 * other.estimate / data.mean(loss, DENSE, r_2()))
    pairs = len(data.pairs(data.losses[0]))
    return (
        f"Over {pairs} pairs of classes, FGSM accuracy at ε = {eps:g} changes by {_range(linf)} points at the sparsity "
        f"that is best for it, and r_2 by {_range(l2)}% at the sparsity that is best for r_2. Changes are relative to "
        "the dense classifier that validation accuracy chose."
    )


def _range(values: Sequence[float]) -> str:
    low, high = (f"{end:+.0f}".replace("-", "−") for end in (min(values), max(values)))
    low, high = (end if end.strip("+−0") else "0" for end in (low, high))
    return low if low == high else f"{low} to {high}"


def verdicts(ledger: Sequence[Row]) -> Iterator[str]:
    """Return the ledger's verdicts in words, one sentence per claim for all losses and ways to sparsity."""
    for text in dict.fromkeys(row.claim.text for row in ledger):
        told = []
        for row in (row for row in ledger if row.claim.text == text):
            if (one := row.effect) is not None:
                place = row.claim.test.split(" − ")[0]
                told.append(f"{row.told} for {place} ({numbers.signed(one, row.claim.unit)}{numbers.decisive(row)})")
        if told:
            yield f"{text[:1].upper()}{text[1:]}: {'; '.join(told)}."


def _costs(data: LinearStudy, loss: str, path: str) -> str:
    """Return a sentence on the accuracy lost at the sparsity that is best for r_inf."""
    step = data.best(loss, path, r_inf(data.eps[0]))
    cost = data.effect(loss, step, lambda p: float(p["accuracy"]), DENSE)
    if cost is None:
        return ""
    told = numbers.signed(cost.scaled(100.0), "points")
    return f"{loss}, {PATHS[path]}: at {data.sparsity(loss, step)} sparsity accuracy changes by {told}."


def _box(data: LinearStudy, loss: str) -> str:
    """Return a sentence on the difference between the theorem's form and attacks inside the box."""
    inside, outside = (100 * data.mean(loss, DENSE, r_inf(data.eps[0], form)) for form in ("boxed", "unboxed"))
    near, far = (data.mean(loss, DENSE, r_2(form)) for form in ("boxed", "unboxed"))
    return (
        f"{loss}, dense: by the theorem's form, in which pixels may leave [0, 1], r_inf is {outside:.1f}% and r_2 "
        f"{far:.3f}; inside the box they are {inside:.1f}% and {near:.3f}."
    )


def _agreement(data: LinearStudy) -> str:
    points = [point for group in data.groups for step, point in group.points.items() if step != DENSE]
    two = [p for p in points if p["theorem"] is not None]
    apart = max((abs(p["fgsm"][e] - p["r_inf_boxed"][e]) for p in two for e in p["fgsm"]), default=0.0)
    excess = [p["r_2_deepfool"] / p["r_2_boxed"] - 1 for p in points if p["r_2_boxed"] > 0 and not p["failed_deepfool"]]
    flags = sum(len(record.flags) for record in data.study.records.values())
    raised = "1 flag was" if flags == 1 else f"{flags} flags were"
    return (
        f"{len(points):,} classifiers were checked against theory, and {raised} raised. FGSM's accuracy differs "
        f"from its boxed closed form by at most {100 * apart:.2g} points on two classes, and DeepFool's mean distance "
        f"exceeds the exact one by {100 * sum(excess) / max(1, len(excess)):.2g}% on average."
    )


def _means(data: LinearStudy, loss: str) -> tuple[str, tables.Table]:
    """Return a loss's steps, means over the pairs, with their paths."""
    eps = data.eps[0]

    def markov(p: Point) -> float:
        bound = p["theorem"]["markov"][f"{eps:g}"]
        return math.inf if bound is None else 100 * float(bound)  # infinite if all weights are zero

    columns: dict[str, Value] = {
        "Accuracy": lambda p: 100 * p["accuracy"],
        "FGSM": lambda p: 100 * r_inf(eps, "fgsm")(p),
        "r_inf boxed": lambda p: 100 * r_inf(eps)(p),
        "r_inf unboxed": lambda p: 100 * r_inf(eps, "unboxed")(p),
        "Markov's bound": markov,
        "DeepFool": r_2("deepfool"),
        "DeepFool failed, %": lambda p: 100 * p["failed_deepfool"],
        "nearest": r_2("nearest"),
        "r_2 boxed": r_2(),
        "r_2 unboxed": r_2("unboxed"),
        "‖w‖₁/‖w‖₂": lambda p: p["theorem"]["l1"] / max(p["theorem"]["l2"], 1e-30),
    }
    steps = [DENSE, *(step for path in NAMES for step in data.steps(loss, path))]
    rows = [
        [NAMES.get(step[0], "dense (chosen for each pair)"), f"{step[1]:g}", data.sparsity(loss, step)]
        + [f"{data.mean(loss, step, value):.4g}" for value in columns.values()]
        for step in steps
    ]
    note = f"{loss}: means over {len(data.pairs(loss))} pairs, shares in % at ε = {eps:g}. A step is C or a sparsity."
    return note, tables.Table(["Path", "Step", "Sparsity", *columns], rows)


def csv_text(data: LinearStudy) -> str:
    """Return results.csv: one row for each group, classifier and number; budgets are part of a number's name."""
    target = io.StringIO()
    writer = csv.writer(target, lineterminator="\n")
    writer.writerow(["loss", "classes", "path", "step", "metric", "value"])
    for group in data.groups:
        for (path, step), point in group.points.items():
            who = [group.loss, " ".join(map(str, group.classes)), path, step]
            writer.writerows([*who, name, value] for name, value in _flat(point) if name not in ("path", "step"))
    return target.getvalue()


def _flat(point: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in point.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        elif value is not None:
            yield prefix + name, value


def pictures(data: LinearStudy) -> list[Picture]:
    """Return both metrics and the ratio of weight norms against sparsity, over pairs and for all classes."""
    return [picture for loss in data.losses for picture in (*_over_pairs(data, loss), *_together(data, loss))]


def _over_pairs(data: LinearStudy, loss: str) -> Iterator[Picture]:
    count = len(data.pairs(loss))
    if not count:
        return
    note = (
        f"Mean over {count} pairs of classes; bars are 95% intervals over the classes. Solid: the closed form inside "
        "the box [0, 1]; dashed: the theorem's, without the box; marks: measured by the attack."
    )
    left_out = f"{note} Solid lines and marks omit images that cannot be changed inside the box."
    yield from _both_metrics(data, loss, "pairs", loss, (note, left_out))
    ratio = {"ratio": lambda point: point["theorem"]["l1"] / max(point["theorem"]["l2"], 1e-30)}
    note = "r_2 divided by ε times this ratio bounds r_inf (both without the box): a smaller ratio leaves more room."
    yield _picture(data, loss, f"{loss}: ‖w‖₁ / ‖w‖₂, pairs", f"{loss}-norms", ratio, "ratio", note)


def _together(data: LinearStudy, loss: str) -> Iterator[Picture]:
    for group in [group for group in data.of(loss) if len(group.classes) > 2][:1]:
        count = len(group.classes)
        note = (
            f"One classifier of {count} classes. Solid: the worst case inside the box; dashed: without the box; marks: "
            "measured by the attack. With more than two classes FGSM is not the worst case."
        )
        yield from _both_metrics(replace(data, groups=(group,)), loss, f"{count} classes", f"{loss}-all", (note, note))


def _both_metrics(data: LinearStudy, loss: str, of: str, slug: str, notes: tuple[str, str]) -> Iterator[Picture]:
    def share(form: str) -> Value:
        return lambda point: 100.0 * r_inf(data.eps[0], form)(point)

    r_infs = {"boxed": share("boxed"), "unboxed": share("unboxed"), "measured": share("fgsm")}
    r_2s = {"boxed": r_2(), "unboxed": r_2("unboxed"), "measured": r_2("deepfool")}
    title = f"{loss}: accuracy at ℓ∞ ε = {data.eps[0]:g}, {of}"
    yield _picture(data, loss, title, f"{slug}-r_inf", r_infs, "%", notes[0])
    yield _picture(data, loss, f"{loss}: mean ℓ2 distance, {of}", f"{slug}-r_2", r_2s, "distance", notes[1])


def _picture(
    data: LinearStudy, loss: str, title: str, slug: str, values: Mapping[str, Value], unit: str, note: str
) -> Picture:
    layers: list[Spec] = []
    for k, path in enumerate(NAMES):
        steps = data.steps(loss, path)
        rows = {form: [_row(data, loss, step, form, value, unit) for step in steps] for form, value in values.items()}
        layers += _layers(rows, k) if steps else []
    if "measured" in values:
        dense = _row(data, loss, DENSE, "measured", values["measured"], unit)
        cross = {"type": "point", "shape": "cross", "size": 110, "color": figures.INK, "filled": True, "opacity": 1}
        layers.append(figures.layer([dense], cross, figures.TOLD))
        note += " The cross is the dense classifier."
    ticks = {"values": [1.0, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01], "labelExpr": "format(1 - datum.value, '.3~%')"}
    axis = ticks | {"title": "sparsity (log scale of density)", "grid": False}
    x = figures.number("x", scale={"type": "log", "reverse": True}, axis=axis)
    spec = {"title": title, "width": figures.WIDTH, "height": figures.HEIGHT, "layer": layers}
    return Picture(slug, title, figures.svg(spec | {"encoding": {"x": x, "y": figures.vertical(unit)}}), note)


def _row(data: LinearStudy, loss: str, step: Step, form: str, value: Value, unit: str) -> Spec:
    points = [group.points[step] for group in data.pairs(loss) or data.of(loss)]
    mean = sum(map(value, points)) / len(points)
    sparsity = sum(float(point["sparsity"]) for point in points) / len(points)
    found, (low, high), told = data.effect(loss, step, value), (mean, mean), ""
    if found is not None:
        low, high = (max(0.0, found.low), min(100.0, found.high)) if unit == "%" else (found.low, found.high)
        told = f" [{low:.3g}, {high:.3g}]"
    series = NAMES.get(step[0], "dense")
    text = f"{series}, {form}, {100 * sparsity:.3g}% sparse: {mean:.4g}{told}"
    return {"x": max(1 - sparsity, 1e-4), "y": mean, "series": series, "low": low, "high": high, "text": text}


def _layers(rows: Mapping[str, list[Spec]], k: int) -> Iterator[Spec]:
    scale = {"domain": list(NAMES.values()), "range": list(figures.COLORS[: len(NAMES)])}
    legend = {"orient": "top", "title": None, "symbolType": "stroke"}
    color = {"color": {"field": "series", "type": "nominal", "scale": scale, "legend": legend}}
    for form, found in rows.items():
        ordered = [row | {"order": place} for place, row in enumerate(found)]
        if form == "measured":
            yield figures.layer(ordered, {"type": "rule", "strokeWidth": 1.2}, color | figures.BETWEEN)
            yield figures.layer(ordered, figures.dot(k, 46, filled=True), figures.TOLD | color)
        else:
            dash = [5, 3] if form == "unboxed" else []
            line = figures.line(1.6, strokeDash=dash, point="measured" not in rows)
            yield figures.layer(ordered, line, figures.TOLD | color | {"order": {"field": "order"}})
