"""The l_inf steps of Square: every image goes through squares of its own, and looks at several of them at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from ...threat import uniform
from .._gradients import Probe
from ..fastpath._mlp import Dense
from ._losses import margin_loss
from ._projections import FeasibleSet, select

# On a network of matrices an image tries so many squares at once: about one in twenty is kept, so that few are wasted,
# and small products cost as much as these. Early on more are kept: one more at once for every ten queries made.
_TRIES, _EARLY = 8, 10
# Up to so many changed pixels their columns of the first matrix are added up; beyond, the product is faster.
_FEW = 200


@dataclass
class Search:
    """The images still standing: one entry per image in every tensor.

    low, high: where pixels may be, for l_inf; gap: the margin at `point`; checked: what it was at the last check.
    """

    row: Tensor
    x: Tensor
    low: Tensor
    high: Tensor
    y: Tensor
    targets: Tensor | None
    point: Tensor
    gap: Tensor
    checked: Tensor

    @classmethod
    def of(cls, region: FeasibleSet, y: Tensor, targets: Tensor | None, point: Tensor, gap: Tensor) -> Search:
        """Return the beginning, with everybody in it."""
        row = torch.arange(len(y), device=y.device)
        return cls(row, region.x, region.low, region.high, y, targets, point, gap, gap.clone())


@dataclass(frozen=True)
class _Squares:
    """Squares drawn for N images: corner (N, queries), the number of its first pixel; upper (N, queries, C): whether a
    channel goes to the upper end of the budget; inside (C, pixels): the pixels of a square whose corner is pixel 0.
    """

    corner: Tensor
    upper: Tensor
    inside: Tensor

    @classmethod
    def draw(cls, x: Tensor, side: int, queries: int, generator: torch.Generator | None) -> _Squares:
        """Draw squares, cut off where the image is narrower."""
        images, channels, height, width = x.shape
        rows, columns = min(side, height), min(side, width)
        device = x.device if generator is None else generator.device

        def places(room: int) -> Tensor:
            return torch.randint(0, room + 1, (images, queries), generator=generator, device=device).to(x.device)

        corner = places(height - rows) * width + places(width - columns)
        upper = uniform((images, queries, channels), x, generator) < 0.5
        pixels = torch.arange(x[0].numel(), device=x.device).view(channels, height, width)
        return cls(corner, upper, pixels[:, :rows, :columns].flatten(1))


class _View(NamedTuple):
    """What R images see of the queries ahead of each, L of them, squares of P pixels.

    pixels, new, change (R, L, P): which pixels change, to what, and by how much; seen (R, L): which queries are looked
    at; asked: the numbers in (R · L) of those that change anything.
    """

    pixels: Tensor
    new: Tensor
    change: Tensor
    seen: Tensor
    asked: Tensor


def try_squares(
    model: nn.Module, state: Search, side: int, begin: int, end: int, generator: torch.Generator | None
) -> None:
    """Move every image along the queries `begin` to `end` of the attack, up to its first success.

    A query sets one square of the image, channel by channel, to an end of the budget, and is kept where that raises the
    margin. One that changes nothing is not put to the model. Several are tried on the same point: of those the first
    that gains is kept, and the later ones are tried again.
    """
    matrices = _Matrices.of(model, state.point)
    squares = _Squares.draw(state.x, side, end - begin, generator)
    tries = 1 if matrices is None else min(2 + begin // _EARLY, _TRIES)
    if squares.inside.numel() > _FEW:
        matrices = None
    point = state.point.flatten(1)
    ends = torch.cat([state.low.flatten(1), state.high.flatten(1)], dim=1)
    done = torch.zeros_like(state.row)
    while True:
        going = ((done < end - begin) & (state.gap <= 0)).nonzero().squeeze(1)
        if len(going) == 0:
            return
        part = slice(None) if len(going) == len(done) else going
        view = _look(squares, point[part], ends[part], done[part], part, tries)
        if len(view.asked) == 0:
            done[part] += view.seen.sum(1)
            continue
        image, pixels = going[view.asked // view.seen.shape[1]], view.pixels.flatten(0, 1).index_select(0, view.asked)
        if matrices is None:
            candidates = point[image].scatter_(1, pixels, view.new.flatten(0, 1).index_select(0, view.asked))
            logits = model(candidates.view(-1, *state.x.shape[1:]))
        else:
            logits = matrices.ask(image, pixels, view.change.flatten(0, 1).index_select(0, view.asked))
        gap = view.change.new_full(view.seen.shape, -torch.inf)
        gap.view(-1)[view.asked] = margin_loss(logits, state.y[image], select(state.targets, image))
        better = gap > state.gap[part].unsqueeze(1)
        gained = better.any(1).nonzero().squeeze(1)
        query, rows = better[gained].to(torch.uint8).argmax(1), going[gained]
        step = view.seen.sum(1)
        step[gained] = query + 1
        done[part] += step
        state.gap[rows] = gap[gained, query]
        point[rows.unsqueeze(1), view.pixels[gained, query]] = view.new[gained, query]
        if matrices is not None:
            matrices.keep(rows, view.asked, gained * view.seen.shape[1] + query)


def _look(squares: _Squares, point: Tensor, ends: Tensor, done: Tensor, part: Tensor | slice, tries: int) -> _View:
    """Return what images see that have `done` queries behind them; `part` says which images of the squares they are."""
    # Of small squares about a third change nothing.
    width = tries + tries // 2 + 1 if squares.inside.numel() <= _FEW else tries
    ahead = done.unsqueeze(1) + torch.arange(width, device=done.device)
    count, channels = squares.upper.shape[1:]
    there = ahead < count
    ahead.clamp_max_(count - 1)
    upper = squares.upper[part].gather(1, ahead.unsqueeze(2).expand(-1, -1, channels)).unsqueeze(3)
    pixels = squares.corner[part].gather(1, ahead)[..., None, None] + squares.inside
    new = ends.gather(1, (pixels + point.shape[1] * upper).flatten(1)).view(*ahead.shape, -1)
    pixels = pixels.flatten(2)
    change = new - point.gather(1, pixels.flatten(1)).view_as(new)
    real = there & change.any(2)
    seen = there & (real.cumsum(1) <= tries)
    return _View(pixels, new, change, seen, (real & seen).flatten().nonzero().squeeze(1))


@dataclass
class _Matrices:
    """A network of matrices whose first layer's outputs are added up change by change.

    columns: the first matrix, (pixels, units); first: its outputs (N, units) at the points; after: at what was asked.
    """

    probe: Probe
    dense: Dense
    columns: Tensor
    first: Tensor
    after: Tensor

    @classmethod
    def of(cls, model: nn.Module, point: Tensor) -> _Matrices | None:
        """Return the network at these points, None for one that is more than matrices."""
        if not isinstance(model, Probe) or model.dense is None:
            return None
        first = model.dense.first(point)
        return cls(model, model.dense, model.dense.weights[0].T.contiguous(), first, first)

    def ask(self, image: Tensor, pixels: Tensor, change: Tensor) -> Tensor:
        """Return the logits of images some of whose pixels change: image (M,), pixels and change (M, P)."""
        added = functional.embedding_bag(pixels, self.columns, mode="sum", per_sample_weights=change)
        self.after = added.add_(self.first.index_select(0, image))
        return self.probe.from_first(self.dense, self.after)

    def keep(self, rows: Tensor, asked: Tensor, kept: Tensor) -> None:
        """Go on from what was asked: at the images `rows` the numbers `kept` among those `asked`, which are sorted."""
        self.first[rows] = self.after[torch.searchsorted(asked, kept)]
