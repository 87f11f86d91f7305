"""sparring's minimum-norm attack: guided descents of the radius from several starts, then steps onto the boundary.

Why the combination beats its parts: steps on a smooth margin take every class into account and find the right linear
region, which projections alone (DeepFool, FAB) do not. Starts elsewhere find the boundaries of other classes, which no
number of steps from x does. Projections land exactly on the boundary, which steps only approach.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ...draws import Source
from ...threat import L0, L1, L2, LINF, diameter, distance, dual, project, random_point
from .._entry import opening
from .._gradients import logits_and_gradient
from ._losses import Objective, is_past, margin_loss, others, smooth_margin
from ._projections import Nearest, boundary_step, column, corner_step, hold, inside, keep_within, select, shrink
from ._sigma_zero import exchange_, sigma_zero

# Clean margins span this many units of temperature, so that scaling the logits changes nothing.
_SHARPNESS = 10.0
# A point counts as adversarial if it is past the boundary by this share of the clean margin: far above rounding, and
# about 0.005% of a distance.
_CLEARANCE = 5e-5
# Further starts: how many aim at a class, how far away they are relative to the known distance, their steps.
_AIMED, _AWAY, _START_STEPS = 4, 2.5, 23
# Planes that the last steps keep, and how many such steps in a row an image may take without coming nearer.
_PLANES, _PATIENCE = 5, 5


@dataclass
class _Images:
    """State of the images still searched: one entry per image in every tensor.

    clean: the margin that they began with; radius: intended distance of the point from x, 0 if unknown;
    begun: the step since which an adversarial point is known.
    """

    row: Tensor
    x: Tensor
    y: Tensor
    targets: Tensor | None
    clean: Tensor
    point: Tensor
    radius: Tensor
    begun: Tensor

    def look(self, model: nn.Module, objective: Objective) -> tuple[Tensor, Tensor, Tensor]:
        """Return the objective's gradient at the points, their margins, and which of them are adversarial."""
        logits, gradient = logits_and_gradient(model, self.point, objective, self.y, self.targets)
        gap = margin_loss(logits, self.y, self.targets)
        return gradient, gap, gap > _CLEARANCE * self.clean

    def tempered(self) -> Objective:
        """Return the smooth margin at a temperature that follows the clean one."""
        sharpness = (_SHARPNESS / self.clean).unsqueeze(1)
        return lambda logits, y, targets: smooth_margin(logits * sharpness, y, targets)


@opening
def nearest(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    norm: float = L2,
    eps: float | None = None,
    targets: Tensor | None = None,
    generator: Source = None,
    steps: int = 60,
    starts: int = 5,
    polish: int = 16,
) -> Tensor:
    """Find the smallest perturbation by `steps` guided steps, further `starts`, and `polish` steps onto the boundary.

    The steps follow DDN (Rony et al. 2019, algorithm 1) with a radius that starts at the linearised distance, a
    logsumexp margin in place of the cross-entropy, pixels held where the box is active, and annealed rates. Further
    starts lie 2.5 times as far away as the nearest point known, in directions drawn once and for all; the first four
    aim at one of the likeliest classes each, and each takes 23 steps. The last steps go from x onto the boundary
    linearised at the nearest point, inside the box, as in FAB (Croce & Hein 2020) without its memory; in l2 onto the
    corner of the last five such planes, since the nearest point often lies where several linear regions meet. In l0,
    5·steps steps of sigma-zero are followed by 2·polish exchanges of values (`exchange_`), and by polish exchanges each
    towards starts − 1 classes: about 400 passes. norm: l2, linf, l1 or l0. Images for which nothing was found, or
    nothing within a given eps, come back unchanged; with eps an image leaves as soon as it succeeds within it. At most
    200 passes an image but for l0, without further starts (starts=0) 79.
    The generator is not used.
    """
    with torch.no_grad():
        logits = model(x)
    clean = -margin_loss(logits, y, targets)
    found = Nearest(x.clone(), torch.where(clean < 0, 0.0, torch.inf).to(x.dtype))
    aims = others(logits, y).topk(min(_AIMED, logits.shape[1] - 1), dim=1).indices
    rows, unknown = torch.arange(len(x), device=x.device), torch.zeros_like(clean)
    images = _Images(rows, x, y, targets, clean.clamp_min(1e-12), x, unknown, unknown)
    if norm == L0:
        _exchange(model, images, aims[:, : max(0, starts - 1)], found, eps, 5 * steps, polish)
        return keep_within(x, found.point, norm, eps)
    _descend(model, shrink(images, clean >= 0), found, norm, eps, steps, change=0.2)
    for start in range(starts):
        aim = aims[:, start] if targets is None and start < aims.shape[1] else targets
        radius = (_AWAY * found.distance).clamp_max(diameter(x, norm) / 2)
        # One fixed direction for all images, so that no distance depends on the batch that an image is in.
        away = random_point(x[:1], norm, 1.0, torch.Generator().manual_seed(start))
        point = (x + column(radius, x) * away).clamp(0, 1)
        left, elsewhere = _left(found, eps), Nearest.of(x)
        there = shrink(replace(images, targets=aim, point=point, radius=radius), left)
        _descend(model, there, elsewhere, norm, eps, _START_STEPS, change=0.4)
        found.update_(slice(None), elsewhere.point, elsewhere.distance, torch.isfinite(elsewhere.distance))
    _step_onto_boundary(model, images, found, norm, eps, polish)
    return keep_within(x, found.point, norm, eps)


