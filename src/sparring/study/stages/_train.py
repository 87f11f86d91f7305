"""Stages that train: dense training, pruning, sparse activations, and the choice of a weight decay."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from ...attacks import batch_size_for, pgd
from ...bounds import certified_accuracy, ibp_initialise_
from ...data import Split, as_float
from ...errors import UserError
from ...files import load_tensors, sha256_file
from ...matrices import refuse_unmasked
from ...metrics import accuracy
from ...models import load_weights_
from ...outputs import opened
from ...sparsity import (
    Pruner,
    build_pruner,
    calibrate_,
    check_reached,
    covered,
    spared,
    sparsity_of,
    with_activation_penalty,
)
from ...threat import LINF, Threat, parse_norm
from ...train import Loss, Ramped, adversarial, certified, cross_entropy, fit, predict, smoothed, trades
from ..plans._tables import TrainingSettings
from ..runner._executors import Task, TaskOutcome
from ._inputs import Activate, Choose, Given, Prune, Train, WeightsFile
from ._networks import BEST, MASK, PENALTY, WEIGHTS, Context, network, network_of, with_activation

# The fine-tuning of every network of one seed uses the same order of images, so pairs differ only in their masks.
FINETUNE_SEED = 10_007
CALIBRATION_IMAGES = 500
# The best epoch of adversarial training has the highest accuracy on this number of images under these steps of PGD.
SCORING_IMAGES, SCORING_STEPS = 500, 10


def train(context: Context, task: Task[Train] | Task[Given]) -> TaskOutcome:
    """Train a dense network from scratch, or take the weights that the plan names."""
    inputs = task.inputs
    model = network(context, inputs.model, inputs.initial_seed)
    if isinstance(inputs, Given):
        return _given(context, inputs.weights, model)
    if inputs.training.certified:
        ibp_initialise_(model, generator=torch.Generator().manual_seed(inputs.initial_seed))
    outcome = _fitted(context, task.key, inputs, model, seed=inputs.seed)
    valid = context.dataset.valid
    refuse_constant(predict(model, valid.x), valid.y)
    return outcome


def refuse_constant(logits: Tensor, y: Tensor) -> None:
    """Raise UserError if a model predicts one class for all validation images although they have several."""
    answers = set(logits.argmax(1).tolist())
    if len(answers) == 1 and len(set(y.tolist())) > 1:
        raise UserError(
            f"the trained network predicts class {answers.pop()} for every validation image, so pruning or attacking "
            "it is meaningless; train with a lower lr or for more epochs, or let eps grow in adversarial training "
            "(ramp = 0.5)"
        )


def _given(context: Context, weights: WeightsFile, model: nn.Module) -> TaskOutcome:
    if sha256_file(weights.file) != weights.sha256:
        raise UserError(f"{weights.file} changed during the study; rerun it")
    tensors = load_tensors(weights.file)
    load_weights_(model, {k: v for k, v in tensors.items() if not k.startswith("sparring/")})
    return _as_it_is(context, model)


def _as_it_is(context: Context, model: nn.Module) -> TaskOutcome:
    return TaskOutcome({"accuracy_valid": _on_validation(context, model)}, tensors=_weights(model))


def _on_validation(context: Context, model: nn.Module) -> float:
    return accuracy(predict(model, context.dataset.valid.x), context.dataset.valid.y)


def prune(context: Context, task: Task[Prune]) -> TaskOutcome:
    """Prune and fine-tune the parent's network; without a method this is the dense control."""
    inputs = task.inputs
    model = network_of(context, inputs, task.parents[0])
    pruner = None if inputs.pruning is None else build_pruner(spared(inputs.pruning, model), inputs.sparsity)
    return _fitted(context, task.key, inputs, model, seed=FINETUNE_SEED + inputs.seed, pruner=pruner)


def activate(context: Context, task: Task[Activate]) -> TaskOutcome:
    """Make the parent's activations sparse; with a recipe, fine-tune it so."""
    inputs, activation = task.inputs, task.inputs.activation
    plain = network_of(context, inputs, task.parents[0])
    model, images = plain, as_float(context.dataset.valid.x[:CALIBRATION_IMAGES]).to(context.device)
    if activation.kind != PENALTY:
        model = with_activation(plain, activation)
        calibrate_(model, images)
    if inputs.recipe is None:
        return _as_it_is(context, model)

    def finish(trained: nn.Module) -> nn.Module:
        """Remove the modules if they are only for training; otherwise set their final levels."""
        if trained is plain:
            return plain
        if activation.test:
            calibrate_(trained, images)
            return trained
        names, learned = set(plain.state_dict()), trained.state_dict()
        load_weights_(plain, {name: value for name, value in learned.items() if name in names})
        return plain

    penalty = activation.level if activation.kind == PENALTY else None
    return _fitted(context, task.key, inputs, model, seed=FINETUNE_SEED + inputs.seed, penalty=penalty, finish=finish)


