"""The training loop, and its checkpoints.

A checkpoint contains only tensors, with a checksum over all; nothing is unpickled.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..devices import moved
from ..errors import UserError
from ..files import load_tensors, pack_tensors, save_tensors, sha256_bytes
from ..memory import answers_at_once, free_memory
from ..memory_format import channels_last
from ..modes import eval_mode, train_
from ..outputs import opened
from ..sparsity import Masks, Pruner, Step, all_ones, masked, multiply_, shown, targets
from ..waiting import alone, courteous
from ._losses import Loss, Ramped, cross_entropy
from ._memory import as_input, backward, check_trainable
from ._recipe import Optimizer, Recipe, learning_rate


class EpochProgress(NamedTuple):
    """One finished epoch; `remaining` is the estimate of the remaining time in seconds."""

    epoch: int
    epochs: int
    loss: float
    score: float | None
    remaining: float


@dataclass(frozen=True)
class Fit:
    """Result of `fit` in addition to the trained model: masks, the loss of each epoch, and the best state if scored."""

    masks: Masks
    losses: tuple[float, ...]
    scores: tuple[float, ...] = ()
    best_epoch: int | None = None
    best_state: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class State:
    """Everything that an interrupted run needs to resume."""

    model: nn.Module
    optimizer: Optimizer
    masks: Masks
    generator: torch.Generator
    pruner: Pruner
    epoch: int = 0
    losses: list[float] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    best_epoch: int | None = None
    best_state: dict[str, Tensor] = field(default_factory=dict)


class _NoPruner(Pruner):
    """Do not change the masks."""

    def __call__(self, step: Step) -> Masks:
        return step.masks


@courteous()
def fit(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    recipe: Recipe,
    *,
    seed: int = 0,
    loss: Loss | Ramped = cross_entropy,
    masks: Masks | None = None,
    pruner: Pruner | None = None,
    score: Callable[[nn.Module], float] | None = None,
    checkpoint: Path | None = None,
    progress: Callable[[EpochProgress], None] | None = None,
    steps: Callable[[int, int], None] | None = None,
) -> Fit:
    """Train a model in place on uint8 images x (N, C, H, W) and labels y (N,), and leave it in eval mode.

    If the model is in training mode, submodules in eval mode (such as a frozen BatchNorm) stay frozen in eval mode. A
    model that is in eval mode itself is trained as a whole. A `Ramped` loss is evaluated at each step's fraction of the
    training. Weights outside `masks` stay zero; `pruner` may change the masks after every step; without `masks` it may
    prune all prunable weights. `score` is computed on the (masked) model after each epoch, and the state with the
    highest value is kept, among the epochs in which the model was as sparse as at the end. A recipe without epochs
    prunes without training. With `checkpoint`, the state is saved after each epoch, and a run that finds the file
    resumes from it with identical results. One seed, machine and number of threads give one result. `progress` is
    called after each epoch, `steps` after each batch with the images that are done and those of all epochs. Raises
    UserError if the loss stops being finite.
    """
    _check(model, x, y)
    x, y = _held(x, y, next(model.parameters()).device)
    with torch.random.fork_rng(devices=[]), channels_last(model):
        optimizer = Optimizer(recipe, [p for p in model.parameters() if p.requires_grad])
        generator, kept = torch.Generator().manual_seed(seed), _masks(model, masks, pruner)
        state = State(model, optimizer, kept, generator, _NoPruner() if pruner is None else pruner)
        ramp = loss if isinstance(loss, Ramped) else Ramped(lambda _: loss)
        if checkpoint is not None and checkpoint.exists():
            load_checkpoint_(state, checkpoint)
        if not state.pruner.dense_weights:
            multiply_(targets(model, state.masks))
        if recipe.epochs == 0 and pruner is not None:
            _prune_untrained_(state, x[: recipe.batch_size], y[: recipe.batch_size], ramp.at(1.0))
        began, first = time.monotonic(), state.epoch
        # Layers that draw (dropout, stochastic activations) have a new, known stream in each epoch.
        while state.epoch < recipe.epochs:
            torch.manual_seed(seed * 1_000_003 + state.epoch)
            mean_loss = _epoch(state, x, y, recipe, ramp, steps)
            state.epoch += 1
            state.losses.append(mean_loss)
            value = _score_(state, score)
            if checkpoint is not None:
                save_checkpoint(state, checkpoint)
            if progress is not None:
                each = (time.monotonic() - began) / (state.epoch - first)
                remaining = each * (recipe.epochs - state.epoch)
                progress(EpochProgress(state.epoch, recipe.epochs, mean_loss, value, remaining))
    multiply_(targets(model, state.masks))
    model.eval()
    model.zero_grad(set_to_none=True)
    return Fit(state.masks, tuple(state.losses), tuple(state.scores), state.best_epoch, state.best_state)


def _masks(model: nn.Module, masks: Masks | None, pruner: Pruner | None) -> Masks:
    return all_ones(model) if masks is None and pruner is not None else dict(masks or {})


def _check(model: nn.Module, x: Tensor, y: Tensor) -> None:
    if x.dtype != torch.uint8 or x.dim() != 4 or len(x) != len(y) or len(x) == 0:
        raise UserError(f"training needs uint8 images (N, C, H, W) and as many labels, not {x.dtype} {tuple(x.shape)}")
    check_trainable(model)


def _held(x: Tensor, y: Tensor, place: torch.device) -> tuple[Tensor, Tensor]:
    """Return labels on a device, and images if they take less than half of the free memory there."""
    few = place.type != "cpu" and 2 * x.nbytes < free_memory(place)
    return x.to(place) if few else x, y.to(place)


def _prune_untrained_(state: State, x: Tensor, y: Tensor, loss: Loss) -> None:
    """Call a pruner with the gradient of one batch, as the only step of a training without steps."""
    batch = (as_input(x, state.model), y)
    state.model.zero_grad(set_to_none=True)
    with eval_mode(state.model):
        backward(loss(state.model, *batch, state.generator))
    state.masks = state.pruner(Step(state.model, state.masks, 0, 1, batch, loss, state.generator))


def _epoch(
    state: State, x: Tensor, y: Tensor, recipe: Recipe, ramp: Ramped, told: Callable[[int, int], None] | None
) -> float:
    model, optimizer, generator = state.model, state.optimizer, state.generator
    train_(model)
    batches = -(-len(x) // recipe.batch_size)
    steps, step = recipe.epochs * batches, state.epoch * batches
    cycle = -(-steps // state.pruner.cycles)  # iterative pruning restarts the schedule
    order = torch.randperm(len(x), generator=generator)
    total = torch.zeros((), device=y.device)
    behind = state.pruner.dense_weights
    masked_now, weights = targets(model, state.masks), sum(p.numel() for p in optimizer.parameters)
    for chosen in torch.split(order, recipe.batch_size):
        with alone(x.numel() // len(x) * len(chosen)):
            image = as_input(x[chosen], model)
        batch = (_augment(image, generator) if recipe.augment else image, y[chosen])
        loss = ramp.at((step + 1) / steps)
        model.zero_grad(set_to_none=True)
        with shown(masked_now if behind else []):
            value = loss(model, *batch, generator)
            backward(value)
        with alone(weights):
            optimizer.step(learning_rate(recipe, step % cycle, cycle))
        masks = state.pruner(Step(model, state.masks, step, steps, batch, loss, generator))
        if not isinstance(masks, dict):
            raise UserError(f"the pruner returned {type(masks).__name__}, not masks by parameter name")
        if masks is not state.masks:
            state.masks, masked_now = masks, targets(model, masks)
        if not behind:
            multiply_(masked_now)
            multiply_(_momenta(optimizer, masked_now))
        total += value.detach() * len(chosen)
        step += 1
        if told is not None:
            done = min((step - state.epoch * batches) * recipe.batch_size, len(x))
            told(state.epoch * len(x) + done, recipe.epochs * len(x))
    mean = float(total) / len(x)
    if not mean < float("inf"):
        raise UserError(f"training diverged: the loss of epoch {state.epoch + 1} is {mean}; lower recipe.lr")
    return mean


def _momenta(optimizer: Optimizer, targets: list[tuple[nn.Parameter, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the moving averages of masked weights: they are zeroed too, for weights that come back."""
    for parameter, mask in targets:
        averages = optimizer.state.get(parameter, {})
        yield from ((value, mask) for name, value in averages.items() if name != "step")


