"""Attacks beside their peers: same images, same model, one thread, interleaved medians, every adversarial re-checked.

    python benchmarks/attacks.py [--json] [--works deepfool,nearest,...] [--images 500] [--rounds 3]

Peers that are not installed are skipped with a notice. The extra `peers` brings foolbox, ART and pyautoattack. Other
two need care: adv-lib (adversarial-library) imports torchvision, whose version must fit torch's, and requires visdom,
which no attack uses; torchattacks requires an old `requests`. Beside a fitting torchvision, tqdm and `requests`,
`pip install --no-deps adv-lib torchattacks` leaves everything else as it is.

MNIST is looked for as `sparring.data.load` does; the embedded extract stands in for it. Networks are trained once and
kept in --cache.
"""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from sparring import data, models
from sparring.attacks import apgd, cw, ddn, deepfool, nearest, pgd, run, standard
from sparring.attacks.derivatives import frozen
from sparring.errors import DataError
from sparring.threat import L2, LINF, Threat, distance

Attacker = Callable[[nn.Module, Tensor, Tensor], Tensor]


class Work(NamedTuple):
    """One line of the table: who competes at what, on how many images; eps None for minimum-norm work."""

    name: str
    network: str
    images: int
    eps: float | None
    ours: Attacker
    peers: dict[str, Attacker]
    slack: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print rows as JSON")
    parser.add_argument("--works", default="", help="only works whose names start with one of these, by commas")
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "sparring" / "benchmarks")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    rate = product_rate()
    rows = []
    chosen = tuple(filter(None, options.works.split(",")))
    for work in works(options.images):
        if chosen and not work.name.startswith(chosen):
            continue
        model, x, y = network(work.network, work.images, options.cache)
        rows += compete(work, model, x, y, options.rounds, rate)
        if not options.json:
            show([row for row in rows if (row["work"], row["network"]) == (work.name, work.network)])
    if options.json:
        print(json.dumps(rows, indent=1))


def compete(work: Work, model: nn.Module, x: Tensor, y: Tensor, rounds: int, rate: float) -> list[dict[str, object]]:
    """Return one row per contestant; raise SystemExit where our result is worse than a peer's."""
    contestants = {"sparring": work.ours, **work.peers}
    times: dict[str, list[float]] = {name: [] for name in contestants}
    reached: dict[str, tuple[float, float]] = {}
    with frozen(model):
        contestants["sparring"](model, x[:8], y[:8])
        for _ in range(rounds):
            for name, attack in contestants.items():
                start = time.perf_counter()
                x_adv = attack(model, x, y)
                times[name].append(time.perf_counter() - start)
                reached[name] = judge(model, x, x_adv.detach(), y, work.eps)
    check(work, reached)
    seconds = {name: statistics.median(values) for name, values in times.items()}
    best = min((value for name, value in seconds.items() if name != "sparring"), default=None)
    foolbox = seconds.get("foolbox")
    floor = floor_seconds(model, x[:1], rate) * len(x)
    return [
        {
            "work": work.name,
            "network": work.network,
            "who": name,
            "images": len(x),
            "seconds": round(seconds[name], 4),
            "mean_l2": round(reached[name][0], 5),
            "success": round(reached[name][1], 4),
            "over_best_peer": round(best / seconds[name], 2) if best else None,
            "over_foolbox": round(foolbox / seconds[name], 2) if foolbox else None,
            "over_floor": round(seconds[name] / floor, 1),
        }
        for name in contestants
    ]


def judge(model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor, eps: float | None) -> tuple[float, float]:
    """Return the mean l_2 distance of the successes and their share, on a fresh pass; outside box or budget none is."""
    assert float(x_adv.min()) >= -1e-6 and float(x_adv.max()) <= 1 + 1e-6
    with torch.no_grad():
        wrong = torch.cat([model(part) for part in x_adv.split(256)]).argmax(1) != y
    if eps is not None:
        wrong &= distance(x_adv - x, LINF) <= eps + 1e-6
    moved = distance(x_adv - x, L2)[wrong]
    return float(moved.mean()) if len(moved) else float("nan"), float(wrong.double().mean())


