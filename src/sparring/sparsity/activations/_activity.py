"""Measure activations: zeros after each nonlinearity, dead units, and a penalty."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from ...declared import Declared
from ...errors import UserError
from ...memory import answers_at_once
from ...modes import eval_mode
from ...outputs import opened
from .._masks import Loss

_NONLINEAR: frozenset[Callable[..., Any]] = frozenset(
    {F.relu, F.relu_, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_, F.relu6, F.leaky_relu, F.elu, F.gelu, F.silu,
     F.hardtanh, F.hardswish, F.softplus, torch.sigmoid, Tensor.sigmoid, torch.tanh, Tensor.tanh}
)  # fmt: skip
Hear = Callable[[str, Tensor], None]


@dataclass(frozen=True)
class LayerActivity:
    """Activity of one nonlinearity: `dead` are the units (channels) that are never nonzero."""

    name: str
    sparsity: float
    units: int
    dead: tuple[int, ...]


@dataclass(frozen=True)
class Activity:
    """Activity of every nonlinearity in the order of the forward pass, and the sparsity of all activations."""

    layers: tuple[LayerActivity, ...]
    sparsity: float


@dataclass
class _Tally:
    zeros: int = 0
    total: int = 0
    alive: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.bool))

    def add(self, value: Tensor) -> None:
        nonzero = value.detach() != 0
        self.zeros += nonzero.numel() - int(nonzero.sum())
        self.total += nonzero.numel()
        alive = nonzero.transpose(0, 1).flatten(1).any(1)
        self.alive = alive | self.alive if len(self.alive) else alive


@torch.no_grad()
def activity(model: nn.Module, x: Tensor, *, batch_size: int | None = None) -> Activity:
    """Measure activation sparsity on images, uint8 or float in [0, 1], in eval mode.

    Nonlinearities are found while the model runs, as modules or functions; a function has the name of the module that
    calls it. A sparse activation counts as one. With batch_size None it is 500, or as many
    as memory allows. Raises UserError if there is no image.
    """
    if not len(x):
        raise UserError("activation sparsity is measured on images; there are none")
    tallies: dict[str, _Tally] = {}

    def hear(name: str, value: Tensor) -> None:
        tallies.setdefault(name, _Tally()).add(value)

    with eval_mode(model):
        few = x[:2].float() / 255 if x.dtype == torch.uint8 else x[:2]
        answer = opened(model, few)

        def heard(images: Tensor, hear: Hear = lambda _, value: _Tally().add(value)) -> None:
            with _listening(model, hear):
                answer(images)

        for part in torch.split(x, batch_size or answers_at_once(heard, few)):
            heard(part.float().div_(255) if part.dtype == torch.uint8 else part, hear)
    layers = tuple(
        LayerActivity(name, t.zeros / t.total, len(t.alive), tuple((~t.alive).nonzero().flatten().tolist()))
        for name, t in tallies.items()
    )
    total = sum(t.total for t in tallies.values())
    return Activity(layers, sum(t.zeros for t in tallies.values()) / total if total else 0.0)


def with_activation_penalty(loss: Loss, strength: float) -> Loss:
    """Return a loss plus `strength` times the mean |activation| after the nonlinearities, on the clean images.

    The penalty is the mean over layers (Georgiadis 2019, equation 3); it costs one more forward pass. Raise UserError
    for a strength below 0.
    """
    if not strength >= 0:
        raise UserError(f"strength weighs the activation penalty, at least 0, not {strength}")

    def penalised(model: nn.Module, x: Tensor, y: Tensor, generator: torch.Generator | None = None) -> Tensor:
        means: list[Tensor] = []
        # A copy: later operations may write into the value, which the penalty's backward pass needs unchanged.
        with _listening(model, lambda _, value: means.append(value.clone().abs().mean())):
            model(x.clone())
        base = loss(model, x, y, generator)
        return base + strength * torch.stack(means).mean() if means else base

    return penalised


@contextmanager
def _listening(model: nn.Module, hear: Hear) -> Iterator[None]:
    """Call `hear` with the name and value of every nonlinearity's output while the model runs once."""
    mode = _Listener(hear)
    with ExitStack() as stack:
        for name, module in model.named_modules():
            stack.callback(module.register_forward_pre_hook(mode.enter(name, module)).remove)
            stack.callback(module.register_forward_hook(mode.leave, always_call=True).remove)
        stack.enter_context(mode)
        yield


class _Listener(TorchFunctionMode):
    """Intercept every function that torch runs, with the module that called it."""

    def __init__(self, hear: Hear) -> None:
        super().__init__()
        self.hear = hear
        self.path: list[tuple[str, bool]] = []
        self.uses: dict[str, int] = {}

    def enter(self, name: str, module: nn.Module) -> Callable[[nn.Module, Any], None]:
        sparsifier = isinstance(module, Declared)

        def hook(_: nn.Module, __: Any) -> None:
            self.path.append((name, sparsifier))

        return hook

    def leave(self, _: nn.Module, __: Any, value: Any) -> None:
        name, sparsifier = self.path.pop()
        if sparsifier and isinstance(value, Tensor):
            self._tell(name, value)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        value = func(*args, **(kwargs or {}))
        if func in _NONLINEAR and not any(sparsifier for _, sparsifier in self.path):
            self._tell(self.path[-1][0] if self.path else "", value)
        return value

    def _tell(self, name: str, value: Tensor) -> None:
        # A module that runs several nonlinearities, or runs several times, has one name for each.
        name = name or "model"
        use = self.uses.get(name, 0)
        self.uses[name] = use + 1
        self.hear(f"{name}#{use + 1}" if use else name, value)
