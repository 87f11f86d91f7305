"""Models by name, a user's own models, and model files.

Examples:
    >>> from sparring import models
    >>> net = models.build("mlp", shape=(1, 8, 8), classes=10, mean=(0.5,), std=(0.3,), widths=(16,))
    >>> sum(p.numel() for p in net.parameters())
    1210
"""

from __future__ import annotations

from ._architectures import Normalise, Residual
from ._checkpoints import Checkpoint, plain_weights, read_checkpoint
from ._hubs import HubModel, build_from_hub, describe, hub_version, is_hub_name, load_hub_weights_
from ._registry import MODELS, build, recipe_settings, takes_moments
from ._saved import Blueprint, load_model, read_blueprint, save_model
from ._weights import load_weights_, read_weights

__all__ = [
    "MODELS",
    "Blueprint",
    "Checkpoint",
    "HubModel",
    "Normalise",
    "Residual",
    "build",
    "build_from_hub",
    "describe",
    "hub_version",
    "is_hub_name",
    "load_hub_weights_",
    "load_model",
    "load_weights_",
    "plain_weights",
    "read_blueprint",
    "read_checkpoint",
    "read_weights",
    "recipe_settings",
    "save_model",
    "takes_moments",
]
