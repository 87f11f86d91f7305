"""l2 norms of input gradients of fully connected networks, without computing the gradients.

With W the first layer and u the gradient at its output, the gradient at the input is Wᵀu and its squared norm
uᵀ(WWᵀ)u. With 300 units and 784 pixels that saves most of what DeepFool spends on the classes that do not win.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .._gradients import Probe
from ._mlp import Dense

# Leading eigenvectors in the bounds: a tenth of the products of the whole matrix for 300 units.
_RANK = 32


@dataclass(frozen=True)
class Stem:
    """A fully connected network under a probe, with G = WWᵀ of its first layer.

    basis: the leading eigenvectors of G, scaled by the roots of their eigenvalues; tail: the largest other eigenvalue.
    """

    probe: Probe
    dense: Dense
    gram: Tensor
    basis: Tensor
    tail: float

    def look(self, x: Tensor) -> Seen:
        """Pass images x (N, ...) forward."""
        return Seen(self, *self.probe.through(self.dense, x))

    def nearest(self, gaps: Tensor, gradients: Tensor) -> tuple[Tensor, Tensor]:
        """Return the rival of smallest |gap| / ‖Wᵀu‖, and that norm, for gaps (R, N) and u (R, N, units).

        Norms lie between those of the leading part and of that plus the tail times the rest; only rivals that these
        bounds do not rule out need their norm.
        """
        leading = (gradients.flatten(0, 1) @ self.basis).square().sum(1).view_as(gaps)
        # The leading part, divided by its eigenvalues, is no longer than u: the tail times ‖u‖² bounds the rest.
        widest = (leading + self.tail * gradients.square().sum(2)).sqrt().clamp_min(1e-30)
        narrowest = leading.sqrt().clamp_min(1e-30)
        size = gaps.abs()
        open_still = size / widest <= (size / narrowest).amin(0) * (1 + 1e-4)
        chosen = gradients[open_still]
        norms = torch.full_like(gaps, 1e-30)
        # The square of the floor would be 0 in single precision, and dead gradients would lead to infinity.
        norms[open_still] = ((chosen @ self.gram) * chosen).sum(1).clamp_min(0).sqrt().clamp_min(1e-30)
        nearest = torch.where(open_still, size / norms, torch.inf).argmin(0)
        return nearest, norms[nearest, torch.arange(gaps.shape[1], device=gaps.device)]


class Seen(NamedTuple):
    """Logits (N, classes) of images that a stem has passed forward, and the outputs of every ReLU."""

    stem: Stem
    logits: Tensor
    hidden: list[Tensor]

    def of(self, rows: Tensor) -> Seen:
        """Return those of some images, a mask (N,)."""
        return Seen(self.stem, self.logits[rows], [output[rows] for output in self.hidden])

    def pull(self, weights: Tensor) -> Tensor:
        """Return first-layer gradients (R, N, units) of sums of logits with weights (R, N, classes)."""
        self.stem.probe.backwards += weights.shape[0] * weights.shape[1]
        return self.stem.dense.back_to_first(weights, self.hidden)


def find_stem(model: nn.Module) -> Stem | None:
    """Return the stem of a probed network of matrices whose first layer has fewer units than inputs, and at least 2."""
    if not isinstance(model, Probe) or model.dense is None:
        return None
    weight = model.dense.weights[0]
    if not 2 <= weight.shape[0] < weight.shape[1]:
        return None
    gram = weight @ weight.T
    # In double precision: pruned rows make many equal eigenvalues, with which the single-precision solver fails for
    # one network in five on a single thread, by an error or silently by NaN vectors.
    try:
        values, vectors = torch.linalg.eigh(gram.double())
    except RuntimeError:  # torch.linalg.LinAlgError is one
        return None
    rank = min(_RANK, len(values) - 1)
    basis = (vectors[:, -rank:] * values[-rank:].clamp_min(0).sqrt()).to(weight.dtype)
    if not bool(torch.isfinite(basis).all()):
        return None
    return Stem(model, model.dense, gram, basis, float(values[-rank - 1].clamp_min(0)))
