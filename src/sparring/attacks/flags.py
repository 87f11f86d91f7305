"""Reliability flags: what makes a robustness number doubtful. `docs/flags.md` explains each name."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["FLAGS", "Flag"]

FLAGS = {
    "box-violation": "the attack left the box [0, 1]",
    "budget-violation": "the attack moved an image by more than eps",
    "nonfinite-logits": "the model returned NaN or infinite logits",
    "zero-gradients": "the gradient of the loss is exactly zero for many images",
    "random-model": "the model answers differently each time",
    "batch-dependent": "an image's logits depend on the other images of the batch",
    "state-changed": "parameters or buffers changed during the attack",
    "masked-gradients": "a straight-through backward pass or another model's examples beat the model's own gradients",
    "weaker-wins": "an attack that should be weaker did better",
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
