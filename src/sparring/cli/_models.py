"""`sparring train`, `prune` and `attack`: one model at a time."""

from __future__ import annotations

import copy
import sys
from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from .. import attacks, deploy
from ..data import Dataset, as_float
from ..errors import UnknownNameError, UserError
from ..files import CONVERT, load_tensors
from ..metrics import accuracy, distances, robust_accuracy
from ..models import MODELS, Blueprint, load_model, load_weights_, recipe_settings, save_model
from ..sparsity import Pruner, PruningSpec, all_ones, build_pruner, check_reached, counts
from ..statistics import binomial_interval
from ..study import (
    NetworkSettings,
    Plan,
    TrainingSettings,
    check_fit,
    chosen_images,
    configured,
    ramped_loss,
    refuse_constant,
    robust_score,
)
from ..threat import Threat
from ..train import EpochProgress, Fit, Recipe, fit, predict
from ..units import norm_name, percent
from ._loading import open_data
from ._printing import print_json
from ._study import duration

# How files end that hold a whole model: saved by us for further work, or packed for shipping.
SAVED, PACKED = (".safetensors", ".sparring"), ".sparring"

# Which table of a plan the options of --set belong to.
_PLACES: dict[type, str] = {Recipe: "recipe", PruningSpec: "pruning.0"}


def run_train(
    name: str,
    out: Path,
    data_name: str,
    overrides: tuple[str, ...],
    width: float | None,
    depth: int | None,
    loss: str,
    eps: float,
    ramp: float | None,
    seed: int,
    data_dir: Path | None,
    download: bool,
    *,
    quiet: bool,
) -> int:
    """Train a model and write it, under attack also its best epoch; an interrupted run goes on when run again.

    Raises UserError, with all written, when training ended at a network that answers one class.
    """
    training = _training(loss, eps, ramp)
    _settings(overrides, Recipe)  # refuses what cannot be, before data are read
    NetworkSettings(name, width=width, depth=depth)
    dataset = open_data(data_name, data_dir, download)
    blueprint = replace(_blueprint(name, dataset), width=width, depth=depth)
    recipe = _settings(overrides, Recipe, own=recipe_settings(name, channels=blueprint.shape[0])).recipe
    model = blueprint.build(seed=seed)
    check_fit(model, dataset)
    result = _fit(model, dataset, recipe, out, seed=seed, training=training, quiet=quiet)
    _finish(model, blueprint, dataset, result, eps, out)
    refuse_constant(model, dataset.valid)
    return 0


def run_prune(
    name: str,
    out: Path,
    sparsity: float | None,
    weights: Path | None,
    data_name: str,
    overrides: tuple[str, ...],
    loss: str,
    eps: float,
    seed: int,
    data_dir: Path | None,
    download: bool,
    *,
    quiet: bool,
) -> int:
    """Prune a model, fine-tune it and write it with its masks, under attack also its best epoch."""
    if name.endswith(PACKED):
        raise UserError("an artefact is for shipping and cannot be pruned further; prune the model it was made from")
    settings = _settings(overrides, PruningSpec, Recipe)
    pruning, training = settings.pruning[0], _training(loss, eps)
    pruner = build_pruner(pruning, sparsity)
    check_named(name, weights)
    dataset = open_data(data_name, data_dir, download)
    model, blueprint = open_model(name, weights, dataset, own_modes=True)
    own = recipe_settings(blueprint.name, channels=blueprint.shape[0], fine_tuning=True)
    recipe = _settings(overrides, PruningSpec, Recipe, own=own).recipe
    result = _fit(model, dataset, recipe, out, seed=seed, training=training, quiet=quiet, pruner=pruner)
    check_reached(pruner, result.masks, pruning.layers or sparsity)
    asked = None if pruning.layers else sparsity
    print(_removed(result.masks, pruner, model, as_float(dataset.test.x[:2]), asked))
    _finish(model, blueprint, dataset, result, eps, out)
    return 0


