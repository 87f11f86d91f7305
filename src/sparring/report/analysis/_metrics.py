"""Metrics of a study as values per image."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import numpy as np
from numpy.typing import NDArray

from ...facts import ATTACKS, OWN_ATTACK
from ...records import Record, arrays, image_places
from ...statistics import Effect, binomial_interval, effect, log_ratio_values, ratio_values
from ._records import Study, Who, attack_name, is_naive, shown

Floats = NDArray[np.float64]
Role = Literal[
    "accuracy", "budget", "worst", "distance", "distance-correct", "certified",
    "margin", "lipschitz", "ratio", "to sparse", "to dense", "verified", "not falsified", "stable",
]  # fmt: skip
VERIFIED: tuple[Role, ...] = ("verified", "not falsified", "stable")  # of "verify" records, with norm and eps
LIPSCHITZ: tuple[Role, ...] = ("margin", "lipschitz", "ratio")  # the tensors of "lipschitz" records
TRANSFER: tuple[Role, ...] = ("to sparse", "to dense")  # the directions of "transfer" records
TENSORS = {
    "measure": ("correct", "images", "correct_valid"),
    "attack": ("clean_correct", "success", "distance", "images", "pixels"),
    "certify": ("radius", "images"),
    "lipschitz": ("clean_correct", "images", *LIPSCHITZ),
    "transfer": ("clean_correct", "success", "images"),
    "verify": ("verified_by", "falsified", "stable", "images"),
}
# In l0 the values of an image count, and separately its pixels.
PIXELS = "l0-pixels"
NORMS = {"linf": "ℓ∞", "l2": "ℓ2", "l1": "ℓ1", "l0": "ℓ0", PIXELS: "ℓ0 (pixels)"}


@dataclass(frozen=True)
class Measure:
    """The name of one metric, which is averaged over images. `attack` includes its options, and is empty for accuracy.

    `naive`: without the straight-through pass and transfer that networks with sparse activations need.
    """

    role: Role
    split: str = "test"
    attack: str = ""
    name: str = ""
    norm: str = ""
    eps: float | None = None
    naive: bool = False

    @property
    def label(self) -> str:
        """Return the attack's displayed name."""
        return shown(self.attack, self.naive)

    @property
    def is_share(self) -> bool:
        """Return whether this is a share (shown in %) of images, or of an image's ReLUs, not a distance."""
        return self.role in ("accuracy", "budget", "worst", *TRANSFER, *VERIFIED)

    @property
    def slug(self) -> str:
        """Return a name for files and identifiers."""
        role, eps = self.role.replace(" ", "-"), "" if self.eps is None else f"{self.eps:g}"
        parts = ("" if role == "budget" else role, self.label, self.norm, eps)
        text = "-".join(part for part in parts if part)
        return safe(text)

    @property
    def title(self) -> str:
        """Return a heading."""
        norm, at, attack = NORMS.get(self.norm, self.norm), f" ε = {pretty_eps(self.eps)}", pretty(self.label)
        r_inf = " (r_inf)" if self.name == "fgsm" and self.norm == "linf" else ""
        r_2 = " (r_2)" if self.name == "deepfool" and self.norm == "l2" else " (r_0)" if self.norm == "l0" else ""
        titles: dict[Role, str] = {
            "accuracy": "Accuracy",
            "budget": f"{attack} accuracy{r_inf}, {norm}{at}",
            "worst": f"Worst-case accuracy, {norm}{at}",
            "distance": f"{attack} {norm} distance{r_2}, all images",
            "distance-correct": f"{attack} {norm} distance, correctly classified only",
            "certified": f"Certified {norm} radius ({self.attack}), all images",
            "margin": f"Margin, {norm}, {self.attack}, correctly classified only",
            "lipschitz": f"Lipschitz constant L, {norm}, {self.attack}, correctly classified only",
            "ratio": f"Margin / L, {norm}, {self.attack}, correctly classified only",
            "verified": f"Verified robust, {norm}{at}",
            "not falsified": f"Not falsified, {norm}{at}",
            "stable": f"Stable ReLUs, {norm}{at}",
        }
        return titles.get(self.role, f"{attack} examples that transfer {self.role}, {norm}{at if self.eps else ''}")

    @property
    def short(self) -> str:
        """Return a column heading."""
        eps = f" (ε {pretty_eps(self.eps)})" if self.eps is not None else ""
        norm = NORMS.get(self.norm, self.norm)
        labels = {"accuracy": "accuracy", "budget": pretty(self.label), "worst": "worst case"}
        labels |= {"certified": f"certified {norm}", "distance": f"{pretty(self.label)} {norm}"}
        labels |= {"margin": f"margin ({norm})", "lipschitz": f"L ({norm})", "ratio": f"margin / L ({norm})"}
        labels |= {role: f"{pretty(self.label)} transfers {role}" for role in TRANSFER}
        labels |= {role: f"{role} {norm}" for role in VERIFIED}
        return labels.get(self.role, f"{pretty(self.label)} {norm}, correct only") + eps

    @property
    def phrase(self) -> str:
        """Return the name within a sentence."""
        if self.role in ("distance", "distance-correct") and self.name == "deepfool" and self.norm == "l2":
            return "r_2" if self.role == "distance" else "r_2 (correct images only)"
        return self.short.lower() if self.name == "smallest" else self.short

    def change(self, values: Floats, control: Floats) -> Effect:
        """Return the change over a control, both (seeds, images): for lengths above zero the logarithm of the ratio."""
        logs = not self.is_share and control.mean() > 0
        return effect(log_ratio_values(values, control) if logs else values - control)


