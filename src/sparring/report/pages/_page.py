"""Put the page together: one file, no address outside itself, every text escaped, a policy that forbids the rest."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from importlib import resources

from ...statistics import Row
from .. import _numbers as numbers
from ..analysis._findings import Findings, gain_told
from ..analysis._looks import history_section
from ..analysis._metrics import NORMS, pretty, pretty_eps
from ..analysis._records import Network
from ..analysis._shipped import shipped_html
from . import _figures as figures
from . import _image_tiles as pictures
from . import _summary as words
from . import _tables as tables
from ._html import Html, join, tag
from ._plots import Drawn, Panel, Picture, styles

SECTIONS = (
    ("curves", "Robustness against sparsity"),
    ("activations", "Robustness against activation sparsity"),
    ("methods", "Methods at the same sparsity"),
    ("comparisons", "Theory, speed and transfer"),
    ("shipped", "As shipped"),
    ("layers", "Layer by layer"),
    ("gallery", "What the attacks did"),
    ("ledger", "Ledger of claims"),
    ("looks", "Looks at this study"),
    ("flags", "Flags"),
    ("cost", "Cost"),
    ("networks", "Every network"),
    ("method", "Methods and citation"),
    ("again", "To make it again"),
)


def render(findings: Findings, drawn: Drawn, ledger: Sequence[Row]) -> str:
    """Return the page as HTML text."""
    bodies = {
        "curves": _curves(findings, drawn.weights, ledger),
        "activations": _grids(findings, drawn.activations, ledger) if drawn.activations else None,
        "methods": _methods(findings),
        "comparisons": _comparisons(findings, drawn.comparisons),
        "shipped": shipped_html(findings),
        "layers": _layers(findings, drawn.layers),
        "gallery": _gallery(findings),
        "ledger": ledger_section(ledger),
        "looks": history_section(findings.study),
        "flags": tables.flags(findings.study, findings.doubts),
        "cost": tables.cost(findings.study),
        "networks": _networks(findings),
        "method": _method(findings),
        "again": _again(findings),
    }
    shown = [(name, heading, bodies[name]) for name, heading in SECTIONS if bodies[name]]
    links = [tag("a", heading, href=f"#{name}") for name, heading, _ in shown]
    sections = [tag("section", tag("h2", heading), body, id=name) for name, heading, body in shown]
    main = tag("main", _opening(findings, tag("nav", *links, aria_label="Sections"), ledger), *sections)
    return document(f"{words.title(findings)}: sparsity and adversarial robustness", main, _switches(findings))


def document(title: str, main: Html, rules: str = "") -> str:
    """Return a whole page: its main element with the report's style, further rules, script and policy."""
    script = _resource("page.js")
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=_policy(script)),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", title),
        tag("style", Html(_resource("page.css") + rules)),
    )
    body = tag("body", main, tag("script", Html(script)))
    return f"<!doctype html>\n{tag('html', head, body, lang='en')}\n"


def summary_html(findings: Findings, panels: Sequence[Panel], ledger: Sequence[Row]) -> str:
    """Return the verdict, the key numbers and the main figures as a fragment, for notebooks."""
    first, *rest = words.headline(findings, ledger)
    sparsity = words.chosen(findings)
    return join(
        tag("p", tag("strong", first)),
        tag("ul", *(tag("li", sentence) for sentence in rest)),
        None if sparsity is None else tables.key_numbers(findings, sparsity, ledger),
        *(Html(panel.levels.svg) for panel in panels),
    )


def _resource(name: str) -> str:
    return (resources.files(__package__) / name).read_text(encoding="utf-8")


