"""Turn a plan into cells and tasks. The key of a task is the hash of exactly its inputs."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

import torch

from ...data import Dataset, content_hash
from ...devices import CPU, DEVICES, Place
from ...errors import PlanError
from ...files import canonical_json, sha256_bytes, sha256_file
from ...models import hub_version, is_hub_name
from ...plugins import code_hash
from ...records import Cell, Kind, pruning_kind
from ..runner._executors import AnyTask, Task, whole_table
from ..stages import _inputs as stages
from ..stages._inputs import Adversary, Inputs, Judged, Network
from ..stages._kernel_choice import goes_packed
from ..stages._networks import narrowed, widened
from ..stages._table import STAGES, versions
from ._plan import BATCH_SIZE, Plan, at_checkpoint
from ._tables import ActivationSettings, AttackSettings, PruningSettings, ShippedSettings, TrainingSettings, included

# A task and its record take about a kilobyte of the driver's memory each.
MAX_TASKS = 500_000
# "package.module:name", and not the structure "2:4" or a file called "a:b.safetensors".
USERS_NAME = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*")
# The version in keys is fixed forever: results do not depend on the package's version.
FIRST_KEYS = "0.1.0"


@dataclass(frozen=True)
class DataFacts:
    """The facts of a data set on which keys and network sizes depend."""

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

    `code` has hashes of users' code by its name in plans, so that a key changes when the code does.
    """

    place: Place = CPU
    code: dict[str, str] = field(default_factory=dict)
    tasks: dict[str, AnyTask] = field(default_factory=dict)
    cells: list[Cell] = field(default_factory=list)

    def add(self, inputs: Inputs, *parents: str) -> str:
        """Add a task unless an equal one exists, and return its key."""
        own = inputs.table()
        code = {name: self._code_of(name) for name in sorted(_users_names(own))}
        table = whole_table(own, parents, code)
        version = versions(inputs.stage, table)[-1]
        key = _key(inputs.stage, version, table, torch.__version__, self.place.kind)
        if key not in self.tasks:
            self.tasks[key] = Task(key, inputs, parents, code)
        return key

    def _code_of(self, name: str) -> str:
        if name not in self.code:
            self.code[name] = hub_version(name) if is_hub_name(name) else code_hash(name)
        return self.code[name]


def _users_names(value: Any) -> set[str]:
    """Return every "package.module:name", and every network of a library, among the values of nested inputs."""
    if isinstance(value, dict):
        return set().union(*map(_users_names, value.values()))
    named = isinstance(value, str) and (USERS_NAME.fullmatch(value) or is_hub_name(value))
    return {value} if named else set()


def _key(stage: str, version: int | str, inputs: dict[str, Any], torch: str, device: str) -> str:
    """Return the hash of everything that a result depends on, including versions of stages and attacks."""
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
    """Return whether a record's key is the hash of its stated inputs, by any version of its stage."""
    return stage in STAGES and any(
        key == _key(stage, version, inputs, str(environment.get("torch")), device)
        for version in versions(stage, inputs)
        for device in (*DEVICES, *(f"{name} float64" for name in DEVICES))
    )


def lay_out(plan: Plan, data: DataFacts, *, place: Place = CPU, code: Mapping[str, str] | None = None) -> Work:
    """Return all tasks and cells of a plan, parents before children; raise PlanError if there are too many.

    `code` gives hashes of users' code that cannot be imported by its name in the plan.
    """
    _refuse_endless(plan, data)
    work = Work(place, dict(code or {}))
    if plan.linear:
        _linear(work, plan, data)
        return work
    for seed in range(plan.seeds):
        _Seed(work, plan, data, seed).lay_out()
    work.cells[:] = dict.fromkeys(work.cells)  # a plan may list a level or a checkpoint twice
    return work


def _linear(work: Work, plan: Plan, data: DataFacts) -> None:
    """Lay out one task for each loss and group of classes; a cell's seed counts the groups."""
    for paths in plan.linear:
        for seed, group in enumerate(paths.groups(data.classes)):
            model, chosen = Network(name="linear"), replace(paths, classes=group)
            name = " and ".join(map(str, group)) if len(group) == 2 else f"{len(group)} classes"
            tasks = (work.add(stages.Linear(data=data.hash, model=model, paths=chosen)),)
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
            "increase shard, or split the plan and merge the folders"
        )


