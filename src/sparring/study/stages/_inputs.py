"""Inputs of each stage: frozen values that are recorded and hashed."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from ...attacks import Attack as AttackFunction
from ...records import Checkpoint
from ...sparsity import PruningSpec
from ...threat import Threat, parse_norm
from ...train import Recipe
from ..plans._tables import (
    CertifySettings,
    ExactSettings,
    LinearPaths,
    LipschitzSettings,
    NetworkSettings,
    TrainingSettings,
    VerifySettings,
    attack_named,
)

CELLS = ("seeds", "methods", "sparsities")  # fields of a plan's tables that select cells, and so are not inputs


@dataclass(frozen=True, kw_only=True)
class Part:
    """Inputs of a stage or a part of them, under their names in keys and records."""

    spread: ClassVar[str] = ""  # a field whose table's entries replace it

    def table(self) -> dict[str, Any]:
        """Return plain nested values; a field at its default is omitted, so that new fields do not change old keys."""
        found = {f.name: _plain(value) for f in dataclasses.fields(self) if (value := vars(self)[f.name]) != f.default}
        spread: dict[str, Any] = found.pop(self.spread, {})
        return {**found, **spread}


def _plain(value: Any) -> Any:
    if value is None or type(value) in (str, int, float, bool):  # true for nearly all of millions
        return value
    if isinstance(value, Part):
        return value.table()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        known = {name: item for name, item in dataclasses.asdict(value).items() if item is not None}
        return _plain({name: item for name, item in known.items() if name not in CELLS})
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


@dataclass(frozen=True, kw_only=True)
class Network(Part):
    """Name a model and its size."""

    name: str
    width: float | None = None
    widths: tuple[int, ...] | None = None
    depth: int | None = None

    @classmethod
    def of(cls, table: NetworkSettings) -> Network:
        """Return the network of a plan's table."""
        return cls(name=table.name, width=table.width, widths=table.widths, depth=table.depth)


@dataclass(frozen=True, kw_only=True)
class Activation(Part):
    """Name the module that replaces every ReLU; without `test` it is used only in training."""

    kind: str
    level: float
    test: bool = True


@dataclass(frozen=True, kw_only=True)
class Adversary(Part):
    """Name an attack and its options; `naive`: without the straight-through pass and transfer that BPDA adds."""

    spread = "options"
    name: str
    norm: str
    eps: float | None
    options: Mapping[str, Any]
    naive: bool = False

    @property
    def attack(self) -> AttackFunction:
        """The attack with its options."""
        return functools.partial(attack_named(self.name), **self.options)

    @property
    def threat(self) -> Threat:
        """The norm and the budget."""
        return Threat(parse_norm(self.norm), self.eps)


@dataclass(frozen=True, kw_only=True)
class WeightsFile(Part):
    """A file of weights and the hash of its content."""

    file: str
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Proof(Part):
    """A certificate of some images."""

    norm: str
    method: str
    images: int


@dataclass(frozen=True, kw_only=True)
class Inputs(Part):
    """Identify the data (a hash) and the model of a task: the inputs of every stage."""

    stage: ClassVar[str]
    data: str
    model: Network

    @property
    def initial_seed(self) -> int:
        """The seed from which the model is initialised, even if weights are loaded afterwards."""
        return 0


@dataclass(frozen=True, kw_only=True)
class Seeded(Inputs):
    """Inputs with a seed."""

    seed: int

    @property
    def initial_seed(self) -> int:
        """The seed from which the model is initialised."""
        return self.seed


@dataclass(frozen=True, kw_only=True)
class Judged(Inputs):
    """Select the parent's network to evaluate: with which activations, at which checkpoint."""

    activation: Activation | None = None
    checkpoint: Checkpoint = "final"


@dataclass(frozen=True, kw_only=True)
class Shard(Seeded):
    """The attacked images of a split, and how they are attacked."""

    attack: Adversary
    split: Literal["test", "valid"]
    start: int
    stop: int
    batch_size: int


@dataclass(frozen=True, kw_only=True)
class Given(Inputs):
    """Use given weights as the dense network's."""

    stage = "train"
    weights: WeightsFile


@dataclass(frozen=True, kw_only=True)
class Train(Seeded):
    """Train a dense network."""

    stage = "train"
    recipe: Recipe
    training: TrainingSettings


@dataclass(frozen=True, kw_only=True)
class Prune(Train):
    """Prune and fine-tune the parent's network; without `pruning` it is the dense control.

    `best`, for adversarial training, says among which epochs the best is chosen: in old records of any sparsity.
    """

    stage = "prune"
    pruning: PruningSpec | None
    sparsity: float | None
    best: Literal["as sparse as the last"] | None = None


@dataclass(frozen=True, kw_only=True)
class Activate(Seeded):
    """Make the parent's activations sparse; with a recipe, fine-tune it so."""

    stage = "activate"
    activation: Activation
    recipe: Recipe | None
    training: TrainingSettings


@dataclass(frozen=True, kw_only=True)
class Choose(Inputs):
    """Choose among parents that were trained with these weight decays."""

    stage = "choose"
    decays: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Measure(Judged):
    """Count a network's weights and measure its accuracies."""

    stage = "measure"


@dataclass(frozen=True, kw_only=True)
class Attack(Shard, Judged):
    """Attack a shard through torch or packed kernels, and keep the first `gallery` images."""

    stage = "attack"
    gallery: int
    kernels: Literal["torch", "packed"] = "torch"


@dataclass(frozen=True, kw_only=True)
class Lend(Shard):
    """Attack a shard on a network whose examples are transferred to others."""

    stage = "lend"


@dataclass(frozen=True, kw_only=True)
class Transfer(Attack):
    """Attack the first parent's network and try the images on the second's."""

    stage = "transfer"
    direction: Literal["to sparse", "to dense"]


@dataclass(frozen=True, kw_only=True)
class Certify(Judged):
    """Compute certified radii, and certified accuracy at each eps."""

    stage = "certify"
    spread = "asked"
    asked: CertifySettings


@dataclass(frozen=True, kw_only=True)
class Lipschitz(Judged):
    """Compute margins and local Lipschitz constants."""

    stage = "lipschitz"
    spread = "asked"
    asked: LipschitzSettings


@dataclass(frozen=True, kw_only=True)
class Exact(Judged):
    """Search exact distances."""

    stage = "exact"
    spread = "asked"
    asked: ExactSettings


@dataclass(frozen=True, kw_only=True)
class Verify(Judged):
    """Verify labels in whole balls."""

    stage = "verify"
    spread = "asked"
    asked: VerifySettings


@dataclass(frozen=True, kw_only=True)
class Deploy(Judged):
    """Compare the artefact with the network on some images."""

    stage = "deploy"
    images: int


@dataclass(frozen=True, kw_only=True)
class Ship(Judged):
    """Attack and certify the artefact beside the network; `decisions` are HopSkipJump's steps."""

    stage = "ship"
    values: Literal["fp32", "fp16", "int8"]
    activations: Literal["fp32", "int8"] = "fp32"
    images: int
    attack: Adversary
    decisions: int
    certify: tuple[Proof, ...]


@dataclass(frozen=True, kw_only=True)
class Linear(Inputs):
    """Train one loss's paths on a group of classes, `paths.classes`."""

    stage = "linear"
    spread = "paths"
    paths: LinearPaths
