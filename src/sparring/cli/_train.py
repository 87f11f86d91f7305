"""`sparring train`, `prune` and `convert`: write one network to a file."""

from __future__ import annotations

import contextlib
import copy
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from ..bounds import ibp_initialise_
from ..data import Dataset, as_float
from ..devices import CPU, place_of
from ..errors import UnknownNameError, UserError
from ..files import save_tensors
from ..memory import check_room
from ..metrics import accuracy
from ..models import Blueprint, read_checkpoint, recipe_settings, save_model
from ..sparsity import Pruner, PruningSpec, build_pruner, check_reached, counts, covered, spared, sparsity_of
from ..statistics import binomial_interval
from ..study import (
    NetworkSettings,
    Plan,
    TrainingSettings,
    check_fit,
    is_untrained,
    ramped_loss,
    refuse_constant,
    robust_score,
)
from ..train import EpochProgress, Fit, Recipe, check_memory, copies_of, fit
from ..units import parse_eps, percent
from ._app import DataSource, FitOptions, ModelSource, PruneOptions, TrainOptions
from ._printing import print_json
from ._progress import Pace, predicted, shown_images
from ._sources import (
    ONNX,
    PACKED,
    SAVED,
    blueprint_for,
    check_named,
    check_out,
    open_data,
    open_model,
    request_for,
    say_fresh,
)

# Which table of a plan the options of --set belong to.
FEW = 10  # epochs, whose lines are too far apart to show progress
_PLACES: dict[type, str] = {Recipe: "recipe", PruningSpec: "pruning.0"}


def run_train(how: TrainOptions, data: DataSource, options: FitOptions, *, as_json: bool) -> None:
    """Train a model and write it, in adversarial training also its best epoch; rerun to resume.

    Raises UserError, after writing everything, if training ended at a network that predicts one class only.
    """
    training = _training(options, how.ramp)
    check_out(how.out, ".safetensors")
    place = place_of(options.device, options.dtype, training=True)
    name, weights = ModelSource(how.model).named()
    if weights is not None or name.endswith(SAVED):
        raise UserError("train starts from new weights; give trained weights to prune or study instead")
    _settings(how.recipe, Recipe)  # raises for impossible settings, before data are read
    NetworkSettings(how.model, width=how.width, depth=how.depth)
    dataset = open_data(data, request_for([], data, training=True))
    blueprint = replace(blueprint_for(ModelSource(how.model), dataset), width=how.width, depth=how.depth)
    recipe = _settings(how.recipe, Recipe, own=recipe_settings(how.model, channels=blueprint.shape[0])).recipe
    model = place.model(_fresh(blueprint, dataset, recipe, options.seed, copies_of(recipe) if place == CPU else 1))
    if training.certified:
        ibp_initialise_(model, generator=torch.Generator().manual_seed(options.seed))
    result = _fit(model, dataset, recipe, how.out, options, training)
    written, logits = _finish(model, blueprint, dataset, result, training, how.out)
    refuse_constant(logits, dataset.valid.y)
    if as_json:
        print_json({"model": how.model, "data": dataset.name, **place.facts(model), "written": written})


def _fresh(blueprint: Blueprint, dataset: Dataset, recipe: Recipe, seed: int, copies: int) -> nn.Module:
    """Return the network to train; raise UserError if it does not fit the data or memory, or no epoch would train it.

    copies: how often its numbers are kept.
    """
    check_room(blueprint.build, copies, f"training '{blueprint.name}'")
    model = blueprint.build(seed=seed)
    say_fresh(blueprint.name)
    check_fit(model, dataset)
    if recipe.epochs == 0 and is_untrained(model, blueprint.build(seed=seed + 1)):
        raise UserError(f"epochs=0 trains nothing, and '{blueprint.name}' has random weights; give epochs=1 or more")
    return model


