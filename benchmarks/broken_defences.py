"""Freeze what an attack written for each broken defence reaches, and the passes it takes beside the default one's.

    python benchmarks/broken_defences.py [--json] [--only k-winners,...] [--seconds 150]
        [--write tests/attacks/broken_defences.json]
    python benchmarks/broken_defences.py --only mean-sparse --images 200 --seeds 5   # what `fast` leaves, seed by seed
    python benchmarks/broken_defences.py --train   # the convolutional network's weights, beside the tests

The defences and the LeNets they are put on live in tests/attacks/broken_defences.py; the tests hold `fast` against the
numbers frozen here. `naive` is what FGSM and PGD on the cross-entropy (10 steps of eps/4) leave standing when nobody
looks further; `reference` is the adaptive attack's robust accuracy.

The budget is counted in forward passes per image that no attack fools, for both: the adaptive attack goes through
its ways again, with other seeds, until it has spent 20 times those of the default evaluation. A defence that draws is
broken where 101 passes vote so and 1,001 others confirm it, so that no lucky vote counts.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.attacks.broken_defences import (
    DEFENCES,
    UNDEFENDED,
    WEIGHTS,
    Task,
    convolutional,
    defended,
    naive,
    right,
    task,
    train_,
)

from sparring.attacks import AttackResult, apgd_targeted, fast, nearest, pgd, robust_accuracy, run
from sparring.attacks._gradients import Probe, frozen
from sparring.attacks.algorithms._losses import dlr, margin_loss, scaled_cross_entropy
from sparring.attacks.evaluation._bpda import dense_copy, is_stochastic
from sparring.files import save_tensors, write_json
from sparring.threat import LINF, Threat

# Votes that confirm a success against a random defence, and passes whose logits its attack climbs together.
CONFIRMED, DRAWS = 1001, 40
# The reference's budget over the default evaluation's.
BUDGET = 20
LOSSES = (scaled_cross_entropy, margin_loss, dlr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--only", default="", help="defences by commas")
    parser.add_argument("--write", type=Path, help="the file to update")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="break off after that, with --write")
    parser.add_argument("--images", type=int, help="so many in place of the tests' few")
    parser.add_argument(
        "--seeds", type=int, help="print what the default evaluation leaves with each, and nothing else"
    )
    parser.add_argument("--train", action="store_true", help="train the convolutional network and keep its weights")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.train:
        network = convolutional()
        train_(network, epochs=5)
        save_tensors(WEIGHTS, network.state_dict())
        return
    breaks = Breaks(options.write, time.monotonic() + options.seconds)
    rows = json.loads(options.write.read_text()) if options.write and options.write.exists() else {}
    for name in options.only.split(",") if options.only else (*UNDEFENDED, *DEFENCES):
        here = task(name, options.images)
        if options.seeds:
            model = here.network if name in UNDEFENDED else defended(here.network, name)
            left = [robust_accuracy(evaluate(here._replace(network=model), seed)) for seed in range(options.seeds)]
            print(name, left, f"mean {sum(left) / len(left):.4f}", flush=True)
            continue
        rows[name] = freeze(name, here, breaks)
        if not options.json:
            print(name, rows[name], flush=True)
        if options.write:
            write_json(options.write, rows)
    if options.json:
        print(json.dumps(rows, indent=1))


class Siege(NamedTuple):
    """Which images stand, the passes that one of them has cost, and how many ways were tried."""

    standing: list[bool]
    passes: float
    tried: int


@dataclass(frozen=True)
class Breaks:
    """Where a siege is kept that was broken off, and when to do so."""

    file: Path | None
    until: float

    def resumed(self, name: str) -> Siege | None:
        kept = self._kept(name)
        return Siege(*json.loads(kept.read_text())) if kept and kept.exists() else None

    def pause(self, name: str, state: Siege) -> None:
        kept = self._kept(name)
        if kept and time.monotonic() > self.until:
            write_json(kept, list(state))
            raise SystemExit(
                f"{name}: broken off after {state.passes:.0f} passes per image; the next run goes on there"
            )

    def forget(self, name: str) -> None:
        kept = self._kept(name)
        if kept:
            kept.unlink(missing_ok=True)

    def _kept(self, name: str) -> Path | None:
        return self.file.with_suffix(f".{name}.part") if self.file else None


def freeze(name: str, undefended: Task, breaks: Breaks) -> dict[str, object]:
    """Return one row: clean, naive, default and reference accuracy, and the passes per image behind the last two."""
    model, x, y, eps = undefended
    here = undefended if name in UNDEFENDED else undefended._replace(network=defended(model, name))
    network = here.network
    with frozen(network):
        torch.manual_seed(0)
        clean = right(network, x, y)
        fooling = {
            attack: round(float((clean & right(network, found(method, network, here, 0), y)).double().mean()), 4)
            for attack, method in naive(eps).items()
        }
    default = evaluate(here)
    robust = default.clean_correct & ~default.success
    cost = evaluate(here._replace(x=x[robust], y=y[robust])).forwards
    with frozen(network):
        reached = besiege(name, model, here, clean, budget=BUDGET * cost, breaks=breaks)
    return {
        "images": len(x),
        "eps": eps,
        "clean": round(float(clean.double().mean()), 4),
        "naive": fooling,
        "default": round(robust_accuracy(default), 4),
        "reference": round(sum(reached.standing) / len(x), 4),
        "passes": {"default": round(cost), "reference": round(reached.passes)},
        "flags": sorted(flag.name for flag in default.flags),
    }


def evaluate(here: Task, seed: int = 0) -> AttackResult:
    """Return what the default evaluation makes of a network."""
    generator = torch.Generator().manual_seed(seed)
    return run(here.network, here.x, here.y, fast, Threat(LINF, here.eps), generator=generator)


def found(attack: Callable[..., Tensor], network: nn.Module, here: Task, seed: int) -> Tensor:
    """Return what an attack on one network, which may stand for the task's own, makes of the task's images."""
    generator = torch.Generator().manual_seed(seed)
    return attack(network, here.x, here.y, norm=LINF, eps=here.eps, generator=generator)


def besiege(name: str, model: nn.Sequential, here: Task, clean: Tensor, *, budget: float, breaks: Breaks) -> Siege:
    """Attack the remaining images in turn, until one that no attack fools has cost at least the budget."""
    network, x, y, _ = here
    state = breaks.resumed(name) or Siege(clean.tolist(), 0.0, 0)
    ways = list(siege(name, model, here))
    while state.passes < budget or state.tried % len(ways):
        breaks.pause(name, state)
        rows = torch.tensor(state.standing).nonzero().squeeze(1)
        if len(rows) == 0:
            break
        torch.manual_seed(state.tried)
        climbed, attack = ways[state.tried % len(ways)]
        probe = Probe(climbed.eval())
        x_adv = found(attack, probe, here._replace(x=x[rows], y=y[rows]), state.tried)
        fooled = ~right(network, x_adv, y[rows])
        if is_stochastic(network) and bool(fooled.any()):
            fooled[fooled.clone()] = ~right(network, x_adv[fooled], y[rows][fooled], CONFIRMED)
        standing = torch.tensor(state.standing)
        standing[rows] = ~fooled
        spent = probe.forwards / len(rows) * getattr(climbed, "copies", 1)
        state = Siege(standing.tolist(), state.passes + spent, state.tried + 1)
    breaks.forget(name)
    return state


def siege(name: str, model: nn.Sequential, here: Task) -> Iterator[tuple[nn.Module, Callable[..., Tensor]]]:
    """Yield what is known to break a defence: networks to climb, and with which attack.

    k-winners, MeanSparse, staircase: the network with the ReLU's backward pass, the dense network's examples in
    plenty, the gradient averaged over noise, and the network's own. Stochastic pruning: the dense network, which is its
    expectation, and the mean probabilities of 40 draws, to the end. Scaled and cut: the network without the scale or
    the cut, which has the same decisions, and every gradient.
    """
    network = here.network
    nearby: list[Callable[..., Tensor]] = [nearest]
    long: list[Callable[..., Tensor]] = [partial(pgd, steps=100, restarts=5, objective=loss) for loss in LOSSES]
    many = [partial(pgd, steps=40, objective=loss, stop_early=False) for loss in LOSSES for _ in range(5)]
    if name in (*UNDEFENDED, "scaled-logits", "cut"):
        yield from ((model, attack) for attack in (*long, apgd_targeted))
    elif name == "stochastic-pruning":
        yield from ((model, attack) for attack in many)
        for loss in LOSSES:
            yield Drawn(network), partial(pgd, steps=100, objective=loss, stop_early=False)
    else:
        through = bridged(model, network)
        yield from ((through, attack) for attack in (*long, apgd_targeted))
        yield from ((dense_copy(network) or model, attack) for attack in many)
        yield from (
            (Blurred(network, here.eps), partial(pgd, steps=30, objective=loss, stop_early=False)) for loss in LOSSES
        )
        yield from ((network, attack) for attack in (*nearby, *long, apgd_targeted))


class Bridge(nn.Module):
    """A layer with the backward pass of the ReLU that it replaced."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        relu = x.clamp_min(0)
        return relu + (self.layer(x) - relu).detach()


