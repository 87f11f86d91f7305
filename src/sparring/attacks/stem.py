"""A shortcut for fully connected networks: l_2 norms of input gradients without the input gradients.

If the input reaches a network only through one linear layer W (after a normalisation with one scale s), the gradient
of anything with respect to it is s·Wᵀu, u being the gradient at the layer's output, and its squared norm s²·uᵀ(WWᵀ)u.
With 300 units and 784 pixels that saves most of what DeepFool spends on the classes that do not win. Nothing is taken
on trust: `norms_agree` compares with the true gradient of the winner.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

__all__ = ["Stem", "find_stem", "norms_agree"]

# Leading eigenvectors in the bounds: a tenth of the products of the whole matrix for 300 units.
_RANK = 32


@dataclass(frozen=True)
class Stem:
    """The first layer of a network, if it is linear, with G = WWᵀ.

    basis: the leading eigenvectors of G, scaled by the roots of their eigenvalues; tail: the largest other eigenvalue.
    """

    layer: nn.Linear
    gram: Tensor
    basis: Tensor
    tail: float

    def forward(self, model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits and the layer's output, both in the graph of x."""
        caught: list[Tensor] = []

        def catch(_module: nn.Module, _inputs: object, output: Tensor) -> None:
            caught.append(output)

        handle = self.layer.register_forward_hook(catch)
        try:
            logits = model(x)
        finally:
            handle.remove()
        return logits, caught[0]

    def nearest(self, gaps: Tensor, gradients: Tensor) -> tuple[Tensor, Tensor]:
        """Return which rival is nearest, |gap| / ‖Wᵀu‖ smallest, and that norm, for gaps (R, N) and u (R, N, units).

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
        norms[open_still] = ((chosen @ self.gram) * chosen).sum(1).clamp_min(1e-60).sqrt()
        nearest = torch.where(open_still, size / norms, torch.inf).argmin(0)
        return nearest, norms[nearest, torch.arange(gaps.shape[1], device=gaps.device)]


def norms_agree(predicted: Tensor, true: Tensor) -> bool:
    """Return whether true norms are one multiple of the predicted ones, so that predictions rank classes rightly."""
    ratio = true / predicted.clamp_min(1e-30)
    return bool((ratio - ratio.mean()).abs().max() <= 1e-3 * ratio.mean())


def find_stem(model: nn.Module, x: Tensor) -> Stem | None:
    """Return the stem of a network whose first layer with weights is linear with fewer units than inputs.

    A network that passes each image several times, as one attacked in expectation does, has none.
    """
    called: list[nn.Module] = []
    rows: list[int] = []

    def note(module: nn.Module, _inputs: object, output: object) -> None:
        called.append(module)
        rows.append(len(output) if isinstance(output, Tensor) else 0)

    weighted = [module for module in model.modules() if any(True for _ in module.parameters(recurse=False))]
    handles = [module.register_forward_hook(note) for module in weighted]
    try:
        with torch.no_grad():
            model(x[:1])
    finally:
        for handle in handles:
            handle.remove()
    first = called[0] if called else None
    if not isinstance(first, nn.Linear) or called.count(first) > 1 or first.out_features >= first.in_features:
        return None
    if first.in_features != x[0].numel() or rows[0] != 1:
        return None
    weight = first.weight.detach()
    gram = weight @ weight.T
    values, vectors = torch.linalg.eigh(gram)
    rank = min(_RANK, len(values) - 1)
    basis = vectors[:, -rank:] * values[-rank:].clamp_min(0).sqrt()
    return Stem(first, gram, basis, float(values[-rank - 1].clamp_min(0)))
