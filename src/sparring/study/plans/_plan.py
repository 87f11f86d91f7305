"""A plan says everything about a study: data, model, recipe, seeds, sparsities, pruning, attacks. It is a TOML file."""

from __future__ import annotations

import copy
import dataclasses
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from ...errors import PlanError, UnknownNameError
from ...files import safe_name
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
    check_attack,
    in_range,
    read_units,
)
from ._toml import as_table, override_, read_text, refuse_unknown

MARGINS = ("accuracy", "robust", "distance", "over_sparsified")


@dataclass(frozen=True)
class Plan:
    """Hold a whole study; equal plans give equal records.

    `transfer` attacks are made on the dense control and tried on every sparse network, and the other way round.
    `checkpoints` adds the best epoch of adversarial training beside the final one. `mark` is written into every
    figure: what a smaller version of a study leaves out. `shard` is how many images one
    task attacks; `margins` are the losses that the sweet spot allows, by metric (design.md, section 2). `kernels`
    says what attacks on networks with sparse weights go through: torch, their packed form, or "auto", the faster of the
    two by a rule that knows the plan alone. A plan with `linear` tables studies linear classifiers and nothing else.
    """

    name: str
    data: str = "mnist-5k"
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
    transfer: tuple[AttackSettings, ...] = ()
    linear: tuple[LinearPaths, ...] = ()
    checkpoints: tuple[Checkpoint, ...] = ("final",)
    deploy: bool = False
    shipped: tuple[ShippedSettings, ...] = ()
    kernels: Literal["torch", "packed", "auto"] = "auto"
    batch_size: int = 500
    shard: int = 1000
    gallery: int = 8
    margins: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        safe_name(self.name)  # the output folder is called so
        in_range("seeds", self.seeds, 1, 1000)
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
            raise PlanError("the plan prunes nothing: give at least one [[pruning]] or [[activation]] table")
        for group in (self.sparsities, *(p.sparsities or () for p in self.pruning)):
            for sparsity in group:
                if not 0 < sparsity < 1:
                    raise PlanError(f"a sparsity is the fraction removed, above 0 and below 1; {sparsity} is not")
        labels = [p.label or _default_label(p) for p in self.pruning] + [a.label or a.kind for a in self.activation]
        shown = [at_checkpoint(label, one) for label in (*labels, *CELLS) for one in dict.fromkeys(self.checkpoints)]
        for label in shown:
            if shown.count(label) > 1:
                raise PlanError(f"two methods bear the label '{label}'; give each [[pruning]] a label of its own")
        object.__setattr__(self, "pruning", tuple(_labelled(p) for p in self.pruning))
        object.__setattr__(
            self, "activation", tuple(dataclasses.replace(a, label=a.label or a.kind) for a in self.activation)
        )
        if not self.sparsities and any(not p.ends_by_itself and p.sparsities is None for p in self.pruning):
            raise PlanError("sparsities is empty, so nothing would be pruned; name some")
        for attack in (*self.attacks, *self.transfer, *(s.judge for s in self.shipped)):
            check_attack(attack)
        self._check_methods({*shown, *labels, *CELLS})
        for pruning in self.pruning:
            if pruning.ends_by_itself and pruning.sparsities is not None:
                own = "layers lead" if pruning.c_rate is None else "c_rate leads"
                raise PlanError(f"'{pruning.label}' ends where its {own}; give that or sparsities, not both")
            for asked in pruning.grid(self.sparsities) or (0.5,):
                build_pruner(pruning, asked)
        if self.controls.wide_sparse and self.pruning and self.first_to_a_sparsity is None:
            raise PlanError("controls.wide_sparse needs a [[pruning]] table that can be asked for a sparsity")

    def _check_methods(self, known: set[str]) -> None:
        """Raise UserError for a table that is narrowed to a method that the plan does not have."""
        narrowed = [t.methods for t in (*self.attacks, *self.transfer)] + [t.methods for t in self.certify]
        narrowed += [t.methods for t in self.lipschitz] + [t.methods for t in self.shipped]
        for method in (method for methods in narrowed for method in methods or ()):
            if method not in known:
                raise UnknownNameError("method", method, known)

    @property
    def first_to_a_sparsity(self) -> PruningSettings | None:
        """The first pruning method that can be asked for a sparsity, or None."""
        return next((p for p in self.pruning if not p.ends_by_itself), None)

    @staticmethod
    def load(path_or_preset: str | Path, overrides: Sequence[str] = ()) -> Plan:
        """Load a TOML file or a preset by name, with overrides like "seeds=5" or "recipe.epochs=3" (TOML values).

        Raise PlanError that names the file and the line or key of whatever is wrong.
        """
        source, text = read_text(path_or_preset)
        try:
            table = tomllib.loads(text)
            table.setdefault("name", Path(source).stem)
            return Plan.from_table(table, overrides, source=source)
        except tomllib.TOMLDecodeError as error:
            raise PlanError(f"{source} is not valid TOML: {error}") from error
        except RecursionError as error:
            raise PlanError(f"{source} is nested too deeply; no plan needs that") from error

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
            raise PlanError(f"{source}: key '{key}': {first['msg']}, not {first['input']!r}") from error

    def table(self) -> dict[str, Any]:
        """Return the plan as plain nested dictionaries (for plan.json); `from_table` takes it back."""
        result: dict[str, Any] = _plain(dataclasses.asdict(self))
        return result


def at_checkpoint(label: str, checkpoint: Checkpoint) -> str:
    """Return the label of a method's networks at a checkpoint of their training."""
    return label if checkpoint == "final" else f"{label} ({checkpoint} epoch)"


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items() if item is not None}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _default_label(pruning: PruningSettings) -> str:
    return " ".join(part for part in (pruning.method, pruning.score, pruning.structure) if part)


def _labelled(pruning: PruningSettings) -> PruningSettings:
    return pruning if pruning.label else dataclasses.replace(pruning, label=_default_label(pruning))