def _exchange(
    model: nn.Module, images: _Images, aims: Tensor, found: Nearest, eps: float | None, steps: int, polish: int
) -> None:
    """Find the fewest values by steps of sigma-zero and exchanges, which then aim at one class after another."""
    turns = [None, *aims.T] if images.targets is None else [None]
    for turn, aim in enumerate(turns):
        rows = _left(found, eps).nonzero().squeeze(1)
        x, y, targets = images.x[rows], images.y[rows], select(images.targets, rows)
        if len(rows) == 0:
            return
        if turn == 0:
            point = sigma_zero(model, x, y, targets=targets, steps=steps)
            with torch.no_grad():
                won = is_past(model(point), y, targets)
            found.update_(rows, point, distance(point - x, L0), won)
        here = Nearest(found.point[rows], found.distance[rows])
        exchange_(model, x, y, targets, here, polish if turn else 2 * polish, aims=select(aim, rows))
        found.update_(rows, here.point, here.distance, torch.isfinite(here.distance))


def _left(found: Nearest, eps: float | None) -> Tensor:
    """Return the unfinished images: those that can move and have no example within eps."""
    return found.distance > (0.0 if eps is None else eps)


def _descend(
    model: nn.Module, images: _Images, found: Nearest, norm: float, eps: float | None, steps: int, *, change: float
) -> None:
    """Walk around the boundary on a sphere and record the nearest adversarial points in `found`.

    The sphere grows until such a point is known, then shrinks or grows by `change`, ever less. The intended
    radius counts, not what clipping leaves of it: if the box stops most pixels, the sphere would never grow.
    """
    objective = images.tempered()
    for step in range(steps):
        if eps is not None:
            still = (found.distance[images.row] > eps).nonzero().squeeze(1)
            if len(still) < len(images.row):
                images = shrink(images, still)
                objective = images.tempered()
        if len(images.row) == 0:
            return
        gradient, _, won = images.look(model, objective)
        delta = images.point - images.x
        moved = distance(delta, norm)
        found.update_(images.row, images.point, moved, won)
        gradient = hold(gradient, images.point)
        nearest_yet = found.distance[images.row]
        known = torch.isfinite(nearest_yet)
        images.begun = torch.where(known, images.begun, float(step))
        done = ((step - images.begun) / (steps - 1 - images.begun).clamp_min(1)).clamp_max(1)
        if step == 0:
            # The linearised distance, a little enlarged.
            slope = torch.linalg.vector_norm(gradient.flatten(1), ord=dual(norm), dim=1)
            radius = torch.where(images.radius > 0, images.radius, 1.2 * _SHARPNESS / slope.clamp_min(1e-12))
        else:
            less = change * 0.05**done
            shrunk = torch.minimum(moved, nearest_yet) * (1 - less)
            grown = images.radius * (1 + torch.where(known, less, 0.3))
            radius = torch.minimum(torch.where(won, shrunk, grown), nearest_yet * 0.998)
        # A dead gradient must not send an image to infinity.
        images.radius = radius.clamp_max(diameter(images.x, norm))
        rate = 2.0 * 0.025**done
        delta = delta + column(rate * images.radius, delta) * _direction(gradient, norm)
        images.point = _onto_sphere(images.x, delta, norm, images.radius)
    with torch.no_grad():
        gap = margin_loss(model(images.point), images.y, images.targets)
    moved = distance(images.point - images.x, norm)
    found.update_(images.row, images.point, moved, gap > _CLEARANCE * images.clean)


