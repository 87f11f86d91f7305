"""Stages that prove: certificates, Lipschitz constants, exact distances; on the CPU in float64."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ... import attacks, bounds
from ...data import as_float
from ...errors import Unsupported
from ...outputs import opened
from ...threat import Threat, parse_norm
from ..runner._executors import Task, TaskOutcome
from ._inputs import Certify, Exact, Judged, Lipschitz
from ._networks import Context, chosen_images, chosen_places, judged


def certify(context: Context, task: Task[Certify]) -> TaskOutcome:
    """Compute certified radii of some images; a network without a sound rule has none, and says why."""
    asked = task.inputs.asked
    model, x, y, places = _given(context, task, asked.images)
    try:
        radius = bounds.radius(model, x, y, parse_norm(asked.norm), method=asked.method)
    except Unsupported as reason:
        return _without("no-certificate", reason)
    metrics: dict[str, float | None] = {
        "radius_mean": float(radius.mean()),
        "radius_median": float(radius.median()),
        **{f"certified_accuracy_{eps:g}": float((radius >= eps).double().mean()) for eps in asked.eps},
    }
    return TaskOutcome(metrics, tensors={"radius": radius, "label": y, "images": places})


def constants(context: Context, task: Task[Lipschitz]) -> TaskOutcome:
    """Take the margin (numerator) and a local Lipschitz constant (denominator) of each correctly classified image.

    Over classes k the pair with the smallest margin / constant counts, which bounds the distance from below.
    """
    asked = task.inputs.asked
    model, x, y, places = _given(context, task, asked.images)
    with torch.no_grad():
        logits = opened(model, x)(x).double()
    right = logits.argmax(1) == y
    try:
        constant = bounds.lipschitz(model, x, asked.radius, norm=parse_norm(asked.norm), method=asked.method)
    except Unsupported as reason:
        return _without("no-lipschitz-constant", reason)
    margin, chosen = _tightest(logits, constant)
    ratio = margin / chosen.clamp_min(1e-30)
    metrics: dict[str, float | None] = {"margin": None, "lipschitz": None, "margin_over_lipschitz": None}
    if bool(right.any()):
        metrics = {
            "margin": float(margin[right].median()),
            "lipschitz": float(chosen[right].median()),
            "margin_over_lipschitz": float(ratio[right].median()),
        }
    tensors = {"margin": margin, "lipschitz": chosen, "ratio": ratio, "clean_correct": right, "label": y}
    return TaskOutcome(metrics, tensors=tensors | {"images": places})


def _tightest(logits: Tensor, constant: Tensor) -> tuple[Tensor, Tensor]:
    """Return margin and constant, (N,) each, of the class whose margin / constant is smallest for each image."""
    label = logits.argmax(1)
    others = torch.ones_like(logits, dtype=torch.bool).scatter_(1, label[:, None], False)
    margins = (logits.gather(1, label[:, None]) - logits)[others].view(len(logits), -1)
    index = (margins / constant.clamp_min(1e-30)).argmin(1, keepdim=True)
    return margins.gather(1, index)[:, 0], constant.gather(1, index)[:, 0]


def distances(context: Context, task: Task[Exact]) -> TaskOutcome:
    """Find exact distances of a few images within a time limit each, starting from the best attack."""
    asked = task.inputs.asked
    norm, (model, x, y, places) = parse_norm(asked.norm), _given(context, task, asked.images)
    generator = torch.Generator().manual_seed(asked.images)
    attacked = attacks.run(model, x, y, attacks.nearest, Threat(norm), generator=generator, batch_size=100)
    try:
        found = bounds.exact(model, x, y, norm, x_adv=attacked.x_adv, seconds=asked.seconds)
    except Unsupported as reason:
        return _without("no-exact-distance", reason)
    solved = torch.tensor([status != "time limit" for status in found.status])
    tensors = {
        "lower": found.lower,
        "upper": found.upper,
        "solved": solved,
        "attack": attacked.distance,
        "clean_correct": attacked.clean_correct,
        "label": y,
        "images": places,
    }
    metrics: dict[str, float | None] = {"solved": float(solved.double().mean())}
    return TaskOutcome(metrics, tensors=tensors, times={"search": float(found.seconds.sum())})


def _given(context: Context, task: Task[Judged], images: int) -> tuple[nn.Module, Tensor, Tensor, Tensor]:
    """Return the network on the CPU, and its first images with their labels and places."""
    x, y = chosen_images(context.dataset, "test", 0, images)
    return judged(context, task).cpu(), as_float(x), y, chosen_places(context.dataset, "test", 0, images)


def _without(name: str, reason: Unsupported) -> TaskOutcome:
    return TaskOutcome(flags=[{"name": name, "detail": str(reason)}])
