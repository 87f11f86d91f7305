"""The schema of a study's folder: plan.json with its cells, and one record and at most one tensor file per task.

Norms are "linf", "l2", "l1" or "l0", shares are between 0 and 1, and numbers that are not finite are null. Times, which
vary from run to run, are stored separately. Files of schema 1 are read too: their cells are described by their labels,
and their tensors of images lack `images`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NotRequired, TypedDict, get_args

from ..files import canonical_json, sha256_bytes

SCHEMA = 2
READ = (1, SCHEMA)

# Kinds of networks: as trained, fine-tuned as long as the sparse ones but not pruned, one of the other controls, or the
# result of a [[pruning]], [[activation]] or [[linear]] table.
Dense = Literal["reference", "control"]
Control = Literal["tuned decay", "small dense", "wide sparse"]
Pruned = Literal["pruned", "random", "channels", "surgery"]
Kind = Dense | Control | Pruned | Literal["activations", "linear"]
CELLS: tuple[str, ...] = (*get_args(Dense), *get_args(Control))  # kinds without a name in plans: their own labels
Checkpoint = Literal["final", "best"]


class ObjectFile(TypedDict):
    """The name of a safetensors file in objects/ and the SHA-256 of its content."""

    file: str
    sha256: str


class AttackInputs(TypedDict):
    """The input `attack` of a record; `naive`: without the straight-through pass and transfer that BPDA adds."""

    name: str
    norm: str
    eps: float | None  # null: look for the smallest perturbation
    naive: NotRequired[bool]  # and the attack's options, such as `steps`


class DatasetFacts(TypedDict):
    """A data set's name, class names, number of images per split and image shape."""

    name: str
    classes: list[str]
    class_count: int
    train: int
    valid: int
    test: int
    shape: list[int]


@dataclass(frozen=True)
class Cell:
    """One network of the study and the keys of all tasks that made or measured it.

    `method` is a label only. `axis` says what `sparsity` counts: "weights", or the level of an "activations" control.
    If `sparsity` is None, the method determines it, and only its "prune" record contains the value.
    """

    seed: int
    method: str
    sparsity: float | None
    axis: Literal["weights", "activations"]
    kind: Kind
    checkpoint: Checkpoint
    tasks: tuple[str, ...]


@dataclass(frozen=True)
class PlanFile:
    """The content of plan.json: the plan's table, its tasks, the data, and the machine and command that ran it."""

    plan: dict[str, Any]
    cells: tuple[Cell, ...]
    dataset: DatasetFacts
    environment: dict[str, Any]
    command: str = ""
    schema: int = SCHEMA


@dataclass(frozen=True)
class Record:
    """The result of one task (`STAGES`). `error` is None if the task succeeded.

    `key` is the hash of the stage and its inputs. `origin` has facts that are not inputs: the plan's name, the seed
    and, under `weights`, the SHA-256 of each parent's tensors by key; the oldest records lack it. `environment` holds
    the versions of sparring and its dependencies, the device and the number type. `folder` is the folder that the
    record was read from; it is not written.
    """

    key: str
    stage: str
    inputs: dict[str, Any]
    metrics: dict[str, float | None] = field(default_factory=dict)
    series: dict[str, Any] = field(default_factory=dict)
    flags: list[dict[str, str]] = field(default_factory=list)  # each has `name` and `detail`
    error: str | None = None
    object: ObjectFile | None = None
    environment: dict[str, Any] = field(default_factory=dict)
    times: dict[str, float] = field(default_factory=dict)
    schema: int = SCHEMA
    origin: dict[str, Any] = field(default_factory=dict)
    folder: Path | None = field(default=None, compare=False, repr=False)

    @property
    def attack(self) -> AttackInputs:
        """Return the attack of an "attack", "lend", "transfer" or "ship" record."""
        found: AttackInputs = self.inputs["attack"]
        return found

    @property
    def seconds(self) -> float:
        """Return how long the task took on one core."""
        return float(self.times.get("seconds") or 0.0)

    @property
    def weights(self) -> dict[str, str]:
        """Return the SHA-256 of the tensors that the task read, by the key of the parent task."""
        found: dict[str, str] = self.origin.get("weights", {})
        return found

    def content(self) -> dict[str, Any]:
        """Return the written content of the record, without its checksum."""
        return {name: value for name, value in vars(self).items() if name != "folder"}

    def checksum(self) -> str:
        """Return the SHA-256 of everything but times, which may differ between equal runs."""
        left_out = ("times",) if self.origin else ("times", "origin")  # the first records have no origin
        content = {name: value for name, value in self.content().items() if name not in left_out}
        return sha256_bytes(canonical_json(content).encode())


