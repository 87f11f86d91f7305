"""`sparring certify`: what can be proved of one model, beside what attacks achieve on the same images."""

from __future__ import annotations

from pathlib import Path

import torch

from .. import attacks, bounds
from ..data import as_float
from ..errors import UnknownNameError, UserError
from ..proofs import refuse_refuted
from ..study import chosen_images
from ..threat import L1, Threat
from ..units import norm_name, percent
from ._loading import open_data
from ._models import check_named, open_model, plain
from ._printing import print_json


def run_certify(
    name: str,
    weights: Path | None,
    data_name: str,
    norm: float,
    budgets: tuple[float, ...],
    method: str,
    images: int,
    data_dir: Path | None,
    download: bool,
    *,
    as_json: bool,
) -> int:
    """Print certified accuracy, certified radii, and the distances at which `nearest` succeeds."""
    if method not in bounds.BOUNDS:
        raise UnknownNameError("method", method, bounds.BOUNDS)
    if norm == L1:
        raise UserError("certificates are for linf and l2, not for l1")
    for eps in budgets:
        Threat(norm, eps)  # refuses a budget in other units
    check_named(name, weights)
    dataset = open_data(data_name, data_dir, download)
    model = plain(open_model(name, weights, dataset)[0])
    x, y = chosen_images(dataset, "test", 0, images)
    radius = bounds.radius(model, as_float(x), y, norm, method=method)
    attacked = attacks.run(
        model, as_float(x), y, attacks.nearest, Threat(norm), generator=torch.Generator().manual_seed(0)
    )
    refuse_refuted(radius, attacked.distance, norm=norm_name(norm))
    right = attacked.clean_correct
    certified = {eps: float((right & (radius >= eps)).double().mean()) for eps in budgets}
    standing = {eps: float((right & (attacked.distance > eps)).double().mean()) for eps in budgets}
    gap = (attacked.distance[right].double() / radius[right].clamp_min(1e-12)).median() if bool(right.any()) else None
    summary = {
        "model": name,
        "data": dataset.name,
        "images": len(y),
        "norm": norm_name(norm),
        "method": method,
        "accuracy": float(right.double().mean()),
        "certified_accuracy": {f"{eps:g}": share for eps, share in certified.items()},
        "attacked_accuracy": {f"{eps:g}": share for eps, share in standing.items()},
        "radius_median": float(radius[right].median()) if bool(right.any()) else None,
        "distance_median": float(attacked.distance[right].median()) if bool(right.any()) else None,
        "distance_over_radius_median": None if gap is None else float(gap),
    }
    if as_json:
        print_json(summary)
        return 0
    print(f"{name} on {len(y)} images of {dataset.name}: accuracy {percent(float(right.double().mean()))}")
    print(f"{norm_name(norm)} eps   certified   standing under nearest")
    for eps in budgets:
        print(f"{eps:8g}   {percent(certified[eps]):>8}   {percent(standing[eps]):>8}")
    if gap is not None:
        print(
            f"median certified radius {summary['radius_median']:.4g}, median distance of the attack "
            f"{summary['distance_median']:.4g}: {float(gap):.2f} times as far"
        )
    return 0
