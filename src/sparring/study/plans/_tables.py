"""The tables of a plan: settings of networks, pruning, attacks, proofs and controls."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from ...attacks import ATTACKS, facts_of
from ...attacks import Attack as AttackFunction
from ...bounds import BOUNDS, LIPSCHITZ
from ...errors import PlanError, UnknownNameError, UserError
from ...models import MODELS
from ...plugins import check_options, look_up, takes
from ...sparsity import ACTIVATIONS, PruningSpec
from ...threat import Threat
from ...units import norm_name, parse_eps, parse_norm

# Parameters of every attack, and keys of an attack's table besides its options.
_CONTRACT = ("model", "x", "y", "norm", "eps", "targets", "generator", "name", "naive", "label")
_COUNTS = ("steps", "restarts", "queries")
_MOST = 10_000_000
_RANGES = {  # of the other options of our own attacks
    **dict.fromkeys(("classes", "candidates", "searches", "draws", "starts", "patience"), (1, _MOST)),
    "polish": (0, _MOST),
    **dict.fromkeys(("share", "gamma"), (1e-6, 1)),
    **dict.fromkeys(
        ("step_size", "learning_rate", "start_constant", "start_radius", "sigma", "precision"), (1e-9, 1e9)
    ),
    **dict.fromkeys(("confidence", "overshoot", "threshold"), (0, 1e9)),
}
MOST_NODES = 1_000_000_000


@dataclass(frozen=True)
class NetworkSettings:
    """Name a model and its size; options that do not apply to it are refused.

    `weights` is a safetensors file: its network replaces the dense one that would be trained from each seed.
    """

    name: str = "lenet-300-100"
    width: float | None = None
    widths: tuple[int, ...] | None = None
    depth: int | None = None
    weights: str | None = None

    def __post_init__(self) -> None:
        if self.name not in MODELS and ":" not in self.name:
            raise UnknownNameError("model", self.name, MODELS)
        in_range("model.width", 1.0 if self.width is None else self.width, 1e-3, 64)
        in_range("model.depth", 1 if self.depth is None else self.depth, 1, 1000)
        in_range("the number of model.widths", len(self.widths or (1,)), 1, 100)
        for width in self.widths or ():
            in_range("a width in model.widths", width, 1, 100_000)


@dataclass(frozen=True)
class TrainingSettings:
    """Choose the loss: plain cross-entropy, PGD adversarial training, TRADES, IBP or CROWN-IBP (eps in [0, 1]).

    `label_smoothing` is the fraction of each label that is spread over all classes. `ramp` is the fraction of a dense
    network's training over which eps grows to its value; fine-tuning uses the full eps. `kappa` is the weight of the
    clean loss at the end of certified training, `stability` the weight of its loss on ReLUs that may change sign.
    """

    loss: Literal["standard", "pgd-at", "trades", "ibp", "crown-ibp"] = "standard"
    eps: float = 0.1
    norm: Literal["linf", "l2"] = "linf"
    steps: int = 7
    beta: float = 6.0
    ramp: float | None = None
    label_smoothing: float | None = None
    kappa: float | None = None
    stability: float | None = None

    @property
    def certified(self) -> bool:
        """Whether the loss is on certified bounds."""
        return self.loss in ("ibp", "crown-ibp")

    def __post_init__(self) -> None:
        in_range("training.label_smoothing", self.label_smoothing or 0.0, 0, 0.99)
        Threat(parse_norm(self.norm), self.eps)
        if self.loss != "standard" and self.eps == 0:
            raise PlanError(f"training: {self.loss} needs an eps above 0")
        in_range("training.steps", self.steps, 1, 10_000)
        in_range("training.beta", self.beta, 0, 1e6)
        if self.ramp is not None and not 0 < self.ramp <= 1:
            raise PlanError(f"training: ramp is a fraction of the training, above 0 and at most 1, not {self.ramp}")
        if self.ramp is not None and self.loss == "standard":
            raise PlanError("training: the standard loss has no eps, so ramp has no effect; remove it")
        in_range("training.kappa", self.kappa or 0.0, 0, 1)
        in_range("training.stability", self.stability or 0.0, 0, 1e6)
        if not self.certified and (self.kappa is not None or self.stability is not None):
            raise PlanError("training: kappa and stability need the loss ibp or crown-ibp; remove them")
        if self.certified and (self.norm != "linf" or self.label_smoothing):
            raise PlanError("training: ibp and crown-ibp need the norm linf and do not support label_smoothing")


@dataclass(frozen=True)
class PruningSettings(PruningSpec):
    """Prune by one method at the plan's sparsities, or at its own, for all seeds or the first few.

    Surgery with `c_rate` determines its own sparsity, and so does a table with `layers`: one network per seed.
    """

    label: str = ""
    sparsities: tuple[float, ...] | None = None
    seeds: int | None = None

    def __post_init__(self) -> None:
        _check_narrowing("pruning", self.seeds, sparsities=self.sparsities)

    @property
    def title(self) -> str:
        """The label, or else a description of the method."""
        return self.label or " ".join(part for part in (self.method, self.score, self.structure) if part)

    def spec(self) -> PruningSpec:
        """Return the settings of the method: everything but its name and its sparsities."""
        return PruningSpec(**{field.name: vars(self)[field.name] for field in dataclasses.fields(PruningSpec)})

    @property
    def ends_by_itself(self) -> bool:
        """Whether the table determines its sparsity itself."""
        return self.c_rate is not None or self.layers is not None

    def grid(self, sparsities: tuple[float, ...]) -> tuple[float | None, ...]:
        """Return the requested sparsities, given the plan's; None: the method determines them."""
        if self.ends_by_itself:
            return (None,)
        return sparsities if self.sparsities is None else self.sparsities


