"""Whether a graph is the model, and whether a certificate holds: asked of the model alone, on dense samples of the box.

Written without any of sparring's attacks or comparisons, whose faults it would share.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from sparring import bounds
from sparring.bounds._network import prepare
from sparring.bounds.certify import _certificates as certificates
from sparring.errors import UserError
from sparring.graph import Graph
from sparring.graph import _torch_export as export

__all__ = ["captured_once", "certificates_refuted", "differences", "sample"]

_TOLERANCE = 1e-4  # of the largest logit: float32 keeps 1e-6 of it in networks of ten layers, a bfloat16 step is 4e-3
_SHARE = 0.01  # of the inputs on which rounding may decide which side of a jump is taken
_IMAGES, _DIRECTIONS = 6, 192
_STEPS = 10


def sample(shape: tuple[int, ...], count: int = 400) -> Tensor:
    """Return the corners of the box [0, 1], its centre, and uniform points inside and on its faces."""
    size, draw = math.prod(shape), torch.Generator().manual_seed(2)
    corners = torch.tensor(list(itertools.product((0.0, 1.0), repeat=size)))
    inside = torch.rand(count, size, generator=draw)
    faces = (2 * torch.rand(count // 4, size, generator=draw) - 0.5).clamp(0, 1)
    return torch.cat([corners, torch.full((1, size), 0.5), inside, faces]).view(-1, *shape)


def differences(lowered: Graph, model: nn.Module, fresh: nn.Module, shape: tuple[int, ...]) -> list[str]:
    """Say in which views the graph is not the model; `fresh` is the model as it was before lowering."""
    found = list(_changed(model, fresh))
    model.eval()
    x = sample(shape)
    with torch.no_grad():
        expected = lowered(x.clone())
    if expected.dim() != 2 or not bool(expected.isfinite().any()):
        return [*found, f"the graph returns {tuple(expected.shape)}"]
    for view, inputs, rows in _views(x):
        try:
            logits = torch.cat([_asked(model, part, gradients="gradients" in view) for part in inputs])
        except Exception as error:  # a model that cannot be asked so has no graph
            found.append(f"{view}: the model raises {type(error).__name__}: {str(error).splitlines()[0]}")
            continue
        share = _differing(expected[rows], logits)
        if share > _SHARE:
            found.append(f"{view}: {share:.0%} of logits differ")
    with torch.no_grad():
        share = _differing(expected[:9], torch.cat([lowered(one) for one in x[:9].split(1)]))
    return [*found, f"the graph alone: {share:.0%} of logits differ"] if share > _SHARE else found


def _views(x: Tensor) -> Iterator[tuple[str, list[Tensor], Tensor]]:
    """Yield ways to ask: a name, the batches, and the rows of `x` that these are."""
    every = torch.arange(len(x))
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(3))
    some = order[:24]
    yield "batch", [x], every
    yield "batch again", [x], every
    yield "gradients", [x], every
    yield "another order", [x[order]], order
    yield "batches of 3", list(x[some].split(3)), some
    yield "alone", list(x[some].split(1)), some
    yield "alone with gradients", list(x[some[:6]].split(1)), some[:6]


def _asked(model: nn.Module, x: Tensor, *, gradients: bool) -> Tensor:
    with torch.set_grad_enabled(gradients):
        # A clone, since some models write into their images; one that is no leaf, since autograd forbids it there.
        logits = model(x.clone().requires_grad_(gradients).clone() if gradients else x.clone())
    if not isinstance(logits, Tensor) or logits.dim() != 2 or len(logits) != len(x):
        kind = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"{kind} is returned for {len(x)} images")
    return logits.detach()


def _differing(expected: Tensor, logits: Tensor) -> float:
    """Return the share of rows with a different logit."""
    if expected.shape != logits.shape:
        return 1.0
    expected, logits = expected.double(), logits.double()
    finite = logits[logits.isfinite()].abs()
    allowed = _TOLERANCE * max(1.0, float(finite.max()) if len(finite) else 0.0)
    same = ((expected - logits).abs() <= allowed) | (expected == logits) | (expected.isnan() & logits.isnan())
    return float((~same).any(1).double().mean())


def _changed(model: nn.Module, fresh: nn.Module) -> Iterator[str]:
    """Name what lowering changed in the model."""
    before, after = dict(fresh.state_dict()), dict(model.state_dict())
    if before.keys() != after.keys():
        yield "lowering changed the names of parameters"
        return
    for name, value in before.items():
        if not torch.equal(value, after[name]):
            yield f"lowering changed '{name}'"
    for (name, old), (_, new) in zip(fresh.named_modules(), model.named_modules(), strict=True):
        if old.training != new.training:
            yield f"lowering changed the mode of '{name}'"
    if [p.requires_grad for p in fresh.parameters()] != [p.requires_grad for p in model.parameters()]:
        yield "lowering changed which parameters want gradients"


@contextmanager
def captured_once() -> Iterator[None]:
    """Have torch.export capture a model once for all graphs of it, which takes most of the time, and bounds lower once.

    Everything else runs each time: the rules, and the comparison with the model.
    """
    capture, programs = export._capture, dict[int, tuple[nn.Module, Any]]()
    graphs = dict[int, tuple[nn.Module, Graph]]()

    def capture_once(model: nn.Module, example: Tensor) -> Any:
        if id(model) not in programs:
            programs[id(model)] = (model, capture(model, example))
        return programs[id(model)][1]

    def prepare_once(model: nn.Module, shape: tuple[int, ...], **options: Any) -> Graph:
        if id(model) not in graphs:
            graphs[id(model)] = (model, prepare(model, shape, **options))
        return graphs[id(model)][1]

    with mock.patch.object(export, "_capture", capture_once), mock.patch.object(certificates, "prepare", prepare_once):
        yield


def certificates_refuted(model: nn.Module, shape: tuple[int, ...]) -> tuple[list[str], int]:
    """Name certified radii inside which the model gives another label, and count the radii above zero."""
    pool = sample(shape)
    with torch.no_grad():
        logits = model(pool.clone()).double()
    x = pool[torch.randperm(len(pool), generator=torch.Generator().manual_seed(4))[:_IMAGES]]
    with torch.no_grad():
        y = model(x.clone()).argmax(1)
    found, count = [], 0
    for norm, method in itertools.product((math.inf, 2.0), ("interval", "crown")):
        try:
            radius = bounds.radius(model, x, y, norm, method=method)
        except UserError:  # no rule for an operation: then for no method and norm
            break
        count += int((radius > 0).sum())
        near = _nearest_other(model, x, y, radius, norm, pool, logits)
        for certified, fooled in zip(radius.tolist(), near.tolist(), strict=True):
            if fooled < certified * (1 - 1e-6):
                found.append(f"l_{norm:g} {method}: certified {certified:.4g}, fooled at {fooled:.4g}")
    return found, count


def _nearest_other(
    model: nn.Module, x: Tensor, y: Tensor, radius: Tensor, norm: float, pool: Tensor, logits: Tensor
) -> Tensor:
    """Return the distance of the nearest input with another label: in the pool, in the ball, by gradient steps."""
    points = [pool.expand(len(x), *pool.shape), _in_the_ball(x, radius, norm)]
    points.append(_by_gradients(model, x, y, radius, norm))
    found = [logits.expand(len(x), *logits.shape)]
    for batch in points[1:]:
        with torch.no_grad():
            found.append(model(batch.flatten(0, 1).clone()).double().view(*batch.shape[:2], -1))
    everything, answers = torch.cat(points, 1), torch.cat(found, 1)
    own = answers.gather(2, y.view(-1, 1, 1).expand(-1, answers.shape[1], 1))
    lead = answers.scatter(2, y.view(-1, 1, 1).expand(-1, answers.shape[1], 1), -math.inf).amax(2) - own.squeeze(2)
    away = torch.linalg.vector_norm((everything - x[:, None]).double().flatten(2), ord=norm, dim=2)
    rounding = 1e-5 * answers.abs().amax((1, 2), keepdim=True).squeeze(2)
    return away.masked_fill(~(lead > rounding), math.inf).amin(1)


def _in_the_ball(x: Tensor, radius: Tensor, norm: float) -> Tensor:
    """Return points of each certified ball that lie in the box: most of them on its surface, corners included."""
    draw, size = torch.Generator().manual_seed(5), x[0].numel()
    if norm == math.inf:
        corners = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=size)))
        ways = torch.cat([corners, 2 * torch.rand(_DIRECTIONS, size, generator=draw) - 1])
    else:
        ways = torch.randn(_DIRECTIONS + 64, size, generator=draw)
        ways = torch.cat([torch.eye(size), -torch.eye(size), ways / ways.norm(dim=1, keepdim=True)])
        ways[-32:] *= 0.7
    step = 0.9999 * radius.float().view(-1, 1, 1) * ways
    return (x.flatten(1)[:, None] + step).clamp(0, 1).view(len(x), len(ways), *x.shape[1:])


def _by_gradients(model: nn.Module, x: Tensor, y: Tensor, radius: Tensor, norm: float) -> Tensor:
    """Return what steps along the margin's gradient reach inside each certified ball."""
    size = 0.9999 * radius.float().view(-1, *[1] * (x.dim() - 1))
    point = x.clone()
    for _ in range(_STEPS):
        try:
            with torch.enable_grad():
                asked = point.clone().requires_grad_()
                answers = model(asked.clone())
                own = answers.gather(1, y[:, None]).squeeze(1)
                lead = answers.scatter(1, y[:, None], -math.inf).amax(1) - own
                (slope,) = torch.autograd.grad(lead.sum(), asked)
        except RuntimeError:  # no gradient: the samples have to do
            break
        if norm == math.inf:
            point = point + size / 3 * slope.sign()
            point = torch.minimum(torch.maximum(point, x - size), x + size).clamp(0, 1)
        else:
            unit = slope.flatten(1) / slope.flatten(1).norm(dim=1, keepdim=True).clamp_min(1e-12)
            away = point + size / 3 * unit.view_as(x) - x
            length = away.flatten(1).norm(dim=1).view_as(size).clamp_min(1e-12)
            point = (x + away * (size / length).clamp_max(1)).clamp(0, 1)
    return point[:, None]
