"""Turn image tensors into PNG data for the page: the gallery of attacked images and the first layer's weights."""

from __future__ import annotations

import base64
import io
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..records import arrays
from . import _numbers as numbers
from ._summary import chosen
from .analysis._findings import Findings
from .analysis._metrics import NORMS, pretty, pretty_eps
from .analysis._records import Network, attack_label

Array = NDArray[Any]
SHOWN = 6
REMOVED, NEGATIVE, POSITIVE = (255, 255, 255), (213, 94, 0), (0, 114, 178)


Shot = dict[str, str]  # the addresses of "clean", "perturbed" and "difference", and "label" and "outcome" in words


def galleries(findings: Findings) -> list[tuple[str, list[tuple[str, list[Shot]]]]]:
    """Return what each main attack did to the first images of the networks shown: headings, captions and images."""
    attacks = dict.fromkeys((m.label, m.norm, m.eps) for m in findings.main if m.role in ("budget", "distance"))
    found = []
    for attack, norm, eps in attacks:
        shown = [(n, held) for n in _shown_pair(findings) if (held := _kept(n, attack, norm, eps)) is not None]
        at = f" ε = {pretty_eps(eps)}" if eps else ""
        if shown:
            name = NORMS.get(norm, norm)
            found.append((f"{pretty(attack)}, {name}{at}", [_gallery(findings, n, held, name) for n, held in shown]))
    return found


def first_layers(findings: Findings) -> list[tuple[str, str]]:
    """Return captions and pictures of the first layers of the networks shown, where they were kept."""
    sheets = ((f"First layer: {_who(n)}", first_layer(n)) for n in _shown_pair(findings))
    return [(text, sheet) for text, sheet in sheets if sheet is not None]


def _shown_pair(findings: Findings) -> list[Network]:
    """Return the dense control and one sparse network of the same seed."""
    sparsity = chosen(findings)
    sparse = findings.study.of(findings.method or "", sparsity)[:1] if sparsity is not None else []
    dense = [n for n in findings.study.of(findings.study.control()) if not sparse or n.seed == sparse[0].seed][:1]
    return dense + sparse


def _who(network: Network) -> str:
    if (network.kind, network.checkpoint) == ("control", "final"):
        return f"dense control, seed {network.seed}"
    return f"{network.method} at {numbers.percent(network.sparsity)}, seed {network.seed}"


def _kept(network: Network, attack: str, norm: str, eps: float | None) -> dict[str, Array] | None:
    """Return the tensors of an attack (by label) on a network that kept its first images, or None."""
    for record in network.stage("attack"):
        if (attack_label(record), record.attack["norm"], record.attack["eps"]) == (attack, norm, eps):
            held = arrays(record, "clean", "perturbed", "label", "clean_correct", "success", "distance")
            if "clean" in held and "perturbed" in held:
                return held
    return None


def _gallery(findings: Findings, network: Network, held: dict[str, Array], norm: str) -> tuple[str, list[Shot]]:
    """Return a caption and the first images: clean, perturbed, and their difference around mid-grey."""
    clean, perturbed = held["clean"][:SHOWN], held["perturbed"][:SHOWN]
    moved = perturbed.astype(float) - clean
    largest = float(np.abs(moved).max()) or 1.0
    names = dict(enumerate(findings.study.classes))
    shots = []
    for k in range(len(clean)):
        label, outcome = int(held["label"][k]), "wrong already"
        if held["clean_correct"][k]:
            far = f"fooled, {norm} {numbers.length(float(held['distance'][k]), 2)}"
            outcome = far if held["success"][k] else "withstood"
        images = {"clean": clean[k], "perturbed": perturbed[k], "difference": 0.5 + 0.5 * moved[k] / largest}
        told = {"label": names.get(label, str(label)), "outcome": outcome}
        shots.append({name: data_uri(image) for name, image in images.items()} | told)
    return f"{_who(network)}; differences × {0.5 / largest:.2g} around grey", shots


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
