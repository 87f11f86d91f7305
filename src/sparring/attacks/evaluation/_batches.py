"""Attack the images of a loader batch by batch, and join the results."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from ...draws import Draws
from ...errors import UserError
from ...outputs import check_module
from ...threat import Threat
from ...waiting import courteous
from ._run import AttackResult, Checked, attack_held, check_numbers, hold, seed_from
from ._sanity_checks import check_inputs, check_mode, check_threat
from ._scoring import Attack, Order


@courteous()
def run_batches(
    model: nn.Module,
    batches: Iterable[Sequence[Tensor]],
    attack: Attack,
    threat: Threat,
    *,
    surrogates: Mapping[str, nn.Module] | None = None,
    batch_size: int | None = None,
    generator: torch.Generator | None = None,
    draws: int = 10,
) -> AttackResult:
    """Attack pairs of images and labels as a DataLoader yields them, and return one result for all, as `run` does.

    Each batch is as x and y of `run`, on the device of the model, and the other arguments are those of `run`. The model
    is checked on the first batch in which it classifies an image correctly. Images draw by their numbers, counted over
    all batches. A flag of several batches is reported once, with the detail of the first.

    Raises UserError as `run` does, and for batches that are not pairs.
    """
    start = time.perf_counter()
    check_numbers(batch_size=1 if batch_size is None else batch_size, draws=draws)
    for network in (model, *(surrogates or {}).values()):
        check_module(network)
    parts: list[AttackResult] = []
    seed, first = seed_from(generator), 0
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        seen, others = Checked(check_mode(model)), None
        for batch in batches:
            x, y = check_inputs(*_pair(batch))
            check_threat(x, threat)
            if others is None:
                model, others = hold(stack, model, surrogates, x)
            source = Draws.of(seed, range(first, first + len(x)), x.device)
            order, first = Order(attack, threat, x, y, None, batch_size or 0, source), first + len(x)
            part, seen = attack_held(model, others, {}, order, None, draws, seen)
            parts.append(part)
    if not parts:
        raise UserError("there are no batches to attack")
    return _joined(parts, time.perf_counter() - start)


def _pair(batch: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    if isinstance(batch, list | tuple) and len(batch) == 2 and all(isinstance(part, Tensor) for part in batch):
        return batch[0], batch[1]
    raise UserError(f"a batch must be a pair of images and labels, not {type(batch).__name__}; map it to one: (x, y)")


def _joined(parts: Sequence[AttackResult], seconds: float) -> AttackResult:
    attacked = torch.tensor([int(part.clean_correct.sum()) for part in parts], dtype=torch.float64)
    share = attacked / attacked.sum().clamp(min=1)
    flags = {flag.name: flag for part in reversed(parts) for flag in reversed(part.flags)}
    return AttackResult(
        x_adv=torch.cat([part.x_adv for part in parts]),
        clean_correct=torch.cat([part.clean_correct for part in parts]),
        success=torch.cat([part.success for part in parts]),
        distance=torch.cat([part.distance for part in parts]),
        forwards=float(share @ torch.tensor([part.forwards for part in parts], dtype=torch.float64)),
        backwards=float(share @ torch.tensor([part.backwards for part in parts], dtype=torch.float64)),
        seconds=seconds,
        flags=tuple(reversed(flags.values())),
        batch_size=max(part.batch_size for part in parts),
    )
