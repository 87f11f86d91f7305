"""Fill the page's templates: one file without external addresses, with all text escaped."""

from __future__ import annotations

import base64
import functools
import hashlib
import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..records import arrays
from ..statistics import Row
from . import _figures as figures
from . import _numbers as numbers
from . import _summary as words
from . import _tables as tables
from ._plots import Drawn, Panel, Picture, styles
from ._summary import Verdict
from .analysis._cross_checks import Doubt
from .analysis._findings import Findings, gain_told
from .analysis._looks import look_sentences
from .analysis._metrics import NORMS, pretty, pretty_eps
from .analysis._records import Network, Study, attack_label

Section = tuple[str, str, tuple[Any, ...]]  # the name of its macro, heading, and content
Shown = tuple[Panel, str, tables.Table]  # a panel, its caption and its numbers
Array = NDArray[Any]
SHOWN = 6
REMOVED, NEGATIVE, POSITIVE = (255, 255, 255), (213, 94, 0), (0, 114, 178)
Shot = dict[str, str]  # the addresses of "clean", "perturbed" and "difference", and "label" and "outcome" in words


@dataclass(frozen=True)
class Curves:
    """Content of a section of curves: main panels and others, and the norms and methods to choose from."""

    main: Sequence[Shown]
    others: Sequence[Shown]
    norms: Sequence[tuple[str, str]] = ()
    methods: Sequence[tuple[str, str, Sequence[int]]] = ()


@dataclass(frozen=True)
class Opening:
    """The top of the page: the verdict, the two best figures, what to ship, and the key numbers."""

    verdict: Verdict
    best: Sequence[Picture] = ()
    around: tables.Table | None = None
    key: tables.Table | None = None


def render(findings: Findings, drawn: Drawn, ledger: Sequence[Row], told: Verdict) -> str:
    """Return the page as HTML text."""
    study = findings.study
    curves = _curves(findings, drawn.weights, ledger)
    activations = _curves(findings, drawn.activations, ledger) if drawn.activations else None
    parts = [("", study.command), ("Plan", _json(study.plan)), ("Environment", _json(study.environment))]
    sections: list[Section] = [
        ("curves", "Robustness against sparsity", (curves,)),
        ("activations", "Robustness against activation sparsity", (activations,)),
        ("methods", "Methods at the same sparsity", (tables.methods(findings),)),
        (
            "comparisons",
            "Theory, speed and transfer",
            (drawn.comparisons, tables.tightness(findings), tables.verified(findings)),
        ),
        ("shipped", "As shipped", tables.shipped(findings)),
        ("layers", "Layer by layer", (drawn.layers, first_layers(findings))),
        ("gallery", "Examples of attacks", (galleries(findings),)),
        ("ledger", "Ledger of claims", (tables.ledger_table(ledger),)),
        *judged_sections(study, findings.doubts),
        ("networks", "Every network", (tables.networks(findings),)),
        ("method", "Methods and citation", (words.methods(findings), words.bibtex(findings))),
        ("again", "Reproduce this report", (parts,)),
    ]
    title = f"{study.name}: sparsity and adversarial robustness"
    best = [p.levels for m in words.told(findings)[:2] for p in (*drawn.weights, *drawn.activations) if p.measure == m]
    opening = Opening(told, best, tables.around(findings), _key(findings, ledger))
    return document(study, title, words.subject(findings), opening, sections)


def _key(findings: Findings, ledger: Sequence[Row]) -> tables.Table | None:
    sparsity = words.chosen(findings)
    return None if sparsity is None else tables.key_numbers(findings, sparsity, ledger)


def judged_sections(study: Study, doubts: Sequence[Doubt] = ()) -> list[Section]:
    """Return the sections on looks, flags and cost, which all kinds of studies share."""
    head = study.looks.entries[-1]["sha256"] if study.looks.entries else "–"
    return [
        ("looks", "Looks at this study", (look_sentences(study), head, tables.looks(study))),
        ("flags", "Flags", (tables.flags(study, doubts),)),
        ("cost", "Cost", (tables.cost(study),)),
    ]


def document(study: Study, title: str, subject: str, opening: Opening, sections: Sequence[Section]) -> str:
    """Return a whole page with the report's style, script and policy, without empty sections."""
    script = _templates().get_template("page.js").render()
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    shown = [section for section in sections if any(section[2])]
    page = {"study": study, "title": title, "subject": subject, "opening": opening, "sections": shown}
    page |= {"norms": NORMS, "script": script, "digest": digest}
    return _templates().get_template("page.html").render(page)


