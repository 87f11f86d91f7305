"""Models that draw random numbers: what comes before the first draw is asked once for all of them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..evaluation._bpda import is_stochastic
from ..evaluation._sanity_checks import is_random


class PrefixSplit(NamedTuple):
    """A model in two: `drawing(steady(x))` are its logits, and `steady` answers the same each time."""

    steady: nn.Module
    drawing: nn.Module


def split_at_draw(model: nn.Module, x: Tensor) -> PrefixSplit | None:
    """Return a sequence of layers split before the first that declares to draw, or None for any other model.

    x: a few images, on which the first part is tried: a layer that draws without saying so does not get past. None also
    where that part has more outputs than inputs: little would be saved then, and outputs are held for all images.
    """
    hooked = model._forward_hooks or model._forward_pre_hooks or model._backward_hooks or model._backward_pre_hooks
    if type(model) is not nn.Sequential or hooked or "forward" in vars(model):
        return None
    place = next((place for place, layer in enumerate(model) if is_stochastic(layer)), 0)
    steady = model[:place]
    if place == 0 or is_random(steady, x):
        return None
    with torch.no_grad():
        value = steady(x[:1])
    return PrefixSplit(steady, model[place:]) if value.numel() <= x[:1].numel() else None
