"""Dynamic Network Surgery (Guo, Yao, Chen 2016): prune and splice while the weights behind the mask keep learning."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ...errors import UserError
from .._masks import warn_of_collapse
from .._rule import Rule
from .._schedule import check_sparsity, cubic, require_unstructured, window
from .._scores import magnitude
from .._types import Batch, Loss, Masks, Pruner

_LOWER, _UPPER = 0.9, 1.1


@dataclass(frozen=True)
class _Surgery:
    sparsity: float | None
    c_rate: float | Mapping[str, float]
    gamma: float
    power: float
    stop: float
    biases: bool
    rule: Rule
    thresholds: dict[str, Tensor] = field(default_factory=dict, init=False)
    events: list[tuple[int, int, int]] = field(default_factory=list, init=False)
    dense_weights: bool = field(default=True, init=False)

    @property
    def exact(self) -> bool:
        """Whether a sparsity was asked for; a c_rate alone leads where it leads."""
        return self.sparsity is not None

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
        _, last = window(0.0, self.stop, steps)
        if step > last:
            return masks
        layers = self._layers(model, masks)
        chance = (1 + self.gamma * step) ** -self.power
        draws = torch.rand(len(layers), generator=generator, device=generator.device).tolist()
        chosen = [name for name, draw in zip(layers, draws, strict=True) if draw < chance]
        if self.sparsity is not None and step == last:
            new = self.rule.masks(model, magnitude(model), self.sparsity, masks=masks, regrow=True)
            return self._record(step, masks, new)
        if not chosen:
            return masks
        if self.sparsity is None:
            thresholds = self._frozen(layers, self.rule.by_layer(masks, self.c_rate))
        else:
            thresholds = self._towards(cubic(step / last, self.sparsity), model, masks)
        new = dict(masks)
        for name in chosen:
            for part, value in layers[name].items():
                size, kept = value.detach().abs(), masks.get(part, torch.ones_like(value, dtype=torch.bool))
                new[part] = (size > _UPPER * thresholds[name]) | (kept & (size > _LOWER * thresholds[name]))
        return self._record(step, masks, new)

    def _layers(self, model: nn.Module, masks: Masks) -> dict[str, dict[str, nn.Parameter]]:
        """Return, for every weight that may be pruned, the parameters that share its threshold."""
        everything = dict(model.named_parameters())
        layers = {}
        for name in self.rule.open(masks):
            bias = name.removesuffix("weight") + "bias"
            parts = (name, bias) if self.biases and bias in everything else (name,)
            layers[name] = {part: everything[part] for part in parts}
        return layers

    def _frozen(self, layers: dict[str, dict[str, nn.Parameter]], rates: dict[str, float]) -> dict[str, Tensor]:
        """Return T = max(μ + c_rate·σ, 0) per layer, computed once, over nonzero values."""
        for name, parts in layers.items():
            if name not in self.thresholds:
                size = torch.cat([value.detach().abs().flatten() for value in parts.values()])
                size = size[size > 0]
                self.thresholds[name] = (size.mean() + rates[name] * size.std(correction=0)).clamp_min(0)
        return self.thresholds

    def _towards(self, sparsity: float, model: nn.Module, masks: Masks) -> dict[str, Tensor]:
        """Return the thresholds that would give this sparsity now: the smallest magnitude that stays in each layer."""
        sizes = magnitude(model)
        wanted = self.rule.masks(model, sizes, sparsity, masks=masks, regrow=True)
        smallest = {name: torch.where(wanted[name], sizes[name], math.inf).amin() for name in self.rule.open(masks)}
        return {name: low if low < math.inf else sizes[name].amax() for name, low in smallest.items()}

    def _record(self, step: int, before: Masks, after: Masks) -> Masks:
        whole = {name: torch.ones_like(mask) for name, mask in after.items() if name not in before}
        pairs = [(old, after[name]) for name, old in (before | whole).items() if old is not after[name]]
        pruned = sum(int(torch.count_nonzero(old & ~new)) for old, new in pairs)
        spliced = sum(int(torch.count_nonzero(new & ~old)) for old, new in pairs)
        self.events.append((step, pruned, spliced))
        warn_of_collapse(after, before)
        return after

    def series(self) -> dict[str, list[int]]:
        """Return, for every step with surgery, how many entries were pruned and how many spliced back."""
        step, pruned, spliced = zip(*self.events, strict=True) if self.events else ((), (), ())
        return {"step": list(step), "pruned": list(pruned), "spliced": list(spliced)}

    def state(self) -> dict[str, Tensor]:
        events = torch.tensor(self.events, dtype=torch.int64).view(-1, 3)
        return {"events": events} | {f"threshold.{name}": value for name, value in self.thresholds.items()}

    def load_state_(self, tensors: Mapping[str, Tensor]) -> None:
        self.events[:] = [(int(a), int(b), int(c)) for a, b, c in tensors["events"].tolist()]
        self.thresholds.clear()
        prefix = "threshold."
        self.thresholds.update({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})


def dynamic_network_surgery(
    sparsity: float | None = None,
    *,
    c_rate: float | Mapping[str, float] = 0.0,
    gamma: float = 1e-4,
    power: float = 1.0,
    stop: float = 0.8,
    biases: bool | None = None,
    rule: Rule | None = None,
) -> Pruner:
    """Prune and splice by Dynamic Network Surgery (Guo, Yao, Chen 2016, equations 3 and 4).

    Per layer, a threshold T = max(μ + c_rate·σ, 0) of the nonzero |w| is frozen at the first step (`c_rate` for all or
    by weight name). Entries go when |w| <= 0.9 T and come back when |w| > 1.1 T; a layer is updated at step i with
    probability (1 + gamma·i)^(−power), until the fraction `stop` of the training. The forward pass is masked, the
    gradient is dense. Biases share their layer's threshold (`biases` None: exactly when `sparsity` is None).

    With `sparsity`, T instead follows the magnitudes so that the cubic schedule reaches that sparsity, with the same
    hysteresis and probability, and the last surgery is exact; `c_rate` is not used then.

    One pruner serves one training: it remembers thresholds, and `series()` tells what was pruned and spliced when.
    Raise UserError for values out of range and for a rule whose structure is not Unstructured.
    """
    rule = rule or Rule()
    require_unstructured(rule, "dynamic network surgery")
    if sparsity is not None:
        check_sparsity(sparsity)
    if gamma < 0 or power < 0 or not 0 < stop <= 1:
        raise UserError(f"surgery needs gamma >= 0, power >= 0 and 0 < stop <= 1, not {gamma}, {power}, {stop}")
    with_biases = sparsity is None if biases is None else biases
    return _Surgery(sparsity, c_rate, gamma, power, stop, with_biases, rule)