def choose(context: Context, task: Task[Choose]) -> TaskOutcome:
    """Return the parent that is best on the validation split (the first of equals), with its tensors."""
    scores = [_on_validation(context, network_of(context, task.inputs, key)) for key in task.parents]
    best = max(range(len(scores)), key=lambda i: (scores[i], -i))
    metrics: dict[str, float | None] = {"accuracy_valid": scores[best], "weight_decay": task.inputs.decays[best]}
    return TaskOutcome(metrics, {"accuracy_valid": scores}, tensors=context.tensors(task.parents[best]))


def _fitted(
    context: Context,
    key: str,
    inputs: Train | Activate,
    model: nn.Module,
    *,
    seed: int,
    pruner: Pruner | None = None,
    penalty: float | None = None,
    finish: Callable[[nn.Module], nn.Module] = lambda trained: trained,
) -> TaskOutcome:
    data, recipe, training = context.dataset, inputs.recipe, inputs.training
    assert recipe is not None
    result = fit(
        model,
        data.train.x,
        data.train.y,
        recipe,
        seed=seed,
        loss=ramped_loss(training) if penalty is None else with_activation_penalty(training_loss(training), penalty),
        pruner=pruner,
        score=None if training.loss == "standard" else lambda m: robust_score(m, data.valid, training),
        checkpoint=context.scratch / f"{key}.safetensors" if context.scratch and recipe.epochs > 1 else None,
        steps=context.tell,
    )
    model = finish(model)
    metrics: dict[str, float | None] = {
        "loss": result.losses[-1] if result.losses else None,
        "accuracy_valid": _on_validation(context, model),
    }
    if pruner is not None and isinstance(inputs, Prune) and inputs.pruning is not None:
        refuse_unmasked(model, result.masks, "the pruner changed weights after its masks")
        check_reached(pruner, result.masks, inputs.pruning.layers or inputs.sparsity)
        metrics["sparsity"] = sparsity_of(result.masks)
        share = covered(model, result.masks, inputs.pruning.structure)
        metrics |= {} if share is None else {"covered": share}
    if result.best_epoch is not None:
        metrics["best_epoch"] = result.best_epoch
    # A pruner reports, for example, how often surgery pruned and spliced.
    series = {"loss": list(result.losses), **({} if pruner is None else pruner.series())}
    if result.scores:
        series["robust_accuracy_valid"] = list(result.scores)
    tensors = _weights(model) | {MASK + name: value for name, value in result.masks.items()}
    best = {BEST + name: value for name, value in result.best_state.items() if WEIGHTS + name in tensors}
    return TaskOutcome(metrics, series, tensors=tensors | best)


def _weights(model: nn.Module) -> dict[str, Tensor]:
    return {WEIGHTS + name: value for name, value in model.state_dict().items()}


def robust_score(model: nn.Module, valid: Split, training: TrainingSettings) -> float:
    """Return the score that chooses the best epoch: validation accuracy under a short PGD.

    For certified training, it is the fraction of validation images that intervals certify.
    """
    place = next(model.parameters()).device
    x, y = as_float(valid.x[:SCORING_IMAGES]).to(place), valid.y[:SCORING_IMAGES].to(place)
    if training.certified:
        return certified_accuracy(model, x, y, Threat(LINF, training.eps), method="interval")
    generator = torch.Generator().manual_seed(0)
    norm = parse_norm(training.norm)
    model = opened(model, x)
    size, logits = batch_size_for(model, x), []
    for part, label in zip(torch.split(x, size), torch.split(y, size), strict=True):
        x_adv = pgd(model, part, label, norm=norm, eps=training.eps, steps=SCORING_STEPS, generator=generator)
        with torch.no_grad():
            logits.append(model(x_adv))
    return accuracy(torch.cat(logits), y)


def training_loss(training: TrainingSettings) -> Loss:
    """Return the loss of a plan's [training] table, with the full eps."""
    smoothing = training.label_smoothing or 0.0
    if training.loss == "standard":
        return smoothed(smoothing) if smoothing else cross_entropy
    if training.certified:
        return _certified(training, None).at(1.0)
    norm = parse_norm(training.norm)
    if training.loss == "pgd-at":
        return adversarial(eps=training.eps, norm=norm, steps=training.steps, label_smoothing=smoothing)
    return trades(eps=training.eps, norm=norm, steps=training.steps, beta=training.beta, label_smoothing=smoothing)


def _certified(training: TrainingSettings, ramp: float | None) -> Ramped:
    kappa = 0.5 if training.kappa is None else training.kappa
    return certified(
        eps=training.eps, crown=training.loss == "crown-ibp", ramp=ramp, kappa=kappa,
        stability=training.stability or 0.0,
    )  # fmt: skip


def ramped_loss(training: TrainingSettings) -> Loss | Ramped:
    """Return the loss of a [training] table; its eps grows to its value if the table has a `ramp`."""
    if training.ramp is None:
        return training_loss(training)
    if training.certified:
        return _certified(training, training.ramp)
    ramp, eps = training.ramp, training.eps
    return Ramped(lambda share: training_loss(replace(training, eps=eps * min(1.0, share / ramp))))
