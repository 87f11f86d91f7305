"""Check the requirements for a model: refuse errors and flag what is unreliable (docs/flags.md).

A model maps float images in [0, 1], shape (N, ...), to logits (N, classes), each image for itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from scipy import special  # not scipy.stats, which takes a second or two to import
from torch import Tensor, nn
from torch.nn import functional

from ...errors import UserError
from ...outputs import precision
from ...threat import Threat, diameter, norm_name
from .._gradients import in_parts
from ..algorithms._losses import cross_entropy, is_answer, margin_loss

# Layers that answer differently in training mode.
_MODAL = (nn.modules.dropout._DropoutNd, nn.modules.batchnorm._NormBase)
# Enough images to see a systematic fault, few enough to cost less than the cheapest attack; and how many of them are
# moved along random signs.
_SAMPLE, _DIFFERENCES = 32, 8
# A gradient of the cross-entropy at the logits below this may vanish on the way back to the image.
_FAINT = 1e-20
_MANY = 0.1
# A step of this linf length is so short that a trained network follows its gradient; in half precision it is so long
# that rounding does not hide the gain.
_SHORT, _SHORT_IN = 1e-3, {torch.float16: 5e-3, torch.bfloat16: 2e-2}
# Half the length of a difference along random signs, and how many times its square a gradient may miss there: a zero
# gradient misses the square once.
_WIDE, _WORSE = 5e-3, 4.0
# How far rounding may lead out of the box, as the evaluator allows.
_ROUNDING = 1e-6
# A result passes about ten checks, and at most one sound network in a hundred may fail one of them.
_CHANCE = 1e-3

FLAGS = {
    "box-violation": "the attack left the box [0, 1]",
    "budget-violation": "the attack moved an image by more than eps",
    "nonfinite-logits": "the model returned NaN or infinite logits",
    "zero-gradients": "the gradient of the loss is exactly zero for many images",
    "partial-gradients": "autograd's gradient misses part of the pixels' effect",
    "shattered-gradients": "short steps along the gradient do not gain what it predicts",
    "random-model": "the model's outputs change between passes",
    "training-mode": "layers were in training mode",
    "batch-dependent": "the logits of an image depend on other images of the batch",
    "state-changed": "parameters or buffers changed during the attack",
    "masked-gradients": "a straight-through pass, an expectation or another model's examples beat plain gradients",
    "weaker-wins": "an attack that should be weaker did better",
    "silent-success": "the attack found an adversarial example but returned another point",
    "unlimited-budget": "the attack fails on some images with an unlimited budget",
    "not-converged": "a longer run of the same attack finds more",
    "loss-not-increasing": "the attack ended at a lower loss than it began for many images",
    "logit-scale": "the result depends on the scale of the logits",
    "unfinished-search": "a minimum-norm attack found no adversarial example for some images",
}


@dataclass(frozen=True)
class Flag:
    """A warning that a result may be unreliable: a name from FLAGS, and a detail."""

    name: str
    detail: str

    def __post_init__(self) -> None:
        if self.name not in FLAGS:
            raise ValueError(f"unknown flag {self.name!r}")


def exceeds(more: int, fewer: int, *, share: float, of: int) -> bool:
    """Return whether one attack does notably and significantly better than another on the same images.

    more, fewer: numbers of images that only the first fools, and only the second; of: all images. Notably: by at least
    `share` of all. Significantly: if both were equally strong, an image that only one of them fools would be either's
    with probability 1/2, and a count this uneven has a probability of at most 0.001 (McNemar's exact test, one-sided).
    """
    apart = more + fewer
    return more - fewer >= share * of and _chance(more, apart, 0.5) <= _CHANCE


def many(count: int, of: int, *, share: float) -> bool:
    """Return whether a count is more than `share` of all images, beyond chance.

    If `share` were the true fraction, so many in a sample of `of` would have a probability of at most 0.001 (exact
    binomial test, one-sided).
    """
    return _chance(count, of, share) <= _CHANCE


def _chance(count: int, of: int, share: float) -> float:
    """Return the probability of `count` or more successes in `of` trials, each with probability `share`."""
    return float(special.bdtrc(count - 1, of, share))


def check_inputs(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return images and labels as attacks need them; raise UserError unless x are floats in [0, 1] and y int64 labels.

    The returned images are detached, float32 or float64, and clipped if rounding left them up to 1e-6 outside.
    """
    if not x.is_floating_point():
        raise UserError(f"images must be floats in [0, 1], not {x.dtype}; divide 8-bit images by 255")
    if y.dtype != torch.int64 or y.shape != x.shape[:1]:
        raise UserError(f"labels must be int64 of shape ({len(x)},), not {y.dtype} of shape {tuple(y.shape)}")
    if len(x) == 0:
        raise UserError("there are no images to attack")
    x, y = (value.clone() if value.is_inference() else value.detach() for value in (x, y))
    x = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    low, high = float(x.min()), float(x.max())
    if low >= 0 and high <= 1:
        return x, y
    if low >= -_ROUNDING and high <= 1 + _ROUNDING:
        return x.clamp(0, 1), y
    way_out = (
        "divide 8-bit images by 255, and make normalisation the model's first layer instead of applying it to them"
    )
    if low >= -0.1 and high <= 1.1:
        way_out = "clip values that resizing or compression moved out of range: x.clamp(0, 1)"
    raise UserError(f"images must lie in [0, 1] but span [{low:.9g}, {high:.9g}]; {way_out}")


def check_targets(model: nn.Module, x: Tensor, y: Tensor, targets: Tensor | None) -> None:
    """Raise UserError unless targets are int64 classes that the model has, each different from the image's own."""
    if targets is None:
        return
    if targets.dtype != torch.int64 or targets.shape != y.shape:
        raise UserError(
            f"targets must be int64 of shape {tuple(y.shape)}, not {targets.dtype} of shape {tuple(targets.shape)}"
        )
    with torch.no_grad():
        _check_classes("targets", targets, model(x[:1]))
    own = int((targets == y).sum())
    if own:
        raise UserError(f"{own} images have their own class as target; omit them or choose another class")


def check_threat(x: Tensor, threat: Threat) -> None:
    """Raise UserError for a budget larger than the distance of any two images: eps is then in other units."""
    widest = diameter(x, threat.norm)
    if threat.eps is not None and threat.eps > widest:
        raise UserError(
            f"eps {threat.eps} is larger than any {norm_name(threat.norm)} distance between images ({widest:.4g}); "
            "eps is measured where pixels span [0, 1]: divide it by 255"
        )


def check_mode(model: nn.Module) -> tuple[Flag, ...]:
    """Return a flag if layers that depend on the mode are in training mode; call it before `frozen`."""
    kinds = sorted({type(m).__name__ for m in model.modules() if m.training and isinstance(m, _MODAL)})
    if not kinds:
        return ()
    what = f"{', '.join(kinds)} in training mode; the attack used eval mode and restored the mode"
    return (Flag("training-mode", f"{what}: call model.eval() before measuring anything else"),)


def check_losses(before: Tensor, after: Tensor) -> tuple[Flag, ...]:
    """Return a flag if a failed attack left more than a tenth of its images, beyond chance, with a lower margin.

    before, after: the margins (N,) of the images it failed on. From the indicators of attack failure (Pintor et al.
    2022): an ascent that ends lower does not follow the model.
    """
    lower, failed = int((after < before).sum()), len(before)
    if failed == 0 or not many(lower, failed, share=_MANY):
        return ()
    what = f"{lower} of {failed} images on which it failed ended with a lower loss"
    return (Flag("loss-not-increasing", f"{what}; take smaller steps, or several attacks"),)


def check_model(
    model: nn.Module, x: Tensor, y: Tensor, *, draws: bool, batch_size: int
) -> tuple[bool, tuple[Flag, ...], Tensor]:
    """Return whether a model in eval mode draws, flags, and the logits of the sample: of the first 32 images.

    Raise UserError if it violates the requirements. draws: whether it declares that it draws; passes then cannot be
    compared. Three passes are made: of the first image, of the sample with its gradient (`batch_size` images at a
    time), and of moved images together with the first 8 as they are.
    """
    with torch.no_grad():
        alone = model(x[:1])
    _check_classes("labels", y, alone)
    x, y = x[:_SAMPLE], y[:_SAMPLE]
    logits, gradient = in_parts(model, x, margin_loss, y, batch_size)
    if bool((logits >= 0).all()) and bool(((logits.sum(1) - 1).abs() < 1e-3).all()):
        raise UserError("the outputs look like probabilities; remove the model's final softmax so it returns logits")
    right = is_answer(logits) & (logits.argmax(1) == y)
    slope = _Slope(model, x[right], y[right], logits[right], gradient[right], batch_size)
    moves, few = slope.moves(), x[:_DIFFERENCES]
    with torch.no_grad():
        ends = model(torch.cat([few, *moves]))
    random = draws or (_differ(ends[: len(few)], logits[: len(few)]) and is_random(model, x))
    flags = []
    if not random and _differ(alone, logits[:1]):
        what = "the logits of the first image change if it is evaluated alone"
        flags.append(Flag("batch-dependent", f"{what}; make normalisation use running statistics"))
    if bool(right.any()):
        flags += slope.missing()
        # Draws would be taken for jumps.
        flags += [] if flags or random else slope.shattered(moves, ends[len(few) :])
    return random, tuple(flags), logits


def is_random(model: nn.Module, x: Tensor) -> bool:
    """Return whether a model in eval mode returns different logits for the same images."""
    with torch.no_grad():
        return _differ(model(x[:_SAMPLE]), model(x[:_SAMPLE]))


def state_of(model: nn.Module) -> list[tuple[int, int]]:
    """Return a fingerprint of parameters and buffers: the address and version of each tensor."""
    return [(tensor.data_ptr(), tensor._version) for tensor in (*model.parameters(), *model.buffers())]


def _check_classes(what: str, labels: Tensor, logits: Tensor) -> None:
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= logits.shape[1]:
        raise UserError(f"{what} span {low} to {high} but the model has {logits.shape[1]} classes")


def _differ(first: Tensor, second: Tensor) -> bool:
    # Different batch shapes use different kernels: rounding does not count as a difference.
    tolerance = 1e-4 * float(first.abs().nan_to_num(posinf=0.0).max()) + 1e-6
    return bool(((first - second).abs().nan_to_num() > tolerance).any())


@dataclass(frozen=True)
class _Slope:
    """Logits, and the margin's gradient, at images x that are classified correctly as y."""

    model: nn.Module
    x: Tensor
    y: Tensor
    logits: Tensor
    gradient: Tensor
    batch_size: int

    def missing(self) -> list[Flag]:
        """Return a flag if the margin, or at least the cross-entropy, has no gradient at all at many images."""
        if (share := _dead(self.gradient)) > _MANY:
            way_out = "`run` uses a secant's gradient for dead layers, else finite differences; compare with square"
            return [Flag("zero-gradients", f"at {share:.0%} of the images; {way_out}")]
        pull = self.logits.softmax(1) - functional.one_hot(self.y, self.logits.shape[1])
        if precision(self.model, self.logits) in _SHORT_IN or bool((pull.abs().amax(1) < _FAINT).any()):
            _, gradient = in_parts(self.model, self.x, cross_entropy, self.y, self.batch_size)
            if (share := _dead(gradient)) > _MANY:
                what = f"the cross-entropy has no gradient at {share:.0%} of the images"
                return [Flag("logit-scale", f"{what}; use attacks on the margin only")]
        return []

    @property
    def length(self) -> float:
        """The length of a step that the model's precision allows to judge."""
        return _SHORT_IN.get(precision(self.model, self.logits), _SHORT)

    def moves(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the images moved along the gradient, and a few moved to both sides along random signs."""
        x, wide = self.x, max(_WIDE, self.length)
        few, generator = x[:_DIFFERENCES], torch.Generator().manual_seed(0)
        sign = torch.rand(few.shape, generator=generator, dtype=x.dtype).sub_(0.5).sign_().to(x)
        up, down = ((few + side * wide * sign).clamp(0, 1) for side in (1, -1))
        return (x + self.length * self.gradient.sign()).clamp(0, 1), up, down

    def shattered(self, moves: tuple[Tensor, Tensor, Tensor], ends: Tensor) -> list[Flag]:
        """Return a flag if short steps along the gradient do not gain what it predicts; ends: the logits of `moves`.

        From "unstable predictions" of Pintor et al. 2022, whose random steps of any size also react to true curvature.
        """
        x, y, gradient, (stepped, up, down) = self.x, self.y, self.gradient, moves
        few, wide = y[:_DIFFERENCES], max(_WIDE, self.length)
        after, higher, lower = torch.split(margin_loss(ends, torch.cat([y, few, few])), [len(x), len(few), len(few)])
        gained = after - margin_loss(self.logits, y)
        promised = ((stepped - x) * gradient).flatten(1).sum(1)
        off = int(((gained - promised).abs() > 0.5 * promised).sum())
        way_out = "compare with `square`, which needs no gradients, and with surrogates"
        if many(off, len(x), share=_MANY):
            return [Flag("shattered-gradients", f"at {off} of {len(x)} images; {way_out}")]
        changed = higher - lower
        missed = changed - ((up - down) * gradient[: len(few)]).flatten(1).sum(1)
        if missed.square().sum() > _WORSE * changed.square().sum():
            return [Flag("shattered-gradients", f"within {wide:g} pixel units it is not informative; {way_out}")]
        return []


def _dead(gradient: Tensor) -> float:
    """Return the share of images whose gradient is exactly zero."""
    return float((gradient.flatten(1) == 0).all(1).double().mean())
