"""Local optimality of minimum-norm attacks (AttackBench, Cinà et al. 2025), with peers at 2,000 passes an image.

    python benchmarks/optimality.py [--json] [--networks lenet-300-100:200,lenet-5-p95:50,cnn.safetensors:40,...]
        [--norms l2] [--only nearest,DDN] [--data-dir DIR]

LO = (a·e − mean min(d, e)) / (a·e − mean d*): a is the share of images classified correctly, d an
attack's distance (0 where the network is wrong, infinite where the attack fails), d* the least that any attack of the
pool reached, e the largest d*. Means are over all images. `returned` judges what an attack returns on a fresh pass,
`seen` the nearest adversarial point it ever put to the network. A pass is an image's forward pass with the gradient of
one output; a Jacobian of K rows is K. `gain` is our LO less the peer's with its 95% interval (paired bootstrap over
images). Networks are those of `trained.py` with a number of images, or a file of weights of the TRADES paper's small
MNIST network. Distances are kept by the hash of weights and images in --cache, so that a stopped run can be
resumed. Peers: `pip install foolbox numba; pip install --no-deps adv-lib`; without one of them a row is not `valid`.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from peers import adv_lib, can_import, foolbox
from sparring import data
from sparring.attacks import ddn, fab, facts_of, nearest, run, sigma_zero
from sparring.declared import Declared
from sparring.files import load_tensors, pack_tensors, save_tensors, sha256_bytes
from sparring.threat import L0, L1, L2, LINF, Threat, distance, norm_name, parse_norm
from trained import NETWORKS, Trained, trained

OURS: dict[str, Callable[..., Tensor]] = {
    "nearest": nearest,
    "ddn-2000": partial(ddn, steps=2000),
    "fab": partial(fab, steps=100),
    "sigma-zero": sigma_zero,
}
_BB = "{}BrendelBethgeAttack"
# By library and norm. FAB, DeepFool and its kin pay for ten gradients where others pay for one.
PEERS: dict[str, dict[float, Callable[..., Tensor]]] = {
    "adv_lib DDN": {L2: partial(adv_lib, name="ddn", steps=2000, levels=None)},
    "adv_lib FMN": {p: partial(adv_lib, name="fmn", norm=p, steps=2000) for p in (L0, L1, L2, LINF)},
    "adv_lib sigma-zero": {L0: partial(adv_lib, name="sigma_zero", num_steps=2000)},
    "adv_lib APGD": {L1: partial(adv_lib, name="auto_pgd.minimal_apgd", norm=1, max_eps=100.0)},
    "adv_lib PDGD": {
        L2: partial(adv_lib, name="pdgd", num_steps=2000),
        **{p: partial(adv_lib, name="pdpgd", norm=p, num_steps=2000) for p in (L1, LINF)},
    },
    "adv_lib ALMA": {p: partial(adv_lib, name="alma", distance=norm_name(p), num_steps=2000) for p in (L1, L2)},
    "adv_lib SuperDeepFool": {L2: partial(adv_lib, name="sdf")},
    "adv_lib FAB": {p: partial(adv_lib, name="fab", norm=p, n_iter=200) for p in (L1, L2, LINF)},
    "foolbox DDN": {L2: partial(foolbox, name="DDNAttack", steps=2000)},
    "foolbox EAD": {L1: partial(foolbox, name="EADAttack", steps=400, binary_search_steps=5, initial_const=0.1)},
    "foolbox BB": {
        L1: partial(foolbox, name=_BB.format("L1"), steps=1900),
        L2: partial(foolbox, name=_BB.format("L2"), steps=1900),
        LINF: partial(foolbox, name=_BB.format("Linfinity"), steps=1900),
    },
}


class Watched(nn.Module):
    """A network that counts passes by image and keeps the nearest adversarial point it is shown for each clean one."""

    def __init__(self, model: nn.Module, x: Tensor, y: Tensor, norm: float) -> None:
        super().__init__()
        self.model, self.x, self.y, self.norm = model, x, y, norm
        self.forwards = self.backwards = 0
        self.seen = torch.full((len(x),), torch.inf, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.model(x)
        self.forwards += len(x)
        if logits.requires_grad:
            logits.register_hook(self._count)
        self._look(x.detach().float(), logits.detach())
        return logits

    def _count(self, gradient: Tensor) -> None:
        self.backwards += len(gradient)

    def _look(self, x: Tensor, logits: Tensor) -> None:
        # Images that left an attack are found again as the nearest clean one: the point counts for that one anyway.
        rows = torch.arange(len(x)) if len(x) == len(self.x) else torch.cdist(x.flatten(1), self.x.flatten(1)).argmin(1)
        found = reached(x, self.x[rows], self.y[rows], logits, self.norm)
        self.seen.scatter_reduce_(0, rows, found, "amin")


def reached(x_adv: Tensor, x: Tensor, y: Tensor, logits: Tensor, norm: float) -> Tensor:
    """Return the distance of each point that is wrong and inside the box, infinity of others."""
    wrong = logits.argmax(1) != y
    wrong &= (x_adv.clamp(0, 1) - x_adv).abs().flatten(1).amax(1) <= 1e-6
    return torch.where(wrong, distance(x_adv.double() - x.double(), norm), torch.inf)


class Reached(NamedTuple):
    """Distances (N,) of an attack, as returned and as seen on its way; passes an attacked image, processor seconds."""

    returned: Tensor
    seen: Tensor
    passes: Tensor
    seconds: Tensor


def attacked(attack: Callable[..., Tensor], ours: bool, model: nn.Module, x: Tensor, y: Tensor, norm: float) -> Reached:
    """Run an attack on the images that the network classifies correctly; the others are at distance 0."""
    right = predicted(model, x).eq(y)
    watched = Watched(model, x[right], y[right], norm).eval()
    torch.manual_seed(0)
    begin = time.process_time()
    if ours:
        result = run(watched, x[right], y[right], attack, Threat(norm), generator=torch.Generator().manual_seed(0))
        found, passes = result.x_adv, max(result.forwards, result.backwards)
    else:
        found = attack(watched, x[right], y[right]).detach()
        passes = max(watched.forwards, watched.backwards) / max(len(found), 1)
    spent = time.process_time() - begin
    returned = torch.zeros(len(x), dtype=torch.float64)
    seen = returned.clone()
    with torch.no_grad():
        returned[right] = reached(found, x[right], y[right], model(found), norm)
    seen[right] = torch.minimum(watched.seen, returned[right])
    return Reached(returned, seen, torch.tensor(passes), torch.tensor(spent))


def predicted(model: nn.Module, x: Tensor) -> Tensor:
    """Return the classes of images."""
    with torch.no_grad():
        return torch.cat([model(part).argmax(1) for part in x.split(256)])


def pool_of(model: nn.Module, x: Tensor, y: Tensor, norm: float, only: set[str], cache: Path) -> dict[str, Reached]:
    """Return what each attack of the pool reached, from the cache where it ran before."""
    images = sha256_bytes(pack_tensors({**model.state_dict(), "/x": x}))[:16]
    contestants: dict[str, tuple[Callable[..., Tensor], bool, str]] = {}
    for name, attack in OURS.items():
        if norm_name(norm) in facts_of(attack).norms:
            contestants[name] = (attack, True, f"revision{facts_of(attack).revision}")
    for name, by_norm in PEERS.items():
        library = name.split()[0]
        if norm in by_norm and can_import(library):
            version = importlib.metadata.version(library.replace("_", "-"))
            contestants[name] = (by_norm[norm], False, version)
    pool = {}
    for name, (attack, ours, version) in contestants.items():
        if only and name not in only:
            continue
        path = cache / "optimality" / f"{images}-{norm_name(norm)}-{name.replace(' ', '-')}-{version}.safetensors"
        if not path.exists():
            try:
                save_tensors(path, attacked(attack, ours, model, x, y, norm)._asdict())
            except Exception as error:  # a peer may raise anything: the row then lacks it, and says so
                print(f"{name}: {type(error).__name__}: {error}", flush=True)
                continue
        pool[name] = Reached(**load_tensors(path))
    return pool


def rows_of(pool: dict[str, Reached], norm: float) -> list[dict[str, object]]:
    """Return a row for each attack of a pool; see the head of the file."""
    best = torch.stack([part for one in pool.values() for part in (one.returned, one.seen)]).amin(0)
    end = float(best[best.isfinite()].max())
    failed = best.isinf().nonzero().flatten().tolist()
    right, best = best > 0, best.clamp_max(end)
    whole = right * end - best

    def optimality(d: Tensor, rows: Tensor) -> Tensor:
        return (right * end - d.clamp_max(end))[rows].sum(-1) / whole[rows].sum(-1)

    every = torch.arange(len(best))
    draws = torch.randint(len(best), (2000, len(best)), generator=torch.Generator().manual_seed(0))
    found, mine = [], pool.get("nearest")
    for name, one in pool.items():
        over = (one.returned / best)[right] - 1
        row: dict[str, object] = {
            "attack": name,
            "returned": round(float(optimality(one.returned, every)), 5),
            "seen": round(float(optimality(one.seen, every)), 5),
            "success": round(float(one.returned[right].isfinite().double().mean()), 4),
            "excess": round(float(over.mean()), 5),
            "excess_95": round(float(over.quantile(0.95, interpolation="higher")), 5),
            "passes": round(float(one.passes)),
            "seconds": round(float(one.seconds), 1),
        }
        if mine is not None and one is not mine:
            gains = (optimality(mine.returned, draws) - optimality(one.seen, draws)).quantile(
                torch.tensor([0.025, 0.975], dtype=torch.float64)
            )
            row["gain"] = [round(float(value), 5) for value in gains]
        found.append(row)
    lacking = [name for name, by_norm in PEERS.items() if norm in by_norm and name not in pool]
    about = {"valid": not lacking, "missing": lacking, "unreached": failed, "mean": float(best.mean()), "e": end}
    return [{**row, **about} for row in found]


def small_cnn(path: Path) -> nn.Module:
    """Return the TRADES paper's MNIST network with the weights in a file."""

    def block(first: int, width: int) -> list[nn.Module]:
        return [nn.Conv2d(first, width, 3), nn.ReLU(), nn.Conv2d(width, width, 3), nn.ReLU(), nn.MaxPool2d(2)]

    head = [nn.Flatten(), nn.Linear(1024, 200), nn.ReLU(), nn.Linear(200, 200), nn.ReLU(), nn.Linear(200, 10)]
    model = nn.Sequential(*block(1, 32), *block(32, 64), *head)
    tensors = load_tensors(path)
    names = sorted({name.rpartition(".")[0] for name in tensors}, key=lambda name: ("conv" not in name, name))
    layers = [layer for layer in model if isinstance(layer, nn.Conv2d | nn.Linear)]
    for layer, name in zip(layers, names, strict=True):
        layer.load_state_dict({part: tensors[f"{name}.{part}"] for part in ("weight", "bias")})
    return model.eval()


