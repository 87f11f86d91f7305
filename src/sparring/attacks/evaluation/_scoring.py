"""The ways in which `run` attacks a model, and the score of each; the best result counts."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn

from ...draws import Draws, Source
from ...errors import UserError
from ...facts import ATTACKS, OWN_ATTACK, AttackFacts
from ...memory import Need, free_memory, measured
from ...plugins import takes
from ...threads import shared_out
from ...threat import Threat, distance
from .._gradients import ROWS_AT_ONCE, Probe, kernels_of, logits_and_pull, on_cpu
from .._meter import Meter, Progress
from ..algorithms._losses import dlr, is_answer, margin_loss
from ..algorithms._pgd import pgd
from ..algorithms._projections import column, select
from ..fastpath._mlp import is_hooked
from ._bpda import Differences, is_stochastic, seeded, straight_through
from ._sanity_checks import Flag

TOLERANCE = 1e-6
_LENGTHS = ("steps", "queries")
# Factors by which perturbations are shortened and lengthened if a model draws.
_SIZES = (0.75, 0.8, 0.85, 0.9, 0.95, 1.05, 1.1, 1.2, 1.3, 1.5, 1.75, 2.0)
# Another way of attacking must do better on this share of the images to count as a sign of masking.
NOTABLE = 0.02
# Forward passes for each unit of `AttackFacts.passes`: between 1 and 3 for most attacks.
_FORWARD = 2.5
# The fewest images for a thread.
_LEAST = 16
# Tensors of an image's size that an attack keeps for each image, besides the model's.
_COPIES = 16
# Points that only just fool another network need not fool this one: a second set comes from as deep as eps allows.
_DEEP = partial(pgd, objective=dlr, stop_early=False)


class Attack(Protocol):
    """The type of attacks: a function from images to perturbed images; configure it with functools.partial."""

    def __call__(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        /,
        *,
        norm: float,
        eps: float | None = None,
        targets: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor: ...


# Numbers of the evaluator's passes over the same images, each with its own draws; the first has PLAIN to PLAIN + 4.
PLAIN, SINGLE, STRAIGHT, DIFFERENCES, LOAN, DEEP_LOAN, LONGER, TWICE = 0, 5, 6, 7, 8, 9, 10, 11


def facts_of(attack: Attack) -> AttackFacts:
    """Return the facts about an attack in any configuration; one without a parameter `eps` is a minimum-norm attack."""
    name = _name_of(attack)
    if name is not None:
        return ATTACKS[name]
    return OWN_ATTACK if takes(_innermost(attack), "eps") else replace(OWN_ATTACK, kind="minimum-norm")


def _name_of(attack: Attack) -> str | None:
    """Return the name of an attack in the table, in any configuration; None for others, which may keep a state."""
    function = _innermost(attack)
    name = getattr(function, "__name__", "").replace("_", "-")
    return name if name in ATTACKS and is_built_in(function) else None


def length_of(attack: Attack) -> str | None:
    """Return the name of the parameter that says how long an attack runs, if it has one."""
    parameters = inspect.signature(cast(Callable[..., Tensor], attack)).parameters
    return next((name for name in _LENGTHS if name in parameters), None)


def steps_of(attack: Attack) -> int | None:
    """Return the steps (or queries) of an attack, if it has either."""
    name = length_of(attack)
    return None if name is None else inspect.signature(cast(Callable[..., Tensor], attack)).parameters[name].default


def source_for(attack: Attack, source: Source) -> torch.Generator | None:
    """Return an attack's random numbers: for a user's attack a generator, which the batch's first image seeds."""
    if isinstance(source, Draws) and not is_built_in(attack):
        return source.generator()
    return cast(torch.Generator | None, source)  # only our attacks also take Draws


def _innermost(attack: Attack) -> Callable[..., Tensor]:
    function = cast(Callable[..., Tensor], attack)
    while isinstance(function, partial):
        function = function.func
    return function


def is_built_in(attack: Attack) -> bool:
    """Return whether an attack, in any configuration, is one of ours."""
    return str(getattr(_innermost(attack), "__module__", "")).startswith(f"{__package__.partition('.')[0]}.")


