"""Geometry of attacks: steepest steps, projection onto box and budget, nearest points on a boundary.

The box is [0, 1] for every pixel. Batches have shape (N, ...), one number per image has shape (N,).
"""

from __future__ import annotations

from dataclasses import dataclass, fields, is_dataclass, replace
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from ...errors import UserError
from ...threat import L1, L2, LINF, distance, dual, project
from .._gradients import ROWS_AT_ONCE, logits_and_pull, on_cpu
from ..fastpath._gram_matrix import Seen
from ._losses import is_past, others

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

State = TypeVar("State", bound="DataclassInstance")


def column(values: Tensor, like: Tensor) -> Tensor:
    """Return (N,) values shaped to broadcast over a batch."""
    return values.view(-1, *[1] * (like.dim() - 1))


def select(values: Tensor | None, which: Tensor) -> Tensor | None:
    """Return the chosen entries of optional per-image values (an index or a mask), or None."""
    return None if values is None else values[which]


def shrink(state: State, keep: Tensor) -> State:
    """Return a dataclass with only the chosen images in its tensors, all per image, and in dataclasses inside it."""
    if keep.dtype == torch.bool and not on_cpu(keep):
        keep = keep.nonzero().squeeze(1)  # once, not in every tensor

    def kept(value: object) -> object:
        if isinstance(value, Tensor):
            return value[keep]
        return shrink(value, keep) if is_dataclass(value) and not isinstance(value, type) else value

    return replace(state, **{field.name: kept(getattr(state, field.name)) for field in fields(state)})


def put_(whole: Tensor, rows: Tensor, chosen: Tensor, values: Tensor) -> None:
    """Write the chosen (bool, (M,)) of some values (M, ...) to their places `rows` (M,) in the whole (N, ...)."""
    if on_cpu(whole):
        which = chosen.nonzero().squeeze(1)  # once, since masks are slow
        whole.index_copy_(0, rows.index_select(0, which), values.index_select(0, which))
    else:  # without asking how many they are
        whole.index_copy_(0, rows, torch.where(column(chosen, values), values, whole.index_select(0, rows)))


def budget(eps: float | None) -> float:
    """Return eps, or raise UserError if a budget attack got none."""
    if eps is None:
        raise UserError(
            "this attack needs a budget: give eps, or choose a minimum-norm attack (nearest, deepfool, ...)"
        )
    return eps


def steepest(gradient: Tensor, norm: float) -> Tensor:
    """Return the direction of unit norm along which a linear function with this gradient grows most."""
    if norm == LINF:
        return gradient.sign()
    if norm == L2:
        return gradient / column(distance(gradient, L2).clamp_min(1e-30), gradient)
    flat = gradient.flatten(1)
    best = flat.abs().argmax(1, keepdim=True)
    return torch.zeros_like(flat).scatter(1, best, flat.gather(1, best).sign()).view_as(gradient)


def climb(point: Tensor, gradient: Tensor, norm: float, length: float | Tensor) -> Tensor:
    """Return points moved by `length`, a number or of shape (N,), along which a linear function grows most.

    For l1 the steepest direction is one pixel, which the box soon stops: pixels of largest gradient move first, each as
    far as the box allows, until the length is used up. Other norms leave the box; `inside` projects back.
    """
    if norm == L1:
        flat, base = gradient.flatten(1), point.flatten(1)
        order = flat.abs().argsort(dim=1, descending=True)
        room = torch.where(flat > 0, 1 - base, base).clamp_min_(0).gather(1, order)
        length = length.to(point.dtype) if isinstance(length, Tensor) else point.new_full((1,), length)
        left = length.view(-1, 1) - (room.cumsum(1) - room)
        moved = torch.zeros_like(flat).scatter_(1, order, torch.minimum(left.clamp_min_(0), room))
        return moved.mul_(flat.sign()).add_(base).view_as(point)
    if isinstance(length, Tensor):
        return steepest(gradient, norm).mul_(column(length, gradient)).add_(point)
    return torch.add(point, steepest(gradient, norm), alpha=length)


