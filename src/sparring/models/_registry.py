"""Build networks by name, or by a user's own factory."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from ..errors import UserError, place, told
from ..facts import MODELS as FACTS
from ..facts import OWN_MODEL
from ..plugins import look_up
from ._architectures import lenet_5, lenet_300_100, linear, mlp, resnet_32, vgg_like

FLOATS = {torch.float16, torch.bfloat16, torch.float32, torch.float64}
MODELS: dict[str, Callable[..., nn.Module]] = {
    "linear": linear,
    "mlp": mlp,
    "lenet-300-100": lenet_300_100,
    "lenet-5": lenet_5,
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
    """Build a network by name, or a user's own by "package.module:factory", initialised from `seed`.

    The result maps images (N, *shape), float in [0, 1], to logits (N, classes). A user's factory is called with those
    of the keywords shape, classes, mean, std that it accepts. `width` scales channels, `widths` are an mlp's hidden
    sizes, `depth` is resnet-32's. Raise UserError for an unknown name or an option the network does not have.
    """
    if len(shape) != 3 or min(shape) < 1 or classes < 2:
        raise UserError(
            f"a model needs images (channels, height, width) and two classes or more, not {shape}, {classes}"
        )
    factory: Callable[..., nn.Module] = look_up("model", name, MODELS)
    if isinstance(factory, nn.Module):
        raise UserError(f"'{name}' is a model; name a function without arguments that returns it")
    known = _parameters(factory)
    given: dict[str, Any] = {"shape": shape, "classes": classes, "mean": mean, "std": std}
    if known is not None:
        given = {key: value for key, value in given.items() if key in known}
    for key, value in (("width", width), ("widths", widths), ("depth", depth)):
        if value is not None:
            if known is not None and key not in known:
                raise UserError(f"model '{name}' has no option '{key}'")
            given[key] = value
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            model = factory(**given)
        except UserError:
            raise
        except Exception as error:  # a user's own code may raise anything
            takes = "; factories are given those of shape, classes, mean, std that they name" * (place(error) is None)
            raise UserError(f"the factory '{name}' fails: {told(error)}{takes}") from error
    if not isinstance(model, nn.Module):
        what = f"the class {model.__name__}" if isinstance(model, type) else type(model).__name__
        raise UserError(f"factory '{name}' returned {what}, not a torch.nn.Module")
    return model


def recipe_settings(name: str, *, channels: int, fine_tuning: bool = False) -> dict[str, Any]:
    """Return the settings of `train.Recipe` by a network's name, or for a user's (docs/recipes.md).

    Images of one channel are not augmented: a mirrored digit is another sign, or none. Fine-tuning takes half the
    learning rate.
    """
    settings = dict(FACTS.get(name, OWN_MODEL).recipe)
    if channels == 1:
        settings["augment"] = False
    if fine_tuning:
        settings["lr"] /= 2
    return settings


def _parameters(factory: Callable[..., nn.Module]) -> set[str] | None:
    """Return the keywords that a factory accepts; None where it accepts any."""
    try:
        parameters = inspect.signature(factory).parameters.values()
    except ValueError as error:
        raise UserError(f"factory {factory!r} has no signature that can be read; wrap it in a function") from error
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters):
        return None
    return {p.name for p in parameters}


def load_weights_(model: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    """Copy named tensors into a model's parameters and buffers.

    Raise UserError that names the first tensor that is missing, unknown, of another shape or kind of number, not
    finite, or that the model's own type would round.
    """
    own = model.state_dict()
    learned = dict(model.named_parameters())  # some buffers take the size of what they are given
    for name in own:
        if name not in tensors:
            raise UserError(f"the weights lack '{name}', which the model has: {_mismatch(own, tensors)}")
    for name, value in tensors.items():
        if name not in own:
            raise UserError(f"the weights have '{name}', which the model lacks: {_mismatch(own, tensors)}")
        _check_kind(name, value, own[name].dtype)
        if name in learned and value.shape != own[name].shape:
            raise UserError(f"'{name}' has shape {tuple(value.shape)} in the weights and {tuple(own[name].shape)} here")
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise UserError(f"'{name}' holds NaN or infinite values: the weights are damaged or training diverged")
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise UserError(f"the weights do not fit the model: {str(error).splitlines()[-1].strip()}") from error


def _mismatch(own: Iterable[str], given: Iterable[str]) -> str:
    """Say why the names of weights differ from a model's, and what to do, as far as the names tell."""
    mine, theirs = set(own), set(given)
    if any(name.endswith("_orig") for name in theirs):
        return "they were saved under torch.nn.utils.prune; call its remove(module, 'weight') before saving"
    first, inner = min(theirs, default=""), min(mine, default="")
    for prefix in (first[: at + 1] for at, mark in enumerate(first) if mark == "."):
        if {name.removeprefix(prefix) for name in theirs} == mine:
            return f"every name in the file begins with '{prefix}', as a wrapper writes; save the network inside of it"
    for prefix in (name[: at + 1] for name in {inner, *mine} for at, mark in enumerate(name) if mark == "."):
        if theirs and {prefix + name for name in theirs} <= mine:
            return (
                f"they are those of the network inside, '{prefix}...'; load them in the factory, before it is wrapped"
            )
    return "do model and weights belong together?"


def _check_kind(name: str, value: torch.Tensor, dtype: torch.dtype) -> None:
    """Raise UserError for numbers that a tensor of this type would change: integers as weights, or ones it rounds."""
    if value.dtype == dtype:
        return
    if value.is_floating_point() != dtype.is_floating_point or value.dtype not in FLOATS | {torch.int64}:
        raise UserError(f"'{name}' holds {value.dtype} in the weights and {dtype} here: quantised? Save it as {dtype}")
    if not torch.equal(value.to(dtype).to(value.dtype).nan_to_num(), value.nan_to_num()):
        raise UserError(
            f"'{name}' holds {value.dtype}, which {dtype} would round; save it so, or build the model in that"
        )
