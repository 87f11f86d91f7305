"""Ensembles of attacks: the worst case of each image. An ensemble is an attack itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from ...draws import Source, drawn_at
from ...threat import L1, L2, LINF, distance
from .._entry import opening
from .._gradients import Probe
from ..black_box._square import square
from ..evaluation._bpda import Differences, has_masked_gradients, is_stochastic
from ..evaluation._scoring import Attack, source_for
from ._apgd import apgd
from ._deepfool import deepfool
from ._fab import fab
from ._losses import dlr, is_answer, margin_loss, others, scaled_cross_entropy
from ._nearest import nearest
from ._pgd import pgd
from ._projections import column, nearest_classes, select

# For models that draw: a point just past the boundary for some draws is not for others, so no image leaves early.
_DEEP = partial(pgd, objective=margin_loss, stop_early=False)
# If gradients are masked, each of these losses fools images that the others do not.
_LOSSES = (margin_loss, dlr, scaled_cross_entropy)
# If other attacks follow, `nearest` need not find the optimum.
_SHORT = partial(nearest, steps=30, starts=0, polish=5)


@opening
def worst_case(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    attacks: Sequence[Attack],
    norm: float = LINF,
    eps: float | None = None,
    targets: Tensor | None = None,
    generator: Source = None,
) -> Tensor:
    """Run attacks in order and return the worst case of each image.

    With eps, only images that remain correct are passed to the next attack. Without eps, every attack runs on every
    image, and the smallest perturbation counts.
    """

    def attempt(place: int, attack: Attack) -> Callable[[Tensor], Tensor]:
        def attempted(rows: Tensor) -> Tensor:
            source = source_for(attack, drawn_at(generator, place, rows))
            own = select(targets, rows)
            return attack(model, x[rows], y[rows], norm=norm, eps=eps, targets=own, generator=source)

        return attempted

    return _best_of([attempt(*numbered) for numbered in enumerate(attacks)], _Question(model, x, y, targets, norm, eps))


@dataclass(frozen=True)
class _Question:
    """The threat to a model: which images count as fooled, by how much, and within which budget."""

    model: nn.Module
    x: Tensor
    y: Tensor
    targets: Tensor | None
    norm: float
    eps: float | None


def _best_of(attempts: Sequence[Callable[[Tensor], Tensor]], asked: _Question) -> Tensor:
    """Return each image's worst case over attempts: functions from row numbers to perturbed images.

    If none succeeds, the point of the largest margin is returned for inspection.
    """
    x, x_adv = asked.x, asked.x.clone()
    smallest = torch.full((len(x),), torch.inf, dtype=x.dtype, device=x.device)
    largest = torch.full_like(smallest, -torch.inf)
    rows = torch.arange(len(x), device=x.device)
    for attempt in attempts:
        if len(rows) == 0:
            break
        found = attempt(rows)
        with torch.no_grad():
            logits = asked.model(found)
        # NaN logits are no class: the evaluator counts them as a success, but never an image of NaN.
        past = torch.where(
            is_answer(logits), margin_loss(logits, asked.y[rows], select(asked.targets, rows)), torch.inf
        )
        length = distance(found - x[rows], asked.norm)
        won = (past > 0) & torch.isfinite(length)
        moved = torch.where(won, length, torch.inf)
        better = moved < smallest[rows]
        taken = better | (torch.isinf(smallest[rows]) & (past > largest[rows]))
        x_adv[rows] = torch.where(column(taken, found), found, x_adv[rows])
        smallest[rows] = torch.where(better, moved, smallest[rows])
        largest[rows] = torch.maximum(past, largest[rows])
        if asked.eps is not None:
            rows = rows[~won]
    return x_adv


def _towards_each_class(
    attack: Callable[..., Tensor], asked: _Question, classes: int, generator: Source, *, linearised: bool = False
) -> Tensor:
    """Return the worst case of an attack of images aimed at each of some classes, or at the targets.

    Those are the likeliest other classes, or with `linearised` those whose linearised boundaries are nearest.
    """
    x, y = asked.x, asked.y
    if asked.targets is not None:
        return attack(x, y, targets=asked.targets, generator=generator)
    if linearised:
        ranked = nearest_classes(asked.model, x, y, norm=asked.norm, count=classes)
    else:
        with torch.no_grad():
            logits = asked.model(x)
        ranked = others(logits, y).topk(min(classes, logits.shape[1] - 1), dim=1).indices

    def attempt(place: int, aims: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda rows: attack(x[rows], y[rows], aims=aims[rows], generator=drawn_at(generator, place, rows))

    return _best_of([attempt(*numbered) for numbered in enumerate(ranked.T)], asked)


@opening
def apgd_targeted(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    norm: float = LINF,
    eps: float | None = None,
    targets: Tensor | None = None,
    generator: Source = None,
    steps: int = 100,
    classes: int = 9,
    linearised: bool = False,
) -> Tensor:
    """Run APGD on the targeted DLR loss towards each of the most likely classes (Croce & Hein 2020, APGD-T).

    With `linearised`, towards the classes with the nearest linearised boundaries, nearest first (MALT, Melamed et al.
    2024). With `targets`, only these are attacked and count. Raises as apgd does.
    """
    attack = partial(apgd, model, norm=norm, eps=eps, objective=dlr, steps=steps, again=False)
    asked = _Question(model, x, y, targets, norm, eps)
    return _towards_each_class(attack, asked, classes, generator, linearised=linearised)


@opening
def fab_targeted(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    norm: float = L2,
    eps: float | None = None,
    targets: Tensor | None = None,
    generator: Source = None,
    steps: int = 100,
    classes: int = 9,
) -> Tensor:
    """Run FAB towards each of the most likely classes (FAB-T), with one gradient per step instead of one per class.

    With `targets`, only these are attacked and count.
    """
    attack = partial(fab, model, norm=norm, eps=eps, steps=steps)
    return _towards_each_class(attack, _Question(model, x, y, targets, norm, eps), classes, generator)


@opening
def standard(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    norm: float = LINF,
    eps: float | None = None,
    targets: Tensor | None = None,
    generator: Source = None,
) -> Tensor:
    """Return the worst case of `nearest` and AutoAttack's four attacks.

    With eps: `nearest`, which fools most images at a tenth of the cost; then APGD on the cross-entropy, APGD-T, FAB-T
    and Square (Croce & Hein 2020, section 5) with the paper's 100 steps, 9 classes and 5,000 queries. The cross-entropy
    uses a fixed range of logits, so that it cannot saturate. APGD and FAB give up images that twice their recent
    progress would not bring to the boundary; Square does not. For l1, PGD replaces APGD and Square is omitted. For a
    stochastic model, complete runs of PGD on the margin replace `nearest`; if its layers declare that they are
    stochastic, FAB and Square are omitted, as in AutoAttack's version for such models. Without eps: the smallest
    perturbation of `nearest`, DeepFool and FAB.
    """
    # APGD without further starts: the next attacks also find what these would.
    gradients: list[Attack] = [partial(apgd, objective=scaled_cross_entropy, again=False), apgd_targeted]
    searches: list[Attack] = [fab_targeted, square] if x.dim() == 4 else [fab_targeted]
    if norm == L1:
        gradients, searches = [partial(pgd, steps=100, objective=scaled_cross_entropy)], [fab_targeted]
    if eps is None:
        attacks: list[Attack] = [nearest, deepfool, fab]
    elif _is_differenced(model):
        attacks = _by_differences(x, norm)
    else:
        # Only layers that declare their draws are known to have useful gradients.
        attacks = [_DEEP if _draws(model) else nearest, *gradients, *([] if is_stochastic(model) else searches)]
    return worst_case(model, x, y, attacks=attacks, norm=norm, eps=eps, targets=targets, generator=generator)


@opening
def swift(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    norm: float = LINF,
    eps: float | None = None,
    targets: Tensor | None = None,
    generator: Source = None,
    classes: int = 4,
) -> Tensor:
    """Return the worst case of what finds almost all successes of `standard`, at a fraction of its passes.

    With eps: `nearest` and APGD on the cross-entropy, both as in `standard`, then APGD-T towards the few `classes`
    whose linearised boundaries are nearest (MALT, Melamed et al. 2024), then PGD on the DLR loss from three starts,
    which finds what otherwise only Square finds; for l1, PGD and FAB-T towards the likeliest classes. It has neither
    Square nor other classes: docs/attacks.md states what it missed. Models that draw, whose layers
    declare that they mask gradients, or that need finite differences, are attacked by `standard`. Without eps: the
    smallest perturbation of `nearest` and DeepFool.
    """
    if _draws(model) or _is_differenced(model) or has_masked_gradients(model):
        return standard(model, x, y, norm=norm, eps=eps, targets=targets, generator=generator)
    attacks: list[Attack] = [nearest, deepfool]
    if eps is not None and norm == L1:
        attacks = [
            nearest,
            partial(pgd, steps=100, objective=scaled_cross_entropy),
            partial(fab_targeted, classes=classes),
        ]
    elif eps is not None:
        aimed = partial(apgd_targeted, classes=classes, linearised=True)
        started = partial(pgd, steps=100, restarts=3, objective=dlr)
        attacks = [nearest, partial(apgd, objective=scaled_cross_entropy, again=False), aimed, started]
    return worst_case(model, x, y, attacks=attacks, norm=norm, eps=eps, targets=targets, generator=generator)


@opening
def fast(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    norm: float = LINF,
    eps: float | None = None,
    targets: Tensor | None = None,
    generator: Source = None,
) -> Tensor:
    """Return the worst case of a cheap ensemble, with a fraction of `standard`'s passes.

    With eps: `nearest` from one start, short PGD and APGD runs, then APGD towards three classes, which helps if the
    boundary to the likeliest class is discontinuous. If layers declare that they mask gradients, it takes three times
    the steps, repeats all but `nearest` from other starts, and adds long PGD runs on three losses from three starts
    each, because each of them fools other images. Stochastic models are attacked by complete runs of PGD on the margin
    only, and models with finite differences in their gradients by PGD on two losses and Square. Without eps: `nearest`
    and DeepFool towards three classes.
    """
    attacks: list[Attack]
    if eps is None:
        attacks = [_SHORT, partial(deepfool, candidates=3)]
    elif _draws(model):
        attacks = [_DEEP]
    elif _is_differenced(model):
        attacks = _by_differences(x, norm)
    elif norm == L1:
        attacks = [_SHORT, partial(pgd, steps=40, objective=margin_loss)]
    else:
        masked = has_masked_gradients(model)
        started: list[Attack] = [
            partial(pgd, steps=20, objective=scaled_cross_entropy),
            partial(apgd, steps=30, objective=dlr, again=False),
            partial(apgd_targeted, steps=60 if masked else 20, classes=3),
        ]
        attacks = [_SHORT, *started]
        if masked:
            attacks += [*started, *(partial(pgd, steps=100, restarts=3, objective=loss) for loss in _LOSSES)]
    return worst_case(model, x, y, attacks=attacks, norm=norm, eps=eps, targets=targets, generator=generator)


def _draws(model: nn.Module) -> bool:
    """Return whether a model declares that it draws, or an evaluator found that it does and averages its passes."""
    return is_stochastic(model) or (isinstance(model, Probe) and model.draws > 1)


def _is_differenced(model: nn.Module) -> bool:
    """Return whether an evaluator takes gradients by finite differences, at hundreds of passes each."""
    return isinstance(model, Probe) and isinstance(model.model, Differences)


def _by_differences(x: Tensor, norm: float) -> list[Attack]:
    """Return attacks that need few gradients, and Square, which needs none."""
    ascents: list[Attack] = [partial(pgd, steps=40, objective=loss) for loss in (margin_loss, dlr)]
    return [*ascents, square] if x.dim() == 4 and norm != L1 else ascents