def _finish(model: nn.Module, blueprint: Blueprint, dataset: Dataset, result: Fit, eps: float, out: Path) -> None:
    """Write a network and say how good it is; beside it the best epoch's, where training under attack tells which."""
    save_model(out, model, blueprint, result.masks)
    if result.best_epoch is None:
        print(f"{_accuracies(model, dataset)}\nwrote {out}")
        return
    best, beside = copy.deepcopy(model), out.with_stem(f"{out.stem}-best")
    best.load_state_dict(result.best_state)
    save_model(beside, best, blueprint, {name: result.best_state[name] != 0 for name in result.masks})
    last = len(result.scores)
    for name, network, epoch, path in (("final", model, last, out), ("best", best, result.best_epoch, beside)):
        stands = f"{percent(result.scores[epoch - 1])} of validation images stand under PGD at eps {eps:g}"
        print(f"{name} epoch {epoch}: {_accuracies(network, dataset)}, {stands}\nwrote {path}")


def _removed(masks: dict[str, Tensor], pruner: Pruner, model: nn.Module, x: Tensor, asked: float | None) -> str:
    """Say how many weights went and what that is of all, biases and normalisation apart, and what surgery did."""
    weights, vectors = ([m for m in masks.values() if (m.dim() > 1) is wanted] for wanted in (True, False))
    (total, kept), (others, held) = (
        (sum(m.numel() for m in part), sum(int(m.sum()) for m in part)) for part in (weights, vectors)
    )
    text = f"removed {total - kept} of {total} weights ({percent(1 - kept / total, 2)})"
    found = counts(model, x)
    if found.left_out:
        text += f", {percent(found.matrix_sparsity, 2)} of all {found.matrices} weights of matrices; left dense: "
        text += ", ".join(f"'{name}' ({reason})" for name, reason in found.left_out.items())
    if asked is not None and 1 - kept / total < asked - 0.005:
        text += f"; the {percent(asked, 2)} asked for is of what the structure and spared layers leave open"
    text += f" and {others - held} of {others} biases and norms" if others else ""
    series = pruner.series()
    moved = {name: sum(series[name]) for name in ("pruned", "spliced") if name in series}
    return text + (f", having pruned {moved['pruned']} and spliced back {moved['spliced']}" if len(moved) == 2 else "")


def run_attack(
    name: str,
    weights: Path | None,
    data_name: str,
    attack_names: str,
    norm: float,
    budgets: tuple[float, ...],
    images: int,
    batch_size: int | None,
    seed: int,
    data_dir: Path | None,
    download: bool,
    checks: int,
    overrides: tuple[str, ...],
    *,
    as_json: bool,
) -> int:
    """Attack a model and print a row for each attack and budget, with the flags of `checks` images' second opinions."""
    chosen = _chosen(attack_names, overrides)
    for eps in budgets:
        Threat(norm, eps)  # refuses a budget in other units
    check_named(name, weights)
    dataset = open_data(data_name, data_dir, download)
    model, _ = open_model(name, weights, dataset)
    x, y = chosen_images(dataset, "test", 0, images)
    found = attacks.audit(
        model, as_float(x), y, chosen, norm=norm, eps=budgets, checks=checks, batch_size=batch_size, seed=seed
    )
    rows = [_row(one) for one in found]
    if as_json:
        print_json({"model": name, "data": dataset.name, "images": len(y), "results": rows})
    else:
        _print_rows(rows)
    return 0


def _chosen(names: str, overrides: tuple[str, ...]) -> dict[str, attacks.Attack]:
    chosen = list(dict.fromkeys(part.strip() for part in names.split(",") if part.strip()))
    if not chosen:
        raise UserError(f"--attacks takes names separated by commas, as fgsm,pgd; '{names}' holds none")
    return configured(chosen, overrides)