def budget_of(attack: Attack, threat: Threat) -> dict[str, Any]:
    """Return the keyword that gives an attack its budget; a user's minimum-norm attack need not take one."""
    return {"eps": threat.eps} if takes(cast(Callable[..., Tensor], attack), "eps") else {}


@dataclass(frozen=True)
class Order:
    """An attack with its images: call it with a model, a mask of the images to attack, and a number for its draws.

    progress: as in `run`.
    """

    attack: Attack
    threat: Threat
    x: Tensor
    y: Tensor
    targets: Tensor | None
    batch_size: int
    draws: Draws
    progress: Progress | None = None

    def __call__(self, model: nn.Module, wanted: Tensor, turn: int) -> Tensor:
        x_adv, places = self.x.clone(), wanted.nonzero().squeeze(1)
        if len(places) == 0:
            return x_adv
        batches = torch.split(places, self.batch_size)
        meter = self._metered(model, len(places))
        twins = _twins(model, min(_threads_for(self.x), len(batches))) if _name_of(self.attack) else []
        work = partial(self._attacked, twins or [model], self.draws.at(turn))
        results = shared_out(work, batches) if twins else map(work, batches)
        for number, rows in enumerate(batches, 1):
            x_adv[rows] = next(results).to(x_adv)
            meter.finish_(min(number * self.batch_size, len(places)))
        for twin in twins:
            cast(Probe, model).add_(cast(Probe, twin))
        if isinstance(model, Probe):
            model.meter = None
        return x_adv

    def _metered(self, model: nn.Module, images: int) -> Meter:
        """Return what counts the images of the attack, to which a probe tells its passes."""
        each = max(_FORWARD * facts_of(self.attack).passes, steps_of(self.attack) or 0)
        together = self.batch_size * (_threads_for(self.x) if _name_of(self.attack) else 1)
        meter = Meter(self.progress, "attacking", images, each=each, together=together)
        if isinstance(model, Probe):
            model.meter = meter
        return meter

    def _attacked(self, free: list[nn.Module], draws: Draws, rows: Tensor) -> Tensor:
        """Return the attacked images `rows`, with a model that no other thread uses."""
        x, source, model = self.x[rows], source_for(self.attack, draws[rows]), free.pop()
        found = self.attack(
            model, x, self.y[rows], norm=self.threat.norm, targets=select(self.targets, rows), generator=source,
            **budget_of(self.attack, self.threat),
        )  # fmt: skip
        if not isinstance(found, Tensor) or found.shape != x.shape:
            what = f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
            raise UserError(f"the attack returned {what}, not images of shape {tuple(x.shape)}")
        free.append(model)
        return found.detach()

    def sized(self, model: nn.Module, *, draws: int = 1) -> Order:
        """Return the order with a batch size, if it has none: as many images as memory allows."""
        if self.batch_size:
            return self
        rows, threads = facts_of(self.attack).together(self.threat.eps), _threads_for(self.x)
        most = batch_size_for(model, self.x, rows=rows, draws=draws * threads)
        # A batch for each thread, unless they would be too small.
        return replace(self, batch_size=most if threads == 1 else min(most, max(-(-len(self.x) // threads), _LEAST)))

    def loans(self, surrogate: Probe, wanted: Callable[[], Tensor]) -> Iterator[Tensor]:
        """Yield a surrogate's examples, computed for the images that are still open when requested."""
        yield self(surrogate, wanted(), LOAN)
        # For a single-step attack this would be a different attack, and change what its robust accuracy means.
        if self.threat.eps is not None and not facts_of(self.attack).single_step:
            yield replace(self, attack=_DEEP)(surrogate, wanted(), DEEP_LOAN)


def _threads_for(x: Tensor) -> int:
    """Return how many threads divide the images: with another device the CPU only waits."""
    return torch.get_num_threads() if on_cpu(x) else 1


def _twins(model: nn.Module, count: int) -> list[nn.Module]:
    """Return a probe of the model for each thread; none if one is enough or they would not be independent.

    Draws, counts and hooks of a user's own code are shared by all copies of a model.
    """
    if not isinstance(model, Probe) or model.draws > 1 or is_stochastic(model):
        return []
    if count < 2 or is_hooked(model) or kernels_of(model) is not None:
        return []
    try:
        return [model.twin() for _ in range(count)]
    except Exception:  # whatever a user's model raises if it cannot be copied
        return []


def answers(logits: Tensor) -> Tensor:
    """Return the predicted classes of logits (N, classes), −1 where there is none."""
    return torch.where(is_answer(logits), logits.argmax(1), -1)


class Scored(NamedTuple):
    """The result of one way of attacking: the images, how far each moved, success, distance as in AttackResult.

    margin: how far past the boundary each is in a single pass; 0 if the model draws.
    """

    x_adv: Tensor
    moved: Tensor
    success: Tensor
    distance: Tensor
    margin: Tensor


@dataclass(frozen=True)
class Judge:
    """Judges, on fresh forward passes, which images are misclassified and how far they were moved.

    probe: the model, or the part after `steady`, run `draws` times.
    """

    probe: Probe
    steady: nn.Module | None
    order: Order
    draws: int
    seed: int

    def logits(self, x: Tensor) -> Tensor:
        """Return the logits of one pass."""
        with torch.no_grad():
            return torch.cat([self.probe(part) for part in torch.split(x, self.order.batch_size)])

    def wrong(self, x: Tensor) -> Tensor:
        """Return which images most of the passes do not assign to their class."""
        return self._share(x, self.order.y) < 0.5

    def __call__(self, x_adv: Tensor, rows: Tensor) -> Scored:
        """Return the outcome of an attack on the images at positions `rows`, all classified correctly."""
        y, targets = self.order.y[rows], select(self.order.targets, rows)
        moved = distance(x_adv - self.order.x[rows], self.order.threat.norm)
        margin = torch.zeros_like(moved)
        if self.draws > 1:
            reached = self._share(x_adv, y) < 0.5 if targets is None else self._share(x_adv, targets) > 0.5
        else:
            logits = self.logits(x_adv)
            reached = answers(logits) != y if targets is None else answers(logits) == targets
            margin = margin_loss(logits, y, targets)
        success = reached & torch.isfinite(moved)  # NaN is not an image, whatever the model returns for it
        return Scored(x_adv, moved, success, torch.where(success, moved, torch.inf), margin)

    def _share(self, x: Tensor, label: Tensor) -> Tensor:
        votes = torch.zeros(len(x), device=x.device)
        with torch.no_grad(), seeded(self.probe, self.seed):
            parts = torch.split(x, self.order.batch_size)
            if self.steady is not None:
                parts = torch.split(torch.cat([self.steady(part) for part in parts]), self.order.batch_size)
            for _ in range(self.draws):
                logits = torch.cat([self.probe(part) for part in parts])
                votes += answers(logits) == label
        return votes / self.draws


def better(first: Scored, second: Scored) -> tuple[Scored, Tensor]:
    """Return the per-image better of two outcomes, and where the second was better by more than 5% or alone.

    If neither succeeded, the second one's point is kept if it moved at all.
    """
    taken = (second.distance < first.distance) | (torch.isinf(first.distance) & (second.moved != 0))  # NaN is not 0
    shape = column(taken, first.x_adv)
    merged = Scored(
        torch.where(shape, second.x_adv, first.x_adv),
        torch.where(taken, second.moved, first.moved),
        first.success | second.success,
        torch.minimum(second.distance, first.distance),
        torch.where(taken, second.margin, first.margin),
    )
    return merged, second.distance < 0.95 * first.distance


def _taken(whole: Tensor, rows: Tensor) -> Tensor:
    return whole if len(rows) == len(whole) else whole[rows]


def _put(whole: Tensor, rows: Tensor, part: Tensor) -> Tensor:
    return part if len(part) == len(whole) else whole.index_copy(0, rows, part)


@dataclass
class Best:
    """The best result of each image so far, over all ways of attacking, and the flags raised.

    margin: of the original images (N,), as in `Scored`.
    """

    judge: Judge
    clean_correct: Tensor
    margin: Tensor
    outcome: Scored
    flags: list[Flag]

    @classmethod
    def beginning(cls, judge: Judge, known: Tensor | None, flags: list[Flag]) -> Best:
        """Return the state before any attack; known: the logits of the images, None if the model draws."""
        x, y = judge.order.x, judge.order.y
        nowhere = torch.zeros(len(x), dtype=x.dtype, device=x.device)
        if known is None:
            clean_correct, margin = ~judge.wrong(x), nowhere
        else:
            clean_correct, margin = answers(known) == y, margin_loss(known, y, judge.order.targets)
        reach = torch.where(clean_correct, torch.inf, nowhere)
        outcome = Scored(x, nowhere, torch.zeros_like(clean_correct), reach, margin)
        return cls(judge, clean_correct, margin, outcome, flags)

    @property
    def order(self) -> Order:
        """Return the attack with its images."""
        return self.judge.order

    def open(self) -> Tensor:
        """Return the images (N,) that another way of attacking could still improve."""
        distances = self.outcome.distance
        return distances > 0 if self.order.threat.eps is None else torch.isinf(distances)

    def attack_(self, model: nn.Module, turn: int) -> Tensor:
        """Attack a model on the images still open, and keep better results; return the images (N,) that improved."""
        return self.add_(self.order(model, self.open(), turn))

    def add_(self, found: Tensor) -> Tensor:
        """Judge examples (N, ...) of the images still open, keep better ones, and return the images that improved."""
        rows = self.open().nonzero().squeeze(1)
        if len(rows) == 0:  # a user's network need not take an empty batch
            return torch.zeros_like(self.clean_correct)
        held = Scored(*(_taken(part, rows) for part in self.outcome))
        merged, more = better(held, self.judge(_taken(found, rows), rows))
        self.outcome = Scored(*(_put(old, rows, new) for old, new in zip(self.outcome, merged, strict=True)))
        return _put(torch.zeros_like(self.clean_correct), rows, more)

    def resize_(self) -> None:
        """Try the perturbations shorter and longer.

        A search on a model that draws ends at the boundary for its own few draws; for most draws it lies elsewhere.
        """
        x, found = self.order.x, self.outcome.x_adv
        for size in _SIZES:
            self.add_((x + size * (found - x)).clamp(0, 1))

    def flag_(self, way: str, gained: Tensor) -> None:
        """Flag masked gradients if a way around them improved notably many images."""
        more, attacked = int(gained.sum()), int(self.clean_correct.sum())
        if more >= max(2, NOTABLE * attacked):
            self.flags.append(Flag("masked-gradients", f"{way} does better on {more} of {attacked} images"))

    def violations(self, nonfinite: int) -> list[Flag]:
        """Return flags for images outside of box or budget, failed searches, and logits that are not finite."""
        flags, eps = [], self.order.threat.eps
        low, high = self.outcome.x_adv.aminmax()  # no copy of all images
        beyond = float(torch.maximum(-low, high - 1).clamp(min=0))
        if not beyond <= TOLERANCE:
            flags.append(Flag("box-violation", f"by up to {beyond:.2g}"))
        if eps is not None:
            excess = float((self.outcome.moved - eps).max())
            # Rounding of a norm grows with its size.
            if not excess <= TOLERANCE * max(1.0, eps):
                flags.append(Flag("budget-violation", f"by up to {excess:.2g}"))
        elif failed := int(torch.isinf(self.outcome.distance).sum()):
            detail = f"on {failed} images, whose distance is infinite; take more steps, or another attack"
            flags.append(Flag("unfinished-search", detail))
        if nonfinite:
            detail = f"for {nonfinite} images, in any pass; look for divisions and exponentials in the model"
            flags.append(Flag("nonfinite-logits", detail))
        return flags


def attack_single_draws(best: Best, probe: Probe) -> None:
    """Attack a model that draws with single passes: what the expectation finds in addition, randomness had hidden."""
    draws, probe.draws = probe.draws, 1
    best.attack_(probe, SINGLE)
    probe.draws = draws


def attack_itself(best: Best, probe: Probe, *, random: bool) -> None:
    """Attack the model, or its expectation over draws.

    A point that fools one set of draws need not fool another: images not fooled are attacked four more times.
    """
    gained = torch.zeros_like(best.clean_correct)
    for turn in range(PLAIN, PLAIN + (5 if random else 1)):
        gained |= best.attack_(probe, turn)
    if random:
        if best.order.threat.eps is None:
            best.resize_()
        best.flag_("the expectation over draws", gained)


def attack_straight_through(best: Best, probe: Probe, model: nn.Module) -> None:
    """Attack through the backward pass that layers which mask gradients declare."""
    probe.model, probe.hand = model, None
    with straight_through(model, best.order.x[:1]):
        found = best.order(probe, best.open(), STRAIGHT)
    best.flag_("a straight-through backward pass", best.add_(found))


def attack_by_differences(best: Best, probe: Probe, model: nn.Module, blind: Tensor) -> None:
    """Attack by finite differences at pixels whose effect the gradient misses."""
    probe.model, probe.hand = (differences := Differences(model, blind)), None
    best.flag_("a gradient by finite differences", best.attack_(probe, DIFFERENCES))
    probe.forwards += differences.passes


def transfer(best: Best, lenders: Mapping[str, Probe], lent: Mapping[str, Sequence[Tensor]]) -> None:
    """Try the examples of other models, attacked here or lent."""
    loans: list[tuple[str, Iterable[Tensor]]] = [
        (name, best.order.loans(lender, best.open)) for name, lender in lenders.items()
    ]
    x = best.order.x
    for name, examples in (*loans, *lent.items()):
        gained = torch.zeros_like(best.clean_correct)
        for found in examples:
            gained |= best.add_(torch.where(column(best.open(), x), found, x))
        best.flag_(f"transfer from {name}", gained)


# On a CPU a larger batch is no faster. Gradients that share a backward pass are copied inside operations, uncounted.
_CPU_BYTES, _COPIED, _MOST = 512 * 2**20, 1.2, 1024
# The most images that a check runs at once: if these and all attacked images fit, nothing more needs measuring.
_CHECKED = 256


def need_of(
    model: nn.Module, x: Tensor, *, rows: int = 1, draws: int = 1, enough: Callable[[Need], bool] | None = None
) -> Need:
    """Return the memory that an attack needs, measured on one forward and backward pass of a model in eval mode.

    rows: gradients of an image in one backward pass (`AttackFacts.together`); draws: passes in an average. `enough`: as
    in `measured`.
    """

    def work(images: Tensor) -> None:
        def weigh(logits: Tensor) -> Tensor:
            together = min(rows, logits.shape[1] - 1, ROWS_AT_ONCE)
            return torch.ones_like(logits) if together < 2 else logits.new_ones((together, *logits.shape))

        logits_and_pull(model, images, weigh)

    def whole(need: Need) -> Need:
        each = need.each * (_COPIED if rows > 1 else 1.0) + _COPIES * x[0].numel() * x.element_size()
        return replace(need, each=int(draws * each))

    return whole(measured(work, x, enough=enough and (lambda bound: enough(whole(bound)))))


def images_at_once(need: Need, free: int, device: torch.device, *, most: int = _MOST) -> int:
    """Return the batch size of an attack: what fits in half of the free memory, on a CPU in at most 512 MiB.

    Raise UserError if not even one image fits.
    """
    need.check(1, free, "an attack")
    return need.fitting(min(free // 2, _CPU_BYTES) if device.type == "cpu" else free // 2, most=most)


def batch_size_for(model: nn.Module, x: Tensor, *, rows: int = 1, draws: int = 1) -> int:
    """Return the batch size of an attack on a model, 1 to 1024; see `need_of` and `images_at_once`."""
    free = free_memory(x.device)

    def plenty(need: Need) -> bool:
        return need.of(1) <= free and images_at_once(need, free, x.device) >= max(len(x), _CHECKED)

    return images_at_once(need_of(model, x, rows=rows, draws=draws, enough=plenty), free, x.device)


def check_batch(model: nn.Module, x: Tensor, attack: Attack, threat: Threat, batch_size: int) -> None:
    """Raise UserError, with the numbers, if batches of that size, one for each thread, do not fit into free memory."""
    size = min(batch_size, len(x))
    threads, rows = min(_threads_for(x), -(-len(x) // size)), facts_of(attack).together(threat.eps)
    need_of(model, x, rows=rows, draws=threads).check(size, free_memory(x.device), "an attack")
