"""Save and restore a training run between epochs; tensors only, nothing is unpickled, and a checksum over all."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..files import load_tensors, pack_tensors, save_tensors, sha256_bytes
from ..sparsity import Masks, Pruner
from ._optimizer import Optimizer


@dataclass
class State:
    """Hold everything that a run cut short needs to go on."""

    model: nn.Module
    optimizer: Optimizer
    masks: Masks
    generator: torch.Generator
    pruner: Pruner | None
    epoch: int = 0
    losses: list[float] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    best_epoch: int | None = None
    best_state: dict[str, Tensor] = field(default_factory=dict)


def save_checkpoint(state: State, path: Path) -> None:
    """Write the state atomically to a safetensors file."""
    tensors: dict[str, Tensor] = {f"model/{name}": value for name, value in state.model.state_dict().items()}
    tensors |= {f"best/{name}": value for name, value in state.best_state.items()}
    tensors |= {f"mask/{name}": value for name, value in state.masks.items()}
    for index, parameter in enumerate(state.optimizer.parameters):
        slot = state.optimizer.state.get(parameter, {})
        tensors |= {f"optimizer/{index}/{name}": value for name, value in slot.items()}
    if state.pruner is not None:
        tensors |= {f"pruner/{name}": value for name, value in state.pruner.state().items()}
    tensors["generator"] = state.generator.get_state()
    scalars = {"epoch": state.epoch, "losses": state.losses, "scores": state.scores, "best_epoch": state.best_epoch}
    tensors["scalars"] = _bytes(json.dumps(scalars))
    save_tensors(path, {**tensors, "sha256": _bytes(_checksum(tensors))})


def is_whole(path: Path) -> bool:
    """Say whether a checkpoint's checksum is right."""
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
        raise UserError(f"{path} is not a checkpoint of this training run; remove it to start afresh") from error
    place = next(state.model.parameters()).device
    state.masks = {name: mask.to(place) for name, mask in _part(tensors, "mask/").items()}
    state.best_state = _part(tensors, "best/")
    for index, parameter in enumerate(state.optimizer.parameters):
        slot = _part(tensors, f"optimizer/{index}/")
        if slot:
            state.optimizer.state[parameter] = {name: _laid_out(value, parameter) for name, value in slot.items()}
    kept = _part(tensors, "pruner/")
    if kept and state.pruner is not None:
        state.pruner.load_state_(kept)


def _laid_out(value: Tensor, parameter: nn.Parameter) -> Tensor:
    """Return the value in its parameter's place and order in memory: fused optimisers go through both as they lie."""
    if value.shape != parameter.shape:  # a count of steps
        return value.to(parameter.device)
    return torch.empty_like(parameter.detach()).copy_(value)


def _read(path: Path) -> dict[str, Tensor]:
    tensors = load_tensors(path)
    stated = tensors.pop("sha256", torch.empty(0))
    if not torch.equal(stated, _bytes(_checksum(tensors))):
        raise UserError(f"{path} is damaged: its checksum is wrong; remove it to start afresh")
    return tensors


def _checksum(tensors: dict[str, Tensor]) -> str:
    return sha256_bytes(pack_tensors(tensors))


def _bytes(text: str) -> Tensor:
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name[len(prefix) :]: value for name, value in tensors.items() if name.startswith(prefix)}