def _policy(script: str) -> str:
    """Return a policy under which the page can load nothing and run its own script only."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"


def _switches(findings: Findings) -> str:
    """Return the rules that make the controls work without a script."""
    rules = [
        "body:has(#view-levels:checked) .gains, body:has(#view-gains:checked) .levels { display: none; }",
    ]
    rules += [
        f'body:has(#norm-{norm}:checked) .grid [data-norm]:not([data-norm="{norm}"]):not([data-norm=""])'
        " { display: none; }"
        for norm in NORMS
    ]
    rules += [
        f'body:has(#method-{k}:not(:checked)) g[class*=" s{k}_"] {{ display: none; }}'
        for k in range(len(findings.study.methods))
    ]
    return "\n".join(rules)


def _opening(findings: Findings, sections: Html, ledger: Sequence[Row]) -> Html:
    first, *rest = words.headline(findings, ledger)
    sparsity = words.chosen(findings)
    return join(
        tag("p", f"sparring · study “{words.title(findings)}”", class_="eyebrow"),
        tag("h1", f"{words.subject(findings)}: sparsity and adversarial robustness"),
        tag("p", tag("strong", findings.mark)) if findings.mark else None,
        sections,
        tag("div", tag("p", first), class_="verdict-box"),
        tag("ul", *(tag("li", sentence) for sentence in rest)) if rest else None,
        None if sparsity is None else tables.key_numbers(findings, sparsity, ledger),
    )


def _curves(findings: Findings, panels: Sequence[Panel], ledger: Sequence[Row]) -> Html:
    note = tag(
        "p",
        "Thin lines are single seeds, bold lines their mean with a 95% interval over seeds and images; the grey band "
        "is the dense control, fine-tuned as long as the pruned networks. Among gains, filled marks are significant "
        "after Holm's correction over their own curve, hollow ones are not; neither is a verdict, which only the "
        "ledger gives. Hover over a mark for its numbers, or focus a figure and use the arrow keys.",
        class_="note",
    )
    return join(note, _controls(findings, panels), _grids(findings, panels, ledger))


def _grids(findings: Findings, panels: Sequence[Panel], ledger: Sequence[Row]) -> Html:
    """Return the main metrics' figures, and all others folded away."""
    main = [p for p in panels if p.measure in findings.main]
    others = [p for p in panels if p.measure not in findings.main]
    more = None
    if others:
        heading = tag("summary", f"Other metrics and budgets ({len(others)})")
        more = tag("details", heading, tag("div", *(_panel(p, ledger) for p in others), class_="grid"))
    return join(tag("div", *(_panel(p, ledger) for p in main), class_="grid"), more)


def _methods(findings: Findings) -> Html | None:
    compared = tables.methods(findings)
    note = (
        "Differences paired by seed and by image, in points or in % of the other method's mean, with 95% intervals; "
        "p-values are corrected over the whole table (Holm), and bold differences are significant in it, which is no "
        "verdict of the ledger. Fewer than 5 seeds are indicative."
    )
    return join(tag("p", note, class_="note"), compared) if compared is not None else None


def _comparisons(findings: Findings, drawn: Sequence[Picture]) -> Html | None:
    shown = tag("div", *(_figure(p, p.note, class_="narrow") for p in drawn), class_="grid") if drawn else None
    tightness = tables.tightness(findings)
    if tightness is None:
        return shown
    note = "Medians over correctly classified images; an exact distance is an interval where searches ran out of time."
    return join(shown, tag("h3", "How tight the bounds are"), tag("p", note, class_="note"), tightness)


def _controls(findings: Findings, panels: Sequence[Panel]) -> Html:
    views = _radios("Show", "view", [("levels", "values"), ("gains", "gains over the dense control")])
    norms = list(dict.fromkeys(p.measure.norm for p in panels if p.measure.norm))
    norm = _radios("Norm", "norm", [("any", "all"), *((n, NORMS.get(n, n)) for n in norms)]) if len(norms) > 1 else None
    boxes = [
        tag("label", tag("input", type="checkbox", id=f"method-{k}", checked=True), _swatch(k), method)
        for method, k in styles(findings).items()
    ]
    methods = tag("fieldset", tag("legend", "Methods"), *boxes) if len(boxes) > 1 else None
    return tag("div", views, norm, methods, class_="controls")


