"""A plan describes a study: data, model, recipe, seeds, sparsities, pruning, attacks. It is a TOML file."""

from __future__ import annotations

import copy
import dataclasses
import difflib
import functools
import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from ...attacks import Attack as AttackFunction
from ...data import Preparation, Request
from ...errors import PlanError, UnknownNameError
from ...files import read_bounded, safe_name
from ...plugins import takes
from ...records import CELLS, Checkpoint
from ...sparsity import build_pruner
from ...train import Recipe
from ._tables import (
    ActivationSettings,
    AttackSettings,
    CertifySettings,
    ControlSettings,
    ExactSettings,
    LinearPaths,
    LipschitzSettings,
    NetworkSettings,
    PruningSettings,
    ShippedSettings,
    TrainingSettings,
    VerifySettings,
    attack_named,
    check_attack,
    check_settings,
    in_range,
    options_of,
    read_units,
)

FOUNDATIONS = (
    "data",
    "prepare",
    "model",
    "recipe",
    "finetune",
    "training",
)  # a plan may grow, but not change these
MAX_PLAN_BYTES = 1_000_000
# Images that an attack takes at a time: "auto" means this number, or fewer if these need more than 1 GiB.
BATCH_SIZE = 500
AUTO: Literal["auto"] = "auto"
NAMING = ("name", "title", "mark")  # keys that change no result
MARGINS = ("accuracy", "robust", "distance", "over_sparsified")


