"""Find the width at which a network has a wanted number of weights: the controls of equal size."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ...errors import PlanError
from ...models import build

# Below this many units in a layer a small dense network is no fair control (design.md, section 6, trap 7).
NARROWEST = 8
WIDEST = 64.0


def narrowed(model: dict[str, Any], shape: tuple[int, ...], classes: int, sparsity: float) -> dict[str, Any] | None:
    """Return the options of a narrower model with as many weights as this one keeps at a sparsity, or None below 8."""
    wanted = round((1 - sparsity) * _weights(model, shape, classes)[0])
    width = _search(model, shape, classes, wanted, 1e-3, 1.0)
    found = _scaled(model, width)
    return found if _weights(found, shape, classes)[1] >= NARROWEST else None


def widened(model: dict[str, Any], shape: tuple[int, ...], classes: int, sparsity: float) -> dict[str, Any]:
    """Return the options of a wider model that keeps, at a sparsity, as many weights as this one has in all."""
    wanted = round(_weights(model, shape, classes)[0] / (1 - sparsity))
    return _scaled(model, _search(model, shape, classes, wanted, 1.0, WIDEST))


def _search(model: dict[str, Any], shape: tuple[int, ...], classes: int, wanted: int, low: float, high: float) -> float:
    """Return the width, between low and high, whose number of weights is nearest to what is wanted."""

    def count(width: float) -> int:
        return _weights(_scaled(model, width), shape, classes)[0]

    if ":" in model["name"] or model["name"] == "linear":
        raise PlanError(f"model '{model['name']}' has no width, so it has no control of equal size; drop that control")
    for _ in range(40):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if count(middle) < wanted else (low, middle)
    nearer = low if abs(count(low) - wanted) < abs(count(high) - wanted) else high
    return round(nearer, 6)


def _scaled(model: dict[str, Any], width: float) -> dict[str, Any]:
    if model["name"] == "mlp":
        return {**model, "widths": [max(1, round(w * width)) for w in model.get("widths", (300, 100))]}
    return {**model, "width": model.get("width", 1.0) * width}


def _weights(model: dict[str, Any], shape: tuple[int, ...], classes: int) -> tuple[int, int]:
    """Count a model's weights and its narrowest hidden layer, without allocating them."""
    options: dict[str, Any] = {k: tuple(v) if k == "widths" else v for k, v in model.items() if k != "name"}
    ones = (1.0,) * shape[0]
    with torch.device("meta"):
        built = build(model["name"], shape=shape, classes=classes, mean=ones, std=ones, **options)
    layers = [m.weight for m in built.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    return sum(w.numel() for w in layers), min((w.shape[0] for w in layers[:-1]), default=0)