def network_of(name: str, options: argparse.Namespace) -> Trained:
    """Return a network of `trained.py`, or the one in a file."""
    if not name.endswith(".safetensors"):
        return trained(name, options.data_dir, options.cache)
    return Trained(small_cnn(Path(name)), data.load("mnist", options.data_dir), math.nan)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print rows as JSON, when all are done")
    every = ",".join(f"{name}:200" for name in NETWORKS)
    parser.add_argument("--networks", default=every, help="NAME:IMAGES by commas")
    parser.add_argument("--norms", default="l2,linf", help="by commas, of l0, l1, l2, linf")
    parser.add_argument("--only", default="", help="attacks by commas; the best of these is d*")
    parser.add_argument("--data-dir", type=Path, help="where MNIST and CIFAR-10 are")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "sparring" / "benchmarks")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    rows = []
    for name, _, images in (part.partition(":") for part in options.networks.split(",")):
        network = network_of(name, options)
        for module in network.model.modules():
            if isinstance(module, Declared) and module.masks_gradients:
                module.straight_through = True
        for parameter in network.model.parameters():
            parameter.requires_grad_(False)
        test, count = network.dataset.test, int(images or 200)
        x, y = data.as_float(test.x[:count]), test.y[:count]
        for norm in map(parse_norm, options.norms.split(",")):
            only = set(filter(None, options.only.split(",")))
            pool = pool_of(network.model, x, y, norm, only, options.cache)
            for row in rows_of(pool, norm):
                rows.append({"network": Path(name).stem, "norm": norm_name(norm), "images": count, **row})
                if not options.json:
                    print("  ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)
    if options.json:
        print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
