"""Modules that make activations sparse; each takes the place of a ReLU.

Every module says what an attack and a bound must know: `kind`; `masks_gradients` (its true backward pass misleads an
attack); `stochastic` (it draws from `generator`, None being torch's default); `nondecreasing` (each output is a
nondecreasing function of its own input, jumps included, so that intervals pass through). With `straight_through` set,
the backward pass is that of the ReLU it replaces (BPDA, Athalye et al. 2018); the forward pass never changes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor, nn

from ...errors import UserError


class ActivationSparsifier(nn.Module):
    """Replace a ReLU: subclasses say how the activations become sparse, in `sparse`."""

    kind: ClassVar[str]
    masks_gradients: ClassVar[bool] = True
    stochastic: ClassVar[bool] = False
    nondecreasing: ClassVar[bool] = False

    def __init__(self) -> None:
        super().__init__()
        self.straight_through = False
        self.generator: torch.Generator | None = None

    def forward(self, x: Tensor) -> Tensor:
        result = self.sparse(x)
        if not self.straight_through:
            return result
        dense = x.clamp_min(0)
        return dense + (result - dense).detach()

    def dense(self) -> nn.Module:
        """Return what this module took the place of, for attacks that transfer from the dense network."""
        return nn.ReLU()

    def sparse(self, x: Tensor) -> Tensor:
        """Return the sparse activations (N, ...) of pre-activations (N, ...)."""
        raise TypeError(f"{type(self).__name__} must define sparse()")


class ShiftedReLU(ActivationSparsifier):
    """max(x − threshold, 0): continuous, and its gradient is honest (Mirzadeh et al. 2024, section 5.3)."""

    kind = "shifted-relu"
    nondecreasing = True
    masks_gradients = False

    def __init__(self, threshold: float) -> None:
        super().__init__()
        self.threshold = _not_negative(threshold, "threshold")

    def sparse(self, x: Tensor) -> Tensor:
        return (x - self.threshold).clamp_min(0)


class Threshold(ActivationSparsifier):
    """x where x > threshold, else 0 (FATReLU, Kurtz et al. 2020): it jumps where its gradient sees nothing."""

    kind = "threshold"
    nondecreasing = True

    def __init__(self, threshold: float) -> None:
        super().__init__()
        self.threshold = _not_negative(threshold, "threshold")

    def sparse(self, x: Tensor) -> Tensor:
        return x * (x > self.threshold)


class TopK(ActivationSparsifier):
    """Keep the largest activations of each image and layer (k-winners-take-all, Xiao et al. 2020).

    `sparsity` is the fraction set to zero; at least one activation stays.
    """

    kind = "top-k"

    def __init__(self, sparsity: float) -> None:
        super().__init__()
        self.sparsity = _fraction(sparsity, "sparsity")

    def sparse(self, x: Tensor) -> Tensor:
        flat = x.flatten(1)
        keep = max(1, flat.shape[1] - round(self.sparsity * flat.shape[1]))
        best = flat.topk(keep, dim=1).indices
        mask = torch.zeros_like(flat).scatter_(1, best, 1.0)
        return (flat.clamp_min(0) * mask).view_as(x)


class Percentile(ActivationSparsifier):
    """A threshold per layer at a percentile of its activations on calibration data; see `calibrate_`.

    `sparsity` is the fraction that is set to zero on those data. Before calibration this is a ReLU.
    """

    kind = "percentile"
    nondecreasing = True
    threshold: Tensor

    def __init__(self, sparsity: float) -> None:
        super().__init__()
        self.sparsity = _fraction(sparsity, "sparsity")
        self.calibrating = False
        self.register_buffer("threshold", torch.zeros(()))

    def sparse(self, x: Tensor) -> Tensor:
        if self.calibrating:
            values = x.detach().clamp_min(0).flatten()
            rank = round(self.sparsity * values.numel())
            self.threshold.copy_(values.kthvalue(rank).values if rank else torch.zeros(()))
        return x * (x > self.threshold)


class StochasticPruning(ActivationSparsifier):
    """Stochastic activation pruning (Dhillon et al. 2018, equation 4): keep what a weighted draw hits, rescaled.

    `samples` is the number of draws, with replacement and with probabilities proportional to the activations, as a
    fraction of the layer's units.
    """

    kind = "stochastic-pruning"
    stochastic = True

    def __init__(self, samples: float) -> None:
        super().__init__()
        if not 0 < samples <= 10:
            raise UserError(f"samples is the number of draws per unit, above 0 and at most 10, not {samples}")
        self.samples = samples

    def sparse(self, x: Tensor) -> Tensor:
        flat = x.flatten(1).clamp_min(0)
        total = flat.detach().sum(1, keepdim=True)
        # A layer that is silent draws uniformly from zeros: the result is zero all the same.
        chance = torch.where(total > 0, flat.detach() / total.clamp_min(1e-30), 1 / flat.shape[1])
        draws = max(1, round(self.samples * flat.shape[1]))
        drawn = torch.multinomial(chance, draws, replacement=True, generator=self.generator)
        hit = torch.zeros_like(flat).scatter_(1, drawn, 1.0)
        kept = -torch.expm1(draws * torch.log1p(-chance.clamp_max(1 - 1e-7)))  # 1 − (1 − chance)^draws
        return (flat * hit / kept.clamp_min(1e-30)).view_as(x)


class MeanSparse(ActivationSparsifier):
    """Block variation around the mean, then ReLU (Amini et al. 2024, equation 5): |x − μ| <= α·σ becomes μ.

    μ and σ are those of each channel's pre-activations on calibration data (see `calibrate_`); before that, a ReLU.
    It makes x − μ sparse, not the activations. Every published gain fell to BPDA: attack it with `straight_through`.
    """

    kind = "mean-sparse"
    nondecreasing = True
    mean: Tensor
    radius: Tensor

    def __init__(self, alpha: float) -> None:
        super().__init__()
        self.alpha = _not_negative(alpha, "alpha")
        self.calibrating = False
        self.register_buffer("mean", torch.zeros(1))
        self.register_buffer("radius", torch.full((1,), -1.0))

    def sparse(self, x: Tensor) -> Tensor:
        if self.calibrating:
            axes = [axis for axis in range(x.dim()) if axis != 1]
            self.mean = x.detach().mean(axes)
            self.radius = self.alpha * x.detach().std(axes, correction=0)
        shape = (1, -1, *[1] * (x.dim() - 2))
        mean, radius = self.mean.view(shape), self.radius.view(shape)
        return torch.where((x - mean).abs() <= radius, mean, x).clamp_min(0)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *rest: object) -> None:
        # The buffers get their size, one value per channel, only when they are calibrated.
        for name in ("mean", "radius"):
            if prefix + name in state_dict:
                setattr(self, name, torch.empty_like(state_dict[prefix + name]))
        super()._load_from_state_dict(state_dict, prefix, *rest)


def _fraction(value: float, name: str) -> float:
    if not 0 <= value < 1:
        raise UserError(f"{name} is a fraction, at least 0 and below 1, not {value}")
    return value


def _not_negative(value: float, name: str) -> float:
    if not (math.isfinite(value) and value >= 0):
        raise UserError(f"{name} is a finite number, at least 0, not {value}")
    return value


ACTIVATIONS: dict[str, Callable[[float], ActivationSparsifier]] = {
    module.kind: module for module in (ShiftedReLU, Threshold, TopK, Percentile, StochasticPruning, MeanSparse)
}
