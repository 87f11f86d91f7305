"""Requirements of training, checked before it begins: trainable parameters, a gradient, and memory."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..devices import moved
from ..errors import UserError
from ..memory import Need, free_memory, measured
from ..memory_format import channels_last
from ..modes import eval_mode
from ._losses import Loss, Ramped, cross_entropy
from ._recipe import Recipe

_BEGINNING = 1e-6  # of training: a loss with CROWN-IBP's bounds has these at first, and they take most


def check_trainable(model: nn.Module) -> None:
    """Raise UserError for a model without parameters that learn, or with some whose type rounds small steps away."""
    kinds = {p.dtype for p in model.parameters() if p.requires_grad}
    if not kinds:
        raise UserError("the model has no parameter that can be trained")
    for kind in kinds & {torch.float16, torch.bfloat16}:
        name = str(kind).removeprefix("torch.")
        raise UserError(f"the model is in {name}, which rounds small steps away; give --dtype float32 or call .float()")


def backward(loss: Tensor) -> None:
    """Compute the gradient of a loss; raise UserError if it has none."""
    if not loss.requires_grad:
        raise UserError("the loss has no gradient: remove detach(), no_grad() and the like from the model's forward()")
    loss.backward()  # type: ignore[no-untyped-call]


def check_memory(model: nn.Module, x: Tensor, recipe: Recipe, loss: Loss | Ramped = cross_entropy) -> None:
    """Raise UserError, with the numbers, if batches of uint8 images like x do not fit into the memory that is free.

    Raise it, too, for a model that cannot be trained.
    """
    check_trainable(model)
    if recipe.epochs and len(x):
        image = as_input(x[:1], model)
        step_need(model, image, recipe, loss).check(recipe.batch_size, free_memory(image.device), "training")


def as_input(x: Tensor, model: nn.Module) -> Tensor:
    """Return uint8 images as float images where a model is: in double precision if it is, else in single."""
    first = next(model.parameters(), x)
    kind = torch.float64 if first.dtype == torch.float64 else torch.float32
    return moved(x, first.device).to(kind).div_(255)


def copies_of(recipe: Recipe) -> int:
    """Return how many numbers training keeps of each parameter: itself, its gradient and the optimiser's averages."""
    return 3 if recipe.optimizer == "sgd" else 4


def step_need(model: nn.Module, x: Tensor, recipe: Recipe, loss: Loss | Ramped = cross_entropy) -> Need:
    """Return the memory of a training step, with the optimiser's averages; x: float images (N, ...).

    It is measured in eval mode, which does not change a model's statistics.
    """
    first = loss.at(_BEGINNING) if isinstance(loss, Ramped) else loss

    def work(images: Tensor) -> None:
        model.zero_grad(set_to_none=True)  # or adding to the first run's gradients would count as one image's memory
        label = torch.zeros(len(images), dtype=torch.int64, device=images.device)
        backward(first(model, images, label, torch.Generator().manual_seed(0)))

    with eval_mode(model), channels_last(model):
        need = measured(work, x)
    model.zero_grad(set_to_none=True)
    kept = (copies_of(recipe) - 2) * sum(p.numel() * p.element_size() for p in model.parameters())
    return Need(need.fixed + kept, need.each)
