"""Collect the plan, networks and records of a study's folder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from ...records import Cell, Checkpoint, DatasetFacts, Kind, Record, read_plan, read_record
from ...statistics import look_price

Who = tuple[str, float, int]  # method, sparsity, seed


@dataclass(frozen=True)
class Network:
    """One cell of the study: a network of one seed, method and sparsity (0 to 1, the fraction removed).

    `axis` says what is sparse: "weights" or "activations"; `kind` and `checkpoint` what the network is.
    """

    seed: int
    method: str
    sparsity: float
    axis: str
    kind: Kind
    checkpoint: Checkpoint
    records: tuple[Record, ...]

    @property
    def who(self) -> Who:
        """Return the identity of this network in its study."""
        return self.method, self.sparsity, self.seed

    def stage(self, name: str) -> list[Record]:
        """Return this network's usable records of one stage."""
        return [r for r in self.records if r.stage == name and r.error is None]

    def metric(self, name: str, stage: str = "measure") -> float | None:
        """Return a scalar of a stage, or None if unknown."""
        known = (record.metrics.get(name) for record in self.stage(stage))
        return next((float(value) for value in known if value is not None), None)


@dataclass(frozen=True)
class Looks:
    """The current look at a study, counted from 1, and earlier ones.

    `state` is the hash of what is judged and `entries` are the looks in the folder's history, including this one once
    it was written. `dropped` are the sparsities by method that were looked at, or have records, and are no longer in
    the plan; `orphans` is the number of records that the plan does not name; `registered` the entry that registered the
    plan; `unknown`: a report was made before the history began.
    """

    number: int = 1
    state: str = ""
    entries: tuple[Mapping[str, Any], ...] = ()
    dropped: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    orphans: int = 0
    registered: Mapping[str, Any] | None = None
    unknown: bool = False

    @property
    def price(self) -> float:
        """Return the factor of p-values."""
        return look_price(self.number)


@dataclass(frozen=True)
class Study:
    """All data of a study for its report. `missing` are the keys of tasks without a record."""

    folder: Path
    plan: Mapping[str, Any]
    environment: Mapping[str, Any]
    command: str
    dataset: DatasetFacts
    networks: tuple[Network, ...]
    missing: tuple[str, ...]
    looks: Looks = Looks()

    @property
    def name(self) -> str:
        """Return the plan's name."""
        return str(self.plan.get("name") or "study")

    @property
    def mark(self) -> str:
        """Return the plan's mark for every figure."""
        return str(self.plan.get("mark") or "")

    @property
    def data(self) -> object:
        """Return the identity of the test images: the data's hash if records have it, else the folder."""
        hashes = {r.inputs.get("data") for r in self.records.values() if r.stage == "measure"}
        return hashes if hashes and None not in hashes else self.folder.resolve()

    @property
    def classes(self) -> tuple[str, ...]:
        """Return the names of the labels."""
        return tuple(map(str, self.dataset.get("classes", ())))

    @property
    def records(self) -> dict[str, Record]:
        """Return every record once, by key: networks may share records."""
        return {r.key: r for network in self.networks for r in network.records}

    @cached_property
    def _first(self) -> dict[str, Network]:
        """Return the first network of each method, in the plan's order."""
        return {n.method: n for n in reversed(self.networks)}

    @property
    def methods(self) -> tuple[str, ...]:
        """Return the labels of every way to a sparse network, in the plan's order, without the dense networks."""
        names = dict.fromkeys(n.method for n in self.networks)
        return tuple(name for name in names if not self.is_dense(name))

    def axis(self, method: str) -> str:
        """Return what a method makes sparse: "weights" or "activations"."""
        return self._first[method].axis if method in self._first else "weights"

    def kind(self, method: str) -> Kind:
        """Return the kind of a method's networks."""
        return self._first[method].kind

    def checkpoint(self, method: str | None) -> Checkpoint:
        """Return the checkpoint of a method's networks."""
        return self._first[method].checkpoint if method in self._first else "final"

    def is_dense(self, method: str) -> bool:
        """Return whether a method is the dense network as trained or its control, at any checkpoint."""
        return self.kind(method) in ("reference", "control")

    def control(self, method: str | None = None, kind: Kind = "control") -> str:
        """Return the label of the dense control at a method's checkpoint, "" if there is none; `kind`: another."""
        at = self.checkpoint(method)
        return next((name for name, n in self._first.items() if (n.kind, n.checkpoint) == (kind, at)), "")

    def sparsities(self, method: str) -> list[float]:
        """Return the sparsities of a method's networks, rising."""
        return sorted({n.sparsity for n in self.networks if n.method == method})

    def of(self, method: str, sparsity: float | None = None) -> list[Network]:
        """Return the networks of one method, of all sparsities or of one, sorted by sparsity and seed."""
        found = [n for n in self.networks if n.method == method and sparsity in (None, n.sparsity)]
        return sorted(found, key=lambda n: (n.sparsity, n.seed))


def load(folder: Path | str) -> Study:
    """Read a study's output folder.

    Raises UserError when plan.json is missing, DamageError if it or a record that it names has changed.
    Records that do not exist (yet) are listed in `missing`.
    """
    file = read_plan(folder)
    found: dict[str, Record | None] = {}
    for key in (key for cell in file.cells for key in cell.tasks):
        if key not in found:
            found[key] = read_record(folder, key)
    return Study(
        folder=Path(folder),
        plan=file.plan,
        environment=file.environment,
        command=file.command,
        dataset=file.dataset,
        networks=tuple(_networks(file.cells, found)),
        missing=tuple(key for key, record in found.items() if record is None),
    )


def _networks(cells: tuple[Cell, ...], found: Mapping[str, Record | None]) -> Iterator[Network]:
    """Yield a network for each cell.

    Networks of a method without a requested sparsity are placed at the mean of the reached ones, over seeds, so that
    they can be compared. Networks without a record are omitted.
    """
    reached: dict[str, list[float]] = {}
    records = [tuple(record for key in cell.tasks if (record := found[key]) is not None) for cell in cells]
    for cell, known in zip(cells, records, strict=True):
        ends = [end for r in known if r.stage == "prune" and (end := r.metrics.get("sparsity")) is not None]
        if cell.sparsity is None and ends:
            reached.setdefault(cell.method, []).append(ends[-1])
    means = {method: round(sum(ends) / len(ends), 4) for method, ends in reached.items()}
    for cell, known in zip(cells, records, strict=True):
        sparsity = means.get(cell.method) if cell.sparsity is None else float(cell.sparsity)
        if sparsity is not None:
            yield Network(cell.seed, cell.method, sparsity, cell.axis, cell.kind, cell.checkpoint, known)


def attack_label(record: Record) -> str:
    """Return an attack's displayed label: "pgd-40", or "pgd-40 (naive)"."""
    return shown(attack_name(record), is_naive(record))


def shown(attack: str, naive: bool) -> str:
    """Return an attack's name with a mark if it is naive: without the straight-through pass and transfer."""
    return f"{attack} (naive)" if naive else attack


def attack_name(record: Record) -> str:
    """Return an attack's name with the options that distinguish it from others of that name, such as "pgd-40"."""
    attack = {name: value for name, value in record.attack.items() if name not in ("name", "norm", "eps", "naive")}
    options = [str(value) if key == "steps" else f"{key} {value}" for key, value in sorted(attack.items())]
    options.sort(key=lambda text: not text.isdigit())
    return "-".join([record.attack["name"], *options])


def is_naive(record: Record) -> bool:
    """Return whether an attack ran without the straight-through pass and transfer that sparse activations need."""
    return bool(record.attack.get("naive"))