@dataclass(frozen=True)
class PerImage:
    """One metric of one network: the mean is sum(top) / sum(bottom) over the images at these positions of a split.

    Their order is that of the records and differs between stages: join two metrics by `common` and `at`. `failed` are
    the images (0 or 1) on which a search for a smallest distance failed, None if there is no search.
    """

    images: NDArray[np.int64]
    top: Floats
    bottom: Floats
    failed: Floats | None = None

    def at(self, images: NDArray[np.int64]) -> PerImage:
        """Return the part on the given images; raise if one is missing."""
        if np.array_equal(images, self.images):
            return self
        order = np.argsort(self.images)
        index = order[np.searchsorted(self.images, images, sorter=order)]
        failed = None if self.failed is None else self.failed[index]
        return PerImage(images, self.top[index], self.bottom[index], failed)

    @property
    def mean(self) -> float:
        """Return the metric."""
        return float(self.top.sum() / self.bottom.sum())

    @property
    def missed(self) -> float:
        """Return the share of images on which the search failed."""
        return 0.0 if self.failed is None else float(self.failed.mean())

    @property
    def found(self) -> Floats:
        """Return the values, infinite where an image does not count or the search failed."""
        missed = self.bottom == 0 if self.failed is None else (self.bottom == 0) | (self.failed > 0)
        return np.where(missed, np.inf, self.top)


Collected = dict[Measure, dict[Who, PerImage]]


def safe(text: str) -> str:
    """Return a text that is safe in a file's name."""
    return "".join(c if c.isascii() and (c.isalnum() or c in "-.") else "_" for c in text)


def pretty(label: str) -> str:
    """Return an attack's label in the usual spelling."""
    head, dash, tail = label.partition("-")
    title = ATTACKS[head].title if head in ATTACKS else "Smallest" if head == "smallest" else head
    return title + dash + tail


def rung(measure: Measure) -> float:
    """Return the rank of an attack within a budget; NaN, which compares with nothing, if it has none."""
    facts = ATTACKS.get(measure.name, OWN_ATTACK)
    return math.nan if facts.rank is None or facts.kind == "minimum-norm" else float(facts.rank)


def pretty_eps(eps: float | None) -> str:
    """Return a budget's eps in the usual spelling: "0.1", or "2/255" or "0.5/255" if it is not a short decimal."""
    if eps is None:
        return ""
    steps, short = round(510 * eps) / 2, f"{eps:g}"
    return f"{steps:g}/255" if len(short) > 5 and steps > 0 and abs(255 * eps - steps) < 1e-6 else short


