"""Build networks by name or by a user's factory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..errors import UserError, place, told
from ..facts import MODELS as FACTS
from ..facts import OWN_MODEL
from ..plugins import look_up, takes
from ._architectures import lenet_5, lenet_300_100, linear, mlp, resnet_32, small_cnn, vgg_like
from ._hubs import build_from_hub, is_hub_name

MODELS: dict[str, Callable[..., nn.Module]] = {
    "linear": linear,
    "mlp": mlp,
    "lenet-300-100": lenet_300_100,
    "lenet-5": lenet_5,
    "small-cnn": small_cnn,
    "vgg-like": vgg_like,
    "resnet-32": resnet_32,
}


def build(
    name: str,
    *,
    shape: tuple[int, ...],
    classes: int,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    seed: int = 0,
    width: float | None = None,
    widths: tuple[int, ...] | None = None,
    depth: int | None = None,
) -> nn.Module:
    """Build a network by name, a library's ("timm:resnet18"), or a user's "package.module:factory", from `seed`.

    The result maps images (N, *shape), float in [0, 1], to logits (N, classes). A user's factory is called with those
    of the keywords shape, classes, mean, std that it accepts. `width` scales channels, `widths` are an mlp's hidden
    sizes, `depth` is resnet-32's. Raise UserError for an unknown name or an option the network does not have.
    """
    if len(shape) != 3 or min(shape) < 1 or classes < 2:
        raise UserError(
            f"a model needs images (channels, height, width) and two classes or more, not {shape}, {classes}"
        )
    if is_hub_name(name):
        if (width, widths, depth) != (None, None, None):
            raise UserError(f"'{name}' has a fixed size; width, widths and depth apply only to built-in models")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return build_from_hub(name, shape=shape, classes=classes)
    factory: Callable[..., nn.Module] = look_up("model", name, MODELS)
    if isinstance(factory, nn.Module):
        raise UserError(f"'{name}' is a module; give a function without arguments that returns it")
    about = {"shape": shape, "classes": classes, "mean": mean, "std": std}
    given: dict[str, Any] = {key: value for key, value in about.items() if _takes(factory, key)}
    for key, value in (("width", width), ("widths", widths), ("depth", depth)):
        if value is not None and not _takes(factory, key):
            raise UserError(f"model '{name}' has no option '{key}'")
        given |= {} if value is None else {key: value}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            model = factory(**given)
        except UserError:
            raise
        except Exception as error:  # a user's own code may raise anything
            hint = "; a factory gets shape, classes, mean and std if they are its parameters" * (place(error) is None)
            raise UserError(f"the factory '{name}' fails: {told(error)}{hint}") from error
    if not isinstance(model, nn.Module):
        what = f"the class {model.__name__}" if isinstance(model, type) else type(model).__name__
        raise UserError(f"factory '{name}' returned {what}, not a torch.nn.Module")
    return model


def takes_moments(name: str) -> bool:
    """Return whether a user's factory accepts the mean and std of the data."""
    factory = look_up("model", name, MODELS)
    return _takes(factory, "mean") and _takes(factory, "std")


def recipe_settings(name: str, *, channels: int, fine_tuning: bool = False) -> dict[str, Any]:
    """Return the settings of `train.Recipe` for a network's name, or for a user's network (docs/recipes.md).

    Images with one channel are not augmented, because a mirrored digit is another symbol or none. Fine-tuning uses half
    the learning rate.
    """
    settings = dict(FACTS.get(name, OWN_MODEL).recipe)
    if channels == 1:
        settings["augment"] = False
    if fine_tuning:
        settings["lr"] /= 2
    return settings


def _takes(factory: Callable[..., nn.Module], name: str) -> bool:
    try:
        return takes(factory, name)
    except ValueError as error:
        raise UserError(f"factory {factory!r} has no readable signature; wrap it in a function") from error