def _row(audited: attacks.AuditRow) -> dict[str, Any]:
    threat, result = audited.threat, audited.result
    right = result.clean_correct & ~result.success
    found = distances(result.distance, result.clean_correct)
    low, high = binomial_interval(int(right.sum()), len(right))
    minimum = threat.eps is None
    return {
        "attack": audited.attack,
        "norm": norm_name(threat.norm),
        "eps": threat.eps,
        "accuracy": float(result.clean_correct.double().mean()),
        "robust_accuracy": None if minimum else robust_accuracy(result.clean_correct, result.success),
        "interval": None if minimum else [low, high],
        "mean_distance": found.mean if minimum else None,
        "median_distance_correct": found.median_correct if minimum else None,
        "failed": found.failed if minimum else None,
        "forwards": result.forwards,
        "backwards": result.backwards,
        "seconds": result.seconds,
        "flags": [{"name": flag.name, "detail": flag.detail} for flag in result.flags],
    }


def _print_rows(rows: list[dict[str, Any]]) -> None:
    table = Table(box=None, header_style="bold")
    for heading in ("attack", "norm", "eps", "accuracy", "robust accuracy", "mean distance", "median", "seconds"):
        table.add_column(heading, justify="left" if heading in ("attack", "norm") else "right")
    for row in rows:
        robust = "–" if row["robust_accuracy"] is None else percent(row["robust_accuracy"])
        if row["interval"] is not None:
            robust += " [{}, {}]".format(*map(percent, row["interval"]))
        table.add_row(
            row["attack"],
            row["norm"],
            "–" if row["eps"] is None else f"{row['eps']:g}",
            percent(row["accuracy"]),
            robust,
            "–" if row["mean_distance"] is None else f"{row['mean_distance']:.4f}",
            "–" if row["median_distance_correct"] is None else f"{row['median_distance_correct']:.4f}",
            f"{row['seconds']:.1f}",
        )
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(table)
    for row in rows:
        for flag in row["flags"]:
            console.print(f"flag: {row['attack']}: {flag['name']}: {flag['detail']}", markup=False)


def open_model(
    name: str, weights: Path | None, dataset: Dataset, *, own_modes: bool = False
) -> tuple[nn.Module, Blueprint]:
    """Return a model and its blueprint from a model file, an artefact, a name with weights, or a user's factory.

    The model is in eval mode, or with `own_modes` in those of its factory, which may freeze parts of it. An artefact is
    attacked as it is shipped, on its kernels. Raise UserError if the model does not accept the data's images or has
    another number of classes.
    """
    check_named(name, weights)
    model: nn.Module
    if name.endswith(PACKED):
        model, blueprint = deploy.PackedModule(deploy.load(name)), _blueprint(name, dataset)
    elif name.endswith(SAVED):
        model, blueprint, _ = load_model(name)
    else:
        blueprint = _blueprint(name, dataset)
        model = blueprint.build()
        if weights is not None:
            load_weights_(model, _plain_weights(load_tensors(weights)))
    check_fit(model, dataset)
    if ":" in name and weights is None and _is_untrained(model, blueprint):
        what = "draws its weights at random: this is about an untrained network, unless you give --weights"
        print(f"warning: '{name}' {what}", file=sys.stderr)
    return model if own_modes else model.eval(), blueprint


def check_named(name: str, weights: Path | None) -> None:
    """Raise UserError, before data are read, for a model that cannot be opened: no such name or file, or no weights."""
    if name.endswith(SAVED) and weights is not None:
        raise UserError("a model file holds its weights; give either a model file or --weights")
    for file in (Path(name) if name.endswith(SAVED) else None, weights):
        if file is not None and not file.is_file():
            raise UserError(f"there is no file {file}; check the path")
    if name.endswith(SAVED) or ":" in name:
        return
    if Path(name).is_file():
        raise UserError(f"{name} is no model file of sparring's ({', '.join(SAVED)}); {CONVERT}")
    if name not in MODELS:
        raise UnknownNameError("model", name, MODELS)
    if weights is None:
        raise UserError(f"'{name}' names an architecture without weights; give --weights FILE or a model file")