@dataclass
class _Planes:
    """Images with the boundary linearised at their latest points, newest first: (N, planes, ...) and (N, planes).

    idle: number of steps in a row that brought an image no nearer.
    """

    images: _Images
    gradients: Tensor
    gains: Tensor
    idle: Tensor


def _step_onto_boundary(
    model: nn.Module, images: _Images, found: Nearest, norm: float, eps: float | None, rounds: int
) -> None:
    """Step from x onto the boundary linearised at the latest points, as long as that brings an image nearer."""
    images = shrink(replace(images, point=found.point), _left(found, eps) & torch.isfinite(found.distance))
    idle = torch.zeros_like(images.row)
    last = _Planes(images, images.x.unsqueeze(1)[:, :0], images.clean.unsqueeze(1)[:, :0], idle)
    kept = _PLANES if norm == L2 else 1
    for _ in range(rounds + 1):
        if len(last.idle) == 0:
            return
        images = last.images
        gradient, gap, won = images.look(model, margin_loss)
        delta = images.point - images.x
        improved = found.update_(images.row, images.point, distance(delta, norm), won)
        last.idle = torch.where(improved, 0, last.idle + 1)
        gain = _CLEARANCE * 2 * images.clean - gap + (delta * gradient).flatten(1).sum(1)
        last.gradients = torch.cat([gradient.unsqueeze(1), last.gradients], dim=1)[:, :kept]
        last.gains = torch.cat([gain.unsqueeze(1), last.gains], dim=1)[:, :kept]
        last = shrink(last, last.idle <= _PATIENCE)
        if norm == L2:
            step = corner_step(last.images.x, last.images.point, last.gradients, last.gains)
        else:
            step = boundary_step(last.images.x, last.gradients[:, 0], last.gains[:, 0], norm)
        last.images.point = (last.images.x + step).clamp(0, 1)


def _direction(gradient: Tensor, norm: float) -> Tensor:
    """Return the gradient at unit length in the norm; for linf its sign, for l1 six times it, as the ball cuts most."""
    if norm == LINF:
        return gradient.sign()
    length = 1.0 if norm == L2 else 6.0
    return gradient * column(length / distance(gradient, norm).clamp_min(1e-30), gradient)


def _onto_sphere(x: Tensor, delta: Tensor, norm: float, radius: Tensor) -> Tensor:
    """Return points in the box about `radius` away; for linf and l1 in the ball, which has their shape.

    The l2 length that clipping removes is given back once, to the pixels that are free.
    """
    if norm == L1:
        return inside(x, x + delta, L1, radius)
    if norm == LINF:
        return (x + project(delta, norm, radius)).clamp(0, 1)
    delta = delta * column(radius / distance(delta, L2).clamp_min(1e-30), delta)
    point = (x + delta).clamp_(0, 1)
    reached = distance(point - x, L2)
    short = reached < 0.9 * radius
    if x.device.type != "cpu":  # where asking which they are would mean waiting for the device
        return torch.where(column(short, x), _lengthened(x, point, delta, reached, radius), point)
    rows = short.nonzero().squeeze(1)
    if len(rows):
        point[rows] = _lengthened(x[rows], point[rows], delta[rows], reached[rows], radius[rows])
    return point


def _lengthened(x: Tensor, point: Tensor, delta: Tensor, reached: Tensor, radius: Tensor) -> Tensor:
    """Return points whose free pixels move further, so that the whole perturbation is about `radius` long."""
    length = distance(delta * (point.sign() * (1 - point).sign()), L2)
    wanted = (radius.square() - reached.square() + length.square()).clamp_min(0).sqrt()
    return (x + delta * column((wanted / length.clamp_min(1e-30)).clamp(1, 10), delta)).clamp_(0, 1)
