"""A plan says everything about a study: data, model, recipe, seeds, sparsities, pruning, attacks. It is a TOML file."""

from __future__ import annotations

import copy
import dataclasses
import difflib
import inspect
import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from ..attacks import ATTACKS
from ..attacks import Attack as AttackFunction
from ..errors import PlanError, UnknownNameError
from ..files import read_bounded
from ..models import MODELS
from ..plugins import import_object
from ..sparsity import ACTIVATIONS, PruningSpec, build_pruner
from ..threat import Threat, parse_norm
from ..train import Recipe

__all__ = [
    "Activation",
    "Attack",
    "Certify",
    "Controls",
    "Network",
    "Plan",
    "Pruning",
    "Training",
    "attack_named",
    "presets",
]

MAX_PLAN_BYTES = 1_000_000
CONTROL = "control"
REFERENCE = "reference"
RESERVED = (CONTROL, REFERENCE, "tuned decay", "small dense", "wide sparse")
OPTIONS = ("steps", "restarts", "queries")


@dataclass(frozen=True)
class Network:
    """Name a model and its size; what an option does not apply to refuses it."""

    name: str = "lenet-300-100"
    width: float | None = None
    widths: tuple[int, ...] | None = None
    depth: int | None = None

    def __post_init__(self) -> None:
        if self.name not in MODELS and ":" not in self.name:
            raise UnknownNameError("model", self.name, MODELS)


@dataclass(frozen=True)
class Training:
    """Choose the loss: plain cross-entropy, PGD adversarial training, or TRADES (eps in [0, 1])."""

    loss: Literal["standard", "pgd-at", "trades"] = "standard"
    eps: float = 0.1
    norm: Literal["linf", "l2"] = "linf"
    steps: int = 7
    beta: float = 6.0


@dataclass(frozen=True)
class Pruning(PruningSpec):
    """Prune by one method at the plan's sparsities, or at its own, for all seeds or the first few."""

    label: str = ""
    sparsities: tuple[float, ...] | None = None
    seeds: int | None = None


@dataclass(frozen=True)
class Attack:
    """Attack `images` images of a split; `eps` lists budgets (none: a minimum-norm attack).

    `seeds`, `methods` and `sparsities` narrow the cells that are attacked. `naive` attacks activation sparsity without
    the straight-through backward pass and without transfer, to show what that hides. `steps`, `restarts` and `queries`
    are the attack's own.
    """

    name: str
    norm: Literal["linf", "l2", "l1"] = "linf"
    eps: tuple[float, ...] = ()
    images: int = 1000
    split: Literal["test", "valid"] = "test"
    seeds: int | None = None
    methods: tuple[str, ...] | None = None
    sparsities: tuple[float, ...] | None = None
    steps: int | None = None
    restarts: int | None = None
    queries: int | None = None
    naive: bool = False

    def options(self) -> dict[str, Any]:
        """Return the attack's own options that the plan sets."""
        return {name: value for name in OPTIONS if (value := getattr(self, name)) is not None}


@dataclass(frozen=True)
class Certify:
    """Compute certified radii of the first `images` images that the attacks use, and certified accuracy at eps."""

    images: int = 200
    norm: Literal["linf", "l2"] = "linf"
    method: Literal["interval", "crown"] = "crown"
    eps: tuple[float, ...] = ()
    seeds: int | None = None


@dataclass(frozen=True)
class Lipschitz:
    """Take margins and local Lipschitz constants over balls of `radius` around the first `images` images."""

    radius: float
    images: int = 200
    norm: Literal["linf", "l2"] = "linf"
    method: Literal["sampled", "clever", "product", "active", "jacobian"] = "jacobian"
    seeds: int | None = None


@dataclass(frozen=True)
class Exact:
    """Find exact distances of the first `images` images, within `seconds` each, at the sparsities listed (none: all).

    What a search proves within its time depends on the machine: these records alone may differ between runs.
    """

    images: int = 10
    norm: Literal["linf", "l2"] = "linf"
    seconds: float = 60.0
    seeds: int | None = 1
    sparsities: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Activation:
    """Make the dense control's activations sparse at each level; with `train`, fine-tune the dense network so.

    `kind` names a module that takes the place of every ReLU, or "l1-penalty" (in training, weighed by `level`).
    """

    kind: str
    levels: tuple[float, ...]
    label: str = ""
    train: bool = False
    seeds: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in ACTIVATIONS and self.kind != "l1-penalty":
            raise UnknownNameError("activation sparsity", self.kind, [*ACTIVATIONS, "l1-penalty"])
        for level in self.levels:
            if self.kind in ACTIVATIONS:
                ACTIVATIONS[self.kind](level)  # refuses a level out of range