def plain(model: nn.Module) -> nn.Module:
    """Return a model that can be looked into: of an artefact the same network, as rounded, in torch's own modules."""
    return model.equivalent if isinstance(model, deploy.PackedModule) else model


def _plain_weights(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in tensors.items() if not name.startswith("sparring/")}


def _is_untrained(model: nn.Module, blueprint: Blueprint) -> bool:
    """Return whether another seed gives other parameters: nothing trained is in them."""
    other = dict(blueprint.build(seed=1).named_parameters())
    return any(not torch.equal(value, other.get(name, value)) for name, value in model.named_parameters())


def _blueprint(name: str, dataset: Dataset) -> Blueprint:
    shape = tuple(dataset.train.x.shape[1:])
    return Blueprint(name, shape, dataset.classes, dataset.mean, dataset.std, data=dataset.name)


def _settings(
    overrides: tuple[str, ...],
    *tables: type[Recipe] | type[PruningSpec],
    own: Mapping[str, Any] = MappingProxyType({}),
) -> Plan:
    """Read KEY=VALUE options of a recipe and a pruning method into a plan, whose checks and messages then apply.

    `own` is the model's recipe, which the options change.
    """
    known = {field.name: _PLACES[table] for table in tables for field in fields(table)}
    for override in overrides:
        key = override.partition("=")[0].partition(".")[0]
        if key not in known:
            raise UnknownNameError("key of --set", key, known)
    base: dict[str, Any] = {"name": "settings", "pruning": [{}], "recipe": dict(own)}
    base["sparsities"] = [0.5]  # which every method and structure can reach: what is asked for is checked apart
    return Plan.from_table(
        base, overrides=tuple(f"{known[o.partition('=')[0].partition('.')[0]]}.{o}" for o in overrides)
    )


def _training(loss: str, eps: float, ramp: float | None = None) -> TrainingSettings:
    return Plan.from_table({"name": "settings", "training": {"loss": loss, "eps": eps, "ramp": ramp}}).training


def _fit(
    model: nn.Module,
    dataset: Dataset,
    recipe: Recipe,
    out: Path,
    *,
    seed: int,
    training: TrainingSettings,
    quiet: bool,
    pruner: Pruner | None = None,
) -> Fit:
    checkpoint, table = out.with_suffix(".checkpoint.safetensors"), asdict(training)
    result = fit(
        model,
        dataset.train.x,
        dataset.train.y,
        recipe,
        seed=seed,
        loss=ramped_loss(table),
        masks={} if pruner is None else all_ones(model),
        pruner=pruner,
        score=None if training.loss == "standard" else lambda m: robust_score(m, dataset.valid, table),
        checkpoint=checkpoint,
        progress=None if quiet else _show,
    )
    checkpoint.unlink(missing_ok=True)
    return result


def _show(progress: EpochProgress) -> None:
    end = "\r" if sys.stdout.isatty() and progress.epoch < progress.epochs else "\n"
    print(
        f"epoch {progress.epoch}/{progress.epochs}  loss {progress.loss:.4f}  {duration(progress.remaining)} left   ",
        end=end,
        flush=True,
    )


def _accuracies(model: nn.Module, dataset: Dataset) -> str:
    parts = []
    for name, split in (("validation", dataset.valid), ("test", dataset.test)):
        logits = predict(model, split.x)
        right = int((logits.argmax(1) == split.y).sum())
        low, high = binomial_interval(right, len(split.y))
        shown = [percent(share, 2) for share in (accuracy(logits, split.y), low, high)]
        parts.append(f"{name} accuracy {shown[0]} [{shown[1]}, {shown[2]}]")
    return ", ".join(parts)
