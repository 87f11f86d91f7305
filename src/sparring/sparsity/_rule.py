"""Shared parts of pruners: the rule that turns scores into masks, the step, and the schedule."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..errors import UnknownNameError, UserError
from ..matrices import is_transposed, matrices
from ..units import percent
from ._masks import Batch, Loss, Masks, Scores
from ._select import NM, Channels, Structure, Unstructured, largest_unit, select
from .channels._channels import silent, tied_channels

UPDATES = 100  # default number of changes of masks along a schedule


@dataclass(frozen=True)
class Rule:
    """Options of `select` that are the same in every step.

    `spare` names weights that are never pruned; `spare_first` and `spare_last` are the first and last in the model's
    order. Sparsities are fractions of the other weights.
    """

    scope: str = "global"
    structure: Structure = field(default_factory=Unstructured)
    floor: float = 0.0
    spare: Collection[str] = ()
    spare_first: bool = False
    spare_last: bool = False

    def open(self, masks: Masks) -> Masks:
        """Return the masks of the weights that may be pruned."""
        weights = {name: mask for name, mask in masks.items() if mask.dim() > 1}
        for name in self.spare:
            if name not in weights:
                raise UnknownNameError("layer", name, weights)
        names = list(weights)
        spared = {*self.spare, *names[: self.spare_first], *names[len(names) - self.spare_last :]}
        if len(spared) == len(names):
            raise UserError("every layer is spared, so nothing can be pruned")
        return self.structure.fitting({name: mask for name, mask in weights.items() if name not in spared})

    def by_layer(self, masks: Masks, values: float | Mapping[str, float]) -> dict[str, float]:
        """Return one value for every weight that may be pruned; raise UserError for unknown and missing names."""
        names = self.open(masks)
        if not isinstance(values, Mapping):
            return dict.fromkeys(names, values)
        for name in values:
            if name not in names:
                raise UnknownNameError("layer", name, names)
        for name in names:
            if name not in values:
                raise UserError(f"'{name}' has no value; give one, or spare this layer")
        return {name: values[name] for name in names}

    def masks(
        self,
        model: nn.Module,
        scores: Scores,
        sparsity: float | Mapping[str, float],
        *,
        masks: Masks,
        batch: Batch | None = None,
        regrow: bool = False,
    ) -> Masks:
        """Return new masks for a model; with `regrow` a weight may come back.

        If the batch gives the shape of an image, whole channels are removed with their biases and batch norms, coupled
        ones together, and the layers that output the classes keep all channels.
        """
        within, structure, shape = self.open(masks), self.structure, None
        if isinstance(structure, NM | Channels):
            _refuse_transposed(model, within)
        if isinstance(structure, Channels) and batch is not None:
            shape = tuple(batch[0].shape[1:])
            structure, fixed = tied_channels(model, shape)
            structure = structure.sparing(set(structure.coupled) - set(within))
            fixed = (*fixed, *(name for name, units in structure.coupled.items() if not bool(units.any())))
            within = {name: mask for name, mask in within.items() if name not in fixed}
            if isinstance(sparsity, Mapping):
                _check_channels(sparsity, structure.tied, fixed)
                sparsity = {name: value for name, value in sparsity.items() if name not in fixed}
            if not within:
                raise UserError(
                    "no layer can lose whole channels: all are spared, output the classes, or are coupled with one "
                    "that does; prune unstructured"
                )
        for name, mask in within.items():
            score = scores.get(name) if isinstance(scores, Mapping) else None
            if score is None or score.shape != mask.shape:
                raise UserError(f"the score returned no tensor of shape {tuple(mask.shape)} for '{name}'")
        new = select(
            {name: scores[name] for name in within},
            sparsity,
            structure=structure,
            scope=self.scope,
            within=None if regrow else within,
            floor=self.floor,
        )
        for matrix in matrices(model):
            if matrix.name in new and matrix.divides and not bool(new[matrix.name].any()):
                # spectral_norm cannot divide by the norm of zeros: its best weight stays.
                new[matrix.name].view(-1)[scores[matrix.name].flatten().argmax()] = True
        if shape is None:
            return {**masks, **new}
        # If weights come back, so must the biases that were removed with them.
        kept = {name: mask for name, mask in masks.items() if mask.dim() > 1} if regrow else masks
        return silent(model, {**kept, **new}, shape)

    def tolerance(self, masks: Masks) -> float:
        """Return by how many weights masks may miss a sparsity: half a unit per separately counted layer."""
        sizes = [largest_unit(size) for size in self.structure.sizes(self.open(masks)).values()]
        return max(sizes) / 2 if self.scope == "global" else sum(sizes) / 2


def _refuse_transposed(model: nn.Module, names: Collection[str]) -> None:
    for matrix in matrices(model):
        if matrix.name in names and is_transposed(matrix):
            raise UserError(
                f"'{matrix.name}' belongs to a transposed convolution, whose rows are inputs; spare it, "
                "or prune single weights instead of n:m or whole channels"
            )


def _check_channels(given: Mapping[str, float], tied: Collection[Collection[str]], fixed: Collection[str]) -> None:
    """Raise UserError for given sparsities that whole channels cannot have."""
    for name in fixed:
        if given.get(name):
            raise UserError(f"'{name}' keeps all its channels (classes, or inputs that cannot shrink); set it to 0")
    for group in tied:
        if len({given[name] for name in group if name in given}) > 1:
            raise UserError(f"{', '.join(group)} lose their channels together; give them one sparsity")


@dataclass(frozen=True)
class Step:
    """The state after an optimiser step; the dense gradient is still in the parameters' `grad`.

    `number` counts from 0 to `steps` - 1. `loss` is the training loss, and `batch` its data.
    """

    model: nn.Module
    masks: Masks
    number: int
    steps: int
    batch: Batch
    loss: Loss
    generator: torch.Generator


class Pruner(ABC):
    """Change masks while a network trains: the base of one-shot, gradual and dynamic methods.

    The training loop calls it after every optimiser step, and once if a training has no steps. It may change weights in
    place. If nothing changes, it returns the same masks object. A pruner with state serves one training.
    """

    dense_weights: bool = False
    """True: the forward pass uses w∘mask and w itself stays dense. False: masked weights are zero."""

    exact: bool = True
    """False: the final sparsity is not exact, as with Bernoulli masks."""

    rule: Rule = Rule()
    """The weights that its sparsity counts."""

    cycles: int = 1
    """Number of equal parts of the training in which the learning-rate schedule restarts."""

    @abstractmethod
    def __call__(self, step: Step) -> Masks:
        """Return the masks from this step on."""

    def series(self) -> dict[str, list[int]]:
        """Return numbers over the steps, such as splices, for the record."""
        return {}

    def state(self) -> dict[str, Tensor]:
        """Return its state as tensors, for checkpoints."""
        return {}

    def load_state_(self, tensors: Mapping[str, Tensor]) -> None:  # noqa: B027 - most have nothing to take back
        """Restore what `state` returned."""


@dataclass(frozen=True)
class Schedule:
    """Change masks from `start` to `stop`, fractions of the training, every `every` optimiser steps.

    With `every` None they change about a hundred times, for any length of training: few large cuts cost accuracy.
    Raise UserError unless 0 <= start <= stop <= 1 and every >= 1.
    """

    start: float = 0.0
    stop: float = 1.0
    every: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.start <= self.stop <= 1:
            raise UserError(
                "pruning goes from start to stop, fractions of the training with start <= stop, not "
                f"{self.start}, {self.stop}"
            )
        if self.every is not None and self.every < 1:
            raise UserError(f"every is a number of optimiser steps, at least 1, not {self.every}")

    def window(self, steps: int) -> tuple[int, int]:
        """Return the first and the last step."""
        last = last_step(self.stop, steps)
        return min(math.floor(self.start * steps), last), last

    def progress(self, step: Step) -> float | None:
        """Return the finished fraction of the schedule if the masks change at this step (1 at the last), else None."""
        first, last = self.window(step.steps)
        every = max(1, (last - first) // UPDATES) if self.every is None else self.every
        if not first <= step.number <= last or ((step.number - first) % every and step.number != last):
            return None
        return 1.0 if step.number == last else (step.number - first) / (last - first)


def last_step(stop: float, steps: int) -> int:
    """Return the last step of the first part of a training, up to the fraction `stop`; it is never step `steps`."""
    return min(steps - 1, max(0, math.ceil(stop * steps) - 1))


def cubic(progress: float, final: float, initial: float = 0.0) -> float:
    """Return the sparsity at the fraction `progress` of the schedule (Zhu & Gupta 2017, equation 1)."""
    left = 1.0 - min(max(progress, 0.0), 1.0)
    return final + (initial - final) * left**3


def check_sparsity(sparsity: float | Mapping[str, float]) -> None:
    """Raise UserError unless the sparsity, or each of them, is in [0, 1)."""
    for value in sparsity.values() if isinstance(sparsity, Mapping) else (sparsity,):
        if not 0 <= value < 1:
            raise UserError(f"sparsity is the fraction removed, at least 0 and below 1, not {value}")


def require_unstructured(rule: Rule, method: str) -> None:
    """Raise UserError if a rule has a structure that a method cannot keep."""
    if not isinstance(rule.structure, Unstructured):
        raise UserError(
            f"{method} moves single weights and cannot keep the structure {type(rule.structure).__name__}; "
            "use a gradual, one-shot or iterative method"
        )


def check_reached(pruner: Pruner, masks: Masks, sparsity: float | Mapping[str, float] | None) -> None:
    """Raise UserError unless a pruner removed the requested share (None: nothing), to one unit of its structure.

    A sparsity per layer is checked per layer. Pruners that are not `exact`, and channels, are not checked: only the
    graph of the network determines which channels can be removed together, and `select` uses it.
    """
    rule = pruner.rule
    if sparsity is None or not pruner.exact or isinstance(rule.structure, Channels):
        return
    counted = rule.open(masks)
    if isinstance(sparsity, Mapping):
        for name, value in sparsity.items():
            layer = {name: counted[name]}
            _check_count(layer, value, largest_unit(rule.structure.sizes(layer)[name]) / 2, f"in '{name}' ")
    else:
        _check_count(counted, sparsity, rule.tolerance(masks), "")


def _check_count(counted: Masks, sparsity: float, tolerance: float, where: str) -> None:
    total = sum(mask.numel() for mask in counted.values())
    removed = sum(int((~mask).sum()) for mask in counted.values())
    if abs(removed - sparsity * total) > tolerance + 0.5:
        raise UserError(
            f"{where}the pruner removed {removed} of {total} weights but {percent(sparsity, 4)} was requested"
        )