def _score_(state: State, score: Callable[[nn.Module], float] | None) -> float | None:
    if score is None:
        return None
    with eval_mode(state.model), masked(state.model, state.masks):
        value = score(state.model)
        if state.best_epoch is None or value > state.scores[state.best_epoch - 1] or _best_is_denser(state):
            state.best_epoch = state.epoch
            state.best_state = {name: tensor.clone() for name, tensor in state.model.state_dict().items()}
    state.scores.append(value)
    return value


def _best_is_denser(state: State) -> bool:
    """Return whether the best epoch is before the latest pruning: its network is too dense to be a checkpoint."""
    held = sum(int(torch.count_nonzero(state.best_state[name])) for name in state.masks)
    return held > sum(int(torch.count_nonzero(mask)) for mask in state.masks.values())


def _augment(image: Tensor, generator: torch.Generator) -> Tensor:
    """Pad by 4, crop each image at its own position and flip half of them (He et al. 2016, section 4.2)."""
    count, channels, height, width = image.shape
    padded = nn.functional.pad(image, (4, 4, 4, 4))
    top, left = (torch.randint(0, 9, (count, 1), generator=generator) for _ in range(2))
    flip = torch.randint(0, 2, (count, 1), generator=generator).bool()
    rows = top + torch.arange(height)
    columns = left + torch.where(flip, torch.arange(width - 1, -1, -1), torch.arange(width))
    index = (torch.arange(count)[:, None, None, None], torch.arange(channels)[None, :, None, None])
    return padded[(*index, rows[:, None, :, None], columns[:, None, None, :])]


