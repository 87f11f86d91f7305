"""`sparring attack` and `certify`: attack a model, or prove its robustness."""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import attacks, bounds
from ..errors import UnknownNameError, UserError
from ..metrics import distances, pixel_distances, robust_accuracy
from ..outputs import opened
from ..statistics import binomial_interval
from ..study import chosen_images, configured
from ..threat import L0, L2, LINF, Threat
from ..units import duration, norm_name, parse_budgets, parse_norm, percent
from ..waiting import Stopwatch
from ._app import AttackOptions, CertifyOptions, DataSource, ModelSource, Where
from ._printing import print_json, print_table
from ._progress import shown_images
from ._sources import check_seconds, float_images, open_both, place_for

_LONG, _SHORT, _FEWEST = 200, 79, 10  # passes of `nearest`, those without further starts, and the fewest steps


def run_attack(model: ModelSource, data: DataSource, how: AttackOptions, where: Where, *, as_json: bool) -> None:
    """Audit a model; print a row for each attack and budget, with flags from checks on `how.checks` images."""
    norm, budgets = _threats(how.norm, how.eps)
    names = list(dict.fromkeys(part.strip() for part in how.attacks.split(",") if part.strip()))
    if not names:
        raise UserError(f"--attacks takes names separated by commas, such as fgsm,pgd; '{how.attacks}' has none")
    chosen, place = configured(names, how.options or ()), place_for(where, model)
    for name in names:
        attacks.refuse_norm(name, norm)
    network, dataset = open_both(model, data, images=how.images)
    x, y = chosen_images(dataset, "test", 0, how.images)
    images = float_images(x, results=len(chosen) * max(1, len(budgets)))
    with shown_images() as progress:
        found = attacks.audit(
            *place.task(network, images, y), chosen, norm=norm, eps=budgets, checks=how.checks,
            batch_size=how.batch_size, seed=how.seed, progress=progress,
        )  # fmt: skip
    rows = [_row(one, images) for one in found]
    if as_json:
        about = {"model": model.model, "data": dataset.name, "images": len(y), **place.facts(network)}
        print_json({**about, "results": rows})
    else:
        _print_rows(rows)


def _threats(norm_text: str, eps: str) -> tuple[float, tuple[float, ...]]:
    """Parse the norm and the budgets; raise UserError also for a budget in other units."""
    norm, budgets = parse_norm(norm_text), parse_budgets(eps)
    for budget in budgets:
        Threat(norm, budget)
    return norm, budgets


def _row(audited: attacks.AuditRow, x: Tensor) -> dict[str, Any]:
    threat, result = audited.threat, audited.result.cpu()
    right = result.clean_correct & ~result.success
    found = distances(result.distance, result.clean_correct)
    low, high = binomial_interval(int(right.sum()), len(right))
    minimum = threat.eps is None
    pixels = distances(pixel_distances(result.x_adv, x, result.distance), result.clean_correct).mean
    return {
        "attack": audited.attack,
        "norm": norm_name(threat.norm),
        "eps": threat.eps,
        "accuracy": float(result.clean_correct.double().mean()),
        "robust_accuracy": None if minimum else robust_accuracy(result.clean_correct, result.success),
        "interval": None if minimum else [low, high],
        "mean_distance": found.mean if minimum else None,
        "median_distance_correct": found.median_correct if minimum else None,
        "mean_pixels": pixels if threat == (L0, None) else None,
        "failed": found.failed if minimum else None,
        "forwards": result.forwards,
        "backwards": result.backwards,
        "seconds": result.seconds,
        "batch_size": result.batch_size,
        "flags": [{"name": flag.name, "detail": flag.detail} for flag in result.flags],
    }


def _print_rows(rows: Sequence[dict[str, Any]]) -> None:
    headings = ("attack", "norm", "eps", "accuracy", "robust accuracy", "mean distance", "median", "seconds")
    console = print_table(headings, map(_shown, rows), left=2, width=120)
    for row in rows:
        for flag in row["flags"]:
            console.print(f"flag: {row['attack']}: {flag['name']}: {flag['detail']}", markup=False)


def _shown(row: dict[str, Any]) -> list[str]:
    robust = "–" if row["robust_accuracy"] is None else percent(row["robust_accuracy"])
    if row["interval"] is not None:
        robust += " [{}, {}]".format(*map(percent, row["interval"]))
    eps = "–" if row["eps"] is None else f"{row['eps']:g}"
    lengths = (row["mean_distance"], row["median_distance_correct"])
    shown = ("–" if length is None else f"{length:.4f}" for length in lengths)
    return [row["attack"], row["norm"], eps, percent(row["accuracy"]), robust, *shown, f"{row['seconds']:.1f}"]


