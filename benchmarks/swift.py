"""What `swift` misses of `standard`, and how much faster it is, on small convolutional networks.

    python benchmarks/swift.py [--json] [--images 1000] [--only mnist-pgd,...] [--data-dir DIR]

Networks of about 100,000 multiplications are trained on MNIST and CIFAR-10 (JPEG copy), ordinarily, adversarially
(PGD) and with TRADES. The first test images are attacked at the eps given, in linf, by `swift`; those that remain
correct are standing images, and `standard` attacks these alone. An image that it fools is lost. `limit` is the upper
95% limit of the share lost (Clopper & Pearson 1934, one-sided): 0 of 3,000 gives 0.1%. `ratio` is the processor time of
`standard` over that of `swift` on the first standing images.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from scipy import special
from torch import Tensor, nn

from sparring import data
from sparring.attacks import AttackResult, run, standard, swift
from sparring.files import load_tensors, save_tensors
from sparring.models import Normalise
from sparring.threat import LINF, Threat
from sparring.train import Loss, Ramped, Recipe, adversarial, cross_entropy, fit, trades

_TIMED = 20  # standing images


class Network(NamedTuple):
    """How a network is trained, and the eps at which it is attacked."""

    data: str
    loss: Loss | Ramped
    eps: float
    seed: int = 0


def ramped(loss: Callable[..., Loss], eps: float) -> Ramped:
    """Return a loss whose eps grows over the first half of training; small networks end constant without that."""
    return Ramped(lambda share: loss(eps=eps * min(1.0, 2 * share)))


NETWORKS = {
    "mnist": Network("mnist", cross_entropy, 0.06),
    "mnist-s1": Network("mnist", cross_entropy, 0.06, 1),
    "mnist-pgd": Network("mnist", ramped(adversarial, 0.1), 0.1),
    "mnist-trades": Network("mnist", ramped(trades, 0.1), 0.1),
    "cifar": Network("cifar10-jpeg.zip", cross_entropy, 1 / 255),
    "cifar-pgd": Network("cifar10-jpeg.zip", ramped(adversarial, 4 / 255), 4 / 255),
    "cifar-trades": Network("cifar10-jpeg.zip", ramped(trades, 4 / 255), 4 / 255),
}


def built(dataset: data.Dataset, seed: int) -> nn.Module:
    """Return an untrained network of two convolutions and one matrix."""
    torch.manual_seed(seed)
    channels, side = dataset.train.x.shape[1], dataset.train.x.shape[2]
    last = ((side - 5) // 2 + 1 - 5) // 2 + 1
    body = [nn.Conv2d(channels, 8, 5, stride=2), nn.ReLU(), nn.Conv2d(8, 16, 5, stride=2), nn.ReLU(), nn.Flatten()]
    return nn.Sequential(Normalise(dataset.mean, dataset.std), *body, nn.Linear(16 * last**2, dataset.classes))


def trained(name: str, root: Path | None, cache: Path) -> tuple[nn.Module, data.Dataset]:
    """Return a network in eval mode, from the cache where it has been trained before, with its data."""
    made = NETWORKS[name]
    dataset = data.load(made.data, root)
    model, path = built(dataset, made.seed), cache / f"swift-{name}.safetensors"
    if path.exists():
        model.load_state_dict(load_tensors(path))
    else:
        few = data.Split(dataset.train.x[:20000], dataset.train.y[:20000])
        recipe = Recipe(optimizer="adam", lr=2e-3, weight_decay=0.0, epochs=4, batch_size=128)
        fit(model, *few, recipe, seed=made.seed, loss=made.loss)
        save_tensors(path, model.state_dict())
    return model.eval(), dataset


def timed(model: nn.Module, x: Tensor, y: Tensor, attack: object, threat: Threat) -> tuple[AttackResult, float]:
    """Return what an attack finds from the same random numbers, and its processor seconds."""
    begin = time.process_time()
    result = run(model, x, y, attack, threat, generator=torch.Generator().manual_seed(0))  # type: ignore[arg-type]
    return result, time.process_time() - begin


def row_of(name: str, count: int, root: Path | None, cache: Path) -> dict[str, object]:
    """Return what `swift` misses on a network."""
    model, dataset = trained(name, root, cache)
    threat = Threat(LINF, NETWORKS[name].eps)
    x, y = data.as_float(dataset.test.x[:count]), dataset.test.y[:count]
    quick, seconds = timed(model, x, y, swift, threat)
    standing = quick.clean_correct & ~quick.success
    slow, more = timed(model, x[standing], y[standing], standard, threat)
    few = standing.nonzero().squeeze(1)[:_TIMED]
    ratio = timed(model, x[few], y[few], standard, threat)[1] / timed(model, x[few], y[few], swift, threat)[1]
    return {
        "network": name,
        "accuracy": float(quick.clean_correct.double().mean()),
        "standing": int(standing.sum()),
        "lost": int(slow.success.sum()),
        "ratio": round(ratio, 2),
        "seconds": [round(seconds, 1), round(more, 1)],
    }


def limit(lost: int, standing: int) -> float:
    """Return the upper 95% limit of the share lost."""
    return float(special.betaincinv(lost + 1, max(1, standing - lost), 0.95))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print rows as JSON, when all are done")
    parser.add_argument("--images", type=int, default=1000, help="of each network")
    parser.add_argument("--only", default=",".join(NETWORKS), help="networks by commas")
    parser.add_argument("--data-dir", type=Path, help="where MNIST and CIFAR-10 are")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "sparring" / "benchmarks")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for name in options.only.split(","):
        rows.append(row_of(name, options.images, options.data_dir, options.cache))
        if not options.json:
            print(rows[-1], flush=True)
    standing, lost = (sum(int(str(row[key])) for row in rows) for key in ("standing", "lost"))
    total = {"standing": standing, "lost": lost, "limit": limit(lost, standing)}
    print(json.dumps({"rows": rows, "total": total}, indent=1) if options.json else total)


if __name__ == "__main__":
    main()
