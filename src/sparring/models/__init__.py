"""Networks by name, a user's own, and the file that holds one."""

from __future__ import annotations

from ._layers import Normalise, Residual
from ._registry import MODELS, build, load_weights_, recipe_settings
from ._saved import Blueprint, load_model, save_model

__all__ = [
    "MODELS",
    "Blueprint",
    "Normalise",
    "Residual",
    "build",
    "load_model",
    "load_weights_",
    "recipe_settings",
    "save_model",
]
