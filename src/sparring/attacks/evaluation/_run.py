"""Run an attack and judge it: recount success, measure distances, flag violations without repairing them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from ...draws import Draws, Source
from ...errors import UserError
from ...memory_format import channels_last
from ...outputs import Door, check_module, opened
from ...threat import Threat
from ...units import html_table, percent
from ...waiting import courteous
from .._gradients import Probe, frozen
from .._meter import Meter, Progress
from ..algorithms._projections import select
from ..fastpath._convnet import read_convolved
from ..fastpath._mlp import ByHand, read_dense
from ._bpda import (
    PrefixSplit,
    blind_pixels,
    dense_copy,
    groups_of,
    has_masked_gradients,
    is_stochastic,
    seeded,
    split_at_draw,
)
from ._sanity_checks import (
    Flag,
    check_inputs,
    check_losses,
    check_mode,
    check_model,
    check_targets,
    check_threat,
    exceeds,
    state_of,
)
from ._scoring import (
    LONGER,
    NOTABLE,
    TWICE,
    Attack,
    Best,
    Judge,
    Order,
    attack_by_differences,
    attack_itself,
    attack_single_draws,
    attack_straight_through,
    is_built_in,
    length_of,
    steps_of,
    transfer,
)

# Images that a network like LeNet-5 sees in the checks of a model, while its layers are read, and while autograd is
# compared with differences.
_CHECKED, _READ, _COMPARED = 100, 300, 60
_PATIENCE = 1.0  # seconds before the preparation is told


@dataclass(frozen=True)
class AttackResult:
    """The result of an attack on N images; an image is robust if clean_correct & ~success.

    x_adv: the perturbed images; images that are misclassified without an attack are not attacked and unchanged.
    clean_correct, success: bool (N,); success is False where clean_correct is False.
    distance: (N,), the norm of each successful perturbation; 0 for images misclassified without an attack, inf where
    the attack failed. forwards, backwards: mean number of passes per attacked image. seconds: total wall time.
    batch_size: images that were attacked at a time; the last bits of a result may depend on it.
    """

    x_adv: Tensor
    clean_correct: Tensor
    success: Tensor
    distance: Tensor
    forwards: float
    backwards: float
    seconds: float
    flags: tuple[Flag, ...]
    batch_size: int

    def shown(self) -> dict[str, str]:
        """Return the values to display, by name."""
        found = self.distance[self.success]
        return {
            "images": str(len(self.success)),
            "accuracy": percent(float(self.clean_correct.double().mean())),
            "robust accuracy": percent(robust_accuracy(self)),
            "median distance of successes": f"{float(found.median()):.4g}" if len(found) else "–",
            "passes per image": f"{self.forwards:.0f} forward, {self.backwards:.0f} backward",
            "flags": ", ".join(flag.name for flag in self.flags) or "none",
        }

    def __repr__(self) -> str:
        return f"AttackResult({'; '.join(f'{name}: {text}' for name, text in self.shown().items())})"

    def _repr_html_(self) -> str:
        return html_table(self.shown())

    def cpu(self) -> AttackResult:
        """Return the result with its tensors on the CPU."""
        here: dict[str, Any] = {name: value.cpu() for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **here)


def robust_accuracy(result: AttackResult) -> float:
    """Return the fraction of all images that are classified correctly before and after the attack."""
    return float((result.clean_correct & ~result.success).double().mean())


@courteous()
def run(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    attack: Attack,
    threat: Threat,
    *,
    targets: Tensor | None = None,
    surrogates: Mapping[str, nn.Module] | None = None,
    lent: Mapping[str, Sequence[Tensor]] | None = None,
    through: nn.Module | None = None,
    batch_size: int | None = None,
    generator: Source = None,
    draws: int = 10,
    convergence: int = 0,
    seconds: float = math.inf,
    progress: Progress | None = None,
) -> AttackResult:
    """Attack every correctly classified image and judge the result on a fresh forward pass.

    x: float (N, ...) in [0, 1], attacked in float32 or float64; y: int64 (N,). The model gets images in its own type,
    and its logits are read by `outputs.logits_of`. If the threat has no eps, the attack looks for the smallest
    perturbation. batch_size None: what memory allows, as measured (see `batch_size_for`). The model runs in eval mode
    with frozen parameters and is restored afterwards.

    If layers declare that they mask gradients, or gradients vanish, the attack runs again with a straight-through
    backward pass. It also runs on each of `surrogates` (name to model), and its examples are transferred. With a
    budget, examples of PGD on DLR are transferred too, except to attacks with a single step. surrogates None: the dense
    network, if sparse activations name the layers they replaced; {}: none. `lent` holds examples by the name of their
    surrogate, as `lend` returns them; their passes do not count here. The best result counts for each image.

    Random numbers are each image's own: of its key in a `Draws`, or of its number and a seed from a torch.Generator
    (None: 0). A stochastic model is attacked with single passes and then in expectation over `draws` passes. An image
    counts as misclassified if most of 3·draws + 1 other passes are wrong. `through` is the same network with faster
    passes, for the attack alone. `convergence` images show whether more steps would help (see `check_convergence`);
    `seconds` limits finite differences. `progress` gets a stage, how many images are done (roughly), and of how many.

    Raises UserError for invalid inputs or models (see docs/flags.md).
    """
    start = time.perf_counter()
    check_numbers(batch_size=1 if batch_size is None else batch_size, draws=draws, convergence=convergence)
    for network in (model, *(surrogates or {}).values()):
        check_module(network)
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        x, y = check_inputs(x, y)
        check_threat(x, threat)
        _check_lent(lent or {}, x)
        flags = check_mode(model)
        model, others = hold(stack, model, surrogates, x)
        check_targets(model, x, y, targets)
        order = Order(attack, threat, x, y, targets, batch_size or 0, draws_for(x, generator), progress)
        result, _ = attack_held(model, others, lent or {}, order, through, draws, Checked(flags), seconds)
    if convergence and length_of(attack) is not None:
        flags = check_convergence(
            model, x, y, attack, threat, result, images=convergence, targets=targets, batch_size=batch_size,
            generator=order.draws, progress=progress,
        )  # fmt: skip
        result = replace(result, flags=(*result.flags, *flags))
    return replace(result, seconds=time.perf_counter() - start)


def check_numbers(*, batch_size: int, draws: int, convergence: int = 0) -> None:
    for name, number, least in (("batch_size", batch_size, 1), ("draws", draws, 1), ("convergence", convergence, 0)):
        if number < least:
            raise UserError(f"{name} must be {least} or more, not {number}")


def hold(
    stack: ExitStack, model: nn.Module, surrogates: Mapping[str, nn.Module] | None, x: Tensor
) -> tuple[nn.Module, dict[str, nn.Module]]:
    """Return a model and its surrogates, None: the dense network if there is one, held until the stack ends."""
    others = _dense_network(model) if surrogates is None else surrogates
    held, *rivals = [_hold(stack, network, x) for network in (model, *others.values())]
    return held, dict(zip(others, rivals, strict=True))


def _hold(stack: ExitStack, model: nn.Module, x: Tensor) -> nn.Module:
    """Return a model opened, in eval mode and with frozen parameters until the stack ends."""
    stack.enter_context(frozen(model))
    stack.enter_context(channels_last(model))
    return opened(model, x)


@dataclass(frozen=True)
class Checked:
    """Results of the checks of a model: flags, whether it draws, and the pixels without a true gradient.

    done: whether they ran at all, on an image that is classified correctly.
    """

    flags: tuple[Flag, ...] = ()
    random: bool = False
    blind: Tensor | None = None
    done: bool = False


@dataclass(frozen=True)
class _Beginning:
    """State before a model is attacked: the images with a batch size, and whether and where the model draws.

    best: the original images; watch: the model that judges them; meter: of what comes before the attack.
    """

    order: Order
    best: Best
    watch: Probe
    random: bool
    split: PrefixSplit | None
    meter: Meter


def _before_attack(model: nn.Module, order: Order, draws: int) -> Meter:
    """Return what counts the passes before an attack, by about how many images each check sends through the model."""
    images = len(order.x) * (3 * draws + 1 if is_stochastic(model) else 1) + _CHECKED + _READ + _COMPARED
    return Meter(order.progress, "preparing", images, together=images, patience=_PATIENCE)


def _begin(model: nn.Module, order: Order, draws: int, seen: Checked, seed: int, *, splits: bool) -> _Beginning:
    """Compute the images' logits, and check the model by them; `splits`: whether a steady part may run separately."""
    x, y, drawing = order.x, order.y, is_stochastic(model)
    sized = order.sized(model)
    watch = Probe(model, meter=(meter := _before_attack(model, order, draws)))  # passes that measure memory take longer
    random, doubts, first = seen.random, tuple[Flag, ...](), x.new_empty(0)
    if not seen.done:
        random, doubts, first = check_model(watch, x, y, draws=drawing, batch_size=sized.batch_size)
        doubts = (*_undeclared(model, random), *doubts)
    known, split = None, None
    if random:
        sized = order.sized(model, draws=draws)
        split = split_at_draw(model, x) if splits else None
        watch = Probe(split.drawing if split else model, meter=meter)
    judge = Judge(watch, split and split.steady, sized, 3 * draws + 1 if random else 1, seed + 1)
    if not random:
        known = torch.cat([first, judge.logits(x[len(first) :])]) if len(first) < len(x) else first
    best = Best.beginning(judge, known, [*seen.flags, *doubts])
    watch.meter = None
    meter.finish_(meter.images - _READ - _COMPARED)
    return _Beginning(sized, best, watch, random, split, meter)


