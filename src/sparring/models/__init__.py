"""Networks by name, a user's own, and the file that holds one."""

from __future__ import annotations

from ._checkpoints import Checkpoint, plain_weights, read_checkpoint
from ._layers import Normalise, Residual
from ._registry import MODELS, build, recipe_settings
from ._saved import Blueprint, load_model, save_model
from ._weights import load_weights_

__all__ = [
    "MODELS",
    "Blueprint",
    "Checkpoint",
    "Normalise",
    "Residual",
    "build",
    "load_model",
    "load_weights_",
    "plain_weights",
    "read_checkpoint",
    "recipe_settings",
    "save_model",
]