@dataclass(frozen=True, kw_only=True)
class Narrowed:
    """Narrow the cells of a table to the first `seeds`, to `methods` and to `sparsities` besides 0; None: all.

    Methods are called by their labels, "control" and "reference" among them.
    """

    heading: ClassVar[str]
    seeds: int | None = None
    methods: tuple[str, ...] | None = None
    sparsities: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        _check_narrowing(self.heading, self.seeds, methods=self.methods, sparsities=self.sparsities)

    def applies(self, seed: int, method: str, sparsity: float | None) -> bool:
        """Return whether the table is for a cell."""
        if not included(self.seeds, seed) or (self.methods is not None and method not in self.methods):
            return False
        return self.sparsities is None or sparsity == 0.0 or sparsity in self.sparsities


@dataclass(frozen=True)
class AttackSettings(Narrowed):
    """Attack `images` images of a split; `eps` lists budgets (none: a minimum-norm attack).

    `naive` attacks sparse activations without the straight-through backward pass and without transfer, to show their
    effect. `options` are the attack's own, by the names in its signature; `steps`, `restarts` and `queries` may be
    given directly.
    """

    heading = "attacks"
    name: str
    norm: Literal["linf", "l2", "l1", "l0"] = "linf"
    eps: tuple[float, ...] = ()
    images: int = 1000
    split: Literal["test", "valid"] = "test"
    steps: int | None = None
    restarts: int | None = None
    queries: int | None = None
    options: Mapping[str, Any] | None = None
    naive: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for option in _COUNTS:
            if getattr(self, option) is not None and option in (self.options or {}):
                raise PlanError(f"attack '{self.name}': {option} is given twice, alone and in options; remove one")

    def settings(self) -> dict[str, Any]:
        """Return the attack's own options that the plan sets."""
        counts = {name: value for name in _COUNTS if (value := getattr(self, name)) is not None}
        return counts | dict(self.options or {})


@dataclass(frozen=True)
class CertifySettings(Narrowed):
    """Compute certified radii of the first `images` attacked images, and certified accuracy at eps."""

    heading = "certify"
    images: int = 200
    norm: Literal["linf", "l2"] = "linf"
    method: str = "crown"
    eps: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.method not in BOUNDS:
            raise UnknownNameError("certify.method", self.method, BOUNDS)
        super().__post_init__()
        in_range("certify.images", self.images, 1, 1_000_000)
        for eps in self.eps:
            Threat(parse_norm(self.norm), eps)
            if not eps > 0:
                raise PlanError("certify: certified accuracy at eps 0 is the plain accuracy; give an eps above 0")


