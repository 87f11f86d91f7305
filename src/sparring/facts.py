"""Facts about attacks, bounds and models: plain data without torch, which every layer can read.

Each table has an entry for each name in the table of functions that it describes (a test holds them equal). All
other facts, and those about a user's own parts, are read from signatures and docstrings.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

__all__ = [
    "ATTACKS", "BOUNDS", "LIPSCHITZ", "MODELS", "NEVER", "OWN_ATTACK", "OWN_MODEL", "AttackFacts", "BoundFacts",
    "ModelFacts",
]  # fmt: skip


NEVER = 1.0  # a sparsity that no network has
_STEPWISE = {"convolutional": 0.5, "wide": 0.8}
_COSTLY = _STEPWISE | {"fully connected": 0.95}


@dataclass(frozen=True)
class AttackFacts:
    """Describe an attack.

    kind: with a budget, for the smallest perturbation (within a budget if given), or both. knowledge: what it sees of
    the model. single_step: one gradient step, which may not be enough. rank: on the same images and threat no attack
    does better than one of the same kind and of higher rank (None: not
    compared). passes: time per image over that of a forward-and-backward pass, between the values of LeNet-300-100
    and of LeNet-5 on MNIST, which differ by a factor of up to three. kernels: how sparse a network of each kind
    (`ModelFacts.layers`) must be for the attack to gain from packed kernels (benchmarks/RESULTS.md); a single step does
    not make up for packing. rows: input gradients of an image that share one backward pass, and memory, when it looks
    for the smallest perturbation.

    revision: raised when its results change, also for ensembles that contain it: stages with it are recomputed, and all
    other records keep their keys. Also raised separately: `lent`, if only results with transferred examples change;
    `drawn`, on networks that draw; `masked`, within a budget on networks whose layers mask gradients and do not draw.
    """

    title: str = ""
    source: str = ""
    kind: Literal["budget", "minimum-norm", "ensemble"] = "budget"
    norms: tuple[str, ...] = ("linf", "l2", "l1")
    knowledge: Literal["gradients", "logits", "labels"] = "gradients"
    single_step: bool = False
    rank: int | None = None
    passes: float = 50.0
    kernels: Mapping[str, float] = field(default_factory=lambda: _STEPWISE)
    rows: int = 1
    revision: int = 0
    lent: int = 0
    drawn: int = 0
    masked: int = 0

    def together(self, eps: float | None) -> int:
        """Return how many gradients of an image share a backward pass; ensembles have one with a budget."""
        return 1 if self.kind == "ensemble" and eps is not None else self.rows

    def is_weaker(self, other: AttackFacts) -> bool:
        """Return whether the other attack must not do worse on the same images and threat."""
        ranked = self.rank is not None and other.rank is not None and self.rank < other.rank
        return ranked and (self.kind == "minimum-norm") == (other.kind == "minimum-norm")


OWN_ATTACK = AttackFacts(norms=("linf", "l2", "l1", "l0"), kernels={}, revision=1)  # facts for a name outside the table
# fmt: off
ATTACKS = {
    "apgd": AttackFacts("APGD", "Croce & Hein 2020", rank=2, passes=30, kernels=_COSTLY, revision=3),
    "apgd-dlr": AttackFacts("APGD-DLR", "Croce & Hein 2020", rank=2, passes=30, kernels=_COSTLY, revision=3),
    "apgd-targeted": AttackFacts("APGD-T", "Croce & Hein 2020", rank=2, revision=1),
    "cw": AttackFacts("C&W", "Carlini & Wagner 2017", "minimum-norm", ("l2",), passes=3000, revision=2,
                      kernels=_STEPWISE | {"fully connected": 0.8}),
    "ddn": AttackFacts("DDN", "Rony et al. 2019", "minimum-norm", ("l2",), passes=60, kernels=_COSTLY),
    "deepfool": AttackFacts("DeepFool", "Moosavi-Dezfooli et al. 2016", "minimum-norm", rank=0, passes=20, revision=1,
                            kernels=_STEPWISE | {"wide": 0.5}, rows=16),
    "fab": AttackFacts("FAB", "Croce & Hein 2020", "minimum-norm", passes=100, revision=2, rows=16),
    "fab-targeted": AttackFacts("FAB-T", "Croce & Hein 2020", "minimum-norm", revision=1),
    "fast": AttackFacts("fast", "nearest, PGD, APGD, APGD-T", "ensemble", rank=3, passes=35, revision=3, masked=1,
                        rows=3),
    "fgsm": AttackFacts("FGSM", "Goodfellow et al. 2015", single_step=True, rank=0, passes=4, kernels={}, lent=1),
    "hopskipjump": AttackFacts("HopSkipJump", "Chen et al. 2020", "minimum-norm", ("linf", "l2"), "labels", rank=0,
                               passes=5000, kernels={}, revision=1),
    "nearest": AttackFacts("Nearest", "after DDN and FAB", "minimum-norm", ("linf", "l2", "l1", "l0"), rank=1,
                           passes=170, revision=1),
    "pgd": AttackFacts("PGD", "Madry et al. 2018", rank=1, passes=10, revision=1),
    "rfgsm": AttackFacts("R-FGSM", "Tramèr et al. 2018", single_step=True, rank=0, passes=4, kernels={}, revision=1,
                         lent=1),
    "sigma-zero": AttackFacts("sigma-zero", "Cinà et al. 2025", "minimum-norm", ("l0",), passes=1000),
    "square": AttackFacts("Square", "Andriushchenko et al. 2020", "budget", ("linf", "l2"), "logits", rank=0,
                          passes=400, kernels={}, revision=2),
    "swift": AttackFacts("swift", "nearest, APGD, MALT (Melamed et al. 2024), PGD", "ensemble", rank=4,
                         passes=180, revision=1, rows=16),
    "standard": AttackFacts("standard", "AutoAttack (Croce & Hein 2020)", "ensemble", rank=5, passes=600, revision=4,
                            drawn=1, rows=16),
}


@dataclass(frozen=True)
class BoundFacts:
    """Describe a bound or a Lipschitz constant; passes: as of an attack."""

    title: str = ""
    source: str = ""
    passes: float = 2000.0


BOUNDS = {
    "interval": BoundFacts("interval bounds", "Gowal et al. 2018", 20),
    "crown-interval": BoundFacts("CROWN over interval bounds, for deep networks", "Zhang et al. 2020", 20),
    "crown": BoundFacts("CROWN", "Zhang et al. 2018"),
    "alpha-crown": BoundFacts("CROWN with slopes found by gradient ascent", "Xu et al. 2021"),
}
LIPSCHITZ = {
    "sampled": BoundFacts("largest gradient norm sampled: a lower estimate", passes=400),
    "clever": BoundFacts("extreme-value estimate, never a bound", "Weng et al. 2018", 400),
    "product": BoundFacts("upper bound: product of the norms of all layers", "Hein & Andriushchenko 2017", 400),
    "active": BoundFacts("upper bound: the same over units that can be active", passes=400),
    "jacobian": BoundFacts("upper bound: intervals of the Jacobian, exact in one linear region", passes=400),
}

@dataclass(frozen=True)
class ModelFacts:
    """Describe which kind of layers take a network's time, and how it is trained by default."""

    layers: Literal["convolutional", "wide", "fully connected"]
    recipe: Mapping[str, Any]


_CIFAR = {"batch_size": 128, "warmup": 0.05, "augment": True}
# For a user's own network: Adam is the most tolerant.
OWN_MODEL = ModelFacts(
    "convolutional", {"optimizer": "adam", "lr": 1e-3, "weight_decay": 0.0, "epochs": 10, "warmup": 0.05}
)
MODELS = {
    "linear": ModelFacts("fully connected", {"lr": 0.01, "epochs": 10}),
    "mlp": ModelFacts("fully connected", {"lr": 0.05, "epochs": 12}),
    "lenet-300-100": ModelFacts("fully connected", {"lr": 0.05, "epochs": 12}),
    "lenet-5": ModelFacts("convolutional", {"lr": 0.01, "epochs": 8}),
    "small-cnn": ModelFacts("convolutional", {"lr": 0.05, "epochs": 12, **_CIFAR}),
    # In wide layers torch is nearer to the machine's peak, so that kernels gain only at higher sparsity.
    "vgg-like": ModelFacts("wide", {"lr": 0.05, "epochs": 12, **_CIFAR}),
    "resnet-32": ModelFacts("convolutional", {"lr": 0.1, "epochs": 15, **_CIFAR}),
}
# fmt: on
