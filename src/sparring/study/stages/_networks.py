"""Build the networks of stages, and find the width at which one has a given number of weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...data import Dataset, as_float, fixed_order
from ...devices import CPU, Place
from ...errors import PlanError, UnknownNameError, UserError
from ...files import sha256_bytes
from ...matrices import refuse_unmasked
from ...models import build, is_hub_name, load_weights_
from ...modes import eval_mode
from ...outputs import check_module, opened
from ...records import Store, read_plan, read_record
from ...sparsity import ACTIVATIONS, insert
from ...waiting import courteous
from ..runner._executors import Task
from ._inputs import Activation, Inputs, Judged, Network

Factory = Callable[..., nn.Module]
# Prefixes of a network's tensors in an object: the final weights, those of the best epoch, and the masks.
WEIGHTS, BEST, MASK = "model/", "best/", "mask/"
# An activation "method" that trains with a penalty and inserts no module.
PENALTY = "l1-penalty"
# Below this number of units in a layer a small dense network is not a fair control (design.md, section 6, trap 7).
NARROWEST = 8
WIDEST = 64.0


@dataclass(frozen=True)
class Context:
    """Shared context of stages: the data, the source of parents' tensors, and the folder of checkpoints.

    `factory` builds the model instead of the plan's, for a user's own code. `tell` gets the images that a long task has
    done, and their number.
    """

    dataset: Dataset
    tensors: Callable[[str], dict[str, Tensor]]
    scratch: Path | None = None
    place: Place = CPU
    factory: Factory | None = None
    tell: Callable[[int, int], None] = lambda *_: None

    @property
    def device(self) -> str:
        """The device of all networks and of their images."""
        return self.place.device


def network(context: Context, asked: Network, seed: int = 0) -> nn.Module:
    """Build a network, freshly initialised from a seed."""
    data = context.dataset
    if context.factory is not None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return context.place.model(context.factory())
    shape = tuple(data.train.x.shape[1:])
    return context.place.model(_built(asked, shape, data.classes, data.mean, data.std, seed))


def _built(
    asked: Network, shape: tuple[int, ...], classes: int, mean: tuple[float, ...], std: tuple[float, ...], seed: int
) -> nn.Module:
    return build(
        asked.name,
        shape=shape,
        classes=classes,
        mean=mean,
        std=std,
        seed=seed,
        width=asked.width,
        widths=asked.widths,
        depth=asked.depth,
    )


def fingerprint(factory: Factory) -> str:
    """Return a hash of the network that a user's factory builds: its printed form and its weights from one seed.

    Changes that only affect forward() are not detected: choose another output folder after them.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = factory()
    parts = [repr(model).encode(), *(v.detach().cpu().numpy().tobytes() for v in model.state_dict().values())]
    return sha256_bytes(b"\0".join(parts))


def network_of(
    context: Context, inputs: Inputs, key: str, *, activation: Activation | None = None, checkpoint: str = "final"
) -> nn.Module:
    """Build a network with the weights of the task `key`, and with its activation-sparsity modules.

    Its modules are in the modes in which it was built: a frozen one stays frozen when the network is trained further.
    """
    model = network(context, inputs.model, inputs.initial_seed)
    if activation is not None and activation.kind != PENALTY and activation.test:
        model = with_activation(model, activation)
    load_network_(model, context.tensors(key), checkpoint=checkpoint)
    return model


def load_network_(model: nn.Module, tensors: Mapping[str, Tensor], *, checkpoint: str = "final") -> None:
    """Load weights from a task's tensors into a model.

    Raises UserError if they do not fit, or if the final weights are not as sparse as their masks.
    """

    def part(prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}

    best = part(BEST) if checkpoint == "best" else {}
    load_weights_(model, best or part(WEIGHTS))
    if not best:
        place = next(model.parameters()).device
        masks = {name: mask.to(place) for name, mask in part(MASK).items()}
        refuse_unmasked(model, masks, "its object file was not written by a study; rerun the study")


def trained(out: str | Path, key: str, *, factory: str | None = None) -> nn.Module:
    """Load the network that the task `key` of a study trained, such as `report.pick(out).key`, from its folder.

    The network is in eval mode and includes its normalisation. Raises UserError if the folder does not have it, as
    `load_network_` does, and for a model that is code, which runs only if `factory` names it.
    """
    record, facts = read_record(out, key), read_plan(out).dataset
    if record is None:
        raise UserError(f"{out} no longer has {key}; rerun the study")
    options: dict[str, Any] = {k: tuple(v) if k == "widths" else v for k, v in record.inputs["model"].items()}
    asked = Network(**options)
    if ":" in asked.name and not is_hub_name(asked.name) and factory != asked.name:
        own = asked.name
        raise UserError(f"the study's model is code; if you trust '{own}' in this folder, run it with --model {own}")
    shape, ones = tuple(facts["shape"]), (1.0,) * facts["shape"][0]
    model = _built(asked, shape, facts["class_count"], ones, ones, 0)
    if record.environment.get("dtype") == "float64":
        model.double()
    load_network_(model, Store(out).tensors(key))
    return model.eval()