@dataclass(frozen=True)
class LipschitzSettings(Narrowed):
    """Compute margins and local Lipschitz constants over balls of `radius` around the first `images` images."""

    heading = "lipschitz"
    radius: float
    images: int = 200
    norm: Literal["linf", "l2"] = "linf"
    method: str = "jacobian"

    def __post_init__(self) -> None:
        if self.method not in LIPSCHITZ:
            raise UnknownNameError("Lipschitz method", self.method, LIPSCHITZ)
        super().__post_init__()
        in_range("lipschitz.images", self.images, 1, 1_000_000)
        in_range("lipschitz.radius", self.radius, 1e-9, 1e6)


@dataclass(frozen=True)
class ExactSettings:
    """Compute exact distances of the first `images` images, within `nodes` sub-problems each, at the given sparsities.

    `seconds` per image are a cap: a record in which a search reached it depends on the machine, and is flagged. Without
    `nodes` there is no other limit; without sparsities, all are searched.
    """

    images: int = 10
    norm: Literal["linf", "l2"] = "linf"
    nodes: int | None = None
    seconds: float = 60.0
    seeds: int | None = 1
    sparsities: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        _check_narrowing("exact", self.seeds, sparsities=self.sparsities)
        in_range("exact.images", self.images, 1, 1_000_000)
        in_range("exact.seconds", self.seconds, 1e-3, 1e7)
        in_range("exact.nodes", 1 if self.nodes is None else self.nodes, 1, MOST_NODES)

    def applies(self, seed: int, method: str, sparsity: float | None) -> bool:
        """Return whether the table is for a cell."""
        return included(self.seeds, seed) and (self.sparsities is None or sparsity in self.sparsities)


@dataclass(frozen=True)
class VerifySettings(Narrowed):
    """Verify that the label is the same in the whole eps-ball around each of the first `images` images.

    Interval arithmetic comes first, then α-CROWN, then a search of `nodes` sub-problems per image. `seconds` per image
    are a cap: a record in which a search reached it depends on the machine, and is flagged.
    """

    heading = "verify"
    eps: float
    images: int = 200
    norm: Literal["linf", "l2"] = "linf"
    nodes: int = 2000
    seconds: float = 600.0

    def __post_init__(self) -> None:
        super().__post_init__()
        Threat(parse_norm(self.norm), self.eps)
        in_range("verify.images", self.images, 1, 1_000_000)
        in_range("verify.nodes", self.nodes, 0, MOST_NODES)
        in_range("verify.seconds", self.seconds, 1e-3, 1e7)


@dataclass(frozen=True)
class ShippedSettings(Narrowed):
    """Compare the artefact that would be shipped with its network: accuracy, robustness and certificates.

    Its weights are rounded to `values`, and with activations = "int8" it computes in integers, calibrated on validation
    images; such an artefact is not certified. The first `images` images that attacks use are attacked by `attack` at
    eps, on the network and on the artefact, and some of them by HopSkipJump with `decisions` steps (0: not) on the
    artefact.
    The plan's [[certify]] tables are computed again for these images.
    """

    heading = "shipped"
    values: Literal["fp32", "fp16", "int8"] = "int8"
    activations: Literal["fp32", "int8"] = "fp32"
    images: int = 200
    attack: str = "pgd"
    norm: Literal["linf", "l2"] = "linf"
    eps: float = 0.1
    steps: int | None = None
    decisions: int = 5
    seeds: int | None = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        in_range("shipped.images", self.images, 1, 100_000)
        in_range("shipped.decisions", self.decisions, 0, 100)
        if self.activations == "int8" and self.values != "int8":
            raise PlanError(f"[[shipped]] activations = 'int8' needs values = 'int8', not '{self.values}'")

    @property
    def judge(self) -> AttackSettings:
        """Return the attack as an [[attacks]] table."""
        return AttackSettings(self.attack, norm=self.norm, eps=(self.eps,), images=self.images, steps=self.steps)


