"""Second opinions on a result: would more steps, another attack or a larger budget change it?"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..threat import LINF, Threat
from .derivatives import frozen
from .evaluate import Attack, AttackResult, run
from .flags import Flag
from .losses import margin

__all__ = ["WEAKER", "check_convergence", "check_losses", "check_order", "check_unlimited", "lengthened"]

# Pairs (weaker, stronger): on the same images and threat the first must not do better than the second.
WEAKER: tuple[tuple[str, str], ...] = (
    ("fgsm", "pgd"),
    ("rfgsm", "pgd"),
    ("pgd", "standard"),
    ("square", "pgd"),
    ("hopskipjump", "nearest"),
    ("deepfool", "nearest"),
    ("fgsm", "fast"),
    ("pgd", "fast"),
    ("fast", "standard"),
)
_NOTABLE = 0.02
_LENGTHS = ("steps", "queries")


def lengthened(attack: Attack, factor: int = 4) -> Attack:
    """Return the attack with `factor` times its steps (or queries); raise UserError where it has neither."""
    function = cast(Callable[..., Tensor], attack)
    parameters = inspect.signature(function).parameters
    for name in _LENGTHS:
        if name in parameters:
            return cast(Attack, partial(function, **{name: factor * parameters[name].default}))
    raise UserError("this attack has neither steps nor queries, so it cannot be run for longer")


def check_convergence(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    attack: Attack,
    threat: Threat,
    result: AttackResult,
    *,
    images: int = 64,
    factor: int = 4,
    generator: torch.Generator | None = None,
) -> tuple[Flag, ...]:
    """Return a flag if a run `factor` times as long finds notably more on the first images that are still robust.

    With eps: at least four and 5% of those images fall, more than fall to a second run of the same length, which shows
    what another random start does alone. Without: the median distance falls by more than 5%.
    """
    longer = lengthened(attack, factor)
    open_still = result.clean_correct & (torch.isinf(result.distance) | (threat.eps is None))
    rows = open_still.nonzero().squeeze(1)[:images]
    if len(rows) == 0:
        return ()
    again = run(model, x[rows], y[rows], longer, threat, generator=generator)
    if threat.eps is not None:
        fell = int(again.success.sum())
        if fell < max(4, 0.05 * len(rows)):
            return ()
        fell -= int(run(model, x[rows], y[rows], attack, threat, generator=generator).success.sum())
        if fell < max(4, 0.05 * len(rows)):
            return ()
        return (Flag("not-converged", f"{factor} times the steps fool {fell} of {len(rows)} further images"),)
    ratio = float((again.distance / result.distance[rows]).nan_to_num(1.0).median())
    if ratio < 0.95:
        return (Flag("not-converged", f"{factor} times the steps shorten the median distance by {1 - ratio:.0%}"),)
    return ()


def check_unlimited(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    attack: Attack,
    *,
    images: int = 64,
    generator: torch.Generator | None = None,
) -> tuple[Flag, ...]:
    """Return a flag unless the attack fools every image when each pixel may take any value (Athalye et al. 2018)."""
    result = run(model, x[:images], y[:images], attack, Threat(LINF, 1.0), generator=generator)
    standing = int((result.clean_correct & ~result.success).sum())
    if standing == 0:
        return ()
    return (Flag("unlimited-budget", f"{standing} of {int(result.clean_correct.sum())} images withstand eps = 1"),)


def check_order(
    results: Mapping[str, AttackResult], weaker: Sequence[tuple[str, str]] = WEAKER
) -> dict[str, tuple[Flag, ...]]:
    """Return, for each stronger attack, a flag if a weaker one on the same images and threat did better.

    Better: it fools at least two and at least 2% more images.
    """
    flags: dict[str, tuple[Flag, ...]] = {}
    for low, high in weaker:
        if low not in results or high not in results:
            continue
        first, second = results[low], results[high]
        extra = int(first.success.sum()) - int(second.success.sum())
        if extra >= max(2, _NOTABLE * len(first.success)):
            flags[high] = (*flags.get(high, ()), Flag("weaker-wins", f"{low} fools {extra} images more than {high}"))
    return flags


def check_losses(model: nn.Module, x: Tensor, y: Tensor, result: AttackResult) -> tuple[Flag, ...]:
    """Return a flag if a failed attack left more than a fifth of its images with a lower margin than it began with.

    From the indicators of attack failure (Pintor et al. 2022): an ascent that descends does not follow the model.
    """
    failed = (result.clean_correct & ~result.success).nonzero().squeeze(1)
    if len(failed) < 5:
        return ()
    with frozen(model), torch.no_grad():
        before, after = margin(model(x[failed]), y[failed]), margin(model(result.x_adv[failed]), y[failed])
    lower = int((after < before).sum())
    if lower <= 0.2 * len(failed):
        return ()
    return (Flag("loss-not-increasing", f"{lower} of {len(failed)} images it failed on ended further from a success"),)