def summary_html(findings: Findings, panels: Sequence[Panel], ledger: Sequence[Row]) -> str:
    """Return the verdict, the key numbers and the main figures as a fragment, for notebooks."""
    module: Any = _templates().get_template("sections.html").module
    return str(module.summary(words.headline(findings, ledger), _key(findings, ledger), panels))


@functools.cache
def _templates() -> jinja2.Environment:
    loader = jinja2.PackageLoader(__package__)
    strict = jinja2.StrictUndefined
    made = jinja2.Environment(loader=loader, autoescape=True, undefined=strict, trim_blocks=True, lstrip_blocks=True)
    made.filters["firm"] = _firm
    return made


def _firm(text: str) -> str:
    """Return a text in which no interval, such as [−34, −18], breaks across lines."""
    return re.sub(r"\[[^]]*\]", lambda interval: interval[0].replace(" ", tables.FIRM), text)


def _curves(findings: Findings, panels: Sequence[Panel], ledger: Sequence[Row]) -> Curves:
    main: list[Shown] = []
    others: list[Shown] = []
    for panel in panels:
        side = main if panel.measure in findings.main else others
        side.append((panel, _caption(panel, ledger), tables.curve_table(panel.results)))
    norms = dict.fromkeys(p.measure.norm for p in panels if p.measure.norm)
    looks = [(method, *figures.look(k)) for method, k in styles(findings).items()]
    return Curves(main, others, [(norm, NORMS.get(norm, norm)) for norm in norms], looks)


def _caption(panel: Panel, ledger: Sequence[Row]) -> str:
    """Return a figure's caption: the ledger's verdict on a gain, what is omitted, and the number of seeds."""
    parts, first = [], panel.results[0]
    for result in panel.results if len(panel.results) <= 2 else panel.results[:1]:
        name = f"{result.method}: " if len(panel.results) > 1 else ""
        if told := gain_told(result, ledger):
            parts.append(f"{name}gain: {told}")
        if result.over_sparsified is not None:
            parts.append(f"{name}taken alone, loses more than allowed from {result.words(result.over_sparsified)} on")
        if result.left_out:
            parts.append(f"{name}{', '.join(map(numbers.percent, result.left_out))} omitted because seeds are missing")
    if any(first.failed):
        share = numbers.percent(sum(first.failed) / len(first.failed))
        parts.append(f"the attack failed on {share} of images, which count with the largest distance found")
    seeds = "1 seed (intervals cover images only)" if len(first.seeds) == 1 else f"{len(first.seeds)} seeds"
    text = "; ".join([*parts, f"{seeds}, {first.images:,} images"]) + "."
    return text if len(panel.results) > 1 else text[0].upper() + text[1:]  # a method's label keeps its case


def _json(table: Mapping[str, object]) -> str:
    """Return a table as JSON, one key a line."""
    lines = [f"  {json.dumps(name)}: {json.dumps(value, ensure_ascii=False)}" for name, value in table.items()]
    return "\n".join(["{", ",\n".join(lines), "}"])


# -- image tensors as PNG data: the gallery of attacked images and the first layers' weights --------------------------


def galleries(findings: Findings) -> list[tuple[str, list[tuple[str, list[Shot]]]]]:
    """Return the first attacked images of the shown networks, for each main attack: headings, captions and images."""
    attacks = dict.fromkeys((m.label, m.norm, m.eps) for m in findings.main if m.role in ("budget", "distance"))
    found = []
    for attack, norm, eps in attacks:
        shown = [(n, held) for n in _shown_pair(findings) if (held := _kept(n, attack, norm, eps)) is not None]
        at = f" ε = {pretty_eps(eps)}" if eps else ""
        if shown:
            name = NORMS.get(norm, norm)
            found.append((f"{pretty(attack)}, {name}{at}", [_gallery(findings, n, held, name) for n, held in shown]))
    return found


def first_layers(findings: Findings) -> list[tuple[str, str]]:
    """Return captions and pictures of the first layers of the shown networks, if they were kept."""
    kept = ((n, arrays(r, "first_mask", "first_weight")) for n in _shown_pair(findings) for r in n.stage("measure"))
    return [
        (f"First layer: {_who(network)}", data_uri(_tiles(held["first_mask"], held.get("first_weight"))))
        for network, held in kept
        if "first_mask" in held
    ]


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


