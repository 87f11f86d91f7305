"""`sparring certify`: what can be proved of one model, beside what attacks achieve on the same images."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import torch

from .. import attacks, bounds
from ..data import as_float
from ..errors import UnknownNameError, UserError
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
    generator = torch.Generator().manual_seed(0)
    attacked = attacks.run(model, as_float(x), y, attacks.nearest, Threat(norm), generator=generator)
    found = bounds.summary(model, as_float(x), y, norm, attacked, eps=budgets, method=method)
    if as_json:
        about = {"model": name, "data": dataset.name, "images": len(y), "norm": norm_name(norm), "method": method}
        values = {key: value for key, value in asdict(found).items() if key != "radius"}
        by_eps = ("certified_accuracy", "attacked_accuracy")
        print_json(about | values | {key: {f"{eps:g}": share for eps, share in values[key].items()} for key in by_eps})
        return 0
    print(f"{name} on {len(y)} images of {dataset.name}: accuracy {percent(found.accuracy)}")
    print(f"{norm_name(norm)} eps   certified   standing under nearest")
    for eps in budgets:
        print(f"{eps:8g}   {percent(found.certified_accuracy[eps]):>8}   {percent(found.attacked_accuracy[eps]):>8}")
    if found.distance_over_radius_median is not None:
        print(
            f"median certified radius {found.radius_median:.4g}, median distance of the attack "
            f"{found.distance_median:.4g}: {found.distance_over_radius_median:.2f} times as far"
        )
    return 0
