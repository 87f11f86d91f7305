"""Iterative pruning: train, prune a little, rewind, and again (lottery tickets)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from ...errors import UserError
from .._masks import apply_
from .._rule import Rule
from .._schedule import check_sparsity
from .._types import Batch, Loss, Masks, Pruner, Score


@dataclass(frozen=True)
class _Iterative:
    score: Score
    sparsity: float
    rounds: int
    rewind: str
    rewind_at: float
    rule: Rule
    early: dict[str, Tensor] = field(default_factory=dict, init=False)
    dense_weights: bool = field(default=False, init=False)

    @property
    def cycles(self) -> int:
        """Into how many equal parts the training falls; its learning rate starts anew in each."""
        return self.rounds + 1

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
    ) -> Masks:
        part = -(-steps // self.cycles)
        ends = [min((r + 1) * part, steps) - 1 for r in range(self.rounds)]
        if self.rewind == "weights" and step == int(self.rewind_at * ends[0]):
            self.early.update({name: value.detach().clone() for name, value in model.state_dict().items()})
        if step not in ends:
            return masks
        # The density falls by the same factor in every round; short trainings may end several rounds at one step.
        finished = max(r for r, end in enumerate(ends) if end == step) + 1
        target = 1 - (1 - self.sparsity) ** (finished / self.rounds)
        scores = self.score(model, batch, loss=loss, generator=generator)
        masks = self.rule.masks(model, scores, target, masks=masks, batch=batch)
        if self.rewind == "weights":
            model.load_state_dict(self.early)
        apply_(model, masks)
        return masks

    def state(self) -> dict[str, Tensor]:
        return dict(self.early)

    def load_state_(self, tensors: Mapping[str, Tensor]) -> None:
        self.early.clear()
        self.early.update(tensors)


def iterative(
    score: Score,
    sparsity: float,
    *,
    rounds: int = 5,
    rewind: Literal["weights", "learning-rate"] = "weights",
    rewind_at: float = 0.1,
    rule: Rule | None = None,
) -> Pruner:
    """Prune in `rounds` rounds, each after an equal part of the training; a last part trains what remains.

    With `rewind` "weights" all parameters and buffers go back, after every round, to what they were when the fraction
    `rewind_at` of the first part was over (Frankle et al. 2020, algorithm 1); with "learning-rate" they stay (Renda et
    al. 2020, section 3). Both want the learning rate to start anew in each part, which a training loop that knows the
    attribute `cycles` does. One pruner serves one training. Raise UserError for values out of range.
    """
    check_sparsity(sparsity)
    if rounds < 1 or not 0 <= rewind_at <= 1:
        raise UserError(f"iterative pruning needs rounds >= 1 and 0 <= rewind_at <= 1, not {rounds}, {rewind_at}")
    if rewind not in ("weights", "learning-rate"):
        raise UserError(f"rewind is 'weights' or 'learning-rate', not '{rewind}'")
    return _Iterative(score, sparsity, rounds, rewind, rewind_at, rule or Rule())
