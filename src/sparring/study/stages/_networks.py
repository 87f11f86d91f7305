"""Build the networks that stages work on, from a task's inputs and its parents' tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...data import Dataset, as_float
from ...errors import UnknownNameError, UserError
from ...files import sha256_bytes
from ...models import build, load_weights_
from ...modes import eval_mode
from ...outputs import opened
from ...sparsity import ACTIVATIONS, insert

Factory = Callable[..., nn.Module]
# How a network's tensors are named in an object: the final weights, those of the best epoch, and the masks.
WEIGHTS, BEST, MASK = "model/", "best/", "mask/"
# An activation "method" that trains with a penalty and puts no module in.
PENALTY = "l1-penalty"


@dataclass(frozen=True)
class Context:
    """Hold what stages share: the data, where parents' tensors come from, and where a long training may checkpoint.

    `factory` builds the model in place of the plan's, for a user's own in code.
    """

    dataset: Dataset
    tensors: Callable[[str], dict[str, Tensor]]
    scratch: Path | None = None
    device: str = "cpu"
    factory: Factory | None = None


def network(context: Context, inputs: dict[str, Any]) -> nn.Module:
    """Build the network that a task's inputs describe, freshly initialised from their seed."""
    data, options = context.dataset, dict(inputs["model"])
    name = options.pop("name")
    widths = options.pop("widths", None)
    if context.factory is not None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(inputs.get("seed", 0))
            return context.factory().to(context.device)
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
    return model.to(context.device)


def fingerprint(factory: Factory) -> str:
    """Return a hash of the network that a user's factory builds: its printed form and its weights from one seed.

    What its forward() does is not seen: after changing that alone, choose another output folder.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = factory()
    parts = [repr(model).encode(), *(v.detach().cpu().numpy().tobytes() for v in model.state_dict().values())]
    return sha256_bytes(b"\0".join(parts))


def network_of(context: Context, inputs: dict[str, Any], key: str, *, checkpoint: str = "final") -> nn.Module:
    """Build a network with the weights that the task `key` left, with its activation-sparsity modules.

    Its modules are in the modes in which it was built: a frozen one stays frozen when the network is trained further.
    """
    model = network(context, inputs)
    activation = inputs.get("activation")
    if activation is not None and activation["kind"] != PENALTY and activation.get("test", True):
        model = with_activation(model, activation)
    tensors = context.tensors(key)
    prefix = BEST if checkpoint == "best" and any(name.startswith(BEST) for name in tensors) else WEIGHTS
    load_weights_(model, {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
    return model


def with_activation(model: nn.Module, activation: dict[str, Any]) -> nn.Module:
    """Return a copy of a model with an activation-sparsity module in the place of every ReLU."""
    kind, level = activation["kind"], activation["level"]
    if kind not in ACTIVATIONS:
        raise UnknownNameError("activation sparsity", kind, [*ACTIVATIONS, PENALTY])
    return insert(model, lambda: ACTIVATIONS[kind](level))


def chosen_images(dataset: Dataset, split: str, start: int, stop: int) -> tuple[Tensor, Tensor]:
    """Return images start to stop of a fixed random order of a split, so that the first few are no biased sample."""
    part, order = dataset.test if split == "test" else dataset.valid, chosen_places(dataset, split, start, stop)
    return part.x[order], part.y[order]


def chosen_places(dataset: Dataset, split: str, start: int, stop: int) -> Tensor:
    """Return where in the split the images of `chosen_images` are: the tensor `images` (N,) of their records."""
    part = dataset.test if split == "test" else dataset.valid
    return torch.randperm(len(part.x), generator=torch.Generator().manual_seed(0))[start:stop].int()


def check_fit(model: nn.Module, dataset: Dataset) -> None:
    """Raise UserError unless a model, in eval mode, takes a data set's images to its classes."""
    place = next((p.device for p in model.parameters()), torch.device("cpu"))
    if place.type == "meta":
        raise UserError("the model's parameters are on the device 'meta' and hold no numbers; build it on the CPU")
    images = as_float(dataset.test.x[:2]).to(place)
    try:
        with torch.no_grad(), eval_mode(model):
            logits = opened(model, images)(images)
    except UserError as error:
        shape = tuple(images.shape[1:])
        raise UserError(f"the model does not accept {dataset.name}'s images of shape {shape}: {error}") from error
    if bool(logits.isnan().any()):
        raise UserError(f"the model returns NaN for {dataset.name}'s images: are its weights numbers?")
    if logits.shape[1] != dataset.classes:
        raise UserError(
            f"the model returns {logits.shape[1]} numbers an image, but {dataset.name} has {dataset.classes} classes: "
            "do model and data belong together?"
        )