def hold(gradient: Tensor, point: Tensor) -> Tensor:
    """Return the gradient with zeros where the box is active: at pixels that it would move out of [0, 1].

    Uses signs, because masks cost several times as much on pixels without a pattern.
    """
    up, down = (1 - point).sign_(), point.sign()
    return up.mul_(gradient.clamp_min(0)).add_(down.mul_(gradient.clamp_max(0)))


def inside(x: Tensor, x_adv: Tensor, norm: float, eps: float | Tensor) -> Tensor:
    """Return x_adv brought into both the box and the eps-ball around x (exactly the nearest such point but for l2).

    Clipping a point of the ball to the box brings every pixel nearer to x, so it stays in the ball; the l2 length
    that clipping loses is given back to the free pixels a few times.
    """
    if norm == LINF:
        return torch.minimum(torch.maximum(x_adv, x - eps), x + eps).clamp_(0, 1)
    limit = eps.to(x.dtype) if isinstance(eps, Tensor) else x.new_full((len(x),), eps)
    if norm == L1:
        return _inside_l1(x, x_adv, limit.unsqueeze(1))
    delta = project(x_adv - x, norm, eps)
    point = (x + delta).clamp_(0, 1)
    # A step of FGSM ends on the sphere except for rounding, so it lost no more than that.
    outside = (distance(x_adv - x, norm) > (1 - 1e-6) * limit) & (distance(point - x, norm) < 0.999 * limit)
    here = on_cpu(x)
    if not here or bool(outside.any()):
        part = outside if here else slice(None)
        low, high, goal, step = -x[part], 1 - x[part], limit[part], delta[part]
        for _ in range(3):
            held = torch.minimum(torch.maximum(step, low), high)
            free = held == step
            missing = (goal.square() - (held * ~free).flatten(1).square().sum(1)).clamp_min(0).sqrt()
            length = (step * free).flatten(1).norm(dim=1).clamp_min(1e-30)
            # At most 10 times: an image whose free pixels hardly matter would otherwise divide by almost nothing.
            step = step * column((missing / length).clamp(1, 10), step)
        again = project(torch.minimum(torch.maximum(step, low), high), norm, goal)
        again = (x[part] + again).clamp_(0, 1)
        if not here:
            return torch.where(column(outside, x), again, point)
        point[outside] = again
    return point


def _inside_l1(x: Tensor, x_adv: Tensor, limit: Tensor) -> Tensor:
    """Return the nearest point of box and l1 ball (Croce & Hein 2021, proposition 2.1); limit has shape (N, 1).

    Every pixel moves by min(max(|delta| − level, 0), room). At level 0 that is clipping to the box; as the level rises
    a pixel's movement begins to shrink at |delta| − room and ends at |delta|: the total is linear between such marks.
    """
    delta, base = (x_adv - x).flatten(1), x.flatten(1)
    size, room = delta.abs(), torch.where(delta > 0, 1 - base, base)
    start = torch.minimum(size, room).sum(1, keepdim=True)
    marks, order = torch.cat([(size - room).clamp_min(0), size], dim=1).sort(dim=1)
    shrinking = torch.cat([torch.ones_like(size), -torch.ones_like(size)], dim=1).gather(1, order).cumsum(1)
    totals = start - torch.cat([torch.zeros_like(start), (shrinking[:, :-1] * marks.diff(dim=1)).cumsum(1)], dim=1)
    last = (totals > limit).sum(1, keepdim=True).clamp_min(1) - 1
    level = marks.gather(1, last) + (totals.gather(1, last) - limit) / shrinking.gather(1, last).clamp_min(1)
    level = torch.where(start > limit, level, 0.0)
    moved = torch.minimum((size - level).clamp_min(0), room)
    # Rounding of the sums must not lead out of the ball.
    moved = moved * (limit / moved.sum(1, keepdim=True).clamp_min(1e-30)).clamp_max(1)
    return (base + moved * delta.sign()).view_as(x)


