"""What each stage of a study does: pure functions of a task's inputs, its parents' tensors and the data set."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import attacks
from ..data import Dataset, as_float
from ..errors import UserError
from ..metrics import accuracy, distances, macs, robust_accuracy, size
from ..models import build, load_weights_
from ..sparsity import PruningSpec, all_ones, build_pruner, check_reached, sparsity_of
from ..threat import Threat, parse_norm
from ..train import Loss, Recipe, adversarial, cross_entropy, fit, predict, trades
from .executors import Outcome, Task

__all__ = ["STAGES", "Context", "Factory", "chosen_images", "perform_stage", "training_loss"]

Factory = Callable[..., nn.Module]
WEIGHTS, MASK = "model/", "mask/"
# The fine-tuning of every network of one seed sees the same order of images, so pairs differ in their masks alone.
FINETUNE_SEED = 10_007


@dataclass(frozen=True)
class Context:
    """Hold what stages share: the data, where parents' tensors come from, and where a long training may checkpoint."""

    dataset: Dataset
    tensors: Callable[[str], dict[str, Tensor]]
    scratch: Path | None = None
    device: str = "cpu"
    factory: Factory | None = None


def perform_stage(context: Context, task: Task) -> Outcome:
    """Run one task."""
    return STAGES[task.stage](context, task)


def _train(context: Context, task: Task) -> Outcome:
    model = _model(context, task.inputs)
    recipe = Recipe(**task.inputs["recipe"])
    return _fitted(context, task, model, recipe, seed=task.inputs["seed"], pruning=None)


def _prune(context: Context, task: Task) -> Outcome:
    model = _model(context, task.inputs, context.tensors(task.parents[0]))
    recipe = Recipe(**task.inputs["recipe"])
    seed = FINETUNE_SEED + task.inputs["seed"]
    return _fitted(context, task, model, recipe, seed=seed, pruning=task.inputs["pruning"])


def _fitted(
    context: Context, task: Task, model: nn.Module, recipe: Recipe, *, seed: int, pruning: dict[str, Any] | None
) -> Outcome:
    data = context.dataset
    loss = training_loss(task.inputs["training"])
    pruner = None if pruning is None else build_pruner(PruningSpec(**pruning), task.inputs["sparsity"])
    result = fit(
        model,
        data.train.x,
        data.train.y,
        recipe,
        seed=seed,
        loss=loss,
        masks={} if pruner is None else all_ones(model),
        pruner=pruner,
        checkpoint=context.scratch / f"{task.key}.safetensors" if context.scratch and recipe.epochs > 1 else None,
    )
    valid = accuracy(predict(model, data.valid.x), data.valid.y)
    tensors = {WEIGHTS + name: value for name, value in model.state_dict().items()}
    tensors |= {MASK + name: value for name, value in result.masks.items()}
    metrics: dict[str, float | None] = {"loss": result.losses[-1] if result.losses else None, "accuracy_valid": valid}
    if pruning is not None:
        assert pruner is not None
        _assert_masked(model, result.masks)
        check_reached(pruner, result.masks, task.inputs["sparsity"])
        metrics["sparsity"] = sparsity_of(result.masks)
    tell = getattr(pruner, "series", None)  # how often surgery pruned and spliced, for instance
    series = {"loss": list(result.losses)} | (tell() if tell is not None else {})
    return Outcome(metrics, series, tensors=tensors)


def _assert_masked(model: nn.Module, masks: dict[str, Tensor]) -> None:
    """Raise UserError if a masked weight came back: what is evaluated must be what was asked for."""
    parameters = dict(model.named_parameters())
    for name, mask in masks.items():
        if bool((parameters[name].detach()[~mask] != 0).any()):
            raise UserError(f"masked weights of '{name}' are not zero: the pruner changed weights after its masks")


