"""The types that every way of making a network sparse shares."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn

Masks = dict[str, Tensor]
"""Parameter name to bool tensor of the parameter's shape; True = kept."""

Scores = dict[str, Tensor]
"""Parameter name to finite float tensor of the parameter's shape; the highest are kept."""

Batch = tuple[Tensor, Tensor]
"""Images (N, C, H, W), float in [0, 1], and labels (N,), int64."""

Loss = Callable[[nn.Module, Tensor, Tensor, torch.Generator | None], Tensor]
"""A scalar from a model, float images, labels and a generator."""


class Score(Protocol):
    """Say how much each prunable weight is worth. Scores ignore what they do not need and leave the model as it is."""

    def __call__(
        self,
        model: nn.Module,
        batch: Batch | None = None,
        *,
        loss: Loss | None = None,
        generator: torch.Generator | None = None,
    ) -> Scores: ...


class Pruner(Protocol):
    """Change masks while a network trains: one shape for one-shot, gradual and dynamic methods.

    The training loop calls it after every optimiser step, with `p.grad` still the dense gradient of that step. It may
    change weights in place. Where nothing changes it returns the very masks it was given. It may also have `exact`
    (False: it ends at a sparsity of its own), `rule` (which weights its sparsity is of), `cycles` (the learning rate
    starts anew in each of so many equal parts) and `series()` (numbers over the steps, for the record).
    """

    @property
    def dense_weights(self) -> bool:
        """True: the forward pass uses w∘mask and w itself stays dense. False: masked weights are zero."""
        ...

    def __call__(
        self,
        model: nn.Module,
        masks: Masks,
        *,
        step: int,
        steps: int,
        batch: Batch,
        loss: Loss,
        generator: torch.Generator,
    ) -> Masks: ...