@dataclass(frozen=True)
class ActivationSettings:
    """Make the dense control's activations sparse at each level; with `train`, fine-tune the dense network with them.

    `kind` names a module that replaces every ReLU, or "l1-penalty" (in training, weighted by `level`). Without `test`,
    the module is used in training only, and the evaluated network has its ReLUs again.
    """

    kind: str
    levels: tuple[float, ...]
    label: str = ""
    train: bool = False
    test: bool = True
    seeds: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in ACTIVATIONS and self.kind != "l1-penalty":
            raise UnknownNameError("activation sparsity", self.kind, [*ACTIVATIONS, "l1-penalty"])
        if not (self.train or self.test):
            raise PlanError(f"activation '{self.kind}' is disabled in both training and tests; set train or test")
        _check_narrowing("activation", self.seeds, levels=self.levels)
        for level in self.levels:
            if self.kind in ACTIVATIONS:
                ACTIVATIONS[self.kind](level)  # raises for a level out of range
            else:
                in_range("a level of 'l1-penalty'", level, 0, 1e6)

    @property
    def title(self) -> str:
        """The label, or else the kind."""
        return self.label or self.kind


@dataclass(frozen=True)
class ControlSettings:
    """Add baselines for a fair comparison (design.md, section 6, trap 7).

    `decays` are weight decays of dense controls; validation accuracy chooses one of them. `small_dense` and
    `wide_sparse` list sparsities: a dense network with as many weights as the sparse one keeps, and a wider network
    that is pruned at this sparsity to as many weights as the dense one has.
    """

    decays: tuple[float, ...] = ()
    small_dense: tuple[float, ...] = ()
    wide_sparse: tuple[float, ...] = ()
    seeds: int | None = None

    def __post_init__(self) -> None:
        _check_narrowing("controls", self.seeds)
        for decay in self.decays:
            in_range("a decay in controls.decays", decay, 0, 10)
        for sparsity in (*self.small_dense, *self.wide_sparse):
            if not 0 < sparsity < 1:
                raise PlanError(f"controls: a sparsity is the fraction removed, above 0 and below 1; {sparsity} is not")


