"""Read an output folder: the plan, the records it names, and their per-image arrays. Nothing else is opened."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from ...errors import UserError
from ...files import read_json, safe_name
from ...statistics import look_price

Array = NDArray[Any]
Who = tuple[str, float, int]  # method, sparsity, seed
NAIVE = " (naive)"  # marks an attack without the straight-through pass and transfer that sparse activations call for
CONTROL, REFERENCE = "control", "reference"


@dataclass(frozen=True)
class Record:
    """Hold one task's record; `object` is the path of its tensors, or None."""

    key: str
    stage: str
    inputs: Mapping[str, Any]
    metrics: Mapping[str, float | None]
    series: Mapping[str, Any]
    flags: tuple[Mapping[str, str], ...]
    error: str | None
    object: Path | None
    times: Mapping[str, float]
    checksum: str

    @property
    def seconds(self) -> float:
        """Return how long the task took on one core."""
        return float(self.times.get("seconds") or 0.0)


@dataclass(frozen=True)
class Network:
    """Hold one cell of the study: a network of one seed, method and sparsity (0 to 1, the fraction removed).

    `axis` says what is sparse: "weights" or "activations".
    """

    seed: int
    method: str
    sparsity: float
    axis: str
    records: tuple[Record, ...]

    @property
    def who(self) -> Who:
        """Return what identifies this network in its study."""
        return self.method, self.sparsity, self.seed

    def stage(self, name: str) -> list[Record]:
        """Return this network's usable records of one stage."""
        return [r for r in self.records if r.stage == name and r.error is None]

    def metric(self, name: str) -> float | None:
        """Return a scalar of the "measure" stage, or None where it is not known."""
        for record in self.stage("measure"):
            value = record.metrics.get(name)
            if value is not None:
                return float(value)
        return None


@dataclass(frozen=True)
class Looks:
    """Hold the look that a study stands at, counted from 1, and what came before it.

    `state` is the hash of what is judged and `entries` are the looks in the folder's history, this one among them once
    it was noted. `dropped` are the sparsities by method that were looked at, or have records, and are not in the plan
    any more; `orphans` is how many records the plan does not name; `registered` the entry that registered the plan;
    `unknown` says that a report was made before the history began.
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
        """Return what p-values are multiplied by."""
        return look_price(self.number)


@dataclass(frozen=True)
class Study:
    """Hold everything the report may know of a study. `missing` are the keys of tasks without a record."""

    folder: Path
    plan: Mapping[str, Any]
    environment: Mapping[str, Any]
    command: str
    classes: tuple[str, ...]
    networks: tuple[Network, ...]
    missing: tuple[str, ...]
    looks: Looks = Looks()

    @property
    def records(self) -> dict[str, Record]:
        """Return every record once, by key: networks may share one."""
        return {r.key: r for network in self.networks for r in network.records}

    @property
    def methods(self) -> tuple[str, ...]:
        """Return the labels of every way to a sparse network, in the plan's order, without the dense networks."""
        names = dict.fromkeys(n.method for n in self.networks)
        return tuple(name for name in names if not is_dense(name))

    def axis(self, method: str) -> str:
        """Return what a method makes sparse: "weights" or "activations"."""
        return next((n.axis for n in self.networks if n.method == method), "weights")

    def of(self, method: str, sparsity: float | None = None) -> list[Network]:
        """Return the networks of one method, of all sparsities or of one, sorted by sparsity and seed."""
        found = [n for n in self.networks if n.method == method and sparsity in (None, n.sparsity)]
        return sorted(found, key=lambda n: (n.sparsity, n.seed))