def run_prune(source: ModelSource, how: PruneOptions, data: DataSource, options: FitOptions, *, as_json: bool) -> None:
    """Prune a model, fine-tune it and write it with its masks, in adversarial training also its best epoch."""
    training = _training(options)
    check_out(how.out, ".safetensors")
    if source.model.endswith((PACKED, ONNX)):
        raise UserError(f"{source.model} cannot be pruned further; prune the model that it was exported from")
    settings = _settings(how.options, PruningSpec, Recipe)
    pruning = settings.pruning[0]
    place = place_of(options.device, options.dtype, training=True)
    build_pruner(pruning, how.sparsity)  # refuses what is impossible before data are read
    check_named(source)
    dataset = _images_for(source, data, settings.recipe)
    model, blueprint = open_model(source, dataset, download=data.download)
    pruner = build_pruner(spared(pruning, model), how.sparsity)
    own = recipe_settings(blueprint.name, channels=blueprint.shape[0], fine_tuning=True)
    recipe = _settings(how.options, PruningSpec, Recipe, own=own).recipe
    result = _fit(place.model(model), dataset, recipe, how.out, options, training, pruner)
    check_reached(pruner, result.masks, pruning.layers or how.sparsity)
    asked = None if pruning.layers else how.sparsity
    print(_removed(result.masks, pruner, model, as_float(dataset.test.x[:2]), asked))
    share = _covered(model, result.masks, pruning.structure)
    written, _ = _finish(model, blueprint, dataset, result, training, how.out)
    if as_json:
        about = {"model": source.model, "data": dataset.name, **place.facts(model)}
        print_json({**about, "sparsity": sparsity_of(result.masks), **share, "written": written})


def _images_for(source: ModelSource, data: DataSource, recipe: Recipe) -> Dataset:
    """Load the images on which a network is pruned; without epochs, test images are enough."""
    dataset = open_data(data, request_for([source], data, training=recipe.epochs > 0))
    if len(dataset.train.x):
        return dataset
    print("no training images: scores that depend on images are computed on test images", file=sys.stderr)
    return replace(dataset, train=dataset.test)


def _settings(
    overrides: Sequence[str] | None,
    *tables: type[Recipe] | type[PruningSpec],
    own: Mapping[str, Any] = MappingProxyType({}),
) -> Plan:
    """Read KEY=VALUE options of a recipe and a pruning method into a plan, whose checks and messages then apply.

    `own` is the model's recipe, which the options change.
    """
    known = {field.name: _PLACES[table] for table in tables for field in fields(table)}
    placed = []
    for override in overrides or ():
        key = override.partition("=")[0].partition(".")[0]
        if key not in known:
            raise UnknownNameError("key of --set", key, known)
        placed.append(f"{known[key]}.{override}")
    base: dict[str, Any] = {"name": "settings", "pruning": [{}], "recipe": dict(own)}
    base["sparsities"] = [0.5]  # which every method and structure can reach; the requested one is checked separately
    return Plan.from_table(base, overrides=placed)


def _training(options: FitOptions, ramp: float | None = None) -> TrainingSettings:
    table = {
        "loss": options.loss, "eps": parse_eps(options.eps), "ramp": ramp, "kappa": options.kappa,
        "stability": options.stability, "label_smoothing": options.label_smoothing,
    }  # fmt: skip
    return Plan.from_table({"name": "settings", "training": table}).training


def _fit(
    model: nn.Module, dataset: Dataset, recipe: Recipe, out: Path, options: FitOptions, training: TrainingSettings,
    pruner: Pruner | None = None,
) -> Fit:  # fmt: skip
    loss = ramped_loss(training)
    check_memory(model, dataset.train.x, recipe, loss)
    checkpoint = out.with_suffix(".checkpoint.safetensors")
    with _shown(len(dataset.train.x), recipe.epochs, quiet=options.quiet) as (epoch, steps):
        result = fit(
            model,
            *dataset.train,
            recipe,
            seed=options.seed,
            loss=loss,
            pruner=pruner,
            score=None if training.loss == "standard" else lambda m: robust_score(m, dataset.valid, training),
            checkpoint=checkpoint,
            progress=epoch,
            steps=steps,
        )
    checkpoint.unlink(missing_ok=True)
    model.cpu()
    return replace(result, masks=_here(result.masks), best_state=_here(result.best_state))


def _here(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.cpu() for name, value in tensors.items()}


@contextlib.contextmanager
def _shown(images: int, epochs: int, *, quiet: bool) -> Iterator[tuple[Any, Any]]:
    """Yield what shows epochs, a line for each, and batches: on a terminal in one line, else where epochs are few."""
    if quiet:
        yield None, None
        return
    terminal, pace, name = sys.stdout.isatty(), Pace(), "training" if epochs else "pruning"
    with shown_images(name=name) as tell:

        def epoch(now: EpochProgress) -> None:
            nonlocal name
            name = f"epoch {now.epoch}/{now.epochs}  loss {now.loss:.4f}"
            if now.epoch == epochs or not terminal:
                line = f"{name}  {pace.told(now.epoch * images, epochs * images)}"
                print(f"\r{line}\033[K" if terminal else line, flush=True)

        def steps(done: int, total: int) -> None:
            tell(name, done, total)

        yield epoch, steps if terminal or epochs < FEW else None


