"""How each network is trained where nobody says; docs/recipes.md lists what that reaches, and in which time."""

from __future__ import annotations

from typing import Any

_CIFAR = {"batch_size": 128, "warmup": 0.05, "augment": True}

RECIPES: dict[str, dict[str, Any]] = {
    "linear": {"lr": 0.01, "epochs": 10},
    "mlp": {"lr": 0.05, "epochs": 12},
    "lenet-300-100": {"lr": 0.05, "epochs": 12},
    "lenet-5": {"lr": 0.01, "epochs": 8},
    "vgg-like": {"lr": 0.05, "epochs": 12, **_CIFAR},
    "resnet-32": {"lr": 0.1, "epochs": 15, **_CIFAR},
}
# For a user's own network: Adam forgives most.
_OWN = {"optimizer": "adam", "lr": 1e-3, "weight_decay": 0.0, "epochs": 10, "warmup": 0.05}


def recipe_settings(name: str, *, channels: int, fine_tuning: bool = False) -> dict[str, Any]:
    """Return the settings of `train.Recipe` for a network by its name or "package.module:factory".

    Images of one channel are not augmented: a mirrored digit is another sign, or none. Fine-tuning takes half the
    learning rate.
    """
    settings = dict(RECIPES.get(name, _OWN))
    if channels == 1:
        settings["augment"] = False
    if fine_tuning:
        settings["lr"] /= 2
    return settings
