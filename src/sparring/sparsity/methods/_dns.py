"""Dynamic Network Surgery (Guo, Yao, Chen 2016): prune and splice while the weights behind the mask keep learning."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ...errors import UserError
from .._masks import Masks, Scores, warn_of_collapse
from .._rule import Pruner, Rule, Step, check_sparsity, cubic, last_step, require_unstructured
from .._scores import magnitude

_LOWER, _UPPER = 0.9, 1.1


@dataclass
class _Surgery(Pruner):
    dense_weights = True
    sparsity: float | None
    c_rate: float | Mapping[str, float]
    gamma: float
    power: float
    stop: float
    biases: bool
    rule: Rule
    thresholds: dict[str, Tensor] = field(default_factory=dict, init=False)
    events: list[tuple[int, int, int]] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        self.exact = self.sparsity is not None  # c_rate alone does not determine the sparsity

    def __call__(self, step: Step) -> Masks:
        last, masks = last_step(self.stop, step.steps), step.masks
        if step.number > last:
            return masks
        layers = self._layers(step.model, masks)
        chance = (1 + self.gamma * step.number) ** -self.power
        draws = torch.rand(len(layers), generator=step.generator, device=step.generator.device).tolist()
        chosen = [name for name, draw in zip(layers, draws, strict=True) if draw < chance]
        if self.sparsity is not None and step.number == last:
            return self._record(step, self._wanted(step, magnitude(step.model), self.sparsity))
        if not chosen:
            return masks
        if self.sparsity is None:
            thresholds = self._frozen(layers, self.rule.by_layer(masks, self.c_rate))
        else:
            thresholds = self._towards(cubic(step.number / last, self.sparsity), step)
        new = dict(masks)
        for name in chosen:
            for part, value in layers[name].items():
                size, kept = value.detach().abs(), masks.get(part, torch.ones_like(value, dtype=torch.bool))
                new[part] = (size > _UPPER * thresholds[name]) | (kept & (size > _LOWER * thresholds[name]))
        return self._record(step, new)

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

    def _towards(self, sparsity: float, step: Step) -> dict[str, Tensor]:
        """Return the thresholds that would give this sparsity now: the smallest magnitude that stays in each layer."""
        sizes = magnitude(step.model)
        wanted = self._wanted(step, sizes, sparsity)
        smallest = {
            name: torch.where(wanted[name], sizes[name], math.inf).amin() for name in self.rule.open(step.masks)
        }
        return {name: low if low < math.inf else sizes[name].amax() for name, low in smallest.items()}

    def _wanted(self, step: Step, sizes: Scores, sparsity: float) -> Masks:
        return self.rule.masks(step.model, sizes, sparsity, masks=step.masks, regrow=True)

    def _record(self, step: Step, after: Masks) -> Masks:
        before = step.masks
        whole = {name: torch.ones_like(mask) for name, mask in after.items() if name not in before}
        pairs = [(old, after[name]) for name, old in (before | whole).items() if old is not after[name]]
        pruned = sum(int(torch.count_nonzero(old & ~new)) for old, new in pairs)
        spliced = sum(int(torch.count_nonzero(new & ~old)) for old, new in pairs)
        self.events.append((step.number, pruned, spliced))
        warn_of_collapse(after, before)
        return after

    def series(self) -> dict[str, list[int]]:
        """Return, for every step with surgery, how many entries were pruned and how many were spliced back."""
        step, pruned, spliced = zip(*self.events, strict=True) if self.events else ((), (), ())
        return {"step": list(step), "pruned": list(pruned), "spliced": list(spliced)}

    def state(self) -> dict[str, Tensor]:
        events = torch.tensor(self.events, dtype=torch.int64).view(-1, 3)
        return {"events": events} | {f"threshold.{name}": value for name, value in self.thresholds.items()}

    def load_state_(self, tensors: Mapping[str, Tensor]) -> None:
        self.events = [(a, b, c) for a, b, c in tensors["events"].tolist()]
        prefix = "threshold."
        self.thresholds = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


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

    One pruner serves one training: it remembers thresholds, and `series()` returns what was pruned and spliced when.
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
