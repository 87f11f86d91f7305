"""`sparring compare`: may the candidate ship?"""

from __future__ import annotations

import math
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from .. import attacks
from ..data import Dataset, as_float
from ..errors import UnknownNameError, UserError
from ..records import Folder
from ..report import Difference, Side, broken, compare, compare_values
from ..study import chosen_images
from ..threat import L2, LINF, Threat
from ._loading import open_data
from ._models import SAVED, check_named, open_model
from ._printing import print_json

DROPPED = 1
BUDGETED = ("fgsm", "pgd", "fast")
DISTANCE = "distance-nearest-l2"


def run_compare(
    sides: tuple[Side, Side],
    weights: tuple[Path, ...],
    max_drop: tuple[str, ...],
    data_name: str,
    eps: float,
    images: int,
    data_dir: Path | None,
    download: bool,
    *,
    as_json: bool,
) -> int:
    """Compare two studies' networks or two models; exit code 1 if a drop larger than allowed is not excluded."""
    allowed = dict(_drop(text) for text in max_drop)
    folders = [Folder(side.folder).plan.exists() for side in sides]
    if any(folders) and not all(folders):
        raise UserError("compare takes two studies' output folders or two models, not one of each")
    if all(folders):
        found = compare(*sides)
    else:
        models = _with_weights([str(side.folder) for side in sides], list(weights))
        Threat(LINF, eps)  # refuses a budget in other units
        known = {"accuracy", DISTANCE, *(f"{attack}-linf-{eps:g}" for attack in BUDGETED)}
        for metric in allowed.keys() - known:
            raise UnknownNameError("metric", metric, known)
        dataset = open_data(data_name, data_dir, download)
        found = compare_values(*(_profile(*model, dataset, eps, images) for model in models), lengths=(DISTANCE,))
    too_much = broken(found, allowed)
    if as_json:
        print_json({"differences": [asdict(one) for one in found], "broken": too_much})
    else:
        _print(found)
    for sentence in too_much:
        print(sentence, file=sys.stderr)
    return DROPPED if too_much else 0


def _with_weights(names: list[str], weights: list[Path]) -> list[tuple[str, Path | None]]:
    """Give each model that is no file its weights, in order; raise UserError where they are too few or too many."""
    bare = [name for name in names if not name.endswith(SAVED)]
    if weights and len(weights) != len(bare):
        raise UserError(
            f"--weights is given {len(weights)} times for {len(bare)} models without weights; once for each, in order"
        )
    left = iter(weights)
    models = [(name, next(left, None) if name in bare else None) for name in names]
    for name, file in models:
        check_named(name, file)
    return models


def _drop(text: str) -> tuple[str, float]:
    metric, _, amount = text.partition("=")
    try:
        if not math.isfinite(float(amount)):
            raise ValueError
        return metric, float(amount)
    except ValueError:
        raise UserError(
            f"--max-drop takes a metric and a number, as in --max-drop accuracy 0.5; not '{text}'"
        ) from None


def _profile(
    name: str, weights: Path | None, dataset: Dataset, eps: float, images: int
) -> dict[str, NDArray[np.float64]]:
    """Return per-image values of a model: right or wrong, standing under attack or not, smallest distance."""
    model, _ = open_model(name, weights, dataset)
    x, y = chosen_images(dataset, "test", 0, images)
    found: dict[str, NDArray[np.float64]] = {}
    for attack, threat in (*((name, Threat(LINF, eps)) for name in BUDGETED), ("nearest", Threat(L2))):
        generator = torch.Generator().manual_seed(0)
        result = attacks.run(model, as_float(x), y, attacks.ATTACKS[attack], threat, generator=generator)
        found["accuracy"] = result.clean_correct.numpy().astype(np.float64)
        if threat.eps is None:
            distance = result.distance.numpy().astype(np.float64)
            # An attack that failed on an image says nothing of its distance; the image's width bounds it.
            found[DISTANCE] = np.where(np.isfinite(distance), distance, np.sqrt(x[0].numel()))
        else:
            found[f"{attack}-linf-{eps:g}"] = (result.clean_correct & ~result.success).numpy().astype(np.float64)
    return found


def _print(found: list[Difference]) -> None:
    table = Table(box=None, header_style="bold")
    for heading in ("metric", "first", "second", "change", "95% interval", "p"):
        table.add_column(heading, justify="left" if heading == "metric" else "right")
    for one in found:
        change = one.change
        table.add_row(
            one.metric,
            f"{one.first.estimate:.4g}",
            f"{one.second.estimate:.4g}",
            f"{change.estimate:+.3g} {one.unit}",
            f"[{change.low:+.3g}, {change.high:+.3g}]",
            f"{change.p:.3g}",
        )
    Console(width=None if sys.stdout.isatty() else 140).print(table)
