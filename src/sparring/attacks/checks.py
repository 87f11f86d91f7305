"""The model's contract, checked and not trusted: what is wrong is refused, what is doubtful is flagged.

A model maps float images in [0, 1], shape (N, ...), to logits (N, classes), each image for itself.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..threat import L1, LINF, Threat, norm_name
from .derivatives import logits_and_gradient
from .flags import Flag
from .losses import cross_entropy, margin

__all__ = ["check_inputs", "check_model", "check_threat", "is_random", "state_of", "zero_gradient_share"]

# Enough images to see a systematic fault, few enough to cost nothing.
_SAMPLE = 32
_MANY = 0.1


def check_inputs(x: Tensor, y: Tensor) -> None:
    """Raise UserError unless x are float images in [0, 1] and y their int64 labels."""
    if not x.is_floating_point():
        raise UserError(f"images must be floats in [0, 1], not {x.dtype}; divide 8-bit images by 255")
    if y.dtype != torch.int64 or y.shape != x.shape[:1]:
        raise UserError(f"labels must be int64 of shape ({len(x)},), not {y.dtype} of shape {tuple(y.shape)}")
    if len(x) == 0:
        raise UserError("there are no images to attack")
    low, high = float(x.min()), float(x.max())
    if not (low >= 0 and high <= 1):
        raise UserError(
            f"images must lie in [0, 1] but span [{low:.3g}, {high:.3g}]; divide 8-bit images by 255, "
            "and make normalisation the model's first layer instead of applying it to the images"
        )


def check_threat(x: Tensor, threat: Threat) -> None:
    """Raise UserError for a budget that no image pair can use up: eps is then in other units."""
    pixels = float(x[0].numel())
    diameter = {LINF: 1.0, L1: pixels}.get(threat.norm, math.sqrt(pixels))
    if threat.eps is not None and threat.eps > diameter:
        raise UserError(
            f"eps {threat.eps} is larger than any {norm_name(threat.norm)} distance between images ({diameter:.4g}); "
            "eps is measured where pixels span [0, 1]: divide it by 255"
        )


def check_model(model: nn.Module, x: Tensor, y: Tensor, *, random: bool) -> tuple[Flag, ...]:
    """Return what is doubtful about a model in eval mode; raise UserError where it breaks the contract.

    random: whether `is_random` found that the model draws, in which case passes cannot be compared.
    """
    x, y = x[:_SAMPLE], y[:_SAMPLE]
    with torch.no_grad():
        logits = model(x)
    _check_logits(logits, y)
    flags = []
    if not random:
        with torch.no_grad():
            alone = model(x[:1])
        if _differ(alone, logits[:1]):
            flags.append(Flag("batch-dependent", "the first image's logits change when it comes alone"))
    finite = torch.isfinite(logits).all(1)
    x, y, logits = x[finite], y[finite], logits[finite]
    right = logits.argmax(1) == y
    if bool(right.any()):
        flags += _gradient_flags(model, x[right], y[right])
    return tuple(flags)


def is_random(model: nn.Module, x: Tensor) -> bool:
    """Return whether a model in eval mode answers the same images differently."""
    with torch.no_grad():
        return _differ(model(x[:_SAMPLE]), model(x[:_SAMPLE]))


def zero_gradient_share(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Return the share of images at which the margin has no gradient at all, from the first 32."""
    _, gradient = logits_and_gradient(model, x[:_SAMPLE], margin, y[:_SAMPLE])
    return float((gradient.flatten(1) == 0).all(1).double().mean())


def state_of(model: nn.Module) -> list[tuple[int, int]]:
    """Return what changes when parameters or buffers do: the place and the version of each tensor."""
    return [(tensor.data_ptr(), tensor._version) for tensor in (*model.parameters(), *model.buffers())]


def _check_logits(logits: Tensor, y: Tensor) -> None:
    if logits.dim() != 2 or len(logits) != len(y) or logits.shape[1] < 2:
        raise UserError(f"the model must return logits (N, classes) with classes >= 2, not {tuple(logits.shape)}")
    low, high = int(y.min()), int(y.max())
    if low < 0 or high >= logits.shape[1]:
        raise UserError(f"labels span {low} to {high} but the model has {logits.shape[1]} classes")
    sums = logits.sum(1)
    if bool((logits >= 0).all()) and bool(((sums - 1).abs() < 1e-3).all()):
        raise UserError("the outputs look like probabilities; remove the model's final softmax so it returns logits")


def _differ(first: Tensor, second: Tensor) -> bool:
    # Different batch shapes take different kernels: rounding is no difference.
    tolerance = 1e-4 * float(first.abs().nan_to_num(posinf=0.0).max()) + 1e-6
    return bool(((first - second).abs().nan_to_num() > tolerance).any())


def _gradient_flags(model: nn.Module, x: Tensor, y: Tensor) -> list[Flag]:
    dead = zero_gradient_share(model, x, y)
    if dead > _MANY:
        return [Flag("zero-gradients", f"at {dead:.0%} of the images")]
    _, gradient = logits_and_gradient(model, x, cross_entropy, y)
    saturated = float((gradient.flatten(1) == 0).all(1).double().mean())
    if saturated > _MANY:
        return [Flag("logit-scale", f"the cross-entropy has no gradient at {saturated:.0%} of the images")]
    return []
