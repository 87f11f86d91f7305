"""Stages that evaluate artefacts: size, latency, and whether they are as robust as their networks."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from ... import bounds, deploy
from ...data import as_float
from ...errors import Unsupported
from ...outputs import opened
from ...proofs import refuse_refuted
from ...threat import parse_norm
from ..runner._executors import Task, TaskOutcome
from ._inputs import Adversary, Deploy, Ship
from ._networks import Context, chosen_images, chosen_places, judged

# Predictions that are timed: at most, at least, and no more after so many seconds.
_ROUNDS, _FEWEST, _SECONDS = 200, 10, 2.0
LOGIT_TOLERANCE = 1e-4


def pack(context: Context, task: Task[Deploy]) -> TaskOutcome:
    """Export a network as users ship it and compare the artefact with it: bytes, logits, predictions, time."""
    inputs = task.inputs
    model = judged(context, task).cpu()
    x = as_float(context.dataset.test.x[: inputs.images])
    with tempfile.TemporaryDirectory() as folder:
        try:
            path = deploy.export(model, Path(folder) / "packed.sparring", shape=tuple(x.shape[1:]), images=x[:8])
        except Unsupported as reason:
            return _without(reason)
        packed, bytes_packed = deploy.load(path), path.stat().st_size
    with torch.no_grad():
        expected = opened(model, x)(x)
    found = packed(x)
    error = float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-12))
    return TaskOutcome(
        {
            "bytes_packed": bytes_packed,
            "agreement": float((found.argmax(1) == expected.argmax(1)).double().mean()),
            "logits_agree": float(error <= LOGIT_TOLERANCE),
        },
        times={"latency": _latency(packed, x[:1]), "latency_torch": _latency(model, x[:1])},
    )


@torch.no_grad()
def _latency(answer: Callable[[Tensor], Tensor], x: Tensor) -> float:
    """Return the median seconds of one prediction."""
    times: list[float] = []
    for number in range(_ROUNDS):
        if number >= _FEWEST and sum(times) > _SECONDS:
            break
        began = time.perf_counter()
        answer(x)
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def ship(context: Context, task: Task[Ship]) -> TaskOutcome:
    """Attack and certify a network and its artefact, whose weights and activations are rounded as asked."""
    inputs = task.inputs
    model = judged(context, task).cpu()
    x, y = chosen_images(context.dataset, "test", 0, inputs.images)
    images = as_float(x)
    shape, seen = tuple(images.shape[1:]), None
    if inputs.activations == "int8":
        seen = as_float(chosen_images(context.dataset, "valid", 0, deploy.CALIBRATING)[0])
    try:
        packed = deploy.pack(model, shape=shape, images=images, values=inputs.values, calibrate=seen, dense=True)
    except Unsupported as reason:
        return _without(reason)
    found = deploy.ship_report(
        model, packed, images, y, inputs.attack.attack, inputs.attack.threat, decisions=inputs.decisions
    )
    metrics: dict[str, float | None] = {n: share for n, share in vars(found).items() if not isinstance(share, Tensor)}
    tensors = {"stands_model": found.stands_model, "stands_packed": found.stands_packed, "label": y}
    tensors["images"] = chosen_places(context.dataset, "test", 0, inputs.images)
    flags = []
    for proof in inputs.certify:
        norm, method = proof.norm, proof.method
        few = images[: proof.images], y[: proof.images]
        for name, network in (("model", model), ("packed", deploy.Equivalent(packed.program))):
            try:
                radius = bounds.radius(network, *few, parse_norm(norm), method=method)
            except Unsupported as reason:
                flags.append({"name": "no-certificate", "detail": str(reason)})
                break
            _refuse_refuted(radius, tensors[f"stands_{name}"], norm, inputs.attack)
            tensors[f"radius_{name}_{norm}_{method}"] = radius
            metrics[f"radius_{name}_{norm}_{method}"] = float(radius.mean())
    return TaskOutcome(metrics, flags=flags, tensors=tensors)


def _refuse_refuted(radius: Tensor, stands: Tensor, norm: str, attack: Adversary) -> None:
    """Compare certificates with the attack, if that has the same norm and a budget; see `refuse_refuted`."""
    if attack.norm == norm and attack.eps is not None:
        reached = torch.where(stands[: len(radius)], torch.inf, attack.eps)
        refuse_refuted(radius, reached, norm=norm)


def _without(reason: Unsupported) -> TaskOutcome:
    return TaskOutcome(flags=[{"name": "no-packed-form", "detail": str(reason)}])
