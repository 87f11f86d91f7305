"""Turn a plan into cells and tasks. A task's key is the hash of all that its result depends on, and of nothing else."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch

from ...data import Dataset, content_hash
from ...errors import PlanError
from ...files import canonical_json, sha256_bytes, sha256_file
from ...plugins import code_hash
from ...records import Cell, Kind, pruning_kind
from ..runner._executors import Task
from ..stages._kernel_choice import goes_packed
from ..stages._table import STAGES, versions
from ._matched_sizes import narrowed, widened
from ._plan import Plan, at_checkpoint
from ._tables import (
    ActivationSettings,
    AttackSettings,
    CertifySettings,
    ExactSettings,
    LipschitzSettings,
    PruningSettings,
    ShippedSettings,
)

# A task and its record take about a kilobyte of the driver's memory each.
MAX_TASKS = 500_000
# "package.module:name", and not the structure "2:4" or a file called "a:b.safetensors".
USERS_NAME = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*")
# What keys were first made with, and so are for ever: the package's version is no part of what a result depends on.
FIRST_KEYS = "0.1.0"
# Types of device that records may come from.
DEVICES = ("cpu", "cuda", "mps", "xpu")


@dataclass(frozen=True)
class DataFacts:
    """Hold what keys and network sizes need to know of a data set."""

    hash: str
    test: int
    valid: int
    shape: tuple[int, ...]
    classes: int

    @staticmethod
    def of(dataset: Dataset) -> DataFacts:
        """Take the facts of a data set."""
        shape = tuple(dataset.train.x.shape[1:])
        return DataFacts(content_hash(dataset), len(dataset.test.x), len(dataset.valid.x), shape, dataset.classes)


@dataclass
class Work:
    """Collect tasks by key (shared ones once, parents first) and cells.

    `code` holds hashes of users' code by the name it goes by in plans, so that a key changes when the code does.
    """

    device: str = "cpu"
    code: dict[str, str] = field(default_factory=dict)
    tasks: dict[str, Task] = field(default_factory=dict)
    cells: list[Cell] = field(default_factory=list)

    def add(self, stage: str, inputs: dict[str, Any], *parents: str) -> str:
        """Add a task unless its equal is there, and return its key."""
        inputs = {**inputs, "parents": list(parents)} if parents else inputs
        code = {name: self._code_of(name) for name in sorted(_users_names(inputs))}
        inputs = {**inputs, "code": code} if code else inputs
        key = _key(stage, versions(stage, inputs)[-1], inputs, torch.__version__, self.device.split(":")[0])
        self.tasks.setdefault(key, Task(key, stage, inputs, parents))
        return key

    def _code_of(self, name: str) -> str:
        if name not in self.code:
            self.code[name] = code_hash(name)
        return self.code[name]


def _users_names(value: Any) -> set[str]:
    """Return every "package.module:name" among the values of nested inputs."""
    if isinstance(value, dict):
        return set().union(*map(_users_names, value.values()))
    return {value} if isinstance(value, str) and USERS_NAME.fullmatch(value) else set()


def _key(stage: str, version: int | str, inputs: dict[str, Any], torch: str, device: str) -> str:
    """Return the hash of what a result depends on; versions of stages and attacks say when sparring changed it."""
    identity = {
        "stage": stage,
        "version": version,
        "inputs": inputs,
        "sparring": FIRST_KEYS,
        "torch": torch,
        "device": device,
    }
    return sha256_bytes(canonical_json(identity).encode())[:32]


def is_key_of(key: str, stage: str, inputs: dict[str, Any], environment: dict[str, Any]) -> bool:
    """Say whether a record's key is the hash of what it says it was made from, by any version of its stage."""
    return stage in STAGES and any(
        key == _key(stage, version, inputs, str(environment.get("torch")), device)
        for version in versions(stage, inputs)
        for device in DEVICES
    )


def lay_out(plan: Plan, data: DataFacts, *, device: str = "cpu", code: Mapping[str, str] | None = None) -> Work:
    """Return every task and cell of a plan, parents before children; raise PlanError if they are too many to hold.

    `code` gives hashes of users' code that cannot be imported by the name it has in the plan.
    """
    _refuse_endless(plan, data)
    work = Work(device, dict(code or {}))
    if plan.linear:
        _linear(work, plan, data)
        return work
    for seed in range(plan.seeds):
        _Seed(work, plan, data, seed).lay_out()
    return work


