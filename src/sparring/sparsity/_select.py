"""Select masks from scores: units of a structure, allocation over layers, and exact counts."""

from __future__ import annotations

import math
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import UnknownNameError, UserError
from ._masks import Masks, Scores, warn_of_collapse
from .channels._dependencies import joined

Size = int | Tensor
"""How many weights a unit has, or each of several (int64)."""


class LeftDenseWarning(UserWarning):
    """Warn that a structure cannot prune some layers, which keep all their weights."""


class Structure:
    """Convert scores of weights to scores of units, and masks of units back to masks of weights.

    A removed weight has score −inf; a unit that must stay gets +inf. By default every weight is a unit.
    """

    def fitting(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the weights that can have the structure; the others stay dense."""
        return weights

    def units(self, scores: Scores) -> Scores:
        """Return one score per unit; there are fewer names if layers are pruned together."""
        return scores

    def sizes(self, scores: Scores) -> Mapping[str, Size]:
        """Return the number of weights per unit, one or for each unit, for every name that `units` returns."""
        return dict.fromkeys(scores, 1)

    def expand(self, units: Masks, scores: Scores) -> Masks:
        """Return masks of weights, in the shapes of `scores`."""
        return units


@dataclass(frozen=True)
class Unstructured(Structure):
    """Single weights."""


@dataclass(frozen=True)
class NM(Structure):
    """Keep n of every m consecutive inputs (for convolutions: of input channels at one position).

    The best n of each group are protected, so any sparsity up to 1 − n/m is possible, and at 1 − n/m every group has
    exactly n weights (Mishra et al. 2021, section 3: 2:4). Layers whose inputs do not form whole groups stay dense.
    """

    n: int
    m: int

    def __post_init__(self) -> None:
        if not 0 < self.n < self.m:
            raise UserError(f"{self.n}:{self.m} is not a structure; n:m keeps n of m weights, with 0 < n < m")

    def units(self, scores: Scores) -> Scores:
        return {name: self._protect(score) for name, score in self.fitting(scores).items()}

    def fitting(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the weights whose inputs form whole groups; warn about the others; raise UserError if there are none.

        A first layer has as many inputs as an image has channels, a depthwise one has one: both stay dense.
        """
        fit = {name: weight for name, weight in weights.items() if weight.shape[1] % self.m == 0}
        others = ", ".join(f"'{name}' ({weights[name].shape[1]} inputs)" for name in weights if name not in fit)
        if others and not fit:
            raise UserError(f"{self.n}:{self.m} needs inputs in whole groups of {self.m}, which no layer has: {others}")
        if others:
            text = (
                f"{self.n}:{self.m} leaves {others} dense, without groups of {self.m}; sparsity counts the other layers"
            )
            warnings.warn(text, LeftDenseWarning, stacklevel=3)
        return fit

    def _protect(self, score: Tensor) -> Tensor:
        last = score.movedim(1, -1)
        groups = last.reshape(*last.shape[:-1], -1, self.m)
        best = groups.topk(self.n, dim=-1).indices
        protected = groups.new_zeros(groups.shape, dtype=torch.bool).scatter_(-1, best, True) & (groups > -math.inf)
        return groups.masked_fill(protected, math.inf).flatten(-2).movedim(-1, 1)


@dataclass(frozen=True)
class Blocks(Structure):
    """Blocks of rows × columns of the weight as a matrix (outputs, everything else); the mean scores a block."""

    rows: int
    columns: int

    def __post_init__(self) -> None:
        if min(self.rows, self.columns) < 1:
            raise UserError(f"a block has at least one row and one column, not {self.rows} × {self.columns}")

    def units(self, scores: Scores) -> Scores:
        return {name: self._grid(name, score).mean((1, 3)) for name, score in scores.items()}

    def sizes(self, scores: Scores) -> Mapping[str, Size]:
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
class Inputs(Structure):
    """Blocks of consecutive inputs of one output unit (for convolutions: of input channels at one position).

    The mean scores a block. Layers whose inputs do not form whole blocks lose single weights. Sparse kernels on 8-bit
    weights and activations multiply four inputs at once.
    """

    count: int

    def __post_init__(self) -> None:
        if self.count < 1:
            raise UserError(f"a block has at least one input, not {self.count}")

    def units(self, scores: Scores) -> Scores:
        last = {name: score.movedim(1, -1) for name, score in scores.items()}
        return {
            name: last[name].reshape(*s.shape[:1], *s.shape[2:], -1, self._size(s)).mean(-1)
            for name, s in scores.items()
        }

    def sizes(self, scores: Scores) -> Mapping[str, Size]:
        return {name: self._size(score) for name, score in scores.items()}

    def expand(self, units: Masks, scores: Scores) -> Masks:
        return {
            name: mask.repeat_interleave(self._size(scores[name]), -1).movedim(-1, 1) for name, mask in units.items()
        }

    def _size(self, weight: Tensor) -> int:
        return self.count if weight.shape[1] % self.count == 0 else 1


@dataclass(frozen=True, eq=False)
class Channels(Structure):
    """Whole output channels or neurons; their score is the mean over all their weights.

    `coupled` gives the unit of each output channel, int64, by the weight's name. Channels of one unit are removed
    together, and those of unit 0 stay (see `tied_channels`, which finds them). The channels of other weights are
    independent.
    """

    coupled: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def tied(self) -> tuple[tuple[str, ...], ...]:
        """The groups of weights whose channels are removed together."""
        return tuple(tuple(names) for names in joined(self.coupled) if len(names) > 1)

    def sparing(self, names: Collection[str]) -> Channels:
        """Return the structure in which the channels of some weights, and those coupled with them, stay."""
        spared = [self.coupled[name] for name in names]
        units = torch.cat([*spared, torch.zeros(0, dtype=torch.int64)])
        return Channels({n: u.masked_fill(torch.isin(u, units), 0) for n, u in self.coupled.items()})

    def units(self, scores: Scores) -> Scores:
        """Return a score for every unit of a group of weights, under the name of the first."""
        result = {}
        for group, places, count in self._groups(scores):
            first = scores[group[0]]
            total = torch.zeros(count, dtype=torch.float64, device=first.device)
            for name, place in zip(group, places, strict=True):
                score = scores[name].flatten(1).sum(1, dtype=torch.float64)
                total.index_add_(0, place.to(score.device), score)
                stay = self.coupled[name] == 0 if name in self.coupled else torch.zeros(0, dtype=torch.int64)
                total[place[stay].to(score.device)] = math.inf
            sizes = self._sizes(group, places, count, scores)
            result[group[0]] = (total / torch.as_tensor(sizes).to(total)).to(first.dtype)
        return result

    def sizes(self, scores: Scores) -> Mapping[str, Size]:
        return {g[0]: self._sizes(g, places, count, scores) for g, places, count in self._groups(scores)}

    def expand(self, units: Masks, scores: Scores) -> Masks:
        masks = {}
        for group, places, _ in self._groups(scores):
            for name, place in zip(group, places, strict=True):
                kept = units[group[0]][place.to(scores[name].device)].view(-1, *[1] * (scores[name].dim() - 1))
                masks[name] = kept.expand(scores[name].shape).clone()
        return {name: masks[name] for name in scores}

    @staticmethod
    def _sizes(group: Sequence[str], places: Sequence[Tensor], count: int, scores: Scores) -> Size:
        rows = [torch.full((len(p),), scores[name][0].numel()) for name, p in zip(group, places, strict=True)]
        sizes = torch.zeros(count, dtype=torch.int64).index_add_(0, torch.cat([*places]), torch.cat(rows))
        return int(sizes[0]) if bool((sizes == sizes[0]).all()) else sizes

    def _groups(self, scores: Scores) -> Iterator[tuple[list[str], list[Tensor], int]]:
        """Yield weights that lose channels together, each channel's index among their units, and how many units."""
        coupled = {name: self.coupled[name] for name in scores if name in self.coupled}
        for names in joined(coupled):
            units, places = torch.unique(torch.cat([coupled[name] for name in names]), return_inverse=True)
            yield names, list(places.split([len(coupled[name]) for name in names])), len(units)
        for name, score in scores.items():
            if name not in coupled:
                yield [name], [torch.arange(len(score))], len(score)


def uniform(weights: Mapping[str, Tensor], sparsity: float) -> dict[str, float]:
    """Return the same sparsity for every layer."""
    return dict.fromkeys(weights, sparsity)


def erdos_renyi_kernel(weights: Mapping[str, Tensor], sparsity: float) -> dict[str, float]:
    """Return sparsities per layer with density ∝ (sum of dimensions) / (product of dimensions).

    Layers that would exceed density 1 stay dense, and the others compensate (Evci et al. 2020, section 3, ERK). Small
    layers and convolutions to few channels keep more of their weights. `weights` gives names and shapes.
    """
    if not 0 <= sparsity <= 1:
        raise UserError(f"sparsity is the fraction removed, between 0 and 1, not {sparsity}")
    raw = {name: sum(w.shape) / w.numel() for name, w in weights.items()}
    dense: set[str] = set()
    while True:
        kept = (1 - sparsity) * sum(w.numel() for w in weights.values()) - sum(weights[n].numel() for n in dense)
        share = sum(raw[name] * w.numel() for name, w in weights.items() if name not in dense)
        scale = max(kept, 0.0) / share if share else 0.0
        full = {name for name in weights if name not in dense and scale * raw[name] > 1}
        if not full:
            return {name: 0.0 if name in dense else 1 - scale * raw[name] for name in weights}
        dense |= full


ALLOCATIONS = {"layer": uniform, "erk": erdos_renyi_kernel}
SCOPES = ("global", *ALLOCATIONS)
_UNSTRUCTURED = Unstructured()
_SORTED, _SAMPLE, _SLACK = 4096, 2000, 60
FloatArray = NDArray[np.floating[Any]]


def select(
    scores: Scores,
    sparsity: float | Mapping[str, float],
    *,
    structure: Structure = _UNSTRUCTURED,
    scope: str = "global",
    within: Masks | None = None,
    floor: float = 0.0,
) -> Masks:
    """Keep the highest scores so that the fraction `sparsity` of the weights is removed, to one unit.

    `scope` "global" ranks all layers together, "layer" takes the same fraction of each, "erk" allocates by
    `erdos_renyi_kernel`; a mapping from names to sparsities allocates explicitly (a layer without a name is unchanged).
    With `within`, removed weights never come back, and `sparsity` includes them. `floor` is the smallest density of a
    layer. Among equal scores the first in order stay.

    Raises UserError for scores that are not finite, sparsities outside [0, 1], unknown names, and impossible requests:
    less sparsity than `within` has already, or more than `structure` or `floor` allow. Warns of a collapsed layer.
    """
    if not scores:
        raise UserError("there is nothing to prune: no layer can lose such units")
    open_scores = {name: _candidates(name, score, within) for name, score in scores.items()}
    units = structure.units(open_scores)
    if floor:
        units = {name: _protect_best(unit, floor) for name, unit in units.items()}
    sizes = structure.sizes(scores)
    if isinstance(sparsity, Mapping):
        given = dict(sparsity)
    elif scope in ALLOCATIONS:
        given = ALLOCATIONS[scope](scores, sparsity)
    elif scope == "global":
        kept = _keep(list(units.values()), [sizes[name] for name in units], sparsity, "the network")
        return _finish(dict(zip(units, kept, strict=True)), structure, scores, within)
    else:
        raise UnknownNameError("scope", scope, SCOPES)
    for name in given:
        if name not in scores:
            raise UnknownNameError("layer", name, scores)
        if isinstance(structure, NM) and isinstance(sparsity, Mapping) and given[name] and name not in units:
            raise UserError(f"'{name}' has no whole groups of {structure.m} inputs and stays dense; set it to 0")
    masks = {
        name: _keep([unit], [sizes[name]], given[name], f"'{name}'")[0] if name in given else unit > -math.inf
        for name, unit in units.items()
    }
    return _finish(masks, structure, scores, within)


def _finish(units: Masks, structure: Structure, scores: Scores, within: Masks | None) -> Masks:
    masks = structure.expand(units, scores)
    masks = {name: masks[name] if name in masks else _as_it_was(name, score, within) for name, score in scores.items()}
    warn_of_collapse(masks, within)
    return masks


def _as_it_was(name: str, score: Tensor, within: Masks | None) -> Tensor:
    """Return the mask of a layer that the structure does not prune."""
    return torch.ones_like(score, dtype=torch.bool) if within is None else within[name]


def _candidates(name: str, score: Tensor, within: Masks | None) -> Tensor:
    score = score.detach()
    if score.dtype in (torch.float16, torch.bfloat16):
        score = score.float()
    if score.numel() == 0 or not all(math.isfinite(float(end)) for end in torch.aminmax(score)):
        raise UserError(f"the scores of '{name}' are empty or not finite; training may have diverged")
    if within is None:
        return score
    if name not in within:
        raise UserError(f"the masks to prune within lack '{name}': check that scores and masks belong together")
    # 1 − 1/mask is 0 or −inf: far faster than filling by an irregular mask, whose branches cannot be predicted.
    return score + (1 - within[name].to(score.dtype).reciprocal_())


def _protect_best(unit: Tensor, floor: float) -> Tensor:
    if not 0 <= floor <= 1:
        raise UserError(f"floor is the smallest density of a layer, between 0 and 1, not {floor}")
    best = unit.flatten().topk(math.ceil(floor * unit.numel())).indices
    protected = unit.new_zeros(unit.numel(), dtype=torch.bool).index_fill_(0, best, True).view_as(unit)
    return unit.masked_fill(protected & (unit > -math.inf), math.inf)


def _keep(units: Sequence[Tensor], sizes: Sequence[Size], sparsity: float, where: str) -> list[Tensor]:
    """Return masks over units that remove `sparsity` of the weights, to one unit."""
    if not 0 <= sparsity <= 1:
        raise UserError(f"sparsity is the fraction removed, between 0 and 1, not {sparsity}")
    total = sum(unit.numel() for unit in units)
    ends = [tuple(map(float, torch.aminmax(unit))) for unit in units]
    gone = [_count(unit, low, -math.inf) for unit, (low, _) in zip(units, ends, strict=True)]
    protected = sum(_count(unit, high, math.inf) for unit, (_, high) in zip(units, ends, strict=True))
    held = [
        unit.numel() * size if isinstance(size, int) else int(size.sum())
        for unit, size in zip(units, sizes, strict=True)
    ]
    lost = [
        count * size if isinstance(size, int) else int(size[(unit == -math.inf).cpu()].sum())
        for unit, size, count in zip(units, sizes, gone, strict=True)
    ]
    wanted, whole = sparsity * sum(held), max(map(largest_unit, sizes))
    if sum(lost) >= wanted + whole:
        raise UserError(f"{where} cannot be pruned to {sparsity:.4%}: {sum(gone) / total:.4%} of it is already pruned")
    equal = isinstance(sizes[0], int) and len(set(sizes)) == 1
    removed = max(sum(gone), round(wanted / whole) if equal else _removed_of_unequal(units, sizes, wanted))
    if protected > total - removed:
        raise UserError(
            f"{where} cannot be {sparsity:.4%} sparse: structure and floor protect {protected / total:.4%} of it"
        )
    return largest(units, total - removed)


def largest_unit(size: Size) -> int:
    """Return the number of weights of the largest unit."""
    return size if isinstance(size, int) else int(size.max())


def _count(unit: Tensor, end: float, value: float) -> int:
    """Return how often an infinity occurs, given the extreme on its side: usually never."""
    return int(np.count_nonzero(_values(unit) == value)) if end == value else 0


def _values(unit: Tensor) -> FloatArray:
    """Return a tensor as a NumPy array, for which comparisons are several times faster than in torch."""
    values: FloatArray = unit.cpu().numpy()
    return values


def _removed_of_unequal(units: Sequence[Tensor], sizes: Sequence[Size], wanted: float) -> int:
    """Return how many of the lowest units have nearly the wanted number of weights."""
    order = torch.cat([unit.flatten() for unit in units]).sort(stable=True, descending=True).indices.flip(0)
    weights = torch.cat([torch.as_tensor(s).expand(unit.shape).flatten() for unit, s in zip(units, sizes, strict=True)])
    removed = torch.cat([torch.zeros(1, dtype=torch.int64), weights.to(order.device)[order].cumsum(0).cpu()])
    return int((removed - wanted).abs().argmin())


def largest(units: Sequence[Tensor], keep: int) -> list[Tensor]:
    """Return masks of the `keep` largest values over all tensors; among equal ones the first."""
    total = sum(unit.numel() for unit in units)
    if keep in (0, total):
        return [torch.full_like(unit, keep > 0, dtype=torch.bool) for unit in units]
    flat = [_values(unit.flatten()) for unit in units]
    threshold = _threshold(np.concatenate(flat), keep)
    masks = [values > threshold for values in flat]
    missing = keep - sum(int(np.count_nonzero(mask)) for mask in masks)
    for values, mask in zip(flat, masks, strict=True):
        if missing == 0:
            break
        tied = np.flatnonzero(values == threshold)[:missing]
        mask[tied] = True
        missing -= len(tied)
    return [torch.from_numpy(m).to(unit.device).view(unit.shape) for unit, m in zip(units, masks, strict=True)]


def _threshold(values: FloatArray, keep: int) -> float:
    """Return the keep-th largest value: a sample brackets it, values outside are counted and dropped, and so on.

    Unlike a plain partition, this is fast if one value is frequent, as zeros and −inf are in a pruned network.
    """
    while len(values) > _SORTED:
        sample = np.sort(values[:: len(values) // _SAMPLE])
        place = round(len(sample) * (1 - keep / len(values)))
        low, high = sample[max(place - _SLACK, 0)], sample[min(place + _SLACK, len(sample) - 1)]
        above, inside = int(np.count_nonzero(values > high)), values[(low <= values) & (values <= high)]
        if above >= keep:  # the sample was misleading: only one side is known
            values = values[values > high]
        elif above + len(inside) < keep:
            values, keep = values[values < low], keep - above - len(inside)
        elif low == high:
            return float(low)
        elif 2 * len(inside) > len(values):
            break  # few distinct values, which are fast to sort
        else:
            values, keep = inside, keep - above
    return float(np.sort(values)[len(values) - keep])
