"""The page of a linear study: the theorem beside what attacks measured, over all pairs of classes."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterator, Sequence
from typing import Any

from ...statistics import Effect, Row
from .. import _numbers as numbers
from ..analysis._looks import history_section, look_sentences
from ..pages import _tables as tables
from ..pages._html import Html, join, tag
from ..pages._page import document, ledger_section
from ..pages._plots import Picture
from ._claims import NAMES, PATHS, gain, r_2, r_inf, sparsity_of
from ._study import DENSE, LinearStudy, Step, Value

METHODS = (
    "Linear classifiers (liblinear through scikit-learn, one against the rest where there are more than two classes) "
    "were trained with l2 and l1 penalties of several strengths; the l2 one with the best validation accuracy is the "
    "dense classifier, and was pruned by magnitude and trained again on the weights kept. For every classifier we "
    "computed exactly, inside the box [0, 1] and without it, the accuracy within l∞ ε and the mean l2 distance "
    "(misclassified images counting 0, images that nothing inside the box moves left out), and measured accuracy under "
    "FGSM and the distances of DeepFool and of our "
    "nearest attack on the same test images. The steps that claims speak of were chosen on validation images, by the "
    "boxed closed form in the mean over pairs, and their values are those on test images. Differences are paired over "
    "pairs of classes; pairs share classes, so their mean's standard error is that of a diallel cross (Griffing 1956, "
    "method 4, model II), with Student's quantiles and one degree of freedom less than there are classes. Intervals "
    "are 95%; p-values are corrected across the ledger by Holm's method."
)


def render_linear(data: LinearStudy, pictures: Sequence[Picture], ledger: Sequence[Row]) -> str:
    """Return the page as HTML text."""
    study = data.study
    drawn = [
        tag("figure", Html(p.svg), tag("figcaption", p.note), data_title=p.title, class_="narrow") for p in pictures
    ]
    sections = {
        "curves": ("Theory and measurement against sparsity", tag("div", *drawn, class_="grid")),
        "ledger": ("Ledger of claims", ledger_section(ledger)),
        "steps": ("Every step of every path", join(*(_table(data, loss) for loss in data.losses))),
        "looks": ("Looks at this study", history_section(study)),
        "flags": ("Flags", tables.flags(study)),
        "cost": ("Cost", tables.cost(study)),
        "method": ("Methods", tag("blockquote", METHODS)),
        "again": ("To make it again", join(tag("pre", study.command), tag("pre", json.dumps(study.plan, indent=2)))),
    }
    first, *rest = linear_headline(data, ledger)
    opening = join(
        tag("p", f"sparring · study “{study.plan.get('name')}”", class_="eyebrow"),
        tag("h1", f"Linear classifiers on {study.plan.get('data')}: sparsity and adversarial robustness"),
        tag("nav", *(tag("a", text, href=f"#{name}") for name, (text, _) in sections.items()), aria_label="Sections"),
        tag("div", tag("p", first), class_="verdict-box"),
        tag("ul", *(tag("li", sentence) for sentence in rest)),
    )
    bodies = [tag("section", tag("h2", text), body, id=name) for name, (text, body) in sections.items()]
    return document(f"{study.plan.get('name')}: linear classifiers", tag("main", opening, *bodies))


def linear_headline(data: LinearStudy, ledger: Sequence[Row]) -> list[str]:
    """Return the verdict: what the ledger says of sparsity in each norm and of a penalty, and whether theory holds."""
    told = list(linear_verdicts(ledger))
    if not told:
        return ["There are not all pairs of four classes yet, so nothing can be said of sparsity.", *_missing(data)]
    return [
        _summary(data),
        *told,
        *filter(None, (_costs(data, loss, path) for loss in data.losses for path in PATHS)),
        *(text for loss in data.losses for text in _box(data, loss)),
        _agreement(data),
        *_missing(data),
        *look_sentences(data.study),
    ]


def _summary(data: LinearStudy) -> str:
    """Say in one sentence in which norm sparsity gains, over all losses and ways to sparsity."""
    eps = data.eps[0]
    linf: list[float] = []
    l2: list[float] = []
    for loss in data.losses:
        for path in PATHS:
            best = data.best(loss, path, r_inf(eps)), data.best(loss, path, r_2())
            if best[0] is None or best[1] is None:
                continue
            one, other = gain(data, loss, best[0], r_inf(eps, "fgsm")), gain(data, loss, best[1], r_2())
            if one is not None and other is not None:
                linf.append(100 * one.estimate)
                l2.append(100 * other.estimate / data.mean(loss, DENSE, r_2()))
    pairs = len(data.pairs(data.losses[0]))
    return (
        f"Over {pairs} pairs of classes, the sparsity best for it changes FGSM accuracy at ε = {eps:g} by "
        f"{_range(linf)} points, and the sparsity best for it changes r_2 by {_range(l2)}%, against the dense "
        "classifier that validation accuracy chose."
    )


def _range(values: Sequence[float]) -> str:
    low, high = (f"{end:+.0f}".replace("-", "−") for end in (min(values), max(values)))
    low, high = (end if end.strip("+−0") else "0" for end in (low, high))
    return low if low == high else f"{low} to {high}"


def linear_verdicts(ledger: Sequence[Row]) -> Iterator[str]:
    """Say the ledger's verdicts, a claim for all losses and ways to sparsity at once."""
    for text in dict.fromkeys(row.claim.text for row in ledger):
        told = []
        for row in (row for row in ledger if row.claim.text == text):
            if (one := row.effect) is not None:
                p = "" if row.decisive is None else f", p {numbers.p_value(row.decisive)}"
                place = row.claim.test.split(" − ")[0]
                told.append(f"{row.told} for {place} ({numbers.signed(one, row.claim.unit)}{p})")
        if told:
            yield f"{text[:1].upper()}{text[1:]}: {'; '.join(told)}."