def _linear(work: Work, plan: Plan, data: DataFacts) -> None:
    """Lay out one task for each loss and group of classes; a cell's seed counts the groups."""
    for paths in plan.linear:
        chosen = asdict(paths)
        for seed, group in enumerate(paths.groups(data.classes)):
            inputs = {"data": data.hash, "model": {"name": "linear"}, **chosen, "classes": list(group)}
            name = " and ".join(map(str, group)) if len(group) == 2 else f"{len(group)} classes"
            tasks = (work.add("linear", inputs),)
            work.cells.append(Cell(seed, f"{paths.loss}, {name}", 0.0, "weights", "linear", "final", tasks))


def _refuse_endless(plan: Plan, data: DataFacts) -> None:
    grids: list[tuple[float | None, ...]] = [p.grid(plan.sparsities) for p in plan.pruning]
    grids += [a.levels for a in plan.activation]
    cells = plan.seeds * (2 + sum(map(len, grids))) * len(plan.checkpoints)
    images = {"test": data.test, "valid": data.valid}
    attacks = sum(
        max(1, len(a.eps)) * math.ceil(min(a.images, images[a.split]) / plan.shard)
        for a in (*plan.attacks, *plan.transfer, *plan.transfer)
    )
    if cells * (2 + attacks) > MAX_TASKS:
        raise PlanError(
            f"the plan has about {cells * (2 + attacks)} tasks, more than the {MAX_TASKS} that fit one study; "
            "raise shard, or divide it into several plans and merge their folders"
        )