def check(work: Work, reached: dict[str, tuple[float, float]]) -> None:
    """Our success must be no smaller, and for minimum-norm work our mean at most (1 + slack) times the best peer's."""
    mean, success = reached["sparring"]
    for name, (peer_mean, peer_success) in reached.items():
        if success < peer_success - 0.0101:
            raise SystemExit(f"{work.name} on {work.network}: success {success:.3f}, {name} has {peer_success:.3f}")
        if (
            work.eps is None
            and peer_success > 0.99
            and mean > peer_mean * (1 + work.slack)
            and name == work_rival(work)
        ):
            raise SystemExit(f"{work.name} on {work.network}: mean {mean:.4f}, {name} has {peer_mean:.4f}")


def work_rival(work: Work) -> str:
    """Return the peer whose mean ours is held against: the first."""
    return next(iter(work.peers), "")


def works(images: int) -> list[Work]:
    """Return the table of the project's issue on attacks."""
    few = min(images, 200)
    ours = {name: partial(_ours, attack=attack) for name, attack in MINIMUM_NORM.items()}
    short = {name: partial(_ours, attack=partial(nearest, steps=steps)) for name, steps in STEPS.items()}
    table = [
        Work("deepfool", "lenet-300-100", images, None, ours["deepfool"], present(DEEPFOOL), 0.0),
        *(
            Work("minimum-norm", name, count, None, short[name], present(DDN), 0.002)
            for name, count in (("lenet-300-100", images), ("lenet-300-100-p95", images), ("lenet-5", few))
        ),
        Work("ddn", "lenet-300-100", images, None, ours["ddn"], present(DDN), 0.002),
        Work("cw", "lenet-300-100", few, None, ours["cw"], present(CARLINI_WAGNER), 0.002),
    ]
    budget = {
        "pgd-40": (partial(pgd, steps=40), PGD, images),
        "apgd-100": (apgd, APGD, images),
        "standard": (standard, AUTOATTACK, few),
    }
    for name, (attack, peers, count) in budget.items():
        bound = {who: partial(peer, eps=EPS) for who, peer in present(peers).items()}
        table.append(Work(name, "lenet-300-100", count, EPS, partial(_ours, attack=attack, eps=EPS), bound, 0.0))
    return table


EPS = 0.07
STEPS = {"lenet-300-100": 20, "lenet-300-100-p95": 20, "lenet-5": 40}
MINIMUM_NORM = {"deepfool": deepfool, "ddn": ddn, "cw": cw}


def _ours(model: nn.Module, x: Tensor, y: Tensor, *, attack: Callable[..., Tensor], eps: float | None = None) -> Tensor:
    threat = Threat(L2) if eps is None else Threat(LINF, eps)
    return run(model, x, y, attack, threat, generator=torch.Generator().manual_seed(0)).x_adv


def _adv_lib(model: nn.Module, x: Tensor, y: Tensor, *, name: str, **options: object) -> Tensor:
    eps = options.pop("eps", None)
    attack = getattr(importlib.import_module("adv_lib.attacks"), name)
    if name == "pgd_linf":
        return attack(model, x, y, eps, **options)
    if name == "apgd":
        return attack(model, x, y, eps, float("inf"), **options)
    return attack(model, x, y, **options)


def _foolbox(
    model: nn.Module, x: Tensor, y: Tensor, *, name: str, eps: float | None = None, **options: object
) -> Tensor:
    foolbox = importlib.import_module("foolbox")
    wrapped = foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu")
    return getattr(foolbox.attacks, name)(**options)(wrapped, x, y, epsilons=eps)[1]


def _art(model: nn.Module, x: Tensor, y: Tensor, *, name: str, eps: float | None = None, **options: object) -> Tensor:
    evasion = importlib.import_module("art.attacks.evasion")
    estimators = importlib.import_module("art.estimators.classification")
    wrapped = estimators.PyTorchClassifier(
        model, nn.CrossEntropyLoss(), tuple(x.shape[1:]), 10, clip_values=(0, 1), device_type="cpu"
    )
    if eps is not None:
        options |= {"eps": eps}
    made = getattr(evasion, name)(wrapped, batch_size=len(x), verbose=False, **options)
    return torch.from_numpy(made.generate(x.numpy(), y.numpy()))


def _torchattacks(model: nn.Module, x: Tensor, y: Tensor, *, eps: float) -> Tensor:
    return importlib.import_module("torchattacks").AutoAttack(model, norm="Linf", eps=eps, n_classes=10)(x, y)


def _pyautoattack(model: nn.Module, x: Tensor, y: Tensor, *, eps: float) -> Tensor:
    attack = importlib.import_module("pyautoattack").AutoAttack(model, norm="Linf", eps=eps, seed=0)
    found = attack.run_standard_evaluation(x, y, batch_size=len(x))
    return found[0] if isinstance(found, tuple) else found


