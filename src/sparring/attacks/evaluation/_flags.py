"""Reliability flags: what makes a robustness number doubtful. `docs/flags.md` explains each name."""

from __future__ import annotations

from dataclasses import dataclass

from scipy import special  # not scipy.stats, which takes a second or two to import

# A result raises about ten checks, and at most one honest network in a hundred may see one fail.
_CHANCE = 1e-3

FLAGS = {
    "box-violation": "the attack left the box [0, 1]",
    "budget-violation": "the attack moved an image by more than eps",
    "nonfinite-logits": "the model returned NaN or infinite logits",
    "zero-gradients": "the gradient of the loss is exactly zero for many images",
    "partial-gradients": "autograd's gradient misses part of what the pixels do",
    "shattered-gradients": "short steps along the gradient do not gain what it promises",
    "random-model": "the model answers differently each time",
    "training-mode": "layers came in training mode",
    "batch-dependent": "an image's logits depend on the other images of the batch",
    "state-changed": "parameters or buffers changed during the attack",
    "masked-gradients": "a straight-through pass, an expectation or another model's examples beat plain gradients",
    "weaker-wins": "an attack that should be weaker did better",
    "silent-success": "the attack passed an adversarial example and returned another point",
    "unlimited-budget": "the attack fails on some images although everything is allowed",
    "not-converged": "a longer run of the same attack finds more",
    "loss-not-increasing": "the attack ended at a lower loss than it began for many images",
    "logit-scale": "the answer depends on the scale of the logits",
    "unfinished-search": "a minimum-norm attack found no adversarial example for some images",
}


@dataclass(frozen=True)
class Flag:
    """Say why a result is doubtful: a name from FLAGS and what was seen."""

    name: str
    detail: str

    def __post_init__(self) -> None:
        if self.name not in FLAGS:
            raise ValueError(f"unknown flag {self.name!r}")


def exceeds(more: int, fewer: int, *, share: float, of: int) -> bool:
    """Return whether one attack does notably and significantly better than another on the same images.

    more, fewer: the images that only the one fools, and only the other; of: all images. Notably: by at least `share`
    of all. Significantly: were both equally strong, each image that only one of them fools would be either's with
    chance 1/2, and as uneven a count has a chance of at most 0.001 (McNemar's exact test, one-sided).
    """
    apart = more + fewer
    return more - fewer >= share * of and _chance(more, apart, 0.5) <= _CHANCE


def many(count: int, of: int, *, share: float) -> bool:
    """Return whether more than `share` of all images are so, beyond chance.

    Were `share` what such images are of all there are, so many in a sample of `of` would have a chance of at most 0.001
    (exact binomial test, one-sided).
    """
    return _chance(count, of, share) <= _CHANCE


def _chance(count: int, of: int, share: float) -> float:
    """Return the chance of `count` or more successes in `of` trials, each with the chance `share`."""
    return float(special.bdtrc(count - 1, of, share))
