"""Turn image tensors into PNG data for the page: the gallery of attacked images and the first layer's weights."""

from __future__ import annotations

import base64
import io
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ...records import arrays
from ..analysis._records import Network, attack_label

Array = NDArray[Any]
SHOWN = 6
REMOVED, NEGATIVE, POSITIVE = (255, 255, 255), (213, 94, 0), (0, 114, 178)


@dataclass(frozen=True)
class Shot:
    """Hold one attacked image as data addresses: clean, perturbed, and their difference around mid-grey."""

    clean: str
    perturbed: str
    difference: str
    label: int
    correct: bool
    broken: bool
    distance: float


@dataclass(frozen=True)
class Gallery:
    """Hold the first images of one network under one attack; `amplified` is the factor on the differences."""

    network: Network
    shots: tuple[Shot, ...]
    amplified: float


def gallery(network: Network, attack: str, norm: str, eps: float | None) -> Gallery | None:
    """Return what an attack (by label) did to a network's first images, or None where no images were kept."""
    for record in network.stage("attack"):
        spec = record.attack
        if (attack_label(record), spec["norm"], spec["eps"]) != (attack, norm, eps):
            continue
        held = arrays(record, "clean", "perturbed", "label", "clean_correct", "success", "distance")
        if "clean" in held and "perturbed" in held:
            return _gallery(network, held)
    return None


def _gallery(network: Network, held: dict[str, Array]) -> Gallery:
    clean, perturbed = held["clean"][:SHOWN], held["perturbed"][:SHOWN]
    moved = perturbed.astype(float) - clean
    largest = float(np.abs(moved).max()) or 1.0
    shots = tuple(
        Shot(
            clean=data_uri(clean[k]),
            perturbed=data_uri(perturbed[k]),
            difference=data_uri(0.5 + 0.5 * moved[k] / largest),
            label=int(held["label"][k]),
            correct=bool(held["clean_correct"][k]),
            broken=bool(held["success"][k]),
            distance=float(held["distance"][k]),
        )
        for k in range(len(clean))
    )
    return Gallery(network, shots, 0.5 / largest)


def data_uri(image: Array) -> str:
    """Return an image (C, H, W) with 1 or 3 channels in [0, 1], or (H, W, 3) bytes, as a PNG data address."""
    if image.dtype != np.uint8:
        image = np.round(255 * np.clip(image, 0, 1)).astype(np.uint8)
        image = image[0] if len(image) == 1 else np.moveaxis(image[:3], 0, -1)
    target = io.BytesIO()
    Image.fromarray(image).save(target, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(target.getvalue()).decode()


def first_layer(network: Network, *, at_most: int = 60) -> str | None:
    """Return the first layer's weights as one picture, a tile a unit or filter, or None where they were not kept.

    Removed weights are white; blue is positive and orange negative, the deeper the larger within the picture.
    """
    for record in network.stage("measure"):
        held = arrays(record, "first_mask", "first_weight")
        if "first_mask" in held:
            return data_uri(_tiles(held["first_mask"], held.get("first_weight"), at_most))
    return None


def _tiles(mask: Array, weight: Array | None, at_most: int) -> Array:
    """Return the units' images on a grid of (rows · (height + 1), columns · (width + 1), 3) bytes."""
    kept = _images(mask)[:at_most] != 0
    signed = np.where(kept, -1.0, 0.0) if weight is None else _images(weight)[:at_most] * kept
    strength = np.abs(signed) / (float(np.quantile(np.abs(signed), 0.999)) or 1.0)
    strength = np.where(kept, np.clip(0.15 + 0.85 * np.sqrt(strength), 0, 1), 0.0)[..., None]
    ink = np.where(signed[..., None] > 0, POSITIVE, NEGATIVE) if weight is not None else np.zeros(3)
    pixels = np.round(strength * ink + (1 - strength) * np.array(REMOVED)).astype(np.uint8)
    count, height, width, _ = pixels.shape
    columns = min(count, max(1, round(math.sqrt(count * 2.4 * height / width))))
    sheet = np.full((math.ceil(count / columns) * (height + 1) + 1, columns * (width + 1) + 1, 3), 205, np.uint8)
    for k in range(count):
        top, left = (k // columns) * (height + 1) + 1, (k % columns) * (width + 1) + 1
        sheet[top : top + height, left : left + width] = pixels[k]
    return sheet


def _images(tensor: Array) -> Array:
    """Return a layer's weights as (units, height, width): filters summed over their inputs, rows folded to squares."""
    values = np.asarray(tensor, dtype=np.float64)
    if values.ndim == 4:
        return np.asarray(values.mean(axis=1))
    flat = values.reshape(len(values), -1)
    channels = 3 if flat.shape[1] % 3 == 0 and _is_square(flat.shape[1] // 3) else 1
    flat = flat.reshape(len(flat), channels, -1).mean(axis=1)
    side = math.isqrt(flat.shape[1])
    return np.asarray(flat.reshape(len(flat), side, side) if _is_square(flat.shape[1]) else flat[:, None, :])


def _is_square(number: int) -> bool:
    return math.isqrt(number) ** 2 == number