def _measure(context: Context, task: Task) -> Outcome:
    data = context.dataset
    parent = context.tensors(task.parents[0])
    model = _model(context, task.inputs, parent)
    logits, logits_valid = predict(model, data.test.x), predict(model, data.valid.x)
    if not bool(torch.isfinite(logits).all()):
        raise UserError("the network's logits are NaN or infinite; its training diverged")
    counted = size(model)
    dense, sparse = macs(model, tuple(data.test.x.shape[1:]))
    weights = {name: p for name, p in model.named_parameters() if p.dim() > 1}
    first = next(iter(weights.values()))
    return Outcome(
        {
            "accuracy": accuracy(logits, data.test.y),
            "accuracy_valid": accuracy(logits_valid, data.valid.y),
            "sparsity": counted.sparsity,
            "sparsity_total": counted.sparsity_total,
            "parameters": counted.parameters,
            "nonzero": counted.nonzero,
            "bytes_dense": counted.bytes_dense,
            "bytes_sparse": min(counted.bytes_dense, counted.bytes_sparse),
            "macs_dense": dense,
            "macs": sparse,
        },
        {"density": {name: float(p.count_nonzero()) / p.numel() for name, p in weights.items()}},
        tensors={
            "correct": logits.argmax(1) == data.test.y,
            "correct_valid": logits_valid.argmax(1) == data.valid.y,
            "label": data.test.y,
            "first_weight": first.detach().clone(),
            "first_mask": first.detach() != 0,
        },
    )


def _attack(context: Context, task: Task) -> Outcome:
    inputs = task.inputs
    model = _model(context, inputs, context.tensors(task.parents[0]))
    x, y = chosen_images(context.dataset, inputs["split"], inputs["start"], inputs["stop"])
    spec = dict(inputs["attack"])
    name, norm, eps = spec.pop("name"), parse_norm(spec.pop("norm")), spec.pop("eps")
    result = attacks.run(
        model,
        as_float(x),
        y,
        functools.partial(attacks.ATTACKS[name], **spec),
        Threat(norm, eps),
        batch_size=inputs["batch_size"],
        generator=torch.Generator().manual_seed(1_000_003 * inputs["seed"] + inputs["start"]),
    )
    metrics: dict[str, float | None] = {
        "forwards": result.forwards,
        "backwards": result.backwards,
        "success": float(result.success.double().mean()),
    }
    if eps is None:
        found = distances(result.distance, result.clean_correct)
        metrics |= {
            "mean_distance": found.mean,
            "mean_distance_correct": found.mean_correct,
            "median_distance_correct": found.median_correct,
            "failed": found.failed,
        }
    else:
        metrics["robust_accuracy"] = robust_accuracy(result.clean_correct, result.success)
    tensors = {
        "distance": result.distance,
        "success": result.success,
        "clean_correct": result.clean_correct,
        "label": y,
    }
    if inputs["gallery"]:
        tensors["clean"] = as_float(x[: inputs["gallery"]])
        tensors["perturbed"] = result.x_adv[: inputs["gallery"]].clone()
    metrics = {key: _finite(value) for key, value in metrics.items()}
    flags = [{"name": flag.name, "detail": flag.detail} for flag in result.flags]
    return Outcome(metrics, flags=flags, tensors=tensors)


def chosen_images(dataset: Dataset, split: str, start: int, stop: int) -> tuple[Tensor, Tensor]:
    """Return images start to stop of a fixed random order of a split, so that the first few are no biased sample."""
    part = dataset.test if split == "test" else dataset.valid
    order = torch.randperm(len(part.x), generator=torch.Generator().manual_seed(0))[start:stop]
    return part.x[order], part.y[order]


def _model(context: Context, inputs: dict[str, Any], weights: dict[str, Tensor] | None = None) -> nn.Module:
    data, options = context.dataset, dict(inputs["model"])
    name = options.pop("name")
    widths = options.pop("widths", None)
    model = build(
        name,
        shape=tuple(data.train.x.shape[1:]),
        classes=data.classes,
        mean=data.mean,
        std=data.std,
        seed=inputs.get("seed", 0),
        widths=None if widths is None else tuple(widths),
        **options,
    )
    if weights is not None:
        load_weights_(model, {k.removeprefix(WEIGHTS): v for k, v in weights.items() if k.startswith(WEIGHTS)})
    return model.eval().to(context.device)


def training_loss(training: dict[str, Any]) -> Loss:
    """Return the loss that a plan's [training] table names."""
    if training["loss"] == "standard":
        return cross_entropy
    norm = parse_norm(training["norm"])
    if training["loss"] == "pgd-at":
        return adversarial(eps=training["eps"], norm=norm, steps=training["steps"])
    return trades(eps=training["eps"], norm=norm, steps=training["steps"], beta=training["beta"])


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


STAGES: dict[str, Callable[[Context, Task], Outcome]] = {
    "train": _train,
    "prune": _prune,
    "measure": _measure,
    "attack": _attack,
}
