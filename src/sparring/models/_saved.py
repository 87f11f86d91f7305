"""Model files: weights and what is needed to rebuild the model, as tensors and JSON only."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..files import load_tensors, save_tensors
from ..matrices import refuse_unmasked
from ._hubs import is_hub_name
from ._registry import build
from ._weights import load_weights_

_ABOUT = "sparring/blueprint"
_MASK = "sparring/mask/"


@dataclass(frozen=True)
class Blueprint:
    """Arguments of `build`, and the data set that the model was made for."""

    name: str
    shape: tuple[int, ...]
    classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    width: float | None = None
    widths: tuple[int, ...] | None = None
    depth: int | None = None
    data: str = ""

    def build(self, *, seed: int = 0) -> nn.Module:
        """Build the model with fresh weights."""
        options = {name: value for name, value in asdict(self).items() if name != "data"}
        return build(options.pop("name"), seed=seed, **options)


def save_model(
    path: str | Path, model: nn.Module, blueprint: Blueprint, masks: dict[str, Tensor] | None = None
) -> Path:
    """Write weights, masks and blueprint to a safetensors file."""
    about = torch.frombuffer(bytearray(json.dumps(asdict(blueprint)).encode()), dtype=torch.uint8)
    tensors = {**model.state_dict(), **{_MASK + name: mask for name, mask in (masks or {}).items()}, _ABOUT: about}
    return save_tensors(path, {name: value.detach().contiguous() for name, value in tensors.items()})


def load_model(path: str | Path) -> tuple[nn.Module, Blueprint, dict[str, Tensor]]:
    """Build a model, in eval mode, from a file that `save_model` wrote; also return its blueprint and masks.

    Raises UserError if a weight that its mask removed is not zero. Nothing in the file is executed. The file is
    untrusted, so a blueprint that names a user's factory ("module:function") is refused: build the model yourself and
    load the file as weights.
    """
    tensors = load_tensors(path)
    blueprint = _blueprint(tensors, path)
    if ":" in blueprint.name and not is_hub_name(blueprint.name):
        raise UserError(
            f"{path} was made by the factory '{blueprint.name}', which is code; "
            f"if you trust it, give {blueprint.name}@{path} as the model"
        )
    masks = {name.removeprefix(_MASK): tensors.pop(name) for name in list(tensors) if name.startswith(_MASK)}
    with torch.device("meta"):  # uses no memory, for any sizes that the file claims
        wanted = {name: value.shape for name, value in blueprint.build().state_dict().items()}
    for name, shape in wanted.items():
        if name in tensors and tensors[name].shape != shape:
            found = tuple(tensors[name].shape)
            raise UserError(f"{path}: '{name}' has shape {found}, its model needs {tuple(shape)}")
    if sum(shape.numel() for shape in wanted.values()) > 2 * sum(value.numel() for value in tensors.values()):
        raise UserError(f"{path} lacks most of its model's weights")
    double = any(value.dtype == torch.float64 for value in tensors.values())  # if it was trained with --dtype float64
    model = blueprint.build().to(torch.float64 if double else None)
    load_weights_(model, tensors)
    refuse_unmasked(model, masks, f"{path} was changed after pruning; create it again")
    return model.eval(), blueprint, masks


def read_blueprint(path: str | Path) -> Blueprint:
    """Return the blueprint in a file that `save_model` wrote; raise UserError if there is none."""
    return _blueprint(load_tensors(path), path)


def _blueprint(tensors: dict[str, Tensor], path: str | Path) -> Blueprint:
    """Take the blueprint out of a file's tensors, in place."""
    if _ABOUT not in tensors:
        raise UserError(f"{path} has weights but does not name their model; give the model and --weights {path}")
    try:
        about = json.loads(bytes(tensors.pop(_ABOUT).numpy()).decode())
        about = {key: tuple(value) if isinstance(value, list) else value for key, value in about.items()}
        blueprint = Blueprint(**about)
        _refuse_absurd(blueprint)
        return blueprint
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: the description of the model is damaged ({error})") from error


def _refuse_absurd(blueprint: Blueprint) -> None:
    """Raise ValueError or TypeError unless an untrusted blueprint is valid."""
    numbers = (*blueprint.shape, blueprint.classes, *(blueprint.widths or ()), blueprint.depth or 1)
    if len(blueprint.shape) != 3 or len(blueprint.widths or ()) > 100:
        raise ValueError("its shape or its number of layers")
    if not all(type(number) is int and 1 <= number <= 1_000_000 for number in numbers) or (blueprint.depth or 1) > 1000:
        raise ValueError("its sizes")
    if not 0 < (1.0 if blueprint.width is None else blueprint.width) <= 64:
        raise ValueError("its width")
    if not all(math.isfinite(value) for value in blueprint.mean) or not all(0 < v < math.inf for v in blueprint.std):
        raise ValueError("its mean or std")