class _Seed:
    """Lay out one seed's networks, all made from one dense network, and their evaluation."""

    def __init__(self, work: Work, plan: Plan, data: DataFacts, seed: int) -> None:
        self.work, self.plan, self.data, self.seed = work, plan, data, seed
        self.model = Network.of(plan.model)

    def lay_out(self) -> None:
        dense = self._given() or self._train(self.model, self.plan.recipe.weight_decay)
        control = self._prune(self.model, dense, None, 0.0)
        self._judge("reference", 0.0, "reference", dense)
        self._judge("control", 0.0, "control", dense, control)
        kinds = {p.title: pruning_kind(p.score, p.method, p.structure) for p in self.plan.pruning}
        pruned = {
            (pruning.title, sparsity): self._prune(self.model, dense, pruning, sparsity)
            for pruning in self.plan.pruning
            if included(pruning.seeds, self.seed)
            for sparsity in sorted(pruning.grid(self.plan.sparsities), key=lambda s: s or 0.0)
        }
        for (label, sparsity), key in pruned.items():
            extra = self._transfers(label, sparsity, control, key)
            self._judge(label, sparsity, kinds[label], dense, key, *extra)
        for activation in self.plan.activation:
            if included(activation.seeds, self.seed):
                self._activate(activation, dense, control)
        if included(self.plan.controls.seeds, self.seed):
            self._controls()

    def _given(self) -> str | None:
        """Add the task that loads the user's weights, if the plan names some: one dense network for all seeds."""
        file = self.plan.model.weights
        if file is None:
            return None
        weights = stages.WeightsFile(file=str(Path(file).absolute()), sha256=sha256_file(file))
        return self.work.add(stages.Given(data=self.data.hash, model=self.model, weights=weights))

    @property
    def _fine_tuning(self) -> TrainingSettings:
        """The plan's loss without its ramp."""
        return replace(self.plan.training, ramp=None)

    def _train(self, model: Network, decay: float) -> str:
        recipe, training = replace(self.plan.recipe, weight_decay=decay), self.plan.training
        inputs = stages.Train(data=self.data.hash, model=model, recipe=recipe, training=training, seed=self.seed)
        return self.work.add(inputs)

    def _prune(
        self,
        model: Network,
        parent: str,
        pruning: PruningSettings | None,
        sparsity: float | None,
        decay: float | None = None,
    ) -> str:
        under_attack = pruning is not None and self.plan.training.loss != "standard"
        inputs = stages.Prune(
            data=self.data.hash,
            model=model,
            recipe=self.plan.finetune if decay is None else replace(self.plan.finetune, weight_decay=decay),
            training=self._fine_tuning,
            pruning=None if pruning is None else pruning.spec(),
            sparsity=sparsity,
            seed=self.seed,
            best="as sparse as the last" if under_attack else None,
        )
        return self.work.add(inputs, parent)

    def _activate(self, activation: ActivationSettings, dense: str, control: str) -> None:
        fitted = activation.train or activation.kind == "l1-penalty"
        for level in sorted(activation.levels):
            module = stages.Activation(kind=activation.kind, level=level, test=activation.test)
            inputs = stages.Activate(
                data=self.data.hash,
                model=self.model,
                activation=module,
                recipe=self.plan.finetune if fitted else None,
                training=self._fine_tuning,
                seed=self.seed,
            )
            key = self.work.add(inputs, dense if fitted else control)
            self._judge(activation.title, level, "activations", key, activation=module, surrogate=control)

    def _controls(self) -> None:
        controls, first = self.plan.controls, self.plan.first_to_a_sparsity
        if controls.decays:
            candidates = [
                self._prune(self.model, self._train(self.model, decay), None, 0.0, decay) for decay in controls.decays
            ]
            inputs = stages.Choose(data=self.data.hash, model=self.model, decays=controls.decays)
            self._judge("tuned decay", 0.0, "tuned decay", self.work.add(inputs, *candidates))
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
        """Attack the control and try the examples on the sparse network, and vice versa."""
        keys, network = [], Judged(data=self.data.hash, model=self.model)
        for attack in self.plan.transfer:
            if attack.applies(self.seed, label, sparsity):
                for inputs in self._attacks(network, attack):
                    to_sparse = stages.Transfer(**vars(inputs), direction="to sparse")
                    keys.append(self.work.add(to_sparse, control, key))
                    keys.append(self.work.add(replace(to_sparse, direction="to dense"), key, control))
        return keys

    def _judge(
        self,
        method: str,
        sparsity: float | None,
        kind: Kind,
        *tasks: str,
        model: Network | None = None,
        activation: stages.Activation | None = None,
        surrogate: str | None = None,
    ) -> None:
        """Add all measurements and attacks of the last task's network, and its cell."""
        network = Judged(data=self.data.hash, model=model or self.model, activation=activation)
        made = [t for t in tasks if self.work.tasks[t].stage != "transfer"][-1]
        axis: Literal["weights", "activations"] = "activations" if kind == "activations" else "weights"
        for checkpoint in self.plan.checkpoints:
            label = at_checkpoint(method, checkpoint)
            removed = 0.0 if kind == "small dense" else sparsity
            part = replace(network, checkpoint=checkpoint)
            keys = tuple(dict.fromkeys((*tasks, *self._judgements(part, label, sparsity, removed, made, surrogate))))
            self.work.cells.append(Cell(self.seed, label, sparsity, axis, kind, checkpoint, keys))

    def _judgements(
        self,
        network: Judged,
        method: str,
        sparsity: float | None,
        removed: float | None,
        made: str,
        surrogate: str | None,
    ) -> list[str]:
        """Return the tasks that evaluate a network, of whose weights a share was `removed`."""
        keys = [self.work.add(stages.Measure(**vars(network)), made)]
        for attack in self.plan.attacks:
            if attack.applies(self.seed, method, sparsity) and not (attack.naive and surrogate is None):
                packed = surrogate is None and goes_packed(self.plan.kernels, network.model.name, removed, attack)
                for inputs in self._attacks(network, attack, packed=packed and self.work.place == CPU):
                    loans = [] if surrogate is None or attack.naive else [self._lend(inputs, surrogate)]
                    keys += [*loans, self.work.add(inputs, made, *loans)]
        keys += [self.work.add(inputs, made) for inputs in self._proofs(network, method, sparsity)]
        if self.plan.deploy:
            keys.append(self.work.add(stages.Deploy(**vars(network), images=min(256, self.data.test)), made))
        for shipped in self.plan.shipped:
            if shipped.applies(self.seed, method, sparsity):
                keys.append(self.work.add(self._shipment(network, shipped), made))
        return keys

    def _lend(self, inputs: stages.Attack, surrogate: str) -> str:
        """Add the same attack on a surrogate, whose examples are transferred to all networks of a seed."""
        return self.work.add(stages.Lend(**{f.name: vars(inputs)[f.name] for f in fields(stages.Lend)}), surrogate)

    def _shipment(self, network: Judged, shipped: ShippedSettings) -> stages.Ship:
        """Return the inputs of a comparison of network and artefact."""
        images = min(shipped.images, self.data.test)
        asked = self.plan.certify if shipped.activations == "fp32" else ()  # certificates are of real arithmetic
        proofs = [stages.Proof(norm=c.norm, method=c.method, images=min(c.images, images)) for c in asked]
        return stages.Ship(
            **vars(network),
            values=shipped.values,
            activations=shipped.activations,
            images=images,
            attack=_adversary(shipped.judge, shipped.eps),
            decisions=shipped.decisions,
            certify=tuple(proofs),
        )

    def _proofs(self, network: Judged, method: str, sparsity: float | None) -> Iterator[Inputs]:
        """Yield every certificate, Lipschitz constant, exact distance and verdict of a cell."""
        plan, shared = self.plan, vars(network)
        kinds: list[tuple[Any, tuple[Any, ...]]] = [
            (stages.Certify, plan.certify),
            (stages.Lipschitz, plan.lipschitz),
            (stages.Exact, plan.exact),
            (stages.Verify, plan.verify),
        ]
        for kind, tables in kinds:
            for table in tables:
                if table.applies(self.seed, method, sparsity):
                    yield kind(**shared, asked=replace(table, images=min(table.images, self.data.test)))

    def _attacks(self, network: Judged, attack: AttackSettings, *, packed: bool = False) -> list[stages.Attack]:
        """Return the inputs of one task for each budget and shard. Shards belong to the plan, never to the workers."""
        plan, size = self.plan, self.plan.batch_size
        images = min(attack.images, self.data.test if attack.split == "test" else self.data.valid)
        return [
            stages.Attack(
                **vars(network),
                attack=_adversary(attack, eps),
                split=attack.split,
                start=start,
                stop=min(start + plan.shard, images),
                batch_size=BATCH_SIZE if isinstance(size, str) else size,
                gallery=plan.gallery if start == 0 and attack.split == "test" else 0,
                seed=self.seed,
                kernels="packed" if packed else "torch",
            )
            for eps in attack.eps or (None,)
            for start in range(0, images, plan.shard)
        ]


def _adversary(attack: AttackSettings, eps: float | None) -> Adversary:
    return Adversary(name=attack.name, norm=attack.norm, eps=eps, options=attack.settings(), naive=attack.naive)