def _kept(network: Network, attack: str, norm: str, eps: float | None) -> dict[str, Array] | None:
    """Return the tensors of an attack (by label) on a network that kept its first images, or None."""
    for record in network.stage("attack"):
        if (attack_label(record), record.attack["norm"], record.attack["eps"]) == (attack, norm, eps):
            held = arrays(record, "clean", "perturbed", "label", "clean_correct", "success", "distance")
            if "clean" in held and "perturbed" in held:
                return held
    return None


def _gallery(findings: Findings, network: Network, held: dict[str, Array], norm: str) -> tuple[str, list[Shot]]:
    """Return a caption and the first images: clean, perturbed, and their difference around mid-grey."""
    clean, perturbed = held["clean"][:SHOWN], held["perturbed"][:SHOWN]
    moved = perturbed.astype(float) - clean
    largest = float(np.abs(moved).max()) or 1.0
    names = dict(enumerate(findings.study.classes))
    shots = []
    for k in range(len(clean)):
        label, outcome = int(held["label"][k]), "wrong already"
        if held["clean_correct"][k]:
            far = f"fooled, {norm} {numbers.length(float(held['distance'][k]), 2)}"
            outcome = far if held["success"][k] else "robust"
        images = {"clean": clean[k], "perturbed": perturbed[k], "difference": 0.5 + 0.5 * moved[k] / largest}
        told = {"label": names.get(label, str(label)), "outcome": outcome}
        shots.append({name: data_uri(image) for name, image in images.items()} | told)
    return f"{_who(network)}; differences × {0.5 / largest:.3g} around grey", shots


def data_uri(image: Array) -> str:
    """Return an image (C, H, W) with 1 or 3 channels in [0, 1], or (H, W, 3) bytes, as a PNG data address."""
    if image.dtype != np.uint8:
        image = np.round(255 * np.clip(image, 0, 1)).astype(np.uint8)
        image = image[0] if len(image) == 1 else np.moveaxis(image[:3], 0, -1)
    target = io.BytesIO()
    Image.fromarray(image).save(target, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(target.getvalue()).decode()


def _tiles(mask: Array, weight: Array | None, at_most: int = 60) -> Array:
    """Return a layer's units as tiles on a grid of (rows · (height + 1), columns · (width + 1), 3) bytes.

    Removed weights are white; blue is positive and orange negative, darker for larger values within the picture.
    """
    kept = _images(mask)[:at_most] != 0
    signed = np.where(kept, -1.0, 0.0) if weight is None else _images(weight)[:at_most] * kept
    strength = np.abs(signed) / (float(np.quantile(np.abs(signed), 0.999)) or 1.0)
    strength = np.where(kept, np.clip(0.15 + 0.85 * np.sqrt(strength), 0, 1), 0.0)[..., None]
    ink = np.where(signed[..., None] > 0, POSITIVE, NEGATIVE) if weight is not None else np.zeros(3)
    pixels = np.round(strength * ink + (1 - strength) * np.array(REMOVED)).astype(np.uint8)
    count, height, width, _ = pixels.shape
    columns = min(count, max(1, round(math.sqrt(count * 2.4 * height / width))))
    sheet = np.full((math.ceil(count / columns) * (height + 1) + 1, columns * (width + 1) + 1, 3), 205, np.uint8)
    for k in range(count):
        top, left = (k // columns) * (height + 1) + 1, (k % columns) * (width + 1) + 1
        sheet[top : top + height, left : left + width] = pixels[k]
    return sheet


def _images(tensor: Array) -> Array:
    """Return a layer's weights as (units, height, width): filters summed over their inputs, rows folded to squares."""
    values = np.asarray(tensor, dtype=np.float64)
    if values.ndim == 4:
        return np.asarray(values.mean(axis=1))
    flat = values.reshape(len(values), -1)
    channels = 3 if flat.shape[1] % 3 == 0 and _is_square(flat.shape[1] // 3) else 1
    flat = flat.reshape(len(flat), channels, -1).mean(axis=1)
    side = math.isqrt(flat.shape[1])
    return np.asarray(flat.reshape(len(flat), side, side) if _is_square(flat.shape[1]) else flat[:, None, :])


def _is_square(number: int) -> bool:
    return math.isqrt(number) ** 2 == number
