"""Other libraries' attacks as functions (model, x, y) -> x_adv, each in the settings in which it does best."""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import sys
import types
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

__all__ = ["PEERS", "Attacker", "adv_lib", "can_import", "foolbox", "missing", "peers"]

Attacker = Callable[[nn.Module, Tensor, Tensor], Tensor]


def adv_lib(
    model: nn.Module, x: Tensor, y: Tensor, *, name: str, eps: float | None = None, **options: object
) -> Tensor:
    """Run an attack of adversarial-library."""
    module, _, function = f"adv_lib.attacks.{name}".rpartition(".")
    attack = getattr(importlib.import_module(module), function)
    if name == "pgd_linf":
        return attack(model, x, y, eps, **options)
    if name == "apgd":
        return attack(model, x, y, eps, float("inf"), **options)
    return attack(model, x, y, **options)


def foolbox(
    model: nn.Module, x: Tensor, y: Tensor, *, name: str, eps: float | None = None, **options: object
) -> Tensor:
    """Run an attack of foolbox."""
    library = importlib.import_module("foolbox")
    wrapped = library.PyTorchModel(model, bounds=(0, 1), device="cpu")
    return getattr(library.attacks, name)(**options)(wrapped, x, y, epsilons=eps)[1]


def _art(model: nn.Module, x: Tensor, y: Tensor, *, name: str, eps: float | None = None, **options: object) -> Tensor:
    evasion = importlib.import_module("art.attacks.evasion")
    estimators = importlib.import_module("art.estimators.classification")
    wrapped = estimators.PyTorchClassifier(
        model, nn.CrossEntropyLoss(), tuple(x.shape[1:]), 10, clip_values=(0, 1), device_type="cpu"
    )
    if eps is not None:
        options |= {"eps": eps}
        if name == "ProjectedGradientDescent":
            options |= {"eps_step": eps / 10}
    made = getattr(evasion, name)(wrapped, batch_size=len(x), verbose=False, **options)
    return torch.from_numpy(made.generate(x.numpy(), y.numpy()))


def _torchattacks(model: nn.Module, x: Tensor, y: Tensor, *, eps: float) -> Tensor:
    return importlib.import_module("torchattacks").AutoAttack(model, norm="Linf", eps=eps, n_classes=10, seed=0)(x, y)


def _pyautoattack(model: nn.Module, x: Tensor, y: Tensor, *, eps: float) -> Tensor:
    logging.getLogger("auto-attack").setLevel(logging.WARNING)
    attack = importlib.import_module("pyautoattack").AutoAttack(model, norm="Linf", eps=eps, seed=0)
    with contextlib.redirect_stdout(io.StringIO()):
        found = attack.run_standard_evaluation(x, y, batch_size=len(x))
    return found[0] if isinstance(found, tuple) else found


PEERS: dict[str, dict[str, Callable[..., Tensor]]] = {
    "deepfool": {
        "adv_lib": partial(adv_lib, name="df", steps=50),
        "foolbox": partial(foolbox, name="L2DeepFoolAttack", steps=50, candidates=10),
        "art": partial(_art, name="DeepFool", max_iter=50),
    },
    "ddn": {
        # No rounding to 256 grey levels: real-valued perturbations are smaller.
        "adv_lib": partial(adv_lib, name="ddn", steps=100, levels=None),
        "foolbox": partial(foolbox, name="DDNAttack", steps=100),
    },
    "cw": {
        "adv_lib": partial(adv_lib, name="carlini_wagner_l2", max_iterations=1000),
        "foolbox": partial(foolbox, name="L2CarliniWagnerAttack", steps=1000),
    },
    "pgd": {
        "adv_lib": partial(adv_lib, name="pgd_linf", steps=40),
        "foolbox": partial(foolbox, name="LinfPGD", steps=40),
        "art": partial(_art, name="ProjectedGradientDescent", max_iter=40, num_random_init=1),
    },
    "apgd": {
        "adv_lib": partial(adv_lib, name="apgd", loss_function="ce"),
        "art": partial(_art, name="AutoProjectedGradientDescent", max_iter=100, nb_random_init=1),
    },
    "autoattack": {"torchattacks": _torchattacks, "pyautoattack": _pyautoattack},
}


def peers(work: str, eps: float | None = None) -> dict[str, Attacker]:
    """Return the installed contestants for a kind of work in `PEERS`."""
    bound: dict[str, object] = {} if eps is None else {"eps": eps}
    absent = missing(work)
    return {name: partial(attack, **bound) for name, attack in PEERS[work].items() if name not in absent}


def missing(work: str) -> dict[str, str]:
    """Return the contestants that cannot be imported, and why."""
    absent = {}
    for name in PEERS[work]:
        try:
            _import(name)
        except ImportError as error:
            absent[name] = str(error)
    return absent


def can_import(name: str) -> bool:
    """Return whether a library can be imported."""
    try:
        _import(name)
    except ImportError:
        return False
    return True


def _import(name: str) -> None:
    if name == "adv_lib":
        # It imports these for live plots and for a perceptual distance, which no attack here uses.
        for needless in ("visdom", "torchvision"):
            try:
                importlib.import_module(needless)
            except (ImportError, RuntimeError):  # RuntimeError: built for another torch
                sys.modules[needless] = types.ModuleType(needless)
                sys.modules[needless].models = None  # type: ignore[attr-defined]
    importlib.import_module(f"{name}.attacks" if name == "adv_lib" else name)
