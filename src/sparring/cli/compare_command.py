"""`sparring compare`: may the candidate ship?"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from .. import attacks
from ..data import Dataset, as_float
from ..errors import UserError
from ..report import Comparison, Drop, compare, compare_models, failures
from ..report.comparing import Floats
from ..study.networks import chosen_images
from ..threat import L2, LINF, Threat
from .loading import open_data
from .model_commands import open_model

__all__ = ["run_compare"]

DROPPED = 1


def run_compare(
    first: str,
    second: str,
    max_drop: tuple[str, ...],
    data_name: str,
    eps: float,
    images: int,
    data_dir: Path | None,
    download: bool,
    *,
    as_json: bool,
) -> int:
    """Compare two studies or two models; exit code 1 if a drop larger than allowed is not excluded."""
    drops = [_drop(text) for text in max_drop]
    folders = [Path(name, "plan.json").exists() for name in (first, second)]
    if any(folders) and not all(folders):
        raise UserError("compare takes two studies' output folders or two models, not one of each")
    if all(folders):
        rows = compare(first, second)
    else:
        dataset = open_data(data_name, data_dir, download)
        rows = compare_models(*(_profile(name, dataset, eps, images) for name in (first, second)))
    broken = failures(rows, drops)
    if as_json:
        print(json.dumps({"rows": [row.as_dict() for row in rows], "failures": broken}, indent=1))
    else:
        _print(rows)
    for sentence in broken:
        print(sentence, file=sys.stderr)
    return DROPPED if broken else 0


def _drop(text: str) -> Drop:
    metric, _, amount = text.partition("=")
    try:
        return Drop(metric, float(amount))
    except ValueError:
        raise UserError(
            f"--max-drop takes a metric and a number, as in --max-drop accuracy 0.5; not '{text}'"
        ) from None


def _profile(name: str, dataset: Dataset, eps: float, images: int) -> dict[str, Floats]:
    """Return per-image values of a model: right or wrong, standing under attack or not, smallest distance."""
    model, _ = open_model(name, None, dataset)
    x, y = chosen_images(dataset, "test", 0, images)
    found: dict[str, Floats] = {}
    for attack, threat in (
        ("fgsm", Threat(LINF, eps)),
        ("pgd", Threat(LINF, eps)),
        ("fast", Threat(LINF, eps)),
        ("nearest", Threat(L2)),
    ):
        generator = torch.Generator().manual_seed(0)
        result = attacks.run(model, as_float(x), y, attacks.ATTACKS[attack], threat, generator=generator)
        found["accuracy"] = result.clean_correct.numpy().astype(np.float64)
        if threat.eps is None:
            distance = result.distance.numpy().astype(np.float64)
            # An attack that failed on an image says nothing of its distance; the image's width bounds it.
            found[f"distance-{attack}-l2"] = np.where(np.isfinite(distance), distance, np.sqrt(x[0].numel()))
        else:
            found[f"{attack}-linf-{eps:g}"] = (result.clean_correct & ~result.success).numpy().astype(np.float64)
    return found


def _print(rows: list[Comparison]) -> None:
    table = Table(box=None, header_style="bold")
    for heading in ("metric", "cell", "first", "second", "difference", "95% interval", "p"):
        table.add_column(heading, justify="left" if heading in ("metric", "cell") else "right")
    for row in rows:
        e = row.effect
        table.add_row(
            row.metric,
            row.cell,
            f"{row.first:.4g}",
            f"{row.second:.4g}",
            f"{e.estimate:+.3g} {row.unit}",
            f"[{e.low:+.3g}, {e.high:+.3g}]",
            f"{e.p:.3g}",
        )
    Console(width=None if sys.stdout.isatty() else 140).print(table)