@dataclass(frozen=True)
class Controls:
    """Add the baselines that keep one honest (design.md, section 6, trap 7).

    `decays` are the weight decays of dense controls, of which validation accuracy chooses one; `small_dense` and
    `wide_sparse` list sparsities: a dense network with as many weights as the sparse one keeps, and a wider network
    pruned at that sparsity to as many weights as the dense one has.
    """

    decays: tuple[float, ...] = ()
    small_dense: tuple[float, ...] = ()
    wide_sparse: tuple[float, ...] = ()
    seeds: int | None = None


@dataclass(frozen=True)
class Plan:
    """Hold a whole study; equal plans give equal records.

    `transfer` attacks are made on the dense control and tried on every sparse network, and the other way round.
    `checkpoints` adds the best epoch of adversarial training beside the final one. `shard` is how many images one
    task attacks; `margins` are the losses that the sweet spot allows, by metric (design.md, section 2).
    """

    name: str
    data: str = "mnist-5k"
    title: str = ""
    model: Network = field(default_factory=Network)
    seeds: int = 3
    sparsities: tuple[float, ...] = (0.5, 0.8, 0.9, 0.95, 0.98, 0.99)
    recipe: Recipe = field(default_factory=Recipe)
    finetune: Recipe = field(default_factory=lambda: Recipe(lr=0.05, epochs=10))
    training: Training = field(default_factory=Training)
    pruning: tuple[Pruning, ...] = field(default_factory=lambda: (Pruning(),))
    attacks: tuple[Attack, ...] = ()
    activation: tuple[Activation, ...] = ()
    controls: Controls = field(default_factory=Controls)
    certify: tuple[Certify, ...] = ()
    lipschitz: tuple[Lipschitz, ...] = ()
    exact: tuple[Exact, ...] = ()
    transfer: tuple[Attack, ...] = ()
    checkpoints: tuple[Literal["final", "best"], ...] = ("final",)
    deploy: bool = False
    batch_size: int = 500
    shard: int = 1000
    gallery: int = 8
    margins: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _in_range("seeds", self.seeds, 1, 1000)
        _in_range("batch_size", self.batch_size, 1, 100_000)
        _in_range("shard", self.shard, 1, 1_000_000)
        _in_range("gallery", self.gallery, 0, 64)
        if not self.pruning and not self.activation:
            raise PlanError("the plan prunes nothing: give at least one [[pruning]] or [[activation]] table")
        for group in (self.sparsities, *(p.sparsities or () for p in self.pruning)):
            for sparsity in group:
                if not 0 < sparsity < 1:
                    raise PlanError(f"a sparsity is the fraction removed, above 0 and below 1; {sparsity} is not")
        labels = [p.label or _default_label(p) for p in self.pruning] + [a.label or a.kind for a in self.activation]
        for label in labels:
            if labels.count(label) > 1 or label in RESERVED:
                raise PlanError(f"two methods bear the label '{label}'; give each [[pruning]] a label of its own")
        object.__setattr__(self, "pruning", tuple(_labelled(p) for p in self.pruning))
        object.__setattr__(
            self, "activation", tuple(dataclasses.replace(a, label=a.label or a.kind) for a in self.activation)
        )
        for attack in (*self.attacks, *self.transfer):
            _check_attack(attack)
        for pruning in self.pruning:
            build_pruner(pruning, (pruning.sparsities or self.sparsities or (0.5,))[-1])

    @staticmethod
    def load(path_or_preset: str | Path, overrides: Sequence[str] = ()) -> Plan:
        """Load a TOML file or a preset by name, with overrides like "seeds=5" or "recipe.epochs=3" (TOML values).

        Raise PlanError that names the file and the line or key of whatever is wrong.
        """
        source, text = _read(path_or_preset)
        try:
            table = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise PlanError(f"{source} is not valid TOML: {error}") from error
        table.setdefault("name", Path(source).stem)
        return Plan.from_table(table, overrides, source=source)

    @staticmethod
    def from_table(table: dict[str, Any], overrides: Sequence[str] = (), *, source: str = "plan") -> Plan:
        """Build a plan from a nested dictionary, as TOML or plan.json gives it."""
        table = copy.deepcopy(table)
        for override in overrides:
            _override_(table, override)
        if isinstance(table.get("model"), str):
            table["model"] = {"name": table["model"]}
        if isinstance(table.get("recipe"), dict):
            table["finetune"] = {**table["recipe"], **_as_table(table.get("finetune", {}), "finetune")}
        _refuse_unknown(Plan, table, source, ())
        try:
            return TypeAdapter(Plan).validate_python(table)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            key = ".".join(str(part) for part in first["loc"])
            raise PlanError(f"{source}: key '{key}': {first['msg']}, not {first['input']!r}") from error

    def table(self) -> dict[str, Any]:
        """Return the plan as plain nested dictionaries (for plan.json); `from_table` takes it back."""
        result: dict[str, Any] = _plain(dataclasses.asdict(self))
        return result


