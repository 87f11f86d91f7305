"""A rule says how scores become masks: over which layers, in which structure, with what floor."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from torch import nn

from ..errors import UnknownNameError, UserError
from ..matrices import is_transposed, matrices
from ..units import percent
from ._channels import silent, tied_channels
from ._select import select
from ._structures import NM, Channels, Structure, Unstructured
from ._types import Batch, Masks, Pruner, Scores


@dataclass(frozen=True)
class Rule:
    """Hold the options of `select` that stay the same from step to step.

    `spare` names weights that are never pruned, `spare_first` and `spare_last` mean the first and last in the model's
    order; sparsities are fractions of the other weights.
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
            raise UserError("every layer is spared: nothing is left to prune")
        left = {name: mask for name, mask in weights.items() if name not in spared}
        return self.structure.fitting(left) if isinstance(self.structure, NM) else left

    def by_layer(self, masks: Masks, values: float | Mapping[str, float]) -> dict[str, float]:
        """Return one value for every weight that may be pruned; raise UserError for other names and missing ones."""
        names = self.open(masks)
        if not isinstance(values, Mapping):
            return dict.fromkeys(names, values)
        for name in values:
            if name not in names:
                raise UnknownNameError("layer", name, names)
        for name in names:
            if name not in values:
                raise UserError(f"no value is given for '{name}'; give one, or spare this layer")
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

        Whole channels go with their biases and batch norms, and together where they are added to one another, if the
        batch tells the shape of an image; the layers that write classes keep all of theirs.
        """
        within, structure, shape = self.open(masks), self.structure, None
        if isinstance(structure, NM | Channels):
            _refuse_transposed(model, within)
        if isinstance(structure, Channels) and batch is not None:
            shape = tuple(batch[0].shape[1:])
            structure, fixed = tied_channels(model, shape)
            within = {name: mask for name, mask in within.items() if name not in fixed}
            if isinstance(sparsity, Mapping):
                _check_channels(sparsity, structure.tied, fixed)
                sparsity = {name: value for name, value in sparsity.items() if name not in fixed}
            if not within:
                raise UserError(
                    "no layer can lose whole channels: all write classes or are grouped, shared, used twice, recurrent "
                    "or computed (weight_norm and the like); prune unstructured"
                )
        for name, mask in within.items():
            score = scores.get(name) if isinstance(scores, Mapping) else None
            if score is None or score.shape != mask.shape:
                raise UserError(f"the score gives '{name}' no tensor of its shape, {tuple(mask.shape)}")
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
        # Where weights come back, so must the biases that went with them.
        kept = {name: mask for name, mask in masks.items() if mask.dim() > 1} if regrow else masks
        return silent(model, {**kept, **new}, shape)

    def tolerance(self, masks: Masks) -> float:
        """Return by how many weights the masks may miss a sparsity: half a unit, for each layer that counts alone."""
        sizes = self.structure.sizes(self.open(masks)).values()
        return max(sizes) / 2 if self.scope == "global" else sum(sizes) / 2


def _refuse_transposed(model: nn.Module, names: Collection[str]) -> None:
    for matrix in matrices(model):
        if matrix.name in names and is_transposed(matrix):
            raise UserError(
                f"'{matrix.name}' is a transposed convolution's, whose rows are inputs; spare it, "
                "or prune unstructured, without n:m and whole channels"
            )


def _check_channels(given: Mapping[str, float], tied: Collection[Collection[str]], fixed: Collection[str]) -> None:
    """Raise UserError for sparsities by hand that whole channels cannot have."""
    for name in fixed:
        if given.get(name):
            raise UserError(f"'{name}' keeps all its channels (classes, or inputs that cannot shrink); give it 0")
    for group in tied:
        if len({given[name] for name in group if name in given}) > 1:
            raise UserError(f"{', '.join(group)} lose their channels together; give them one sparsity")


def check_reached(pruner: Pruner, masks: Masks, sparsity: float | Mapping[str, float] | None) -> None:
    """Raise UserError unless a pruner removed what was asked of it (None: nothing), to one unit of its structure.

    Asked by layer, it is checked by layer.

    A pruner's `rule`, if it has one, says which weights count. Not checked are pruners that say they are not `exact`,
    and channels: which of them can go together, only the network's graph knows, and `select` has seen to it.
    """
    rule = getattr(pruner, "rule", Rule())
    if sparsity is None or not getattr(pruner, "exact", True) or isinstance(rule.structure, Channels):
        return
    counted = rule.open(masks)
    if isinstance(sparsity, Mapping):
        for name, value in sparsity.items():
            layer = {name: counted[name]}
            _check_count(layer, value, rule.structure.sizes(layer)[name] / 2, f"in '{name}' ")
    else:
        _check_count(counted, sparsity, rule.tolerance(masks), "")


def _check_count(counted: Masks, sparsity: float, tolerance: float, where: str) -> None:
    total = sum(mask.numel() for mask in counted.values())
    removed = sum(int((~mask).sum()) for mask in counted.values())
    if abs(removed - sparsity * total) > tolerance + 0.5:
        raise UserError(
            f"{where}the pruner removed {removed} of {total} weights where {percent(sparsity, 4)} was asked"
        )