def attack_held(
    model: nn.Module,
    others: Mapping[str, nn.Module],
    lent: Mapping[str, Sequence[Tensor]],
    order: Order,
    through: nn.Module | None,
    draws: int,
    seen: Checked,
    seconds: float = math.inf,
) -> tuple[AttackResult, Checked]:
    """Return the result of `run` except for the time, for models that are held, and the results of the checks.

    For batches of 0 a size is chosen; checks that were `seen` are not repeated.
    """
    x, seed, before = order.x, order.draws.seed(), state_of(model)
    own = {} if is_built_in(order.attack) else {name: value.clone() for name, value in _tensors(model).items()}
    begun = _begin(model, order, draws, seen, seed, splits=through is None)
    order, random, best, meter = begun.order, begun.random, begun.best, begun.meter
    hand = None if random or through is not None else _by_hand(model, x)
    meter.finish_(meter.images - _COMPARED)
    probe = Probe(through or model, draws=draws if random else 1, hand=hand, split=begun.split)
    with seeded(model, seed):
        seen = seen if seen.done else _checked(best, model, random, by_hand=hand is not None)
        meter.finish_(meter.images)
        _attack_in_all_ways(best, probe, model, seen, seconds)
        lenders = {name: Probe(surrogate, hand=_by_hand(surrogate, x)) for name, surrogate in others.items()}
        transfer(best, lenders, lent)
        best.flags += best.violations(probe.nonfinite + begun.watch.nonfinite)
        if state_of(model) != before or _differs(model, own):
            detail = "parameters or buffers changed; make them constant in eval mode"
            best.flags.append(Flag("state-changed", detail))
            _restore_(model, own)  # or later attacks would see what a user's attack has written
        found, failed = best.outcome, best.clean_correct & ~best.outcome.success
        if order.threat.eps is not None and not random:
            best.flags += check_losses(best.margin[failed], found.margin[failed])
    count, asked = max(int(best.clean_correct.sum()), 1), (probe, *lenders.values())
    return AttackResult(
        x_adv=found.x_adv,
        clean_correct=best.clean_correct,
        success=found.success,
        distance=found.distance,
        forwards=sum(one.forwards for one in asked) / count,
        backwards=sum(one.backwards for one in asked) / count,
        seconds=0.0,
        flags=tuple(best.flags),
        batch_size=min(order.batch_size, len(x)),
    ), seen