@dataclass(frozen=True)
class Plan:
    """A whole study; equal plans give equal records.

    `prepare` says how a user's own images are prepared, and how many are used. `transfer` attacks are made on the dense
    control and tried on every sparse network, and vice versa. `checkpoints` adds the best epoch of adversarial
    training to the final one. `mark` is written into every figure, for example that a study is a smaller version of
    another. `shard` is the number of images that one task attacks. `margins` are the losses that the sweet spot allows,
    by metric (design.md, section 2). `kernels` says where attacks on networks with sparse weights run: in torch, on
    sparse kernels, or "auto", a fixed rule that depends on the plan only. A plan with `linear` tables studies linear
    classifiers only. `batch_size` "auto" becomes a number when the study begins: 500, or fewer of large images.
    """

    name: str
    data: str = "mnist-5k"
    prepare: Preparation | None = None
    title: str = ""
    mark: str = ""
    model: NetworkSettings = field(default_factory=NetworkSettings)
    seeds: int = 3
    sparsities: tuple[float, ...] = (0.5, 0.8, 0.9, 0.95, 0.98, 0.99)
    recipe: Recipe = field(default_factory=Recipe)
    finetune: Recipe = field(default_factory=lambda: Recipe(lr=0.05, epochs=10))
    training: TrainingSettings = field(default_factory=TrainingSettings)
    pruning: tuple[PruningSettings, ...] = field(default_factory=lambda: (PruningSettings(),))
    attacks: tuple[AttackSettings, ...] = ()
    activation: tuple[ActivationSettings, ...] = ()
    controls: ControlSettings = field(default_factory=ControlSettings)
    certify: tuple[CertifySettings, ...] = ()
    lipschitz: tuple[LipschitzSettings, ...] = ()
    exact: tuple[ExactSettings, ...] = ()
    verify: tuple[VerifySettings, ...] = ()
    transfer: tuple[AttackSettings, ...] = ()
    linear: tuple[LinearPaths, ...] = ()
    checkpoints: tuple[Checkpoint, ...] = ("final",)
    deploy: bool = False
    shipped: tuple[ShippedSettings, ...] = ()
    kernels: Literal["torch", "packed", "auto"] = "auto"
    batch_size: int | Literal["auto"] = AUTO
    shard: int = 1000
    gallery: int = 8
    margins: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        safe_name(self.name)  # name of the output folder
        in_range("seeds", self.seeds, 1, 1000)
        if isinstance(self.batch_size, int):
            in_range("batch_size", self.batch_size, 1, 100_000)
        in_range("shard", self.shard, 1, 1_000_000)
        in_range("gallery", self.gallery, 0, 64)
        for name, margin in self.margins.items():
            if name not in MARGINS:
                raise UnknownNameError("margin", name, MARGINS)
            if not 0 <= margin < 1:
                raise PlanError(f"margins.{name} is the fraction that may be lost, from 0 to below 1, not {margin}")
        if self.linear and self.model.name != "linear":
            raise PlanError(f'[[linear]] tables need model = "linear", not "{self.model.name}"')
        if not self.pruning and not self.activation:
            raise PlanError("the plan prunes nothing; add a [[pruning]] or [[activation]] table")
        for group in (self.sparsities, *(p.sparsities or () for p in self.pruning)):
            for sparsity in group:
                if not 0 < sparsity < 1:
                    raise PlanError(f"a sparsity is the fraction removed, above 0 and below 1; {sparsity} is not")
        labels = self.labels
        shown = [at_checkpoint(label, one) for label in (*labels, *CELLS) for one in dict.fromkeys(self.checkpoints)]
        for label in shown:
            if shown.count(label) > 1:
                raise PlanError(f"two methods have the label '{label}'; give each [[pruning]] table its own label")
        if not self.sparsities and any(not p.ends_by_itself and p.sparsities is None for p in self.pruning):
            raise PlanError("sparsities is empty, so nothing would be pruned; give at least one")
        for attack in (*self.attacks, *self.transfer, *(s.judge for s in self.shipped)):
            check_attack(attack)
        self._check_methods({*shown, *labels, *CELLS})
        for pruning in self.pruning:
            if pruning.ends_by_itself and pruning.sparsities is not None:
                own = "layers" if pruning.c_rate is None else "c_rate"
                raise PlanError(f"'{pruning.title}' gets its sparsity from {own}; give either {own} or sparsities")
            for asked in pruning.grid(self.sparsities) or (0.5,):
                build_pruner(pruning, asked)
        if self.controls.wide_sparse and self.pruning and self.first_to_a_sparsity is None:
            raise PlanError("controls.wide_sparse needs a [[pruning]] table with a sparsity")

    def _check_methods(self, known: set[str]) -> None:
        """Raise UserError if a table is narrowed to a method that is not in the plan."""
        tables = (*self.attacks, *self.transfer, *self.certify, *self.lipschitz, *self.verify, *self.shipped)
        for method in (method for table in tables for method in table.methods or ()):
            if method not in known:
                raise UnknownNameError("method", method, known)

    def request(self, *, cache: bool = True) -> Request:
        """Return the request for the plan's data; `cache` as in `Request`."""
        request = (self.prepare or Preparation()).request(cache=cache)
        return request if self.trains else replace(request, parts="any")

    @property
    def trains(self) -> bool:
        """Whether networks are trained, so that the plan needs training images."""
        others = self.controls.small_dense or self.controls.wide_sparse or self.linear
        return bool(self.model.weights is None or self.finetune.epochs or others)

    @property
    def labels(self) -> list[str]:
        """The labels of the methods, pruning first."""
        return [p.title for p in self.pruning] + [a.title for a in self.activation]

    @property
    def first_to_a_sparsity(self) -> PruningSettings | None:
        """The first pruning method that accepts a sparsity, or None."""
        return next((p for p in self.pruning if not p.ends_by_itself), None)

    @staticmethod
    def load(path_or_preset: str | Path, overrides: Sequence[str] = ()) -> Plan:
        """Load a TOML file or a preset by name, with overrides like "seeds=5" or "recipe.epochs=3" (TOML values).

        Raise PlanError with the file and the line or key of the error.
        """
        source, text = read_text(path_or_preset)
        try:
            table = tomllib.loads(text)
            if not table.keys() - NAMING:
                raise PlanError(f"{source} plans nothing; set a key beside {', '.join(NAMING)}, such as data")
            table.setdefault("name", Path(source).stem)
            return Plan.from_table(table, overrides, source=source)
        except tomllib.TOMLDecodeError as error:
            raise PlanError(f"{source} is not valid TOML: {error}") from error
        except RecursionError as error:
            raise PlanError(f"{source} is nested too deeply") from error

    @staticmethod
    def from_table(table: dict[str, Any], overrides: Sequence[str] = (), *, source: str = "plan") -> Plan:
        """Build a plan from a nested dictionary, as TOML or plan.json gives it."""
        table = copy.deepcopy(table)
        for override in overrides:
            override_(table, override)
        if isinstance(table.get("model"), str):
            table["model"] = {"name": table["model"]}
        if isinstance(table.get("recipe"), dict):
            table["finetune"] = {**table["recipe"], **as_table(table.get("finetune", {}), "finetune")}
        refuse_unknown(Plan, table, source, ())
        try:
            return TypeAdapter(Plan).validate_python(read_units(table))
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            key = ".".join(str(part) for part in first["loc"])
            raise PlanError(
                f"{source}: key '{key}': {first['msg'].replace('tuple', 'list')}, not {first['input']!r}"
            ) from error

    def table(self) -> dict[str, Any]:
        """Return the plan as plain nested dictionaries (for plan.json); the inverse of `from_table`."""
        result: dict[str, Any] = _plain(dataclasses.asdict(self))
        for row, label in zip((*result["pruning"], *result["activation"]), self.labels, strict=True):
            row["label"] = label
        return result


def at_checkpoint(label: str, checkpoint: Checkpoint) -> str:
    """Return the label of a method's networks at a checkpoint of their training."""
    return label if checkpoint == "final" else f"{label} ({checkpoint} epoch)"


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items() if item is not None}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def refuse_another(out: Path, kept: Mapping[str, Any], table: Mapping[str, Any]) -> None:
    """Raise PlanError if a folder's plan has other foundations than a new one."""
    for name in FOUNDATIONS:
        if kept.get(name) != table.get(name):
            raise PlanError(
                f"{out} belongs to another plan: its {name} is {kept.get(name)}, but this plan has "
                f"{table.get(name)}; choose another folder with --out"
            )


