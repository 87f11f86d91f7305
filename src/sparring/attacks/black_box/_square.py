"""Square: a score-based attack that needs no gradient, only logits."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from types import EllipsisType
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from ...draws import Draws, Source, drawn_at, shared_of
from ...errors import Unsupported
from ...threat import L2, LINF, distance, uniform
from .._entry import opening
from .._gradients import Probe
from ..algorithms._losses import margin_loss
from ..algorithms._projections import FeasibleSet, budget, column, inside, select, shrink
from ..fastpath._mlp import Dense

# Fractions of the queries at which the side of the squares shrinks (the area halves each time).
_HALVINGS = (0.001, 0.005, 0.02, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8)
# A random search progresses with the logarithm of its length: checks at this many halvings of the queries.
_CHECKS = 6
# First-layer outputs are summed change by change, and recomputed after so many queries to limit rounding errors.
_REFRESH = 500


@opening
def square(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    norm: float = LINF,
    eps: float | None = None,
    targets: Tensor | None = None,
    generator: Source = None,
    queries: int = 5000,
    share: float = 0.8,
    patience: float | None = None,
) -> Tensor:
    """Change random squares and keep what raises the margin (Andriushchenko et al. 2020, algorithms 1 to 3).

    x: (N, C, H, W). Supports linf and l2. `share` is the fraction of the image's area that the first square covers.
    Images leave at their first success. With `patience`, they also leave if that many times the gain of the last
    doubling of queries, at every remaining doubling, would not reach the boundary (4 halves the queries and loses about
    one success in a hundred). Raises UserError without eps, Unsupported for l1 or inputs that are not images.
    """
    eps = budget(eps)
    if x.dim() != 4:
        raise Unsupported("Square needs images (N, C, H, W)")
    region = FeasibleSet.around(x, norm, eps)
    pattern = _stripes if norm == LINF else _tiles
    start = region.bring_in_(x + pattern(x, eps, drawn_at(generator, 0)))
    start = start.contiguous()
    x_adv = start.clone()
    with torch.no_grad():
        gap = margin_loss(model(start), y, targets)
    state = Search.of(region, y, targets, start, gap)
    checks = {queries >> halvings for halvings in range(1, _CHECKS + 1)}
    for begin, end in pairwise(_marks(queries, checks)):
        leaving = state.gap > 0
        if patience is not None and begin in checks:
            hope = state.gap + patience * (state.gap - state.checked) * math.log2(queries / begin)
            leaving = leaving | (hope < 0)
            state.checked = state.gap.clone()
        state = _leave(state, leaving, x_adv)
        if len(state.row) == 0:
            return x_adv
        area = share * _shrunk(begin, queries) * x[0, 0].numel()
        if norm == LINF:
            with torch.no_grad():
                source = drawn_at(generator, begin, state.row)
                try_squares(model, state, max(round(math.sqrt(area)), 1), begin, end, source)
        else:
            for query in range(begin, end):
                state = _leave(state, state.gap > 0, x_adv)
                if len(state.row) == 0:
                    return x_adv
                _try_l2(model, state, max(round(math.sqrt(area)), 3), eps, drawn_at(generator, query, state.row))
    x_adv[state.row] = state.point
    return x_adv


def _shrunk(query: int, queries: int) -> float:
    """Return a query's area relative to the first square's."""
    return 0.5 ** sum(query / queries > mark for mark in _HALVINGS)


def _marks(queries: int, checks: set[int]) -> list[int]:
    """Return the queries at which the size changes, prospects are checked, or sums are recomputed."""
    return [
        query
        for query in range(1, queries + 1)
        if query in {1, queries} | checks
        or query % _REFRESH == 1
        or _shrunk(query, queries) != _shrunk(query - 1, queries)
    ]


def _leave(state: Search, leaving: Tensor, x_adv: Tensor) -> Search:
    """Return the images that stay; write the points of the others to x_adv."""
    if not bool(leaving.any()):
        return state
    x_adv[state.row[leaving]] = state.point[leaving]
    return shrink(state, ~leaving)


def _try_l2(model: nn.Module, state: Search, side: int, eps: float, generator: Source) -> None:
    """Try one query of l2 on every image, and keep what raises its margin."""
    candidate = _propose_l2(state, side, eps, generator)
    with torch.no_grad():
        gap = margin_loss(model(candidate), state.y, state.targets)
    better = (gap > state.gap).nonzero().squeeze(1)
    state.gap[better], state.point[better] = gap[better], candidate[better]


def _coins(shape: tuple[int, ...], like: Tensor, generator: Source) -> Tensor:
    """Return fair signs, +1 or −1."""
    draw = uniform(shape, like, generator)
    return torch.where(draw < 0.5, -1.0, 1.0).to(like.dtype)


def _below(bound: int, shape: tuple[int, ...], like: Tensor, generator: Source) -> Tensor:
    """Return integers from 0 to bound − 1."""
    if isinstance(generator, Draws):
        return generator.below(bound, shape[1:])
    device = like.device if generator is None else generator.device
    return torch.randint(0, bound, shape, generator=generator, device=device).to(like.device)


def _stripes(x: Tensor, eps: float, generator: Source) -> Tensor:
    """Return the linf start: vertical stripes of ±eps, one column and channel wide."""
    images, channels, _, width = x.shape
    return eps * _coins((images, channels, 1, width), x, generator).expand_as(x)


def _hill(height: int, width: int, like: Tensor) -> Tensor:
    """Return the paper's equation for η: a pyramid whose steps grow like Σ 1/k² towards the middle."""
    half = height // 2
    rows = torch.arange(height, device=like.device).view(-1, 1) - half
    columns = torch.arange(width, device=like.device).view(1, -1) - width // 2
    # Distance in steps from the middle, the longer axis setting the number of steps.
    ring = torch.maximum(rows.abs(), columns.abs())
    steps = torch.arange(half + 1, dtype=like.dtype, device=like.device)
    heights: Tensor = (1 / (half + 1 - steps) ** 2).cumsum(0)
    return heights[(half - ring).clamp_min(0)]