@dataclass(frozen=True)
class FeasibleSet:
    """The feasible set of an attack: the box and the eps-ball around x, prepared once for all steps."""

    x: Tensor
    norm: float
    eps: float
    low: Tensor
    high: Tensor

    @classmethod
    def around(cls, x: Tensor, norm: float, eps: float) -> FeasibleSet:
        """Return the region of images x."""
        if norm != LINF:
            return cls(x, norm, eps, x, x)
        return cls(x, norm, eps, (x - eps).clamp_min_(0), (x + eps).clamp_max_(1))

    def bring_in_(self, point: Tensor) -> Tensor:
        """Return points brought into the region, in the memory of `point` if the norm allows it; see `inside`."""
        if self.norm == LINF:
            return point.clamp_(self.low, self.high)
        return inside(self.x, point, self.norm, self.eps)

    def ahead(self, point: Tensor, gradient: Tensor, length: float | Tensor) -> Tensor:
        """Return points moved by `length`, a number or (N,), in the steepest direction and brought into the region.

        For l1 they go towards the region's best point instead (Frank & Wolfe 1956), the share length/eps of the way:
        a steepest step would leave even the optimum of a linear function.
        """
        if self.norm != L1:
            return self.bring_in_(climb(point, gradient, self.norm, length))
        share = length / max(self.eps, 1e-30)
        share = share.to(point.dtype) if isinstance(share, Tensor) else point.new_full((1,), share)
        best = climb(self.x, gradient, L1, self.eps)
        return point + column(share.clamp_max(1.0), point) * (best - point)


@dataclass
class Nearest:
    """The nearest adversarial point of each image so far, x while there is none, and its distance, inf until then."""

    point: Tensor
    distance: Tensor

    @classmethod
    def of(cls, x: Tensor) -> Nearest:
        """Return the beginning of a search from images x."""
        return cls(x.clone(), torch.full((len(x),), torch.inf, dtype=x.dtype, device=x.device))

    def update_(self, rows: Tensor | slice, point: Tensor, moved: Tensor, won: Tensor) -> Tensor:
        """Store the adversarial points of images `rows` that are nearer than before; return which are."""
        smallest = self.distance[rows]
        better = won & (moved < smallest)
        if isinstance(rows, slice):
            rows = torch.arange(len(better), device=better.device)
        put_(self.point, rows, better, point)
        put_(self.distance, rows, better, moved)
        return better


def keep_within(x: Tensor, x_adv: Tensor, norm: float, eps: float | None) -> Tensor:
    """Return x_adv, with x for images that a minimum-norm attack moved by more than eps."""
    if eps is None:
        return x_adv
    return torch.where(column(distance(x_adv - x, norm) <= eps, x), x_adv, x)