def _radios(legend: str, name: str, options: Sequence[tuple[str, str]]) -> Html:
    labels = [
        tag("label", tag("input", type="radio", name=name, id=f"{name}-{key}", checked=k == 0), text)
        for k, (key, text) in enumerate(options)
    ]
    return tag("fieldset", tag("legend", legend), *labels)


def _swatch(style: int) -> Html:
    dash = " ".join(map(str, figures.DASHES[style % len(figures.DASHES)]))
    color = figures.COLORS[style % len(figures.COLORS)]
    line = tag("line", x1="0", x2="24", y1="5", y2="5", stroke=color, stroke_width="2.5", stroke_dasharray=dash or None)
    return tag("svg", line, class_="swatch", viewBox="0 0 24 10", aria_hidden="true")


def _panel(panel: Panel, ledger: Sequence[Row]) -> Html:
    note = _caption(panel, ledger)
    numbers_below = tag("details", tag("summary", "Numbers"), tables.curve_table(panel.results), class_="heavy")
    return tag(
        "div",
        _figure(panel.levels, note, class_="levels"),
        _figure(panel.gains, note, class_="gains"),
        numbers_below,
        data_norm=panel.measure.norm,
    )


def _caption(panel: Panel, ledger: Sequence[Row]) -> str:
    """Say what the ledger says of a figure's gains, what of a curve is not shown, and how many seeds there are."""
    parts, first = [], panel.results[0]
    for result in panel.results if len(panel.results) <= 2 else panel.results[:1]:
        name = f"{result.method}: " if len(panel.results) > 1 else ""
        if told := gain_told(result, ledger):
            parts.append(f"{name}gain: {told}")
        if result.over_sparsified is not None:
            parts.append(f"{name}judged alone, loses more than allowed from {result.words(result.over_sparsified)}")
        if result.left_out:
            parts.append(f"{name}{', '.join(map(numbers.percent, result.left_out))} left out: not all seeds are there")
    if any(first.failed):
        share = sum(first.failed) / len(first.failed)
        parts.append(f"the attack failed on {100 * share:.2g}% of images, which count as the largest distance found")
    seeds = "1 seed, so intervals cover the images only" if len(first.seeds) == 1 else f"{len(first.seeds)} seeds"
    return "; ".join([*parts, f"{seeds}, {first.images:,} images"]) + "."


def _figure(picture: Picture, note: str | None = None, *, class_: str | None = None) -> Html:
    drawn = Html(picture.svg.replace("<svg ", '<svg role="group" ', 1))
    caption = tag("figcaption", note) if note else None
    return tag("figure", drawn, caption, class_=class_, data_title=picture.title)


def _layers(findings: Findings, layers: Sequence[Picture]) -> Html:
    maps = [_figure(picture, class_="narrow") for picture in layers]
    return join(tag("div", *maps, class_="grid") if maps else None, _first_layer(findings))


def _shown_pair(findings: Findings) -> list[Network]:
    """Return the dense control and one sparse network of the same seed."""
    sparsity = words.chosen(findings)
    sparse = findings.study.of(findings.method or "", sparsity)[:1] if sparsity is not None else []
    dense = [n for n in findings.study.of(findings.study.control()) if not sparse or n.seed == sparse[0].seed][:1]
    return dense + sparse


def _who(network: Network) -> str:
    if (network.kind, network.checkpoint) == ("control", "final"):
        return f"dense control, seed {network.seed}"
    return f"{network.method} at {numbers.percent(network.sparsity)}, seed {network.seed}"


def _first_layer(findings: Findings) -> Html | None:
    parts = []
    for network in _shown_pair(findings):
        sheet = pictures.first_layer(network)
        if sheet is not None:
            text = f"First layer: {_who(network)}"
            image = tag("img", class_="sheet", src=sheet, alt=f"{text}: its weights as tiles")
            parts.append(tag("figure", image, tag("figcaption", text), data_title=text))
    if not parts:
        return None
    note = (
        "A tile is one unit's or filter's weights in the input's layout: blue positive, orange negative, white removed."
    )
    return join(tag("h3", "First layer"), tag("p", note, class_="note"), tag("div", *parts, class_="grid"))