def run_certify(model: ModelSource, data: DataSource, how: CertifyOptions, where: Where, *, as_json: bool) -> None:
    """Print certified accuracy, certified radii, and the distances at which `nearest` succeeds.

    Proofs are made on the CPU; the attack runs where `where` says.
    """
    watch, (norm, budgets) = Stopwatch(), _provable(how)
    place = place_for(where, model)
    network, dataset = open_both(model, data, plain=True, images=how.images)
    x, y = chosen_images(dataset, "test", 0, how.images)
    task = place.task(network, images := float_images(x, results=1), y)
    chosen = _chosen(how, network, images, norm, watch)
    with shown_images() as tell:
        nearest = attacks.with_title("nearest", tell)
        attacked = attacks.run(*task, chosen.attack, Threat(norm), seconds=chosen.rest, progress=nearest)
        shown = functools.partial(tell, f"certify by {chosen.method}, about {duration(chosen.seconds)} in all")
        shown(0, len(y))
        certify = functools.partial(bounds.summary, eps=budgets, method=chosen.method, progress=shown)
        found = certify(network, images, y, norm, attacked.cpu())
    _say_flags(attacked.flags)
    about = {"model": model.model, "data": dataset.name, "images": len(y), "norm": norm_name(norm)}
    if as_json:
        print_json({**about, **place.facts(task[0]), "method": chosen.method, **_as_json(found)})
    else:
        print("{model} on {images} images of {data}: accuracy".format(**about), percent(found.accuracy))
        _print_summary(found, norm_name(norm))


def _say_flags(flags: Sequence[attacks.Flag]) -> None:
    for flag in flags:
        print(f"flag: nearest: {flag.name}: {flag.detail}", file=sys.stderr)


def _provable(how: CertifyOptions) -> tuple[float, tuple[float, ...]]:
    """Parse the norm and the budgets; raise UserError if nothing can be proved for them."""
    norm, budgets = _threats(how.norm, how.eps)
    if how.method is not None and how.method not in bounds.BOUNDS:
        raise UnknownNameError("method", how.method, bounds.BOUNDS)
    if norm not in (LINF, L2):
        raise UserError(f"certificates support linf and l2, not {norm_name(norm)}")
    check_seconds(how.seconds)
    return norm, budgets


@dataclass(frozen=True)
class _Chosen:
    """A method, its estimated time, the attack beside it, and the seconds that are left for finite differences."""

    method: str
    seconds: float
    attack: attacks.Attack
    rest: float


def _chosen(how: CertifyOptions, network: nn.Module, images: Tensor, norm: float, watch: Stopwatch) -> _Chosen:
    """Choose a method, and the steps of the attack, for what is left of --seconds; print the estimates."""
    opened_after = watch.seconds()
    with shown_images("steps", name := "estimating") as tell:
        each = bounds.estimate(network, images, norm, progress=functools.partial(tell, name))
    pass_ = _pass_seconds(network, images)
    left = how.seconds - 2 * watch.seconds() + opened_after  # the network is opened once more
    method = how.method or bounds.tightest(each, len(images), left - pass_ * _SHORT)
    seconds = len(images) * each[method]
    passes = int((left - seconds) / pass_)
    if how.method is not None:
        return _Chosen(method, seconds, attacks.nearest, math.inf)
    costs = ", ".join(f"{name} {duration(len(images) * cost)}" for name, cost in each.items())
    print(f"estimated for {len(images)} images: {costs}; --seconds {how.seconds:g} selects {method}", file=sys.stderr)
    if passes >= _LONG:
        return _Chosen(method, seconds, attacks.nearest, (passes - _LONG) * pass_)
    steps = max(_FEWEST, min(passes, _SHORT) - _SHORT + 60)
    print(
        f"the attack takes {steps} steps without further starts, to end in time: --seconds changes this",
        file=sys.stderr,
    )
    return _Chosen(method, seconds, functools.partial(attacks.nearest, steps=steps, starts=0), 0)


def _pass_seconds(network: nn.Module, images: Tensor) -> float:
    """Return the seconds of one forward and backward pass of all images, measured on at most eight."""
    x = images[:8].clone().requires_grad_()
    watch = Stopwatch()
    logits = opened(network, x)(x)
    if logits.requires_grad:
        torch.autograd.grad(logits.sum(), x, allow_unused=True)
    return watch.seconds() * len(images) / len(x)


def _as_json(found: bounds.Summary) -> dict[str, Any]:
    values = {name: value for name, value in asdict(found).items() if name != "radius"}
    for name in ("certified_accuracy", "attacked_accuracy"):
        values[name] = {f"{eps:g}": share for eps, share in values[name].items()}
    return values


def _print_summary(found: bounds.Summary, norm: str) -> None:
    print(f"{norm} eps   certified   robust under nearest")
    for eps, certified in found.certified_accuracy.items():
        print(f"{eps:8g}   {percent(certified):>8}   {percent(found.attacked_accuracy[eps]):>8}")
    if found.distance_over_radius_median is not None:
        how_far = f" ({found.distance_over_radius_median:.2f} times the radius)"
        if found.radius_median is not None and found.radius_median < bounds.VACUOUS:
            how_far = "; the certificate is vacuous: its radius is less than a tenth of a grey level"
        attack = f"median attack distance {found.distance_median:.4g}"
        print(f"median certified radius {found.radius_median:.4g}, {attack}{how_far}")