def _costs(data: LinearStudy, loss: str, path: str) -> str:
    """Say what the sparsity best for r_inf costs of accuracy."""
    step = data.best(loss, path, r_inf(data.eps[0]))
    cost = None if step is None else gain(data, loss, step, lambda p: float(p["accuracy"]))
    if step is None or cost is None:
        return ""
    return f"{loss}, {PATHS[path]}: at {sparsity_of(data, loss, step)} sparsity accuracy changes by {_points(cost)}."


def _points(one: Effect) -> str:
    return numbers.signed(one.scaled(100.0), "points")


def _box(data: LinearStudy, loss: str) -> Iterator[str]:
    """Say how far the theorem's form is from what an attack inside the box can do."""
    eps = data.eps[0]
    if data.pairs(loss):
        inside, outside = (100 * data.mean(loss, DENSE, r_inf(eps, form)) for form in ("boxed", "unboxed"))
        near, far = (data.mean(loss, DENSE, r_2(form)) for form in ("boxed", "unboxed"))
        yield (
            f"{loss}, dense: the theorem's form, which lets pixels leave [0, 1], says r_inf {outside:.1f}% and r_2 "
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
        f"{len(points):,} classifiers were checked against theory, {raised} raised: FGSM's accuracy differs "
        f"from its boxed closed form by at most {100 * apart:.2g} points on two classes, and DeepFool's mean distance "
        f"exceeds the exact one by {100 * sum(excess) / max(1, len(excess)):.2g}% in the mean."
    )


def _missing(data: LinearStudy) -> list[str]:
    failed = sum(record.error is not None for record in data.study.records.values())
    missing = len(data.study.missing)
    return [f"Incomplete: {missing} tasks have no record and {failed} failed."] if missing or failed else []


def _table(data: LinearStudy, loss: str) -> Html | None:
    """Return a loss's steps, means over the pairs."""
    eps = data.eps[0]
    columns: dict[str, Value] = {
        "Accuracy": lambda p: 100 * p["accuracy"],
        "FGSM": lambda p: 100 * r_inf(eps, "fgsm")(p),
        "r_inf boxed": lambda p: 100 * r_inf(eps)(p),
        "unboxed": lambda p: 100 * r_inf(eps, "unboxed")(p),
        "Markov's bound": lambda p: 100 * _markov(p["theorem"]["markov"][f"{eps:g}"]),
        "DeepFool": r_2("deepfool"),
        "failed, %": lambda p: 100 * p["failed_deepfool"],
        "nearest": r_2("nearest"),
        "r_2 boxed": r_2(),
        "unboxed ": r_2("unboxed"),
        "‖w‖₁/‖w‖₂": lambda p: p["theorem"]["l1"] / max(p["theorem"]["l2"], 1e-30),
    }
    steps = [DENSE, *(step for path in NAMES for step in data.steps(loss, path))]
    if not data.pairs(loss):
        return None
    rows = [
        [_name(step), f"{step[1]:g}", sparsity_of(data, loss, step)]
        + [f"{data.mean(loss, step, value):.4g}" for value in columns.values()]
        for step in steps
    ]
    note = f"{loss}: means over {len(data.pairs(loss))} pairs, shares in % at ε = {eps:g}. A step is C or a sparsity."
    return join(tag("p", note, class_="note"), tables.table(["Path", "Step", "Sparsity", *columns], rows))


def _markov(bound: float | None) -> float:
    """Return the bound, which a record writes as null where all weights are zero and it is infinite."""
    return math.inf if bound is None else bound


def _name(step: Step) -> str:
    return NAMES.get(step[0], "dense (chosen for each pair)")


def linear_csv(data: LinearStudy) -> str:
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
