"""`sparring compare`: two studies' networks, or two models, side by side."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from .. import attacks
from ..data import Dataset
from ..devices import Place
from ..errors import UnknownNameError, UserError
from ..records import Folder
from ..report import Difference, Side, broken, compare, compare_values
from ..study import chosen_images
from ..threat import L2, LINF, Threat
from ..units import parse_eps
from ._app import CompareOptions, DataSource, ModelSource, Where
from ._printing import print_json, print_table
from ._progress import shown_images
from ._sources import SAVED, check_named, float_images, open_data, open_model, place_for, request_for, say_few

DROPPED = 1
BUDGETED = ("fgsm", "pgd", "fast")
DISTANCE = "distance-nearest-l2"


def run_compare(how: CompareOptions, data: DataSource, where: Where, *, as_json: bool) -> int:
    """Compare two studies' networks or two models; exit code 1 if a drop larger than allowed is not excluded."""
    eps, allowed = parse_eps(how.eps), dict(_drop(text) for text in how.max_drop or ())
    folders = [Folder(Path(name)).plan.exists() for name in (how.first, how.second)]
    if any(folders) and not all(folders):
        raise UserError("compare takes two study folders or two models, not one of each")
    if not any(folders) and (how.methods or how.sparsities):
        raise UserError("--methods and --sparsities choose networks of studies; models have none to choose from")
    found = compare(*_sides(how)) if all(folders) else _compare_models(how, eps, allowed, data, where)
    too_much = broken(found, allowed)
    if as_json:
        print_json({"differences": [asdict(one) for one in found], "broken": too_much})
    else:
        print_table(("metric", "first", "second", "change [95%]", "p"), (one.cells() for one in found))
    for sentence in too_much:
        print(sentence, file=sys.stderr)
    return DROPPED if too_much else 0


def _drop(text: str) -> tuple[str, float]:
    metric, _, amount = text.partition("=")
    try:
        if not math.isfinite(float(amount)):
            raise ValueError
        return metric, float(amount)
    except ValueError:
        raise UserError(
            f"--max-drop takes a metric and a number, such as --max-drop accuracy 0.5, not '{text}'"
        ) from None


def _sides(how: CompareOptions) -> tuple[Side, Side]:
    (one, other), (low, high) = how.methods or (None, None), how.sparsities or (None, None)
    return Side(Path(how.first), one, low), Side(Path(how.second), other, high)


def _compare_models(
    how: CompareOptions, eps: float, metrics: Iterable[str], data: DataSource, where: Where
) -> list[Difference]:
    models = _with_weights([how.first, how.second], how.weights or [])
    Threat(LINF, eps)  # raises for a budget in other units
    known = {"accuracy", DISTANCE, *(f"{attack}-linf-{eps:g}" for attack in BUDGETED)}
    for metric in set(metrics) - known:
        raise UnknownNameError("metric", metric, known)
    dataset = open_data(data, request_for(models, data, images=how.images))
    profiles = [_profile(model, dataset, eps, how.images, place_for(where, model)) for model in models]
    say_few(dataset, how.images)
    return compare_values(*profiles, lengths=(DISTANCE,))


def _with_weights(names: list[str], weights: list[Path]) -> list[ModelSource]:
    """Assign weights to the models that are not files, in order; raise UserError for too few or too many."""
    bare = [name for name in names if not name.endswith(SAVED)]
    if weights and len(weights) != len(bare):
        raise UserError(
            f"--weights is given {len(weights)} times for {len(bare)} models without weights; "
            "give it once for each of them, in order"
        )
    left = iter(weights)
    models = [ModelSource(name, next(left, None) if name in bare else None) for name in names]
    for model in models:
        check_named(model)
    return models


def _profile(
    source: ModelSource, dataset: Dataset, eps: float, images: int, place: Place
) -> dict[str, NDArray[np.float64]]:
    """Return per-image values of a model: correct or not, robust under attack or not, smallest distance."""
    model = open_model(source, dataset)[0].eval()
    x, y = chosen_images(dataset, "test", 0, images)
    task = place.task(model, float_images(x, results=len(BUDGETED) + 1), y)
    chosen, generator = {name: attacks.ATTACKS[name] for name in BUDGETED}, torch.Generator().manual_seed(0)
    with shown_images() as tell:
        rows = attacks.audit(*task, chosen, eps=[eps], checks=0, progress=tell)[: len(chosen)]
        shown = attacks.with_title("nearest", tell)
        nearest = attacks.run(*task, attacks.nearest, Threat(L2), generator=generator, progress=shown).cpu()
    results = {row.attack: row.result.cpu() for row in rows}
    stands = {f"{name}-linf-{eps:g}": found.clean_correct & ~found.success for name, found in results.items()}
    found = {name: values.double().numpy() for name, values in {"accuracy": nearest.clean_correct, **stands}.items()}
    # An attack that failed on an image gives no distance; the largest distance in the box bounds it.
    distance = nearest.distance.double().nan_to_num(posinf=math.sqrt(x[0].numel()))
    return found | {DISTANCE: distance.numpy()}