# Contestants by module; options are the settings in which each does best.
DEEPFOOL = {
    "adv_lib": partial(_adv_lib, name="df", steps=50),
    "foolbox": partial(_foolbox, name="L2DeepFoolAttack", steps=50, candidates=10),
    "art": partial(_art, name="DeepFool", max_iter=50),
}
DDN = {
    "adv_lib": partial(_adv_lib, name="ddn", steps=100),
    "foolbox": partial(_foolbox, name="DDNAttack", steps=100),
}
CARLINI_WAGNER = {
    "adv_lib": partial(_adv_lib, name="carlini_wagner_l2", max_iterations=1000),
    "foolbox": partial(_foolbox, name="L2CarliniWagnerAttack", steps=1000),
}
PGD = {
    "adv_lib": partial(_adv_lib, name="pgd_linf", steps=40),
    "foolbox": partial(_foolbox, name="LinfPGD", steps=40),
}
APGD = {"adv_lib": partial(_adv_lib, name="apgd", loss_function="ce")}
AUTOATTACK = {"torchattacks": _torchattacks, "pyautoattack": _pyautoattack}


def present(peers: dict[str, Attacker]) -> dict[str, Attacker]:
    """Return the peers that are installed and say which are not."""
    found = {}
    for name, attack in peers.items():
        try:
            importlib.import_module(f"{name}.attacks" if name == "adv_lib" else name)
            found[name] = attack
        except ImportError as error:
            print(f"skipping {name}: {error}", file=sys.stderr)
    return found


def network(name: str, images: int, cache: Path) -> tuple[nn.Module, Tensor, Tensor]:
    """Return a trained network and the first test images that it classifies correctly."""
    try:
        dataset = data.load("mnist")
    except DataError:
        print("MNIST was not found; using the embedded extract mnist-5k", file=sys.stderr)
        dataset = data.load("mnist-5k")
    pruned = name.endswith("-p95")
    shape = tuple(dataset.train.x.shape[1:])
    kind = name.removesuffix("-p95")
    model = models.build(kind, shape=shape, classes=dataset.classes, mean=dataset.mean, std=dataset.std)
    path = cache / f"{dataset.name}-{name}.pt"
    if path.exists():
        model.load_state_dict(torch.load(path, weights_only=True))
    else:
        torch.manual_seed(0)
        for sparsity in (0.0, 0.8, 0.9, 0.95) if pruned else (0.0,):
            train(model, data.as_float(dataset.train.x), dataset.train.y, sparsity, epochs=3)
        cache.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), path)
    x, y = data.as_float(dataset.test.x[: 2 * images]), dataset.test.y[: 2 * images]
    with torch.no_grad():
        right = (model.eval()(x).argmax(1) == y).nonzero().squeeze(1)[:images]
    return model, x[right], y[right]


def train(model: nn.Module, x: Tensor, y: Tensor, sparsity: float, epochs: int) -> None:
    """Prune by global magnitude, then train with Adam and the mask held."""
    weights = [p for p in model.parameters() if p.dim() > 1]
    level = (
        torch.cat([w.detach().abs().flatten() for w in weights]).quantile(sparsity) if sparsity else torch.tensor(-1.0)
    )
    masks = [w.detach().abs() > level for w in weights]
    optimiser = torch.optim.Adam(model.parameters(), 1e-3)
    for _ in range(epochs):
        for rows in torch.randperm(len(x)).split(128):
            optimiser.zero_grad()
            nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
            optimiser.step()
            with torch.no_grad():
                for weight, mask in zip(weights, masks, strict=True):
                    weight.mul_(mask)


def product_rate() -> float:
    """Return the FLOP per second of a matrix product that fits into the cache."""
    a, b = torch.rand(512, 784), torch.rand(784, 300)
    times = []
    for _ in range(30):
        start = time.perf_counter()
        a @ b
        times.append(time.perf_counter() - start)
    return 2 * 512 * 784 * 300 / min(times)


def floor_seconds(model: nn.Module, x: Tensor, rate: float) -> float:
    """Return the time of one forward and one input-backward pass per image at that rate."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(x)
    return 2 * counter.get_total_flops() / rate


def show(rows: list[dict[str, object]]) -> None:
    for row in rows:
        print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)


if __name__ == "__main__":
    main()