def collect(study: Study) -> Collected:
    """Return every metric of every network as per-image values, in reading order, each object opened once."""
    found: Collected = {}
    for network in study.networks:
        shards: dict[Measure, list[PerImage]] = {}
        for measure, one in (pair for r in network.records if r.error is None for pair in _of_record(study, r)):
            shards.setdefault(measure, []).append(one)
        for measure, some in shards.items():
            found.setdefault(measure, {})[network.who] = _merge(some)
    _lend_controls(study, found)
    _add_worst(found)
    _cap(found)
    order = (
        "accuracy",
        "budget",
        "worst",
        "distance",
        "distance-correct",
        "certified",
        *VERIFIED,
        *LIPSCHITZ,
        *TRANSFER,
    )
    weakest = ("fgsm", "rfgsm", "pgd")

    def rank(m: Measure) -> tuple[object, ...]:
        strength = weakest.index(m.name) if m.name in weakest else len(weakest)
        place = (order.index(m.role), strength, m.label, m.eps or 0)
        return (m.split != "test", m.norm not in ("", "linf"), m.norm, *place)

    return {measure: found[measure] for measure in sorted(found, key=rank)}


def _of_record(study: Study, record: Record) -> Iterator[tuple[Measure, PerImage]]:
    """Yield the metrics of a record with their values, none if its tensors are missing."""
    held = arrays(record, *TENSORS[record.stage]) if record.stage in TENSORS else {}
    if record.stage == "measure" and "correct_valid" in held:
        count = len(held["correct_valid"])
        yield Measure("accuracy", "valid"), PerImage(np.arange(count), _floats(held["correct_valid"]), np.ones(count))
    if not held or (record.stage == "measure" and "correct" not in held):
        return
    images, inputs = image_places(record, held, study.dataset), record.inputs
    ones = np.ones(len(images))
    if record.stage == "measure":
        yield Measure("accuracy"), PerImage(images, _floats(held["correct"]), ones)
    elif record.stage == "attack":
        of = measures_of(record)
        yield from ((measure, _shard(images, held, measure.role)) for measure in of)
        if "pixels" in held:
            held = held | {"distance": held["pixels"]}
            yield from ((replace(measure, norm=PIXELS), _shard(images, held, measure.role)) for measure in of)
    elif record.stage == "certify":
        measure = Measure("certified", attack=str(inputs["method"]), norm=str(inputs["norm"]))
        yield measure, PerImage(images, _floats(held["radius"]), ones)
    elif record.stage == "verify":
        shares = (held["verified_by"] > 0, ~held["falsified"].astype(bool), held["stable"])
        for role, share in zip(VERIFIED, shares, strict=True):
            yield (
                Measure(role, norm=str(inputs["norm"]), eps=float(inputs["eps"])),
                PerImage(images, _floats(share), ones),
            )
    elif record.stage == "lipschitz":
        correct, method = _floats(held["clean_correct"]), f"{inputs['method']} in radius {inputs['radius']:g}"
        for role in (role for role in LIPSCHITZ if role in held):
            values = np.where(correct > 0, held[role], 0.0)
            yield Measure(role, attack=method, norm=str(inputs["norm"])), PerImage(images, values, correct)
    else:
        yield _transferred(record), PerImage(images, _floats(held["success"]), _floats(held["clean_correct"]))


def _floats(values: NDArray[Any]) -> Floats:
    return values.astype(float)


def _transferred(record: Record) -> Measure:
    attack, role = record.inputs["attack"], cast(Role, str(record.inputs["direction"]))
    eps = None if attack["eps"] is None else float(attack["eps"])
    split, norm = str(record.inputs["split"]), str(attack["norm"])
    return Measure(role, split, attack_name(record), str(attack["name"]), norm, eps, is_naive(record))