def _gallery(findings: Findings) -> Html | None:
    attacks = dict.fromkeys((m.label, m.norm, m.eps) for m in findings.main if m.role in ("budget", "distance"))
    parts = []
    for attack, norm, eps in attacks:
        found = [g for n in _shown_pair(findings) if (g := pictures.gallery(n, attack, norm, eps)) is not None]
        if found:
            at = f" ε = {pretty_eps(eps)}" if eps else ""
            parts.append(tag("h3", f"{pretty(attack)}, {NORMS.get(norm, norm)}{at}"))
            parts.append(tag("div", *(_shots(findings, g, norm) for g in found), class_="grid"))
    return join(*parts) if parts else None


def _shots(findings: Findings, gallery: pictures.Gallery, norm: str) -> Html:
    head = [tag("th", ""), *(tag("th", _class(findings, shot.label), scope="col") for shot in gallery.shots)]
    rows = [tag("tr", *head)]
    for name in ("clean", "perturbed", "difference"):
        cells = [
            tag("td", tag("img", src=getattr(shot, name), alt=f"{_class(findings, shot.label)}, {name}"))
            for shot in gallery.shots
        ]
        rows.append(tag("tr", tag("th", name, scope="row"), *cells))
    outcome = [tag("td", tag("small", _outcome(shot, norm))) for shot in gallery.shots]
    rows.append(tag("tr", tag("th", "", scope="row"), *outcome))
    caption = f"{_who(gallery.network)}; differences × {gallery.amplified:.2g} around grey"
    return tag("div", tag("table", tag("caption", caption), *rows, class_="shots"), class_="scroll", tabindex="0")


def _outcome(shot: pictures.Shot, norm: str) -> str:
    if not shot.correct:
        return "wrong already"
    return f"fooled, {NORMS.get(norm, norm)} {numbers.length(shot.distance, 2)}" if shot.broken else "withstood"


def _class(findings: Findings, label: int) -> str:
    names = findings.study.classes
    return names[label] if 0 <= label < len(names) else str(label)


def ledger_section(rows: Sequence[Row]) -> Html | None:
    """Return the ledger with what its verdicts mean, or None where it is empty."""
    if not rows:
        return None
    note = (
        "What the literature says, held against this study. A claim is decided only by a significant effect, or by "
        "one-sided tests that show no effect that matters (2 points or 2%), at every sparsity where the claim is of "
        "some; the rest is undecided. The paper's claims are primary and share 5% of error; the others have what "
        "settled ones hand on, so that at most one ledger in twenty holds a false verdict. p-values are those of the "
        "test a verdict rests on, so corrected (after Shaffer and Holm)."
    )
    return join(tag("p", note, class_="note"), tables.ledger_table(rows))


def _networks(findings: Findings) -> Html:
    note = "Accuracy has exact binomial intervals (Clopper-Pearson). The same numbers, and more, are in results.csv."
    long = tag("div", tables.networks(findings), class_="long")
    return join(tag("p", note, class_="note"), tag("details", tag("summary", "Show the table"), long, class_="heavy"))


def _method(findings: Findings) -> Html:
    return join(
        tag("blockquote", words.methods(findings)),
        tag("h3", "BibTeX"),
        tag("pre", words.bibtex(findings)),
    )


def _again(findings: Findings) -> Html:
    study = findings.study
    return join(
        tag("pre", study.command),
        tag("h3", "Plan"),
        tag("pre", _json(study.plan)),
        tag("h3", "Environment"),
        tag("pre", _json(study.environment)),
    )


def _json(table: Mapping[str, object]) -> str:
    """Return a table as JSON, one key a line."""
    lines = [f"  {json.dumps(name)}: {json.dumps(value, ensure_ascii=False)}" for name, value in table.items()]
    return "\n".join(["{", ",\n".join(lines), "}"])
