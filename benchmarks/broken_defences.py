"""Freeze what an attack written for each broken defence reaches, and the passes it takes beside the default one's.

    python benchmarks/broken_defences.py [--json] [--only k-winners,...] [--write tests/attacks/broken_defences.json]

The defences and the LeNet-300-100 they are put on live in tests/attacks/broken_defences.py; the tests hold `fast`
against the numbers frozen here. `naive` is what FGSM and PGD on the cross-entropy (10 steps of eps/4) leave standing
when nobody looks further; `reference` is the adaptive attack's robust accuracy, `standing` the images behind it.

The budget is counted in forward passes per image that withstands everything, for both: the adaptive attack goes through
its ways again, with other seeds, until it has spent 20 times those of the default evaluation. A defence that draws is
broken where 101 passes vote so and 1,001 others confirm it, so that no lucky vote counts.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "attacks"))
from broken_defences import DEFENCES, EPS, defended, undefended
from sparring.attacks import AttackResult, apgd_targeted, dlr, fast, fgsm, pgd, robust_accuracy, run
from sparring.attacks.activations import dense_copy, is_stochastic
from sparring.attacks.derivatives import Probe, frozen
from sparring.attacks.losses import margin, scaled_cross_entropy
from sparring.files import write_json
from sparring.threat import LINF, Threat

# Votes that propose and confirm a success against a random defence, and passes whose logits its attack climbs together.
VOTES, CONFIRMED, DRAWS = 101, 1001, 40
# The reference's budget over the default evaluation's, and the most rounds it takes to spend that.
BUDGET, ROUNDS = 20, 50
LOSSES = (scaled_cross_entropy, margin, dlr)
NAIVE = {"fgsm": fgsm, "pgd": partial(pgd, steps=10, step_size=EPS / 4)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--only", default="", help="defences by commas")
    parser.add_argument("--write", type=Path, help="the file to update")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = json.loads(options.write.read_text()) if options.write and options.write.exists() else {}
    for name in options.only.split(",") if options.only else ("undefended", *DEFENCES):
        rows[name] = freeze(name)
        if not options.json:
            print(name, rows[name], flush=True)
        if options.write:
            write_json(options.write, rows)
    if options.json:
        print(json.dumps(rows, indent=1))


def freeze(name: str) -> dict[str, object]:
    """Return one row: clean, naive, default and reference accuracy, and the passes per image behind the last two."""
    model, x, y = undefended()
    network = model if name == "undefended" else defended(model, name)
    if name == "stochastic-pruning":
        x, y = x[:50], y[:50]
    with frozen(network):
        clean = right(network, x, y)
        naive = {
            attack: float((clean & right(network, found(method, network, x, y, 0), y)).double().mean())
            for attack, method in NAIVE.items()
        }
    default = evaluate(network, x, y)
    withstood = default.clean_correct & ~default.success
    cost = evaluate(network, x[withstood], y[withstood]).forwards
    with frozen(network):
        standing, passes = besiege(name, model, network, x, y, clean, budget=BUDGET * cost)
    return {
        "clean": round(float(clean.double().mean()), 4),
        "naive": {attack: round(value, 4) for attack, value in naive.items()},
        "default": round(robust_accuracy(default), 4),
        "reference": round(float(standing.double().mean()), 4),
        "passes": {"default": round(cost), "reference": round(passes)},
        "flags": sorted(flag.name for flag in default.flags),
        "standing": standing.nonzero().squeeze(1).tolist(),
    }


def evaluate(network: nn.Module, x: Tensor, y: Tensor) -> AttackResult:
    """Return what the default evaluation makes of a network."""
    return run(network, x, y, fast, Threat(LINF, EPS), generator=torch.Generator().manual_seed(0))


def right(network: nn.Module, x: Tensor, y: Tensor, votes: int = VOTES) -> Tensor:
    """Return which images most passes classify correctly; one pass decides where all are alike."""
    votes = votes if is_stochastic(network) else 1
    with torch.no_grad():
        return torch.stack([network(x).argmax(1) == y for _ in range(votes)]).double().mean(0) >= 0.5


def found(attack: Callable[..., Tensor], network: nn.Module, x: Tensor, y: Tensor, seed: int) -> Tensor:
    return attack(network, x, y, norm=LINF, eps=EPS, generator=torch.Generator().manual_seed(seed))


def besiege(
    name: str, model: nn.Sequential, network: nn.Sequential, x: Tensor, y: Tensor, standing: Tensor, *, budget: float
) -> tuple[Tensor, float]:
    """Return which images withstand every attack in turn, each on those still standing, and the passes per image that
    an image which withstands them all costs: at least the budget.
    """
    torch.manual_seed(0)
    standing, passes = standing.clone(), 0.0
    for turn in range(ROUNDS):
        for way, (climbed, attack) in enumerate(siege(name, model, network)):
            rows = standing.nonzero().squeeze(1)
            if len(rows) == 0:
                return standing, passes
            probe = Probe(climbed.eval(), draws=DRAWS if climbed is network and is_stochastic(network) else 1)
            x_adv = found(attack, probe, x[rows], y[rows], 1000 * turn + way)
            fooled = ~right(network, x_adv, y[rows])
            if is_stochastic(network) and bool(fooled.any()):
                fooled[fooled.clone()] = ~right(network, x_adv[fooled], y[rows][fooled], CONFIRMED)
            standing[rows] = ~fooled
            passes += probe.forwards / len(rows)
        if passes >= budget:
            return standing, passes
    raise SystemExit(f"{name}: {ROUNDS} rounds spent {passes:.0f} passes per image of {budget:.0f}")


def siege(name: str, model: nn.Sequential, network: nn.Sequential) -> Iterator[tuple[nn.Module, Callable[..., Tensor]]]:
    """Yield what is known to break a defence: networks to climb, and with which attack.

    k-winners, MeanSparse, staircase: the network with the ReLU's backward pass, the dense network's examples in
    plenty, and the gradient averaged over noise. Stochastic pruning: the dense network, which is its expectation, and
    the mean of 40 draws. Scaled and cut: the network without the scale or the cut, which has the same decisions, and
    every gradient.
    """
    long = [partial(pgd, steps=100, restarts=5, objective=loss) for loss in LOSSES]
    many = [partial(pgd, steps=40, objective=loss, stop_early=False) for loss in LOSSES for _ in range(5)]
    if name in ("undefended", "scaled-logits", "cut"):
        yield from ((model, attack) for attack in (*long, apgd_targeted))
    elif name == "stochastic-pruning":
        yield from ((model, attack) for attack in many)
        for loss in LOSSES:
            yield network, partial(pgd, steps=100, restarts=2, objective=loss)
    else:
        through = bridged(model, network)
        yield from ((through, attack) for attack in (*long, apgd_targeted))
        yield from ((dense_copy(network) or model, attack) for attack in many)
        yield from ((Blurred(network), partial(pgd, steps=30, objective=loss, stop_early=False)) for loss in LOSSES)


class Bridge(nn.Module):
    """A layer with the backward pass of the ReLU that it replaced."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        relu = x.clamp_min(0)
        return relu + (self.layer(x) - relu).detach()


class Blurred(nn.Module):
    """The mean over 20 noisy copies of each image: jumps become slopes."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        copies = x.repeat(20, 1, 1, 1)
        return self.network(copies + EPS / 4 * torch.randn_like(copies)).view(20, len(x), -1).mean(0)


def bridged(model: nn.Sequential, network: nn.Sequential) -> nn.Sequential:
    """Return the defended network with a bridge over every layer that replaced a ReLU of the undefended one."""
    return nn.Sequential(
        *(Bridge(now) if isinstance(once, nn.ReLU) else now for once, now in zip(model, network, strict=True))
    )


if __name__ == "__main__":
    main()