class Drawn(nn.Module):
    """The log of the mean probabilities over many draws of stochastic pruning: its gradient is that of the votes.

    (The mean logits are the dense network's.) Units are drawn independently here, which takes a fortieth of the time.
    """

    copies = DRAWS

    def __init__(self, network: nn.Sequential) -> None:
        super().__init__()
        place = next(place for place, part in enumerate(network) if is_stochastic(part))
        self.head, self.tail, self.samples = network[:place], network[place + 1 :], network[place].samples

    def forward(self, x: Tensor) -> Tensor:
        dense = self.head(x).clamp_min(0)
        share = (dense / dense.sum(1, keepdim=True).clamp_min(1e-30)).detach()
        kept = (1 - (1 - share) ** round(self.samples * dense.shape[1])).clamp_min(1e-30)
        hit = torch.rand(self.copies, *dense.shape) < kept
        return self.tail(dense * hit / kept).log_softmax(2).logsumexp(0)


class Blurred(nn.Module):
    """The mean over 10 noisy copies of each image: jumps become slopes."""

    copies = 10

    def __init__(self, network: nn.Module, eps: float) -> None:
        super().__init__()
        self.network, self.eps = network, eps

    def forward(self, x: Tensor) -> Tensor:
        copies = x.repeat(self.copies, 1, 1, 1)
        return self.network(copies + self.eps / 4 * torch.randn_like(copies)).view(self.copies, len(x), -1).mean(0)


def bridged(model: nn.Sequential, network: nn.Sequential) -> nn.Sequential:
    """Return the defended network with a bridge over every layer that replaced a ReLU of the undefended one."""
    return nn.Sequential(
        *(Bridge(now) if isinstance(once, nn.ReLU) else now for once, now in zip(model, network, strict=True))
    )


if __name__ == "__main__":
    main()
