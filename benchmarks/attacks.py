"""Attacks beside their peers: same images, same model, one thread, interleaved medians, every adversarial re-checked.

    python benchmarks/attacks.py [--json] [--only deepfool,minimum-norm:lenet-5,...] [--data-dir DIR] [--device cuda]

Peers: `pip install 'sparring[peers]'` brings foolbox, ART and pyautoattack, `pip install --no-deps adv-lib
torchattacks requests` the other two as they are. What is not installed is skipped and named in the result. MNIST and
CIFAR-10 (or cifar10-jpeg.zip) are looked for in --data-dir, then as `sparring.data.load` does; the embedded extract of
MNIST stands in for either, and each row says what it ran on. Networks are trained once and kept in --cache.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from peers import PEERS, Attacker, missing, peers
from sparring.attacks import apgd, cw, ddn, deepfool, nearest, pgd, run, standard
from sparring.attacks._gradients import frozen
from sparring.threat import L2, LINF, Threat, distance
from trained import correct_images, trained


@dataclass(frozen=True)
class Work:
    """One line of the table: an attack of ours, and what it is held against.

    against: a kind of work in `peers.PEERS`; budget: it runs at an eps at which half the images stay robust; slack:
    how much larger than the best peer's our mean may be; asked and aim: times as fast as the fastest peer.
    """

    name: str
    network: str
    images: int
    attack: Callable[..., Tensor]
    against: str
    asked: float | None = None
    aim: float | None = None
    budget: bool = False
    slack: float = 1e-4

    @property
    def race(self) -> tuple[str, str, int, bool]:
        """Return what works must have in common to be timed together."""
        return self.network, self.against, self.images, self.budget


# Carlini and Wagner's attack with all nine rounds for every image; and with a search of c that begins where the
# linearised margin says, which is not the paper's.
ALL_ROUNDS, LINEARISED = partial(cw, precision=0.0), partial(cw, start_constant=None)


def _race(steps: int) -> Callable[..., Tensor]:
    """Return `nearest` from one start, with as many steps as the mean that a row asks for takes."""
    return partial(nearest, steps=steps, starts=0, polish=3)


WORKS = (
    Work("deepfool", "lenet-300-100", 500, deepfool, "deepfool", 1.6, 4.0),
    Work("minimum-norm", "lenet-300-100", 500, _race(18), "ddn", 2.4, 6.0),
    Work("ddn-100", "lenet-300-100", 500, ddn, "ddn", slack=0.002),
    Work("minimum-norm", "lenet-300-100-p95", 500, _race(12), "ddn", 1.5, 5.0, slack=0.002),
    Work("minimum-norm", "lenet-5", 200, _race(18), "ddn", 2.0, 5.0, slack=0.002),
    Work("minimum-norm", "resnet-20", 200, _race(18), "ddn", 3.0, 8.0, slack=0.002),
    Work("cw", "lenet-300-100", 200, cw, "cw", 2.5, 5.0, slack=0.002),
    Work("cw-all-rounds", "lenet-300-100", 200, ALL_ROUNDS, "cw", 2.5, 5.0, slack=0.002),
    Work("cw-linearised", "lenet-300-100", 200, LINEARISED, "cw", 2.5, 5.0, slack=0.002),
    Work("nearest-for-cw", "lenet-300-100", 200, _race(12), "cw", 300.0, 500.0, slack=0.0),
    Work("pgd-40", "lenet-300-100", 500, partial(pgd, steps=40), "pgd", 3.0, 5.0, budget=True),
    Work("apgd-100", "lenet-300-100", 500, apgd, "apgd", 3.0, 5.0, budget=True),
    Work("standard", "lenet-300-100", 200, standard, "autoattack", 2.0, 4.0, budget=True),
    # The same attacks on convolutional networks, for the comparison of results; nothing is asked of their times.
    Work("apgd-100", "lenet-5", 200, apgd, "apgd", budget=True),
    Work("deepfool", "resnet-20", 50, deepfool, "deepfool"),
    Work("pgd-40", "resnet-20", 100, partial(pgd, steps=40), "pgd", budget=True),
)


class Result(NamedTuple):
    """What one contestant reached over the rounds: median seconds; mean l2 distance of successes, and their share.

    error: the standard error of that share, 0 for one round: an attack that draws random numbers is another in each.
    """

    seconds: float
    mean_l2: float
    success: float
    error: float = 0.0

    def trails(self, other: Result) -> bool:
        """Return whether the other fools more images, beyond what the draws of random numbers explain."""
        return self.success < other.success - 2 * (self.error**2 + other.error**2) ** 0.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print rows as JSON, when all are done")
    parser.add_argument("--only", default="", help="works by commas, as NAME or NAME:NETWORK")
    parser.add_argument("--peers", default="", help="hold against these alone, by commas: adv_lib, foolbox, art, ...")
    parser.add_argument("--data-dir", type=Path, help="where MNIST and CIFAR-10 are")
    parser.add_argument("--images", type=int, default=500, help="at most so many a row")
    parser.add_argument("--rounds", type=int, default=3, help="at least so often each contestant")
    parser.add_argument("--seconds", type=float, default=20, help="more rounds, up to 15, while a race is this young")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "sparring" / "benchmarks")
    parser.add_argument("--device", default="cpu", help="where networks and images are: cpu, cuda or cuda:1")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    chosen = options.only.split(",") if options.only else [work.name for work in WORKS]
    works = [work for work in WORKS if {work.name, f"{work.name}:{work.network}"} & set(chosen)]
    if not works:
        parser.error(f"--only knows {', '.join(f'{work.name}:{work.network}' for work in WORKS)}")
    rows = []
    for _, together in groupby(works, key=lambda work: work.race):
        for row in race(list(together), options):
            rows.append(row)
            if not options.json:
                print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    if options.json:
        print(json.dumps(rows, indent=1))
    sys.exit(1 if any(row["worse_than"] for row in rows) else 0)


def race(works: list[Work], options: argparse.Namespace) -> list[dict[str, object]]:
    """Run works that have everything but our attack in common; return a row for each."""
    first = works[0]
    network = trained(first.network, options.data_dir, options.cache)
    x, y = (part.to(options.device) for part in correct_images(network, min(first.images, options.images)))
    with frozen(network.model.to(options.device)):
        eps = halving_eps(network.model, x, y) if first.budget else None
        invited = set(options.peers.split(",")) if options.peers else set(PEERS[first.against])
        rivals = {name: attack for name, attack in peers(first.against, eps).items() if name in invited}
        ours = {work.name: partial(_ours, attack=work.attack, eps=eps) for work in works}
        results = compete({**ours, **rivals}, network.model, x, y, eps, options.rounds, options.seconds)
    floor = floor_seconds(network.model.cpu(), x[:1].cpu()) * len(x)
    about = {
        "network": first.network,
        "data": network.dataset.name,
        "images": len(x),
        "eps": eps,
        "device": options.device,
    }
    beside = {name: results[name] for name in rivals}
    return [
        {
            "work": work.name,
            **about,
            **verdict(work, results[work.name], beside, floor),
            "missing": missing(first.against),
        }
        for work in works
    ]


def compete(
    contestants: dict[str, Attacker],
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    eps: float | None,
    rounds: int,
    young: float,
) -> dict[str, Result]:
    """Let contestants take turns, and judge what each returns.

    On the CPU times are the processor's: with one thread the same as the clock's, but little moved by what else runs.
    """
    times: dict[str, list[float]] = {name: [] for name in contestants}
    reached: dict[str, list[tuple[float, float]]] = {name: [] for name in contestants}
    for attack in contestants.values():
        attack(model, x[:4], y[:4])
    began = time.perf_counter()
    for turn in range(max(rounds, 15)):
        if turn >= rounds and time.perf_counter() - began > young:
            break
        for name, attack in contestants.items():
            torch.manual_seed(turn)
            start = seconds(x.device)
            x_adv = attack(model, x, y)
            times[name].append(seconds(x.device) - start)
            reached[name].append(judge(model, x, x_adv.detach(), y, eps))
    return {name: summary(times[name], reached[name]) for name in contestants}


def seconds(device: torch.device) -> float:
    """Return a time to subtract another from: the processor's, or the clock's when a GPU is done with its work."""
    if device.type != "cuda":
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()


def summary(times: list[float], reached: list[tuple[float, float]]) -> Result:
    """Return a contestant's result over its rounds, each with its mean distance and its share of successes."""
    means, shares = zip(*reached, strict=True)
    error = statistics.stdev(shares) / len(shares) ** 0.5 if len(shares) > 1 else 0.0
    return Result(statistics.median(times), statistics.fmean(means), statistics.fmean(shares), error)