@courteous()
def predict(
    model: nn.Module,
    x: Tensor,
    *,
    batch_size: int | None = None,
    seconds: float | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Return the logits (N, classes), on the CPU, of uint8 images in eval mode; every module's mode is restored.

    batch_size None: 500, or as many as memory and about so many seconds a batch allow. `progress` gets the number of
    images that are done, and of all, before each batch.
    """
    place = next((p.device for p in model.parameters()), x.device)
    with torch.no_grad(), eval_mode(model), channels_last(model):
        few = moved(x[:2], place).float().div_(255)
        answer = opened(model, few)
        batch_size, logits = batch_size or answers_at_once(answer, few), list[Tensor]()
        if seconds is not None:
            batch_size = min(batch_size, _in_time(answer, few, seconds))
        for number, part in enumerate(torch.split(x, batch_size)):
            if progress is not None:
                progress(number * batch_size, len(x))
            logits.append(answer(moved(part, place).float().div_(255)).cpu())
        return torch.cat(logits)


def _in_time(answer: Callable[[Tensor], Tensor], few: Tensor, seconds: float) -> int:
    """Return how many images a model evaluates in so many seconds, one at least, at the speed of a few."""
    begin = time.monotonic()
    answer(few)
    return max(1, int(seconds * len(few) / max(1e-9, time.monotonic() - begin)))


def save_checkpoint(state: State, path: Path) -> None:
    """Write the state atomically to a safetensors file."""
    tensors: dict[str, Tensor] = {f"model/{name}": value for name, value in state.model.state_dict().items()}
    tensors |= {f"best/{name}": value for name, value in state.best_state.items()}
    tensors |= {f"mask/{name}": value for name, value in state.masks.items()}
    for index, parameter in enumerate(state.optimizer.parameters):
        slot = state.optimizer.state.get(parameter, {})
        tensors |= {f"optimizer/{index}/{name}": value for name, value in slot.items()}
    tensors |= {f"pruner/{name}": value for name, value in state.pruner.state().items()}
    tensors["generator"] = state.generator.get_state()
    scalars = {"epoch": state.epoch, "losses": state.losses, "scores": state.scores, "best_epoch": state.best_epoch}
    tensors["scalars"] = _bytes(json.dumps(scalars))
    save_tensors(path, {**tensors, "sha256": _checksum(tensors)})


def is_whole(path: Path) -> bool:
    """Return whether a checkpoint's checksum is correct."""
    try:
        _read(path)
    except UserError:
        return False
    return True


def load_checkpoint_(state: State, path: Path) -> None:
    """Restore a state that `save_checkpoint` wrote; raise UserError if it belongs to another model or is damaged."""
    tensors = _read(path)
    try:
        scalars = json.loads(bytes(tensors.pop("scalars").numpy()).decode())
        state.model.load_state_dict(_part(tensors, "model/"))
        state.generator.set_state(tensors["generator"])
        state.epoch, state.best_epoch = scalars["epoch"], scalars["best_epoch"]
        state.losses, state.scores = scalars["losses"], scalars["scores"]
    except (KeyError, RuntimeError, ValueError) as error:
        raise UserError(f"{path} is not a checkpoint of this training run; remove it to start again") from error
    place = next(state.model.parameters()).device
    state.masks = {name: mask.to(place) for name, mask in _part(tensors, "mask/").items()}
    state.best_state = _part(tensors, "best/")
    for index, parameter in enumerate(state.optimizer.parameters):
        slot = _part(tensors, f"optimizer/{index}/")
        if slot:
            state.optimizer.state[parameter] = {name: _laid_out(value, parameter) for name, value in slot.items()}
    kept = _part(tensors, "pruner/")
    if kept:
        state.pruner.load_state_(kept)


def _laid_out(value: Tensor, parameter: nn.Parameter) -> Tensor:
    """Return a value on its parameter's device, in its memory layout: fused optimisers read both in memory order."""
    if value.shape != parameter.shape:  # a count of steps
        return value.to(parameter.device)
    return torch.empty_like(parameter.detach()).copy_(value)


def _read(path: Path) -> dict[str, Tensor]:
    tensors = load_tensors(path)
    stated = tensors.pop("sha256", torch.empty(0))
    if not torch.equal(stated, _checksum(tensors)):
        raise UserError(f"{path} is damaged: its checksum is wrong; remove it to start again")
    return tensors


def _checksum(tensors: dict[str, Tensor]) -> Tensor:
    return _bytes(sha256_bytes(pack_tensors(tensors)))


def _bytes(text: str) -> Tensor:
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name[len(prefix) :]: value for name, value in tensors.items() if name.startswith(prefix)}