def presets() -> dict[str, str]:
    """Return the names of the presets that ship with the package, each with its title."""
    folder = resources.files("sparring") / "plans"
    files = sorted((f for f in folder.iterdir() if f.name.endswith(".toml")), key=lambda f: f.name)
    return {f.name.removesuffix(".toml"): tomllib.loads(f.read_text()).get("title", "") for f in files}


def _read(path_or_preset: str | Path) -> tuple[str, str]:
    path = Path(path_or_preset)
    if path.suffix == ".toml" or path.exists():
        try:
            return str(path), read_bounded(path, limit=MAX_PLAN_BYTES).decode()
        except UnicodeDecodeError as error:
            raise PlanError(f"{path} is not a text file in UTF-8: {error}") from error
    known = presets()
    if str(path_or_preset) not in known:
        raise UnknownNameError("preset", str(path_or_preset), known)
    file = resources.files("sparring") / "plans" / f"{path_or_preset}.toml"
    return f"{path_or_preset}.toml", file.read_text()


def _override_(table: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise PlanError(f"--set takes KEY=VALUE, as in --set seeds=5; '{override}' has no '='")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        if any(mark in text for mark in "[]{}\"'\n="):
            raise PlanError(f"--set {key}: '{text}' is not a value in TOML") from None
        value = text  # a bare word is a string, so that --set data=mnist works
    place: Any = table
    *parents, last = key.split(".")
    for part in parents:
        place = _step(place, part, key)
    if isinstance(place, list):
        place[_index(place, last, key)] = value
    else:
        place[last] = value


def _step(place: Any, part: str, key: str) -> Any:
    if isinstance(place, list):
        return place[_index(place, part, key)]
    if isinstance(place.get(part), str) and part == "model":
        place[part] = {"name": place[part]}
    found = place.setdefault(part, {})
    if not isinstance(found, dict | list):
        raise PlanError(f"--set {key}: '{part}' is a value, not a table")
    return found


def _index(place: list[Any], part: str, key: str) -> int:
    if not part.isdigit() or int(part) >= len(place):
        raise PlanError(f"--set {key}: '{part}' is not a place in a list of {len(place)}, counted from 0")
    return int(part)


def _as_table(value: Any, key: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise PlanError(f"key '{key}' must be a table, not {value!r}")
    return value


def _refuse_unknown(kind: Any, value: Any, source: str, path: tuple[str, ...]) -> None:
    """Refuse keys that no field bears, with the nearest match: a misspelt option must not be ignored."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        for option in arguments:
            _refuse_unknown(option, value, source, path)
    elif origin is tuple and isinstance(value, list):
        for index, item in enumerate(value):
            _refuse_unknown(arguments[0], item, source, (*path, str(index)))
    elif dataclasses.is_dataclass(kind) and isinstance(value, dict):
        hints = typing.get_type_hints(kind)
        known = [f.name for f in dataclasses.fields(kind)]
        for key, item in value.items():
            if key not in known:
                near = difflib.get_close_matches(key, known, n=1)
                hint = f"; did you mean '{near[0]}'?" if near else f"; known: {', '.join(known)}"
                raise PlanError(f"{source}: unknown key '{'.'.join((*path, key))}'{hint}")
            _refuse_unknown(hints[key], item, source, (*path, key))


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items() if item is not None}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _in_range(name: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise PlanError(f"{name} must lie between {low} and {high}, not {value}")


def _default_label(pruning: Pruning) -> str:
    return " ".join(part for part in (pruning.method, pruning.score, pruning.structure) if part)


def _labelled(pruning: Pruning) -> Pruning:
    return pruning if pruning.label else dataclasses.replace(pruning, label=_default_label(pruning))


def attack_named(name: str) -> AttackFunction:
    """Return an attack by its name in ATTACKS, or a user's own by "package.module:function"."""
    if name in ATTACKS:
        return ATTACKS[name]
    if ":" not in name:
        raise UnknownNameError("attack", name, ATTACKS)
    function: AttackFunction = import_object(name)
    return function


def _check_attack(attack: Attack) -> None:
    function = attack_named(attack.name)
    for eps in attack.eps:
        Threat(parse_norm(attack.norm), eps)
    _in_range(f"attack '{attack.name}': images", attack.images, 1, 1_000_000)
    known = inspect.signature(function).parameters
    for option in attack.options():
        if option not in known:
            raise PlanError(f"attack '{attack.name}' has no option '{option}'")