def judge(model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor, eps: float | None) -> tuple[float, float]:
    """Return the mean l2 distance of the successes and their share, on a fresh pass; outside box or budget none is."""
    with torch.no_grad():
        wrong = torch.cat([model(part) for part in x_adv.split(256)]).argmax(1) != y
    wrong &= (x_adv.clamp(0, 1) - x_adv).abs().flatten(1).amax(1) <= 1e-6
    if eps is not None:
        wrong &= distance(x_adv - x, LINF) <= eps + 1e-6
    moved = distance(x_adv - x, L2)[wrong]
    return float(moved.mean()) if len(moved) else float("nan"), float(wrong.double().mean())


def verdict(work: Work, ours: Result, rivals: dict[str, Result], floor: float) -> dict[str, object]:
    """Return our result beside the peers': ratios of times, and the peers that reached more."""
    fastest = min((rival.seconds for rival in rivals.values()), default=None)
    foolbox = rivals["foolbox"].seconds if "foolbox" in rivals else None
    worse = [name for name, rival in rivals.items() if ours.trails(rival)]
    if not work.budget:
        most = max((rival.success for rival in rivals.values()), default=0.0)
        means = {name: rival.mean_l2 for name, rival in rivals.items() if rival.success == most}
        worse += [name for name, mean in means.items() if ours.mean_l2 > mean * (1 + work.slack)]
    return {
        "seconds": round(ours.seconds, 4),
        "mean_l2": round(ours.mean_l2, 5),
        "success": round(ours.success, 4),
        "over_best_peer": round(fastest / ours.seconds, 2) if fastest else None,
        "over_foolbox": round(foolbox / ours.seconds, 2) if foolbox else None,
        "over_floor": round(ours.seconds / floor, 1),
        "asked": work.asked,
        "aim": work.aim,
        "worse_than": worse,
        "peers": {name: rival._asdict() for name, rival in rivals.items()},
    }


def halving_eps(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Return an linf eps at which about half the images stay robust: the median of the smallest distances found."""
    found = run(model, x, y, partial(nearest, steps=50, starts=0), Threat(LINF)).distance
    return round(float(found.median()), 3)


def _ours(model: nn.Module, x: Tensor, y: Tensor, *, attack: Callable[..., Tensor], eps: float | None) -> Tensor:
    threat = Threat(L2) if eps is None else Threat(LINF, eps)
    return run(model, x, y, attack, threat, generator=torch.Generator().manual_seed(torch.initial_seed())).x_adv


def floor_seconds(model: nn.Module, x: Tensor) -> float:
    """Return the time of one forward and one input-backward pass per image at the rate of a product in the cache."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(x)
    a, b = torch.rand(512, 784), torch.rand(784, 300)
    times = []
    for _ in range(30):
        start = time.process_time()
        a @ b
        times.append(time.process_time() - start)
    return 2 * counter.get_total_flops() * min(times) / (2 * 512 * 784 * 300)


if __name__ == "__main__":
    main()