def _finish(
    model: nn.Module, blueprint: Blueprint, dataset: Dataset, result: Fit, training: TrainingSettings, out: Path
) -> tuple[list[dict[str, Any]], Tensor]:
    """Write a network and print its accuracy; in adversarial training also the network of the best epoch.

    Also return the last epoch's logits of the validation images.
    """
    save_model(out, model, blueprint, result.masks)
    if result.best_epoch is None:
        only, logits = _told(model, dataset, out)
        return [only], logits
    best, beside = copy.deepcopy(model), out.with_stem(f"{out.stem}-best")
    best.load_state_dict(result.best_state)
    save_model(beside, best, blueprint, {name: result.best_state[name] != 0 for name in result.masks})
    last = len(result.scores)
    written, logits = [], torch.zeros(0)
    for name, network, epoch, path in (("final", model, last, out), ("best", best, result.best_epoch, beside)):
        share = result.scores[epoch - 1]
        judged = "certified validation accuracy" if training.certified else "validation accuracy under PGD"
        robust = f", {judged} (eps {training.eps:g}) {percent(share)}"
        told, found = _told(network, dataset, path, before=f"{name} epoch {epoch}: ", behind=robust)
        logits = found if network is model else logits
        written.append({**told, "epoch": epoch, "robust_accuracy_valid": share, "eps": training.eps})
    return written, logits


def _told(
    network: nn.Module, dataset: Dataset, path: Path, *, before: str = "", behind: str = ""
) -> tuple[dict[str, Any], Tensor]:
    """Print a written network's accuracies with their intervals; return them, and the logits of validation images."""
    texts: list[str] = []
    found: dict[str, Any] = {"path": str(path)}
    judged = torch.zeros(0)
    splits = (("validation", "accuracy_valid", dataset.valid), ("test", "accuracy", dataset.test))
    for name, key, split in (one for one in splits if len(one[2].x)):
        logits = predicted(network, split.x, f"{name} images")
        judged = logits if split is dataset.valid else judged
        share, right = accuracy(logits, split.y), int((logits.argmax(1) == split.y).sum())
        low, high = binomial_interval(right, len(split.y))
        texts.append("{} accuracy {} [{}, {}]".format(name, *(percent(one, 2) for one in (share, low, high))))
        found |= {key: share, f"{key}_interval": [low, high]}
    print(f"{before}{', '.join(texts)}{behind}\nwrote {path}")
    return found, judged


def _removed(masks: dict[str, Tensor], pruner: Pruner, model: nn.Module, x: Tensor, asked: float | None) -> str:
    """Print how many weights were removed, of all and without biases and normalisation, and what surgery did."""
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
        text += f"; the requested {percent(asked, 2)} counts only weights that the structure and spared layers allow"
    text += f" and {others - held} of {others} biases and norms" if others else ""
    series = pruner.series()
    moved = {name: sum(series[name]) for name in ("pruned", "spliced") if name in series}
    return text + (f", having pruned {moved['pruned']} and spliced back {moved['spliced']}" if len(moved) == 2 else "")


def _covered(model: nn.Module, masks: dict[str, Tensor], structure: str | None) -> dict[str, float]:
    """Print and return the share of the weights of all matrices that an N:M structure covers."""
    share = covered(model, masks, structure)
    if share is None:
        return {}
    print(f"{structure} covers {percent(share, 1)} of the weights of all matrices; the others stay dense")
    return {"covered": share}


def run_convert(checkpoint: Path, out: Path, key: str | None, *, as_is: bool, as_json: bool) -> None:
    """Write a checkpoint's weights to a safetensors file and print where in it they were and how names changed."""
    check_out(out, ".safetensors")
    found = read_checkpoint(checkpoint, key=key, as_is=as_is)
    save_tensors(out, found.tensors)
    at = f" under '{found.key}'" if found.key else ""
    count = sum(value.numel() for value in found.tensors.values())
    print(f"{checkpoint}: {len(found.tensors)} tensors{at}, {count:,} numbers")
    for note in found.notes:
        print(f"  {note}")
    if found.others:
        print(f"  not used: {', '.join(found.others)}; select another with --key")
    print(f"wrote {out}")
    if as_json:
        about = {"path": str(out), "tensors": len(found.tensors), "numbers": count, "key": found.key}
        print_json({**about, "others": found.others, "notes": found.notes})