def boundary_step(
    x: Tensor, gradient: Tensor, gain: Tensor, norm: float, *, rounds: int = 8, tolerance: float = 1e-6
) -> Tensor:
    """Return the smallest perturbation inside the box that raises a linear function by `gain`.

    The function has this gradient, shape (N, ...), and gain has shape (N,). Where the box does not allow the gain, the
    perturbation is the one that gains most. For l2 and linf the answer is clip(t·direction) for one multiplier t per
    image, and what it gains is concave in t: Newton from t = 0 climbs to the root in a few rounds, never past it, and
    stops when at most that share of the gain is missing. For l1 the pixels of largest gradient are used up in turn.
    """
    flat, base = gradient.flatten(1), x.flatten(1)
    # Each pixel's distance to the box in the helpful direction, |1 - x| or |0 - x|. Here and below signs replace
    # masks: on pixels without a pattern `where` and products with booleans cost five to ten times as much.
    room = flat.sign().clamp_min_(0).sub_(base).abs_()
    size = flat.abs()
    wanted = gain.clamp_min(0)
    if norm == L1:
        order = size.argsort(dim=1, descending=True)
        gains = (size * room).gather(1, order)
        before = gains.cumsum(1) - gains
        share = ((wanted.unsqueeze(1) - before) / gains.clamp_min(1e-30)).clamp(0, 1)
        moved = torch.zeros_like(flat).scatter(1, order, share) * room
        return (moved * flat.sign()).view_as(x)
    if norm == L2:
        speed, power = size, size * size
    else:
        # All pixels move alike, but those that change nothing stay.
        speed, power = torch.ones_like(size[:, :1]), size
        room.mul_(size.sign())
    slope = power.sum(1)
    t = wanted / slope.clamp_min(1e-30)
    moved, here, waiting = torch.minimum(speed * t.unsqueeze(1), room), on_cpu(x), x.new_ones((), dtype=torch.bool)
    for _ in range(rounds):
        missing = wanted - (moved * size).sum(1)
        slope = (room - moved).sign_().mul_(power).sum(1)
        waiting = waiting & (missing > tolerance * wanted).logical_and_(slope > 0).any()
        if here and not bool(waiting):
            break
        t = t + torch.where(waiting & (slope > 0), missing.clamp_min(0) / slope.clamp_min(1e-30), 0.0)
        moved = torch.minimum(speed * t.unsqueeze(1), room)
    return moved.mul_(flat.sign()).view_as(x)


def corner_step(x: Tensor, point: Tensor, gradients: Tensor, gains: Tensor) -> Tensor:
    """Return about the smallest l2 perturbation inside the box that raises each of M linear functions by its gain.

    gradients has shape (N, M, ...), gains (N, M). It is clip(sum of t_m·gradient_m) with t >= 0, solved as if the
    box stopped the same pixels as at `point`, and without functions whose t would be negative.
    """
    flat, low, high = gradients.flatten(2), -x.flatten(1), 1 - x.flatten(1)
    delta = (point - x).flatten(1)
    free = ((delta > low) & (delta < high)).to(x)
    products = torch.bmm(flat * free.unsqueeze(1), flat.transpose(1, 2))
    wanted = gains - torch.bmm(flat, (delta * (1 - free)).unsqueeze(2)).squeeze(2)
    own = products.diagonal(dim1=1, dim2=2).clamp_min(1e-30)
    active = torch.ones_like(gains)
    for _ in range(gains.shape[1]):
        pairs = products * active.unsqueeze(1) * active.unsqueeze(2)
        times = torch.linalg.solve(pairs + torch.diag_embed(own * (1 + 1e-6 - active)), wanted * active)
        active *= (times >= 0).to(times)
    step = torch.bmm((times * active).unsqueeze(1), flat).squeeze(1)
    return torch.minimum(torch.maximum(step, low), high).view_as(x)


class Boundary(NamedTuple):
    """One linearised boundary per image.

    logits (N, K); gap (N,), positive where it is still to be closed, 0 where it is not finite; gradient (N, ...) of the
    growing difference of logits; distance (N,) = |gap| / dual norm of the gradient, the box ignored.
    """

    logits: Tensor
    gap: Tensor
    gradient: Tensor
    distance: Tensor