def measures_of(record: Record) -> list[Measure]:
    """Return the metrics of an "attack" record."""
    attack, split, naive = record.attack, str(record.inputs["split"]), is_naive(record)
    one = Measure("budget", split, attack_name(record), attack["name"], attack["norm"], naive=naive)
    if attack["eps"] is not None:
        return [replace(one, eps=float(attack["eps"]))]
    return [replace(one, role="distance"), replace(one, role="distance-correct")]


def _shard(images: NDArray[np.int64], held: Mapping[str, NDArray[Any]], role: Role) -> PerImage:
    correct = held["clean_correct"].astype(bool)
    if role == "budget":
        return PerImage(images, (correct & ~held["success"].astype(bool)).astype(float), np.ones(len(images)))
    distance = np.where(correct, held["distance"].astype(float), 0.0)
    counted = np.ones(len(images)) if role == "distance" else correct.astype(float)
    return PerImage(images, distance, counted, (~np.isfinite(distance)).astype(float))


def _merge(shards: list[PerImage]) -> PerImage:
    """Merge shards; an image that is in two counts once."""
    images = np.concatenate([s.images for s in shards])
    first = np.sort(np.unique(images, return_index=True)[1])
    top, bottom = (np.concatenate([getattr(s, name) for s in shards])[first] for name in ("top", "bottom"))
    failed = [s.failed for s in shards if s.failed is not None]
    return PerImage(images[first], top, bottom, np.concatenate(failed)[first] if failed else None)


def _lend_controls(study: Study, found: Collected) -> None:
    """Copy the dense networks' results to naive attacks: without sparse activations both are the same."""
    for measure, held in found.items():
        if measure.naive:
            twin = found.get(replace(measure, naive=False), {})
            held.update({who: one for who, one in twin.items() if study.is_dense(who[0])})


def _add_worst(found: Collected) -> None:
    """Add the joint result of all attacks on an image: the worst case in a budget, the smallest distance in a norm.

    Attacks that ran on fewer networks than others (a slow one, on one seed) are not included. If no attack takes
    more than a single step, their result is far from a worst case and is not called one.
    """
    wanted: dict[Measure, None] = {}
    for m in found:
        if m.role == "budget":
            wanted[Measure("worst", m.split, norm=m.norm, eps=m.eps)] = None
        elif m.role in ("distance", "distance-correct"):
            wanted[Measure(m.role, m.split, "smallest", "smallest", m.norm)] = None
    for measure in wanted:
        same = parts(found, measure)
        everywhere = set.intersection(*(set(found[m]) for m in same)) if same else set()
        if len(same) > 1 and everywhere and any(not ATTACKS.get(m.name, OWN_ATTACK).single_step for m in same):
            found[measure] = {who: _smallest([found[m][who] for m in same]) for who in sorted(everywhere)}


def parts(found: Collected, measure: Measure) -> list[Measure]:
    """Return the attacks behind a measure: itself, or, for a worst case, those that ran on most networks."""
    role = "budget" if measure.role == "worst" else measure.role
    if measure.role != "worst" and measure.name != "smallest":
        return [measure]
    key = (role, measure.split, measure.norm, measure.eps)
    every = [m for m in found if (m.role, m.split, m.norm, m.eps) == key and m.name != "smallest" and not m.naive]
    most = max((len(found[m]) for m in every), default=0)
    return [m for m in every if len(found[m]) == most]


def _smallest(held: Sequence[PerImage]) -> PerImage:
    """Return each image's smallest value on the common images; a search counts as failed if all of them did."""
    images = common([one.images for one in held])
    here = [one.at(images) for one in held]
    top, bottom = np.minimum.reduce([one.top for one in here]), np.maximum.reduce([one.bottom for one in here])
    failed = [one.failed for one in here if one.failed is not None]
    return PerImage(images, top, bottom, np.minimum.reduce(failed) if failed else None)


