"""Stages that prove: certificates, Lipschitz constants, exact distances; on the CPU in float64."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ... import attacks, bounds
from ...data import as_float
from ...errors import Unsupported
from ...outputs import opened
from ...threat import Threat, parse_norm
from ..runner._executors import Task, TaskOutcome
from ._inputs import Certify, Exact, Judged, Lipschitz, Verify
from ._networks import Context, chosen_images, chosen_places, judged


def certify(context: Context, task: Task[Certify]) -> TaskOutcome:
    """Compute certified radii of some images; a network without a sound rule has none, with a reason."""
    asked = task.inputs.asked
    model, x, y, places = _given(context, task, asked.images)
    try:
        radius = bounds.radius(model, x, y, parse_norm(asked.norm), method=asked.method, progress=context.tell)
    except Unsupported as reason:
        return _without("no-certificate", reason)
    metrics: dict[str, float | None] = {
        "radius_mean": float(radius.mean()),
        "radius_median": float(radius.median()),
        **{f"certified_accuracy_{eps:g}": float((radius >= eps).double().mean()) for eps in asked.eps},
    }
    return TaskOutcome(metrics, tensors={"radius": radius, "label": y, "images": places})


def constants(context: Context, task: Task[Lipschitz]) -> TaskOutcome:
    """Compute the margin (numerator) and a local Lipschitz constant (denominator) of each correctly classified image.

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
    """Find exact distances of a few images within a budget each, starting from the best attack."""
    asked = task.inputs.asked
    norm, (model, x, y, places) = parse_norm(asked.norm), _given(context, task, asked.images)
    generator = torch.Generator().manual_seed(asked.images)
    attacked = attacks.run(model, x, y, attacks.nearest, Threat(norm), generator=generator, batch_size=100)
    try:
        nodes = math.inf if asked.nodes is None else asked.nodes
        found = bounds.exact(model, x, y, norm, x_adv=attacked.x_adv, seconds=asked.seconds, nodes=nodes)
    except Unsupported as reason:
        return _without("no-exact-distance", reason)
    solved = torch.tensor([status in ("exact", "wrong") for status in found.status])
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
    flags = _limits([status.removesuffix(" limit") for status in found.status], asked.seconds)
    return TaskOutcome(metrics, flags=flags, tensors=tensors, times={"search": float(found.seconds.sum())})


def verdicts(context: Context, task: Task[Verify]) -> TaskOutcome:
    """Verify for each image that its label is the same in the whole ball: by intervals, by α-CROWN, by a search."""
    asked = task.inputs.asked
    model, x, y, places = _given(context, task, asked.images)
    threat = Threat(parse_norm(asked.norm), asked.eps)
    with torch.no_grad():
        right = opened(model, x)(x).argmax(1) == y
    by, falsified, nodes = torch.zeros(len(y), dtype=torch.int8), ~right, torch.zeros(len(y), dtype=torch.int32)
    try:
        stable = bounds.stable(model, x, threat)
        for number, method in enumerate(("interval", "alpha-crown"), 1):
            left = (right & (by == 0)).nonzero().squeeze(1)
            by[left[bounds.margin(model, x[left], y[left], threat, method=method).amin(1) > 0]] = number
        left = (right & (by == 0)).nonzero().squeeze(1)
        found = bounds.verify(model, x[left], y[left], threat.norm, asked.eps, nodes=asked.nodes, seconds=asked.seconds)
    except Unsupported as reason:
        return _without("not-verified", reason)
    for i, one in zip(left.tolist(), found, strict=True):
        by[i], falsified[i] = 3 * (one.status == "verified"), one.status == "falsified"
        nodes[i] = one.nodes
    shares = {"verified": by > 0, "falsified": falsified, "undecided": (by == 0) & ~falsified, "stable": stable}
    return TaskOutcome(
        {name: float(share.double().mean()) for name, share in shares.items()},
        flags=_limits([one.limit for one in found], asked.seconds),
        tensors={"verified_by": by, "falsified": falsified, "stable": stable, "nodes": nodes}
        | {"clean_correct": right, "label": y, "images": places},
        times={"search": sum(one.seconds for one in found)},
    )


def _limits(ended: Sequence[str], seconds: float) -> list[dict[str, str]]:
    """Return flags for searches that time or memory ended, not their number of nodes."""
    why = {
        "time": f"the cap of {seconds:g} seconds; results depend on the machine",
        "memory": "2 GB of open sub-problems",
    }
    counts = {"time": ended.count("time") + ended.count("seconds"), "memory": ended.count("memory")}
    return [
        {"name": f"{name}-limit", "detail": f"{count} of {len(ended)} searches ended at {why[name]}"}
        for name, count in counts.items()
        if count
    ]


def _given(context: Context, task: Task[Judged], images: int) -> tuple[nn.Module, Tensor, Tensor, Tensor]:
    """Return the network on the CPU, and its first images with their labels and positions."""
    x, y = chosen_images(context.dataset, "test", 0, images)
    return judged(context, task).cpu(), as_float(x), y, chosen_places(context.dataset, "test", 0, images)


def _without(name: str, reason: Unsupported) -> TaskOutcome:
    return TaskOutcome(flags=[{"name": name, "detail": str(reason)}])
