"""Certified margins, radii and accuracy of any network that can be lowered."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...errors import UnknownNameError, UserError
from ...graph import Graph, Linear, ReLU
from ...threads import shared_out
from ...threat import Threat, distance, dual
from ...waiting import courteous
from .._network import compacted, margin_rows, prepare
from .._region import Region, check_pixels, dot, region
from ._crown import bound_nodes, flat, lower_bound
from ._open_units import heavy
from ._relaxations import Interval, Lines, Relaxation
from ._search import Final, Search

Bound = Callable[[Graph, Region, Tensor], Tensor]
_CHUNK = 2**22  # coefficients of the margins that one image batch may need at once: 32 MB of float64
_WIDE = 0.3  # share of the linearised radius at which intervals show how fast they loosen
_ROUGHLY = 0.3  # tolerance of a radius where CROWN found none
_ROUNDING = 1e-12  # the error of float64 in a sum of thousands of terms, relative to the largest magnitude in it


def _interval(graph: Graph, region: Region, rows: Tensor) -> Tensor:
    bounds, _ = bound_nodes(graph, region, backward=False)
    return _rounded_down(interval_margins(graph, rows, bounds), bounds)


def interval_margins(graph: Graph, rows: Tensor, bounds: Sequence[Interval]) -> Tensor:
    """Bound rows·logits from below by the intervals of all nodes: rows (N, K, classes) to (N, K)."""
    last = graph.nodes[-1]
    if isinstance(last.op, Linear):  # the difference of two logits is bounded at once, not as a difference of bounds
        added = 0 if last.op.bias is None else rows @ last.op.bias
        rows, box = rows @ last.op.weight, bounds[last.inputs[0]]
    else:
        added, box = 0, bounds[-1]
    centre, half = (box.upper + box.lower) / 2, (box.upper - box.lower) / 2
    return dot(rows, centre) - dot(rows.abs(), half) + added


def _crown_interval(graph: Graph, region: Region, rows: Tensor) -> Tensor:
    return _as_found(graph, region, rows, *bound_nodes(graph, region, backward=False))


def _crown(graph: Graph, region: Region, rows: Tensor) -> Tensor:
    """Bound margins; in a large network roughly, and once more where that certifies nothing."""
    if not heavy(graph):
        return _as_found(graph, region, rows, *bound_nodes(graph, region, backward=True))
    bounds, relaxed = bound_nodes(graph, region, backward=True, roughly=True)
    value = _as_found(graph, region, rows, bounds, relaxed)
    for image in (value.amin(1) <= _LOGITS * graph.rounding).nonzero().flatten().tolist():
        one = slice(image, image + 1)
        known = [Interval(*(side[one] for side in pair)) for pair in bounds]
        better = bound_nodes(graph, region[one], backward=True, known=known)
        value[one] = torch.maximum(value[one], _as_found(graph, region[one], rows[one], *better))
    return value


def _alpha_crown(graph: Graph, region: Region, rows: Tensor) -> Tensor:
    return _optimised(graph, region, rows, *bound_nodes(graph, region, backward=True))


def _as_found(
    graph: Graph, region: Region, rows: Tensor, bounds: list[Interval], relaxed: Mapping[int, Relaxation]
) -> Tensor:
    """Bound margins by the lines without optimising them: rows (N, K, classes) to (N, K)."""
    return _rounded_down(lower_bound(graph, len(graph.nodes) - 1, rows, region, relaxed, refine=True), bounds)


def _optimised(
    graph: Graph,
    region: Region,
    rows: Tensor,
    bounds: list[Interval],
    relaxed: Mapping[int, Relaxation],
    *,
    steps: int = 20,
    rate: float = 0.1,
) -> Tensor:
    """Ascend on the lower slopes, one set per margin (Xu et al. 2021); every step is a valid bound."""
    start = len(graph.nodes) - 1
    best = lower_bound(graph, start, rows, region, relaxed, refine=True)
    alpha = {
        index: lines.low_slope[:, None].repeat(1, rows.shape[1], *[1] * (lines.low_slope.dim() - 1)).requires_grad_()
        for index, lines in relaxed.items()
        if isinstance(lines, Lines) and bool(lines.free.any())
    }
    if not alpha:
        return _rounded_down(best, bounds)
    optimiser = torch.optim.Adam(alpha.values(), lr=rate)
    for _ in range(steps):
        with torch.enable_grad():
            found = lower_bound(graph, start, rows, region, relaxed, alpha=alpha)
            slopes = torch.autograd.grad(-found.sum(), list(alpha.values()))
        best = torch.maximum(best, found.detach())
        for value, slope in zip(alpha.values(), slopes, strict=True):
            value.grad = slope
        optimiser.step()
        for value in alpha.values():
            value.clamp_(0, 1)
    best = torch.maximum(best, lower_bound(graph, start, rows, region, relaxed, alpha=alpha, refine=True))
    return _rounded_down(best, bounds)


def _rounded_down(value: Tensor, bounds: list[Interval]) -> Tensor:
    largest = torch.stack([flat(b).abs().amax(1) for pair in bounds for b in pair]).amax(0)
    return value - _ROUNDING * largest[:, None]


BOUNDS: dict[str, Bound] = {
    "interval": _interval,
    "crown-interval": _crown_interval,
    "crown": _crown,
    "alpha-crown": _alpha_crown,
}
_FINAL: dict[str, Final] = {"crown": _as_found, "alpha-crown": _optimised}
_LOGITS = 4  # two of them in a margin, each off by up to twice the observed rounding


@courteous()
def margin(model: nn.Module, x: Tensor, y: Tensor, threat: Threat, *, method: str = "crown") -> Tensor:
    """Bound all margins g_y − g_k from below over the eps-ball inside [0, 1]: (N, classes − 1), float64.

    Images x (N, ...) in [0, 1], labels y (N,); columns are the classes other than y in ascending order. Methods are the
    names in BOUNDS, from loose and fast to tight and slow (see `facts`). The computation uses the model's weights in
    float64, and the result is lowered by 1e-12 of the largest activation bound for rounding. Raises Unsupported if a
    layer has no sound rule, UserError for a threat without eps or pixels outside [0, 1].
    """
    if threat.eps is None:
        raise UserError("a certified margin needs a threat with eps; for the largest certified eps use radius")
    check_pixels(x)
    graph, pixels = compacted(prepare(model, tuple(x.shape[1:]), images=x, certified=True), x)
    return margins_over(graph, pixels, y, threat.norm, torch.full((len(x),), threat.eps, dtype=torch.float64), method)


def margins_over(graph: Graph, x: Tensor, y: Tensor, norm: float, eps: Tensor, method: str) -> Tensor:
    """Do what `margin` does for a lowered float64 network and one eps per image (N,)."""
    if method not in BOUNDS:
        raise UnknownNameError("bound", method, BOUNDS)
    if len(x) == 0:
        return torch.zeros(0, graph.nodes[-1].shape[0] - 1, dtype=torch.float64)

    def bound(images: slice) -> Tensor:
        value = BOUNDS[method](graph, region(x[images], norm, eps[images]), margin_rows(graph, y[images]))
        return value - _LOGITS * graph.rounding

    return over_slices(bound, slices(len(x), _images_at_once(graph)))


def _images_at_once(graph: Graph) -> int:
    (classes,) = graph.nodes[-1].shape
    return max(1, min(64, _CHUNK // (classes * max(math.prod(node.shape) for node in graph.nodes))))


@courteous()
def radius(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    norm: float,
    *,
    method: str = "crown",
    tolerance: float | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Compute the largest certified eps by regula falsi: (N,), float64, for pixels in [0, 1].

    No perturbation of smaller norm that stays in [0, 1] changes the label. Zero if the model is wrong at x. Each result
    is at most the relative `tolerance` (0.001) below an eps that was not certified. If CROWN takes seconds per image
    and no tolerance is given, few evaluations are used, and the result is a few per cent lower. `progress` is called
    with the number of finished images and the total. Raises as `margin` does.
    """
    check_pixels(x)
    graph, pixels = compacted(prepare(model, tuple(x.shape[1:]), images=x, certified=True), x)
    if torch.get_num_threads() == 1 or len(x) < 2 or (tolerance is None and heavy(graph)):
        return radius_over(graph, pixels, y, norm, method, tolerance, progress)

    def found(piece: slice) -> Tensor:
        return radius_over(graph, pixels[piece], y[piece], norm, method, tolerance)

    # Searches end at different times: whole ones are shared out, so that no thread waits for another at each step.
    return over_slices(found, slices(len(x), _images_at_once(graph)), progress)


