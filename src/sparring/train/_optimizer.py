"""SGD and Adam by torch's functions: the first object of its classes imports its compiler, which costs 1.7 s a process.

The kernels and so the numbers are those of `torch.optim.SGD` and `torch.optim.Adam` with `fused=True`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.optim.adam import adam
from torch.optim.sgd import sgd

from ._recipe import Recipe


@dataclass
class Optimizer:
    """Hold the parameters that a recipe trains, and the moving averages of each, as torch's optimisers name them."""

    recipe: Recipe
    parameters: list[nn.Parameter]
    state: dict[nn.Parameter, dict[str, Tensor]] = field(default_factory=dict)

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Move the parameters that have a gradient."""
        moving = [p for p in self.parameters if p.grad is not None]
        gradients = [p.grad for p in moving if p.grad is not None]
        if self.recipe.optimizer == "adam":
            self._adam(moving, gradients, lr)
        else:
            self._sgd(moving, gradients, lr)

    def _sgd(self, moving: list[nn.Parameter], gradients: list[Tensor], lr: float) -> None:
        recipe = self.recipe
        buffers: list[Tensor | None] = []
        if recipe.momentum:
            buffers = [self.state.get(p, {}).get("momentum_buffer") for p in moving]
        sgd(
            list[Tensor](moving), gradients, buffers, lr=lr, momentum=recipe.momentum,
            weight_decay=recipe.weight_decay, dampening=0, nesterov=False, maximize=False, fused=True,
        )  # fmt: skip
        for parameter, buffer in zip(moving, buffers, strict=False):
            assert buffer is not None  # made by the first step
            self.state[parameter] = {"momentum_buffer": buffer}

    def _adam(self, moving: list[nn.Parameter], gradients: list[Tensor], lr: float) -> None:
        for p in moving:
            if p not in self.state:
                step = torch.zeros((), dtype=torch.float32, device=p.device)
                self.state[p] = {"step": step, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
        slots = [self.state[p] for p in moving]
        means, squares, steps = ([slot[name] for slot in slots] for name in ("exp_avg", "exp_avg_sq", "step"))
        adam(
            list[Tensor](moving), gradients, means, squares, [], steps, lr=lr, beta1=0.9, beta2=0.999, eps=1e-8,
            weight_decay=self.recipe.weight_decay, amsgrad=False, maximize=False, fused=True,
        )  # fmt: skip