def _pattern(side: int, like: Tensor, generator: Source) -> Tensor:
    """Return two hills of opposite sign, side by side or one above the other, at unit length: (side, side)."""
    first = side // 2
    pair = torch.cat([_hill(side, first, like), -_hill(side, side - first, like)], dim=1)
    unit: Tensor = pair / pair.norm()
    return unit.T if float(uniform((1,), like, shared_of(generator))) < 0.5 else unit


def _tiles(x: Tensor, eps: float, generator: Source) -> Tensor:
    """Return the l2 start: a 5×5 grid of patterns with random signs, of length eps."""
    images, channels, height, width = x.shape
    side = max(min(height, width) // 5, 1)
    start = torch.zeros_like(x)
    for top in range(0, height - side + 1, side):
        for left in range(0, width - side + 1, side):
            source = drawn_at(generator, top * width + left)
            sign = _coins((images, channels, 1, 1), x, source)
            tile = _pattern(side, x, source) if side > 1 else torch.ones(1, 1, dtype=x.dtype, device=x.device)
            start[..., top : top + side, left : left + side] = sign * tile
    return start * column(eps / distance(start, L2).clamp_min(1e-30), x)


def _propose_l2(state: Search, side: int, eps: float, generator: Source) -> Tensor:
    """Take the length that one window holds, with what is unused, and spend it on a pattern in another window."""
    images, channels, height, width = state.x.shape
    # Odd and at least 3, as the pattern needs, but no larger than the image.
    side = min(side | 1, height, width)
    windows: list[tuple[EllipsisType | slice, ...]] = []
    for place in range(2):  # the same for all images
        source = shared_of(drawn_at(generator, place + 1))
        corner = _below((height - side + 1) * (width - side + 1), (1,), state.x, source)
        top, left = divmod(int(corner), width - side + 1)
        windows.append((..., slice(top, top + side), slice(left, left + side)))
    delta = state.point - state.x
    unused = (eps**2 - delta.flatten(1).square().sum(1)).clamp_min(0).view(-1, 1, 1, 1)
    before = delta.square().sum((2, 3), keepdim=True)
    grown = delta[windows[0]]
    direction = _coins((images, channels, 1, 1), state.x, generator) * _pattern(side, state.x, generator)
    direction = direction + grown / grown.square().sum((2, 3), keepdim=True).sqrt().clamp_min(1e-10)
    changed = delta.clone()
    changed[windows[1]] = 0
    changed[windows[0]] = 0
    freed = before - changed.square().sum((2, 3), keepdim=True)
    length = (freed + unused / channels).clamp_min(0).sqrt()
    changed[windows[0]] = direction / direction.square().sum((2, 3), keepdim=True).sqrt().clamp_min(1e-10) * length
    return inside(state.x, state.x + changed, L2, eps)


# On a network of matrices, this many squares are tried at once per image: about one in twenty is kept, so few are
# wasted, and smaller products are no faster. Early on more are kept: one more at once for every ten queries made.
_TRIES, _EARLY = 8, 10
# Up to so many changed pixels, columns of the first matrix are summed; beyond, the product is faster.
_FEW = 200


@dataclass
class Search:
    """State of the images not yet fooled: one entry per image in every tensor.

    low, high: where pixels may be, for linf; gap: the margin at `point`; checked: what it was at the last check.
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
        """Return the initial state of all images."""
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
    def draw(cls, x: Tensor, side: int, queries: int, generator: Source) -> _Squares:
        """Draw squares, cut off where the image is narrower."""
        images, channels, height, width = x.shape
        rows, columns = min(side, height), min(side, width)
        across = width - columns + 1
        place = _below((height - rows + 1) * across, (images, queries), x, generator)
        corner = place // across * width + place % across
        upper = uniform((images, queries, channels), x, drawn_at(generator, 0)) < 0.5
        pixels = torch.arange(x[0].numel(), device=x.device).view(channels, height, width)
        return cls(corner, upper, pixels[:, :rows, :columns].flatten(1))


class _View(NamedTuple):
    """The next L queries of R images each, as squares of P pixels.

    pixels, new, change (R, L, P): which pixels change, to what, and by how much; seen (R, L): which queries are
    tried; asked: the numbers in (R · L) of those that change anything.
    """

    pixels: Tensor
    new: Tensor
    change: Tensor
    seen: Tensor
    asked: Tensor


def try_squares(model: nn.Module, state: Search, side: int, begin: int, end: int, generator: Source) -> None:
    """Move every image along the queries `begin` to `end` of the attack, up to its first success.

    A query sets one square of the image, channel by channel, to an end of the budget, and is kept where that raises the
    margin. One that changes nothing is not evaluated. Several are tried at the same point: the first that gains is
    kept, and the later ones are tried again.
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
    """Return the next queries of images that have made `done`; `part` selects these images among the squares."""
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

    columns: the first matrix, (pixels, units); first: its outputs (N, units) at the points; after: at the tried ones.
    """

    probe: Probe
    dense: Dense
    columns: Tensor
    first: Tensor
    after: Tensor

    @classmethod
    def of(cls, model: nn.Module, point: Tensor) -> _Matrices | None:
        """Return the network at these points, or None if it consists of more than matrices."""
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
        """Continue from evaluated points: at the images `rows`, the numbers `kept` among the sorted `asked`."""
        self.first[rows] = self.after[torch.searchsorted(asked, kept)]