def judged(context: Context, task: Task[Judged]) -> nn.Module:
    """Build the network that a task evaluates: the first parent's."""
    inputs = task.inputs
    return network_of(
        context, inputs, task.parents[0], activation=inputs.activation, checkpoint=inputs.checkpoint
    ).eval()


def with_activation(model: nn.Module, activation: Activation) -> nn.Module:
    """Return a copy of a model in which a sparse activation replaces every ReLU."""
    if activation.kind not in ACTIVATIONS:
        raise UnknownNameError("activation sparsity", activation.kind, [*ACTIVATIONS, PENALTY])
    return insert(model, lambda: ACTIVATIONS[activation.kind](activation.level))


def chosen_images(dataset: Dataset, split: str, start: int, stop: int) -> tuple[Tensor, Tensor]:
    """Return images start to stop in a fixed random order of a split, so that the first few are an unbiased sample."""
    part, order = dataset.test if split == "test" else dataset.valid, chosen_places(dataset, split, start, stop)
    if split == "test" and dataset.drawn is not None:  # the loaded images are the first of this order
        return part.x[start:stop], part.y[start:stop]
    return part.x[order], part.y[order]


def chosen_places(dataset: Dataset, split: str, start: int, stop: int) -> Tensor:
    """Return the positions in the split of the images of `chosen_images`: the tensor `images` (N,) of their records."""
    part = dataset.test if split == "test" else dataset.valid
    drawn = dataset.drawn if split == "test" else None
    return (fixed_order(len(part.x)) if drawn is None else drawn)[start:stop].int()


@courteous()
def check_fit(model: nn.Module, dataset: Dataset) -> None:
    """Raise UserError unless a model, in eval mode, maps a data set's images to its classes."""
    place = next((p.device for p in model.parameters()), torch.device("cpu"))
    if place.type == "meta":
        raise UserError("the model's parameters are on the device 'meta' and have no values; build it on the CPU")
    images = as_float(dataset.test.x[:2]).to(place)
    try:
        check_module(model)
        with torch.no_grad(), eval_mode(model):
            logits = opened(model, images)(images)
    except UserError as error:
        raise UserError(f"the model does not accept the images of {dataset.name}: {error}") from error
    if not bool(logits.isfinite().all()):
        what = "NaN" if bool(logits.isnan().any()) else "infinite logits"
        raise UserError(
            f"the model returns {what} for {dataset.name}'s images; check its weights, and divisions and logarithms in "
            "forward()"
        )
    if logits.shape[1] != dataset.classes:
        raise UserError(
            f"the model returns {logits.shape[1]} numbers per image, but {dataset.name} has {dataset.classes} "
            f"{'class' if dataset.classes == 1 else 'classes'}: "
            "do model and data belong together? If the data have only some of the model's classes, "
            "--classes FILE names them all"
        )


def is_untrained(model: nn.Module, other: nn.Module) -> bool:
    """Return whether two builds of a network, from two seeds, have other parameters: nothing trained is in them."""
    found = dict(other.named_parameters())
    return any(not torch.equal(value, found.get(name, value)) for name, value in model.named_parameters())


# -- controls of equal size --------------------------------------------------------------------------------------------


def narrowed(model: Network, shape: tuple[int, ...], classes: int, sparsity: float) -> Network | None:
    """Return a narrower model with as many weights as this one keeps at a sparsity, or None below 8."""
    wanted = round((1 - sparsity) * _weights(model, shape, classes)[0])
    width = _search(model, shape, classes, wanted, 1e-3, 1.0)
    found = _scaled(model, width)
    return found if _weights(found, shape, classes)[1] >= NARROWEST else None


def widened(model: Network, shape: tuple[int, ...], classes: int, sparsity: float) -> Network:
    """Return a wider model that keeps, at a sparsity, as many weights as this one has in all."""
    wanted = round(_weights(model, shape, classes)[0] / (1 - sparsity))
    return _scaled(model, _search(model, shape, classes, wanted, 1.0, WIDEST))


def _search(model: Network, shape: tuple[int, ...], classes: int, wanted: int, low: float, high: float) -> float:
    """Return the width, between low and high, whose number of weights is nearest to the target."""

    def count(width: float) -> int:
        return _weights(_scaled(model, width), shape, classes)[0]

    if ":" in model.name or model.name == "linear":
        raise PlanError(f"model '{model.name}' has no width, so there is no control of equal size; remove this control")
    for _ in range(40):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if count(middle) < wanted else (low, middle)
    nearer = low if abs(count(low) - wanted) < abs(count(high) - wanted) else high
    return round(nearer, 6)


def _scaled(model: Network, width: float) -> Network:
    if model.name == "mlp":
        return replace(model, widths=tuple(max(1, round(w * width)) for w in model.widths or (300, 100)))
    return replace(model, width=(1.0 if model.width is None else model.width) * width)


def _weights(model: Network, shape: tuple[int, ...], classes: int) -> tuple[int, int]:
    """Count a model's weights and its narrowest hidden layer, without allocating them."""
    ones = (1.0,) * shape[0]
    with torch.device("meta"):
        built = _built(model, shape, classes, ones, ones, 0)
    layers = [m.weight for m in built.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    return sum(w.numel() for w in layers), min((w.shape[0] for w in layers[:-1]), default=0)