@dataclass(frozen=True)
class Holds:
    """The content of a stage's records: metrics, series, further times, and tensors.

    A tensor has a value per image; `images`, int32, are their positions in the split. Names in capitals vary.
    """

    metrics: tuple[str, ...] = ()
    series: tuple[str, ...] = ()
    times: tuple[str, ...] = ()
    tensors: tuple[str, ...] = ()


_LOSSES = ("loss", "robust_accuracy_valid")
_WEIGHTS = ("model/NAME", "best/NAME", "mask/NAME")
_MADE = Holds(("loss", "accuracy_valid", "sparsity", "best_epoch"), _LOSSES, (), _WEIGHTS)
_SIZES = ("parameters", "nonzero", "bytes_dense", "bytes_sparse", "macs_dense", "macs", "activation_sparsity")
_SHARES = ("accuracy", "accuracy_valid", "sparsity", "sparsity_total", "sparsity_matrices")
_FOUND = ("mean_distance", "mean_distance_correct", "median_distance_correct", "mean_pixels", "failed")
_SHIPPED = ("robust_model", "robust_packed", "robust_transfer", "robust_decision", "decided", "logit_error")
_RADII = ("radius_model_NORM_METHOD", "radius_packed_NORM_METHOD")
_IMAGES = ("clean_correct", "label", "images")
STAGES: Mapping[str, Holds] = {
    "train": _MADE,
    # without a method: the dense control; `covered` only of n:m, the share of all matrices' weights in layers it prunes
    "prune": replace(_MADE, metrics=(*_MADE.metrics, "covered"), series=(*_LOSSES, "step", "pruned", "spliced")),
    "activate": _MADE,
    "choose": replace(_MADE, metrics=("accuracy_valid", "weight_decay"), series=("accuracy_valid",)),
    # `correct_valid` is of all validation images, in their order; `first_*` are of the first layer
    "measure": Holds(
        (*_SHARES, *_SIZES),
        ("density", "activation_sparsity", "dead_units"),
        tensors=("correct", "correct_valid", "label", "images", "first_weight", "first_mask"),
    ),
    # `clean` and `perturbed` are the first images, as floats. With the input `kernels` = "packed" logits and gradients
    # came from the packed network; the verdict is torch's. In l0 distances count values, and `pixels` those of which a
    # channel differs, where there are several channels
    "attack": Holds(
        ("forwards", "backwards", "success", "robust_accuracy", *_FOUND),
        tensors=("distance", "pixels", "success", *_IMAGES, "clean", "perturbed"),
    ),
    # an attack's examples on the dense control, for attacks on networks with sparse activations
    "lend": Holds(tensors=("loanNUMBER",)),
    # of the sparse network, in the `direction` "to sparse" or "to dense": examples that fool both the attacked network
    # and this one (`success`), among those that fool the former and that this one classifies correctly when clean
    # (`clean_correct`)
    "transfer": Holds(("transferred", "robust_accuracy"), tensors=("success", *_IMAGES)),
    # `radius` is 0 where the clean image is misclassified
    "certify": Holds(("radius_mean", "radius_median", "certified_accuracy_EPS"), tensors=("radius", "label", "images")),
    "lipschitz": Holds(
        ("margin", "lipschitz", "margin_over_lipschitz"), tensors=("margin", "lipschitz", "ratio", *_IMAGES)
    ),
    "exact": Holds(("solved",), times=("search",), tensors=("lower", "upper", "solved", "attack", *_IMAGES)),
    # `stable` is the share of ReLUs that keep their sign in the ball. `verified_by`: 0 (not verified), 1 (interval), 2
    # (α-CROWN) or 3 (search); wrong images are falsified
    "verify": Holds(
        ("verified", "falsified", "undecided", "stable"),
        times=("search",),
        tensors=("verified_by", "falsified", "stable", "nodes", *_IMAGES),
    ),
    # `latency` is in seconds per image, one at a time
    "deploy": Holds(("bytes_packed", "agreement", "logits_agree"), times=("latency", "latency_torch")),
    # `stands_*`: correct under the examples made on either network
    "ship": Holds(
        ("accuracy_model", "accuracy_packed", "agreement", *_SHIPPED, *_RADII),
        tensors=("stands_model", "stands_packed", "label", "images", *_RADII),
    ),
    # `strength` is of the dense classifier's penalty; `points` has an entry for each `path` and `step`
    "linear": Holds(("strength", "accuracy", "accuracy_valid", "sparsity"), ("points",)),
}


def pruning_kind(score: str | None, method: str | None, structure: str | None) -> Pruned:
    """Return the kind of network that a [[pruning]] table produces."""
    if score == "random" or method == "bernoulli":
        return "random"
    if structure == "channels":
        return "channels"
    return "surgery" if method == "dns" else "pruned"