def nearest_boundary(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    targets: Tensor | None = None,
    *,
    norm: float,
    aims: Tensor | None = None,
    candidates: int | None = None,
    seen: Seen | None = None,
) -> Boundary:
    """Return the nearest boundary of each image when all differences of logits are linearised at x.

    Untargeted, the own class meets all others, or the `candidates` of largest logit, or only the class in `aims`;
    with `targets` the target meets the strongest other class. For l2 what a stem has `seen` of the images gives the
    same boundary at less cost.
    """
    chosen: list[Tensor] = []

    def differences(logits: Tensor) -> Tensor:
        chosen.append(_differences(logits, y, targets, aims, candidates))
        return chosen[0]

    images = torch.arange(len(x), device=x.device)
    if seen is not None:
        weights = differences(seen.logits)
        rows, gaps = seen.pull(weights), _gaps(weights, seen.logits)
        nearest, length = seen.stem.nearest(gaps, rows)
        gap, gradient = gaps[nearest, images], (rows[nearest, images] @ seen.stem.dense.weights[0]).view_as(x)
        return Boundary(seen.logits, gap, gradient, gap.abs() / length)
    logits, gradients = logits_and_pull(model, x, differences)
    gaps = _gaps(chosen[0], logits)
    distances = gaps.abs() / _lengths(gradients, norm)
    nearest = distances.argmin(0)
    return Boundary(logits, gaps[nearest, images], gradients[nearest, images], distances[nearest, images])


def nearest_classes(model: nn.Module, x: Tensor, y: Tensor, *, norm: float, count: int) -> Tensor:
    """Return the `count` classes with the nearest linearised boundaries, nearest first: int64 (N, count or fewer).

    They are ranked by margin over gradient norm (Melamed et al. 2024) among the likeliest others, at most 16.
    """
    chosen: list[Tensor] = []

    def differences(logits: Tensor) -> Tensor:
        chosen.append(_differences(logits, y, None, None, ROWS_AT_ONCE))
        return chosen[0]

    logits, gradients = logits_and_pull(model, x, differences)
    distances = _gaps(chosen[0], logits) / _lengths(gradients, norm)
    order = distances.topk(min(count, len(distances)), dim=0, largest=False).indices
    return chosen[0].argmax(2).gather(0, order).T


def _lengths(gradients: Tensor, norm: float) -> Tensor:
    """Return the dual norms of gradients (R, N, ...), (R, N)."""
    lengths: Tensor = torch.linalg.vector_norm(gradients.flatten(2), ord=dual(norm), dim=2)
    return lengths.clamp_min(1e-30)


def _gaps(weights: Tensor, logits: Tensor) -> Tensor:
    """Return how far the weighted sums (R, N) of logits are below zero, and 0 where they are not finite."""
    return (-(weights * logits).sum(2)).nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)


def _differences(
    logits: Tensor, y: Tensor, targets: Tensor | None, aims: Tensor | None, candidates: int | None
) -> Tensor:
    """Return the differences of logits that an attack may turn positive, as weights of shape (rivals, N, classes)."""
    against, classes = y, logits.shape[1]
    if targets is not None:
        against, towards = others(logits, targets).argmax(1), targets.unsqueeze(0)
    elif aims is not None:
        towards = aims.unsqueeze(0)
    else:
        count = classes - 1 if candidates is None else min(candidates, classes - 1)
        towards = others(logits, y).topk(count, dim=1).indices.T
    weights = torch.zeros(*towards.shape, classes, dtype=logits.dtype, device=logits.device)
    weights.scatter_(2, towards.unsqueeze(2), 1.0)
    return weights.scatter_(2, against.view(1, -1, 1).expand(len(towards), -1, 1), -1.0)


def pull_back(
    model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor, targets: Tensor | None = None, *, rounds: int
) -> Tensor:
    """Return points on the segments from x to adversarial x_adv, still adversarial, nearer to x, by bisection."""
    low, high = torch.zeros(len(x), dtype=x.dtype, device=x.device), torch.ones(len(x), dtype=x.dtype, device=x.device)
    best = x_adv
    for _ in range(rounds):
        middle = (low + high) / 2
        point = x + column(middle, x) * (x_adv - x)
        with torch.no_grad():
            won = is_past(model(point), y, targets)
        high, low = torch.where(won, middle, high), torch.where(won, low, middle)
        best = torch.where(column(won, x), point, best)
    return best