def load(folder: Path | str) -> Study:
    """Read a study's output folder.

    Raises UserError when plan.json is missing or is not a plan, or a record that it names is damaged. Records that do
    not exist (yet) are listed in `missing`.
    """
    folder = Path(folder)
    path = folder / "plan.json"
    if not path.is_file():
        raise UserError(f"{folder} holds no study: there is no plan.json in it. Run 'sparring study' first")
    document = read_json(path)
    try:
        found: dict[str, Record | None] = {}
        for cell in document["cells"]:
            for key in cell["tasks"]:
                if key not in found:
                    found[key] = _record(folder, key)
        networks = tuple(_networks(document["cells"], found))
        return Study(
            folder=folder,
            plan=document["plan"],
            environment=document["environment"],
            command=str(document["command"]),
            classes=tuple(str(name) for name in document["dataset"]["classes"]),
            networks=networks,
            missing=tuple(key for key, record in found.items() if record is None),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} or a record it names is not as this version writes them: {error!r}") from error


def _networks(cells: Sequence[Mapping[str, Any]], found: Mapping[str, Record | None]) -> Iterator[Network]:
    """Yield a network for each cell.

    Where a method was asked for no sparsity its networks stand at the mean of what they reached, over seeds, so that
    they can be compared; those of which nothing is known yet are left out.
    """
    reached: dict[str, list[float]] = {}
    records = [tuple(record for key in cell["tasks"] if (record := found[key]) is not None) for cell in cells]
    for cell, known in zip(cells, records, strict=True):
        ends = [end for r in known if r.stage == "prune" and (end := r.metrics.get("sparsity")) is not None]
        if cell["sparsity"] is None and ends:
            reached.setdefault(str(cell["method"]), []).append(ends[-1])
    means = {method: round(sum(ends) / len(ends), 4) for method, ends in reached.items()}
    for cell, known in zip(cells, records, strict=True):
        method, axis = str(cell["method"]), str(cell.get("axis", "weights"))
        sparsity = means.get(method) if cell["sparsity"] is None else float(cell["sparsity"])
        if sparsity is not None:
            yield Network(int(cell["seed"]), method, sparsity, axis, known)


def _record(folder: Path, key: str) -> Record | None:
    path = folder / "records" / f"{safe_name(key)}.json"
    if not path.exists():
        return None
    raw = read_json(path)
    held = raw["object"]
    return Record(
        key=key,
        stage=raw["stage"],
        inputs=raw["inputs"],
        metrics=raw["metrics"],
        series=raw["series"],
        flags=tuple(raw["flags"]),
        error=raw["error"],
        object=None if held is None else folder / "objects" / safe_name(Path(held["file"]).name),
        times=raw["times"],
        checksum=str(raw["sha256"]),
    )


def is_dense(method: str) -> bool:
    """Tell whether a method's name means the dense network or its control, at whichever checkpoint."""
    return method.removesuffix(checkpoint_of(method)) in (CONTROL, REFERENCE)


def checkpoint_of(method: str) -> str:
    """Return the part of a method's name that says which checkpoint it is: " (best epoch)", or nothing."""
    return method[method.rindex(" (") :] if method.endswith(" epoch)") and " (" in method else ""


def control_of(method: str) -> str:
    """Return the dense control that a method is held against: "x (best epoch)" against "control (best epoch)"."""
    return CONTROL + checkpoint_of(method)


def attack_label(record: Record) -> str:
    """Return an attack's name with the options that tell it from others of that name, as "pgd-40"."""
    attack = dict(record.inputs["attack"])
    name, _, _ = attack.pop("name"), attack.pop("norm"), attack.pop("eps")
    label = attack.pop("label", None)
    naive = NAIVE if attack.pop("naive", False) else ""
    options = [str(value) if key == "steps" else f"{key} {value}" for key, value in sorted(attack.items())]
    options.sort(key=lambda text: not text.isdigit())
    return (str(label) if label else "-".join([str(name), *options])) + naive


def arrays(record: Record, *names: str) -> dict[str, Array]:
    """Return those of the named tensors that a record's object holds, as numpy arrays.

    Raises UserError when the object is missing or damaged.
    """
    if record.object is None:
        return {}
    try:
        with safe_open(record.object, framework="numpy") as file:
            return {name: np.asarray(file.get_tensor(name)) for name in names if name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        way_out = "run the study again, which makes what is missing, then the report"
        raise UserError(f"{record.object} cannot be read ({error}); {way_out}") from error