def _differs(model: nn.Module, own: Mapping[str, Tensor]) -> bool:
    """Return whether a model's tensors are not those of `own`: writes to `.data` leave no trace in `state_of`."""
    pairs = ((value, own[name]) for name, value in _tensors(model).items() if name in own)
    return any(bool(((one != two) & ((one == one) | (two == two))).any()) for one, two in pairs)  # NaN equals NaN


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _restore_(model: nn.Module, own: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, value in _tensors(model).items():
            if name in own:
                value.copy_(own[name])


def _checked(best: Best, model: nn.Module, random: bool, *, by_hand: bool) -> Checked:
    """Look for pixels without a true gradient, and flag them; return the results of all checks."""
    blind, rows = None, best.clean_correct.nonzero().squeeze(1)
    if not by_hand and not random:
        x, y = best.order.x[rows], best.order.y[rows]
        blind, doubts = _doubted(model, x, y, best.flags, best.order.batch_size)
        best.flags += doubts
    return Checked(tuple(best.flags), random, blind, done=len(rows) > 0)


def _attack_in_all_ways(best: Best, probe: Probe, model: nn.Module, seen: Checked, seconds: float) -> None:
    begin = time.perf_counter()
    if seen.random:
        attack_single_draws(best, probe)
    attack_itself(best, probe, random=seen.random)
    took = time.perf_counter() - begin
    if has_masked_gradients(model) or "zero-gradients" in {flag.name for flag in best.flags}:
        attack_straight_through(best, probe, model)
    if seen.blind is not None and took * (1 + groups_of(model)) <= seconds:
        attack_by_differences(best, probe, model, seen.blind)
    elif seen.blind is not None:
        best.flags.append(Flag("partial-gradients", "finite differences were left out, for lack of time"))


def lend(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    attack: Attack,
    threat: Threat,
    *,
    batch_size: int | None = None,
    generator: Source = None,
) -> list[Tensor]:
    """Return examples of a surrogate for transfer: those of the attack and, with a budget, of a long PGD run.

    Each has the shape of x. Pass them to `run` as `lent`, for other models and the same images. The surrogate is
    attacked only once for all of them. Raises UserError as `run` does, and raises no flags.
    """
    check_module(model)
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        x, y = check_inputs(x, y)
        check_threat(x, threat)
        model = _hold(stack, model, x)
        order = Order(attack, threat, x, y, None, batch_size or 0, draws_for(x, generator)).sized(model)
        check_model(model, x, y, draws=is_stochastic(model), batch_size=order.batch_size)
        everything = torch.ones(len(x), dtype=torch.bool, device=x.device)
        return list(order.loans(Probe(model, hand=_by_hand(model, x)), lambda: everything))


def lengthened(attack: Attack, factor: int = 4) -> Attack:
    """Return the attack with `factor` times its steps (or queries); raise UserError if it has neither."""
    name, steps = length_of(attack), steps_of(attack)
    if name is None or steps is None:
        raise UserError("this attack has neither steps nor queries, so a longer run is not possible")
    return cast(Attack, partial(cast(Callable[..., Tensor], attack), **{name: factor * steps}))


def check_convergence(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    attack: Attack,
    threat: Threat,
    result: AttackResult,
    *,
    images: int = 128,
    factor: int = 4,
    targets: Tensor | None = None,
    batch_size: int | None = None,
    generator: Source = None,
    progress: Progress | None = None,
) -> tuple[Flag, ...]:
    """Return a flag if a run `factor` times as long is clearly better, or worse, on the first correct images.

    With eps, the long run is compared with a second run of the normal length, which shows the effect of another random
    start: better means that it fools more images, at least 5% of all and beyond chance (see `exceeds`). Without eps,
    better means that the median distance falls by more than 5%. If the long run is worse, the flag is `weaker-wins`.
    `progress` is as in `run`.
    """
    rows = result.clean_correct.nonzero().squeeze(1)[:images]
    if len(rows) == 0:
        return ()
    source = draws_for(x, generator)[rows]
    again = partial(
        run, model, x[rows], y[rows], threat=threat, targets=select(targets, rows), batch_size=batch_size,
        progress=progress,
    )  # fmt: skip
    longer = again(attack=lengthened(attack, factor), generator=source.at(LONGER))
    if threat.eps is None:
        ratio = float((longer.distance / result.distance[rows]).nan_to_num(1.0).median())
        if ratio < 0.95:
            detail = f"{factor} times the steps shorten the median distance by {1 - ratio:.0%}; take more steps"
            return (Flag("not-converged", detail),)
        if ratio > 1.05:
            return (Flag("weaker-wins", f"{factor} times the steps lengthen the median distance by {ratio - 1:.0%}"),)
        return ()
    first = result.success[rows]
    if not exceeds(int((longer.success & ~first).sum()), 0, share=0.05, of=len(rows)):
        lost = int((first & ~longer.success).sum())
        if not exceeds(lost, int((longer.success & ~first).sum()), share=NOTABLE, of=len(rows)):
            return ()
        return (Flag("weaker-wins", f"{factor} times the steps fool {lost} of {len(rows)} images no longer"),)
    twice = again(attack=attack, generator=source.at(TWICE)).success | first
    gained, missed = int((longer.success & ~twice).sum()), int((twice & ~longer.success).sum())
    if not exceeds(gained, missed, share=0.05, of=len(rows)):
        return ()
    detail = f"{factor} times the steps fool {gained} of {len(rows)} images that two runs do not; take more steps"
    return (Flag("not-converged", detail),)


def _check_lent(lent: Mapping[str, Sequence[Tensor]], x: Tensor) -> None:
    for name, examples in lent.items():
        for found in examples:
            if found.shape != x.shape:
                shapes = f"the shape {tuple(found.shape)} and the images {tuple(x.shape)}"
                raise UserError(f"the examples of {name} have {shapes}; they must be made on the same images")


def _by_hand(model: nn.Module, x: Tensor) -> ByHand | None:
    if isinstance(model, Door) or any(p.dtype != torch.float32 for p in (x, *model.parameters())):
        return None
    return read_dense(model, x[:2]) or read_convolved(model, x[:2])


def _doubted(
    model: nn.Module, x: Tensor, y: Tensor, flags: Iterable[Flag], batch_size: int
) -> tuple[Tensor | None, list[Flag]]:
    """Return the pixels at which no attack should follow the gradient, a mask or None, and a flag if autograd is wrong.

    x: images classified correctly as y. If steps do not gain what the gradient predicts, because of jumps rather than
    a wrong gradient, the mask covers all pixels. Layers that declare masked gradients have their own backward pass:
    the rest of such a model is examined without them.
    """
    masked = has_masked_gradients(model)
    seen = dense_copy(model) if masked else model
    if seen is None or len(x) == 0:
        return None, []
    blind = blind_pixels(seen, x, y, batch_size=batch_size)
    if blind is not None:
        missed = f"autograd misses the effect of {int(blind.sum())} of {blind.numel()} pixels"
        return blind, [Flag("partial-gradients", f"{missed}; finite differences were used")]
    jumps = not masked and "shattered-gradients" in {flag.name for flag in flags}
    return (torch.ones_like(x[0], dtype=torch.bool) if jumps else None), []


def _dense_network(model: nn.Module) -> dict[str, nn.Module]:
    dense = dense_copy(model)
    return {} if dense is None else {"the dense network": dense}


def _undeclared(model: nn.Module, random: bool) -> list[Flag]:
    if not random or is_stochastic(model):
        return []
    return [
        Flag("random-model", "two passes over the same images differ; switch the noise off in eval mode, or declare it")
    ]


def draws_for(x: Tensor, source: Source) -> Draws:
    """Return draws of the images x: those given, or those of `seed_from`."""
    return source if isinstance(source, Draws) else Draws.of(seed_from(source), range(len(x)), x.device)


def seed_from(generator: torch.Generator | None) -> int:
    """Return a seed drawn from a generator; 0 without one."""
    if generator is None:
        return 0
    return int(torch.randint(0, 2**31, (), generator=generator, device=generator.device))