def _cap(found: Collected) -> None:
    """Give failed searches the largest distance found in a norm, by any attack on any network.

    Omitting them would drop the hardest images, most of all for networks that are hard to attack. With one cap for all,
    a smallest distance is no larger than its parts. If nothing was found, nothing counts.
    """
    searched = [(m, held) for m, held in found.items() if m.role in ("distance", "distance-correct")]
    caps: dict[tuple[str, str], float] = {}
    for m, held in searched:
        largest = (float(one.top[np.isfinite(one.top)].max(initial=0.0)) for one in held.values())
        caps[m.split, m.norm] = max([caps.get((m.split, m.norm), 0.0), *largest])
    for m, held in searched:
        cap = caps[m.split, m.norm]
        for who, one in held.items():
            if one.failed is not None:
                there = np.isfinite(one.top)
                counted = one.bottom if cap > 0 else np.where(there, one.bottom, 0.0)
                held[who] = replace(one, top=np.where(there, one.top, cap), bottom=counted)


def common(images: Sequence[NDArray[np.int64]]) -> NDArray[np.int64]:
    """Return the images in all of the given sets, in the order of the first."""
    if all(np.array_equal(images[0], other) for other in images[1:]):
        return images[0]
    return images[0][np.isin(images[0], functools.reduce(np.intersect1d, images))]


def main_measures(every: list[Measure], split: str = "test") -> list[Measure]:
    """Return the few metrics the page opens with: accuracy, FGSM, PGD and worst case at one eps, r_2 in both forms.

    Without distances in l2, those of the first other norm replace r_2. The eps is one at which the study's strongest
    attack was run, the middle one of several: without it there would be no worst case.
    """
    here = [m for m in every if m.split == split]
    budgets = _strongest_budgets(here)
    budget = budgets[len(budgets) // 2] if budgets else None
    distances = [m for m in here if m.role in ("distance", "distance-correct")]
    norm = min((m.norm for m in distances), key=lambda norm: norm != "l2", default="")
    distances = [m for m in distances if m.norm == norm]
    shown = [m for m in distances if m.name == "deepfool"] or distances[:2]
    shown += [m for m in distances if m.name == "smallest" and m.role == "distance"]
    shown += [m for m in here if m.role == "accuracy" or (m.role == "worst" and (m.norm, m.eps) == budget)]
    attacks = [m for m in here if m.role == "budget" and (m.norm, m.eps) == budget and not m.naive]
    shown += [m for m in attacks if m.name in ("fgsm", "pgd")] or attacks
    fgsm = [m for m in here if (m.role, m.name, m.norm) == ("budget", "fgsm", "linf") and not m.naive]
    if not any(m in attacks for m in fgsm):
        shown += fgsm[len(fgsm) // 2 :][:1]  # needed for r_inf, at another eps if necessary
    return [m for m in here if m in shown]


def _strongest_budgets(here: Sequence[Measure]) -> list[tuple[str, float | None]]:
    """Return the budgets with a worst case, if any has one, at which the strongest attack of them was run."""
    worst = [(m.norm, m.eps) for m in here if m.role == "worst"]
    attacks = [m for m in here if m.role == "budget" and (not worst or (m.norm, m.eps) in worst)]
    strength = {m: rung(m) if rung(m) >= 0 else 0.0 for m in attacks}
    strongest = [m for m in attacks if strength[m] == max(strength.values())]
    return list(dict.fromkeys((m.norm, m.eps) for m in strongest if m.norm == strongest[0].norm))


def values(seeds: Sequence[PerImage], images: NDArray[np.int64]) -> Floats:
    """Return (seeds, images) values whose row means are each seed's metric, on the given images."""
    rows = [one.at(images) for one in seeds]
    return np.stack([ratio_values(row.top, row.bottom) for row in rows])


def summary(measure: Measure, one: PerImage) -> tuple[float | None, float | None, float | None]:
    """Return one network's metric and, for shares, its exact binomial interval (None where there is none)."""
    if one.bottom.sum() == 0:
        return None, None, None
    if not measure.is_share or measure.role == "stable":  # of many ReLUs per image
        return one.mean, None, None
    return one.mean, *binomial_interval(round(float(one.top.sum())), round(float(one.bottom.sum())))
