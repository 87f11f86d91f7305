"""Structures: what the units are that a network loses, one weight, a block, a channel, or N of every M."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..errors import UserError
from ._types import Masks, Scores


class LeftDenseWarning(UserWarning):
    """Warn that a structure cannot prune some layers, which keep all their weights."""


class Structure(Protocol):
    """Turn scores of weights into scores of units, and masks of units back into masks of weights.

    A weight that is already gone has score −inf; a unit that must stay gets +inf.
    """

    def units(self, scores: Scores) -> Scores:
        """Return one score per unit; the names may be fewer where layers are pruned together."""
        ...

    def sizes(self, scores: Scores) -> dict[str, int]:
        """Return how many weights one unit has, for every name that `units` returns."""
        ...

    def expand(self, units: Masks, scores: Scores) -> Masks:
        """Return masks of weights, in the shapes of `scores`."""
        ...


@dataclass(frozen=True)
class Unstructured:
    """Every weight by itself."""

    def units(self, scores: Scores) -> Scores:
        return scores

    def sizes(self, scores: Scores) -> dict[str, int]:
        return dict.fromkeys(scores, 1)

    def expand(self, units: Masks, scores: Scores) -> Masks:
        return units


@dataclass(frozen=True)
class NM:
    """Keep n of every m consecutive inputs (of input channels at one position, for convolutions).

    The best n of each group are protected, so any sparsity up to 1 − n/m can be asked for, and at 1 − n/m every group
    has exactly n left (Mishra et al. 2021, section 3: 2:4). Layers whose inputs are no whole groups stay dense.
    """

    n: int
    m: int

    def __post_init__(self) -> None:
        if not 0 < self.n < self.m:
            raise UserError(f"{self.n}:{self.m} is not a structure; n:m keeps n of m weights, with 0 < n < m")

    def units(self, scores: Scores) -> Scores:
        return {name: self._protect(score) for name, score in self.fitting(scores).items()}

    def sizes(self, scores: Scores) -> dict[str, int]:
        return dict.fromkeys(scores, 1)

    def expand(self, units: Masks, scores: Scores) -> Masks:
        return units

    def fitting(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the weights whose inputs are whole groups; warn of the others, and raise UserError if there is none.

        A first layer has as many inputs as an image has channels, a depthwise one has one: they stay dense.
        """
        fit = {name: weight for name, weight in weights.items() if weight.shape[1] % self.m == 0}
        others = ", ".join(f"'{name}' ({weights[name].shape[1]} inputs)" for name in weights if name not in fit)
        if others and not fit:
            raise UserError(f"{self.n}:{self.m} needs inputs in whole groups of {self.m}, which no layer has: {others}")
        if others:
            text = f"{self.n}:{self.m} leaves {others} dense: no whole groups of {self.m}; sparsity is of the others"
            warnings.warn(text, LeftDenseWarning, stacklevel=3)
        return fit

    def _protect(self, score: Tensor) -> Tensor:
        last = score.movedim(1, -1)
        groups = last.reshape(*last.shape[:-1], -1, self.m)
        best = groups.topk(self.n, dim=-1).indices
        protected = groups.new_zeros(groups.shape, dtype=torch.bool).scatter_(-1, best, True) & (groups > -math.inf)
        return groups.masked_fill(protected, math.inf).flatten(-2).movedim(-1, 1)


@dataclass(frozen=True)
class Blocks:
    """Blocks of rows × columns of the weight as a matrix (outputs, everything else); the mean scores a block."""

    rows: int
    columns: int

    def __post_init__(self) -> None:
        if min(self.rows, self.columns) < 1:
            raise UserError(f"a block has at least one row and one column, not {self.rows} × {self.columns}")

    def units(self, scores: Scores) -> Scores:
        return {name: self._grid(name, score).mean((1, 3)) for name, score in scores.items()}

    def sizes(self, scores: Scores) -> dict[str, int]:
        return dict.fromkeys(scores, self.rows * self.columns)

    def expand(self, units: Masks, scores: Scores) -> Masks:
        return {
            name: mask.repeat_interleave(self.rows, 0).repeat_interleave(self.columns, 1).view(scores[name].shape)
            for name, mask in units.items()
        }

    def _grid(self, name: str, score: Tensor) -> Tensor:
        matrix = score.flatten(1)
        if matrix.shape[0] % self.rows or matrix.shape[1] % self.columns:
            raise UserError(
                f"'{name}' as a matrix is {matrix.shape[0]} × {matrix.shape[1]}, "
                f"which are not whole blocks of {self.rows} × {self.columns}; spare this layer"
            )
        rows, columns = matrix.shape[0] // self.rows, matrix.shape[1] // self.columns
        return matrix.reshape(rows, self.rows, columns, self.columns)


@dataclass(frozen=True)
class Channels:
    """Whole output channels or neurons; the mean scores a channel.

    `tied` lists groups of weights whose channels are added to one another, so that they can only go together (see
    `tied_channels`, which finds them). A weight in no group stands alone.
    """

    tied: tuple[tuple[str, ...], ...] = ()

    def units(self, scores: Scores) -> Scores:
        result = {}
        for group in self._groups(scores):
            if len({len(scores[name]) for name in group}) > 1:
                raise UserError(f"{', '.join(group)} cannot lose channels together: they differ in number")
            result[group[0]] = torch.cat([scores[name].flatten(1) for name in group], 1).mean(1)
        return result

    def sizes(self, scores: Scores) -> dict[str, int]:
        return {g[0]: sum(scores[name][0].numel() for name in g) for g in self._groups(scores)}

    def expand(self, units: Masks, scores: Scores) -> Masks:
        masks = {}
        for group in self._groups(scores):
            for name in group:
                kept = units[group[0]].view(-1, *[1] * (scores[name].dim() - 1))
                masks[name] = kept.expand(scores[name].shape).clone()
        return {name: masks[name] for name in scores}

    def _groups(self, scores: Scores) -> list[tuple[str, ...]]:
        groups = [present for group in self.tied if (present := tuple(name for name in group if name in scores))]
        together = {name for group in groups for name in group}
        return groups + [(name,) for name in scores if name not in together]
