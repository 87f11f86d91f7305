"""Pruners by name: build a pruner from a plan's or a command's settings."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from torch import nn

from ..errors import UnknownNameError, UserError
from ..matrices import is_transposed, matrices
from ..plugins import check_call, check_options, look_up
from ..tally import counts
from ..units import percent
from ._masks import Masks
from ._rule import Pruner, Rule
from ._scores import SCORES
from ._select import NM, SCOPES, Blocks, Channels, Inputs, LeftDenseWarning, Structure, Unstructured
from .methods._dns import dynamic_network_surgery
from .methods._gradual import bernoulli, gradual, iterative, one_shot, proximal
from .methods._movement_hydra import hydra, movement
from .methods._set_rigl import rigged_lottery, sparse_evolution

METHODS: dict[str, Callable[..., Pruner]] = {
    "one-shot": one_shot,
    "gradual": gradual,
    "iterative": iterative,
    "bernoulli": bernoulli,
    "proximal": proximal,
    "movement": movement,
    "hydra": hydra,
    "dns": dynamic_network_surgery,
    "set": sparse_evolution,
    "rigl": rigged_lottery,
}

STRUCTURES: dict[str, Structure] = {
    "unstructured": Unstructured(),
    "1:2": NM(1, 2),
    "1:4": NM(1, 4),
    "2:4": NM(2, 4),
    "4:8": NM(4, 8),
    "blocks-1x4": Blocks(1, 4),
    "blocks-4x1": Blocks(4, 1),
    "blocks-4x4": Blocks(4, 4),
    "inputs-4": Inputs(4),
    "channels": Channels(),
}

_RULE = ("scope", "structure", "floor", "spare", "spare_first", "spare_last")


@dataclass(frozen=True)
class PruningSpec:
    """Settings of pruning, as in a plan; None uses the default of the method.

    `method` is a name in METHODS or "package.module:factory" (sparsity -> Pruner); `score` a name in SCORES or
    "package.module:function" (a Score); `scope` one of SCOPES; `structure` a name in STRUCTURES; `layers` gives
    sparsities by weight name instead of one for all. The others are options of the method's function; those of a user's
    own factory are in `options`, by the names in its signature.
    """

    method: str = "gradual"
    score: str | None = None
    scope: str | None = None
    structure: str | None = None
    layers: Mapping[str, float] | None = None
    floor: float | None = None
    spare: tuple[str, ...] | None = None
    spare_first: bool | None = None
    spare_last: bool | None = None
    at: float | None = None
    start: float | None = None
    stop: float | None = None
    every: int | None = None
    rounds: int | None = None
    rewind: str | None = None
    rewind_at: float | None = None
    strength: float | None = None
    fraction: float | None = None
    rate: float | None = None
    momentum: float | None = None
    c_rate: float | Mapping[str, float] | None = None
    gamma: float | None = None
    power: float | None = None
    biases: bool | None = None
    options: Mapping[str, Any] | None = None


def build_pruner(spec: PruningSpec, sparsity: float | None) -> Pruner:
    """Make a new pruner (some have state: one per training) for a sparsity; None with `layers`, or "dns" with `c_rate`.

    Raises UserError for unknown names, for options that the method does not have, and for impossible combinations.
    """
    factory: Callable[..., Pruner] = look_up("pruning method", spec.method, METHODS)
    known = inspect.signature(factory).parameters
    if "sparsity" not in known:
        raise UserError(f"'{spec.method}' must accept the keyword 'sparsity' and return a pruner")
    options: dict[str, Any] = {
        field.name: value for field in fields(PruningSpec) if (value := getattr(spec, field.name)) is not None
    }
    del options["method"]
    _check_finite(options)
    own = options.pop("options", {})
    check_options(
        f"the pruning method '{spec.method}'", factory, own, reserved=("sparsity", "rule", "layers", *options)
    )
    rule = {name: options.pop(name) for name in _RULE if name in options}
    for name in (*options, *rule):
        if name not in known and not (name == "layers" or (name in rule and "rule" in known)):
            has = [option for option in known if option not in ("sparsity", "rule")] + list(_RULE) * ("rule" in known)
            raise UserError(f"the pruning method '{spec.method}' has no option '{name}'; it has: {', '.join(has)}")
    target = _target(spec, known, sparsity, options.pop("layers", None))
    if "score" in known:
        name = options.get("score", "magnitude")
        options["score"] = look_up("score", name, SCORES)
        check_call(f"the score '{name}'", options["score"], None, None, loss=None, generator=None)
    if rule:
        default = known["rule"].default  # methods with a different default allocation have one
        options["rule"] = _rule(default if isinstance(default, Rule) else Rule(), rule)
        _check_limit(options["rule"].structure, target)
    check_call(f"the pruning method '{spec.method}'", factory, sparsity=target, **options, **own)
    pruner = factory(sparsity=target, **options, **own)
    if not isinstance(pruner, Pruner):
        raise UserError(f"'{spec.method}' returned {type(pruner).__name__}, not a pruner (docs/extending.md)")
    return pruner


def _check_finite(options: Mapping[str, Any]) -> None:
    """Raise UserError for infinity and NaN, which pass most comparisons."""
    for name, value in options.items():
        for number in value.values() if isinstance(value, Mapping) else [value]:
            if isinstance(number, float) and not math.isfinite(number):
                raise UserError(f"pruning: {name} must be a finite number, not {number}")


def spared(spec: PruningSpec, model: nn.Module) -> PruningSpec:
    """Return settings that spare transposed convolutions, whose rows are inputs, from n:m and channels; say which."""
    structure = STRUCTURES.get(spec.structure or "unstructured")
    names = tuple(one.name for one in matrices(model) if is_transposed(one) and one.excuse is None)
    if not names or not isinstance(structure, NM | Channels):
        return spec
    text = f"{spec.structure} leaves {', '.join(map(repr, names))} dense: rows of transposed convolutions are inputs"
    warnings.warn(text, LeftDenseWarning, stacklevel=2)
    return replace(spec, spare=(*(spec.spare or ()), *names))


def _target(
    spec: PruningSpec,
    known: Mapping[str, inspect.Parameter],
    sparsity: float | None,
    layers: Mapping[str, float] | None,
) -> float | Mapping[str, float] | None:
    if layers is not None:
        if "Mapping" not in str(known["sparsity"].annotation):
            raise UserError(f"the pruning method '{spec.method}' takes one sparsity for the network, not one per layer")
        if spec.scope is not None:
            raise UserError(
                f"'layers' sets the sparsity of each layer, so the scope '{spec.scope}' has no effect; remove one"
            )
        if sparsity is not None:
            raise UserError(
                "'layers' sets the sparsity of each layer, so a sparsity of the network has no effect; remove one"
            )
        return layers
    if sparsity is None and spec.method != "dns":
        raise UserError(f"the pruning method '{spec.method}' needs a sparsity")
    if sparsity is not None and spec.method == "dns" and spec.c_rate is not None:
        raise UserError("surgery takes either a sparsity or 'c_rate'; give one of them")
    if sparsity is None and (spec.scope is not None or spec.floor is not None):
        raise UserError("surgery by 'c_rate' has a threshold for each layer, so 'scope' and 'floor' have no effect")
    return sparsity


def _rule(default: Rule, given: dict[str, Any]) -> Rule:
    scope = given.get("scope", default.scope)
    if scope not in SCOPES:
        raise UnknownNameError("scope", scope, SCOPES)
    name = given.get("structure", "unstructured")
    if name not in STRUCTURES:
        raise UnknownNameError("structure", name, STRUCTURES)
    if isinstance(STRUCTURES[name], NM) and scope == "erk":
        raise UserError(f"'{name}' fixes every layer's sparsity, so it cannot be allocated by 'erk'; use 'layer'")
    return Rule(**{**given, "scope": scope, "structure": STRUCTURES[name]})


def _check_limit(structure: Structure, target: float | Mapping[str, float] | None) -> None:
    if not isinstance(structure, NM) or target is None:
        return
    most, limit = max(target.values()) if isinstance(target, Mapping) else target, 1 - structure.n / structure.m
    if most > limit:
        raise UserError(
            f"{structure.n}:{structure.m} removes {percent(limit, 2)} of the weights and cannot reach "
            f"{percent(most, 2)}; request at most that"
        )


def covered(model: nn.Module, masks: Masks, structure: str | None) -> float | None:
    """Return the share of the weights of all matrices in layers that a structure n:m prunes; None for other ones."""
    if structure is None or not isinstance(STRUCTURES[structure], NM):
        return None
    weights = [mask for mask in masks.values() if mask.dim() > 1]
    return sum(mask.numel() for mask in weights if not mask.all()) / counts(model).matrices