@dataclass(frozen=True)
class LinearPaths:
    """Train one loss with both penalties along `l1` and `l2`, and prune the best one by magnitude.

    `l1` and `l2` are inverse penalty strengths (scikit-learn's C), `magnitude` sparsities, `eps` budgets in linf. Every
    pair of `classes` (none: of all) is studied, and all classes at once. `train_images` and `images` limit the images
    for training and evaluation of a group. `tolerance` is the solver's.
    """

    loss: Literal["logistic", "svm"] = "logistic"
    l2: tuple[float, ...] = (1e-4, 1e-3, 1e-2, 1e-1)
    l1: tuple[float, ...] = (3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
    magnitude: tuple[float, ...] = (0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99)
    eps: tuple[float, ...] = (0.1,)
    classes: tuple[int, ...] | None = None
    images: int = 1000
    train_images: int = 12_000
    tolerance: float = 1e-4

    def __post_init__(self) -> None:
        if not self.l2 or not self.eps:
            raise PlanError("[[linear]] needs at least one l2 strength, for the dense classifier, and one eps")
        if any(value <= 0 for value in (*self.l2, *self.l1, *self.eps, self.tolerance)):
            raise PlanError("[[linear]]: strengths, eps and tolerance must be above 0")
        if not all(0 < sparsity < 1 for sparsity in self.magnitude):
            raise PlanError("[[linear]]: a sparsity is the fraction removed, above 0 and below 1")
        if self.images < 2 or self.train_images < 2:
            raise PlanError("[[linear]]: images and train_images must be 2 or more")
        if self.classes is not None and (len(set(self.classes)) != len(self.classes) or len(self.classes) < 2):
            raise PlanError("[[linear]]: classes must list two or more different classes")

    def groups(self, classes: int) -> list[tuple[int, ...]]:
        """Return all studied classes as one group, then every pair, of a data set with this number of classes.

        The largest group comes first, because it takes longest. Raise PlanError for classes that the data do not have.
        """
        chosen = tuple(sorted(self.classes or range(classes)))
        if chosen[-1] >= classes or chosen[0] < 0:
            raise PlanError(f"[[linear]]: classes are numbered 0 to {classes - 1}; the plan names {list(chosen)}")
        pairs: list[tuple[int, ...]] = list(itertools.combinations(chosen, 2))
        return pairs if len(chosen) == 2 else [chosen, *pairs]


def attack_named(name: str) -> AttackFunction:
    """Return an attack by its name in ATTACKS, or a user's own by "package.module:function".

    A user's that takes no `eps` looks for the smallest perturbation.
    """
    function: AttackFunction = look_up("attack", name, ATTACKS)
    try:
        budget = {"eps": None} if takes(function, "eps") else {}
        inspect.signature(function).bind(None, None, None, norm=0.0, targets=None, generator=None, **budget)
    except (TypeError, ValueError) as error:
        call = "attack(model, x, y, *, norm, eps, targets, generator)"
        raise UserError(f"'{name}' cannot be called as {call}: {error}") from error
    return function


def options_of(function: AttackFunction) -> list[str]:
    """Return the names of an attack's own options."""
    return [name for name in inspect.signature(function).parameters if name not in _CONTRACT]


def check_settings(name: str, function: AttackFunction, settings: Mapping[str, Any]) -> None:
    """Raise UserError for options that an attack does not have or that are out of range."""
    check_options(f"attack '{name}'", function, settings, reserved=_CONTRACT)
    ranges = dict.fromkeys(_COUNTS, (1, _MOST)) | (_RANGES if name in ATTACKS else {})
    for option in settings.keys() & ranges.keys():
        in_range(f"attack '{name}': {option}", settings[option], *ranges[option])


def check_attack(attack: AttackSettings) -> None:
    """Raise UserError for an unknown attack, a budget out of range, or an option that the attack does not have."""
    function = attack_named(attack.name)
    facts = facts_of(function)
    if attack.name in ATTACKS and facts.kind == "budget" and not attack.eps:
        raise PlanError(f"attack '{attack.name}' needs a budget; give eps, such as eps = [0.03] or eps = [\"8/255\"]")
    if attack.eps and not takes(function, "eps"):
        raise PlanError(f"attack '{attack.name}' is a minimum-norm attack and takes no eps; remove eps")
    if attack.norm not in facts.norms:
        raise PlanError(f"attack '{attack.name}' supports only {', '.join(facts.norms)}, not {attack.norm}")
    for eps in attack.eps:
        Threat(parse_norm(attack.norm), eps)
    in_range(f"attack '{attack.name}': images", attack.images, 1, 1_000_000)
    check_settings(attack.name, function, attack.settings())


def read_units(table: Any) -> Any:
    """Return a nested table with norms and budgets such as "L2" and "8/255" as plans store them."""
    if isinstance(table, list | tuple):
        return [read_units(item) for item in table]
    if not isinstance(table, dict):
        return table
    units = ("norm", "eps", "radius")
    read = {key: _read_unit(key, value) if key in units else read_units(value) for key, value in table.items()}
    read |= {"options": table["options"]} if "options" in table else {}  # a part's own options, with any names
    for name in ("attacks", "transfer", "certify", "linear"):
        for row in (row for row in read.get(name) or () if isinstance(row, dict)):
            row |= {"eps": [row["eps"]]} if isinstance(row.get("eps"), float) else {}
    return read


def _read_unit(key: str, value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_read_unit(key, item) for item in value]
    if not isinstance(value, str | int | float):
        return value
    return norm_name(parse_norm(value)) if key == "norm" else parse_eps(value)


def included(seeds: int | None, seed: int) -> bool:
    """Return whether a seed is among the first `seeds`; None: all are."""
    return seeds is None or seed < seeds


def _check_narrowing(table: str, seeds: int | None, **lists: tuple[Any, ...] | None) -> None:
    """Raise PlanError for settings that narrow a table to nothing: no seeds, or an empty list."""
    in_range(f"{table}.seeds", 1 if seeds is None else seeds, 1, 1000)
    for name, values in lists.items():
        if values is not None and not values:
            raise PlanError(f"{table}.{name} is empty, so it has no effect; remove it, or add some")


def in_range(name: str, value: float, low: float, high: float) -> None:
    """Raise PlanError unless a number is in its range."""
    if not low <= value <= high:
        raise PlanError(f"{name} must lie between {low} and {high}, not {value}")