def radius_over(
    graph: Graph, x: Tensor, y: Tensor, norm: float, method: str, tolerance: float | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:  # fmt: skip
    """Do what `radius` does for a lowered float64 network."""
    limit = float(distance(torch.ones(1, *x.shape[1:]), norm))  # the whole box
    safe = torch.zeros(len(x), dtype=torch.float64)
    clean = margins_over(graph, x, y, norm, safe, "interval").amin(1)
    lost = (~(clean > 0)).nonzero().squeeze(1)  # a deep network's intervals can be wide even of single points
    clean[lost] = _at(graph, x[lost], y[lost])
    index = (clean > 0).nonzero().squeeze(1)
    if len(index) == 0:
        return safe
    x, y = x[index], y[index]
    guess = _linearised(graph, x, y, norm).clamp(1e-6, limit)
    if method in _FINAL and tolerance is None and heavy(graph):
        safe[index] = _few_passes(graph, x, y, norm, _FINAL[method], clean[index], guess, limit, progress)
        return safe
    bracket = Bracket.above_zero(clean[index], clean[index] / guess, limit, tolerance or 1e-3)
    while len(open_ := bracket.open_images()):
        if progress is not None:
            progress(len(safe) - len(open_), len(safe))
        value = margins_over(graph, x[open_], y[open_], norm, guess[open_], method).amin(1)
        guess[open_] = bracket.narrow_(open_, guess[open_], value)
    safe[index] = bracket.low
    if progress is not None:
        progress(len(safe), len(safe))
    return safe


def _at(graph: Graph, x: Tensor, y: Tensor) -> Tensor:
    """Return the smallest margin of each image itself, less what rounding can be."""
    if len(x) == 0:
        return torch.zeros(0, dtype=torch.float64)
    logits = torch.cat([graph(one) for one in torch.split(x.double(), 1)]).double()
    margins = dot(margin_rows(graph, y), logits).amin(1)
    return margins - _LOGITS * graph.rounding - _ROUNDING * logits.abs().amax(1)


def _few_passes(
    graph: Graph, x: Tensor, y: Tensor, norm: float, final: Final, margin: Tensor, far: Tensor, limit: float,
    progress: Callable[[int, int], None] | None,
) -> Tensor:  # fmt: skip
    """Do what `radius_over` does for images whose margins at eps 0 are positive, one by one; see `Search`."""
    wide = _WIDE * far
    fallen = margin - margins_over(graph, x, y, norm, wide, "crown-interval").amin(1)
    near = (margin / fallen).clamp_max(1) * wide  # where the margin would vanish if it fell evenly
    rows = margin_rows(graph, y)

    def found(one: slice) -> Tensor:
        start = float(near[one])
        search = Search(
            graph, x[one], rows[one], norm, final, _LOGITS * graph.rounding, float(margin[one]), float(far[one])
        )
        return torch.tensor([search.radius(start, limit)], dtype=torch.float64)

    safe = over_slices(found, [slice(i, i + 1) for i in range(len(x))], progress)
    for image in (safe == 0).nonzero().squeeze(1).tolist():
        one = slice(image, image + 1)
        safe[one] = radius_over(graph, x[one], y[one], norm, "crown-interval", _ROUGHLY)
    return safe


def _linearised(graph: Graph, x: Tensor, y: Tensor, norm: float) -> Tensor:
    """Guess the distance to the boundary by margin over gradient norm: only a start for the search."""
    point = x.detach().double().requires_grad_()
    with torch.enable_grad():
        value = dot(margin_rows(graph, y), graph(point)).amin(1)
        (slope,) = torch.autograd.grad(value.sum(), point)
    return value.detach() / distance(slope, dual(norm)).clamp_min(1e-12)


@courteous()
def stable(model: nn.Module, x: Tensor, threat: Threat) -> Tensor:
    """Return the share of ReLUs whose input has one sign in the whole eps-ball, by CROWN's bounds: (N,), float64.

    Units that the logits do not depend on count as stable; a network without ReLUs has a share of 1. Raises as `margin`
    does.
    """
    check_pixels(x)
    whole = prepare(model, tuple(x.shape[1:]), images=x, certified=True)
    graph, pixels = compacted(whole, x)
    units = sum(math.prod(node.shape) for node in whole.nodes if isinstance(node.op, ReLU))
    eps = torch.full((len(x),), math.inf if threat.eps is None else threat.eps, dtype=torch.float64)

    def unstable(images: slice) -> Tensor:
        bounds, _ = bound_nodes(graph, region(pixels[images], threat.norm, eps[images]), backward=True)
        boxes = [bounds[node.inputs[0]] for node in graph.nodes if isinstance(node.op, ReLU)]
        counts = [flat((low < 0) & (high > 0)).sum(1) for low, high in boxes]
        return torch.stack([*counts, torch.zeros(len(pixels[images]), dtype=torch.int64)]).sum(0)

    return 1 - over_slices(unstable, slices(len(x), _images_at_once(graph))).double() / max(1, units)


@courteous()
def certified_accuracy(model: nn.Module, x: Tensor, y: Tensor, threat: Threat, *, method: str = "crown") -> float:
    """Return the fraction of images whose label is certified for every perturbation of the threat."""
    return float((margin(model, x, y, threat, method=method).amin(1) > 0).double().mean())


# Guesses keep this share of the tolerance away from both ends: a correct guess then closes the bracket.
_ASIDE = 0.4
# The margin of one end counts at most so many times the other's, so that a cliff cannot slow the search down.
_STEEPEST = 200.0
# Below this eps no more digits are needed.
_SMALLEST = 1e-9


@dataclass
class Bracket:
    """The interval of eps in which each image's margin falls to zero: certified at `low`, not certified at `high`.

    All have shape (N,), float64. above, below: the margins at both ends, or less of them (see `narrow_`); rose: +1
    where `low` moved last, −1 where `high` did. slope: how fast the margin falls at eps 0.
    """

    low: Tensor
    high: Tensor
    above: Tensor
    below: Tensor
    rose: Tensor
    slope: Tensor
    limit: float
    tolerance: float

    @classmethod
    def above_zero(cls, margin: Tensor, slope: Tensor, limit: float, tolerance: float) -> Bracket:
        """Begin at eps 0 with margins > 0 and their slopes there, (N,); no eps beyond the limit is tried."""
        zero, inf = torch.zeros_like(margin), torch.full_like(margin, torch.inf)
        return cls(zero, inf, margin.clone(), -inf, zero.clone(), slope, limit, tolerance)

    def open_images(self) -> Tensor:
        """Return the numbers of the images whose ends are farther apart than the tolerance, relative to high."""
        wide = (self.high - self.low > self.tolerance * self.high) & (self.high > _SMALLEST)
        return torch.where(torch.isfinite(self.high), wide, self.low < self.limit).nonzero().squeeze(1)

    def narrow_(self, rows: Tensor, eps: Tensor, margin: Tensor) -> Tensor:
        """Record the margins of some images at eps, and return the next eps to try for them, (len(rows),).

        Regula falsi with the Illinois rule (Dowell & Jarratt 1971): an end that stays twice counts with half its
        margin, so that the other side is tried. Bounds loosen as balls widen: instead of the line through both ends,
        the parabola is used that has the margin's slope at 0. Until an end above is known, the line through the last
        two margins is followed, to at most four times low.
        """
        low, high, above, below, rose = (v[rows] for v in (self.low, self.high, self.above, self.below, self.rose))
        certified = margin > 0
        fall = (above - margin) / (eps - low)
        onward = torch.where(fall > 0, eps + margin / fall, torch.inf) * (1 + _ASIDE * self.tolerance)
        above = torch.where(certified, margin, torch.where(rose < 0, above / 2, above))
        below = torch.where(certified, torch.where(rose > 0, below / 2, below), margin)
        ended = torch.isfinite(high) | ~certified
        below = torch.where(ended, below.nan_to_num(-torch.inf).clamp_max(-1e-300).maximum(-_STEEPEST * above), below)
        above = above.minimum(-_STEEPEST * below)
        low, high = torch.where(certified, eps, low), torch.where(certified, high, eps)
        self.low[rows], self.high[rows], self.above[rows], self.below[rows] = low, high, above, below
        self.rose[rows] = torch.where(certified, 1.0, -1.0).to(rose.dtype)
        aside = torch.minimum(_ASIDE * self.tolerance * high, (high - low) / 2)
        between = _between(low, high, above, below, self.slope[rows])
        between = torch.minimum(torch.maximum(between, low + aside), high - aside)
        onward = torch.minimum(torch.maximum(onward, 1.05 * low), 4 * low).clamp_max(self.limit)
        return torch.where(torch.isfinite(high), between, onward)


def _between(low: Tensor, high: Tensor, above: Tensor, below: Tensor, slope: Tensor) -> Tensor:
    """Return the zero of the parabola through both ends with this slope at 0, or of the line if that bends up."""
    apart = high - low
    bend = (above - below - slope * apart) / (apart * (apart + 2 * low))
    steep = slope + 2 * bend * low
    curved = low + 2 * above / (steep + (steep**2 + 4 * bend * above).sqrt())
    return torch.where((bend > 0) & torch.isfinite(bend), curved, low + apart * above / (above - below))


def slices(count: int, at_most: int) -> list[slice]:
    """Cut `count` images into pieces of `at_most`, or smaller ones where that gives every thread one."""
    step = max(1, min(at_most, -(-count // torch.get_num_threads())))
    return [slice(i, min(i + step, count)) for i in range(0, count, step)]


def over_slices(
    work: Callable[[slice], Tensor], pieces: Sequence[slice], progress: Callable[[int, int], None] | None = None
) -> Tensor:
    """Return the concatenated results of all pieces, without gradients, computed by several threads."""

    def alone(piece: slice) -> Tensor:
        with torch.no_grad():  # each thread has its own switch
            return work(piece)

    found = []
    for piece, result in zip(pieces, shared_out(alone, pieces), strict=True):
        found.append(result)
        if progress is not None:
            progress(piece.stop, pieces[-1].stop)
    return torch.cat(found)