def configured(names: Sequence[str], overrides: Sequence[str]) -> dict[str, AttackFunction]:
    """Return attacks with KEY=VALUE options, each passed to the attacks that have it; raise UserError if none has."""
    options: dict[str, Any] = {}
    for override in overrides:
        override_(options, override)
    found: dict[str, AttackFunction] = {name: attack_named(name) for name in names}
    for option in options:
        if not any(takes(function, option) for function in found.values()):
            raise UnknownNameError(
                f"option of {', '.join(names)}", option, set().union(*map(options_of, found.values()))
            )
    for name, function in found.items():
        own = {option: value for option, value in options.items() if takes(function, option)}
        check_settings(name, function, own)
        found[name] = functools.partial(function, **own)
    return found


# -- TOML --------------------------------------------------------------------------------------------------------------


def presets() -> dict[str, str]:
    """Return the names of the presets in the package, each with its title."""
    folder = resources.files("sparring.study") / "presets"
    files = sorted((f for f in folder.iterdir() if f.name.endswith(".toml")), key=lambda f: f.name)
    tables = {f.name.removesuffix(".toml"): tomllib.loads(f.read_text()) for f in files}
    return {name: ". ".join(t[k] for k in ("title", "mark") if k in t) for name, t in tables.items()}


def read_text(path_or_preset: str | Path) -> tuple[str, str]:
    """Return name and text of a TOML file or of a preset; raise UserError if there is neither.

    A folder with a preset's name, such as the output of its study, does not hide the preset.
    """
    path, known = Path(path_or_preset), presets()
    if path.suffix == ".toml" or (path.exists() and not (path.is_dir() and str(path_or_preset) in known)):
        try:
            return str(path), read_bounded(path, limit=MAX_PLAN_BYTES).decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise PlanError(f"{path} is not a text file in UTF-8: {error}") from error
    if str(path_or_preset) not in known:
        raise UnknownNameError("preset", str(path_or_preset), known)
    file = resources.files("sparring.study") / "presets" / f"{path_or_preset}.toml"
    return f"{path_or_preset}.toml", file.read_text()


def override_(table: dict[str, Any], override: str) -> None:
    """Write one KEY=VALUE (VALUE in TOML, or a bare word) into a nested table, in place."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise PlanError(f"--set takes KEY=VALUE, such as --set seeds=5, not '{override}'")
    try:
        (value,) = tomllib.loads(f"value = {text}").values()
    except ValueError:  # also of several lines
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
    if not part.isdecimal() or int(part) >= len(place):
        raise PlanError(f"--set {key}: '{part}' is not an index of a list with {len(place)} entries, counted from 0")
    return int(part)


def as_table(value: Any, key: str) -> dict[str, Any]:
    """Return a value that must be a table; raise PlanError if it is not."""
    if not isinstance(value, dict):
        raise PlanError(f"key '{key}' must be a table, not {value!r}")
    return value


def refuse_unknown(kind: Any, value: Any, source: str, path: tuple[str, ...]) -> None:
    """Refuse unknown keys, with the nearest match: a misspelt option must not be ignored; and true for a number."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        for option in arguments:
            refuse_unknown(option, value, source, path)
    elif origin is tuple and isinstance(value, list):
        for index, item in enumerate(value):
            _refuse_bool(arguments[0], item, source, (*path, str(index)))
            refuse_unknown(arguments[0], item, source, (*path, str(index)))
    elif dataclasses.is_dataclass(kind) and isinstance(value, dict):
        hints = typing.get_type_hints(kind)
        known = [f.name for f in dataclasses.fields(kind)]
        for key, item in value.items():
            if key not in known:
                near = difflib.get_close_matches(key, known, n=1) or _nested(kind, key)
                hint = f"; did you mean '{near[0]}'?" if near else f"; known: {', '.join(known)}"
                raise PlanError(f"{source}: unknown key '{'.'.join((*path, key))}'{hint}")
            _refuse_bool(hints[key], item, source, (*path, key))
            refuse_unknown(hints[key], item, source, (*path, key))


def _refuse_bool(kind: Any, value: Any, source: str, path: tuple[str, ...]) -> None:
    if isinstance(value, bool) and not {bool, Any} & {kind, *typing.get_args(kind)}:
        raise PlanError(f"{source}: key '{'.'.join(path)}' does not take {str(value).lower()}")


def _nested(kind: Any, key: str) -> list[str]:
    """Return the place of the nearest key in a nested table, such as "recipe.epochs" or "pruning.0.score"."""
    places: dict[str, str] = {}
    for name, hint in typing.get_type_hints(kind).items():
        many = typing.get_origin(hint) is tuple
        table = typing.get_args(hint)[0] if many else hint
        if dataclasses.is_dataclass(table):
            for field in dataclasses.fields(table):
                places.setdefault(field.name, f"{name}.0.{field.name}" if many else f"{name}.{field.name}")
    return [places[found] for found in difflib.get_close_matches(key, places, n=1)]
