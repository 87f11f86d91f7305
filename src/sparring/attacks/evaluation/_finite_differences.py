"""Gradients that miss part of what an image does: seen by finite differences, and attacked through them.

Where a branch is cut from the graph, autograd's gradient is right about some pixels and silent about others: neither
zero nor unstable, so that nothing else here would notice.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ...outputs import precision
from .._gradients import logits_and_pull
from ..algorithms._losses import others

_IMAGES = 8
# Directions over all pixels, over those without any gradient, and blocks to a side.
_WHOLE, _SILENT, _GRID = 4, 3, 3
# Half a difference's length in pixel units: short, but so long that rounding does not hide it.
_STEP, _STEP_IN, _LONG = 1e-3, {torch.float16: 2e-2, torch.bfloat16: 6e-2}, 0.125
_ROOM, _SHORTER = 0.0125, (8.0, 64.0)
# Of a derivative's square so much must be missing, and so much more than the second difference, which is what kinks,
# curvature, jumps and rounding between the two ends can do.
_MISSING, _BEYOND = 0.2, 4.0
# Pixels without a gradient that do this share of what all pixels do, moved far, are no dead inputs but a staircase's.
_NOTABLE = 0.1
# Groups of pixels that an attack moves one after the other, each by so much. A large network gets fewer, which an
# attack on it ends in minutes with: so many parameters times groups, at least 16 groups.
_GROUPS, _WORK, _REACH = 256, 2**27, 0.03


@torch.no_grad()
def blind_pixels(model: nn.Module, x: Tensor, y: Tensor) -> Tensor | None:
    """Return the pixels of an image where autograd misses what the model does, a bool mask; None where there are none.

    x: images that are classified correctly as y, of which the first 8 are looked at in at most 57 passes, three times
    as many where one is in doubt: how the gap between the label's logit and the strongest other one changes along
    random signs over all pixels, over each block, over each channel, and over the pixels whose gradient is zero at
    every image, against what the gradient promises.
    The latter are moved far too, since short steps do not see a staircase.
    """
    x, y = x[:_IMAGES], y[:_IMAGES]
    kind = precision(model, model(x))
    step, generator = _STEP_IN.get(kind, _STEP), torch.Generator().manual_seed(0)
    noise = torch.rand(x.shape, generator=generator, dtype=x.dtype).to(x.device)
    # A little noise: on flat images maxima are ties and ReLUs at their kinks; and room for steps to both sides.
    near, far = (
        _Gap.at(model, torch.lerp(x, 0.25 + 0.5 * noise, 4 * length).to(kind).to(x.dtype), y, kind, generator)
        for length in (max(_ROOM, step), _LONG)
    )
    blind = torch.zeros_like(x[0], dtype=torch.bool)
    silent = (near.gradient == 0).all(0) & (far.gradient == 0).all(0)
    moves, all_move = (far.changes(part, _LONG, _SILENT).known for part in (silent, torch.ones_like(silent)))
    if moves > _NOTABLE * all_move:
        blind |= silent
    for part, times in _parts(silent):
        pixels = part & ~blind
        seen = near.changes(pixels, step, times)
        if seen.missed <= max(_MISSING * seen.known, _BEYOND * seen.bent):
            continue
        # A rough function has a gradient, nearby; what is cut misses as much however short the step.
        nearby = (near.changes(pixels, step / shorter, times) for shorter in _SHORTER)
        if all(again.missed > _MISSING * again.known for again in nearby):
            blind |= pixels
    return blind if bool(blind.any()) else None


class _Changes(NamedTuple):
    """Sums of squares: what the gradient missed of differences, the differences, and the second differences."""

    missed: float
    known: float
    bent: float


@dataclass(frozen=True)
class _Gap:
    """What the strongest other logit lacks to the label's, as a function of the images near x: value and gradient.

    grain: the distance of two numbers of the logits' size.
    """

    model: nn.Module
    x: Tensor
    weights: Tensor
    value: Tensor
    grain: Tensor
    gradient: Tensor
    kind: torch.dtype
    generator: torch.Generator

    @classmethod
    def at(cls, model: nn.Module, x: Tensor, y: Tensor, kind: torch.dtype, generator: torch.Generator) -> _Gap:
        """Return the gap at images of the labels y, for a model that computes in this type."""
        weights: list[Tensor] = []

        def against(logits: Tensor) -> Tensor:
            rival = others(logits, y).argmax(1, keepdim=True)
            weights.append(torch.zeros_like(logits).scatter(1, rival, 1.0).scatter(1, y.unsqueeze(1), -1.0))
            return weights[0]

        logits, gradient = logits_and_pull(model, x, against)
        grain = torch.finfo(kind).eps * logits.abs().amax(1)  # what changes less may not change at all
        return cls(model, x, weights[0], (logits * weights[0]).sum(1), grain, gradient, kind, generator)

    def changes(self, pixels: Tensor, step: float, times: int) -> _Changes:
        """Return what moving these pixels to both sides does, along so many random directions."""
        sums = torch.zeros(3, dtype=torch.float64)
        for _ in range(times if bool(pixels.any()) else 0):
            sign = (torch.rand(self.x.shape, generator=self.generator) - 0.5).sign().to(self.x)
            ends = [(self.x + side * step * pixels * sign).to(self.kind).to(self.x.dtype) for side in (1, -1)]
            up, down = ((self.model(end) * self.weights).sum(1) for end in ends)
            promised = ((ends[0] - ends[1]) * self.gradient).flatten(1).sum(1)
            parts = torch.stack([up - down - promised, up - down, (up + down - 2 * self.value).abs() + self.grain])
            sums += parts.double().square().sum(1).cpu()
        return _Changes(*sums.tolist())


def _parts(silent: Tensor) -> Iterator[tuple[Tensor, int]]:
    """Yield parts of an image, as masks, and along how many directions to look at each; the whole comes last."""
    yield silent, _SILENT
    places = torch.arange(silent.numel(), device=silent.device).view_as(silent)
    block = places * _GRID**2 // silent.numel()
    if silent.dim() == 3:
        channels, height, width = silent.shape
        if 1 < channels <= 4:
            for channel in range(channels):
                yield places // (height * width) == channel, 1
        block = (places // width % height) * _GRID // height * _GRID + places % width * _GRID // width
    for number in range(_GRID**2):
        yield block == number, 1
    yield torch.ones_like(silent), _WHOLE


class Differences(nn.Module):
    """A model whose input gradients are autograd's, but for its blind pixels, where they are finite differences.

    blind: a mask of the pixels of an image. They are moved in at most 256 groups, fewer of a large network, by 0.03
    into the box and at random signs; a group's pixels share what it changes, and are grouped anew each time.
    passes: images sent forward for that.
    """

    def __init__(self, model: nn.Module, blind: Tensor) -> None:
        super().__init__()
        self.model, self.pixels, self.passes = model, blind.flatten().nonzero().squeeze(1), 0
        self.generator = torch.Generator().manual_seed(0)
        parameters = sum(value.numel() for value in model.parameters())
        self.groups = min(_GROUPS, max(16, _WORK // max(1, parameters)))

    def forward(self, x: Tensor) -> Tensor:
        """Return the model's logits."""
        logits: Tensor = self.model(x)
        return logits

    def input_gradient(self, x: Tensor, weights: Tensor) -> Tensor:
        """Return the gradients (..., N, *image) of sums of logits with these weights (..., N, classes)."""
        logits, gradient = logits_and_pull(self.model, x, lambda _: weights.view(-1, *weights.shape[-2:]))
        found = gradient.flatten(2)
        order = self.pixels[torch.randperm(len(self.pixels), generator=self.generator).to(x.device)]
        for group in order.tensor_split(min(self.groups, len(order))):
            moved = x.flatten(1).clone()
            sign = (torch.rand(len(x), len(group), generator=self.generator) - 0.5).sign().to(x)
            start = moved[:, group]
            sign = torch.where(start < _REACH, 1, torch.where(start > 1 - _REACH, -1, sign))
            moved[:, group] = start + _REACH * sign
            with torch.no_grad():
                change = (self.model(moved.view_as(x)) - logits) / _REACH
            self.passes += len(x)
            found[:, :, group] = (change * weights).sum(-1).view(-1, len(x), 1) * sign
        return found.view(*weights.shape[:-1], *x.shape[1:])
