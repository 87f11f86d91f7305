"""How each network is trained where nobody says; docs/recipes.md lists what that reaches, and in which time."""

from __future__ import annotations

from typing import Any

from ..facts import MODELS, OWN_MODEL


def recipe_settings(name: str, *, channels: int, fine_tuning: bool = False) -> dict[str, Any]:
    """Return the settings of `train.Recipe` for a network by its name or "package.module:factory".

    Images of one channel are not augmented: a mirrored digit is another sign, or none. Fine-tuning takes half the
    learning rate.
    """
    settings = dict(MODELS.get(name, OWN_MODEL).recipe)
    if channels == 1:
        settings["augment"] = False
    if fine_tuning:
        settings["lr"] /= 2
    return settings