class _Seed:
    """Lay out one seed's networks, all made from one dense network, and their judgement."""

    def __init__(self, work: Work, plan: Plan, data: DataFacts, seed: int) -> None:
        self.work, self.plan, self.data, self.seed = work, plan, data, seed
        self.model = {name: value for name, value in _known(asdict(plan.model)).items() if name != "weights"}

    def lay_out(self) -> None:
        dense = self._given() or self._train(self.model, self.plan.recipe.weight_decay)
        control = self._prune(self.model, dense, None, 0.0)
        self._judge("reference", 0.0, "reference", dense)
        self._judge("control", 0.0, "control", dense, control)
        kinds = {p.label: pruning_kind(p.score, p.method, p.structure) for p in self.plan.pruning}
        pruned = {
            (pruning.label, sparsity): self._prune(self.model, dense, pruning, sparsity)
            for pruning in self.plan.pruning
            if self._included(pruning.seeds)
            for sparsity in sorted(pruning.grid(self.plan.sparsities), key=lambda s: s or 0.0)
        }
        for (label, sparsity), key in pruned.items():
            extra = self._transfers(label, sparsity, control, key)
            self._judge(label, sparsity, kinds[label], dense, key, *extra)
        for activation in self.plan.activation:
            if self._included(activation.seeds):
                self._activate(activation, dense, control)
        if self._included(self.plan.controls.seeds):
            self._controls()

    def _included(self, seeds: int | None) -> bool:
        return seeds is None or self.seed < seeds

    def _shared(self, model: dict[str, Any]) -> dict[str, Any]:
        return {"data": self.data.hash, "model": model}

    def _given(self) -> str | None:
        """Add the task that loads the user's weights, if the plan names some: one dense network for all seeds."""
        file = self.plan.model.weights
        if file is None:
            return None
        weights = {"file": str(Path(file).absolute()), "sha256": sha256_file(file)}
        return self.work.add("train", {**self._shared(self.model), "weights": weights})

    def _training(self, *, ramp: float | None = None) -> dict[str, Any]:
        """Return the plan's loss, without a ramp as for fine-tuning; where there is none, keys know of none."""
        table = asdict(replace(self.plan.training, ramp=ramp))
        return {name: value for name, value in table.items() if value is not None}

    def _train(self, model: dict[str, Any], decay: float) -> str:
        recipe = replace(self.plan.recipe, weight_decay=decay)
        training = self._training(ramp=self.plan.training.ramp)
        inputs = {"recipe": asdict(recipe), "training": training, "seed": self.seed}
        return self.work.add("train", {**self._shared(model), **inputs})

    def _prune(
        self,
        model: dict[str, Any],
        parent: str,
        pruning: PruningSettings | None,
        sparsity: float | None,
        decay: float | None = None,
    ) -> str:
        recipe = self.plan.finetune if decay is None else replace(self.plan.finetune, weight_decay=decay)
        inputs = {
            **self._shared(model),
            "recipe": asdict(recipe),
            "training": self._training(),
            "pruning": _method(pruning),
            "sparsity": sparsity,
            "seed": self.seed,
        }
        if pruning is not None and self.plan.training.loss != "standard":
            inputs["best"] = "as sparse as the last"  # once it was of any sparsity; only these networks are made anew
        return self.work.add("prune", inputs, parent)

    def _activate(self, activation: ActivationSettings, dense: str, control: str) -> None:
        fitted = activation.train or activation.kind == "l1-penalty"
        for level in sorted(activation.levels):
            named = {"kind": activation.kind, "level": level}
            part = {"activation": named if activation.test else {**named, "test": False}}
            inputs = {
                **self._shared(self.model),
                **part,
                "recipe": asdict(self.plan.finetune) if fitted else None,
                "training": self._training(),
                "seed": self.seed,
            }
            key = self.work.add("activate", inputs, dense if fitted else control)
            self._judge(activation.label, level, "activations", key, extra=part, surrogate=control)

    def _controls(self) -> None:
        controls, first = self.plan.controls, self.plan.first_to_a_sparsity
        if controls.decays:
            candidates = [
                self._prune(self.model, self._train(self.model, decay), None, 0.0, decay) for decay in controls.decays
            ]
            chosen = self.work.add("choose", {**self._shared(self.model), "decays": list(controls.decays)}, *candidates)
            self._judge("tuned decay", 0.0, "tuned decay", chosen)
        for sparsity in controls.small_dense:
            model = narrowed(self.model, self.data.shape, self.data.classes, sparsity)
            if model is not None:
                dense = self._train(model, self.plan.recipe.weight_decay)
                made = self._prune(model, dense, None, 0.0)
                self._judge("small dense", sparsity, "small dense", made, model=model)
        for sparsity in controls.wide_sparse:
            model = widened(self.model, self.data.shape, self.data.classes, sparsity)
            dense = self._train(model, self.plan.recipe.weight_decay)
            made = self._prune(model, dense, first, sparsity)
            self._judge("wide sparse", sparsity, "wide sparse", made, model=model)

    def _transfers(self, label: str, sparsity: float | None, control: str, key: str) -> list[str]:
        """Attack the control and try the images on the sparse network, and the other way round."""
        keys = []
        for attack in self.plan.transfer:
            if self._applies(attack, label, sparsity):
                for inputs in self._attack_inputs(self._shared(self.model), attack):
                    keys.append(self.work.add("transfer", {**inputs, "direction": "to sparse"}, control, key))
                    keys.append(self.work.add("transfer", {**inputs, "direction": "to dense"}, key, control))
        return keys

    def _judge(
        self,
        method: str,
        sparsity: float | None,
        kind: Kind,
        *tasks: str,
        model: dict[str, Any] | None = None,
        extra: dict[str, Any] | None = None,
        surrogate: str | None = None,
    ) -> None:
        """Add everything that measures and attacks the network that the last task made, and its cell."""
        shared = {**self._shared(model or self.model), **(extra or {})}
        made = [t for t in tasks if self.work.tasks[t].stage != "transfer"][-1]
        axis: Literal["weights", "activations"] = "activations" if kind == "activations" else "weights"
        for checkpoint in self.plan.checkpoints:
            part = shared if checkpoint == "final" else {**shared, "checkpoint": checkpoint}
            label = at_checkpoint(method, checkpoint)
            removed = 0.0 if kind == "small dense" else sparsity
            keys = (*tasks, *self._judgements(part, label, sparsity, removed, made, surrogate))
            self.work.cells.append(Cell(self.seed, label, sparsity, axis, kind, checkpoint, keys))

    def _judgements(
        self,
        shared: dict[str, Any],
        method: str,
        sparsity: float | None,
        removed: float | None,
        made: str,
        surrogate: str | None,
    ) -> list[str]:
        """Return the tasks that judge a network, of whose weights a share was `removed`."""
        keys = [self.work.add("measure", shared, made)]
        for attack in self.plan.attacks:
            if self._applies(attack, method, sparsity) and not (attack.naive and surrogate is None):
                packed = surrogate is None and goes_packed(self.plan.kernels, shared["model"], removed, attack)
                extra = {"kernels": "packed"} if packed and self.work.device == "cpu" else {}
                for inputs in self._attack_inputs({**shared, **extra}, attack):
                    loans = [] if surrogate is None or attack.naive else [self._lend(inputs, surrogate)]
                    keys += [*loans, self.work.add("attack", inputs, made, *loans)]
        keys += [self.work.add(stage, {**shared, **inputs}, made) for stage, inputs in self._proofs(method, sparsity)]
        if self.plan.deploy:
            keys.append(self.work.add("deploy", {**shared, "images": min(256, self.data.test)}, made))
        for shipped in self.plan.shipped:
            if self._applies(shipped, method, sparsity):
                keys.append(self.work.add("ship", {**shared, **self._shipment(shipped)}, made))
        return keys

    def _lend(self, inputs: dict[str, Any], surrogate: str) -> str:
        """Add the same attack on a surrogate, whose examples all networks of a seed are lent."""
        own = ("activation", "checkpoint", "gallery")
        return self.work.add("lend", {name: value for name, value in inputs.items() if name not in own}, surrogate)

    def _shipment(self, shipped: ShippedSettings) -> dict[str, Any]:
        """Return what a comparison of network and artefact depends on."""
        judge, images = shipped.judge, min(shipped.images, self.data.test)
        return {
            "values": shipped.values,
            "images": images,
            "attack": {"name": judge.name, "norm": judge.norm, "eps": shipped.eps, **judge.settings()},
            "decisions": shipped.decisions,
            "certify": [
                {"norm": one.norm, "method": one.method, "images": min(one.images, images)} for one in self.plan.certify
            ],
        }

    def _proofs(self, method: str, sparsity: float | None) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield stage and inputs of every certificate, Lipschitz constant and exact distance of a cell."""
        for certify in self.plan.certify:
            if self._applies(certify, method, sparsity):
                yield "certify", _asked(certify, self.data.test)
        for lipschitz in self.plan.lipschitz:
            if self._applies(lipschitz, method, sparsity):
                yield "lipschitz", _asked(lipschitz, self.data.test)
        for exact in self.plan.exact:
            if self._included(exact.seeds) and (exact.sparsities is None or sparsity in exact.sparsities):
                yield "exact", _asked(exact, self.data.test)

    def _applies(
        self,
        table: AttackSettings | CertifySettings | LipschitzSettings | ShippedSettings,
        method: str,
        sparsity: float | None,
    ) -> bool:
        if not self._included(table.seeds) or (table.methods is not None and method not in table.methods):
            return False
        return table.sparsities is None or sparsity == 0.0 or sparsity in table.sparsities

    def _attack_inputs(self, shared: dict[str, Any], attack: AttackSettings) -> list[dict[str, Any]]:
        """Return the inputs of one task for each budget and shard. Shards belong to the plan, never to the workers."""
        plan = self.plan
        images = min(attack.images, self.data.test if attack.split == "test" else self.data.valid)
        naive = {"naive": True} if attack.naive else {}
        return [
            {
                **shared,
                "attack": {"name": attack.name, "norm": attack.norm, "eps": eps, **attack.settings(), **naive},
                "split": attack.split,
                "start": start,
                "stop": min(start + plan.shard, images),
                "batch_size": plan.batch_size,
                "gallery": plan.gallery if start == 0 and attack.split == "test" else 0,
                "seed": self.seed,
            }
            for eps in attack.eps or (None,)
            for start in range(0, images, plan.shard)
        ]


def _asked(proof: CertifySettings | ExactSettings | LipschitzSettings, images: int) -> dict[str, Any]:
    """Return what a proof depends on: everything but which cells it is for."""
    options = {k: v for k, v in asdict(proof).items() if k not in ("seeds", "methods", "sparsities")}
    return {**options, "images": min(proof.images, images)}


def _method(pruning: PruningSettings | None) -> dict[str, Any] | None:
    """Return what a pruning method depends on: everything but its name and the grid it is run at."""
    if pruning is None:
        return None
    return _known({k: v for k, v in asdict(pruning).items() if k not in ("label", "sparsities", "seeds")})


def _known(options: dict[str, Any]) -> dict[str, Any]:
    """Drop options that are not set, so that a new option leaves old keys as they were."""
    return {name: value for name, value in options.items() if value is not None}
