"""The stage of a linear study: one loss on one group of classes, theory next to attacks along its paths."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ... import attacks, bounds
from ...data import Split, as_float
from ...errors import UserError
from ...threat import L2, LINF, Threat
from ..plans._tables import LinearPaths
from ..runner._executors import Task, TaskOutcome
from ._inputs import Linear
from ._networks import Context

Point = dict[str, Any]
EXACT = 1e-9  # relative tolerance of the theorem's identities in float64
# A linear boundary has no curvature, so that few guided steps are enough.
DISTANCE_ATTACKS: dict[str, attacks.Attack] = {
    "deepfool": attacks.deepfool,
    "nearest": functools.partial(attacks.nearest, steps=10, starts=0, polish=5),
}
NEAR = 1e-6  # relative tolerance for float64 logits of images within a rounding error of the boundary


@dataclass(frozen=True)
class _Images:
    """Images in [0, 1] of one group of classes, with labels from 0."""

    x: Tensor
    y: Tensor


def classify_group(context: Context, task: Task[Linear]) -> TaskOutcome:
    """Train a loss's penalty paths on some of the classes, prune the best by validation accuracy, evaluate all.

    Every classifier is an entry of the series "points". A flag is raised if an identity of the theorem does not hold or
    an attack falls below the closed form. The metrics are those of the dense classifier that was pruned.
    """
    paths, data = task.inputs.paths, context.dataset
    classes = paths.classes or ()
    train = _group(data.train, classes, paths.train_images)
    valid, test = (_group(split, classes, paths.images) for split in (data.valid, data.test))
    strength, classifiers = _trained(train, valid, paths)
    points: list[Point] = []
    flags: list[dict[str, str]] = []
    for one in classifiers:
        point = {"path": one.path, "step": one.step, **_judge(one.model, test, valid, paths.eps)}
        flags += [
            {"name": "theory-mismatch", "detail": f"{text} ({one.path}, {one.step:g})"} for text in mismatches(point)
        ]
        points.append(point)
    dense = next(point for point in points if (point["path"], point["step"]) == ("l2", strength))
    metrics = {"strength": strength, **{name: dense[name] for name in ("accuracy", "accuracy_valid", "sparsity")}}
    return TaskOutcome(metrics, {"points": points}, flags)


@dataclass(frozen=True)
class _Classifier:
    """A model and its place: a step is an inverse penalty strength, or the sparsity pruned to."""

    path: str
    step: float
    model: nn.Sequential


def _group(split: Split, classes: Sequence[int], most: int) -> _Images:
    """Return the first images of some classes, in a fixed random order of the split, numbered from 0."""
    chosen = torch.isin(split.y, torch.tensor(classes)).nonzero().flatten()
    chosen = chosen[torch.randperm(len(chosen), generator=torch.Generator().manual_seed(0))[:most]]
    y = torch.searchsorted(torch.tensor(classes), split.y[chosen])
    if torch.unique(y).tolist() != list(range(len(classes))):
        raise UserError(
            f"some of the classes {list(classes)} have no images in a split; use more images or other classes"
        )
    return _Images(as_float(split.x[chosen]), y)


def _trained(train: _Images, valid: _Images, paths: LinearPaths) -> tuple[float, list[_Classifier]]:
    """Return the strength of the l2 penalty chosen by validation accuracy, and every classifier of every path."""
    loss, tolerance = paths.loss, paths.tolerance
    grids = {"l2": list(paths.l2), "l1": list(paths.l1)}
    found = [
        _Classifier(penalty, strength, model)
        for penalty, grid in grids.items()
        for strength, model in zip(
            grid,
            bounds.linear_path(train.x, train.y, grid, loss=loss, penalty=penalty, tolerance=tolerance),
            strict=True,
        )
    ]
    # The first of equally accurate ones: the strongest penalty, in the plan's order.
    dense = max((one for one in found if one.path == "l2"), key=lambda one: _accuracy(one.model, valid))
    pruned = bounds.linear_pruned(
        train.x,
        train.y,
        paths.magnitude,
        dense=dense.model,
        loss=loss,
        strength=dense.step,
        tolerance=tolerance,
    )
    found += [_Classifier("magnitude", *pair) for pair in zip(paths.magnitude, pruned, strict=True)]
    return dense.step, found


def _accuracy(model: nn.Module, images: _Images) -> float:
    with torch.no_grad():
        return float((model(images.x).argmax(1) == images.y).double().mean())


def _judge(model: nn.Module, test: _Images, valid: _Images, eps: Sequence[float]) -> Point:
    """Return all results for one classifier, exact and by attack; budgets are keyed by their text."""
    linear = bounds.weights_of(model, tuple(test.x.shape[1:]))
    boxed, unboxed = [(LINF, True), (L2, True)], [(LINF, False), (L2, False)]
    exact = bounds.linear_distances(linear, test.x, test.y, boxed + unboxed)
    return {
        "sparsity": float((linear.weight == 0).double().mean()),
        "accuracy": _accuracy(model, test),
        "accuracy_valid": _accuracy(model, valid),
        **_summary("boxed", exact[:2], eps),
        **_summary("unboxed", exact[2:], eps),
        # A point of a path is chosen on validation images, for which these are sufficient.
        "valid": _summary("boxed", bounds.linear_distances(linear, valid.x, valid.y, boxed), eps),
        **_attacked(model, linear, test, eps, exact[1]),
        "theorem": _theorem(linear, test, eps) if len(linear.weight) == 2 else None,
        "images": len(test.x),
    }


def _summary(name: str, distances: list[Tensor], eps: Sequence[float]) -> Point:
    """Return r_inf at every budget and r_2 from exact distances (N,), first in linf, then in l2."""
    shares = {f"{e:g}": float((distances[0] > e).double().mean()) for e in eps}
    return {f"r_inf_{name}": shares, f"r_2_{name}": _mean(distances[1])}


def _mean(distance: Tensor) -> float:
    """Return the mean of the finite distances: a constant classifier has no boundary, and attacks may fail."""
    finite = distance[distance.isfinite()]
    return float(finite.double().mean()) if len(finite) else 0.0


def _attacked(
    model: nn.Module, linear: bounds.LinearMap, images: _Images, eps: Sequence[float], exact: Tensor
) -> Point:
    """Return accuracy under FGSM, and for DeepFool and `nearest` the mean distance and how far below the exact one.

    An attack is compared with the exact distance if it also fools the classifier multiplied out in float64: in float32
    an image close to the boundary may count as misclassified because of a rounding error of the logits.
    """
    found: Point = {"fgsm": {}}
    for budget in eps:
        found["fgsm"][f"{budget:g}"] = attacks.robust_accuracy(_run(model, images, attacks.fgsm, Threat(LINF, budget)))
    for name, attack in DISTANCE_ATTACKS.items():
        result = _run(model, images, attack, Threat(L2))
        found[f"r_2_{name}"] = _mean(result.distance)
        found[f"failed_{name}"] = float(result.distance.isinf().double().mean())
        fooled = (exact > 0) & bounds.linear_fooled(linear, result.x_adv, images.y)
        moved = (result.x_adv.double() - images.x.double()).flatten(1).norm(dim=1)
        found[f"below_{name}"] = float((1 - moved[fooled] / exact[fooled]).clamp_min(0).amax()) if fooled.any() else 0.0
    return found


def _run(model: nn.Module, images: _Images, attack: attacks.Attack, threat: Threat) -> attacks.AttackResult:
    generator = torch.Generator().manual_seed(0)
    return attacks.run(model, images.x, images.y, attack, threat, generator=generator)


def _theorem(linear: bounds.LinearMap, images: _Images, eps: Sequence[float]) -> Point:
    found = bounds.theorem(linear, images.x, images.y, eps[0])
    markov = {f"{e:g}": found.markov * eps[0] / e for e in eps}
    names = ("l1", "l2", "nonzero", "numerator", "by_means", "balanced", "r_2")
    return {**{name: getattr(found, name) for name in names}, "markov": markov}


def mismatches(point: Point) -> list[str]:
    """Return the theorem's statements that a point violates; empty if there are none."""
    if point["sparsity"] == 1:
        return []  # a constant classifier cannot be attacked, and its logits may tie
    found = []
    for name in DISTANCE_ATTACKS:
        if point[f"below_{name}"] > NEAR:
            found.append(
                f"{name} found a distance below the exact boxed distance, by {point[f'below_{name}']:.2g} of it"
            )
    spare = 1.5 / point["images"]  # one image may be on the boundary of its ball, in float32
    for budget, robust in point["fgsm"].items():
        exact = point["r_inf_boxed"][budget]
        if robust < exact - spare or (point["theorem"] is not None and robust > exact + spare):
            found.append(f"accuracy under FGSM at {budget} is {robust:.4f}, but its boxed closed form {exact:.4f}")
    return found + (_broken_identities(point) if point["theorem"] is not None else [])


def _broken_identities(point: Point) -> list[str]:
    stated, found = point["theorem"], []
    numerator, l1, l2 = stated["numerator"], stated["l1"], stated["l2"]
    if not math.isclose(numerator, stated["by_means"], rel_tol=EXACT, abs_tol=EXACT):
        found.append("the numerator differs from its form by class means")
    if not math.isclose(numerator, stated["r_2"] * l2, rel_tol=EXACT, abs_tol=EXACT):
        found.append("r_2 · ‖w‖₂ differs from the numerator")
    if any(point["r_inf_unboxed"][e] > bound * (1 + EXACT) for e, bound in stated["markov"].items()):
        found.append("r_inf exceeds Markov's bound")
    if l1 > l2 * math.sqrt(stated["nonzero"]) * (1 + EXACT):
        found.append("‖w‖₁ / ‖w‖₂ exceeds the root of the nonzero count")
    return found
