"""`sparring certify`: what can be proved of one model, beside what attacks achieve on the same images."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from .. import attacks, bounds
from ..data import as_float
from ..errors import UserError
from ..study.networks import chosen_images
from ..threat import Threat, parse_norm
from .loading import open_data
from .model_commands import open_model, plain

__all__ = ["run_certify"]


def run_certify(
    name: str,
    weights: Path | None,
    data_name: str,
    norm_name: str,
    method: str,
    eps_text: str,
    images: int,
    data_dir: Path | None,
    download: bool,
    *,
    as_json: bool,
) -> int:
    """Print certified accuracy, certified radii, and the distances at which `nearest` succeeds."""
    norm = parse_norm(norm_name)
    try:
        budgets = [float(part) for part in eps_text.split(",") if part.strip()]
    except ValueError:
        raise UserError(f"--eps takes numbers separated by commas, as 0.01,0.03; not '{eps_text}'") from None
    dataset = open_data(data_name, data_dir, download)
    model = plain(open_model(name, weights, dataset)[0])
    x, y = chosen_images(dataset, "test", 0, images)
    radius = bounds.radius(model, as_float(x), y, norm, method=method)
    attacked = attacks.run(
        model, as_float(x), y, attacks.nearest, Threat(norm), generator=torch.Generator().manual_seed(0)
    )
    right = attacked.clean_correct
    gap = (attacked.distance[right].double() / radius[right].clamp_min(1e-12)).median() if bool(right.any()) else None
    summary = {
        "model": name,
        "data": dataset.name,
        "images": len(y),
        "norm": norm_name,
        "method": method,
        "accuracy": float(right.double().mean()),
        "certified_accuracy": {f"{eps:g}": float((radius >= eps).double().mean()) for eps in budgets},
        "attacked_accuracy": {
            f"{eps:g}": float((right & (attacked.distance > eps)).double().mean()) for eps in budgets
        },
        "radius_median": float(radius[right].median()) if bool(right.any()) else None,
        "distance_median": float(attacked.distance[right].median()) if bool(right.any()) else None,
        "distance_over_radius_median": None if gap is None else float(gap),
    }
    if as_json:
        print(json.dumps(summary, indent=1))
        return 0
    print(f"{name} on {len(y)} images of {dataset.name}: accuracy {summary['accuracy']:.1%}")
    print(f"{norm_name} eps   certified   standing under nearest")
    for eps in budgets:
        certified = float((radius >= eps).double().mean())
        standing = float((right & (attacked.distance > eps)).double().mean())
        print(f"{eps:8g}   {certified:8.1%}   {standing:8.1%}")
    if gap is not None:
        print(
            f"median certified radius {summary['radius_median']:.4g}, median distance of the attack "
            f"{summary['distance_median']:.4g}: {float(gap):.2f} times as far"
        )
    return 0
